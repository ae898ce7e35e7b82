"""From a request line to its reply: at once, later, or with a stream of notifications behind it.

Runs on the server thread only; owns no socket and knows no method by name.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, NamedTuple

from ..errors import ControlError, InternalError, InvalidRequest, JobEnding, TooManyCommands
from ..wire import jsonrpc
from ..wire.limits import MAX_LINE
from . import limits

log = logging.getLogger("forgather_control")

#: Returned by ``Deferred.poll`` while there is no answer.
PENDING: Final = object()


class Deferred(NamedTuple):
    """An answer that is not there yet."""

    #: Returns the value or ``PENDING``, raises ControlError; called after each ``wake`` and from ``deadline`` on.
    poll: Callable[[], Any]
    deadline: float | None = None  #: In ``time.monotonic()`` seconds.


class Subscription(NamedTuple):
    """An answer that opens a stream on its connection, in place of the one before: first ``reply``, then lines."""

    reply: Any
    #: Returns the next whole lines, about as many bytes as its argument allows; ``b""`` if there are none.
    pull: Callable[[int], bytes]
    #: Called after each ``pull`` that returned nothing: when it may have more although ``wake`` was not called, in
    #: ``time.monotonic()`` seconds; ``None`` if only ``wake`` tells.
    next_at: Callable[[], float | None]


class Peer(NamedTuple):
    """The sender of a request, as the kernel tells; ``None`` where it does not."""

    via: Literal["socket", "tcp", "file"] = "socket"
    uid: int | None = None
    pid: int | None = None


class ReplySink:
    """The source of a line and the destination of its reply: a connection, or a file, which takes one reply only."""

    #: Replies can no longer be delivered.
    broken = False

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        #: Number of lines that are not answered yet; counted by the dispatcher.
        self.open = 0

    def send(self, data: bytes) -> None:
        """Deliver a reply; ``b""`` if there is none."""
        raise NotImplementedError

    def stop_reading(self) -> None:
        """Take no more lines."""

    def start_subscription(self, subscription: Subscription) -> None:
        """Send the lines of a subscription from now on; raise InvalidRequest where there can be none."""
        raise InvalidRequest("A request file cannot subscribe to events. Connect to the job's socket instead.")

    def end_subscription(self) -> bool:
        """End the subscription; return whether there was one."""
        return False


#: Answers one request with a JSON value, a :class:`Deferred` or a :class:`Subscription`; raises ControlError; must not
#: block.
Handler = Callable[[jsonrpc.Request, ReplySink], Any]


class _Reply:
    """The reply to one line; it is sent when the last element of the line is answered."""

    def __init__(self, sink: ReplySink, message: jsonrpc.Message) -> None:
        self.sink, self.is_batch = sink, message.is_batch
        #: Bytes of the responses so far.
        self.size = 0
        self._responses = [b""] * len(message.items)
        self._unanswered = len(message.items)
        sink.open += 1

    def answer(self, place: int, response: bytes) -> None:
        """Set the response line of one element; empty for a notification."""
        self._responses[place] = response
        self.size += len(response)
        self._unanswered -= 1
        if self._unanswered == 0:
            self.sink.open -= 1
            self.sink.send(jsonrpc.replies([line for line in self._responses if line], self.is_batch))


class Dispatcher:
    """All requests that are not answered yet."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        #: Deferred answers, their replies and places in them, and the ids of their requests.
        self._waiting: list[tuple[Deferred, _Reply, int, Any]] = []

    def dispatch(self, sink: ReplySink, line: bytes) -> None:
        """Answer a line, or keep what has to wait. Never raises, whatever the line is."""
        try:
            message = jsonrpc.parse_message(line)
        except ControlError as err:
            sink.send(jsonrpc.response(None, err))
            if len(line) > MAX_LINE:
                sink.stop_reading()
                sink.end_subscription()
            return
        reply, room = _Reply(sink, message), self._room() if message.is_batch else 0
        for place, item in enumerate(message.items):
            found = _respond(item.id, self._handle, reply, item, room)
            if isinstance(found, Deferred):
                self._waiting.append((found, reply, place, item.id))
            else:
                reply.answer(place, found)

    def _room(self) -> int:
        """Return the bytes of responses after which the rest of a batch is refused."""
        held = sum(reply.size for reply in {reply for _, reply, _, _ in self._waiting})
        return max(0, min(limits.MAX_BATCH_REPLY, limits.MAX_BATCHES_HELD - held))

    def _handle(self, reply: _Reply, request: jsonrpc.Request | jsonrpc.Refusal, room: int) -> Any:
        if isinstance(request, jsonrpc.Refusal):
            return request.error
        is_notification = isinstance(request.id, jsonrpc.NoId)
        if reply.is_batch and reply.size >= room and not is_notification:
            text = "Not carried out: the replies to batches are too long already. Send fewer requests in a batch."
            raise TooManyCommands(text, limit=room)
        value = self._handler(request, reply.sink)
        if isinstance(value, Subscription):
            if reply.is_batch or is_notification:
                text = "A subscription must be a request with an id, outside a batch. Send it on its own."
                raise InvalidRequest(text)
            reply.sink.start_subscription(value)
            return value.reply
        if is_notification:
            return None
        if isinstance(value, Deferred):
            self.check_room()
        return value

    def check_room(self) -> None:
        """Raise TooManyCommands if no more answers can be deferred: before a request that needs it has any effect."""
        if len(self._waiting) >= limits.MAX_DEFERRED:
            text = f"{limits.MAX_DEFERRED} requests are waiting for their reply already. Try again later."
            raise TooManyCommands(text, limit=limits.MAX_DEFERRED)

    def deadlines(self) -> Iterator[float]:
        """Return when waiting requests must be polled at the latest, in ``time.monotonic()`` seconds."""
        return (deferred.deadline for deferred, *_ in self._waiting if deferred.deadline is not None)

    def poll(self, woken: bool) -> list[ReplySink]:
        """Poll the waiting requests past their deadline, or all; return the sinks of answered ones."""
        now = time.monotonic()
        waiting, self._waiting = self._waiting, []
        answered = []
        for item in waiting:
            deferred, reply, place, id_ = item
            if reply.sink.broken:
                continue
            due = woken or (deferred.deadline is not None and deferred.deadline <= now)
            found: Any = _respond(id_, deferred.poll) if due else PENDING
            if found is PENDING:
                self._waiting.append(item)
            else:
                reply.answer(place, found)
                answered.append(reply.sink)
        return answered

    def give_up(self) -> None:
        """Poll the waiting requests for the last time; answer the rest that the job is ending."""
        self.poll(woken=True)
        error = JobEnding("The job is ending before this request could be answered.")
        for _, reply, place, id_ in self._waiting:
            reply.answer(place, jsonrpc.response(id_, error))
        self._waiting.clear()


def _respond(id_: jsonrpc.Id | jsonrpc.NoId, call: Callable[..., Any], *args: Any) -> Any:
    """Return the response line to a request, ``b""`` to a notification, or what is no answer yet."""
    try:
        try:
            value = call(*args)
        except ControlError as err:
            return _line(id_, err)
        return value if value is PENDING or isinstance(value, Deferred) else _line(id_, value)
    except BaseException:  # boundary: whatever a method does (SystemExit, no JSON), its caller gets a reply
        log.exception("Internal error while answering a request; the client received error -32603")
        return _line(id_, InternalError("Internal error in the job. The job's log has the details."))


def _line(id_: jsonrpc.Id | jsonrpc.NoId, value: Any) -> bytes:
    return b"" if isinstance(id_, jsonrpc.NoId) else jsonrpc.response(id_, value)
