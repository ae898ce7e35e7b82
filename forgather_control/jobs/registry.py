"""The jobs directory: who is there, who lives, what the dead left behind.

Floor 2: imports errors, clock, jsonrpc, endpoint, launch, process and record. Runs on any thread, in the client and
in the job. What a job does with its own directory stands in ``directory``.

A directory is removed only if its name and its record agree, the record's process is proven to be
gone, and nobody answers in its name; links are not followed.
"""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

from .. import states
from ..deadline import Deadline
from ..errors import ControlError, InternalError, JobsDirUnusable, NoSuchJob
from ..processes import liveness
from ..wire import addresses, jsonrpc
from .record import SOCKET, JobRecord, check_job_id, is_job_id, open_directory, parse_record, read_record, record_in

if TYPE_CHECKING:
    from ..processes.launcher import Launch

#: Sockets that are asked at once; each takes a file descriptor.
_AT_ONCE: Final = 200
#: Seconds in which a job's full backlog has to move on before it counts as silent.
_CONNECT: Final = 0.2

#: How to open a directory that only names are looked up in: it need not be readable (open(2)).
_PLACE: Final = getattr(os, "O_PATH", os.O_RDONLY)

#: The state of a job whose socket did not answer, by the state of its process.
_STATE_WITHOUT_ANSWER: Final[dict[states.ProcessState, states.JobState]] = {
    states.PROCESS_RUNNING: states.JOB_SILENT,
    states.PROCESS_GONE: states.JOB_DEAD,
    states.PROCESS_ELSEWHERE: states.JOB_FOREIGN,
}


# Discovery...


class Job(NamedTuple):
    """A job as it was found: its record without secrets, whether it lives, and its status if it answered."""

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

    @property
    def global_step(self) -> int | None:
        """The step it has reached; ``None`` if it did not answer."""
        return None if self.status is None else self.status.get("global_step")

    @classmethod
    def from_json(cls, value: Any) -> Job:
        """The job that a row of ``list_jobs`` tells of.

        Raises:
            InternalError: it tells of none.
        """
        try:
            record = parse_record(jsonrpc.encode(value), check_job_id(value["job_id"]))
            if value["state"] not in get_args(states.JobState):
                raise ValueError("it has no state")
            status = value.get("status")
        except (LookupError, TypeError, ValueError, AttributeError) as err:
            raise InternalError("the other side sent no list of jobs") from err
        return cls(**_known(record), state=value["state"], status=status if isinstance(status, dict) else None)

    def to_json(self) -> dict[str, Any]:
        """The job as ``list --json`` prints it."""
        return {**self._asdict(), "launch": self.launch and self.launch.to_json(), "global_step": self.global_step}


#: What a job and its record have in common.
_SHARED: Final = tuple(name for name in Job._fields if name in JobRecord._fields)


def scan(root: str) -> tuple[list[JobRecord], dict[str, str]]:
    """All records in the jobs directory, newest first, and why each unreadable one was left out."""
    records: list[JobRecord] = []
    left_out: dict[str, str] = {}
    for name in _names(root):
        try:
            record = read_record(root, name)
        except ValueError as err:
            left_out[name] = str(err)
            continue
        if record is not None:
            records.append(record)
    records.sort(key=lambda record: (-record.started_at, record.job_id))
    return records, left_out


def _names(root: str) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return [entry.name for entry in entries if is_job_id(entry.name) and entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as err:
        raise JobsDirUnusable(f"the jobs directory {root} cannot be read ({err.strerror})") from err


def named(root: str, job: str) -> JobRecord | None:
    """The record of the job of this id; ``None`` if there is none.

    Raises:
        NoSuchJob: it cannot be read.
    """
    try:
        return read_record(root, job) if is_job_id(job) else None
    except ValueError as err:
        raise NoSuchJob(f"the record of job {job} in {root} cannot be read: {err}", job=job) from err


def discover(root: str, seconds: float) -> tuple[list[Job], dict[str, str]]:
    """All jobs, newest first, each asked for its status; and why each unreadable one was left out.

    Args:
        seconds: to wait for all answers together; the dead cost none of it.
    """
    records, left_out = scan(root)
    answers = ask([record for record in records if not liveness.is_gone(record.owner)], "status", Deadline(seconds))
    return [_found(record, answers.get(record.job_id)) for record in records], left_out


def _found(record: JobRecord, status: dict[str, Any] | None) -> Job:
    return Job(**_known(record), state=states.JOB_LIVE if status is not None else judge(record), status=status)


def _known(record: JobRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in _SHARED}


def judge(record: JobRecord) -> states.JobState:
    """The state of a job whose socket did not answer."""
    return _STATE_WITHOUT_ANSWER[liveness.judge(record.owner)]


def ask(records: list[JobRecord], method: str, deadline: Deadline) -> dict[str, dict[str, Any]]:
    """What the jobs answer, by job id. Who is silent, or answers for another job, is left out."""
    answers: dict[str, dict[str, Any]] = {}
    for start in range(0, len(records), _AT_ONCE):
        answers.update(_ask_some(records[start : start + _AT_ONCE], method, deadline))
    return answers


def _ask_some(records: list[JobRecord], method: str, deadline: Deadline) -> dict[str, dict[str, Any]]:
    answers: dict[str, dict[str, Any]] = {}
    with selectors.DefaultSelector() as selector:
        try:
            for record in records:
                sock = _send(record, method)
                if sock is not None:
                    selector.register(sock, selectors.EVENT_READ, (record, bytearray()))
            while selector.get_map() and (events := selector.select(deadline.left())):
                for key, _ in events:
                    _collect(selector, key, answers)
        finally:
            for key in list(selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]  # sockets, all of them
    return answers


def _send(record: JobRecord, method: str) -> socket.socket | None:
    if record.socket is None:
        return None
    try:
        # An OSError is this process's own (out of files), and says nothing of the job: it is raised.
        sock = addresses.UnixEndpoint(record.socket).connect(Deadline(_CONNECT))
    except ControlError:
        return None
    try:
        sock.setblocking(False)
        sock.send(jsonrpc.request(method, {}, 1))
    except OSError:
        sock.close()
        return None
    return sock


def _collect(selector: selectors.BaseSelector, key: selectors.SelectorKey, answers: dict[str, dict[str, Any]]) -> None:
    record, received = key.data
    sock = key.fileobj
    assert isinstance(sock, socket.socket)
    try:
        data = sock.recv(65536)
    except OSError:
        data = b""
    received += data
    if data and b"\n" not in data and len(received) < 1 << 20:
        return
    selector.unregister(sock)
    sock.close()
    try:
        reply = jsonrpc.parse_reply(bytes(received))
    except ControlError:
        return
    if isinstance(reply.result, dict) and reply.result.get("job_id") == record.job_id:
        answers[record.job_id] = reply.result


# Cleaning up...


@contextmanager
def locked(root: str, seconds: float) -> Iterator[bool]:
    """Keep others from claiming or removing job directories meanwhile; yields whether it was possible.

    On a file system without locks (Lustre without ``-o flock``) the work goes on unlocked: two jobs
    of one id that start within the same millisecond can then both believe to have it.

    Raises:
        JobsDirUnusable: somebody held the lock for all of ``seconds``.
    """
    import fcntl

    try:
        file = os.open(os.path.join(root, ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise JobsDirUnusable(f"the jobs directory {root} cannot be written ({err.strerror})") from err
    try:
        if os.geteuid() == 0:  # made under sudo in a user's directory, it must not lock the user out
            owner = os.stat(root)
            os.fchown(file, owner.st_uid, owner.st_gid)
        yield _flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB, Deadline(seconds), root)
    finally:
        os.close(file)


def _flock(file: int, how: int, deadline: Deadline, root: str) -> bool:
    import fcntl

    while True:
        try:
            fcntl.flock(file, how)
            return True
        except BlockingIOError as err:
            if deadline.passed():
                raise JobsDirUnusable(f"another process has held {root}/.lock for too long") from err
            time.sleep(0.01)  # flock(2) has no time-out, and a signal is not ours to take
        except OSError:
            return False


def remove_dead(root: str, job_id: str) -> bool:
    """Remove what a dead job of this host left; False if it is not there, not dead or not readable.

    It is judged again under the lock, so a job that starts meanwhile is safe. Only this one directory is
    removed, no link is followed; and it is emptied through the descriptor that its record was read from,
    because its owner, where root cleans up, may put something else in its place while it is judged.

    Raises:
        JobsDirUnusable: the directory cannot be written or removed.
    """
    with locked(root, seconds=5.0), _opened(root) as above:
        try:
            directory = open_directory(check_job_id(job_id), above)
        except ValueError:
            return False
        if directory is None:
            return False
        try:
            record = _record_in(directory, job_id)
            if record is None or not is_dead(record):
                return False
            # The record may be a dead job's, put in the place of a live one's; the socket is not.
            beside = os.path.join(root, job_id, SOCKET)
            if record.socket != beside and _answers(record._replace(socket=beside)):
                return False
            _remove(root, above, job_id, directory)
            return True
        finally:
            os.close(directory)


def _record_in(directory: int, job_id: str) -> JobRecord | None:
    try:
        return record_in(directory, job_id)
    except ValueError:
        return None


def is_dead(record: JobRecord) -> bool:
    """Whether the job's process is proven to be gone and nobody answers in its name."""
    return judge(record) == states.JOB_DEAD and not _answers(record)


def _answers(record: JobRecord) -> bool:
    return bool(ask([record], "ping", Deadline(1.0)))


def remove_tree(root: str, job_id: str, known: tuple[int, int] | None = None) -> None:
    """Remove one job's directory, whose owner was judged before. Call it ``locked``.

    Args:
        known: device and inode of the one that was judged; another one is left alone.
    """
    with _opened(root) as above:
        try:
            directory = open_directory(job_id, above)
        except (OSError, ValueError) as err:
            raise JobsDirUnusable(f"{os.path.join(root, job_id)}: {err}") from err
        if directory is None:
            return
        try:
            facts = os.fstat(directory)
            if known in (None, (facts.st_dev, facts.st_ino)):
                _remove(root, above, job_id, directory)
        finally:
            os.close(directory)


@contextmanager
def _opened(root: str) -> Iterator[int]:
    """A descriptor of the jobs directory, whatever becomes of its path."""
    try:
        above = os.open(root, _PLACE | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise JobsDirUnusable(f"the jobs directory {root} cannot be opened ({err.strerror})") from err
    try:
        yield above
    finally:
        os.close(above)


def _remove(root: str, above: int, job_id: str, directory: int) -> None:
    try:
        _empty(directory)
        os.rmdir(job_id, dir_fd=above)
    except FileNotFoundError:
        pass
    except (OSError, RecursionError) as err:
        why = getattr(err, "strerror", None) or "it is nested too deeply"
        raise JobsDirUnusable(f"{os.path.join(root, job_id)} cannot be removed ({why})") from err


def _empty(directory: int) -> None:
    """Remove all that is in a directory, by descriptors alone: no link is followed, whoever puts one there."""
    with os.scandir(directory) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in found:
        with suppress(FileNotFoundError):  # its reader took it meanwhile
            if not is_directory:
                os.unlink(name, dir_fd=directory)
                continue
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            try:
                _empty(inner)
            finally:
                os.close(inner)
            os.rmdir(name, dir_fd=directory)
