"""What all jobs share: the command line, one line for a user's error, one JSON line for the result.

Imports only the config, so that `--help` answers at once; a job imports its heavy parts inside its own function.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from qcrd_ray.config import ExperimentConfig, config_to_yaml, load_config, option_lines
from qcrd_ray.errors import Stopped, TooManyFailures, UserError, find_user_error
from qcrd_ray.run_folder import write_text_atomic

FAILURES_CODE = 1
USER_ERROR_CODE = 2
SIGNAL_CODE = 128
"""What a shell adds to the number of the signal that ended a command."""


def job_main(
    job: str,
    description: str,
    run: Callable[[ExperimentConfig], Mapping[str, Any]],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, run the job, print its result as the last line of standard output.

    While `run` works, everything that writes to standard output (Ray's workers and engines too) lands on standard
    error, so that the result line stays alone.

    Args:
        job: name of the job's file without `.py`.
        description: what the job does, for `--help`.
        run: gets the checked config, returns the result.
        argv: arguments; those of the process by default.

    Returns:
        The exit code: 0, 1 after `TooManyFailures` (with a result), 2 after a `UserError` (one line on standard
        error), 130 after SIGINT and 143 after SIGTERM (one line on standard error).
    """

    def prepare() -> Callable[[], Mapping[str, Any]] | None:
        arguments = option_parser(f"jobs/{job}.py", description).parse_intermixed_args(argv)
        config = load_config(arguments.config, arguments.overrides)
        if arguments.show_config:
            print(config_to_yaml(config), end="", flush=True)
            return None
        return lambda: run(config)

    return run_job(prepare)


def run_job(prepare: Callable[[], Callable[[], Mapping[str, Any]] | None]) -> int:
    """Do a job and print its result as the last line of standard output; see `job_main`.

    Args:
        prepare: reads the command line and returns the job, or None where there is nothing to do.
    """

    def work() -> int:
        job = prepare()
        if job is None:
            return 0
        stdout = _begin()
        failures: TooManyFailures | None = None
        try:
            result = job()
        except TooManyFailures as error:
            failures, result = error, error.result
        line = result_line(result)
        sys.stdout.flush()
        if failures is not None:
            _say_last(f"error: {failures}")
        stdout.write(line + "\n")
        stdout.flush()
        return 0 if failures is None else FAILURES_CODE

    return _exit_code(work)


def run_filter(prepare: Callable[[], Callable[[TextIO], None]]) -> int:
    """Do a job that writes lines to standard output as it works, and nothing else gets there; see `job_main`.

    Args:
        prepare: reads the command line and returns the job, which gets the file to write to.

    Returns:
        The exit code, 141 where the reader of a pipe has gone, as `head` does; nothing is said of that.
    """

    def work() -> int:
        job = prepare()
        stdout = _begin()
        try:
            job(stdout)
            stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # what is left in the file goes nowhere
            return SIGNAL_CODE + signal.SIGPIPE
        return 0

    return _exit_code(work)


def _begin() -> TextIO:
    """Logs to standard error, and all that is printed too; gives back a file on standard output."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
    if not sys.stderr.isatty():
        # Ray says how often a line was repeated in colour, always, and reads this when it is imported.
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    return _keep_standard_output()


def _exit_code(work: Callable[[], int]) -> int:
    """The exit code of a job, one line on standard error where it did not end well; see `job_main`."""
    received: list[int] = []
    _interrupt_on_sigterm(received)
    try:
        return work()
    except Stopped as stopped:
        _say_last(str(stopped))
        return SIGNAL_CODE + (stopped.signal or signal.SIGTERM)
    except KeyboardInterrupt:
        number = received[0] if received else signal.SIGINT
        _say_last(f"interrupted by {signal.Signals(number).name}")
        return SIGNAL_CODE + number
    except Exception as error:
        user_error = find_user_error(error)
        if user_error is None:
            raise
        _say_last(f"error: {user_error}")
        return USER_ERROR_CODE


def _say_last(line: str) -> None:
    """Write the last line of standard error; what was printed before, by Ray too, may still wait in a buffer."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stdout.flush()
    print(line, file=sys.stderr, flush=True)


def _interrupt_on_sigterm(received: list[int]) -> None:
    """Have SIGTERM do what SIGINT does, so that whatever works ends in good order, and note that it came."""

    def receive(number: int, frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, receive)


def result_line(result: Mapping[str, Any]) -> str:
    """One line of strict JSON; a number that is not finite becomes null."""
    return json.dumps(_plain(result), ensure_ascii=False, allow_nan=False)


def write_result(folder: str | Path, result: Mapping[str, Any]) -> None:
    """Write the result line as `result.json` into a folder that exists."""
    write_text_atomic(Path(folder) / "result.json", result_line(result) + "\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; options are written key=value, for example optim.lr=1e-4, see --help")


def option_parser(
    program: str, description: str, options: str = "", more: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """A parser of `--config FILE`, `--show-config` and `key=value`. Its errors are UserErrors.

    Args:
        program: path of the job's file.
        options: usage of options that the job adds.
        more: lines of help before those of the config's keys.
    """
    parser = _Parser(
        prog=f"python {program}",
        usage=f"python {program} [--config FILE] {options}[--show-config] [key=value ...]",
        description=description,
        epilog="\n".join([*more, *_option_help()]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with keys of the config")
    parser.add_argument("--show-config", action="store_true", help="print the resolved config as YAML and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    return parser


def _option_help() -> Iterator[str]:
    yield "keys of the config:"
    for key, kind, default, description in option_lines():
        yield from key_help(key, kind, default, description)


def key_help(key: str, kind: str, default: str, description: str) -> Iterator[str]:
    """The lines of help of one key."""
    yield f"  {key}  ({kind}, default {default})"
    yield from textwrap.wrap(description, 110, initial_indent="      ", subsequent_indent="      ")


def _keep_standard_output() -> TextIO:
    """Point descriptor 1 at standard error, for this process and its children; return a file on the old one."""
    sys.stdout.flush()
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        return _plain(value.item())
    if isinstance(value, os.PathLike):
        return str(value)
    raise TypeError(f"a result holds {type(value).__name__}, which JSON has no form for")
