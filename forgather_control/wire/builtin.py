"""The built-in methods. Dispatch, checks, the CLI's verbs and help, and ``rpc.discover`` derive from this table.

A *command* acts on training: it is queued, every rank runs its effect at the same step, and it ends in one known
state. A *query* is answered at once on the server thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from .. import states
from ..errors import CommandFailed
from . import schemas
from .jsonrpc import Json
from .limits import MAX_CONDITION, MAX_POINTS, MAX_RANK_TIMEOUT, MAX_TIMEOUT
from .methods import Method, MethodTable, Param, command_params

if TYPE_CHECKING:
    from concurrent.futures import Future


class TrainingLoop(Protocol):
    """What a command may ask of a training loop. On the training thread of every rank, at the same step.

    The requests only set flags, which the integration carries out: no I/O, no clock, no rank test.
    """

    #: Why this run saves nothing at a stop; ``None`` if it does. Read on the server thread.
    no_stop_save: str | None

    def cannot(self, need: str, params: dict[str, Json]) -> str | None:
        """Say why this run cannot do what a command needs; ``None`` if it can. On the server thread: reads only."""

    def request_stop(self) -> None:
        """End after this step; save a last checkpoint where the trainer saves at all."""

    def request_save(self, evaluate: Json) -> None:
        """Save a checkpoint at this step, whatever the trainer's schedule says; ``evaluate`` is "auto" or a bool."""

    def request_evaluate(self, counted: bool) -> None:
        """Evaluate at this step; ``counted``: even where something counts evaluations."""

    def request_end(self) -> None:
        """End after this step without saving, because the last checkpoint is young enough."""

    def request_abort(self) -> None:
        """End after this step; no checkpoint is written from now on, the best model is not loaded."""

    def request_pause(self, seconds: float | None) -> None:
        """Hold at this step until ``request_resume``, at most that long."""

    def request_resume(self) -> None:
        """Continue training if it is paused."""

    def request_profile(self, steps: int) -> Future[Json]:
        """Record the next steps; the future has the path, the size and the cost of the trace."""

    def change_settings(self, changes: dict[str, Json]) -> Future[Json]:
        """Put values in force; the future has what was, is, and is effective after the next step, by name."""


#: All built-in methods; a job's table starts as a copy.
BUILTIN: Final = MethodTable({})


def _command(
    name: str, *params: Param, finishes_when: set[str], needs: tuple[str, ...], verb: str, **more: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a command; the docstring of its effect is the help text."""

    def declare(run: Callable[..., Any]) -> Callable[..., Any]:
        doc = "\n".join(line.strip() for line in (run.__doc__ or "").strip().splitlines())
        every, events = command_params(params), frozenset(finishes_when)
        BUILTIN.add(Method(name, doc, every, "CommandRecord", run, events, needs, verb, **more))
        return run

    return declare


def _query(name: str, returns: str, doc: str, *params: Param, verb: str | None = None, reads_only: bool = True) -> None:
    BUILTIN.add(Method(name, doc, params, returns, verb=verb, reads_only=reads_only))


# Commands...

_EVALUATE: Final = Param(
    "evaluate",
    {"enum": ["auto", True, False], "type": ["string", "boolean"], "default": "auto"},
    'Evaluate before saving: "auto" does so if load_best_model_at_end needs it and nothing counts evaluations.',
)
_COUNTED: Final = Param(
    "counted",
    {"type": "boolean", "default": False},
    "Evaluate even if something counts evaluations, such as early stopping; it counts this one, too.",
)


@_command("save_checkpoint", _EVALUATE, finishes_when={"saved"}, needs=("save",), verb="save", is_harmless=True)
def save_checkpoint(loop: TrainingLoop, evaluate: Json) -> None:
    """Save a checkpoint now and continue training, whatever save_strategy says."""
    loop.request_save(evaluate)


@_command("graceful_stop", finishes_when={"ended"}, needs=("stop",), verb="stop")
def graceful_stop(loop: TrainingLoop) -> None:
    """Finish the current step and end, with a last checkpoint unless save_strategy is "no".

    Where nothing will be saved, stop_saves is false in status, and the answer has a note.
    """
    loop.request_stop()


@_command("save_and_stop", _EVALUATE, finishes_when={"saved", "ended"}, needs=("save", "stop"), verb="save-stop")
def save_and_stop(loop: TrainingLoop, evaluate: Json) -> None:
    """Save a checkpoint whatever save_strategy says, then end."""
    loop.request_save(evaluate)
    loop.request_stop()


@_command("abort", finishes_when={"ended"}, needs=("abort",), verb="abort")
def abort(loop: TrainingLoop) -> None:
    """End at once without saving: progress since the last checkpoint is lost.

    No checkpoint is written after it, whatever the trainer's own schedule says, and the best model
    is not loaded.
    """
    loop.request_abort()


@_command("evaluate", _COUNTED, finishes_when={"evaluated"}, needs=("evaluate",), verb="evaluate", is_harmless=True)
def evaluate(loop: TrainingLoop, counted: bool) -> None:
    """Evaluate now, show the metrics, and continue training as if nothing had happened.

    Refused where something counts evaluations, such as early stopping, unless counted is true.
    """
    loop.request_evaluate(counted)


_SECONDS: Final = Param(
    "seconds",
    {"type": ["number", "null"], "minimum": 0, "maximum": MAX_TIMEOUT, "unit": "seconds", "default": None},
    "Resume by itself after so many seconds; null pauses until resume.",
    "--for",
)
_CHANGES: Final = Param(
    "changes",
    {"type": "object"},
    'The values by name: numbers, booleans, texts, or factors such as "x0.5".',
)


@_command("pause", _SECONDS, finishes_when={"applied"}, needs=("pause",), verb="pause", is_harmless=True)
def pause(loop: TrainingLoop, seconds: float | None) -> None:
    """Hold all ranks at the end of one step until resume; all other commands still work.

    Pausing a paused job changes nothing but the time after which it resumes by itself. Refused where ranks poll.
    """
    loop.request_pause(seconds)


@_command("resume", finishes_when={"applied"}, needs=(), verb="resume", is_harmless=True)
def resume(loop: TrainingLoop) -> None:
    """Continue a paused job; without effect on one that is not paused."""
    loop.request_resume()


def _same_settings(values: dict[int, Any]) -> dict[str, Any]:
    """Return what is in force on all ranks.

    Raises:
        CommandFailed: the ranks disagree.
    """
    first = values[min(values)]
    for name, value in first.items():
        found = {rank: each[name]["effective"] for rank, each in values.items()}
        if any(effective != value["effective"] for effective in found.values()):
            texts = ", ".join(f"{effective} on rank {rank}" for rank, effective in found.items())
            raise CommandFailed(f"the ranks disagree: {name} is {texts}")
    return dict(first)


@_command(
    "change_settings",
    _CHANGES,
    finishes_when={"reported"},
    needs=("settings",),
    verb="set",
    combine=_same_settings,
    is_atomic=True,
)
def change_settings(loop: TrainingLoop, changes: dict[str, Json]) -> Future[Json]:
    """Change settings of the job on all ranks at one step, all or none; without a value, list them.

    A value that does not fit is refused, never clamped. The result has for each name what was in force (old), what was
    put in force (new), and what is after the next step of the optimizer (effective).
    """
    return loop.change_settings(changes)


_STEPS: Final = Param(
    "steps",
    {"type": "integer", "minimum": 1, "maximum": 50, "unit": "steps", "default": 5},
    "How many steps to record.",
)


def _profile_of_all(values: dict[int, Any]) -> dict[str, Any]:
    """Return one path per rank, and the operations of rank 0."""
    ranks = sorted(values)
    first = values[ranks[0]]
    note = {"note": first["note"]} if first["note"] else {}
    known = {"paths": [values[rank]["path"] for rank in ranks], "sizes": [values[rank]["bytes"] for rank in ranks]}
    lost = max(value["seconds_lost"] for value in values.values())
    return {**known, "steps": first["steps"], "seconds_lost": lost, "operations": first["operations"], **note}


@_command(
    "profile",
    _STEPS,
    finishes_when={"reported"},
    needs=("profile",),
    verb="profile",
    combine=_profile_of_all,
    is_harmless=True,
)
def profile(loop: TrainingLoop, steps: int) -> Future[Json]:
    """Record the next steps of all ranks with torch's profiler, and write one trace for each rank.

    The result has the paths of the traces, the ten longest operations of rank 0, and the seconds that training lost.
    Refused while another profile is under way.
    """
    return loop.request_profile(steps)


# Queries...

_KNOWN_ID: Final = Param("command_id", schemas.COMMAND_ID, "The id in the command's record.")
_RANK_TIMEOUT: Final = Param(
    "timeout",
    {"type": "number", "minimum": 0, "maximum": MAX_RANK_TIMEOUT, "unit": "seconds", "default": 5.0},
    "How long a rank may take to answer, in seconds; one that takes longer is reported as silent.",
)
_INTERNAL: Final = Param(
    "internal",
    {"type": "boolean", "default": False},
    "Show the threads of this control, too; their names begin with forgather-.",
)
_SINCE: Final = Param(
    "since",
    {"type": ["integer", "null"], "minimum": 0, "default": None},
    "Send the events after this number again, as far as they are kept; null starts with the next event.",
)
_KINDS: Final = Param(
    "kinds",
    {"type": ["array", "null"], "items": {"type": "string", "enum": [*states.EVENT_KINDS]}, "default": None},
    "Which kinds of events to send; null sends all.",
)

_query("ping", "JobIdentity", "Answer which job this is: job_id, pid, protocol, version and the time of its clock.")
_query(
    "authenticate",
    "JobIdentity",
    """Show the token, as the first request of a connection over TCP.

The answer is that of ping. Over the Unix socket, where the kernel identifies the caller, any token passes.""",
    Param("token", {"type": ["string", "null"]}, "The token of the job's endpoint.json."),
)
_query(
    "status",
    "JobStatus",
    "Show how far the job is: step, epoch, speed, time left, latest metrics, pending commands.",
    verb="status",
)
_query("get_command", "CommandRecord", "Answer the record of one command.", _KNOWN_ID)
_query(
    "cancel_command",
    "CommandRecord",
    "Cancel a command that is not applied yet.",
    _KNOWN_ID,
    verb="cancel",
    reads_only=False,
)
_query("list_commands", "CommandRecords", "List the commands that the job keeps, oldest first.", verb="commands")
_WHEN: Final = Param(
    "when",
    {"type": "string", "minLength": 1, "maxLength": MAX_CONDITION},
    "A condition such as eval_loss > 2.0 for 3; its names are metrics that are logged, step, epoch and hours.",
)
_DO: Final = Param("do", {"type": "string", "minLength": 1}, "The command to give, by the name of its method.")
_DO_PARAMS: Final = Param("params", {"type": "object", "default": {}}, "The command's own parameters, and its reason.")
_NOT_BEFORE: Final = Param(
    "not_before",
    {"type": ["integer", "null"], "minimum": 0, "unit": "steps", "default": None},
    "The step before which the rule does nothing.",
)
_query(
    "add_rule",
    "Rule",
    """Give a command once, as soon as a condition is true; without a condition, list the rules.

The rule lives in the job: it needs no client, and ends with the job.""",
    *(_WHEN, _DO, _DO_PARAMS, _NOT_BEFORE),
    verb="when",
    reads_only=False,
)
_RULE_ID: Final = Param("id", {"type": "integer"}, "Its number, as list_rules shows it.")
_query("remove_rule", "Rule", "Remove a rule.", _RULE_ID, reads_only=False)
_query("list_rules", "Rules", "List the rules of the job, those that have fired, too.")
_query(
    "list_settings",
    "ListedSettings",
    "List the settings that change_settings can change, with the values that are in force.",
)
_NAMES: Final = Param(
    "names",
    {"type": ["array", "null"], "items": {"type": "string"}, "default": None},
    "Of which metrics; null: of all.",
)
_POINTS: Final = Param(
    "points",
    {"type": "integer", "minimum": 1, "maximum": MAX_POINTS, "default": 200},
    "How many points of each metric to answer at most.",
)
_query(
    "metrics_history",
    "MetricPointsByName",
    """Answer the values of each metric over the whole run, each as step, time and value.

Numbers of the host only: values that were logged as tensors of a device are left out.""",
    *(_NAMES, _POINTS),
)
_query("list_jobs", "ListedJobs", "List the jobs in this host's jobs directory, without their tokens.", verb="list")
_query(
    "ranks",
    "ListedRanks",
    "Show every rank: host, pid, step, last step, memory, device; which are behind, and which are gone.",
    _RANK_TIMEOUT,
    verb="ranks",
)
_query(
    "stacks",
    "ListedStacks",
    """Print the Python stacks of the threads of every rank, also while training hangs.

The stacks of ranks that do not answer are read from outside, where they run on this host.""",
    _RANK_TIMEOUT,
    _INTERNAL,
    verb="stacks",
)
_query(
    "subscribe",
    "Subscribed",
    "Send events as notifications on this connection, until unsubscribe or the end of the job.",
    _SINCE,
    _KINDS,
)
_query("unsubscribe", "Unsubscribed", "Stop sending events on this connection.")
BUILTIN.frozen = True
