"""Find a job, call it, wait with a deadline, raise. What the CLI and Python programs use.

Floor 4: imports errors, clock, jsonrpc, commands, endpoint, record and jobs; never torch, and
psutil only where a silent job is judged. Runs on the caller's thread; a :class:`Client` belongs to
one thread at a time.
"""

from __future__ import annotations

import time
from typing import Any, Final

from . import commands, endpoint, jobs, jsonrpc
from .clock import Deadline
from .commands import CommandRecord
from .errors import (
    AmbiguousJob,
    CommandFailed,
    ControlError,
    JobDead,
    JobNotAnswering,
    NoSuchJob,
)
from .jobs import Job
from .record import JobRecord, is_job_id, jobs_dir, read_record

#: Seconds for a call that waits for nothing but the answer.
CALL_TIMEOUT: Final = 10.0
#: Seconds for all answers to ``list_jobs`` together.
LIST_TIMEOUT: Final = 2.0
#: Seconds that a job has for saying that a deadline it was given is over.
_GRACE: Final = 5.0
#: While a wait has no deadline, the job is asked this often (seconds) whether it is still there ...
_ARE_YOU_THERE: Final = 15.0
#: ... and is given up after this many seconds of silence.
_SILENCE: Final = 60.0
#: Seconds that a process which has let go of its sockets may take to be gone (it frees its devices meanwhile).
_DYING: Final = 1.0


# Finding...


def list_jobs(timeout: float = LIST_TIMEOUT) -> list[Job]:
    """All jobs in the jobs directory, newest first: live, silent, dead and foreign ones (``job.state``).

    Args:
        timeout: seconds to wait for all their answers together.

    Raises:
        JobsDirUnusable: the directory cannot be read.
    """
    return jobs.discover(jobs_dir(), timeout)[0]


def find(job: str | None = None) -> JobRecord:
    """The record of one job.

    Args:
        job: its id; what SLURM or torchrun calls it (``123``, ``123_4``, the run id); a prefix that
            no other id has; or ``None`` where exactly one job is live.

    Raises:
        NoSuchJob: none fits.
        AmbiguousJob: several fit.
    """
    if job is None:
        return _only_live()
    root = jobs_dir()
    record = _exact(root, job)
    if record is not None:
        return record
    records = jobs.scan(root)[0] if job else []
    launched = _latest([record for record in records if record.launch is not None and job in record.launch.names])
    fits = [record for record in records if record in launched or record.job_id.startswith(job)]
    if not fits:
        raise NoSuchJob(f"no job {ascii(job)[:140]} in {root}; forgather control list shows what is there", job=job)
    return _only(fits, f"{ascii(job)[:140]} fits several jobs")


def _latest(records: list[JobRecord]) -> list[JobRecord]:
    """Without those that their launcher has begun anew since: they are over, whatever they left."""
    launches = [record.launch for record in records if record.launch is not None]
    return [
        record
        for record in records
        if record.launch is not None and not any(launch.follows(record.launch) for launch in launches)
    ]


def _exact(root: str, job: str) -> JobRecord | None:
    try:
        return read_record(root, job) if is_job_id(job) else None
    except ValueError as err:
        raise NoSuchJob(f"the record of job {job} in {root} cannot be read: {err}", job=job) from err


def _only_live() -> JobRecord:
    root = jobs_dir()
    records = jobs.scan(root)[0]
    answers = jobs.ask(records, "ping", Deadline(LIST_TIMEOUT))
    live = [record for record in records if record.job_id in answers]
    if not live:
        raise NoSuchJob(f"no live job in {root}; forgather control list shows what is there")
    return _only(live, "several jobs are live")


def _only(records: list[JobRecord], problem: str) -> JobRecord:
    if len(records) == 1:
        return records[0]
    names = [record.job_id for record in records]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise AmbiguousJob(f"{problem}; name one of {shown}", candidates=names)


def connect(job: str | None = None, timeout: float = CALL_TIMEOUT) -> Client:
    """A connection to a job, to be closed (``with connect(...) as job``).

    Args:
        job: as in :func:`find`.
        timeout: seconds for connecting, and for each call that waits for nothing.

    Raises:
        NoSuchJob, AmbiguousJob: as in :func:`find`.
        JobDead: its process is gone.
        JobNotAnswering: it lives (or is on another host) and cannot be reached.
    """
    record = find(job)
    if record.socket is None:
        raise JobNotAnswering(f"job {record.job_id} offers no socket", job=record.job_id)
    where = endpoint.UnixEndpoint(record.socket)
    try:
        return Client(where, record.job_id, timeout, record)
    except JobDead as err:
        raise _unreachable(record) from err


def _unreachable(record: JobRecord) -> ControlError:
    now = _exact(jobs_dir(), record.job_id)
    if now is None:
        return NoSuchJob(f"job {record.job_id} has just ended", job=record.job_id)
    if now.owner != record.owner:
        return _restarted(now, "")
    who = _who(record)
    state = jobs.judge(record)
    if state == "dead":
        return JobDead(f"job {record.job_id} is dead: {who} is gone; forgather control cleanup removes it")
    if state == "foreign":
        return JobNotAnswering(f"job {record.job_id} runs on another host ({who}) and cannot be reached from here")
    return JobNotAnswering(f"job {record.job_id} lives ({who}), but nobody listens at its socket")


def _who(record: JobRecord) -> str:
    return f"pid {record.pid} on {record.host}"


def _hung_up(record: JobRecord, fate: str) -> ControlError:
    """Why a connection ended without an answer, as the job's directory and the operating system have it."""
    now, state = _settled(record)
    job, who = record.job_id, _who(record)
    if now is not None and now.owner != record.owner:
        return _restarted(now, fate)
    if state == "dead":
        return JobDead(f"the process of job {job}, {who}, ended before it answered{fate}", job=job)
    if now is None:
        return JobDead(f"job {job} ended before it answered{fate}", job=job)
    if state == "silent":
        return JobNotAnswering(f"job {job} hung up before it answered, though {who} still runs{fate}", job=job)
    return JobDead(f"job {job} ({who}) went away before it answered{fate}", job=job)


def _settled(record: JobRecord) -> tuple[JobRecord | None, jobs.State]:
    """The record that now has the job's name, and the state of ``record``'s process, once it had time to die."""
    deadline = Deadline(_DYING)
    while True:
        try:
            now = _exact(jobs_dir(), record.job_id)
        except ControlError:
            now = record  # what cannot be read names nobody else
        state = jobs.judge(record)
        if state != "silent" or now is None or now.owner != record.owner or deadline.passed():
            return now, state
        time.sleep(0.02)


def _restarted(now: JobRecord, fate: str) -> JobDead:
    count = now.launch and (now.launch.restart_count or now.launch.slurm_restart_count)
    which = f", restart {count}" if count else ""
    text = f"job {now.job_id} was restarted as {_who(now)}{which}, before it answered{fate}; ask again"
    return JobDead(text, job=now.job_id, pid=now.pid, host=now.host)


# Calling...


class Client:
    """One connection to one job.

    Args:
        where: the endpoint.
        name: what to call the job in errors.
        timeout: seconds for connecting, and for each call that waits for nothing.
        record: what it published, if known: then a connection that ends can be explained.

    Raises:
        JobDead, JobNotAnswering: nobody listens, or nobody takes the connection.
    """

    def __init__(
        self,
        where: endpoint.UnixEndpoint,
        name: str,
        timeout: float = CALL_TIMEOUT,
        record: JobRecord | None = None,
    ) -> None:
        self._name, self._timeout, self._record = name, timeout, record
        self._fate = ""
        self._sock = where.connect(Deadline(timeout))
        self._received = bytearray()
        self._last_id = 0

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
        known = commands.TABLE.get(method)
        self._fate = f"; whether its {method} was carried out is not known" if known and known.is_command else ""
        seconds = self._seconds(method, params)
        self._send(jsonrpc.request(method, params, self._last_id))
        reply = self._reply(self._last_id, Deadline(seconds), patient=seconds is None)
        if reply.error is not None:
            raise reply.error
        return reply.result

    def _seconds(self, method: str, params: dict[str, Any] | list[Any]) -> float | None:
        known = commands.TABLE.get(method)
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


# The Python API: one connection a call...


def get_job_status(job: str | None = None) -> dict[str, Any]:
    """What the job answers to ``status``; see the README for its members.

    Raises:
        FindError: no such job, or nobody answers.
    """
    with connect(job) as client:
        status: dict[str, Any] = client.call("status")
        return status


def get_command(job: str | None, command_id: str) -> CommandRecord:
    """The record of a command.

    Raises:
        CommandNotFound: the job has none of this id (any more).
    """
    with connect(job) as client:
        return CommandRecord.from_json(client.call("get_command", command_id=command_id))


def cancel_command(job: str | None, command_id: str) -> CommandRecord:
    """Take back a command that is not applied yet.

    Raises:
        NotCancellable: it is applied already, or over.
    """
    with connect(job) as client:
        return CommandRecord.from_json(client.call("cancel_command", command_id=command_id))


def save_checkpoint(
    job: str | None = None, *, wait: str = "accepted", timeout: float | None = None, command_id: str | None = None
) -> CommandRecord:
    """Save a checkpoint now; with ``wait="finished"``, ``record.result["path"]`` is where it is.

    Args:
        job: as in :func:`find`.
        wait: return once it is ``"accepted"``, ``"applied"`` by every rank, or ``"finished"``.
        timeout: seconds to wait; ``None`` waits as long as the job lives.
        command_id: an id of your own: the same id twice is the same command.

    Raises:
        CommandFailed: it failed, or was cancelled, while this call waited.
        DeadlinePassed: ``timeout`` passed first; the command goes on.
        FindError: no such job, or nobody answers.
    """
    return _give(job, "save_checkpoint", wait, timeout, command_id)


def graceful_stop(
    job: str | None = None, *, wait: str = "accepted", timeout: float | None = None, command_id: str | None = None
) -> CommandRecord:
    """Finish the current step and end. Arguments and errors as in :func:`save_checkpoint`."""
    return _give(job, "graceful_stop", wait, timeout, command_id)


def save_and_stop(
    job: str | None = None, *, wait: str = "accepted", timeout: float | None = None, command_id: str | None = None
) -> CommandRecord:
    """Save a checkpoint, then end. Arguments and errors as in :func:`save_checkpoint`."""
    return _give(job, "save_and_stop", wait, timeout, command_id)


def abort(
    job: str | None = None, *, wait: str = "accepted", timeout: float | None = None, command_id: str | None = None
) -> CommandRecord:
    """End at once without saving. Arguments and errors as in :func:`save_checkpoint`."""
    return _give(job, "abort", wait, timeout, command_id)


def _give(job: str | None, name: str, wait: str, timeout: float | None, command_id: str | None) -> CommandRecord:
    with connect(job) as client:
        return client.command(name, wait=wait, timeout=timeout, command_id=command_id)


def cleanup(found: list[Job] | None = None) -> list[str]:
    """Remove what dead jobs of this host left, and return their ids.

    A live job, a silent one and one of another host are never touched: each is judged once more.

    Args:
        found: what :func:`dead_jobs` gave and somebody agreed to; ``None`` looks by itself.

    Raises:
        JobsDirUnusable: the directory cannot be written.
    """
    root = jobs_dir()
    return [job.job_id for job in (dead_jobs() if found is None else found) if jobs.remove_dead(root, job.job_id)]


def dead_jobs() -> list[Job]:
    """What :func:`cleanup` would remove."""
    return [job for job in list_jobs() if job.state == "dead"]
