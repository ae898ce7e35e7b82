"""Addresses of a job: parse, print, bind, connect. A Unix socket, a TCP port, or a TCP port that speaks TLS."""

import errno
import os
import re
import socket
import sys
import time
from typing import Final, NamedTuple

from ..deadline import Deadline
from ..errors import FindError, InvalidParams, JobDead, JobNotAnswering, NotAuthenticated

#: Longest path that fits ``sockaddr_un.sun_path`` with its closing NUL: 108 bytes on Linux, 104 elsewhere (unix(7)).
MAX_PATH: Final = 107 if os.uname().sysname == "Linux" else 103
_SOL_LOCAL, _LOCAL_PEERCRED, _LOCAL_PEERPID = 0, 1, 2
#: With socketserver's 5, 190 of 200 clients that have a timeout fail at once (anchors/perf.md, section 6).
BACKLOG: Final = 1024


class UnixEndpoint(NamedTuple):
    """A socket in the file system, printed as ``unix:PATH``."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def connect(self, deadline: Deadline) -> socket.socket:
        """Return a connected, blocking socket without a timeout.

        Raises:
            JobDead, JobNotAnswering: no process listens there, or its backlog stayed full until the deadline.
            FindError: the socket, or the process that listens there, belongs to another user.
        """
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                sock.connect(self.path)
                sock.setblocking(True)
                uid = peer_ids(sock)[0]
                if os.geteuid() != 0 and uid not in (None, 0, os.geteuid()):  # root may talk to every user's job
                    raise PermissionError(errno.EACCES, "another user listens there")
                return sock
            except (OSError, ValueError) as err:
                sock.close()
                if not isinstance(err, BlockingIOError) or deadline.passed():
                    raise self._explain(err) from err
            time.sleep(0.01)  # connect(2) fails at once where the backlog is full, and nothing tells when it has room

    def _explain(self, err: OSError | ValueError) -> FindError:
        if isinstance(err, BlockingIOError):
            text = f"{self} accepts no more connections: too many clients are waiting there. Try again later."
            return JobNotAnswering(text, endpoint=str(self))
        if isinstance(err, PermissionError):
            text = f"{self} belongs to another user. Only the job's own user and root can control it."
            return FindError(text, endpoint=str(self))
        if isinstance(err, ValueError):  # a NUL byte, from a file that others may have written
            return JobDead(f"{str(self)!a} is not a valid address")
        text = f"Nothing listens at {self} ({err.strerror or err}): the job has ended, or its process was killed."
        return JobDead(text, endpoint=str(self))


class TcpEndpoint(NamedTuple):
    """A port of a host, printed as ``tcp://HOST:PORT``, or ``tls://HOST:PORT`` where it speaks TLS.

    ``sha256`` and ``cafile`` say which certificate is trusted; see ``tls.wrap_client``.
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
            JobDead, NotAuthenticated: no process listens there; the certificate is not the job's.
            JobNotAnswering: there is no such host, or it does not answer in time, or does not speak TLS.
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
        except OSError as err:
            sock.close()
            if isinstance(err, PermissionError):
                raise NotAuthenticated(str(err), endpoint=at) from err
            text = f"{at} does not speak TLS as expected ({err}). A port without TLS is reached with tcp://."
            raise JobNotAnswering(text, endpoint=at) from err


Endpoint = UnixEndpoint | TcpEndpoint


def parse(text: str) -> Endpoint:
    """Return the address that a text names; raise InvalidParams if it names none."""
    if text.startswith("unix:") and text != "unix:":
        return UnixEndpoint(text.removeprefix("unix:"))
    found = re.fullmatch(r"(tcp|tls)://(?:\[([^][]+)]|([^][]+)):([0-9]{1,5})", text)
    if found is None or not 0 < int(found[4]) < 65536:
        forms = "unix:PATH, tcp://HOST:PORT or tls://HOST:PORT"
        raise InvalidParams(f"{ascii(text)[:140]} is not an address. Expected {forms}.")
    return TcpEndpoint(found[2] or found[3], int(found[4]), found[1] == "tls")


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

    Its directory must be 0700, as the umask says what it is created with; before ``listen`` no client can connect.
    """
    sock.bind(path)
    os.chmod(path, 0o600)


def knows_peers() -> bool:
    """Return whether :func:`peer_ids` knows a peer on this system."""
    return hasattr(socket, "SO_PEERCRED") or sys.platform == "darwin"


def peer_ids(sock: socket.socket) -> tuple[int | None, int | None]:
    """Return the user id and process id of the other end, as the kernel noted at ``connect`` (socket(7), SO_PEERCRED).

    ``None`` where the system does not tell: there, only the 0700 directory keeps others out. The process id is ``None``
    for a process outside this PID namespace, too.
    """
    if hasattr(socket, "SO_PEERCRED"):
        # struct ucred: pid, uid, gid, 32 bits each. The module struct would cost every start of a client 0.2 ms.
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid = (int.from_bytes(credentials[at : at + 4], sys.byteorder) for at in (0, 4))
        return uid, pid or None
    if not knows_peers():
        return None, None
    # macOS (sys/un.h): struct xucred, which begins with a version and the uid; and a pid. Python has no names for them.
    uid = int.from_bytes(sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, 76)[4:8], sys.byteorder)
    try:
        return uid, sock.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID) or None
    except OSError:  # the peer has gone
        return uid, None
