"""What is kept and sent of a command: its record, and the form in which it reaches every rank."""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import states
from ..errors import InternalError

Json = Any

#: What one command did on one rank: ``{"value": ...}`` or ``{"error": {"code", "message"}}``; empty where there is
#: nothing to tell.
Outcome = dict[str, Json]


class ScheduledCommand(NamedTuple):
    """A command on its way from the queue to every rank; travels as a JSON array.

    Attributes:
        name: of its method.
        params: the command's own parameters, checked; without those that only concern the caller's wait.
        skip_save: stop without saving, because the last checkpoint is young enough; rank 0 decides it for all ranks.
    """

    command_id: str
    name: str
    params: dict[str, Json]
    skip_save: bool = False


class CommandRecord(NamedTuple):
    """What is known of one accepted command. Times are seconds since the epoch.

    Attributes:
        state: one of ``states.COMMAND_STATES``.
        applied_at_step: the step after which every rank applied it; ``None`` before that.
        result: of a save, ``{"step", "path", "seconds", "evaluated"}``; of a stop, the step it ended at, too.
        error: why it failed, as ``{"code", "message"}``; ``None`` otherwise.
        params: the command's own parameters.
        reason: what the caller gave as one.
        requested_by: ``{"via", "uid", "user", "pid", "program"}``, as the kernel reports it.
    """

    command_id: str
    command: str
    state: str
    requested_at: float
    applied_at_step: int | None = None
    finished_at: float | None = None
    result: dict[str, Json] | None = None
    error: dict[str, Json] | None = None
    params: dict[str, Json] = {}
    reason: str | None = None
    requested_by: dict[str, Json] | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in states.FINAL_STATES

    @property
    def trouble(self) -> str | None:
        """What became of it if it will never be finished, in one sentence; ``None`` otherwise."""
        if self.state not in (states.COMMAND_FAILED, states.COMMAND_CANCELLED):
            return None
        return f"{self.command} {self.state}: {self.error.get('message') if self.error else 'somebody took it back'}"

    def to_json(self) -> dict[str, Json]:
        """The record as it stands on the wire."""
        return self._asdict()

    @classmethod
    def from_json(cls, value: dict[str, Json]) -> CommandRecord:
        """The record that a reply holds; members that a newer job adds are left out.

        Raises:
            InternalError: it holds none.
        """
        if not isinstance(value, dict) or not all(isinstance(value.get(name), str) for name in cls._fields[:3]):
            raise InternalError("the other side sent no command record")
        objects = [value.get(name) for name in ("result", "error")]
        if "requested_at" not in value or not all(item is None or isinstance(item, dict) for item in objects):
            raise InternalError("the other side sent no command record")
        return cls(**{name: item for name, item in value.items() if name in cls._fields})
