"""The messages between ranks: what each of them says, and how it travels as a JSON array."""

from __future__ import annotations

from typing import Any, Final, NamedTuple, get_args

from ..wire.records import Outcome, ScheduledCommand


class Join(NamedTuple):
    """A rank takes part from now on; sent again when its description changes."""

    rank: int
    description: dict[str, Any]


class Prepare(NamedTuple):
    """To all ranks: answer with your step, and hold at the end of the next one until this round is decided."""

    number: int


class Ready(NamedTuple):
    """The answer: the last step that was finished when ``must_wait`` was already set."""

    number: int
    rank: int
    step: int


class Commit(NamedTuple):
    """To all ranks: the decision of a round. ``due`` is the step T, or ``None`` if the round is off."""

    number: int
    due: int | None
    commands: list[ScheduledCommand]


class Applied(NamedTuple):
    """A rank applied the commands of the round; ``outcomes`` by command id, where there is anything to tell."""

    number: int
    rank: int
    outcomes: dict[str, Outcome]


class Reported(NamedTuple):
    """A rank has done its part of a command that is finished when all ranks have reported, or failed to."""

    rank: int
    command_id: str
    outcome: Outcome


class Leave(NamedTuple):
    """A rank takes part no more after ``step``; ``fault`` says why, unless its training ended as it should."""

    rank: int
    step: int
    fault: str | None


class Request(NamedTuple):
    """To rank 0: submit this command, which a signal asked for."""

    command: str


class Query(NamedTuple):
    """To the ranks that take part: a question, answered at once and without the training thread."""

    number: int
    what: str


class Answer(NamedTuple):
    """The answer to a Query."""

    number: int
    rank: int
    answer: Any


class Shutdown(NamedTuple):
    """To all ranks: rank 0 ends."""


Message = Join | Prepare | Ready | Commit | Applied | Reported | Leave | Request | Query | Answer | Shutdown

_KINDS: Final[dict[str, Any]] = {kind.__name__.lower(): kind for kind in get_args(Message)}


def encode(message: Message) -> list[Any]:
    """Return the message as it travels: its kind, then its fields."""
    return [type(message).__name__.lower(), *message]


def decode(fields: list[Any]) -> Message:
    """Return the message that arrived.

    Raises:
        KeyError, TypeError: it is none; all ranks run the same code, so the channel is broken.
    """
    kind, *rest = fields
    message: Message = _KINDS[kind](*rest)
    return decode_decision(message.number, rest[1:]) if isinstance(message, Commit) else message


def decode_decision(number: int, decision: list[Any]) -> Commit:
    """Return the decision of a round as it stands in the store: ``[due, commands]``."""
    due, commands = decision
    return Commit(number, due, [ScheduledCommand(*command) for command in commands])
