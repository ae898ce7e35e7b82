"""The runs that are open in this process: those that are over end before a new one, and none survives a fork."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .controller import Controller

# As in ``server``: one handler for all, since a fork handler cannot be removed.
_controllers: weakref.WeakSet[Controller] = weakref.WeakSet()
#: Note that a run has started, and that it has ended. On the training thread.
add, discard = _controllers.add, _controllers.discard


def end_earlier(job_id: str | None) -> None:
    """End the runs of this id that are over in this process: a cell of a notebook was interrupted and run again."""
    for controller in list(_controllers):
        if job_id is not None and controller.job_id == job_id:
            controller.end_if_over("training was started again under this job id")


def _after_fork() -> None:
    for controller in list(_controllers):
        controller.abandon()
    _controllers.clear()


os.register_at_fork(after_in_child=_after_fork)
