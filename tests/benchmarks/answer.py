"""A process that answers ``status`` for every job of a directory, in one thread: ``python answer.py ROOT``."""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys

from job import METRICS, allow_files


def reply(name: str) -> bytes:
    """Return what a job of that name answers."""
    status = {"job_id": name, "status": "training", "global_step": 5, "max_steps": 1000, "metrics": METRICS}
    return json.dumps({"jsonrpc": "2.0", "id": 1, "result": status}).encode() + b"\n"


def serve(selector: selectors.BaseSelector) -> None:
    """Accept a connection, answer its request and close it, until standard input ends."""
    while True:
        for key, _ in selector.select():
            if key.data is None:
                return
            sock, _ = key.fileobj.accept()  # type: ignore[union-attr]
            with sock:
                sock.recv(65536)
                sock.sendall(key.data)


def main() -> None:
    allow_files()
    root, selector = sys.argv[1], selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    for name in os.listdir(root):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.path.join(root, name, "control.sock"))
        listener.listen(16)
        selector.register(listener, selectors.EVENT_READ, reply(name))
    print("ready", flush=True)
    serve(selector)


if __name__ == "__main__":
    main()
