"""The runs that are open in this process: those that are over end before a new one, and none survives a fork."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Run(Protocol):
    """A controller, as far as it matters here; it documents its methods."""

    @property
    def job_id(self) -> str | None: ...
    def end_if_over(self, reason: str) -> None: ...
    def abandon(self) -> None: ...


# As in ``server``: one handler for all, since a fork handler cannot be removed.
_runs: weakref.WeakSet[Run] = weakref.WeakSet()
#: Note that a run has started, and that it has ended. On the training thread.
add, discard = _runs.add, _runs.discard


def end_earlier(job_id: str | None) -> None:
    """End the runs of this id that are over in this process: a cell of a notebook was interrupted and run again."""
    for run in list(_runs):
        if job_id is not None and run.job_id == job_id:
            run.end_if_over("training was started again under this job id")


def _after_fork() -> None:
    for run in list(_runs):
        run.abandon()
    _runs.clear()


os.register_at_fork(after_in_child=_after_fork)
