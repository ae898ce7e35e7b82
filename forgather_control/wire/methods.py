"""The table: each method declared once, with its parameters, its document and its effect.

Floor 1: imports errors only; no torch, no I/O. Dispatch, checks, the CLI's verbs and help, the
OpenRPC document and the README's table are derived from ``TABLE``.

A *command* acts on training: it is queued, every rank runs its effect at the same step, and it
ends in one known state. Its effect sees only a :class:`Loop`, on the training thread. A *query* is
answered at once from a :class:`Job`, on the server thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple, Protocol, cast

from ..errors import InvalidParams, MethodNotFound
from ..version import VERSION
from .records import AWAITED, CommandRecord

Json = Any

#: What a command waits for after it is applied: its checkpoint on disk, the end of training.
Completion = Literal["saved", "ended"]


class Loop(Protocol):
    """What a command may ask of a training loop. Flags only: no I/O, no clock, no rank test.

    Runs on the training thread of every rank, at the same step.
    """

    def request_stop(self) -> None:
        """End after this step; where the trainer saves at all, it saves a last checkpoint."""

    def request_save(self) -> None:
        """Save a checkpoint at this step, whatever the trainer's schedule says."""

    def request_evaluate(self) -> None:
        """Evaluate at this step if the trainer chooses its best model by evaluation."""

    def request_end(self) -> None:
        """End after this step; the last checkpoint is young enough, so none is saved for it."""

    def request_abort(self) -> None:
        """End after this step; no checkpoint is written from now on, the best model is not loaded."""


class Job(Protocol):
    """What a query may ask of a job. Runs on the server thread; must not block.

    What takes other ranks to answer may be an ``dispatcher.Deferred``: nothing here looks into it.
    """

    def ping(self) -> dict[str, Json]: ...
    def status(self) -> Json: ...
    def get_command(self, command_id: str) -> CommandRecord: ...
    def cancel_command(self, command_id: str) -> CommandRecord: ...
    def list_commands(self) -> list[CommandRecord]: ...
    def list_jobs(self) -> list[dict[str, Json]]: ...
    def ranks(self, timeout: float) -> Json: ...
    def stacks(self, timeout: float) -> Json: ...


# Parameters...


class Param(NamedTuple):
    """One named parameter of a method.

    Args:
        check: returns the value to use, or raises ValueError that says what was expected.
        schema: the same rule as JSON Schema, for ``rpc.discover``.
        required: whether a caller must give it; otherwise ``default`` stands.
    """

    name: str
    check: Callable[[Json], Json]
    schema: dict[str, Json]
    doc: str
    required: bool = False
    default: Json = None


def _one_of(value: Json) -> str:
    if value not in AWAITED:
        raise ValueError(" or ".join(f'"{state}"' for state in AWAITED))
    return cast(str, value)


def _seconds(value: Json) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1e9 or math.isnan(value):
        raise ValueError("a number of seconds from 0 to 1e9, or null")
    return float(value)


def _patience(value: Json) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 600:
        raise ValueError("a number of seconds from 0 to 600")
    return float(value)


def _command_id(value: Json) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 128 or not value.isprintable():
        raise ValueError("a string of 1 to 128 printable characters")
    return value


WAIT: Final = Param(
    "wait",
    _one_of,
    {"enum": list(AWAITED), "default": "accepted"},
    "When to answer: once it is queued, once every rank applied it, or once it is over.",
    default="accepted",
)
TIMEOUT: Final = Param(
    "timeout",
    _seconds,
    {"type": ["number", "null"], "minimum": 0, "maximum": 1e9, "default": None},
    "How long to wait, in seconds; null waits as long as the job lives. The command outlives the wait.",
)
PATIENCE: Final = Param(
    "timeout",
    _patience,
    {"type": "number", "minimum": 0, "maximum": 600, "default": 5.0},
    "How long a rank may take to answer, in seconds; one that takes longer is told as silent.",
    default=5.0,
)
NEW_ID: Final = Param(
    "command_id",
    lambda value: None if value is None else _command_id(value),
    {"type": ["string", "null"], "minLength": 1, "maxLength": 128, "default": None},
    "An id of the caller's own: the same id twice is the same command.",
)
TOKEN: Final = Param(
    "token",
    lambda value: value,  # the gate has judged it, or nobody asked for one
    {"type": "string"},
    "The token of the job's endpoint.json.",
    required=True,
)
KNOWN_ID: Final = Param(
    "command_id",
    _command_id,
    {"type": "string", "minLength": 1, "maxLength": 128},
    "The id that the command's record names.",
    required=True,
)


# The table...


class Method(NamedTuple):
    """One row of the table.

    Args:
        run: takes a :class:`Loop` (a command) or a :class:`Job` (a query) first.
        completes: a command is finished when all of these happened; empty for a query.
        verb: its name in the CLI, if it has one.
    """

    name: str
    doc: str
    params: tuple[Param, ...]
    run: Callable[..., Json]
    completes: frozenset[Completion] = frozenset()
    verb: str | None = None

    @property
    def is_command(self) -> bool:
        """Whether it acts on training, rather than being answered at once."""
        return bool(self.completes)

    @property
    def summary(self) -> str:
        """The first sentence of ``doc``, for help and tables."""
        return self.doc.partition("\n\n")[0].replace("\n", " ")

    def bind(self, given: list[Json] | dict[str, Json]) -> dict[str, Json]:
        """Every parameter's value by name, checked, defaults filled in.

        Raises:
            InvalidParams: naming the value, what was expected, and what the method takes.
        """
        names = [param.name for param in self.params]
        if len(given) > len(names) and isinstance(given, list):
            raise InvalidParams(f"{self.name} takes {len(names)} parameters, not {len(given)}", expected=names)
        given = self.by_name(given)
        unknown = sorted(given.keys() - set(names))
        if unknown:
            takes = ", ".join(names) or "no parameters"
            raise InvalidParams(
                f"{self.name} has no parameter {ascii(unknown[0][:64])}; it takes {takes}", expected=names
            )
        return {param.name: self._value(param, given) for param in self.params}

    def by_name(self, given: list[Json] | dict[str, Json]) -> dict[str, Json]:
        """What was given by position, or by name, as by name; unchecked."""
        return dict(zip((param.name for param in self.params), given)) if isinstance(given, list) else given

    def _value(self, param: Param, given: dict[str, Json]) -> Json:
        if param.name not in given:
            if param.required:
                raise InvalidParams(f"{self.name} needs {param.name}", expected=[p.name for p in self.params])
            return param.default
        try:
            return param.check(given[param.name])
        except (TypeError, ValueError) as err:
            seen = ascii(given[param.name])
            raise InvalidParams(
                f"{param.name} must be {err}, not {seen if len(seen) <= 80 else seen[:77] + '...'}",
                parameter=param.name,
            ) from err


TABLE: dict[str, Method] = {}


def lookup(name: str) -> Method:
    """The row of this name.

    Raises:
        MethodNotFound: with the names that exist.
    """
    if name not in TABLE:
        raise MethodNotFound(f"no method {ascii(name[:64])}; rpc.discover lists them", methods=sorted(TABLE))
    return TABLE[name]


def _add(
    name: str, params: tuple[Param, ...], completes: frozenset[Completion], verb: str | None
) -> Callable[[Callable[..., Json]], Callable[..., Json]]:
    def declare(run: Callable[..., Json]) -> Callable[..., Json]:
        if name in TABLE:
            raise ValueError(f"{name} is declared twice")
        doc = "\n".join(line.strip() for line in (run.__doc__ or "").strip().splitlines())
        TABLE[name] = Method(name, doc, params, run, completes, verb)
        return run

    return declare


def command(name: str, *completes: Completion, verb: str) -> Callable[[Callable[[Loop], None]], Callable[[Loop], None]]:
    """Declare a command; its docstring is the help text. Returns the function itself."""
    return _add(name, (WAIT, TIMEOUT, NEW_ID), frozenset(completes), verb)


def query(name: str, *params: Param, verb: str | None = None) -> Callable[[Callable[..., Json]], Callable[..., Json]]:
    """Declare a query; its docstring is the help text. Returns the function itself."""
    return _add(name, params, frozenset(), verb)


@query("ping")
def ping(job: Job) -> Json:
    """Answer who is there: job_id, pid, protocol and version."""
    return job.ping()


@query("authenticate", TOKEN)
def authenticate(job: Job, token: Json) -> Json:
    """Show the token, as the first request of a connection over TCP.

    It is answered as ping. Over the socket, where the kernel says who calls, any token will do.
    """
    return job.ping()


@query("status", verb="status")
def status(job: Job) -> Json:
    """Tell how far the job is: step, epoch, speed, time left, latest metrics, pending commands."""
    return job.status()


@command("save_checkpoint", "saved", verb="save")
def save_checkpoint(loop: Loop) -> None:
    """Save a checkpoint now and train on, whatever save_strategy says.

    If load_best_model_at_end is set, the model is evaluated first.
    """
    loop.request_evaluate()
    loop.request_save()


@command("graceful_stop", "ended", verb="stop")
def graceful_stop(loop: Loop) -> None:
    """Finish the current step and end, with a last checkpoint unless save_strategy is "no"."""
    loop.request_stop()


@command("save_and_stop", "saved", "ended", verb="save-stop")
def save_and_stop(loop: Loop) -> None:
    """Save a checkpoint whatever save_strategy says, then end."""
    loop.request_evaluate()
    loop.request_save()
    loop.request_stop()


@command("abort", "ended", verb="abort")
def abort(loop: Loop) -> None:
    """End at once without saving: what was learnt since the last checkpoint is lost.

    No checkpoint is written after it, whatever the trainer's own schedule says, and the best model
    is not loaded.
    """
    loop.request_abort()


@query("get_command", KNOWN_ID)
def get_command(job: Job, command_id: str) -> Json:
    """Answer the record of one command."""
    return job.get_command(command_id).to_json()


@query("cancel_command", KNOWN_ID)
def cancel_command(job: Job, command_id: str) -> Json:
    """Take back a command that is not applied yet."""
    return job.cancel_command(command_id).to_json()


@query("list_commands")
def list_commands(job: Job) -> Json:
    """Answer the records that the job keeps, oldest first."""
    return [record.to_json() for record in job.list_commands()]


@query("list_jobs", verb="list")
def list_jobs(job: Job) -> Json:
    """List the jobs that this host knows, without their tokens."""
    return job.list_jobs()


@query("ranks", PATIENCE, verb="ranks")
def ranks(job: Job, timeout: float) -> Json:
    """Show every rank: host, pid, step, last step, memory, device; who is behind, and who is gone."""
    return job.ranks(timeout)


@query("stacks", PATIENCE, verb="stacks")
def stacks(job: Job, timeout: float) -> Json:
    """Print the Python stacks of all threads of every rank, also while training hangs.

    The stacks of ranks that do not answer are read from outside, where they run on this host.
    """
    return job.stacks(timeout)


@query("rpc.discover")
def discover(job: Job) -> Json:
    """Describe all methods as an OpenRPC document (https://spec.open-rpc.org)."""
    return {
        "openrpc": "1.3.2",
        "info": {"title": "forgather_control", "version": VERSION},
        "methods": [_describe(method) for method in TABLE.values()],
    }


def _describe(method: Method) -> dict[str, Json]:
    return {
        "name": method.name,
        "summary": method.summary,
        "description": method.doc,
        "params": [
            {"name": p.name, "description": p.doc, "required": p.required, "schema": p.schema} for p in method.params
        ],
        "result": {"name": "record" if method.is_command else "answer", "schema": {}},
    }
