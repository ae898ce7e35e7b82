"""Reach a job over ssh, without any open port: this side runs ssh, the other side copies to the job's socket.

It works as ``docker system dial-stdio`` does: on the other side ``forgather-control dial-stdio JOB`` copies between
its standard streams and the socket. Whatever the other side's shell prints at its start is skipped, up to a line
of ours. Host and job are checked before they become arguments: a host that begins with a dash would be an
option of ssh.
"""

import os
import re
import shlex
import socket
import subprocess
import threading
from contextlib import closing, suppress
from typing import IO, Any, Final

from ..deadline import Deadline
from ..errors import ControlError, FindError, InvalidParams, JobNotAnswering, NoSuchJob, NotAuthenticated
from ..jobs.record import is_job_id
from ..wire import jsonrpc
from . import limits
from .stdio_proxy import MARK
from .transport import SocketTransport

#: Environment variable: the ssh to run and its options (``ssh -F FILE``, ``ssh -J JUMPHOST``), split as a shell would.
PROGRAM: Final = "FORGATHER_CONTROL_SSH"
#: Environment variable: what to run on the other side, read by its shell, for example ``~/venv/bin/forgather-control``.
REMOTE: Final = "FORGATHER_CONTROL_REMOTE"

#: No character that a shell could act on, here or in a ProxyCommand (CVE-2023-51385).
_HOST: Final = re.compile(r"(ssh://)?([A-Za-z0-9_][A-Za-z0-9_.+-]*@)?[A-Za-z0-9_:\[][A-Za-z0-9_.:%\[\]-]*")
#: An ssh without a terminal gets a short PATH on the other side; /bin/sh, because the login shell may be any.
_FIND: Final = 'c=forgather-control; command -v $c >/dev/null && exec $c "$@"; exec python3 -m forgather_control "$@"'
#: As sftp sets them: no forwarding, command or terminal that the user's configuration has for this host.
_OPTIONS: Final = ("-T", "-x", "-a", "-oClearAllForwardings=yes", "-oPermitLocalCommand=no", "-oRemoteCommand=none")

#: Printed by the other side once it is connected to the job's socket.
_CONNECTED: Final = re.escape(MARK.encode()) + rb"([A-Za-z0-9_][A-Za-z0-9._-]{0,127})\n"
#: Printed before what a verb prints.
_RESULT: Final = "forgather-control result"


def check_host(host: str) -> str:
    """Return ``host``: ``[USER@]HOST``, an alias of ssh's configuration, or ``ssh://[USER@]HOST[:PORT]``.

    InvalidParams: it is none, or could be read as an option.
    """
    if len(host) > 255 or _HOST.fullmatch(host) is None:
        raise InvalidParams(f"{ascii(host)[:140]} is no [USER@]HOST")
    return host


def _command(host: str, remote: str, seconds: float | None) -> list[str]:
    """Return the words to run here. ssh takes the first value of an option, so the user's own stand first."""
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


def _remote(*words: str) -> str:
    """Return the line for the other side's login shell."""
    chosen = os.environ.get(REMOTE) or shlex.join(["/bin/sh", "-c", _FIND, "forgather-control"])
    return f"{chosen} {shlex.join(words)}"


def _can_ask() -> bool:
    """Whether ssh could ask for a passphrase: on the terminal, or by the program that it has for this."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return bool(os.environ.get("SSH_ASKPASS"))
    return True


class SshTransport(SocketTransport):
    """The standard input and output of a program that ssh runs on another host.

    Args:
        remote: the line that is run there.
        seconds: for connecting; the login and typing a passphrase have their own time on top.
    """

    def __init__(self, host: str, remote: str, seconds: float | None) -> None:
        self._host, self._errors = host, b""
        extra = limits.SSH_TYPING if _can_ask() else limits.SSH_START
        self._deadline = Deadline(None if seconds is None else seconds + extra)
        command = _command(host, remote, seconds)
        ours, theirs = socket.socketpair()
        super().__init__(ours)
        try:
            # In this process group: in a group of its own it would be in the background, and could not ask for
            # a passphrase on the terminal.
            pipe = theirs.fileno()
            self._ssh = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.PIPE)
        except OSError as err:
            ours.close()
            text = f"{ascii(command[0])} cannot be run here ({err.strerror}). --ssh needs it; {PROGRAM} names another"
            raise FindError(text) from err
        finally:
            theirs.close()
        self._error_reader = threading.Thread(target=self._read_errors, args=(self._ssh.stderr,), daemon=True)
        self._error_reader.start()

    def close(self) -> None:
        """Close the connection and end ssh, which sees the end of its input; if it stays, it gets a signal."""
        super().close()
        try:
            if self._exit_code(limits.SSH_EXIT) is None:
                self._ssh.terminate()
                self._exit_code(limits.SSH_EXIT)
        finally:  # after a second Ctrl-C, too: leave nothing running
            self._ssh.kill()
            self._ssh.wait()
        self._error_reader.join(limits.SSH_EXIT)

    def skip_to(self, mark: bytes) -> re.Match[bytes]:
        """Read up to the end of what matches ``mark``, or raise why it does not come."""
        while (found := re.search(mark, bytes(self._received))) is None:
            excess = "prints without end, and the line of forgather-control does not come"
            if not self._read_more(limits.SSH_NOISE, excess):
                raise self._failure()
        del self._received[: found.end()]
        return found

    def read_all(self) -> bytes:
        """Read everything up to the end, or raise why the verb failed on the other side."""
        while self._read_more(limits.SSH_LIST, f"answers more than {limits.SSH_LIST} bytes"):
            pass
        if self._exit_code() != 0:
            raise self._failure()
        return bytes(self._received)

    def _read_more(self, limit: int, excess: str) -> bool:
        """Receive some output; whether it has not ended."""
        if len(self._received) >= limit:
            raise FindError(f"{self._host} {excess}")
        try:
            self.sock.settimeout(self._deadline.left())
            data = self.sock.recv(65536)
        except (TimeoutError, BlockingIOError) as err:
            raise JobNotAnswering(f"{self._host} does not answer over ssh in time{self._last_words()}") from err
        self._received += data
        return bool(data)

    def why_lost(self) -> str | None:
        return None if self._exit_code() == 0 else f"The ssh connection to {self._host} broke off{self._last_words()}"

    def _read_errors(self, pipe: IO[bytes]) -> None:
        """Keep the end of stderr. On a thread, because a ControlMaster in the background keeps the pipe open."""
        with pipe:
            while data := os.read(pipe.fileno(), 65536):
                self._errors = (self._errors + data)[-limits.SSH_ERRORS :]

    def _exit_code(self, seconds: float = 4 * limits.SSH_EXIT) -> int | None:
        """Return the exit code of ssh, which has closed its output; ``None`` if it does not exit."""
        with suppress(subprocess.TimeoutExpired):
            self._ssh.wait(seconds)
        return self._ssh.poll()

    def complaints(self) -> list[str]:
        """Return what came on stderr, line by line."""
        self._error_reader.join(0.0 if self._ssh.poll() is None else limits.SSH_EXIT)
        return self._errors.decode("utf-8", "replace").splitlines()

    def _last_words(self) -> str:
        """Return the last line of stderr in brackets, safe for a terminal; empty if there is none."""
        lines = [line.strip() for line in self.complaints() if line.strip()]
        return f" ({ascii(lines[-1])[1:-1][:300]})" if lines else ""

    def _failure(self) -> ControlError:
        """Return why there is no answer, after ssh closed its output."""
        code, host, why = self._exit_code(), self._host, self._last_words()
        sent = _sent_error(bytes(self._received))
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
    with suppress(ControlError):
        return jsonrpc.parse_reply(b'{"jsonrpc":"2.0",' + output[start + 1 :]).error if start >= 0 else None
    return None


def connect(host: str, job: str | None, deadline: Deadline) -> SshTransport:
    """Return a connection to a job, which that host finds as :func:`target.find` does; its errors come from there.

    NotAuthenticated: ssh cannot log in. FindError: no ssh here, no forgather-control there.
    """
    if job is not None and not is_job_id(job):
        raise NoSuchJob(f"No job can be named {ascii(job)[:140]} over ssh: A-Z a-z 0-9 . _ - only")
    words = ["dial-stdio", "--json", "--until-input-ends", *([] if job is None else [job])]
    transport = SshTransport(host, _remote(*words), deadline.left())
    try:
        transport.job_id = transport.skip_to(_CONNECTED)[1].decode()
        return transport
    except BaseException:
        transport.close()
        raise


def read(host: str, timeout: float, *words: str) -> tuple[bytes, list[str]]:
    """Return what a verb prints on that host, and its complaints; an error there is raised here.

    Args:
        words: the verb and its arguments, with ``--json``, so that errors keep their class.
    """
    # echo and the semicolon mean the same to every shell.
    with closing(SshTransport(host, f"echo {_RESULT}; {_remote(*words)}", timeout)) as ssh:
        _, _, text = ssh.read_all().partition(f"{_RESULT}\n".encode())
        return text, ssh.complaints()


def list_jobs(host: str, timeout: float, *words: str) -> tuple[Any, list[str]]:
    """Return what ``list --json`` prints on that host, parsed (``None`` if it is no JSON), and its complaints.

    Args:
        words: options for the list there.
    """
    text, complaints = read(host, timeout, "list", "--json", *words)
    try:
        return jsonrpc.parse_json(text), complaints
    except ControlError:
        return None, complaints
