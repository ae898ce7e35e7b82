"""A process that floods a job with requests until it is killed: ``python flood.py SOCKET KIND``."""

from __future__ import annotations

import json
import selectors
import socket
import sys
from typing import NamedTuple

from others import REQUEST, Kept, connected

LINE = json.dumps(REQUEST).encode() + b"\n"


class Kind(NamedTuple):
    """How many processes, how many connections each, and requests that each has under way.

    Attributes:
        deep: 1 waits for each reply; more sends ahead; 0 uses a new connection for each request.
    """

    about: str
    processes: int
    connections: int
    deep: int


KINDS = {
    "four": Kind("4 clients, one request after the other", 4, 1, 1),
    "many": Kind("50 clients, 20 requests ahead", 1, 50, 20),
    "anew": Kind("new connections, as fast as they come", 2, 1, 0),
}


def ask_on(path: str) -> None:
    """Send requests one after the other."""
    client = Kept(path)
    while True:
        client.status()


def ask_anew(path: str) -> None:
    """Connect, send a request, receive the reply, disconnect."""
    while True:
        client = Kept(path)
        client.status()
        client.close()


def ask_ahead(path: str, connections: int, deep: int) -> None:
    """Send another request after each answer."""
    with selectors.DefaultSelector() as selector:
        for _ in range(connections):
            sock = connected(path)
            selector.register(sock, selectors.EVENT_READ)
            sock.sendall(LINE * deep)
        while True:
            for key, _ in selector.select():
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                sock.sendall(LINE * sock.recv(65536).count(b"\n"))


def main() -> None:
    path, kind = sys.argv[1], KINDS[sys.argv[2]]
    if kind.deep == 0:
        ask_anew(path)
    elif kind.deep == 1:
        ask_on(path)
    else:
        ask_ahead(path, kind.connections, kind.deep)


if __name__ == "__main__":
    main()
