"""The Python interface: list jobs, connect to one, give it one command. Each function makes one connection."""

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from .. import states
from ..errors import ControlError
from ..jobs import registry
from ..jobs.record import jobs_dir
from ..jobs.registry import Job
from ..states import Wait
from ..wire.job_status import JobStatus
from ..wire.records import CommandRecord
from .connection import Client
from .limits import CALL_TIMEOUT, LIST_TIMEOUT
from .target import resolve

if TYPE_CHECKING:
    from typing_extensions import Unpack  # typing has it from Python 3.11 on; type checkers know both

_Job = str | int | None
#: Several jobs: words as :func:`many.jobs` takes them.
_Several = list[Any] | tuple[Any, ...]
_Records = dict[str, CommandRecord | ControlError]
_Text = str | None
_Float = float | None


class _How(TypedDict, total=False):
    """The keyword arguments of all functions that give a command, for the type checker."""

    wait: Wait
    timeout: float | None
    command_id: str | None
    reason: str | None


class _HowToSave(_How, total=False):
    evaluate: Literal["auto"] | bool | None


def list_jobs(timeout: float = LIST_TIMEOUT) -> list[Job]:
    """Return all jobs in the jobs directory, newest first: live, silent, dead and foreign ones (``job.state``).

    Args:
        timeout: seconds to wait for all their answers together.
    """
    return registry.discover(jobs_dir(), timeout)[0]


def connect(
    job: _Job = None, timeout: float = CALL_TIMEOUT, *, at: _Text = None, token: _Text = None, ssh: _Text = None
) -> Client:
    """Return a connection to a job, to be closed (``with connect(...) as job``).

    Without ``at`` and ``ssh`` the way is found: the socket on the job's own host, else TCP where the job offers
    it, else request files.

    Args:
        job: its exact id, or what SLURM or torchrun call it (``123``, ``123_4``, the run id); ``None`` where
            exactly one job is live, or with ``at``.
        timeout: seconds for connecting, and for each call that waits for nothing.
        at: where to connect to: ``unix:PATH``, ``tcp://HOST:PORT`` or ``tls://HOST:PORT``.
        token: to be shown there; ``None`` takes it from $FORGATHER_CONTROL_TOKEN, else from the job's record.
        ssh: ``[USER@]HOST``, on which the job is found and reached, as ssh reaches that host.

    Raises:
        NoSuchJob, AmbiguousJob: no job has this name, several have; or another job answers at ``at``.
        JobDead, JobNotAnswering: its process is gone; or it lives (or is on another host) and cannot be reached.
        NotAuthenticated: the token or the certificate is not the job's.
        InvalidParams: ``at`` is no address, ``ssh`` is no host, or both are given.
    """
    return Client(resolve(job, at, token, ssh), timeout)


def _call(job: _Job, method: str, **params: Any) -> Any:
    with connect(job) as client:
        return client.call(method, **params)


def get_job_status(job: _Job = None) -> JobStatus:
    """Return what the job answers to ``status``; FindError: there is no such job, or it does not answer."""
    return JobStatus.from_json(_call(job, "status"))


def get_command(job: _Job, command_id: str) -> CommandRecord:
    """Return the record of a command; CommandNotFound: the job has none of this id, or no longer."""
    return CommandRecord.from_json(_call(job, "get_command", command_id=command_id))


def cancel_command(job: _Job, command_id: str) -> CommandRecord:
    """Cancel a command and return its record; NotCancellable: it is applied already, or in its final state."""
    return CommandRecord.from_json(_call(job, "cancel_command", command_id=command_id))


def _give(job: _Job | _Several, name: str, **params: Any) -> CommandRecord | _Records:
    if isinstance(job, (list, tuple)):
        from .many import jobs  # few programs need it

        return jobs(*job).command(name, **params) if job else {}
    with connect(job) as client:
        return client.command(name, **params)


@overload
def save_checkpoint(job: _Job = None, **how: "Unpack[_HowToSave]") -> CommandRecord: ...
@overload
def save_checkpoint(job: _Several, **how: "Unpack[_HowToSave]") -> _Records: ...
def save_checkpoint(
    job: _Job | _Several = None,
    *,
    wait: Wait = "accepted",
    timeout: _Float = None,
    command_id: _Text = None,
    reason: _Text = None,
    evaluate: Literal["auto"] | bool | None = None,
) -> CommandRecord | _Records:
    """Save a checkpoint now; with ``wait="finished"``, ``record.result["path"]`` is where it is.

    Args:
        job: as in :func:`connect`; a list of names and patterns, such as ``["run1", "sweep-*"]``, means several
            jobs, and the result is a dictionary with a record or an error for each (see :class:`Jobs`).
        wait: return once the command is ``"accepted"``, ``"applied"`` by every rank, or ``"finished"``.
        timeout: seconds to wait; ``None`` waits as long as the job lives.
        command_id: an id chosen by the caller: the same id twice is the same command.
        reason: text that the command's record keeps.
        evaluate: whether to evaluate first; ``None`` leaves it to the job (``"auto"``).

    Raises:
        CommandFailed: it failed, or was cancelled, while this call waited.
        DeadlinePassed: ``timeout`` passed first; the command is still carried out.
        FindError: there is no such job, or it does not answer.
    """
    own = {"evaluate": evaluate}
    return _give(job, "save_checkpoint", wait=wait, timeout=timeout, command_id=command_id, reason=reason, **own)


@overload
def graceful_stop(job: _Job = None, **how: "Unpack[_How]") -> CommandRecord: ...
@overload
def graceful_stop(job: _Several, **how: "Unpack[_How]") -> _Records: ...
def graceful_stop(
    job: _Job | _Several = None,
    *,
    wait: Wait = "accepted",
    timeout: _Float = None,
    command_id: _Text = None,
    reason: _Text = None,
) -> CommandRecord | _Records:
    """Finish the current step and end. Arguments and errors as in :func:`save_checkpoint`."""
    return _give(job, "graceful_stop", wait=wait, timeout=timeout, command_id=command_id, reason=reason)


@overload
def save_and_stop(job: _Job = None, **how: "Unpack[_How]") -> CommandRecord: ...
@overload
def save_and_stop(job: _Several, **how: "Unpack[_How]") -> _Records: ...
def save_and_stop(
    job: _Job | _Several = None,
    *,
    wait: Wait = "accepted",
    timeout: _Float = None,
    command_id: _Text = None,
    reason: _Text = None,
) -> CommandRecord | _Records:
    """Save a checkpoint, then end. Arguments and errors as in :func:`save_checkpoint`."""
    return _give(job, "save_and_stop", wait=wait, timeout=timeout, command_id=command_id, reason=reason)


@overload
def abort(job: _Job = None, **how: "Unpack[_How]") -> CommandRecord: ...
@overload
def abort(job: _Several, **how: "Unpack[_How]") -> _Records: ...
def abort(
    job: _Job | _Several = None,
    *,
    wait: Wait = "accepted",
    timeout: _Float = None,
    command_id: _Text = None,
    reason: _Text = None,
) -> CommandRecord | _Records:
    """End at once without saving. Arguments and errors as in :func:`save_checkpoint`."""
    return _give(job, "abort", wait=wait, timeout=timeout, command_id=command_id, reason=reason)


def cleanup(found: list[Job] | None = None) -> list[str]:
    """Remove what dead jobs of this host left, and return their ids; each is judged again before it is removed.

    Args:
        found: what :func:`dead_jobs` returned and the user confirmed; ``None`` removes all dead jobs.
    """
    from ..jobs.cleanup import remove_dead  # only this verb needs it

    root = jobs_dir()
    return [job.job_id for job in (dead_jobs() if found is None else found) if remove_dead(root, job.job_id)]


def dead_jobs() -> list[Job]:
    """Return the jobs that :func:`cleanup` would remove."""
    return [job for job in list_jobs() if job.state == states.JOB_DEAD]
