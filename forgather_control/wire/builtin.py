"""The built-in methods. Dispatch, checks, the CLI's verbs and help, and ``rpc.discover`` derive from this table.

A *command* acts on training: it is queued, every rank runs its effect at the same step, and it ends in one known
state. A *query* is answered at once on the server thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from . import schemas
from .limits import MAX_RANK_TIMEOUT
from .methods import COMMON, Method, MethodTable, Param
from .records import CommandRecord

Json = Any


class TrainingLoop(Protocol):
    """What a command may ask of a training loop. On the training thread of every rank, at the same step.

    The requests only set flags, which the integration carries out: no I/O, no clock, no rank test.
    """

    def cannot(self, need: str, params: dict[str, Json]) -> str | None:
        """Say why this run cannot do what a command needs; ``None`` if it can. On the server thread: reads only."""

    def request_stop(self) -> None:
        """End after this step; save a last checkpoint where the trainer saves at all."""

    def request_save(self, evaluate: Json) -> None:
        """Save a checkpoint at this step, whatever the trainer's schedule says; ``evaluate`` is "auto" or a bool."""

    def request_evaluate(self) -> None:
        """Evaluate at this step."""

    def request_end(self) -> None:
        """End after this step without saving, because the last checkpoint is young enough."""

    def request_abort(self) -> None:
        """End after this step; no checkpoint is written from now on, the best model is not loaded."""


class JobQueries(Protocol):
    """What a query may ask of a job. On the server thread; must not block.

    An answer that needs other ranks may be a ``dispatcher.Deferred``, that of ``subscribe`` is a ``Subscription``;
    the table passes them on unread.
    """

    methods: MethodTable

    def ping(self) -> dict[str, Json]: ...
    def status(self) -> Json: ...
    def get_command(self, command_id: str) -> CommandRecord: ...
    def cancel_command(self, command_id: str) -> CommandRecord: ...
    def list_commands(self) -> list[CommandRecord]: ...
    def list_jobs(self) -> Json: ...
    def ranks(self, timeout: float) -> Json: ...
    def stacks(self, timeout: float) -> Json: ...
    def subscribe(self, since: int | None, kinds: list[str] | None) -> Json: ...
    def unsubscribe(self) -> Json: ...


#: All built-in methods; a job's table starts as a copy.
BUILTIN: Final = MethodTable()

_Run = Callable[..., Json]


def _doc(run: _Run) -> str:
    return "\n".join(line.strip() for line in (run.__doc__ or "").strip().splitlines())


def command(
    name: str, *params: Param, finishes_when: set[str], needs: tuple[str, ...], verb: str
) -> Callable[[_Run], _Run]:
    """Declare a command; its docstring is the help text. Returns the function itself."""

    def declare(run: _Run) -> _Run:
        every = (*COMMON, *params)
        row = Method(name, _doc(run), every, schemas.COMMAND_RECORD, run, frozenset(finishes_when), needs, verb)
        BUILTIN.add(row)
        return run

    return declare


def query(name: str, *params: Param, result: schemas.Schema, verb: str | None = None) -> Callable[[_Run], _Run]:
    """Declare a query; its docstring is the help text. Returns the function itself."""

    def declare(run: _Run) -> _Run:
        BUILTIN.add(Method(name, _doc(run), params, result, run, verb=verb))
        return run

    return declare


_RANK_TIMEOUT: Final = Param(
    "timeout",
    {"type": "number", "minimum": 0, "maximum": MAX_RANK_TIMEOUT, "unit": "seconds", "default": 5.0},
    "How long a rank may take to answer, in seconds; one that takes longer is reported as silent.",
)
_TOKEN: Final = Param("token", {"type": ["string", "null"]}, "The token of the job's endpoint.json.")
_KNOWN_ID: Final = Param("command_id", schemas.COMMAND_ID, "The id in the command's record.")
_SINCE: Final = Param(
    "since",
    {"type": ["integer", "null"], "minimum": 0, "default": None},
    "Send the events after this number again, as far as they are kept; null starts with the next event.",
)
_KINDS: Final = Param(
    "kinds",
    {"type": ["array", "null"], "items": schemas.EVENT_KIND, "default": None},
    "Which kinds of events to send; null sends all.",
)
_EVALUATE: Final = Param(
    "evaluate",
    {"enum": ["auto", True, False], "type": ["string", "boolean"], "default": "auto"},
    'Evaluate before saving: "auto" does so if load_best_model_at_end needs it and nothing counts evaluations.',
)


@query("ping", result=schemas.PING)
def ping(job: JobQueries) -> Json:
    """Answer which job this is: job_id, pid, protocol, version and the time of its clock."""
    return job.ping()


@query("authenticate", _TOKEN, result=schemas.PING)
def authenticate(job: JobQueries, token: Json) -> Json:
    """Show the token, as the first request of a connection over TCP.

    The answer is that of ping. Over the Unix socket, where the kernel identifies the caller, any token passes.
    """
    return job.ping()


@query("status", result=schemas.STATUS, verb="status")
def status(job: JobQueries) -> Json:
    """Show how far the job is: step, epoch, speed, time left, latest metrics, pending commands."""
    return job.status()


@command("save_checkpoint", _EVALUATE, finishes_when={"saved"}, needs=("save",), verb="save")
def save_checkpoint(loop: TrainingLoop, evaluate: Json) -> None:
    """Save a checkpoint now and continue training, whatever save_strategy says."""
    loop.request_save(evaluate)


@command("graceful_stop", finishes_when={"ended"}, needs=("stop",), verb="stop")
def graceful_stop(loop: TrainingLoop) -> None:
    """Finish the current step and end, with a last checkpoint unless save_strategy is "no"."""
    loop.request_stop()


@command("save_and_stop", _EVALUATE, finishes_when={"saved", "ended"}, needs=("save", "stop"), verb="save-stop")
def save_and_stop(loop: TrainingLoop, evaluate: Json) -> None:
    """Save a checkpoint whatever save_strategy says, then end."""
    loop.request_save(evaluate)
    loop.request_stop()


@command("abort", finishes_when={"ended"}, needs=("abort",), verb="abort")
def abort(loop: TrainingLoop) -> None:
    """End at once without saving: progress since the last checkpoint is lost.

    No checkpoint is written after it, whatever the trainer's own schedule says, and the best model
    is not loaded.
    """
    loop.request_abort()


@query("get_command", _KNOWN_ID, result=schemas.COMMAND_RECORD)
def get_command(job: JobQueries, command_id: str) -> Json:
    """Answer the record of one command."""
    return job.get_command(command_id).to_json()


@query("cancel_command", _KNOWN_ID, result=schemas.COMMAND_RECORD, verb="cancel")
def cancel_command(job: JobQueries, command_id: str) -> Json:
    """Cancel a command that is not applied yet."""
    return job.cancel_command(command_id).to_json()


@query("list_commands", result=schemas.array(schemas.COMMAND_RECORD, "CommandRecords"), verb="commands")
def list_commands(job: JobQueries) -> Json:
    """Answer the records that the job keeps, oldest first."""
    return [record.to_json() for record in job.list_commands()]


@query("list_jobs", result=schemas.LISTED_JOBS, verb="list")
def list_jobs(job: JobQueries) -> Json:
    """List the jobs in this host's jobs directory, without their tokens."""
    return job.list_jobs()


@query("ranks", _RANK_TIMEOUT, result=schemas.RANKS, verb="ranks")
def ranks(job: JobQueries, timeout: float) -> Json:
    """Show every rank: host, pid, step, last step, memory, device; which are behind, and which are gone."""
    return job.ranks(timeout)


@query("stacks", _RANK_TIMEOUT, result=schemas.STACKS, verb="stacks")
def stacks(job: JobQueries, timeout: float) -> Json:
    """Print the Python stacks of all threads of every rank, also while training hangs.

    The stacks of ranks that do not answer are read from outside, where they run on this host.
    """
    return job.stacks(timeout)


@query("subscribe", _SINCE, _KINDS, result=schemas.SUBSCRIBED)
def subscribe(job: JobQueries, since: int | None, kinds: list[str] | None) -> Json:
    """Send events as notifications on this connection, until unsubscribe or the end of the job."""
    return job.subscribe(since, kinds)


@query("unsubscribe", result=schemas.UNSUBSCRIBED)
def unsubscribe(job: JobQueries) -> Json:
    """Stop sending events on this connection."""
    return job.unsubscribe()
