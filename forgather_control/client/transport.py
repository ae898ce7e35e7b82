"""Transports: how lines travel between a client and a job, whether over a socket, TLS, ssh or files.

A transport belongs to the thread of its client.
"""

import socket

from ..deadline import Deadline
from ..wire import jsonrpc
from . import limits


class Transport:
    """One way to a job."""

    job_id: str | None = None  #: The job at the other end, where the way itself tells.
    is_same_host = False  #: Whether it is certain that the job runs on this host, and so has its clock.
    probe_interval = 0.0  #: Seconds between two calls of :meth:`probe` while a reply has no deadline.
    silence = 0.0  #: Seconds without a sign of life after which it returns false.
    can_withdraw = False  #: Whether a request that was not read can be taken back; then it needs no expiry.

    def send(self, line: bytes, seconds: float) -> None:
        """Send one request line, or raise a ControlError that says why it cannot be sent this way.

        TimeoutError: the job did not take it within ``seconds``. OSError: the connection is lost.
        """

    def receive(self, deadline: Deadline) -> bytes | None:
        """Return the next line; ``None`` where the deadline passes first. OSError: the connection is lost."""
        raise NotImplementedError

    def probe(self) -> bool:
        """Look for a sign of life; whether there was one within the last ``silence`` seconds. OSError: as above."""
        raise NotImplementedError

    def withdraw(self) -> bool:
        """Take back the request that got no reply; whether it is certain that the job will never read it."""
        return False

    def why_lost(self) -> str | None:
        """Return why the connection ended, where that says nothing of the job; ``None`` if the job closed it."""
        return None

    def close(self) -> None:
        """Release everything. May be called twice."""


class SocketTransport(Transport):
    """Lines over a connected stream socket, plain or TLS."""

    def __init__(self, sock: socket.socket, job_id: str | None = None, is_same_host: bool = False) -> None:
        self.sock, self.job_id, self.is_same_host = sock, job_id, is_same_host
        self.probe_interval, self.silence = limits.PING_INTERVAL, limits.SILENCE
        self._received = bytearray()
        self._given_up = Deadline(None)

    def send(self, line: bytes, seconds: float) -> None:
        self._given_up = Deadline(self.silence)
        self._send(line, seconds)

    def _send(self, line: bytes, seconds: float) -> None:
        self.sock.settimeout(seconds)
        self.sock.sendall(line)

    def receive(self, deadline: Deadline) -> bytes | None:
        while (end := self._received.find(b"\n")) < 0:
            left = deadline.left()
            if left == 0.0:
                return None
            try:
                self.sock.settimeout(left)
                data = self.sock.recv(65536)
            except TimeoutError:
                return None
            if not data:
                raise ConnectionResetError("the other side closed the connection")
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._given_up = Deadline(self.silence)
        return line

    def probe(self) -> bool:
        if self._given_up.passed():
            return False
        try:
            # Its reply has the id null and is skipped: only that it comes matters.
            self._send(jsonrpc.request("ping", {}, None), limits.PING_INTERVAL)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self.sock.close()
