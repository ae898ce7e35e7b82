"""The jobs in the jobs directory: find their records, ask them over their sockets, judge their state. Any thread."""

import contextlib
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from .. import states
from ..deadline import Deadline
from ..errors import ControlError, InternalError, JobNotAnswering, JobsDirUnusable, NoSuchJob
from ..notebook import html_table
from ..processes import liveness
from ..schema import NULL, OBJECT, TEXT, TIME, Field, load, nullable
from ..wire import addresses, jsonrpc
from . import job_lock, last_status, limits
from .record import FIELDS, JobRecord, Launch, is_job_id, jobs_dir, read_record


class Job(NamedTuple):
    """A job as it was found: its record without secrets, its state, and its status if it answered."""

    job_id: str
    host: str
    port: int | None
    pid: int
    started_at: float
    state: states.JobState
    world_size: int = 1
    user: str = ""
    version: str = ""
    socket: str | None = None
    launch: Launch | None = None
    status: dict[str, Any] | None = None
    last_status: dict[str, Any] | None = None  #: What a job wrote last that did not answer.
    last_status_at: float | None = None  #: When it did, in seconds since the epoch.
    silent_because: str | None = None  #: Why its process does nothing, where the system tells.

    @property
    def global_step(self) -> int | None:
        """The last step that is known: of a job that did not answer, the one in its last status."""
        known = self.status or self.last_status or {}
        return known.get("global_step")

    def __repr__(self) -> str:
        step = "" if self.global_step is None else f", step {self.global_step}"
        return f"<Job {self.job_id}: {self.state}{step}, pid {self.pid} on {self.host}>"

    def _repr_html_(self) -> str:
        known = {**self._asdict(), "status": None, "last_status": None, "global_step": self.global_step}
        return html_table({name: value for name, value in known.items() if value not in (None, "")})

    @classmethod
    def from_json(cls, value: Any) -> "Job":
        """Return the job that an element of the reply to ``list_jobs`` describes; raise InternalError if it is none."""
        try:
            return load(cls, _FIELDS, value, "a job")
        except ValueError as err:
            raise InternalError("the other side sent no list of jobs") from err

    def to_json(self) -> dict[str, Any]:
        """Return the job as ``list --json`` prints it."""
        return {**self._asdict(), "launch": self.launch and self.launch.to_json(), "global_step": self.global_step}


#: The rules for the members of a job; those that its record has, too, are first.
_SHARED: Final = {name: FIELDS[name] for name in Job._fields if name in FIELDS}
_FIELDS: Final = {
    **_SHARED,
    "state": Field(TEXT, choices=states.JOB_STATES),
    **dict.fromkeys(("status", "last_status"), Field(OBJECT + NULL)),
    "last_status_at": nullable(TIME),
    "silent_because": Field(TEXT + NULL),
}


def scan(root: str) -> tuple[list[JobRecord], dict[str, str]]:
    """Return all records in the jobs directory, newest first, and by job id why the others cannot be read.

    Raises:
        JobsDirUnusable: the jobs directory cannot be read.
    """
    try:
        with os.scandir(root) as entries:
            found = [entry.name for entry in entries if is_job_id(entry.name) and entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        found = []
    except OSError as err:
        raise JobsDirUnusable(f"the jobs directory {root} cannot be read ({err.strerror})") from err
    records: list[JobRecord] = []
    left_out: dict[str, str] = {}
    for job_id in found:
        try:
            if record := read_record(root, job_id):
                records.append(record)
        except ValueError as err:
            left_out[job_id] = str(err)
    records.sort(key=lambda record: (-record.started_at, record.job_id))
    return records, left_out


def named(root: str, job_id: str) -> JobRecord | None:
    """Return the record of this job, ``None`` if there is none; raise NoSuchJob if it cannot be read."""
    try:
        return read_record(root, job_id) if is_job_id(job_id) else None
    except ValueError as err:
        raise NoSuchJob(f"the record of job {job_id} in {root} cannot be read: {err}", job=job_id) from err


def discover(root: str, seconds: float) -> tuple[list[Job], dict[str, str]]:
    """Return what :func:`scan` finds, as jobs with their states.

    Args:
        seconds: the longest time to wait for all answers together; jobs that are dead take none of it.
    """
    records, left_out = scan(root)
    return look(root, records, seconds), left_out


def look(root: str, records: list[JobRecord], seconds: float) -> list[Job]:
    """Return the jobs of these records with their states; otherwise as :func:`discover`."""
    answers = _ask_running(records, "status", seconds)
    return [_job(root, record, answers.get(record.job_id)) for record in records]


def live_records(root: str, seconds: float) -> list[JobRecord]:
    """Return the records of the live jobs, newest first; otherwise as :func:`discover`."""
    return answering(scan(root)[0], seconds)


def answering(records: list[JobRecord], seconds: float) -> list[JobRecord]:
    """Return those of the records whose jobs answer over their sockets."""
    answers = _ask_running(records, "ping", seconds)
    return [record for record in records if record.job_id in answers]


def _ask_running(records: list[JobRecord], method: str, seconds: float) -> dict[str, dict[str, Any]]:
    return ask((record for record in records if not liveness.is_gone(record.owner)), method, Deadline(seconds))


def _job(root: str, record: JobRecord, status: dict[str, Any] | None) -> Job:
    job = Job(**{name: getattr(record, name) for name in _SHARED}, state=states.JOB_LIVE, status=status)
    if status is not None:
        return job
    job, last = job._replace(state=judge(record, root)), last_status.read(root, record.job_id)
    if job.state == states.JOB_SILENT:
        job = job._replace(silent_because=liveness.held_up(record.owner))
    return job if last is None else job._replace(last_status=last.status, last_status_at=last.written_at)


def judge(record: JobRecord, root: str | None = None, directory: int | None = None) -> states.JobState:
    """Return the state of a job whose socket did not answer.

    A held lock proves life. A free one proves death on the boot on which the job ran: from another one it may not be
    seen. Otherwise the process decides.

    Args:
        root: the jobs directory; by default that of this process.
        directory: a descriptor of the job's directory, if it is open already.
    """
    held = job_lock.is_held(os.path.join(root or jobs_dir(), record.job_id), record.started_at, directory)
    here = liveness.is_same_boot(record.owner)
    if held:
        return states.JOB_SILENT if here or not liveness.is_elsewhere(record.owner) else states.JOB_FOREIGN
    if held is False and here:
        return states.JOB_DEAD
    state = liveness.judge(record.owner)
    if state == states.PROCESS_RUNNING:
        return states.JOB_SILENT
    return states.JOB_DEAD if state == states.PROCESS_GONE else states.JOB_FOREIGN


def ask(records: Iterable[JobRecord], method: str, deadline: Deadline) -> dict[str, dict[str, Any]]:
    """Send a method to jobs over their sockets; return the results by job id.

    Jobs that do not answer, answer with an error, or answer for another job are left out. At most
    ``limits.MAX_ASKED_AT_ONCE`` sockets are open at a time. While other jobs wait for a place, a silent one keeps its
    place for an equal share of the time, so a job that answers promptly is in the result, however many are silent.

    Raises:
        OSError: this process has no descriptors left, which says nothing about the jobs.
    """
    with contextlib.closing(_Asking(records, method, deadline)) as asking:
        return asking.run()


class _Asked(NamedTuple):
    """A job that was sent the request: what it has answered so far, and until when it keeps its place (monotonic)."""

    record: JobRecord
    sock: socket.socket
    received: bytearray
    until: float


class _Asking:
    """One method sent to many jobs; see :func:`ask`."""

    def __init__(self, records: Iterable[JobRecord], method: str, deadline: Deadline) -> None:
        self._waiting = deque(record for record in records if record.socket is not None)
        self._asked: deque[_Asked] = deque()  # oldest first
        self._request, self._deadline = jsonrpc.request(method, {}, 1), deadline
        self._share = (deadline.left() or 0.0) / (len(self._waiting) // limits.MAX_ASKED_AT_ONCE + 1)
        self._selector = selectors.DefaultSelector()
        self._answers: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        for asked in self._asked:
            asked.sock.close()
        self._selector.close()

    def run(self) -> dict[str, dict[str, Any]]:
        self._send_some()
        while self._asked or self._waiting:
            left = self._deadline.left() or 0.0
            for key, _ in self._selector.select(min(left, limits.BUSY_RETRY) if self._waiting else left):
                self._receive(key.data)
            if left == 0.0:
                break
            self._send_some()
        return self._answers

    def _send_some(self) -> None:
        """Try each waiting job once, while there is a place; those that are busy wait on."""
        now = time.monotonic()
        for _ in range(len(self._waiting)):
            if len(self._asked) >= limits.MAX_ASKED_AT_ONCE:
                if self._asked[0].until > now:
                    return
                self._drop(self._asked[0])
            record = self._waiting.popleft()
            try:
                sock = addresses.UnixEndpoint(record.socket or "").connect(Deadline(0.0))
            except JobNotAnswering:  # its backlog is full
                self._waiting.append(record)
                continue
            except ControlError:  # no process that this user may talk to listens
                continue
            asked = _Asked(record, sock, bytearray(), now + self._share)
            self._asked.append(asked)
            self._selector.register(sock, selectors.EVENT_READ, asked)
            sock.setblocking(False)
            with contextlib.suppress(OSError):  # the job hung up, as its socket tells
                sock.send(self._request)

    def _receive(self, asked: _Asked) -> None:
        try:
            data = asked.sock.recv(65536)
        except OSError:
            data = b""
        received = asked.received
        received += data
        if data and b"\n" not in data and len(received) < limits.MAX_ANSWER:
            return
        self._drop(asked)
        with contextlib.suppress(ControlError):
            result = jsonrpc.parse_reply(bytes(received)).result
            if isinstance(result, dict) and result.get("job_id") == asked.record.job_id:
                self._answers[asked.record.job_id] = result

    def _drop(self, asked: _Asked) -> None:
        self._selector.unregister(asked.sock)
        self._asked.remove(asked)
        asked.sock.close()
