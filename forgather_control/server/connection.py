"""Client connections: whole lines out of their bytes, replies and a stream into them, bounded in both directions.

Runs on the server thread only and never blocks. A broken socket is a state (``broken``), not an exception.
"""

from __future__ import annotations

import logging
import math
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from ..descriptors import Kept
from ..errors import NotAuthenticated
from ..wire import jsonrpc
from . import limits
from .dispatcher import Peer, ReplySink, Subscription

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("forgather_control")

#: Where a training script restored the default of SIGPIPE, writing to a closed socket would end the process (send(2)).
_NO_SIGNAL: Final = getattr(socket, "MSG_NOSIGNAL", 0)
#: The first byte of a TLS connection: a record of the handshake (RFC 8446, section 5.1).
_HANDSHAKE: Final = b"\x16"
#: Bytes that are sent at once: one record. OpenSSL reports a longer write as nothing until all of it is sent.
_RECORD: Final = 16384
_NO_TLS: Final = jsonrpc.response(None, NotAuthenticated("This port speaks TLS. Connect to tls:// instead."))


class Connection(ReplySink):
    """One client: its received bytes, its unsent replies, and the number of its requests without an answer.

    Args:
        sock: connected. It stays a blocking socket, as changing that costs a system call, and beside a loop of pure
            Python each may cost a wait for the interpreter lock; all calls here pass MSG_DONTWAIT.
        max_line: bytes after which a line without an end is returned as it is, to be refused; may be changed later.
    """

    #: Raised when nothing can be received or sent now.
    _not_now: tuple[type[OSError], ...] = (BlockingIOError,)

    def __init__(self, sock: socket.socket, max_line: int, peer: Peer = Peer()) -> None:  # noqa: B008 - immutable
        super().__init__(peer)
        self.sock, self.max_line = sock, max_line
        #: Its descriptor, which stays known when ``sock`` is closed.
        self.fd = sock.fileno()
        #: Requests are accepted; ``False`` over TCP until the token has been received.
        self.authenticated = peer.via != "tcp"
        #: When it was accepted, and when bytes were last received or sent, in ``time.monotonic()`` seconds.
        self.accepted_at = self.moved_at = time.monotonic()
        #: Nothing more is read: the client has shut down its writing side, or sent a line that is too long.
        self.at_end = False
        #: Whether lines are ignored that the client may still be sending.
        self.stopped = False
        #: When the connection is closed, though the client goes on: set once all is sent. A socket that is closed with
        #: unread bytes resets the connection, and the client may lose the last reply.
        self.lingers_until: float | None = None
        #: Whether it is in the server's queue, and the events that the selector watches for.
        self.queued, self.watched = False, 0
        self._file: Kept | None = None
        self.subscription: Subscription | None = None
        #: When the subscription may have more, in ``time.monotonic()`` seconds.
        self.stream_at = math.inf
        self._received, self._unsent = bytearray(), bytearray()

    @property
    def unsent(self) -> int:
        """Bytes of replies that the client has not accepted yet."""
        return len(self._unsent)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way: no partial line, no open request, no unread reply, no subscription."""
        return not (self._received or self._unsent or self.open or self.subscription)

    @property
    def partial_line(self) -> bytes:
        """The first bytes that were received and not taken."""
        return bytes(self._received[:64])

    def read(self) -> None:
        """Receive what has arrived, at most ``max_line`` bytes, and drop it if the connection lingers."""
        if self.lingers_until is not None:
            self.broken = self._attempt(self._drop, self.max_line) == b"" or self.broken
            return
        data = None if self.at_end or self.broken else self._attempt(self._recv, self.max_line)
        if data is not None:
            self.at_end = not data
            self._received += data

    def take_line(self) -> bytes | None:
        """Return the next line without its newline; ``None`` while there is none.

        At the end of the stream a last line needs no newline: ``printf '{...}' | nc`` is answered.
        """
        end = self._received.find(b"\n")
        if end < 0:
            if not self._received or not (self.at_end or len(self._received) > self.max_line):
                return None
            end = len(self._received)
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def stop_reading(self) -> None:
        """Read no more, as the start of the next line is not known; what is to be sent is still sent."""
        self._received.clear()
        self.at_end = self.stopped = True

    def linger(self) -> bool:
        """Return whether to wait for the client to end the connection; tell it, once, that all is sent."""
        if self.stopped and self.lingers_until is None and self.is_idle:
            self.lingers_until = time.monotonic() + limits.STALL_TIMEOUT
            self._end_sending()
        return self.lingers_until is not None

    def send(self, data: bytes) -> None:
        """Send what the socket accepts at once and keep the rest."""
        self._unsent += data
        self.flush()

    def flush(self) -> None:
        """Send more of what was kept."""
        if self._unsent and not self.broken:
            del self._unsent[: self._attempt(self._send, self._unsent) or 0]

    def _attempt(self, call: Callable[[Any], Any], argument: Any) -> Any:
        """Return what a call of the socket returns; ``None`` if nothing can be done now, or never."""
        try:
            result = call(argument)
        except self._not_now:
            return None
        except OSError:
            self.broken = True
            return None
        self.moved_at = time.monotonic()
        return result

    def note_file(self) -> None:
        """Note which socket the descriptor is. Not before the first reply, as each system call delays that."""
        self._file = self._file or Kept.of(self.fd)

    def is_open(self) -> bool:
        """Return whether no other code closed the descriptor, as far as it was noted."""
        return self._file is None or self._file.is_open()

    def close(self) -> None:
        """Close the socket and end the subscription."""
        self.broken = True
        self.close_socket()
        self.end_subscription()

    def close_socket(self) -> None:
        """Close the socket, unless other code has."""
        if self.is_open():
            self.sock.close()
        else:
            self.sock.detach()

    def start_subscription(self, subscription: Subscription) -> None:
        """Send the lines of a subscription from now on, in place of the one before."""
        self.note_file()
        self.subscription, self.stream_at = subscription, 0.0

    def end_subscription(self) -> bool:
        """End the subscription; return whether there was one."""
        subscription, self.subscription = self.subscription, None
        return subscription is not None

    @property
    def stream_time(self) -> float:
        """When to call ``stream``: never while the client has not accepted what was sent before."""
        has_room = self.subscription and not self.broken and self.unsent < limits.MAX_STREAM_UNSENT
        return self.stream_at if has_room else math.inf

    def stream(self) -> bool:
        """Send the next lines of the subscription, if they are due; return whether there were any."""
        if self.subscription is None or self.stream_time > time.monotonic():
            return False
        if not self.is_open():  # no client has just asked for this: its socket may be another by now
            self.broken = True
            return False
        data = b""
        try:
            data = self.subscription.pull(limits.STREAM_CHUNK)
            if not data:
                at = self.subscription.next_at()
                self.stream_at = math.inf if at is None else at
        except Exception:  # boundary: it is a method's, and must not keep others from their replies
            log.exception("Internal error in a subscription; the server closes its connection")
            self.broken = True
        self.send(data)
        return bool(data)

    def hung_up(self) -> bool:
        """Whether the client closed its socket, as opposed to only its writing side (poll(2), POLLHUP)."""
        poller = select.poll()
        poller.register(self.sock, 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _fd, events in poller.poll(0))

    def _drop(self, size: int) -> bytes:
        return socket.socket.recv(self.sock, size, socket.MSG_DONTWAIT)  # below TLS, which is not read any more

    # Overridden for TLS...

    def _end_sending(self) -> None:
        with suppress(OSError):  # the client has gone, as reading tells
            socket.socket.shutdown(self.sock, socket.SHUT_WR)

    def _recv(self, size: int) -> bytes:
        return self.sock.recv(size, socket.MSG_DONTWAIT)

    def _send(self, data: bytearray) -> int:
        return self.sock.send(data, _NO_SIGNAL | socket.MSG_DONTWAIT)


class TlsConnection(Connection):
    """A client that speaks TLS; the handshake continues whenever bytes arrive."""

    def __init__(self, sock: socket.socket, max_line: int, context: ssl.SSLContext) -> None:
        import ssl

        super().__init__(sock, max_line, Peer("tcp"))
        sock.setblocking(False)
        self._context = context
        self._not_now = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
        self._tls: ssl.SSLSocket | None = None  # once the handshake is done

    def close(self) -> None:
        if not self.broken and self.is_open() and self.lingers_until is None:
            self._end_sending()
        super().close()

    def _end_sending(self) -> None:
        """Send the closing alert, so that the client can tell this from a lost connection."""
        if self._tls is not None:
            with suppress(OSError, ValueError):
                self._tls.unwrap()  # does not wait for the other's
        super()._end_sending()

    def _recv(self, size: int) -> bytes:
        tls = self._ready()
        data = tls.recv(size)
        while data and tls.pending():  # what is decrypted already wakes no selector
            data += tls.recv(size)
        return data

    def _send(self, data: bytearray) -> int:
        return self._ready().send(data[:_RECORD])

    def _ready(self) -> ssl.SSLSocket:
        """Return the socket; raise OSError while the handshake is not done, or if it failed and may have closed it."""
        import ssl

        if self._tls is None:
            if not isinstance(self.sock, ssl.SSLSocket):
                if self.sock.recv(1, socket.MSG_PEEK) not in (_HANDSHAKE, b""):
                    self.sock.recv(65536)  # closing a socket with unread bytes would discard the refusal
                    self.sock.send(_NO_TLS, _NO_SIGNAL)
                    raise ConnectionError("no TLS")
                self.sock = self._context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
            self.sock.do_handshake()
            self._tls = self.sock
        return self._tls
