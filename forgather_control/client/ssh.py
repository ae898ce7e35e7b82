"""Reach a job over ssh, with no port at all: the client's end runs ssh, the other end is a bridge to the job's socket.

Floor 2: imports bridge, clock, errors, jsonrpc and record. Runs on the caller's thread. The way of ``docker system
dial-stdio``: on the other side ``forgather-control dial-stdio JOB`` copies between its standard streams and the socket.

What the other side's shell prints at its start is skipped, up to a line of the bridge's own. Host and job are
checked before they become arguments: a host that begins with a dash would be an option of ssh.
"""

from __future__ import annotations

import os
import re
import select
import socket
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..deadline import Deadline
from ..errors import (
    ControlError,
    FindError,
    InternalError,
    InvalidParams,
    JobNotAnswering,
    NoSuchJob,
    NotAuthenticated,
    WireError,
    from_wire,
)
from ..jobs.record import is_job_id
from ..wire import jsonrpc
from . import stdio_proxy

if TYPE_CHECKING:  # loaded when ssh is run
    import subprocess

#: The ssh to run, with options of one's own (``ssh -F FILE``, ``ssh -J JUMPHOST``); split as a shell would.
PROGRAM: Final = "FORGATHER_CONTROL_SSH"
#: What to run on the other side, as its shell shall read it; ``~/venv/bin/forgather-control``, say.
REMOTE: Final = "FORGATHER_CONTROL_REMOTE"

#: Nothing of it may reach a shell, here or in somebody's ProxyCommand, as more than a name (CVE-2023-51385).
_HOST: Final = re.compile(r"(ssh://)?([A-Za-z0-9_][A-Za-z0-9_.+-]*@)?[A-Za-z0-9_:\[][A-Za-z0-9_.:%\[\]-]*")
#: An ssh without a terminal finds a short PATH on the other side; /bin/sh, as the login shell may be any.
_FIND: Final = (
    'if command -v forgather-control >/dev/null; then exec forgather-control "$@"; '
    'else exec python3 -m forgather_control "$@"; fi'
)
#: As sftp sets them: neither forwarding nor command nor terminal that the person's configuration has for this host.
_OPTIONS: Final = ("-T", "-x", "-a", "-oClearAllForwardings=yes", "-oPermitLocalCommand=no", "-oRemoteCommand=none")

#: The bridge is at the job's socket by then.
_CONNECTED: Final = re.compile(re.escape(stdio_proxy.MARK.encode()) + rb"([A-Za-z0-9_][A-Za-z0-9._-]{0,127})\n")
#: Stands before a result, where no bridge says so.
_RESULT: Final = "forgather-control result"
#: Bytes that a shell's start may print before it; a motto is shorter.
_NOISE: Final = 64 * 1024
#: Bytes of stderr that are kept.
_ERRORS: Final = 16 * 1024
#: Bytes of a list; 1,000 jobs with their status are two million.
_LONGEST: Final = 16 * 1024 * 1024

#: Seconds that a login and a Python on the other side may take beyond what a socket may.
_STARTING: Final = 20.0
#: Seconds in which a person may type a passphrase; sshd waits as long (LoginGraceTime).
_TYPING: Final = 120.0
#: Seconds that an ssh has for ending by itself, before it is told to.
_PARTING: Final = 0.5


# What is run...


def check_host(host: str) -> str:
    """``host`` itself: ``[USER@]HOST``, an alias of ssh's configuration, or ``ssh://[USER@]HOST[:PORT]``.

    Raises:
        InvalidParams: it is none, or could be read as an option.
    """
    if len(host) > 255 or _HOST.fullmatch(host) is None:
        raise InvalidParams(f"{ascii(host)[:140]} is no [USER@]HOST")
    return host


def _command(host: str, remote: str, seconds: float | None) -> list[str]:
    """The words to run here. The first value of an option counts, so the person's own stand first."""
    import shlex

    try:
        program = shlex.split(os.environ.get(PROGRAM, "")) or ["ssh"]
    except ValueError as err:
        raise InvalidParams(f"{PROGRAM} cannot be read ({err})") from err
    options = list(_OPTIONS)
    if seconds is not None:
        options.append(f"-oConnectTimeout={max(1, round(seconds))}")
    if not _can_ask():
        options.append("-oBatchMode=yes")
    return [*program, *options, "--", check_host(host), remote]


def _remote(words: list[str]) -> str:
    """The line for the other side's login shell."""
    import shlex

    chosen = os.environ.get(REMOTE)
    if chosen:
        return f"{chosen} {shlex.join(words)}"
    return shlex.join(["/bin/sh", "-c", _FIND, "forgather-control", *words])


def _can_ask() -> bool:
    """Whether ssh could ask a person for a passphrase: on the terminal, or by the program that it has for this."""
    if os.environ.get("SSH_ASKPASS"):
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


# This side...


class Link(socket.socket):
    """A socket whose other end is the standard input and output of an ssh; to close it ends that, too.

    Args:
        host: the other side.
        remote: the line that is run there.
        seconds: for connecting; the login and a person's typing have theirs beside.

    Raises:
        InvalidParams: ``host`` is none.
        FindError: there is no ssh here.
    """

    def __init__(self, host: str, remote: str, seconds: float | None) -> None:
        import subprocess

        self.host = host
        self.deadline = Deadline(None if seconds is None else seconds + (_TYPING if _can_ask() else _STARTING))
        self._ssh: subprocess.Popen[bytes] | None = None
        self._received, self._errors = b"", b""
        command = _command(host, remote, seconds)
        ours, theirs = socket.socketpair()
        super().__init__(fileno=ours.detach())
        try:
            # Its own process group would be in the background: there it could ask nobody for a passphrase.
            pipe = theirs.fileno()
            self._ssh = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.PIPE)
        except OSError as err:
            super().close()
            raise FindError(f"{ascii(command[0])} cannot be run here ({err.strerror}): --ssh needs it") from err
        finally:
            theirs.close()

    def close(self) -> None:
        """Hang up, and end ssh: it sees the end of its input; where that does not do, it is told to."""
        super().close()
        ended, self._ssh = self._ssh, None
        if ended is None or ended.stderr is None:
            return
        with ended.stderr:
            try:
                _end(ended)
            except BaseException:  # border: a second Ctrl-C; nothing is left running for it
                ended.kill()
                ended.wait()
                raise

    def skip_to(self, mark: re.Pattern[bytes]) -> re.Match[bytes]:
        """Read up to the end of ``mark``, and no byte more.

        Raises:
            ControlError: it does not come, and why.
        """
        while len(self._received) < _NOISE:
            if not self._wait():
                raise JobNotAnswering(f"{self.host} does not answer over ssh in time{self._last_words()}")
            # Looked at first, as what follows the mark is the caller's.
            ahead = self.recv(4096, socket.MSG_PEEK)
            found = mark.search(self._received + ahead)
            self._received += self.recv(len(ahead) if found is None else found.end() - len(self._received))
            if found is not None:
                self._received = b""
                return found
            if not ahead:
                raise self._failure()
        raise FindError(f"{self.host} prints without end, and forgather-control's own line does not come")

    def rest(self) -> bytes:
        """All that comes until the end.

        Raises:
            ControlError: the verb failed on the other side, or it does not end.
        """
        while len(self._received) < _LONGEST:
            if not self._wait():
                raise JobNotAnswering(f"{self.host} does not answer over ssh in time{self._last_words()}")
            data = self.recv(65536)
            self._received += data
            if not data and self._code() != 0:
                raise self._failure()
            if not data:
                return self._received
        raise FindError(f"{self.host} answers more than {_LONGEST} bytes")

    def complaints(self) -> list[str]:
        """What came on stderr, line by line."""
        self._read_errors()
        return self._errors.decode("utf-8", "replace").splitlines()

    def lost(self) -> str | None:
        """Why the connection is over, if ssh or the bridge broke off; ``None`` where the job hung up."""
        return None if self._code() == 0 else f"the ssh connection to {self.host} broke off{self._last_words()}"

    def _wait(self) -> bool:
        """Wait for input or its end, stderr being drained meanwhile; false where the deadline passes."""
        assert self._ssh is not None and self._ssh.stderr is not None
        poller = select.poll()
        poller.register(self, select.POLLIN)
        errors = self._ssh.stderr.fileno()
        poller.register(errors, select.POLLIN)
        while True:
            left = self.deadline.left()
            ready = dict(poller.poll(None if left is None else left * 1000 + 1))
            if errors in ready and not self._read_errors():
                poller.unregister(errors)
            if self.fileno() in ready:
                return True
            if self.deadline.passed():
                return False

    def _read_errors(self) -> bool:
        """Whether there may be more, later. Never waits: a ControlMaster in the background keeps the pipe open."""
        if self._ssh is None or self._ssh.stderr is None:
            return False
        pipe = self._ssh.stderr.fileno()
        os.set_blocking(pipe, False)
        while True:
            try:
                data = os.read(pipe, 65536)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._errors = (self._errors + data)[-_ERRORS:]

    def _code(self) -> int | None:
        """The exit code of ssh, which has closed its output; ``None`` if it does not end."""
        import subprocess

        try:
            return None if self._ssh is None else self._ssh.wait(_PARTING * 4)
        except subprocess.TimeoutExpired:
            return None

    def _last_words(self) -> str:
        """The last line of stderr in brackets, safe for a terminal; empty if there is none."""
        lines = [line.strip() for line in self.complaints() if line.strip()]
        return f" ({ascii(lines[-1])[1:-1][:300]})" if lines else ""

    def _failure(self) -> ControlError:
        """Why there is no answer, ssh's output being at its end."""
        code, host = self._code(), self.host
        told = _told(self._received)
        why = self._last_words()
        if told is not None:
            told.message = f"{host}: {told.message}"
            told.args = (told.message,)
            return told
        if code == 127 or (code == 1 and "No module named forgather_control" in why):
            return FindError(
                f"forgather-control is not found on {host}{why}: install it there where a login without a terminal "
                f"finds it, or set {REMOTE} here to its path there"
            )
        if code != 255:
            return FindError(f"forgather-control does not start on {host}{why}", code=code)
        if "Permission denied" in why or "Host key verification failed" in why:
            return NotAuthenticated(f"ssh does not get into {host}{why}")
        return JobNotAnswering(f"{host} cannot be reached over ssh{why}")


def _end(ssh: subprocess.Popen[bytes]) -> None:
    import subprocess

    for tell in (ssh.terminate, ssh.kill):
        try:
            ssh.wait(_PARTING)
            return
        except subprocess.TimeoutExpired:
            tell()
    ssh.wait()


def _told(output: bytes) -> ControlError | None:
    """The error that the other side printed as ``--json`` wants it, as the class that was raised there."""
    start = output.rfind(b'{"error": {"code": ')
    if start < 0:
        return None
    try:
        fault = jsonrpc.parse_json(output[start:])["error"]
    except (ControlError, LookupError, TypeError):
        return None
    return from_wire(fault.get("code"), fault.get("message"), fault.get("data"))


class SshEndpoint(NamedTuple):
    """A job of another host, reached over ssh; printed as ``ssh:HOST``.

    Attributes:
        job: as that host's ``find`` takes it; ``None`` where exactly one job is live there.
    """

    host: str
    job: str | None

    def __str__(self) -> str:
        return f"ssh:{self.host}"

    def connect(self, deadline: Deadline) -> Link:
        """A connected, blocking socket without a timeout.

        Raises:
            NoSuchJob, AmbiguousJob, JobDead, JobNotAnswering: as on the other side; the last, too, where
                that cannot be reached.
            NotAuthenticated: ssh is not let in.
            FindError: no ssh here, no forgather-control there.
        """
        if self.job is not None and not is_job_id(self.job):
            raise NoSuchJob(f"no job can be named {ascii(self.job)[:140]} over ssh: A-Z a-z 0-9 . _ - only")
        words = ["dial-stdio", "--json", "--until-input-ends", *([] if self.job is None else [self.job])]
        link = Link(self.host, _remote(words), deadline.left())
        try:
            link.skip_to(_CONNECTED)
        except BaseException:
            link.close()
            raise
        return link


def list_jobs(host: str, timeout: float) -> tuple[Any, list[str]]:
    """What ``list --json`` prints there, parsed, and its complaints.

    Raises:
        ControlError: it cannot be had, and why.
    """
    # echo is the same in every shell, and so is the semicolon.
    link = Link(host, f"echo {_RESULT}; {_remote(['list', '--json'])}", timeout)
    with link:
        link.skip_to(re.compile(re.escape(_RESULT.encode()) + rb"\n"))
        try:
            rows = jsonrpc.parse_json(link.rest())
        except WireError as err:
            raise InternalError(f"{host} sent no list of jobs") from err
        return rows, link.complaints()
