"""From a request line to its reply: at once, later, or with a stream of notifications behind it.

Runs on the server thread only; owns no socket and knows no method by name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol

from ..errors import ControlError, InternalError, InvalidRequest, JobEnding, TooManyCommands
from ..wire import jsonrpc
from ..wire.limits import MAX_LINE
from . import limits

log = logging.getLogger("forgather_control")

#: Returned by ``Deferred.poll`` while there is no answer.
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


@dataclass(frozen=True)
class Subscription:
    """An answer that opens a stream on its connection: first ``reply``, then lines until it ends.

    A connection has one subscription at most; a new one replaces the old one. All calls are on the server thread.

    Args:
        reply: the result of the request.
        pull: returns the next whole lines, about as many bytes as its argument allows; ``b""`` if there are none.
        next_at: when ``pull`` may have more although ``wake`` was not called, in ``time.monotonic()`` seconds; ``None``
            if only ``wake`` tells. Called after each ``pull`` that returned nothing.
        close: called once, when the stream has ended or was refused.
    """

    reply: Any
    pull: Callable[[int], bytes]
    next_at: Callable[[], float | None]
    close: Callable[[], None]


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
    def start_subscription(self, subscription: Subscription) -> None:
        """Send the lines of a subscription from now on; raise InvalidRequest where there can be none."""

    def end_subscription(self) -> bool:
        """End the subscription; return whether there was one."""


#: Answers one request with a JSON value, a :class:`Deferred` or a :class:`Subscription`; raises ControlError; must not
#: block.
Handler = Callable[[jsonrpc.Request, ReplySink], Any]


class _Reply:
    """The reply to one line; it is sent when the last element of the line is answered.

    Args:
        room: bytes of responses after which the rest of a batch is refused.
    """

    def __init__(self, sink: ReplySink, message: jsonrpc.Message, room: int) -> None:
        self.sink, self.is_batch, self.room = sink, message.is_batch, room
        #: Bytes of the responses so far.
        self.size = 0
        self._responses = [b""] * len(message.items)
        self._unanswered = len(message.items)
        sink.open += 1

    @property
    def is_full(self) -> bool:
        """Whether the responses to a batch have used up their room."""
        return self.is_batch and self.size >= self.room

    def answer(self, place: int, response: bytes) -> None:
        """Set the response line of one element; empty for a notification."""
        self._responses[place] = response
        self.size += len(response)
        self._unanswered -= 1
        if self._unanswered == 0:
            self.sink.open -= 1
            self.sink.send(jsonrpc.replies([line for line in self._responses if line], self.is_batch))


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A deferred answer and its place in the reply."""

    deferred: Deferred
    reply: _Reply
    place: int
    id: Any


class Dispatcher:
    """All requests that are not answered yet.

    Args:
        handler: see ``Handler``.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._waiting: list[_Waiting] = []

    def dispatch(self, sink: ReplySink, line: bytes) -> None:
        """Answer a line, or keep what has to wait. Never raises, whatever the line is."""
        try:
            message = jsonrpc.parse_message(line)
        except ControlError as err:
            sink.send(jsonrpc.response(None, err))
            if len(line) > MAX_LINE:
                sink.stop_reading()
            return
        reply = _Reply(sink, message, self._room() if message.is_batch else 0)
        for place, item in enumerate(message.items):
            if isinstance(item, jsonrpc.Refusal):
                reply.answer(place, jsonrpc.response(item.id, item.error))
            else:
                self._dispatch_one(reply, place, item)

    def _dispatch_one(self, reply: _Reply, place: int, request: jsonrpc.Request) -> None:
        value = _outcome(lambda: self._handle(reply, request))
        if isinstance(request.id, jsonrpc.NoId):
            reply.answer(place, b"")
        elif isinstance(value, Deferred):
            self._waiting.append(_Waiting(value, reply, place, request.id))
        else:
            reply.answer(place, _response(request.id, value))

    def _handle(self, reply: _Reply, request: jsonrpc.Request) -> Any:
        is_notification = isinstance(request.id, jsonrpc.NoId)
        if reply.is_full and not is_notification:
            text = "Not carried out: the replies to batches are too long already. Send fewer requests in a batch."
            raise TooManyCommands(text, limit=max(0, reply.room))
        value = self._handler(request, reply.sink)
        if isinstance(value, Subscription):
            return _start(value, reply, is_notification)
        if isinstance(value, Deferred) and not is_notification:
            self.check_room()
        return value

    def check_room(self) -> None:
        """Check that one more answer can be deferred, before a request that needs it has any effect.

        Raises:
            TooManyCommands: ``MAX_DEFERRED`` requests are waiting already.
        """
        if len(self._waiting) >= limits.MAX_DEFERRED:
            text = f"{limits.MAX_DEFERRED} requests are waiting for their reply already. Try again later."
            raise TooManyCommands(text, limit=limits.MAX_DEFERRED)

    def _room(self) -> int:
        held = sum(reply.size for reply in {item.reply for item in self._waiting})
        return min(limits.MAX_BATCH_REPLY, limits.MAX_BATCHES_HELD - held)

    def deadlines(self) -> Iterator[float]:
        """Return when waiting requests must be polled at the latest, in ``time.monotonic()`` seconds."""
        return (item.deferred.deadline for item in self._waiting if item.deferred.deadline is not None)

    def poll(self, woken: bool) -> list[ReplySink]:
        """Poll the waiting requests, all of them or those past their deadline; return the sinks of answered ones."""
        now = time.monotonic()
        waiting, self._waiting = self._waiting, []
        answered = []
        for item in waiting:
            if item.reply.sink.broken:
                continue
            due = woken or (item.deferred.deadline is not None and item.deferred.deadline <= now)
            value = _outcome(item.deferred.poll) if due else PENDING
            if value is PENDING:
                self._waiting.append(item)
            else:
                item.reply.answer(item.place, _response(item.id, value))
                answered.append(item.reply.sink)
        return answered

    def give_up(self) -> None:
        """Poll the waiting requests for the last time; answer the rest that the job is ending."""
        self.poll(woken=True)
        for item in self._waiting:
            item.reply.answer(
                item.place,
                jsonrpc.response(item.id, JobEnding("The job is ending before this request could be answered.")),
            )
        self._waiting.clear()


def _outcome(call: Callable[[], Any]) -> Any:
    """Return what ``call`` returns, or the error that it raised: both are answers."""
    try:
        return call()
    except ControlError as err:
        return err
    except BaseException:  # boundary: whatever a method does (SystemExit, too), its caller gets an answer
        log.exception("Internal error while answering a request; the client received error -32603")
        return _internal_error()


def _start(subscription: Subscription, reply: _Reply, is_notification: bool) -> Any:
    """Start a stream on its connection; return the reply to the request.

    Raises:
        InvalidRequest: there can be no stream; ``subscription`` is closed.
    """
    try:
        if reply.is_batch or is_notification:
            raise InvalidRequest("A subscription must be a request with an id, outside a batch. Send it on its own.")
        reply.sink.start_subscription(subscription)
    except InvalidRequest:
        subscription.close()
        raise
    return subscription.reply


def _response(id_: Any, value: Any) -> bytes:
    try:
        return jsonrpc.response(id_, value)
    except Exception:  # boundary: an answer that is not JSON must not cost other elements theirs
        log.exception("Internal error: an answer could not be written as JSON; the client received error -32603")
        return jsonrpc.response(id_, _internal_error())


def _internal_error() -> InternalError:
    return InternalError("Internal error in the job. The job's log has the details.")
