"""The listening sockets: who may come in over the file system, and who over TCP.

Floor 2: imports endpoint only. Made on the thread that binds, used on the server thread.

``socketserver`` gives bind, accept, the check of the peer and closing; ``process_request`` hands the
connection over instead of serving it.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import socketserver
from collections.abc import Callable
from typing import Any

from ..wire import addresses
from . import limits

log = logging.getLogger("forgather_control")


Adopt = Callable[[socket.socket], None]


class Listener(socketserver.TCPServer):
    """What both kinds share.

    Args:
        address: a path, or host and port.
        adopt: takes each connection that may come in.
    """

    request_queue_size = addresses.BACKLOG

    def __init__(self, address: Any, adopt: Adopt) -> None:
        self._adopt = adopt
        super().__init__(address, socketserver.BaseRequestHandler)
        self.socket.setblocking(False)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Hand the connection over."""
        self._adopt(request)

    def accept(self) -> bool:
        """Take one connection from the backlog; False when there is none.

        Raises:
            OSError: the process is out of files, or the client was gone already.
        """
        try:
            request, address = self.get_request()
        except BlockingIOError:
            return False
        if self.verify_request(request, address):
            self.process_request(request, address)
        else:
            self.shutdown_request(request)
        return True


class UnixListener(Listener, socketserver.UnixStreamServer):
    """A socket at one path; who connects is the same user or root."""

    def server_bind(self) -> None:
        """Readable and writable by its owner alone from the first moment."""
        addresses.bind(self.socket, str(self.server_address))

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Ask the kernel who that is."""
        uid, _pid = addresses.peer_ids(request)
        welcome = uid is None or uid in (0, os.geteuid())
        if not welcome:
            log.warning("refused a connection from uid %s", uid)
        return welcome


class TcpListener(Listener):
    """A port of one address of this host; whoever connects is a stranger."""

    # Without it the port of a job that has ended stays taken for a minute.
    # Two who listen it does not allow (socket(7)).
    allow_reuse_address = True

    def __init__(self, host: str, port: int, adopt: Adopt) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), adopt)

    @property
    def bound(self) -> tuple[str, int]:
        """The address and the port that it has, in numbers, whatever was asked for."""
        return str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Replies are lines: sent at once; a peer that has vanished is found out in the end."""
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        super().process_request(request, client_address)


def open_port(host: str, port: int | None, adopt: Adopt) -> TcpListener:
    """Listen at a port: bound at once, never tried first and bound later.

    Args:
        port: a number, 0 for any, ``None`` for the first free one from ``DEFAULT_PORT``.

    Raises:
        OSError: it cannot be bound, or none of the first hundred.
    """
    if port is not None:
        return TcpListener(host, port, adopt)
    for candidate in range(limits.DEFAULT_PORT, limits.DEFAULT_PORT + limits.PORTS_TRIED):
        try:
            return TcpListener(host, candidate, adopt)
        except OSError as err:
            if candidate == limits.DEFAULT_PORT + limits.PORTS_TRIED - 1 or not _is_taken(err):
                raise
    raise AssertionError("unreachable")


def _is_taken(err: OSError) -> bool:
    return err.errno in (errno.EADDRINUSE, errno.EACCES)
