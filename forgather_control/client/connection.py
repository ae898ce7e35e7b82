"""One connection to a job: call it, wait with a deadline, and say why where no answer comes.

Floor 3: imports clock, commands, endpoint, errors, jobs, jsonrpc and record; psutil only where it has to be
judged why a job hung up. Runs on the caller's thread; a :class:`Client` belongs to one thread at a time.
"""

from __future__ import annotations

import time
from typing import Any, Final

from .. import states
from ..deadline import Deadline
from ..errors import CommandFailed, ControlError, JobDead, JobNotAnswering, NotAuthenticated
from ..jobs import registry
from ..jobs.record import JobRecord, jobs_dir
from ..wire import addresses, builtin, jsonrpc
from ..wire.records import CommandRecord

#: Seconds for a call that waits for nothing but the answer.
CALL_TIMEOUT: Final = 10.0
#: Seconds that a job has for saying that a deadline it was given is over.
_GRACE: Final = 5.0
#: While a wait has no deadline, the job is asked this often (seconds) whether it is still there ...
_ARE_YOU_THERE: Final = 15.0
#: ... and is given up after this many seconds of silence.
_SILENCE: Final = 60.0
#: Seconds that a process which has let go of its sockets may take to be gone (it frees its devices meanwhile).
_DYING: Final = 1.0


def who(record: JobRecord) -> str:
    """A job's process, for a sentence."""
    return f"pid {record.pid} on {record.host}"


def _hung_up(record: JobRecord, fate: str) -> ControlError:
    """Why a connection ended without an answer, as the job's directory and the operating system have it."""
    now, state = _settled(record)
    job, whose = record.job_id, who(record)
    if now is not None and now.owner != record.owner:
        return restarted(now, fate)
    if state == states.JOB_DEAD:
        return JobDead(f"the process of job {job}, {whose}, ended before it answered{fate}", job=job)
    if now is None:
        return JobDead(f"job {job} ended before it answered{fate}", job=job)
    if state == states.JOB_SILENT:
        return JobNotAnswering(f"job {job} hung up before it answered, though {whose} still runs{fate}", job=job)
    return JobDead(f"job {job} ({whose}) went away before it answered{fate}", job=job)


def _settled(record: JobRecord) -> tuple[JobRecord | None, states.JobState]:
    """The record that now has the job's name, and the state of ``record``'s process, once it had time to die."""
    deadline = Deadline(_DYING)
    while True:
        try:
            now = registry.named(jobs_dir(), record.job_id)
        except ControlError:
            now = record  # what cannot be read names nobody else
        state = registry.judge(record)
        if state != states.JOB_SILENT or now is None or now.owner != record.owner or deadline.passed():
            return now, state
        time.sleep(0.02)


def restarted(now: JobRecord, fate: str) -> JobDead:
    """The job's name belongs to another process by now."""
    count = now.launch and (now.launch.restart_count or now.launch.slurm_restart_count)
    which = f", restart {count}" if count else ""
    text = f"job {now.job_id} was restarted as {who(now)}{which}, before it answered{fate}; ask again"
    return JobDead(text, job=now.job_id, pid=now.pid, host=now.host)


# Calling...


class Client:
    """One connection to one job.

    Args:
        where: the endpoint.
        name: what to call the job in errors.
        timeout: seconds for connecting, and for each call that waits for nothing.
        record: what it published, if known: then a connection that ends can be explained.
        token: to be shown first, where a port wants one.

    Raises:
        JobDead, JobNotAnswering: nobody listens, or nobody takes the connection.
        NotAuthenticated: the token or the certificate is not the job's.
    """

    def __init__(
        self,
        where: addresses.Endpoint,
        name: str,
        timeout: float = CALL_TIMEOUT,
        record: JobRecord | None = None,
        token: str | None = None,
    ) -> None:
        self._name, self._timeout, self._record = name, timeout, record
        self._fate = ""
        self._sock = where.connect(Deadline(timeout))
        self._received = bytearray()
        self._last_id = 0
        if token is not None:
            try:
                self._show(token)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _show(self, token: str) -> None:
        """Show the token, and make sure that the job is the one that was meant."""
        try:
            found = self.call("authenticate", token=token)
        except JobDead as err:
            raise JobDead(f"{self._name} hung up on being shown a token: is this the job's port?") from err
        job_id = found.get("job_id") if isinstance(found, dict) else None
        if self._record is not None and job_id != self._record.job_id:
            raise NotAuthenticated(f"another job answers at the port of {self._record.job_id}: {ascii(job_id)[:140]}")

    def close(self) -> None:
        """Hang up. A command that was accepted goes on."""
        self._sock.close()

    def call(self, method: str, /, **params: Any) -> Any:
        """The result of one call.

        With ``wait="applied"`` or ``"finished"`` it lasts until then, or for ``timeout`` seconds.

        Raises:
            ControlError: the error that the job answered, as its class.
            JobDead: the job went away meanwhile, or was restarted as another process.
            JobNotAnswering: it does not answer, or hung up though it lives.
        """
        return self.call_raw(method, params)

    def call_raw(self, method: str, params: dict[str, Any] | list[Any]) -> Any:
        """As :meth:`call`, with parameters by name or by position as they stand on the wire."""
        self._last_id += 1
        known = builtin.BUILTIN.get(method)
        self._fate = f"; whether its {method} was carried out is not known" if known and known.is_command else ""
        seconds = self._seconds(method, params)
        self._send(jsonrpc.request(method, params, self._last_id))
        reply = self._reply(self._last_id, Deadline(seconds), patient=seconds is None)
        if reply.error is not None:
            raise reply.error
        return reply.result

    def _seconds(self, method: str, params: dict[str, Any] | list[Any]) -> float | None:
        known = builtin.BUILTIN.get(method)
        given = known.by_name(params) if known is not None and known.is_command else {}
        if given.get("wait", "accepted") == "accepted":
            return self._timeout
        asked = given.get("timeout")
        return asked + _GRACE if isinstance(asked, (int, float)) else None

    def _send(self, line: bytes) -> None:
        try:
            self._sock.settimeout(self._timeout)
            self._sock.sendall(line)
        except TimeoutError as err:
            raise JobNotAnswering(f"job {self._name} does not read", job=self._name) from err
        except OSError as err:
            raise self._gone() from err

    def _reply(self, id_: int, deadline: Deadline, patient: bool) -> jsonrpc.Reply:
        """The reply to ``id_``; others, to pings of ours, only prove that somebody is there."""
        silence = Deadline(_SILENCE)
        while True:
            line = self._line(Deadline(_ARE_YOU_THERE) if patient else deadline)
            if line is not None:
                silence = Deadline(_SILENCE)
                reply = jsonrpc.parse_reply(line)
                if reply.id == id_ or (reply.id is None and reply.error is not None):
                    return reply
            elif not patient or silence.passed():
                raise JobNotAnswering(f"job {self._name} does not answer", job=self._name)
            else:
                self._send(jsonrpc.request("ping", {}, None))

    def _line(self, deadline: Deadline) -> bytes | None:
        while (end := self._received.find(b"\n")) < 0:
            left = deadline.left()
            if left == 0.0:
                return None
            try:
                self._sock.settimeout(left)
                data = self._sock.recv(65536)
            except TimeoutError:
                return None
            except OSError as err:
                raise self._gone() from err
            if not data:
                raise self._gone()
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def _gone(self) -> ControlError:
        if self._record is not None:
            return _hung_up(self._record, self._fate)
        return JobDead(f"job {self._name} went away before it answered{self._fate}", job=self._name)

    def command(self, name: str, **params: Any) -> CommandRecord:
        """Give a command and return its record; parameters as on the wire, ``None`` left out.

        Raises:
            CommandFailed: it failed, or was cancelled, while this call waited.
            DeadlinePassed: ``timeout`` passed first; the command goes on.
        """
        given = {name: value for name, value in params.items() if value is not None}
        record = CommandRecord.from_json(self.call(name, **given))
        if record.trouble is not None:
            raise CommandFailed(record.trouble, **record.to_json())
        return record
