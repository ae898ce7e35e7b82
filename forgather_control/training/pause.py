"""How training is held while it is paused: on an event, outside any collective, for as long as it takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..ranks.group import RankGroup
from . import limits
from .command_tracker import CommandTracker
from .loop_actions import RequestedActions
from .progress import RunState
from .rules import SCRIPT
from .settings import Settings

log = logging.getLogger("forgather_control")


@dataclass(eq=False)
class Pause:
    """Holds the training thread of one rank. All of it runs on that thread.

    All ranks apply each command of a pause at one step, as while they train: they advance to it without training.
    """

    loop: RequestedActions
    state: RunState
    settings: Settings
    tracker: CommandTracker
    is_over: Callable[[], bool]  #: Returns whether control has ended.

    def hold(self, group: RankGroup, step: int) -> None:
        """Return when training is resumed or must end, or has a checkpoint to save or an evaluation to make."""
        since = time.monotonic()
        self.state.note(paused=True)
        self.settings.read_back()
        while self.loop.holds and not self.is_over():
            if not group.agrees:
                log.warning("The job was paused, and no command can reach all ranks any more. Training continues.")
                self.loop.request_resume()
            elif self.loop.resume_at is not None and time.monotonic() >= self.loop.resume_at:
                self.loop.resume_at = None
                if group.rank == 0:
                    self.tracker.submit("resume", SCRIPT, "the time of the pause is over")
                    group.command_queued()
            else:
                if commands := group.hold(self._seconds()):
                    self.tracker.apply(commands, step)
                self.settings.read_back()
        self.state.progress.skip(time.monotonic() - since)
        if self.loop.profiler is not None:
            self.loop.profiler.leave_out(since)
        self.state.note(paused=self.loop.paused)

    def _seconds(self) -> float:
        """Return how long to wait at most: signal handlers, which take no lock, do not end the wait."""
        at = self.loop.resume_at
        left = limits.HOLD_PERIOD if at is None else at - time.monotonic()
        return max(0.0, min(left, limits.HOLD_PERIOD))
