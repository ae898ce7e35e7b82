"""An address: print, bind, connect. Unix sockets; TCP and TLS will stand here, too.

Floor 1: imports errors and clock only. Runs on whatever thread calls it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from typing import Final, NamedTuple

from .clock import Deadline
from .errors import FindError, JobDead, JobNotAnswering

#: Longest path that fits ``sockaddr_un.sun_path`` with its closing NUL: 108 bytes on Linux, 104 elsewhere (unix(7)).
MAX_PATH: Final = 107 if os.uname().sysname == "Linux" else 103
#: With socketserver's 5, 190 of 200 clients that have a timeout fail at once (anchors/perf.md, section 6).
BACKLOG: Final = 1024
#: Pause before a full backlog is tried again, in seconds; connect(2) fails at once with EAGAIN there.
_RETRY: Final = 0.01


class UnixEndpoint(NamedTuple):
    """A socket in the file system, printed as ``unix:PATH``."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def connect(self, deadline: Deadline) -> socket.socket:
        """A connected, blocking socket without a timeout.

        Raises:
            JobDead: nobody listens there.
            JobNotAnswering: the backlog stayed full until the deadline.
            FindError: the socket belongs to another user.
        """
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                sock.connect(self.path)
                sock.setblocking(True)
                return sock
            except BlockingIOError as err:
                sock.close()
                if deadline.passed():
                    raise JobNotAnswering(f"{self} takes no more connections", endpoint=str(self)) from err
                time.sleep(_RETRY)  # nothing to wait on: a full backlog wakes nobody
            except OSError as err:
                sock.close()
                raise self._explain(err) from err
            except ValueError as err:  # a NUL byte, out of a file that anybody may have written
                sock.close()
                raise JobDead(f"{str(self)!a} cannot be an address") from err

    def _explain(self, err: OSError) -> FindError:
        if err.errno in (errno.EACCES, errno.EPERM):
            return FindError(f"{self} belongs to another user", endpoint=str(self))
        return JobDead(f"nobody listens at {self} ({err.strerror or err})", endpoint=str(self))


def fits(path: str) -> bool:
    """Whether a socket of this path can have an address at all, and JSON can carry it."""
    try:
        return len(path.encode("utf-8")) <= MAX_PATH
    except UnicodeEncodeError:  # bytes that are no UTF-8, which Python keeps as half surrogates
        return False


def bind(sock: socket.socket, path: str) -> None:
    """Give the socket its name, readable and writable by its owner alone from the first moment.

    The file is made with whatever the umask leaves, so its directory must be 0700 already, and
    nobody can connect before ``listen``: there is no moment in which it is open (unix(7)).
    """
    sock.bind(path)
    os.chmod(path, 0o600)


def peer_uid(sock: socket.socket) -> int | None:
    """The user id of the process on the other end, as the kernel noted it at ``connect``.

    ``None`` where the system does not tell: there, the 0700 directory alone keeps others out.
    Source: socket(7), SO_PEERCRED.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    size = struct.calcsize("3i")
    _pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(uid)
