"""What is kept and sent of a command: its record, and the form in which it reaches every rank."""

from typing import Final, NamedTuple

from .. import schema, states
from ..errors import InternalError
from ..notebook import html_table
from ..schema import INTEGER, NULL, OBJECT, TEXT, TIME, Field
from .jsonrpc import Json

#: What one command did on one rank: ``{"value": ...}`` or ``{"error": {"code", "message"}}``; empty without a value.
Outcome = dict[str, Json]


class ScheduledCommand(NamedTuple):
    """A command on its way from the queue to every rank; travels as a JSON array."""

    command_id: str
    name: str
    params: dict[str, Json]  #: The command's own, checked; without those that only concern the caller's wait.
    skip_save: bool = False  #: Rank 0 decides for all ranks to stop without saving, as the last checkpoint is young.


class CommandRecord(NamedTuple):
    """What is known of one accepted command. Times are seconds since the epoch.

    Attributes:
        applied_at_step: the step after which every rank applied it; ``None`` before that.
        result: of a save, ``{"step", "path", "seconds", "evaluated"}``; of a stop, the step it ended at, too.
        error: why it failed, as ``{"code", "message"}``; ``None`` otherwise.
        params: the command's own parameters.
        reason: the text that the caller gave.
        requested_by: ``{"via", "uid", "user", "pid", "program"}``, as the kernel reports it.
    """

    command_id: str
    command: str
    state: states.CommandState
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
        """Why it will never be finished, in one sentence; ``None`` if it was or can be."""
        if self.state == states.COMMAND_CANCELLED:
            return f"{self.command} was cancelled before it was applied"
        if self.state == states.COMMAND_FAILED:
            return f"{self.command} failed: {(self.error or {}).get('message')}"
        return None

    def __repr__(self) -> str:
        step = "" if self.applied_at_step is None else f" at step {self.applied_at_step}"
        told = (self.error or {}).get("message") or (self.result or {}).get("path")
        return f"<CommandRecord {self.command} {self.state}{step}{f': {told}' if told else ''}>"

    def _repr_html_(self) -> str:
        return html_table({name: value for name, value in self._asdict().items() if value not in (None, {})})

    def to_json(self) -> dict[str, Json]:
        """Return the record as a JSON object."""
        return self._asdict()

    @classmethod
    def from_json(cls, value: object) -> "CommandRecord":
        """Return the record that a reply holds, without members that a newer job adds.

        Raises:
            InternalError: it holds none.
        """
        try:
            return schema.load(cls, _FIELDS, value, "a command record")
        except ValueError as err:
            raise InternalError(f"the job sent no command record: {err}") from err


_FIELDS: Final = {
    **dict.fromkeys(("command_id", "command", "state"), Field(TEXT)),
    "requested_at": TIME,
    "applied_at_step": Field(INTEGER + NULL),
    "finished_at": schema.nullable(TIME),
    "params": Field(OBJECT),
    **dict.fromkeys(("result", "error", "requested_by"), Field(OBJECT + NULL)),
    "reason": Field(TEXT + NULL),
}
