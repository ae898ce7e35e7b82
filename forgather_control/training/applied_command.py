"""A command that one rank has applied, and a checkpoint that it is writing: what the command tracker keeps."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .. import states
from ..wire.methods import Method
from ..wire.records import Outcome


@dataclass
class AppliedCommand:
    """A command that this rank has applied and that is not finished here."""

    command_id: str
    method: Method
    step: int
    since: float  # monotonic
    reported: bool = False
    is_saving: bool = False  # a save in the background counts for it, and no other does
    outcome: Outcome = field(default_factory=dict)  # of a save that came with a stop, reported when training ends
    result: dict[str, Any] | None = None
    future: Future[Any] | None = None  # of an effect that is not done when it returns

    @property
    def is_busy(self) -> bool:
        """Whether something in the background will report."""
        return self.is_saving or (self.future is not None and self.future.running())

    @property
    def ends(self) -> bool:
        return states.WHEN_ENDED in self.method.finishes_when

    @property
    def lacks_save(self) -> bool:
        return self.awaits(states.WHEN_SAVED) or (self.ends and self.result is None)

    def awaits(self, event: str) -> bool:
        return self.method.rank_report == event and not self.reported

    def set_result(self, **result: Any) -> None:
        self.result = {**result, "seconds": round(time.monotonic() - self.since, 6)}


@dataclass(eq=False)
class Save:
    """A checkpoint that this rank is writing."""

    step: int
    since: float = field(default_factory=time.monotonic)
    applied: list[AppliedCommand] = field(default_factory=list)  #: the commands that it counts for
    is_enough: bool = True  #: Whether no other command waits for a checkpoint that is not begun.
