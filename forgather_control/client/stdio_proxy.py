"""The job's end of an ssh connection: copy between standard streams and a job's socket, without reading what passes.

Runs in a process of its own, ``forgather-control dial-stdio JOB``.
"""

import os
import select
import socket
import threading
from contextlib import suppress
from typing import Final

#: The first line, followed by the job's id: every byte after it comes from the job.
MARK: Final = "forgather-control dial-stdio 1 "


def copy(job: str, sock: socket.socket, stdin: int = 0, stdout: int = 1, until_input_ends: bool = False) -> None:
    """Copy both ways until the job closes the connection or the reader of ``stdout`` goes.

    The end of ``stdin`` is passed on to the job, and its replies still come:
    ``printf '{...}' | forgather-control dial-stdio``.

    Args:
        until_input_ends: end with ``stdin``, too. With ssh that means that the client is gone: ssh keeps
            reading, so the reader of ``stdout`` would stay until the job says something.
    """
    threading.Thread(target=_copy_input, args=(stdin, sock, until_input_ends), daemon=True).start()
    poller = select.poll()
    poller.register(stdout, 0)  # asks for nothing, and still reports that the reader has gone
    poller.register(sock, select.POLLIN)
    data = f"{MARK}{job}\n".encode()
    while data and _write(stdout, data):
        if any(file == stdout for file, _ in poller.poll()):
            return
        data = _read(sock.fileno())


def _copy_input(stdin: int, sock: socket.socket, until_input_ends: bool) -> None:
    while (data := _read(stdin)) and _write(sock.fileno(), data):
        pass
    with suppress(OSError):  # the connection is gone already, which reading reports
        sock.shutdown(socket.SHUT_RDWR if until_input_ends else socket.SHUT_WR)


def _read(file: int) -> bytes:
    """Return some bytes; none at the end, or where the other side broke off."""
    while True:
        try:
            return os.read(file, 65536)
        except BlockingIOError:  # a stream that is shared with others may be non-blocking
            _wait(file, select.POLLIN)
        except OSError:
            return b""


def _write(file: int, data: bytes) -> bool:
    """Write all of ``data``; whether there is still a reader."""
    while data:
        try:
            data = data[os.write(file, data) :]
        except BlockingIOError:
            _wait(file, select.POLLOUT)
        except OSError:
            return False
    return True


def _wait(file: int, event: int) -> None:
    poller = select.poll()
    poller.register(file, event)
    poller.poll()
