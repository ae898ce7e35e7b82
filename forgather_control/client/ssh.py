"""Reach a job over ssh, without any open port: this side runs ssh, the other side copies to the job's socket.

It works as ``docker system dial-stdio`` does: on the other side ``forgather-control dial-stdio JOB`` copies between
its standard streams and the socket. Whatever the other side's shell prints at its start is skipped, up to a line
of ours. Host and job are checked before they become arguments: a host that begins with a dash would be an
option of ssh.
"""

from __future__ import annotations

import os
import re
import select
import socket
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

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
from . import limits
from .stdio_proxy import MARK
from .transport import SocketTransport

if TYPE_CHECKING:  # imported when ssh is run
    pass

#: Environment variable: the ssh to run and its options (``ssh -F FILE``, ``ssh -J JUMPHOST``), split as a shell would.
PROGRAM: Final = "FORGATHER_CONTROL_SSH"
#: Environment variable: what to run on the other side, read by its shell, for example ``~/venv/bin/forgather-control``.
REMOTE: Final = "FORGATHER_CONTROL_REMOTE"

#: No character that a shell could act on, here or in a ProxyCommand (CVE-2023-51385).
_HOST: Final = re.compile(r"(ssh://)?([A-Za-z0-9_][A-Za-z0-9_.+-]*@)?[A-Za-z0-9_:\[][A-Za-z0-9_.:%\[\]-]*")
#: An ssh without a terminal gets a short PATH on the other side; /bin/sh, because the login shell may be any.
_FIND: Final = (
    'if command -v forgather-control >/dev/null; then exec forgather-control "$@"; '
    'else exec python3 -m forgather_control "$@"; fi'
)
#: As sftp sets them: no forwarding, command or terminal that the user's configuration has for this host.
_OPTIONS: Final = ("-T", "-x", "-a", "-oClearAllForwardings=yes", "-oPermitLocalCommand=no", "-oRemoteCommand=none")

#: Printed by the other side once it is connected to the job's socket.
_CONNECTED: Final = re.compile(re.escape(MARK.encode()) + rb"([A-Za-z0-9_][A-Za-z0-9._-]{0,127})\n")
#: Printed before a list of jobs.
_RESULT: Final = "forgather-control result"


# The command line of ssh...


def check_host(host: str) -> str:
    """Return ``host``: ``[USER@]HOST``, an alias of ssh's configuration, or ``ssh://[USER@]HOST[:PORT]``.

    Raises:
        InvalidParams: it is none, or could be read as an option.
    """
    if len(host) > 255 or _HOST.fullmatch(host) is None:
        raise InvalidParams(f"{ascii(host)[:140]} is no [USER@]HOST")
    return host


def _command(host: str, remote: str, seconds: float | None) -> list[str]:
    """Return the words to run here. ssh takes the first value of an option, so the user's own stand first."""
    import shlex

    try:
        program = shlex.split(os.environ.get(PROGRAM, "")) or ["ssh"]
    except ValueError as err:
        raise InvalidParams(f"{PROGRAM} cannot be split into words ({err})") from err
    options = list(_OPTIONS)
    if seconds is not None:
        options.append(f"-oConnectTimeout={max(1, round(seconds))}")
    if not _can_ask():
        options.append("-oBatchMode=yes")
    return [*program, *options, "--", check_host(host), remote]


def _remote(words: list[str]) -> str:
    """Return the line for the other side's login shell."""
    import shlex

    chosen = os.environ.get(REMOTE)
    if chosen:
        return f"{chosen} {shlex.join(words)}"
    return shlex.join(["/bin/sh", "-c", _FIND, "forgather-control", *words])


def _can_ask() -> bool:
    """Whether ssh could ask for a passphrase: on the terminal, or by the program that it has for this."""
    if os.environ.get("SSH_ASKPASS"):
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


# The ssh process...


class SshProcess:
    """An ssh whose standard input and output are the other end of ``sock``.

    Args:
        remote: the line that is run on the other side.
        seconds: for connecting; the login and typing a passphrase have their own time on top.

    Raises:
        InvalidParams: ``host`` is none.
        FindError: ssh cannot be run here.
    """

    def __init__(self, host: str, remote: str, seconds: float | None) -> None:
        import subprocess

        self.host = host
        self._deadline = Deadline(
            None if seconds is None else seconds + (limits.SSH_TYPING if _can_ask() else limits.SSH_START)
        )
        self._received, self._errors = b"", b""
        command = _command(host, remote, seconds)
        self.sock, theirs = socket.socketpair()
        try:
            # In this process group: in a group of its own it would be in the background, and could not ask for
            # a passphrase on the terminal.
            pipe = theirs.fileno()
            self._ssh = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.PIPE)
        except OSError as err:
            self.sock.close()
            text = f"{ascii(command[0])} cannot be run here ({err.strerror}). --ssh needs it; {PROGRAM} names another"
            raise FindError(text) from err
        finally:
            theirs.close()

    def close(self) -> None:
        """Close the connection and end ssh, which sees the end of its input; if it stays, it gets a signal."""
        import subprocess

        self.sock.close()
        assert self._ssh.stderr is not None
        if self._ssh.stderr.closed:
            return
        with self._ssh.stderr:
            try:
                for signal_it in (self._ssh.terminate, self._ssh.kill):
                    try:
                        self._ssh.wait(limits.SSH_EXIT)
                        return
                    except subprocess.TimeoutExpired:
                        signal_it()
                self._ssh.wait()
            except BaseException:  # a second Ctrl-C: leave nothing running
                self._ssh.kill()
                self._ssh.wait()
                raise

    def skip_to(self, mark: re.Pattern[bytes]) -> re.Match[bytes]:
        """Read up to the end of ``mark``, and no byte more.

        Raises:
            ControlError: why it does not come.
        """
        while len(self._received) < limits.SSH_NOISE:
            self._wait()
            # Peek first: what follows the mark belongs to the transport.
            ahead = self.sock.recv(4096, socket.MSG_PEEK)
            found = mark.search(self._received + ahead)
            self._received += self.sock.recv(len(ahead) if found is None else found.end() - len(self._received))
            if found is not None:
                self._received = b""
                return found
            if not ahead:
                raise self._failure()
        raise FindError(f"{self.host} prints without end, and the line of forgather-control does not come")

    def rest(self) -> bytes:
        """Read everything up to the end.

        Raises:
            ControlError: the verb failed on the other side, or does not end.
        """
        while len(self._received) < limits.SSH_LIST:
            self._wait()
            data = self.sock.recv(65536)
            self._received += data
            if not data and self._exit_code() != 0:
                raise self._failure()
            if not data:
                return self._received
        raise FindError(f"{self.host} answers more than {limits.SSH_LIST} bytes")

    def complaints(self) -> list[str]:
        """Return what came on stderr, line by line."""
        self._read_errors()
        return self._errors.decode("utf-8", "replace").splitlines()

    def why_lost(self) -> str | None:
        """Return why the connection ended, if ssh or the proxy there broke off; ``None`` if the job closed it."""
        return None if self._exit_code() == 0 else f"The ssh connection to {self.host} broke off{self._last_words()}"

    def _wait(self) -> None:
        """Wait for output or its end, and drain stderr meanwhile.

        Raises:
            JobNotAnswering: the deadline passed.
        """
        assert self._ssh.stderr is not None
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        errors = self._ssh.stderr.fileno()
        poller.register(errors, select.POLLIN)
        while True:
            left = self._deadline.left()
            ready = dict(poller.poll(None if left is None else left * 1000 + 1))
            if errors in ready and not self._read_errors():
                poller.unregister(errors)
            if self.sock.fileno() in ready:
                return
            if self._deadline.passed():
                raise JobNotAnswering(f"{self.host} does not answer over ssh in time{self._last_words()}")

    def _read_errors(self) -> bool:
        """Whether more may come later. Never blocks: a ControlMaster in the background keeps the pipe open."""
        assert self._ssh.stderr is not None
        if self._ssh.stderr.closed:
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
            self._errors = (self._errors + data)[-limits.SSH_ERRORS :]

    def _exit_code(self) -> int | None:
        """Return the exit code of ssh, which has closed its output; ``None`` if it does not exit."""
        import subprocess

        try:
            code: int = self._ssh.wait(limits.SSH_EXIT * 4)
            return code
        except subprocess.TimeoutExpired:
            return None

    def _last_words(self) -> str:
        """Return the last line of stderr in brackets, safe for a terminal; empty if there is none."""
        lines = [line.strip() for line in self.complaints() if line.strip()]
        return f" ({ascii(lines[-1])[1:-1][:300]})" if lines else ""

    def _failure(self) -> ControlError:
        """Return why there is no answer, after ssh closed its output."""
        code, host = self._exit_code(), self.host
        sent = _sent_error(self._received)
        why = self._last_words()
        if sent is not None:
            sent.message = f"{host}: {sent.message}"
            sent.args = (sent.message,)
            return sent
        if code == 127 or (code == 1 and "No module named forgather_control" in why):
            return FindError(
                f"forgather-control is not found on {host}{why}: install it there where a login without a terminal "
                f"finds it, or set {REMOTE} here to its path there"
            )
        if code != 255:
            return FindError(f"forgather-control does not start on {host}{why}", code=code)
        if "Permission denied" in why or "Host key verification failed" in why:
            return NotAuthenticated(f"ssh cannot log in to {host}{why}")
        return JobNotAnswering(f"{host} cannot be reached over ssh{why}")


def _sent_error(output: bytes) -> ControlError | None:
    """Return the error that the other side printed for ``--json``, as the class that was raised there."""
    start = output.rfind(b'{"error": {"code": ')
    if start < 0:
        return None
    try:
        fault = jsonrpc.parse_json(output[start:])["error"]
        return from_wire(fault.get("code"), fault.get("message"), fault.get("data"))
    except (ControlError, LookupError, TypeError, AttributeError):
        return None


# Jobs of the other side...


class SshTransport(SocketTransport):
    """Lines to a job of another host; the job's id there is ``job_id``.

    Args:
        job: as :func:`target.find` takes it, resolved on that host; ``None`` where exactly one job is live there.

    Raises:
        NoSuchJob, AmbiguousJob, JobDead, JobNotAnswering: as on the other side; the last one also where that
            host cannot be reached.
        NotAuthenticated: ssh cannot log in.
        FindError: no ssh here, no forgather-control there.
    """

    def __init__(self, host: str, job: str | None, deadline: Deadline) -> None:
        if job is not None and not is_job_id(job):
            raise NoSuchJob(f"No job can be named {ascii(job)[:140]} over ssh: A-Z a-z 0-9 . _ - only")
        words = ["dial-stdio", "--json", "--until-input-ends", *([] if job is None else [job])]
        self._ssh = SshProcess(host, _remote(words), deadline.left())
        try:
            job_id = self._ssh.skip_to(_CONNECTED).group(1).decode()
        except BaseException:
            self._ssh.close()
            raise
        super().__init__(self._ssh.sock, job_id)

    def why_lost(self) -> str | None:
        return self._ssh.why_lost()

    def close(self) -> None:
        self._ssh.close()


def list_jobs(host: str, timeout: float) -> tuple[Any, list[str]]:
    """Return what ``list --json`` prints on that host, parsed, and its complaints.

    Raises:
        ControlError: why there is no list.
    """
    # echo and the semicolon mean the same to every shell.
    with closing(SshProcess(host, f"echo {_RESULT}; {_remote(['list', '--json'])}", timeout)) as ssh:
        ssh.skip_to(re.compile(re.escape(_RESULT.encode()) + rb"\n"))
        try:
            rows = jsonrpc.parse_json(ssh.rest())
        except WireError as err:
            raise InternalError(f"{host} sent no list of jobs") from err
        return rows, ssh.complaints()
