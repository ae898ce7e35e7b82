"""Addresses of a job: parse, print, bind, connect. A Unix socket, a TCP port, or a TCP port that speaks TLS."""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from typing import Final, NamedTuple

from ..deadline import Deadline
from ..errors import FindError, InvalidParams, JobDead, JobNotAnswering, NotAuthenticated

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
        """Return a connected, blocking socket without a timeout.

        Raises:
            JobDead: no process listens there.
            JobNotAnswering: the backlog stayed full until the deadline.
            FindError: the socket, or the process that listens there, belongs to another user.
        """
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                sock.connect(self.path)
                sock.setblocking(True)
                _check_peer(sock)
                return sock
            except BlockingIOError as err:
                sock.close()
                if deadline.passed():
                    text = f"{self} accepts no more connections: too many clients are waiting there. Try again later."
                    raise JobNotAnswering(text, endpoint=str(self)) from err
                time.sleep(_RETRY)  # a full backlog offers nothing to wait for
            except OSError as err:
                sock.close()
                raise self._explain(err) from err
            except ValueError as err:  # a NUL byte, from a file that others may have written
                sock.close()
                raise JobDead(f"{str(self)!a} is not a valid address") from err

    def _explain(self, err: OSError) -> FindError:
        if err.errno in (errno.EACCES, errno.EPERM):
            text = f"{self} belongs to another user. Only the job's own user and root can control it."
            return FindError(text, endpoint=str(self))
        text = f"Nothing listens at {self} ({err.strerror or err}): the job has ended, or its process was killed."
        return JobDead(text, endpoint=str(self))


def _check_peer(sock: socket.socket) -> None:
    """Refuse a process of another user that listens where a job's socket was; root may talk to every user's."""
    me = os.geteuid()
    if me != 0 and peer_ids(sock)[0] not in (None, 0, me):
        raise PermissionError(errno.EACCES, "another user listens there")


class TcpEndpoint(NamedTuple):
    """A port of a host, printed as ``tcp://HOST:PORT``, or ``tls://HOST:PORT`` where it speaks TLS.

    Attributes:
        sha256: of the certificate, in hexadecimal; ``None`` has certificate authorities vouch for the host.
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
        """Return a connected, blocking socket without a timeout; with ``is_tls``, after the handshake.

        Raises:
            JobDead: no process listens there.
            JobNotAnswering: there is no such host, or it does not answer in time, or does not speak TLS.
            NotAuthenticated: the certificate is not the job's.
        """
        at = str(self)
        try:
            sock = socket.create_connection((self.host, self.port), timeout=deadline.left())
        except (TimeoutError, BlockingIOError) as err:
            raise JobNotAnswering(f"{at} did not answer in time. Is the host up?", endpoint=at) from err
        except ConnectionRefusedError as err:
            text = f"Nothing listens at {at}: the job has ended, or has another port or none."
            raise JobDead(text, endpoint=at) from err
        except (OSError, ValueError) as err:  # no such host, no route to it, or not a host name at all
            text = f"{at!a} cannot be reached ({err}). Check the host name and the network."
            raise JobNotAnswering(text, endpoint=at) from err
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(deadline.left())
            if self.is_tls:
                from . import tls

                sock = tls.wrap_client(sock, self.host, self.sha256, self.cafile)
            sock.settimeout(None)
            return sock
        except PermissionError as err:
            sock.close()
            raise NotAuthenticated(str(err), endpoint=at) from err
        except OSError as err:
            sock.close()
            text = f"{at} does not speak TLS as expected ({err}). A port without TLS is reached with tcp://."
            raise JobNotAnswering(text, endpoint=at) from err


Endpoint = UnixEndpoint | TcpEndpoint


def parse(text: str) -> Endpoint:
    """Return the address that ``text`` names: ``unix:PATH``, ``tcp://HOST:PORT`` or ``tls://HOST:PORT``.

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
        forms = "unix:PATH, tcp://HOST:PORT or tls://HOST:PORT"
        raise InvalidParams(f"{ascii(text)[:140]} is not an address. Expected {forms}.")
    return TcpEndpoint(host, int(port), kind == "tls")


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536


def is_loopback(host: str) -> bool:
    """Whether only this host can reach the address. ``127.0.0.1.example.org`` is a name like any other."""
    try:
        return host in ("localhost", "::1") or socket.inet_pton(socket.AF_INET, host)[0] == 127
    except (OSError, ValueError):
        return False


def fits(path: str) -> bool:
    """Whether a socket can be bound to this path, and JSON can carry it."""
    try:
        return len(path.encode("utf-8")) <= MAX_PATH
    except UnicodeEncodeError:  # bytes that are not UTF-8, which Python keeps as half surrogates
        return False


def bind(sock: socket.socket, path: str) -> None:
    """Bind a socket that only its owner can read and write from the first moment.

    The file is created with what the umask leaves, so its directory must be 0700 already; and clients cannot connect
    before ``listen``, so that it is never open to others (unix(7)).
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
    # struct ucred: pid, uid, gid, 32 bits each. The module struct would cost every start of a client 0.2 ms.
    pid, uid = (int.from_bytes(credentials[at : at + 4], sys.byteorder) for at in (0, 4))
    return uid, pid or None
