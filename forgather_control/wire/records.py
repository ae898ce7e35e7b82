"""What is kept and sent of a command: its record, and the form in which it reaches every rank."""

from __future__ import annotations

from typing import Any, Final, NamedTuple, get_args

from .. import states
from ..errors import InternalError

Json = Any

#: The states of a command record, in the order of its life; the last three are final.
STATES: Final = get_args(states.CommandState)
FINAL: Final = frozenset(STATES[2:])
#: The states that a caller can wait for.
AWAITED: Final = STATES[:3]


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
        state: one of ``STATES``.
        applied_at_step: the step after which every rank applied it; ``None`` before that.
        result: of a save, ``{"step", "path", "seconds"}``; of a stop, the step it ended at, too.
        error: why it failed, as ``{"code", "message"}``; ``None`` otherwise.
    """

    command_id: str
    command: str
    state: str
    requested_at: float
    applied_at_step: int | None = None
    finished_at: float | None = None
    result: dict[str, Json] | None = None
    error: dict[str, Json] | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in FINAL

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
