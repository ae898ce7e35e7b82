"""What is left in this jobs directory of a job that does not answer: the last status it wrote, or that of its end."""

from __future__ import annotations

from typing import Any

from ..errors import ControlError, InternalError, NoSuchJob
from ..jobs import ended, event_log, last_status
from ..jobs.ended import EndedJob
from ..jobs.last_status import LastStatus
from ..jobs.record import jobs_dir
from ..wire import jsonrpc
from ..wire.jsonrpc import Json
from . import limits


def find(job: str | None, err: ControlError) -> LastStatus | EndedJob | None:
    """Return what is left of a job: of its present run, else of the last one that has ended.

    Args:
        job: as the user named it.
        err: why it did not answer.
    """
    name = err.data.get("job") or job
    last = None if isinstance(err, NoSuchJob) else last_status.read(jobs_dir(), str(name))
    return last or find_ended(job)


def find_ended(job: str | None) -> EndedJob | None:
    """Return the last run of a job that has ended; ``None`` if none is kept, or no job is named."""
    return None if job is None else ended.find(jobs_dir(), job)


def find_ended_over_ssh(host: str, job: str) -> EndedJob:
    """Return the last run of a job that has ended on another host; NoSuchJob: none is kept there."""
    from . import ssh

    answer = jsonrpc.parse_json(ssh.read(host, limits.CALL_TIMEOUT, "status", "--json", job)[0])
    if not isinstance(answer, dict) or "ended" not in answer:
        raise InternalError(f"{host} sent no status of a job that has ended")
    run = EndedJob.from_json(answer.pop("ended"))
    return run._replace(status=answer or None)


def events_over_ssh(host: str, job: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the events of a job that has ended on another host, and what is said there of its end."""
    from . import ssh

    text, complaints = ssh.read(host, limits.CALL_TIMEOUT, "events", "--json", job)
    events: list[Any] = [jsonrpc.parse_json(line) for line in text.splitlines()]
    if not all(map(event_log.is_event, events)):
        raise InternalError(f"{host} sent an event without a number or a time")
    return events, complaints


def all_ended() -> list[EndedJob]:
    """Return the last jobs that have ended, the last one first."""
    return ended.scan(jobs_dir())


def to_json(found: LastStatus | EndedJob, err: ControlError) -> dict[str, Json]:
    """Return it as the JSON that ``status --json`` prints."""
    if isinstance(found, EndedJob):
        return {**(found.status or {}), "ended": found.to_json()}
    return {**last_known(found), "error": jsonrpc.error_object(err)}


def last_known(last: LastStatus) -> dict[str, Json]:
    """Return what a job wrote last, with the time of that."""
    return {**last.status, "last_known_at": last.written_at}
