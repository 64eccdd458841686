"""A call in a process of its own. Imports nothing heavy: the process imports what its function needs."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from typing import Any

from qcrd_ray.errors import UserError

END_SECONDS = 10.0


def in_own_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function in a process that ends with it, so that all memory of an engine is free for the next one.

    Raises:
        UserError: the function did.
        RuntimeError: the function failed otherwise, or its process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, function, arguments, options))
    process.start()
    theirs.close()
    try:
        try:
            kind, value = ours.recv()
        except EOFError:
            process.join()
            raise RuntimeError(f"{function.__name__}: its process ended with exit code {process.exitcode}") from None
        process.join(END_SECONDS)
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    if kind == "result":
        return value
    raise UserError(value) if kind == "user error" else RuntimeError(value)


def _call(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    try:
        pipe.send(("result", function(*arguments, **options)))
    except UserError as error:
        pipe.send(("user error", str(error)))
    except Exception:
        pipe.send(("error", traceback.format_exc()))
