"""One client connection: whole lines out of its bytes, replies and a stream into it, bounded in both directions.

Runs on the server thread only and never blocks. A broken socket is a state (``broken``), not an exception.
"""

from __future__ import annotations

import logging
import select
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from . import limits
from .dispatcher import Peer, Subscription

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("forgather_control")

#: Where a training script restored the default of SIGPIPE, writing to a closed socket would end the process (send(2)).
_NO_SIGNAL: Final = getattr(socket, "MSG_NOSIGNAL", 0)
#: The first byte of a TLS connection: a record of the handshake (RFC 8446, section 5.1).
_HANDSHAKE: Final = b"\x16"
#: Bytes that are read from a client that does not speak TLS.
_DISCARDED: Final = 65536
#: Bytes that are sent at once: one record. OpenSSL reports a longer write as nothing until all of it is sent.
_RECORD: Final = 16384


class Connection:
    """One client: its received bytes, its unsent replies, and the number of its requests without an answer.

    Args:
        sock: connected. It stays a blocking socket, as changing that costs a system call, and beside a loop of pure
            Python each may cost a wait for the interpreter lock; all calls here pass MSG_DONTWAIT.
        max_line: bytes after which a line without an end is returned as it is, to be refused; may be changed later.
        peer: the process on the other end.

    Attributes:
        fd: its descriptor, which stays known when ``sock`` is closed.
        authenticated: requests are accepted; ``False`` over TCP until the token has been received.
    """

    def __init__(self, sock: socket.socket, max_line: int, peer: Peer = Peer()) -> None:  # noqa: B008 - immutable
        self.sock, self.fd, self.peer = sock, sock.fileno(), peer
        self.max_line = max_line
        self.authenticated = peer.via != "tcp"
        #: When it was accepted, in ``time.monotonic()`` seconds.
        self.accepted_at = time.monotonic()
        #: Number of lines that were taken and are not answered yet.
        self.open = 0
        #: Nothing more is read: the client has shut down its writing side, or sent a line that is too long.
        self.at_end = False
        #: Nothing can be read or written any more.
        self.broken = False
        #: Whether it is in the server's queue.
        self.queued = False
        #: When bytes were last received or sent, in ``time.monotonic()`` seconds.
        self.moved_at = self.accepted_at
        self.subscription: Subscription | None = None
        #: When ``stream`` is to be called, in ``time.monotonic()`` seconds; ``None`` for not before a wake.
        self.stream_at: float | None = None
        self._received = bytearray()
        self._unsent = bytearray()

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
        """Receive what has arrived, at most ``max_line`` bytes."""
        if self.at_end:
            return
        try:
            data = self._recv(self.max_line)
        except BlockingIOError:
            return
        except OSError:
            self.broken = True
            return
        self.moved_at = time.monotonic()
        self.at_end = not data
        self._received += data

    def take_line(self) -> bytes | None:
        """Return the next line without its newline; ``None`` while there is none.

        At the end of the stream a last line needs no newline: ``printf '{...}' | nc`` is answered.
        """
        end = self._received.find(b"\n")
        if end >= 0:
            line = bytes(self._received[:end])
            del self._received[: end + 1]
            return line
        if self._received and (self.at_end or len(self._received) > self.max_line):
            line = bytes(self._received)
            self._received.clear()
            return line
        return None

    def stop_reading(self) -> None:
        """Read no more, as the start of the next line is not known; what is to be sent is still sent."""
        self._received.clear()
        self.at_end = True
        self.end_subscription()

    def send(self, data: bytes) -> None:
        """Send what the socket accepts at once and keep the rest."""
        self._unsent += data
        self.flush()

    def flush(self) -> None:
        """Send more of what was kept."""
        if not self._unsent or self.broken:
            return
        try:
            sent = self._send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self.broken = True
            return
        del self._unsent[:sent]
        self.moved_at = time.monotonic()

    def close(self) -> None:
        """Close the socket and end the subscription."""
        self.broken = True
        self.sock.close()
        self.end_subscription()

    def start_subscription(self, subscription: Subscription) -> None:
        """Send the lines of a subscription from now on, in place of the one before."""
        self.end_subscription()
        self.subscription, self.stream_at = subscription, 0.0

    def end_subscription(self) -> bool:
        """End the subscription; return whether there was one."""
        subscription, self.subscription = self.subscription, None
        if subscription is not None:
            try:
                subscription.close()
            except Exception:  # boundary: it is a method's, and must not keep others from their replies
                log.exception("Internal error while a subscription was closed (recovered)")
        return subscription is not None

    @property
    def stream_time(self) -> float | None:
        """When more of the subscription can be sent, in ``time.monotonic()`` seconds; ``None`` if nothing is due.

        Nothing is due while the client has not accepted what was sent before.
        """
        has_room = not self.broken and self.unsent < limits.MAX_STREAM_UNSENT
        return self.stream_at if self.subscription is not None and has_room else None

    def stream(self) -> bool:
        """Send the next lines of the subscription, if they are due; return whether there were any."""
        at = self.stream_time
        if self.subscription is None or at is None or at > time.monotonic():
            return False
        try:
            data = self.subscription.pull(limits.STREAM_CHUNK)
            if not data:
                self.stream_at = self.subscription.next_at()
        except Exception:  # boundary: as above
            log.exception("Internal error in a subscription; the server closes its connection")
            self.broken = True
            return False
        self.send(data)
        return bool(data)

    def hung_up(self) -> bool:
        """Whether the client closed its socket, as opposed to only its writing side (poll(2), POLLHUP)."""
        poller = select.poll()
        poller.register(self.sock, 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _fd, events in poller.poll(0))

    # Overridden for TLS...

    def _recv(self, size: int) -> bytes:
        return self.sock.recv(size, socket.MSG_DONTWAIT)

    def _send(self, data: bytes | bytearray) -> int:
        return self.sock.send(data, _NO_SIGNAL | socket.MSG_DONTWAIT)


class TlsConnection(Connection):
    """A client that speaks TLS; the handshake continues whenever bytes arrive.

    Args:
        refusal: sent in plain text to a client that does not speak TLS.
    """

    def __init__(self, sock: socket.socket, max_line: int, context: ssl.SSLContext, refusal: bytes) -> None:
        sock.setblocking(False)
        self._context, self._refusal = context, refusal
        self._tls: ssl.SSLSocket | None = None
        self._handshake_done = False
        super().__init__(sock, max_line, Peer("tcp"))

    def close(self) -> None:
        """Send the closing alert, so that the client can tell this from a lost connection, and close the socket."""
        if self._tls is not None and self._handshake_done and not self.broken:
            try:
                self._tls.unwrap()  # does not wait for the other's
            except (OSError, ValueError):
                pass
        super().close()

    def _recv(self, size: int) -> bytes:
        tls = self._ready()
        data = bytearray(_nonblocking(tls.recv, size))
        while data and tls.pending():  # what is decrypted already wakes no selector
            data += tls.recv(size)
        return bytes(data)

    def _send(self, data: bytes | bytearray) -> int:
        tls, sent = self._ready(), 0
        try:
            while sent < len(data):
                sent += _nonblocking(tls.send, data[sent : sent + _RECORD])
        except BlockingIOError:
            if not sent:
                raise
        return sent

    def _ready(self) -> ssl.SSLSocket:
        """Return the socket, once the handshake is done.

        Raises:
            BlockingIOError: it is not done yet.
            OSError: it failed; the descriptor may be closed.
        """
        if self._tls is None:
            if self.sock.recv(1, socket.MSG_PEEK) not in (_HANDSHAKE, b""):
                self.sock.recv(_DISCARDED)  # closing a socket with unread bytes would discard the refusal
                self.sock.send(self._refusal, _NO_SIGNAL)
                raise ConnectionError("no TLS")
            self._tls = self._context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
            self.sock = self._tls
        if not self._handshake_done:
            _nonblocking(self._tls.do_handshake)
            self._handshake_done = True
        return self._tls


def _nonblocking(call: Callable[..., Any], *args: Any) -> Any:
    import ssl

    try:
        return call(*args)
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as err:
        raise BlockingIOError from err
