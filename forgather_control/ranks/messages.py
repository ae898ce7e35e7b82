"""The messages between ranks; each travels as a JSON array: its kind, then its fields.

``consensus`` says what those of a round are for. Beside them: a rank that takes part sends Join, and again when its
description changes; Request has rank 0 submit a command, which a signal asked for; a Query is answered at once by all
ranks that take part, without their training threads; rank 0 sends its Leave to all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, get_args

from ..wire.records import Outcome, ScheduledCommand


class Join(NamedTuple):
    rank: int
    description: dict[str, Any]


class Prepare(NamedTuple):
    number: int  # of the round


class Ready(NamedTuple):
    number: int
    rank: int
    step: int  # the last one that was finished when ``must_wait`` was already set


class Commit(NamedTuple):
    number: int
    due: int | None  # the step T; ``None`` if the round is off
    commands: list[ScheduledCommand]


class Settled(NamedTuple):
    number: int
    why: str | None  # why what the round did is undone; ``None``: it is kept


class Released(NamedTuple):
    """There will be no more rounds, so that no rank may wait for one."""


class Applied(NamedTuple):
    number: int
    rank: int
    outcomes: dict[str, Outcome]  # by command id; only those that are not empty


class Missed(NamedTuple):
    """The rank trained on without the store, and had passed the step T when it read the decision."""

    number: int
    rank: int


class Reported(NamedTuple):
    rank: int
    command_id: str
    outcome: Outcome


class Leave(NamedTuple):
    rank: int
    step: int  # its last one
    fault: str | None  # why, unless its training ended as it should


class Request(NamedTuple):
    command: str


class Query(NamedTuple):
    number: int
    what: str


class Answer(NamedTuple):
    number: int
    rank: int
    answer: Any


Message = (
    Join
    | Prepare
    | Ready
    | Commit
    | Settled
    | Released
    | Applied
    | Missed
    | Reported
    | Leave
    | Request
    | Query
    | Answer
)


def decode_commit(number: int, due: int | None, commands: list[Any]) -> Commit:
    """Return a round's decision from the values that travelled or stand in the store."""
    return Commit(number, due, [ScheduledCommand(*command) for command in commands])


_KINDS: Final[dict[str, Callable[..., Message]]] = {kind.__name__.lower(): kind for kind in get_args(Message)}
_KINDS["commit"] = decode_commit


def encode(message: Message) -> list[Any]:
    """Return the message as it travels."""
    return [type(message).__name__.lower(), *message]


def decode(fields: list[Any]) -> Message:
    """Return the message that arrived.

    Raises:
        KeyError, TypeError: it is none; all ranks run the same code, so the channel is broken.
    """
    kind, *rest = fields
    return _KINDS[kind](*rest)
