"""The calls of an assistant: each finds its job, makes one connection, and always ends in an answer. Any thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from .. import states
from ..client import api, event_history, many, past, recovery, target, waiting
from ..client.connection import Client
from ..client.target import Target
from ..errors import (
    CommandFailed,
    ControlError,
    DeadlinePassed,
    FindError,
    InternalError,
    JobDead,
    JobNotAnswering,
    MethodNotFound,
    NoSuchJob,
)
from ..wire.builtin import BUILTIN
from ..wire.jsonrpc import Json
from ..wire.methods import COMMON, OWN, Method
from ..wire.records import CommandRecord
from . import answers, tools
from .allowed import ACTING, RUN, Allowed, refusal
from .answers import Answer

_Arguments = dict[str, Json]
_Said = tuple[Json, str | None]
_Call = Callable[[Target, _Arguments], _Said]
#: What ``list`` tells of a job, and of its status.
_FACTS: Final = ("job_id", "state", "host", "pid", "started_at", "world_size", "silent_because")
_PROGRESS: Final = ("global_step", "max_steps", "epoch", "progress", "steps_per_second", "eta_seconds")


class Service:
    """The tools of one server.

    Args:
        allowed: which acting tools there are.
        job: the only job that is served, by its id or its launcher's name; ``None`` for all of the jobs directory.
    """

    def __init__(self, allowed: Allowed, job: str | None = None) -> None:
        self._allowed, self._job = allowed, job

    def tools(self) -> list[tools.Tool]:
        """Return the tools that may be called now; own commands are those of live jobs."""
        found = tools.of_table(self._allowed, self._job)
        documents = self._documents() if RUN in self._allowed.names else {}
        return [*found, *tools.of_scripts(documents, self._allowed, self._job)]

    def _documents(self) -> dict[str, Any]:
        """Return what the jobs that answer describe of themselves, by job."""
        try:
            live = [job.job_id for job in api.list_jobs() if job.state == states.JOB_LIVE]
            served = live if self._job is None else [*{self._only_id()} & {*live}]
            answered = many.jobs(*served).call("rpc.discover") if served else {}
        except ControlError:  # tools are listed without what cannot be read
            return {}
        return {name: answer for name, answer in answered.items() if not isinstance(answer, ControlError)}

    def call(self, name: str, arguments: _Arguments) -> Answer:
        """Carry out a call; whatever happens becomes an answer."""
        given = dict(arguments)
        job = given.pop("job", None)
        job = self._job if job is None else str(job)
        try:
            return self._list(given) if name == "list" else self._call(name, job, given)
        except ControlError as err:
            return answers.of_error(job, err)
        except Exception as err:  # boundary: an assistant gets a sentence, and the server continues
            return answers.of_error(job, InternalError(f"Internal error in {name[:80]}: {type(err).__name__}: {err}"))

    def _call(self, name: str, job: str | None, arguments: _Arguments) -> Answer:
        method = self._method(name)
        self._allowed.check(method, arguments)
        try:
            where = self._target(job)
        except NoSuchJob as err:
            return self._past(method, job, arguments, err)
        try:
            special = _CALLS.get(method)
            value, problem = special(where, arguments) if special else (_ask(method, where, arguments), None)
            return answers.of_value(where.name, value, problem)
        except ControlError as err:
            return answers.of_error(where.name, err)

    def _method(self, name: str) -> str:
        """Return the method behind a tool; CommandRefused, MethodNotFound: there is none, and why."""
        own = name.removeprefix(f"{RUN}_")
        if own != name:
            return OWN + own
        found = next((tool for tool in tools.of_table(self._allowed) if tool.name == name), None)
        if found is not None:
            return found.method
        if name in ACTING:
            raise refusal(name)
        known = [tool.name for tool in self.tools()]
        raise MethodNotFound(f"No tool {ascii(name)[:140]}; {target.suggestion(name, known, ', '.join(known))}")

    # Which job...

    def _target(self, job: str | None) -> Target:
        """Return the job that is meant; NoSuchJob: it is not the one that this server serves."""
        if self._job is None:
            return target.resolve(job)
        only = target.resolve(self._job)
        if job not in (self._job, only.name):
            raise NoSuchJob(f"This server serves the job {only.name} alone, not {ascii(job)[:140]}", job=only.name)
        return only

    def _only_id(self) -> str | None:
        try:
            return self._target(self._job).name
        except FindError:  # it has ended
            return self._job

    def _list(self, arguments: _Arguments) -> Answer:
        given = tools.LIST.bind(arguments)
        rows = (
            [job.to_json() for job in past.all_ended()]
            if given["ended"]
            else [_row(job.to_json()) for job in api.list_jobs()]
        )
        if self._job is not None:
            only = self._only_id()
            rows = [row for row in rows if row["job_id"] == only]
        return answers.of_value(self._job, rows)

    def _past(self, method: str, job: str | None, arguments: _Arguments, err: NoSuchJob) -> Answer:
        """Answer for a run that has ended, where its status, its events or its end are asked for."""
        run = past.find_ended(job) if self._job in (None, job) else None
        if run is None or method not in ("status", tools.EVENTS.name, tools.WAIT.name):
            raise err
        if method == "status":
            return answers.of_value(job, past.to_json(run, err))
        if method == tools.WAIT.name:
            until = tools.WAIT.bind(arguments)["until"]
            outcome = waiting.of_ended(run, waiting.parse(until))
            return answers.of_value(job, {"until": until} | outcome._asdict())
        try:
            return answers.of_value(job, _chosen(event_history.of_ended(run), arguments))
        except (OSError, ValueError) as why:
            raise InternalError(f"The events of job {job} cannot be read: {why}") from why


# How each method is called: the value of its answer, and what there is to say about it...


def _ask(method: str, where: Target, arguments: _Arguments) -> Json:
    """Ask the job, or give it a command."""
    known = BUILTIN.get(method)
    with Client(where) as job:
        if known is None or known.is_command:
            return _give(job, method, arguments)
        return job.call(method, **arguments)


def _give(job: Client, method: str, arguments: _Arguments) -> Json:
    """Give a command and return its record; CommandFailed: it will never be finished."""
    rules = Method(method, "", tuple(tools.bounded(COMMON)), "")
    names = {param.name for param in rules.params}
    common = rules.bind({name: value for name, value in arguments.items() if name in names})
    own = {name: value for name, value in arguments.items() if name not in names}
    send = job.give if method in BUILTIN else job.call  # null may be a value of an own command
    record = send(method, **own, **{name: value for name, value in common.items() if value is not None})
    trouble = CommandRecord.from_json(record).trouble
    if trouble is not None:
        raise CommandFailed(trouble, **record)
    return record


def _status(where: Target, arguments: _Arguments) -> _Said:
    try:
        return _ask("status", where, arguments), None
    except (NoSuchJob, JobDead, JobNotAnswering) as err:
        found = past.find(where.name, err)
        if found is None:
            raise
        return past.to_json(found, err), str(err)


def _events(where: Target, arguments: _Arguments) -> _Said:
    return _chosen(event_history.so_far(where), arguments), None


def _chosen(events: list[event_history.Event], arguments: _Arguments) -> Json:
    given = tools.EVENTS.bind(arguments)
    return [event for event in events if event["seq"] > given["since"]][-given["last"] :]


def _wait(where: Target, arguments: _Arguments) -> _Said:
    given = tools.WAIT.bind(arguments)
    waiter = waiting.Waiter(where, waiting.parse(given["until"]))
    told: dict[str, Json] = {"until": given["until"]}
    try:
        return told | waiter.wait(given["timeout"])._asdict(), None
    except DeadlinePassed as err:  # an answer like any other: it does not hold yet
        return told | {"holds": False, "step": waiter.status.get("global_step"), "timed_out": True}, str(err)


def _ranks(where: Target, arguments: _Arguments) -> _Said:
    view = _view(where, "ranks", arguments)
    return view.rows, str(view.problem) if view.problem else None


def _stacks(where: Target, arguments: _Arguments) -> _Said:
    view = _view(where, "stacks", arguments)
    rows, missing = recovery.read_stacks(view, bool(arguments.get("internal")))
    problems = [str(view.problem)] if view.problem else []
    problems += [f"rank {rank}: {why}" for rank, why in missing.items()]
    return rows, "; ".join(problems) or None


def _view(where: Target, method: str, arguments: _Arguments) -> recovery.RankView:
    assert where.record is not None  # jobs are those of this jobs directory
    return recovery.query(where.record, method, **BUILTIN[method].bind(arguments))


#: The methods that need more than one call and its answer.
_CALLS: Final[dict[str, _Call]] = {
    "status": _status,
    tools.EVENTS.name: _events,
    tools.WAIT.name: _wait,
    "ranks": _ranks,
    "stacks": _stacks,
}


def _row(job: dict[str, Json]) -> dict[str, Json]:
    """Return what ``list`` tells of a job; ``status`` tells the rest."""
    known = job["status"] or job["last_status"] or {}
    facts = {name: job[name] for name in _FACTS}
    return {**facts, "status": known.get("status"), **{name: known.get(name) for name in _PROGRESS}}
