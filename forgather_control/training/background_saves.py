"""Saves in the background, as ``dcp.async_save`` and ``AsyncCheckpointIO`` make them: a future tells when one is done.

Where there is no future, a file that is written last can be watched. ``follow`` and ``watch`` are called on the
training thread; the save ends on any.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from ..deadline import Deadline
from ..errors import ControlError, InvalidParams
from . import limits
from .applied_command import Save
from .controller import Controller


def check(future: Any) -> Callable[[Callable[[Any], None]], Any]:
    """Return the method that adds a callback to a future; InvalidParams if it has none."""
    found = getattr(future, "upload_completion", future)  # of what dcp.async_save may return instead
    add = getattr(found, "add_done_callback", None)
    if not callable(add):
        text = f"future must have add_done_callback, which {type(future).__name__} has not"
        raise InvalidParams(text, parameter="future")
    return add  # type: ignore[no-any-return]


def follow(run: Controller, save: Save, path: str, evaluated: bool, future: Any) -> None:
    """End a save when its future is done: it is finished if the checkpoint exists, or failed with the exception."""

    def end(done: Any) -> None:  # the future keeps this; it must not keep an integration alive
        why = _fault(done)
        if why is None:
            finish(run, save, path, evaluated)
        else:
            run.fail_save(save, why)

    check(future)(end)


def watch(run: Controller, save: Save, look: Callable[[], tuple[str | None, object]], evaluated: bool) -> None:
    """End a save of which nothing but files is known, on a thread that looks at them from time to time.

    Args:
        look: returns where the checkpoint is complete, once it is, and what changes while it is being written. If that
            does not change for ``limits.WRITE_TIMEOUT``, the save has failed.
    """

    def watch() -> None:
        path, seen = look()
        deadline = Deadline(limits.WRITE_TIMEOUT)
        while path is None and not deadline.passed() and not run.ended.wait(limits.WATCH_PERIOD):
            path, now = look()
            if now != seen:
                seen, deadline = now, Deadline(limits.WRITE_TIMEOUT)
        if path is not None:
            run.finish_save(save, path, evaluated)
        else:
            run.fail_save(save, f"no complete checkpoint-{save.step} was found when nothing was written any more")

    threading.Thread(target=watch, name="forgather-watch", daemon=True).start()


def finish(run: Controller, save: Save, path: str, evaluated: bool) -> None:
    """End a save that has written its checkpoint; without one it has failed."""
    if exists(path):
        run.finish_save(save, path, evaluated)
    else:
        run.fail_save(save, f"a checkpoint at {path} was reported, but there is none")


def exists(path: str) -> bool:
    """Return whether a checkpoint is on disk. A remote one counts as soon as the call that wrote it returned."""
    return "://" in path or os.path.exists(path)


def _fault(future: Any) -> str | None:
    """Return why a future that is done has failed; ``None`` if it has not."""
    try:
        (getattr(future, "result", None) or future.value)()  # torch.futures.Future has no result()
    except BaseException as err:  # boundary: the user's; that a future of asyncio was cancelled is no Exception
        return str(err) if isinstance(err, ControlError) else f"{type(err).__name__}: {err}"
    return None
