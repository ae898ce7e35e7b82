"""Saves in the background, as ``dcp.async_save`` and ``AsyncCheckpointIO`` make them: a future tells when one is done.

``follow`` runs on the training thread, what it leaves to the future on any.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..errors import ControlError, InvalidParams
from .command_tracker import Save
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
