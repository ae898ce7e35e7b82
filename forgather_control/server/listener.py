"""The listening sockets: the Unix socket for this user and root, and the TCP port for clients with the token.

Created on the thread that binds them, used on the server thread.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable
from typing import Final

from ..wire import addresses
from . import limits
from .dispatcher import Peer

log = logging.getLogger("forgather_control")

_OUT_OF_FILES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Listener:
    """A listening socket.

    Args:
        bind: gives the socket its address.
        admit: returns the peer of an accepted connection; ``None`` to refuse it.
        adopt: is given each admitted connection and its peer.
    """

    def __init__(
        self,
        family: int,
        bind: Callable[[socket.socket], None],
        admit: Callable[[socket.socket], Peer | None],
        adopt: Callable[[socket.socket, Peer], None],
    ) -> None:
        self.socket, self._admit, self._adopt = socket.socket(family, socket.SOCK_STREAM), admit, adopt
        try:
            bind(self.socket)
            self.socket.setblocking(False)
            self.socket.listen(addresses.BACKLOG)
        except BaseException:
            self.socket.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor for a selector."""
        return self.socket.fileno()

    def accept(self) -> bool:
        """Take one connection from the backlog; return ``False`` if there is none.

        Raises:
            OSError: the process is out of descriptors, or the client has left already.
        """
        try:
            sock, _address = self.socket.accept()
        except BlockingIOError:
            return False
        peer = self._admit(sock)
        if peer is None:
            sock.close()
        else:
            self._adopt(sock, peer)
        return True

    def accept_all(self) -> None:
        """Take the whole backlog."""
        try:
            while self.accept():
                pass
        except OSError:
            pass  # out of descriptors: these clients cannot be answered


def open_socket(path: str, adopt: Callable[[socket.socket, Peer], None]) -> Listener:
    """Listen at a path, for clients of the same user and root.

    Raises:
        OSError: the path cannot be bound.
    """
    return Listener(socket.AF_UNIX, lambda sock: addresses.bind(sock, path), _admit_local, adopt)


def open_port(host: str, port: int | None, adopt: Callable[[socket.socket, Peer], None]) -> Listener:
    """Listen on a port of one address of this host. It is bound at once, never tested first and bound later.

    Args:
        port: a number, 0 for any, ``None`` for the first free one from ``DEFAULT_PORT``.

    Raises:
        OSError, ValueError, TypeError: it cannot be bound, or none of the first ``PORTS_TRIED``.
    """
    first = limits.DEFAULT_PORT if port is None else port
    last = limits.DEFAULT_PORT + limits.PORTS_TRIED - 1 if port is None else port
    for candidate in range(first, last):
        try:
            return _open_port(host, candidate, adopt)
        except OSError as err:
            if err.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    return _open_port(host, last, adopt)


def _open_port(host: str, port: int, adopt: Callable[[socket.socket, Peer], None]) -> Listener:
    def bind(sock: socket.socket) -> None:
        # Without it the port of an ended job stays taken for a minute. It allows no second listener (socket(7)).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))

    return Listener(socket.AF_INET6 if ":" in host else socket.AF_INET, bind, _admit_remote, adopt)


def _admit_local(sock: socket.socket) -> Peer | None:
    uid, pid = addresses.peer_ids(sock)
    if uid in (None, 0, os.geteuid()):
        return Peer("socket", uid, pid)
    log.warning("Refused a connection from uid %s: only the job's own user and root may control it", uid)
    return None


def _admit_remote(sock: socket.socket) -> Peer:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # replies are lines
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # detects a host that has vanished
    return Peer("tcp")


class Listeners:
    """The listening sockets of a server; none is watched while the process has no free descriptors.

    Args:
        selector: watches them.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._listeners: list[Listener] = []
        #: When accepting is tried again, in ``time.monotonic()`` seconds; ``None`` while listeners are watched.
        self.retry_at: float | None = None

    def add(self, listener: Listener) -> None:
        """Accept connections of a listener; a Unix socket replaces the one before, after its backlog."""
        for old in list(self._listeners):
            if old.socket.family == listener.socket.family == socket.AF_UNIX:
                old.accept_all()  # a client in the backlog has already sent its request
                self._remove(old)
        self._listeners.append(listener)
        if self.retry_at is None:
            self._selector.register(listener, selectors.EVENT_READ)

    def accept(self, listener: Listener, most: int) -> None:
        """Accept at most so many connections."""
        try:
            for _ in range(most):
                if not listener.accept():
                    return
        except OSError as err:
            # A backlog that cannot be accepted would wake the thread for ever: try again later.
            if err.errno in _OUT_OF_FILES and self.retry_at is None:
                self.retry_at = time.monotonic() + limits.TICK_PERIOD
                for each in self._listeners:
                    self._selector.unregister(each)

    def resume(self) -> None:
        """Watch the listeners again, if it is time."""
        if self.retry_at is not None and time.monotonic() >= self.retry_at:
            self.retry_at = None
            for listener in self._listeners:
                self._selector.register(listener, selectors.EVENT_READ)

    def accept_backlogs(self) -> None:
        """Accept all clients that have connected."""
        for listener in self._listeners:
            listener.accept_all()

    def close(self) -> None:
        """Close all listeners."""
        for listener in list(self._listeners):
            self._remove(listener)

    def abandon(self) -> None:
        """Close the sockets in a forked child, whose selector is the parent's."""
        for listener in self._listeners:
            listener.socket.close()

    def _remove(self, listener: Listener) -> None:
        if self.retry_at is None:
            self._selector.unregister(listener)
        self._listeners.remove(listener)
        listener.socket.close()
