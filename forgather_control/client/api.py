"""Find a job, connect to it, give it a command. What the CLI and Python programs use.

Floor 4: imports by_file, caller, clock, commands, endpoint, errors, jobs, jsonrpc, process, record and ssh; never
torch, and psutil only where a silent job is judged. Runs on the caller's thread.
"""

from __future__ import annotations

import os
import socket
from typing import Any, Final

from .. import states
from ..deadline import Deadline
from ..errors import (
    AmbiguousJob,
    ControlError,
    FindError,
    InvalidParams,
    JobDead,
    JobNotAnswering,
    NoSuchJob,
    NotAuthenticated,
)
from ..jobs import registry
from ..jobs.record import JobRecord, jobs_dir
from ..jobs.registry import Job
from ..processes import liveness
from ..wire import addresses, jsonrpc
from ..wire.records import CommandRecord
from . import connection
from .connection import CALL_TIMEOUT, Client

#: Seconds for all answers to ``list_jobs`` together.
LIST_TIMEOUT: Final = 2.0
#: The addresses that stand for all of a host.
_ANY: Final = ("0.0.0.0", "::")


# Finding...


def list_jobs(timeout: float = LIST_TIMEOUT) -> list[Job]:
    """All jobs in the jobs directory, newest first: live, silent, dead and foreign ones (``job.state``).

    Args:
        timeout: seconds to wait for all their answers together.

    Raises:
        JobsDirUnusable: the directory cannot be read.
    """
    return registry.discover(jobs_dir(), timeout)[0]


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
    record = registry.named(root, job)
    if record is not None:
        return record
    records = registry.scan(root)[0] if job else []
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


def _only_live() -> JobRecord:
    root = jobs_dir()
    live = registry.live_records(root, LIST_TIMEOUT)
    if not live:
        raise NoSuchJob(f"no live job in {root}; forgather control list shows what is there")
    return _only(live, "several jobs are live")


def _only(records: list[JobRecord], problem: str) -> JobRecord:
    if len(records) == 1:
        return records[0]
    names = [record.job_id for record in records]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise AmbiguousJob(f"{problem}; name one of {shown}", candidates=names)


class FileClient(Client):
    """What :class:`caller.Client` is over a connection, through files.

    Args:
        record: what the job published.
        timeout: seconds for each call that waits for nothing.

    Raises:
        FindError: its directory has gone, or cannot be written.
    """

    def __init__(self, record: JobRecord, timeout: float = CALL_TIMEOUT) -> None:
        from . import file_transport

        self._name, self._timeout, self._record = record.job_id, timeout, record
        self._fate, self._last_id = "", 0
        self._transport = file_transport.FileTransport(record, self._gone)

    def close(self) -> None:
        """Nothing is open between calls. A command that was accepted goes on."""

    def _send(self, line: bytes) -> None:
        self._transport.send(line)

    def _reply(self, id_: int, deadline: Deadline, patient: bool) -> jsonrpc.Reply:
        return jsonrpc.parse_reply(self._transport.reply(deadline, patient, self._fate))


def connect(
    job: str | None = None,
    timeout: float = CALL_TIMEOUT,
    *,
    at: str | None = None,
    token: str | None = None,
    ssh: str | None = None,
) -> Client:
    """A connection to a job, to be closed (``with connect(...) as job``).

    Without ``at`` the way is found: over the socket on its own host, else over TCP where the job offers that,
    else by file.

    Args:
        job: as in :func:`find`; with ``at`` it may be left out.
        timeout: seconds for connecting, and for each call that waits for nothing.
        at: where to connect to: ``unix:PATH``, ``tcp://HOST:PORT`` or ``tls://HOST:PORT``.
        token: to be shown there; ``None`` takes it from $FORGATHER_CONTROL_TOKEN, else from the job's record.
        ssh: ``[USER@]HOST``, on which the job is looked for and reached, as ssh reaches that host.

    Raises:
        NoSuchJob, AmbiguousJob: as in :func:`find`.
        JobDead: its process is gone.
        JobNotAnswering: it lives (or is on another host) and cannot be reached.
        NotAuthenticated: the token or the certificate is not the job's.
        InvalidParams: ``at`` is no address, ``ssh`` is no host, or both are given.
    """
    if ssh is not None:
        if at is not None or token is not None:
            raise InvalidParams("ssh goes with neither at nor token")
        return _OverSsh(ssh, job, timeout)
    if at is not None:
        return _connect_at(addresses.parse(at), job, timeout, token)
    record = find(job)
    try:
        return _connect_directly(record, timeout)
    except NotAuthenticated:
        raise
    except FindError:
        from . import file_transport  # what is seldom needed is not loaded at every start of the command line

        if not file_transport.is_offered(record):
            raise
        return FileClient(record, timeout)


def _connect_directly(record: JobRecord, timeout: float) -> Client:
    port = _port(record)
    if record.socket is None:
        if port is None:
            raise JobNotAnswering(f"job {record.job_id} offers no socket", job=record.job_id)
        return Client(port, record.job_id, timeout, record, record.token)
    try:
        return Client(addresses.UnixEndpoint(record.socket), record.job_id, timeout, record)
    except JobDead as err:
        if port is None or registry.judge(record) == states.JOB_DEAD:  # then its port is somebody else's, if anybody's
            raise _unreachable(record) from err
        return Client(port, record.job_id, timeout, record, record.token)


class _OverSsh(Client):
    """A connection that may break off though the job goes on."""

    def __init__(self, host: str, job: str | None, timeout: float) -> None:
        from .ssh import SshEndpoint

        where = SshEndpoint(host, job)
        super().__init__(where, job or str(where), timeout)  # type: ignore[arg-type]  # it connects, as the others do

    def _gone(self) -> ControlError:
        from .ssh import Link

        why = self._sock.lost() if isinstance(self._sock, Link) else None
        if why is None:
            return super()._gone()
        return JobNotAnswering(f"{why} before job {self._name} answered{self._fate}", job=self._name)


def dial(job: str | None = None) -> tuple[str, socket.socket]:
    """The id of a job of this host, and a socket connected to it: what the end of an ssh copies from and to.

    Raises:
        FindError: as in :func:`connect`.
    """
    record = find(job)
    if record.socket is None:
        raise JobNotAnswering(f"job {record.job_id} offers no socket", job=record.job_id)
    try:
        return record.job_id, addresses.UnixEndpoint(record.socket).connect(Deadline(CALL_TIMEOUT))
    except JobDead as err:
        raise _unreachable(record) from err


def _port(record: JobRecord) -> addresses.TcpEndpoint | None:
    """The job's port, if it has one that this host may reach."""
    if record.port is None or record.address is None:
        return None
    if addresses.is_loopback(record.address) and liveness.is_elsewhere(record.owner):
        return None
    return addresses.TcpEndpoint(_port_host(record), record.port, record.tls_sha256 is not None, record.tls_sha256)


def _port_host(record: JobRecord) -> str:
    """Where its port is, seen from here."""
    if record.address is None or (record.address in _ANY and liveness.is_elsewhere(record.owner)):
        return record.host
    return record.address


def _connect_at(where: addresses.Endpoint, job: str | None, timeout: float, token: str | None) -> Client:
    if isinstance(where, addresses.UnixEndpoint):
        return _the(job, Client(where, job or str(where), timeout))
    record = _behind(where, job)
    if record is not None:
        # Whichever asks for more: to a port that speaks TLS no token goes in plain text.
        where = where._replace(is_tls=where.is_tls or record.tls_sha256 is not None, sha256=record.tls_sha256)
        if job is None:
            where = where._replace(host=_port_host(record))
    secret = token or os.environ.get("FORGATHER_CONTROL_TOKEN") or (record.token if record is not None else None)
    if not secret:
        raise NotAuthenticated(
            f"{where} wants the job's token: give --token-file, or set FORGATHER_CONTROL_TOKEN; it stands in the "
            "endpoint.json of the job's directory"
        )
    name = job or str(where)
    if record is not None:
        return Client(where, record.job_id, timeout, record, secret)
    return _the(job, Client(where, name, timeout, None, secret))


def _the(job: str | None, found: Client) -> Client:
    """The connection itself, if the job that was named answers there; an abort must not meet another one."""
    if job is None:
        return found
    try:
        answer = found.call("ping")
        job_id = answer.get("job_id") if isinstance(answer, dict) else None
        if not isinstance(job_id, str) or not job_id.startswith(job):
            raise NoSuchJob(f"another job answers there, {ascii(job_id)[:140]}, not {ascii(job)[:140]}", job=job)
        return found
    except BaseException:
        found.close()
        raise


def _behind(where: addresses.TcpEndpoint, job: str | None) -> JobRecord | None:
    """The job that is meant, if its record can be read here: the one that is named, else the one that has this port.

    Its token is shown to whoever listens there; so a port alone is not enough, the host must be the job's. And where
    it is found by its port, the connection goes to the address that it has bound: at another one of the same host, be
    it ``::1`` or ``127.0.0.2``, another user may listen.
    """
    try:
        if job is not None:
            return find(job)
        records = registry.scan(jobs_dir())[0]
    except ControlError:
        return None
    fits = [record for record in records if record.port == where.port and _is_host(where.host, record)]
    if len(fits) > 1:  # of those that had the port before, some left their record
        fits = [record for record in fits if registry.judge(record) != "dead"]
    return fits[0] if len(fits) == 1 else None


def _is_host(host: str, record: JobRecord) -> bool:
    if host in (record.host, record.address):
        return True
    local = record.address in _ANY or (record.address is not None and addresses.is_loopback(record.address))
    return local and addresses.is_loopback(host) and not liveness.is_elsewhere(record.owner)


def _unreachable(record: JobRecord) -> ControlError:
    now = registry.named(jobs_dir(), record.job_id)
    if now is None:
        return NoSuchJob(f"job {record.job_id} has just ended", job=record.job_id)
    if now.owner != record.owner:
        return connection.restarted(now, "")
    who = connection.who(record)
    state = registry.judge(record)
    if state == states.JOB_DEAD:
        return JobDead(f"job {record.job_id} is dead: {who} is gone; forgather control cleanup removes it")
    if state == states.JOB_FOREIGN:
        return JobNotAnswering(f"job {record.job_id} runs on another host ({who}) and cannot be reached from here")
    return JobNotAnswering(f"job {record.job_id} lives ({who}), but nobody listens at its socket")


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
    from ..jobs.cleanup import remove_dead  # only this verb needs it

    root = jobs_dir()
    return [job.job_id for job in (dead_jobs() if found is None else found) if remove_dead(root, job.job_id)]


def dead_jobs() -> list[Job]:
    """What :func:`cleanup` would remove."""
    return [job for job in list_jobs() if job.state == "dead"]
