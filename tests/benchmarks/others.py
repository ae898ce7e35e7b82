"""What the control server is compared with: other servers in the job's process, and a client's call for each.

(a) a bare ping-pong of 300 bytes; (b) a minimal threading ``socketserver`` that loads and dumps the same JSON; (c) an
aiohttp server on a loop of its own in a thread of the job, asked by ``requests``: the way of the original. Each server
runs in threads of the job, where ours runs, so that they meet the same interpreter lock.
"""

from __future__ import annotations

import json
import os
import socket
import socketserver
import threading
from typing import Any

PING = b"x" * 299 + b"\n"
REQUEST = {"jsonrpc": "2.0", "id": 1, "method": "status", "params": {}}
#: With socketserver's 5, most of 1,000 clients would be refused.
BACKLOG = 1024


# In the job...


def serve_ping(directory: str, status: dict[str, Any]) -> str:
    """(a): echo. It serves one connection at a time, so kept and new connections have a listener each."""
    for name in ("kept", "new"):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.path.join(directory, f"ping-{name}"))
        listener.listen(BACKLOG)
        threading.Thread(target=_echo, args=(listener,), daemon=True).start()
    return os.path.join(directory, "ping")


def _echo(listener: socket.socket) -> None:
    while True:
        sock, _ = listener.accept()
        with sock:
            while data := sock.recv(4096):
                sock.sendall(data)


class _Minimal(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = BACKLOG


def serve_minimal(directory: str, status: dict[str, Any]) -> str:
    """(b): a thread for each connection; no checks, no limits."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                request = json.loads(line)
                reply = {"jsonrpc": "2.0", "id": request["id"], "result": status}
                self.wfile.write(json.dumps(reply).encode() + b"\n")

    path = os.path.join(directory, "minimal")
    server = _Minimal(path, Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return path


def serve_http(directory: str, status: dict[str, Any]) -> str:
    """(c): the same status as the body of a GET."""
    import asyncio

    from aiohttp import web

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(status)

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/jobs/{job_id}/status", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, backlog=BACKLOG)
        await site.start()
        ports.append(runner.addresses[0][1])
        ready.set()
        while True:
            await asyncio.sleep(1)  # as the original does

    ports: list[int] = []
    ready = threading.Event()
    threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
    ready.wait(30)
    return f"http://127.0.0.1:{ports[0]}/jobs/bench/status"


SERVERS = {"ping": serve_ping, "minimal": serve_minimal, "http": serve_http}


# In the client...


def connected(path: str) -> socket.socket:
    """Return a blocking connection."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


class Kept:
    """A plain client of (a), (b) or ours on one connection."""

    def __init__(self, path: str) -> None:
        self.sock = connected(path)

    def ping(self) -> None:
        """Send a ping and receive it."""
        self.sock.sendall(PING)
        left = len(PING)
        while left:
            left -= len(self.sock.recv(left))

    def status(self) -> Any:
        """Send one request and return its reply."""
        self.sock.sendall(json.dumps(REQUEST).encode() + b"\n")
        data = b""
        while not data.endswith(b"\n"):
            data += self.sock.recv(65536)
        return json.loads(data)["result"]

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()


def ping_anew(path: str) -> None:
    """(a) on a new connection."""
    client = Kept(path)
    client.ping()
    client.close()


def status_anew(path: str) -> Any:
    """(b) on a new connection."""
    client = Kept(path)
    found = client.status()
    client.close()
    return found
