"""The other end of an ssh: copy between standard streams and a job's socket, without reading what passes.

Floor 0: imports nothing of ours. Runs on the thread of a process of its own, ``forgather-control dial-stdio JOB``.
"""

from __future__ import annotations

import os
import select
import socket
from typing import Final

#: The first line, with the job's id behind it: from here on every byte is the job's.
MARK: Final = "forgather-control dial-stdio 1 "
#: Bytes kept for one direction while its target takes none.
_KEPT: Final = 64 * 1024


class _Way:
    """One direction. Neither end is waited for alone: as much is read as can be kept, written what is taken."""

    def __init__(self, source: int, target: int) -> None:
        self._source, self._target = source, target
        self.kept = b""
        self.at_end = False

    def wants_more(self) -> bool:
        return not self.at_end and len(self.kept) < _KEPT

    def read(self) -> None:
        try:
            data = os.read(self._source, _KEPT)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.kept += data
        self.at_end = not data

    def write(self) -> None:
        try:
            # What a pipe that is ready takes without blocking; ours may belong to somebody else, too.
            self.kept = self.kept[os.write(self._target, self.kept[: select.PIPE_BUF]) :]
        except BlockingIOError:
            return
        except OSError:
            self.kept, self.at_end = b"", True


def copy(job: str, sock: socket.socket, stdin: int = 0, stdout: int = 1, until_input_ends: bool = False) -> None:
    """Copy both ways until the job hangs up, or whoever reads ``stdout`` does.

    The end of ``stdin`` is handed on, and replies still come: ``printf '{...}' | forgather-control dial-stdio``.

    Args:
        until_input_ends: end with ``stdin``, too; from a client it means that this was killed, and ssh, which
            reads on, will not tell before the job says something.
    """
    sock.setblocking(False)
    up, down = _Way(stdin, sock.fileno()), _Way(sock.fileno(), stdout)
    down.kept = f"{MARK}{job}\n".encode()
    is_open = True
    while (down.kept or not down.at_end) and (is_open or not until_input_ends):
        ready = _ready(up, down, sock.fileno(), stdin, stdout)
        if ready.get(stdout, 0) & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
            return
        if stdin in ready:
            up.read()
        if ready.get(sock.fileno(), 0) & ~select.POLLOUT and down.wants_more():
            down.read()
        if up.kept:
            up.write()
        if down.kept and ready.get(stdout):
            down.write()
        if up.at_end and not up.kept and is_open:
            is_open = False
            _half_close(sock)


def _ready(up: _Way, down: _Way, sock: int, stdin: int, stdout: int) -> dict[int, int]:
    poller = select.poll()
    # Asked for nothing, poll still tells that nobody reads any more; but an end that is known would be told for ever.
    poller.register(stdout, select.POLLOUT if down.kept else 0)
    if up.wants_more():
        poller.register(stdin, select.POLLIN)
    asked = (select.POLLIN if down.wants_more() else 0) | (select.POLLOUT if up.kept else 0)
    if asked:
        poller.register(sock, asked)
    return dict(poller.poll())


def _half_close(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_WR)
    except OSError:  # it is gone already, which reading will tell
        pass
