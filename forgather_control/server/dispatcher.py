"""From a line to its reply: each line is asked at once, and answered at once, later, or both in a batch.

Floor 2: imports errors and jsonrpc; owns no socket, thread or clock of its own beyond
reading the time. Runs on the server thread only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol

from ..errors import ControlError, InternalError, JobEnding, TooManyCommands
from ..wire import jsonrpc
from ..wire.limits import MAX_LINE
from . import limits

log = logging.getLogger("forgather_control")


#: What ``Deferred.poll`` answers while there is no answer.
PENDING: Final = object()


@dataclass(frozen=True)
class Deferred:
    """An answer that is not there yet.

    Args:
        poll: returns the value or ``PENDING``, raises ControlError; called on the server thread
            after each ``wake`` and from ``deadline`` on.
        deadline: in ``time.monotonic()`` seconds, or ``None``.
    """

    poll: Callable[[], Any]
    deadline: float | None = None


class Peer(NamedTuple):
    """The sender of a request, as the kernel tells; ``uid`` and ``pid`` are ``None`` where it does not."""

    via: Literal["socket", "tcp", "file"] = "socket"
    uid: int | None = None
    pid: int | None = None


class ReplySink(Protocol):
    """The source of a line and the destination of its reply: a connection or a request file.

    Attributes:
        open: number of its lines that are not answered yet; counted by the dispatcher.
        broken: replies can no longer be delivered.
    """

    open: int

    @property
    def peer(self) -> Peer: ...

    @property
    def broken(self) -> bool: ...
    def send(self, data: bytes) -> None: ...
    def stop_reading(self) -> None: ...


#: Answers one request with a JSON value or a :class:`Deferred`; raises ControlError; must not block.
Handler = Callable[[jsonrpc.Request, ReplySink], Any]


class _Exchange:
    """One line's way from request to reply: the reply goes out when its last element is answered.

    Args:
        room: bytes of replies after which a batch has had its share.
    """

    def __init__(self, connection: ReplySink, is_batch: bool, room: int) -> None:
        self.connection, self._is_batch, self.room = connection, is_batch, room
        #: Bytes of the replies so far.
        self.size = 0
        self._answers: list[bytes] = []
        self._open = 1  # itself, until all elements are asked
        connection.open += 1

    @property
    def is_full(self) -> bool:
        """Whether a batch has had its share."""
        return self._is_batch and self.size >= self.room

    def expect(self) -> int:
        """The place of one more element."""
        self._answers.append(b"")
        self._open += 1
        return len(self._answers) - 1

    def settle(self, place: int, response: bytes) -> None:
        """The response line of one element; none for a notification."""
        self._answers[place] = response
        self.size += len(response)
        self.done()

    def done(self) -> None:
        """One less to wait for."""
        self._open -= 1
        if self._open == 0:
            self.connection.open -= 1
            self.connection.send(jsonrpc.replies([answer for answer in self._answers if answer], self._is_batch))


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A ``Deferred`` and the place that its value belongs to."""

    later: Deferred
    exchange: _Exchange
    place: int
    id: Any


class Dispatcher:
    """All lines under way.

    Args:
        handler: see ``Handler``.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._waiting: list[_Waiting] = []

    def dispatch(self, connection: ReplySink, line: bytes) -> None:
        """Answer a line, or keep what has to wait. Whatever the line, it never raises."""
        try:
            message = jsonrpc.parse_message(line)
        except ControlError as err:
            connection.send(jsonrpc.response(None, err))
            if len(line) > MAX_LINE:
                connection.stop_reading()
            return
        exchange = _Exchange(connection, message.is_batch, self._room() if message.is_batch else 0)
        for item in message.items:
            self._ask_one(exchange, item)
        exchange.done()

    def _ask_one(self, exchange: _Exchange, item: jsonrpc.Request | jsonrpc.Refusal) -> None:
        place = exchange.expect()
        if isinstance(item, jsonrpc.Refusal):
            exchange.settle(place, jsonrpc.response(item.id, item.error))
            return
        if exchange.is_full and not isinstance(item.id, jsonrpc.NoId):
            exchange.settle(place, jsonrpc.response(item.id, _too_long(exchange.room)))
            return
        value = self._outcome(lambda: self._handler(item, exchange.connection))
        if isinstance(item.id, jsonrpc.NoId):
            exchange.settle(place, b"")
        elif not isinstance(value, Deferred):
            exchange.settle(place, _response(item.id, value))
        else:
            self._keep(_Waiting(value, exchange, place, item.id))

    def _keep(self, item: _Waiting) -> None:
        try:
            self.check_room()
        except TooManyCommands as err:
            item.exchange.settle(item.place, jsonrpc.response(item.id, err))
        else:
            self._waiting.append(item)

    def check_room(self) -> None:
        """For who will have to wait: before what they ask for has any effect.

        Raises:
            TooManyCommands: ``MAX_DEFERRED`` wait already.
        """
        if len(self._waiting) >= limits.MAX_DEFERRED:
            raise TooManyCommands(f"{limits.MAX_DEFERRED} requests are waiting already", limit=limits.MAX_DEFERRED)

    def _room(self) -> int:
        return min(
            limits.MAX_BATCH_REPLY,
            limits.MAX_BATCHES_HELD - sum(exchange.size for exchange in {item.exchange for item in self._waiting}),
        )

    def _outcome(self, ask: Callable[[], Any]) -> Any:
        """The value, or the error as a value: from here on both are answers."""
        try:
            return ask()
        except ControlError as err:
            return err
        except BaseException:  # border: whatever a method of ours does (SystemExit, too), its caller gets an answer
            log.exception("a request could not be answered")
            return InternalError("internal error; the job's log says more")

    def deadlines(self) -> Iterator[float]:
        """When the waiting want to be asked again, in ``time.monotonic()`` seconds."""
        return (item.later.deadline for item in self._waiting if item.later.deadline is not None)

    def poll(self, woken: bool) -> list[ReplySink]:
        """Ask the waiting again, all of them or those whose deadline came; whose replies went out."""
        now = time.monotonic()
        waiting, self._waiting = self._waiting, []
        answered = []
        for item in waiting:
            if item.exchange.connection.broken:
                continue
            due = woken or (item.later.deadline is not None and item.later.deadline <= now)
            value = self._outcome(item.later.poll) if due else PENDING
            if value is PENDING:
                self._waiting.append(item)
            else:
                item.exchange.settle(item.place, _response(item.id, value))
                answered.append(item.exchange.connection)
        return answered

    def give_up(self) -> None:
        """Tell who still waits that the job is ending."""
        self.poll(woken=True)
        for item in self._waiting:
            item.exchange.settle(item.place, jsonrpc.response(item.id, JobEnding("the job is ending")))
        self._waiting.clear()


def _too_long(room: int) -> TooManyCommands:
    text = "not carried out: the replies to batches are too long already; ask for less at once"
    return TooManyCommands(text, limit=max(0, room))


def _response(id_: Any, value: Any) -> bytes:
    try:
        return jsonrpc.response(id_, value)
    except Exception:  # border: an answer that is no JSON must not cost the others theirs
        log.exception("an answer could not be written as JSON")
        return jsonrpc.response(id_, InternalError("internal error; the job's log says more"))
