"""Which job is meant and how it is reached: JOB, ``--connect`` and ``--ssh`` are resolved here, once, into a target."""

import os
import socket
from collections.abc import Iterable
from typing import Final, NamedTuple, TypeVar

from .. import states
from ..deadline import Deadline
from ..errors import AmbiguousJob, ControlError, InvalidParams, JobDead, JobNotAnswering, NoSuchJob, NotAuthenticated
from ..jobs import registry
from ..jobs.record import JobRecord, jobs_dir
from ..processes import liveness
from ..wire import addresses
from . import limits
from .transport import SocketTransport, Transport

#: Environment variable: the token for ``--connect``.
TOKEN: Final = "FORGATHER_CONTROL_TOKEN"
#: The addresses that stand for every address of a host.
_ANY: Final = ("0.0.0.0", "::")
#: A job as its record tells it, or as another host lists it.
AnyJob = TypeVar("AnyJob", JobRecord, registry.Job)


def find(job: str | int | None = None) -> JobRecord:
    """Return the record of one job: of the only live one, or of the one that has this name.

    A name is the exact id, or what SLURM or torchrun call the job (``123``, ``123_4``, the run id). NoSuchJob: there
    is none; the message suggests an id that is similar. AmbiguousJob: there are several.
    """
    root = jobs_dir()
    if job is None:
        live = registry.live_records(root, limits.LIST_TIMEOUT)
        if not live:
            raise NoSuchJob(f"No live job in {root}; forgather-control list shows what is there")
        return _only(live, "Several jobs are live")
    name = str(job)
    record = registry.named(root, name)
    if record is not None:
        return record
    records = registry.scan(root)[0] if name else []
    latest = launched(records, name)
    if latest:
        return only(latest, name)
    raise no_such_job(name, [record.job_id for record in records], root)


def launched(records: Iterable[AnyJob], name: str) -> list[AnyJob]:
    """Return the jobs that SLURM or torchrun call by this name."""
    found = [(record, record.launch) for record in records if record.launch and name in record.launch.names]
    # Those that their launcher has started again since have ended, whatever they left.
    return [record for record, launch in found if not any(other.follows(launch) for _, other in found)]


def only(records: list[AnyJob], name: str) -> AnyJob:
    """Return the one job that has a name; AmbiguousJob: there are several."""
    return _only(records, f"{ascii(name)[:140]} names several jobs")


def no_such_job(name: str, known: list[str], place: str) -> NoSuchJob:
    """Return the error for a name that no job has; it suggests an id that is similar."""
    hint = suggestion(name, known, "forgather-control list shows what is there")
    return NoSuchJob(f"No job {ascii(name)[:140]} in {place}; {hint}", job=name)


def is_pattern(word: str) -> bool:
    """Whether a word is a pattern of job ids: those contain none of these characters."""
    return not frozenset("*?[").isdisjoint(word)


def suggestion(word: str, known: Iterable[str], otherwise: str) -> str:
    """Return the end of a message about a word that is not known: one that is similar, if there is one."""
    from difflib import get_close_matches  # only for a message, so not at every start

    known = list(known)
    similar = [*(one for one in known if one.startswith(word)), *get_close_matches(word, known, 1)]
    return f"did you mean {similar[0]}?" if similar else otherwise


def _only(records: list[AnyJob], problem: str) -> AnyJob:
    if len(records) == 1:
        return records[0]
    names = [record.job_id for record in records]
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise AmbiguousJob(f"{problem}; name one of {shown}", candidates=names)


class Target(NamedTuple):
    """One job and the way to it."""

    name: str  #: What messages call it: its id, else the address or ``ssh:HOST``.
    job_id: str | None = None  #: The id that must answer there; ``None`` accepts any.
    record: JobRecord | None = None  #: What the job published, where its jobs directory can be read here.
    endpoint: addresses.Endpoint | None = None  #: The address that was given; ``None`` leaves the choice to `open`.
    token: str | None = None  #: To be shown at that address.
    ssh: str | None = None  #: The host on which the job is found and reached.

    def open(self, deadline: Deadline) -> tuple[Transport, str | None]:
        """Connect, or raise why not; return the transport, and the token that must be shown first, if any."""
        if self.ssh is not None:
            from . import ssh  # what is seldom needed is not imported at every start

            return ssh.connect(self.ssh, self.job_id, deadline), None
        if self.endpoint is not None:
            is_unix = isinstance(self.endpoint, addresses.UnixEndpoint)
            return SocketTransport(self.endpoint.connect(deadline), is_same_host=is_unix), self.token
        assert self.record is not None
        try:
            return _open_socket(self.record, deadline)
        except NotAuthenticated:
            raise
        except ControlError as err:
            from . import file_transport

            if not file_transport.is_offered(self.record, nothing_listens=isinstance(err.__cause__, JobDead)):
                raise
            return file_transport.FileTransport(self.record), None


def resolve(
    job: str | int | None = None, at: str | None = None, token: str | None = None, ssh: str | None = None
) -> Target:
    """Return the target that these arguments of :func:`api.connect` mean; errors as there."""
    name = None if job is None else str(job)
    if ssh is not None:
        if at is not None or token is not None:
            raise InvalidParams("ssh goes with neither at nor token")
        return Target(name or f"ssh:{ssh}", name, ssh=ssh)
    if at is None:
        record = find(name)
        return Target(record.job_id, record.job_id, record)
    where = addresses.parse(at)
    if isinstance(where, addresses.TcpEndpoint):
        return _at_port(where, name, token)
    try:  # a launcher's name means an id, where its record can be read here
        job_id = name and find(name).job_id
    except ControlError:
        job_id = name
    return Target(name or at, job_id, endpoint=where)


def _at_port(where: addresses.TcpEndpoint, job: str | None, token: str | None) -> Target:
    record = _record_behind(where, job)
    if record is not None:
        host = _port_host(record) if job is None else where.host
        # The stricter of both: a port that speaks TLS gets no token in plain text.
        is_tls = where.is_tls or record.tls_sha256 is not None
        where = where._replace(host=host, is_tls=is_tls, sha256=record.tls_sha256)
    secret = token or os.environ.get(TOKEN) or (record.token if record is not None else None)
    if not secret:
        raise NotAuthenticated(
            f"{where} needs the job's token, which stands in the endpoint.json of the job's directory. "
            f"Give it with --token-file, or set {TOKEN}",
            needs="token",
        )
    job_id = job if record is None else record.job_id
    return Target(job_id or str(where), job_id, record, where, secret)


def _record_behind(where: addresses.TcpEndpoint, job: str | None) -> JobRecord | None:
    """Return the record of the job at a port, if it can be read here: the named job's, else the one with this port.

    Its token is shown to whatever listens there, so a port alone is not enough: the host must be the job's. A job
    that is found by its port is reached at the address that it has bound: at another address of the same host, for
    example ``::1`` or ``127.0.0.2``, another user may listen.
    """
    try:
        if job is not None:
            return find(job)
        records = registry.scan(jobs_dir())[0]
    except ControlError:
        return None
    fits = [record for record in records if record.port == where.port and _is_host(where.host, record)]
    if len(fits) > 1:  # dead jobs that had this port before may have left their records
        fits = [record for record in fits if registry.judge(record) != states.JOB_DEAD]
    return fits[0] if len(fits) == 1 else None


def _is_host(host: str, record: JobRecord) -> bool:
    if host in (record.host, record.address):
        return True
    local = record.address in _ANY or (record.address is not None and addresses.is_loopback(record.address))
    return local and addresses.is_loopback(host) and not liveness.is_elsewhere(record.owner)


def dial(job: str | None = None) -> tuple[str, socket.socket]:
    """Return the id of a job of this host and a socket connected to it, for the stdio proxy; errors as in `connect`."""
    record = find(job)._replace(port=None)
    transport, _ = _open_socket(record, Deadline(limits.CALL_TIMEOUT))
    return record.job_id, transport.sock


def _open_socket(record: JobRecord, deadline: Deadline) -> tuple[SocketTransport, str | None]:
    """Connect to the job's socket, else to its port."""
    port = _port(record)
    if record.socket is not None:
        try:
            sock = addresses.UnixEndpoint(record.socket).connect(deadline)
            return SocketTransport(sock, is_same_host=True), None
        except JobDead as err:
            # The port of a dead job may belong to another program, which must not see its token.
            if port is None or registry.judge(record) == states.JOB_DEAD:
                from .diagnosis import unreachable

                raise unreachable(record) from err
    if port is None:
        raise JobNotAnswering(f"Job {record.job_id} offers no socket", job=record.job_id)
    return SocketTransport(port.connect(deadline)), record.token


def _port(record: JobRecord) -> addresses.TcpEndpoint | None:
    """Return the job's port, if it has one that this host can reach."""
    if record.port is None or record.address is None:
        return None
    if addresses.is_loopback(record.address) and liveness.is_elsewhere(record.owner):
        return None
    return addresses.TcpEndpoint(_port_host(record), record.port, record.tls_sha256 is not None, record.tls_sha256)


def _port_host(record: JobRecord) -> str:
    """Return the host to connect to for the job's port."""
    if record.address is None or (record.address in _ANY and liveness.is_elsewhere(record.owner)):
        return record.host
    return record.address
