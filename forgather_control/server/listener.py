"""The listening sockets: the Unix socket for this user and root, and the TCP port for clients with the token.

``socketserver`` binds, listens, asks whether a peer is permitted, and closes; an accepted connection goes to the server
thread's selector instead of a request handler. Created on the thread that binds, used on the server thread.
"""

from __future__ import annotations

import errno
import logging
import os
import selectors
import socket
import socketserver
from collections.abc import Callable
from typing import Any, Final

from ..descriptors import Kept
from ..wire import addresses
from . import limits
from .dispatcher import Peer

log = logging.getLogger("forgather_control")

_OUT_OF_FILES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Adopt = Callable[[socket.socket, Peer], None]


class Listener(socketserver.TCPServer):
    """A listening socket; ``adopt`` is given each permitted connection and its peer."""

    request_queue_size = addresses.BACKLOG

    def __init__(self, address: Any, adopt: Adopt) -> None:
        self._adopt = adopt
        self._file: Kept | None = None
        super().__init__(address, socketserver.BaseRequestHandler)
        self._file = Kept.of(self.fileno())
        self.socket.setblocking(False)

    def is_open(self) -> bool:
        """Return whether the socket is open: other code may have closed its descriptor."""
        return self._file is None or self._file.is_open()

    def server_close(self) -> None:
        """Close the socket, unless other code has."""
        if self.is_open():
            super().server_close()
        else:
            self.socket.detach()

    def accept(self) -> bool:
        """Take one connection; return ``False`` if there is none, raise OSError if it cannot be had or has gone."""
        try:
            sock, peer = self.get_request()
        except BlockingIOError:
            return False
        if self.verify_request(sock, peer):
            self._adopt(sock, peer)
        else:
            self.close_request(sock)
        return True


class UnixListener(Listener, socketserver.UnixStreamServer):
    """A socket in the file system, for clients of the same user and root."""

    def server_bind(self) -> None:
        addresses.bind(self.socket, str(self.server_address))

    def get_request(self) -> tuple[socket.socket, Peer]:
        sock, _ = self.socket.accept()
        return sock, Peer("socket", *addresses.peer_ids(sock))

    def verify_request(self, request: Any, client_address: Any) -> bool:
        uid = client_address.uid
        permitted = uid in (None, 0, os.geteuid())
        if not permitted:
            log.warning("Refused a connection from uid %s: only the job's own user and root may control it", uid)
        return permitted


class TcpListener(Listener):
    """A port of one address of this host, for clients with the token."""

    # Without it the port of an ended job stays taken for a minute. It allows no second listener (socket(7)).
    allow_reuse_address = True

    def __init__(self, host: str, port: int, adopt: Adopt) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), adopt)

    def get_request(self) -> tuple[socket.socket, Peer]:
        sock, _ = self.socket.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # replies are lines
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # detects a host that has vanished
        return sock, Peer("tcp")


def open_port(host: str, port: int | None, adopt: Adopt) -> TcpListener:
    """Listen on a port: 0 for any, ``None`` for the first free one of ``PORTS_TRIED`` from ``DEFAULT_PORT``.

    It is bound at once, never tested first and bound later. Raises OSError, ValueError or TypeError if it cannot be.
    """
    *others, last = range(limits.DEFAULT_PORT, limits.DEFAULT_PORT + limits.PORTS_TRIED) if port is None else [port]
    for candidate in others:
        try:
            return TcpListener(host, candidate, adopt)
        except OSError as err:
            if err.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    return TcpListener(host, last, adopt)


class Listeners:
    """The listening sockets of a server, at most one of each class."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._listeners: dict[type[Listener], Listener] = {}

    def add(self, listener: Listener) -> None:
        """Accept connections of a listener, in place of the one before."""
        old = self._listeners.pop(type(listener), None)
        if old is not None:
            self._close(old)
        self._listeners[type(listener)] = listener
        self.resume()

    def accept(self, listener: Listener, most: int) -> None:
        """Accept at most so many connections."""
        try:
            for _ in range(most):
                if not listener.accept():
                    return
        except OSError as err:
            # A backlog that cannot be accepted would wake the thread for ever: the next tick tries again.
            if err.errno in _OUT_OF_FILES:
                self._unwatch(listener)

    def resume(self) -> None:
        """Watch all listeners."""
        for listener in self._listeners.values():
            if listener not in self._selector.get_map():
                self._selector.register(listener, selectors.EVENT_READ)

    def close(self) -> None:
        """Close all listeners."""
        while self._listeners:
            self._close(self._listeners.popitem()[1])

    def are_open(self) -> bool:
        """Return whether all are."""
        return all(listener.is_open() for listener in self._listeners.values())

    def abandon(self) -> None:
        """Close the sockets alone: in a forked child, whose selector is the parent's, or where it is gone."""
        for listener in self._listeners.values():
            listener.server_close()

    def _close(self, listener: Listener) -> None:
        self.accept(listener, 2 * addresses.BACKLOG)  # a client in the backlog has already sent its request
        self._unwatch(listener)
        listener.server_close()

    def _unwatch(self, listener: Listener) -> None:
        if listener in self._selector.get_map():
            self._selector.unregister(listener)
