"""Calls of functions of the training script that clients cause. They may fail; they must not end training."""

from __future__ import annotations

import functools
import inspect
import signal
import sys
from collections.abc import Callable
from typing import Any

from ..errors import CommandFailed
from ..schema import shown


def call(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Return what a function of the script returns.

    Args:
        name: what it is, in messages.

    Raises:
        CommandFailed: it meant to end itself by an exception that would end training.
        BaseException: what else it raised.
    """
    try:
        return function(*args, **kwargs)
    except BaseException as err:
        if isinstance(err, Exception) or not _is_own_end(err):
            raise
        code = shown(err.args[0]) if err.args and err.args != (None,) else ""
        what = f"called sys.exit({code})" if isinstance(err, SystemExit) else f"raised {type(err).__name__}"
        raise CommandFailed(f"{name} {what}; training continues") from err


def plain(function: Any) -> Any:
    """Return the function inside decorators, bound methods and partial objects: it has the annotations."""
    while True:
        inner = inspect.unwrap(function)
        inner = getattr(inner, "__func__", inner)
        inner = inner.func if isinstance(inner, functools.partial) else inner
        if inner is function:
            return inner if hasattr(inner, "__code__") else inspect.getattr_static(type(inner), "__call__", inner)
        function = inner


def _is_own_end(err: BaseException) -> bool:
    """Return whether a function meant to end itself by this: sys.exit, or a cancelled event loop of its own.

    Ctrl-C is meant for training, and so is what a signal handler of the script raises: handlers run between any two
    instructions, so a frame of one of them is in the traceback then.
    """
    asyncio = sys.modules.get("asyncio")
    if not isinstance(err, SystemExit) and not (asyncio is not None and isinstance(err, asyncio.CancelledError)):
        return False
    codes = set()
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler):
            codes.add(getattr(plain(handler), "__code__", None))
    trace = err.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code in codes:
            return False
        trace = trace.tb_next
    return True
