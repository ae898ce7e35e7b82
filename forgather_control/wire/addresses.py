"""An address: parse, print, bind, connect. A Unix socket, a TCP port, a port that speaks TLS.

Floor 1: imports clock, errors and tls. Runs on whatever thread calls it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from typing import Final, NamedTuple

from ..deadline import Deadline
from ..errors import FindError, InvalidParams, JobDead, JobNotAnswering, NotAuthenticated
from . import tls

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
            FindError: the socket belongs to another user, or whoever listens does.
        """
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                sock.connect(self.path)
                sock.setblocking(True)
                self._check_peer(sock)
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

    @staticmethod
    def _check_peer(sock: socket.socket) -> None:
        """What another user bound in the place of a socket that is gone is no job of ours; root talks to anybody's."""
        me = os.geteuid()
        if me != 0 and peer_ids(sock)[0] not in (None, 0, me):
            raise PermissionError(errno.EACCES, "another user listens there")

    def _explain(self, err: OSError) -> FindError:
        if err.errno in (errno.EACCES, errno.EPERM):
            return FindError(f"{self} belongs to another user", endpoint=str(self))
        return JobDead(f"nobody listens at {self} ({err.strerror or err})", endpoint=str(self))


class TcpEndpoint(NamedTuple):
    """A port of a host, printed as ``tcp://HOST:PORT``, or ``tls://HOST:PORT`` where it speaks TLS.

    Attributes:
        sha256: of the certificate, in hexadecimal; ``None`` has authorities vouch for the host.
        cafile: a PEM file with those authorities; ``None`` for the system's.
    """

    host: str
    port: int
    is_tls: bool = False
    sha256: str | None = None
    cafile: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.is_tls else 'tcp'}://{host}:{self.port}"

    def connect(self, deadline: Deadline) -> socket.socket:
        """A connected, blocking socket without a timeout, wrapped in TLS where it is to be.

        Raises:
            JobDead: nobody listens there.
            JobNotAnswering: there is no such host, or it does not answer in time, or does not speak TLS.
            NotAuthenticated: the certificate is not the job's.
        """
        try:
            sock = socket.create_connection((self.host, self.port), timeout=deadline.left())
        except (TimeoutError, BlockingIOError) as err:
            raise JobNotAnswering(f"{self} does not answer", endpoint=str(self)) from err
        except ConnectionRefusedError as err:
            raise JobDead(f"nobody listens at {self}", endpoint=str(self)) from err
        except (OSError, ValueError) as err:  # no such host, no way to it; a host that cannot be a name
            raise JobNotAnswering(f"{str(self)!a} cannot be reached ({err})", endpoint=str(self)) from err
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(deadline.left())
            sock = tls.wrap_client(sock, self.host, self.sha256, self.cafile) if self.is_tls else sock
            sock.settimeout(None)
            return sock
        except PermissionError as err:
            sock.close()
            raise NotAuthenticated(str(err), endpoint=str(self)) from err
        except OSError as err:
            sock.close()
            raise JobNotAnswering(f"{self} does not speak TLS as expected ({err})", endpoint=str(self)) from err


Endpoint = UnixEndpoint | TcpEndpoint


def parse(text: str) -> Endpoint:
    """The address that ``text`` names: ``unix:PATH``, ``tcp://HOST:PORT`` or ``tls://HOST:PORT``.

    Raises:
        InvalidParams: it names none.
    """
    if text.startswith("unix:") and len(text) > len("unix:"):
        return UnixEndpoint(text.removeprefix("unix:"))
    kind, _, rest = text.partition("://")
    host, _, port = rest.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if kind not in ("tcp", "tls") or not host or "[" in host or "]" in host or not _is_port(port):
        raise InvalidParams(f"{ascii(text)[:140]} is no address: unix:PATH, tcp://HOST:PORT or tls://HOST:PORT")
    return TcpEndpoint(host, int(port), kind == "tls")


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536


def is_loopback(host: str) -> bool:
    """Whether nobody on another host can reach this address. ``127.0.0.1.example.org`` is a name like any other."""
    try:
        return host in ("localhost", "::1") or socket.inet_pton(socket.AF_INET, host)[0] == 127
    except (OSError, ValueError):
        return False


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


def peer_ids(sock: socket.socket) -> tuple[int | None, int | None]:
    """Return the user id and process id of the other end, as the kernel noted them at ``connect``.

    Both are ``None`` where the system does not tell: there, only the 0700 directory keeps others out. The process id
    is ``None`` for a process outside this PID namespace. Source: socket(7), SO_PEERCRED.
    """
    if not hasattr(socket, "SO_PEERCRED"):
        return None, None
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, _gid = struct.unpack("=iII", credentials)  # struct ucred
    return uid, pid or None
