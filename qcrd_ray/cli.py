"""What all jobs share: the command line, one line for a user's error, one JSON line for the result.

Imports only the config, so that `--help` answers at once; a job imports its heavy parts inside its own function.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qcrd_ray.config import ExperimentConfig, config_to_yaml, load_config, option_lines
from qcrd_ray.errors import TooManyFailures, UserError
from qcrd_ray.run_folder import write_text_atomic

FAILURES_CODE = 1
USER_ERROR_CODE = 2
INTERRUPT_CODE = 130


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
        error), 130 after an interrupt.
    """
    try:
        arguments = _parser(job, description).parse_intermixed_args(argv)
        config = load_config(arguments.config, arguments.overrides)
        if arguments.show_config:
            print(config_to_yaml(config), end="", flush=True)
            return 0
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s")
        stdout = _keep_standard_output()
        failures: TooManyFailures | None = None
        try:
            result = run(config)
        except TooManyFailures as error:
            failures, result = error, error.result
        line = result_line(result)
        sys.stdout.flush()
        if failures is not None:
            print(f"error: {failures}", file=sys.stderr, flush=True)
        stdout.write(line + "\n")
        stdout.flush()
        return 0 if failures is None else FAILURES_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return INTERRUPT_CODE
    except Exception as error:
        user_error = find_user_error(error)
        if user_error is None:
            raise
        print(f"error: {user_error}", file=sys.stderr, flush=True)
        return USER_ERROR_CODE


def find_user_error(error: BaseException) -> UserError | None:
    """The UserError in an exception or in what it wraps (Ray wraps what its tasks and workers raise)."""
    seen: set[int] = set()
    todo: list[Any] = [error]
    while todo:
        current = todo.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        cause = getattr(current, "cause", None)
        if isinstance(current, UserError) and not isinstance(cause, UserError):
            return current
        failures = getattr(current, "worker_failures", None)
        todo += [cause, current.__cause__, *(failures.values() if isinstance(failures, dict) else ())]
    return None


def result_line(result: Mapping[str, Any]) -> str:
    """One line of strict JSON; a number that is not finite becomes null."""
    return json.dumps(_plain(result), ensure_ascii=False, allow_nan=False)


def write_result(folder: str | Path, result: Mapping[str, Any]) -> None:
    """Write the result line as `result.json` into a folder that exists."""
    write_text_atomic(Path(folder) / "result.json", result_line(result) + "\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; options are written key=value, for example optim.lr=1e-4, see --help")


def _parser(job: str, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python jobs/{job}.py",
        usage=f"python jobs/{job}.py [--config FILE] [--show-config] [key=value ...]",
        description=description,
        epilog="\n".join(_option_help()),
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
        yield f"  {key}  ({kind}, default {default})"
        yield from textwrap.wrap(description, 110, initial_indent="      ", subsequent_indent="      ")


def _keep_standard_output() -> Any:
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
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a result holds {type(value).__name__}, which JSON has no form for")
