"""One client's bytes on a socket: whole lines out of it, replies into it, bounded both ways, waiting for neither.

Floor 0: imports nothing of ours. Runs on the server thread only. A broken socket is a state
(``broken``), not an error: whoever hung up needs no telling.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from .dispatcher import Peer

if TYPE_CHECKING:
    import ssl

#: Where a training script gave SIGPIPE back its default, writing to who hung up would end the process (send(2)).
_NO_SIGNAL: Final = getattr(socket, "MSG_NOSIGNAL", 0)
#: The first byte of a TLS connection: a record of the handshake (RFC 8446, section 5.1).
_HANDSHAKE: Final = b"\x16"
#: Bytes that are read of somebody who does not speak TLS.
_LOOK: Final = 65536
#: Bytes that are sent at once: one record. OpenSSL counts a longer write as nothing until all of it is gone.
_RECORD: Final = 16384


class Connection:
    """One client: what it sent, what it has not read yet, how many answers it still waits for.

    Args:
        sock: connected; nothing here waits for it, though it is a blocking one: to change that is one more system call,
            and beside a loop of pure Python each may cost a wait for the interpreter lock.
        max_line: bytes after which a line without an end is handed out as it is, to be refused; may be set later.
        peer: the process on the other end.

    Attributes:
        fd: its descriptor, whatever becomes of ``sock``.
        is_stranger: it came over TCP, and has not shown the token yet.
    """

    def __init__(self, sock: socket.socket, max_line: int, peer: Peer = Peer()) -> None:  # noqa: B008 - immutable
        self.sock, self.fd, self.peer = sock, sock.fileno(), peer
        self.max_line = max_line
        self.is_stranger = False
        #: When it came, in ``time.monotonic()`` seconds.
        self.came_at = time.monotonic()
        #: Lines that were taken and not answered yet.
        self.open = 0
        #: The client has shut down its writing side, or is no longer listened to; it may still read.
        self.at_end = False
        #: Nothing can be read or written any more.
        self.broken = False
        #: Whether it stands in the server's queue of connections with something to take.
        self.queued = False
        #: When bytes last moved, in ``time.monotonic()`` seconds.
        self.moved_at = self.came_at
        self._received = bytearray()
        self._unsent = bytearray()

    @property
    def unsent(self) -> int:
        """Bytes of replies that the client has not taken yet."""
        return len(self._unsent)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way: no half line, no open request, no unread reply."""
        return not (self._received or self._unsent or self.open)

    @property
    def half_line(self) -> bytes:
        """What has arrived and is not taken, or its beginning."""
        return bytes(self._received[:64])

    def read(self) -> None:
        """Take what has arrived, at most one line's limit of it; nothing once it is at its end."""
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
        """The next line without its newline, or ``None`` while there is none.

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
        """Read no more: where the next line begins is not known."""
        self._received.clear()
        self.at_end = True

    def send(self, data: bytes) -> None:
        """Send what the socket takes at once and keep the rest."""
        self._unsent += data
        self.flush()

    def close(self) -> None:
        """Hang up."""
        self.broken = True
        self.sock.close()

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

    # What TLS does otherwise...

    def _recv(self, size: int) -> bytes:
        return self.sock.recv(size, socket.MSG_DONTWAIT)

    def _send(self, data: bytes | bytearray) -> int:
        return self.sock.send(data, _NO_SIGNAL | socket.MSG_DONTWAIT)

    def hung_up(self) -> bool:
        """Whether the client closed its socket, as opposed to its writing side only (poll(2), POLLHUP)."""
        poller = select.poll()
        poller.register(self.sock, 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _fd, events in poller.poll(0))


class TlsConnection(Connection):
    """A client that speaks TLS; the handshake is taken up again whenever bytes come.

    Args:
        refusal: what is sent, in plain text, to a client that does not speak TLS.
    """

    def __init__(self, sock: socket.socket, max_line: int, context: ssl.SSLContext, refusal: bytes) -> None:
        sock.setblocking(False)
        self._context, self._refusal = context, refusal
        self._tls: ssl.SSLSocket | None = None
        self._shaken = False
        super().__init__(sock, max_line, Peer("tcp"))

    def _recv(self, size: int) -> bytes:
        tls = self._shaken_hands()
        data = bytearray(_patiently(tls.recv, size))
        while data and tls.pending():  # what is decrypted already wakes no selector
            data += tls.recv(size)
        return bytes(data)

    def _send(self, data: bytes | bytearray) -> int:
        tls, sent = self._shaken_hands(), 0
        try:
            while sent < len(data):
                sent += _patiently(tls.send, data[sent : sent + _RECORD])
        except BlockingIOError:
            if not sent:
                raise
        return sent

    def close(self) -> None:
        """Say goodbye, so that nobody takes this for a cut in the line, and hang up."""
        if self._tls is not None and self._shaken and not self.broken:
            try:
                self._tls.unwrap()  # does not wait for the other's
            except (OSError, ValueError):
                pass
        super().close()

    def _shaken_hands(self) -> ssl.SSLSocket:
        """The socket, once the handshake is done.

        Raises:
            BlockingIOError: it is not yet.
            OSError: it never will be; the descriptor may be closed by now.
        """
        if self._tls is None:
            if self.sock.recv(1, socket.MSG_PEEK) not in (_HANDSHAKE, b""):
                self.sock.recv(_LOOK)  # what is unread when a socket is closed takes the last reply with it
                self.sock.send(self._refusal, _NO_SIGNAL)
                raise ConnectionError("no TLS")
            self._tls = self._context.wrap_socket(self.sock, server_side=True, do_handshake_on_connect=False)
            self.sock = self._tls
        if not self._shaken:
            _patiently(self._tls.do_handshake)
            self._shaken = True
        return self._tls


def _patiently(call: Callable[..., Any], *args: Any) -> Any:
    import ssl

    try:
        return call(*args)
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as err:
        raise BlockingIOError from err
