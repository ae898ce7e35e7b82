"""The method table: what a method is, how its parameters are checked, and which methods a job has.

Pure data and checks; callable from any thread. The built-in methods are declared in ``builtin``.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple

from .. import states
from ..errors import InvalidParams, MethodNotFound
from ..schema import shown
from . import schemas
from .jsonrpc import Json
from .limits import MAX_REASON, MAX_TIMEOUT
from .schemas import Schema


class Param(NamedTuple):
    """One named parameter of a method; optional if its schema has a default."""

    name: str
    schema: Schema  #: What its value is checked against.
    doc: str  #: One sentence for help and ``rpc.discover``.
    option: str | None = None  #: Its option in the command line, if that has another name.

    @property
    def required(self) -> bool:
        """Whether a caller must give it."""
        return "default" not in self.schema

    @property
    def default(self) -> Json:
        """Its value where a caller gives none."""
        return self.schema.get("default")


WAIT: Final = Param(
    "wait",
    {"type": "string", "enum": [*states.AWAITED_STATES], "default": states.COMMAND_ACCEPTED},
    "When to answer: once the command is queued, once every rank applied it, or once it is finished.",
)
TIMEOUT: Final = Param(
    "timeout",
    {"type": ["number", "null"], "minimum": 0, "maximum": MAX_TIMEOUT, "unit": "seconds", "default": None},
    "How long to wait, in seconds; null waits as long as the job lives. The command outlives the wait.",
)
COMMAND_ID: Final = Param(
    "command_id",
    {**schemas.COMMAND_ID, "type": ["string", "null"], "default": None},
    "An id that the caller chooses: the same id twice is the same command.",
)
EXPIRES_AT: Final = Param(
    "expires_at",
    {"type": ["number", "null"], "minimum": 0, "unit": "seconds since the epoch", "default": None},
    "When the request expires, in seconds since the epoch on the job's clock; read later, it is refused.",
)
REASON: Final = Param(
    "reason",
    {"type": ["string", "null"], "minLength": 1, "maxLength": MAX_REASON, "default": None},
    "Why the command is given; kept in its record.",
)
#: The parameters that every command takes: they concern the caller's wait and the record, not the effect.
COMMON: Final = (WAIT, TIMEOUT, COMMAND_ID, EXPIRES_AT, REASON)
#: Begins the names of the methods that a training script adds.
OWN: Final = "user."
COMMON_NAMES: Final = frozenset(param.name for param in COMMON)


def command_params(own: Iterable[Param]) -> tuple[Param, ...]:
    """Return all parameters of a command in positional order: its required ones, ``COMMON``, its optional ones."""
    own = tuple(own)
    return (*(p for p in own if p.required), *COMMON, *(p for p in own if not p.required))


class Method(NamedTuple):
    """One row of the table."""

    name: str
    doc: str  #: Its help; the first paragraph is the summary.
    params: tuple[Param, ...]  #: In positional order; a command's as ``command_params`` orders them.
    returns: str  #: The title of its answer in ``results.json``.
    #: The effect of a command, on the training thread of every rank: takes a ``builtin.TrainingLoop`` and the command's
    #: own parameters; returns a JSON value, or a future for one that is reported later. A query has none: the method of
    #: its name in ``training.job_queries`` answers it.
    run: Callable[..., Json] | None = None
    #: The events that must all have happened before a command is finished: every rank has ``applied`` it, ``saved``,
    #: ``evaluated`` or ``reported`` its part, training has ``ended``. Empty: a query.
    finishes_when: frozenset[str] = frozenset()
    #: What the training loop must be able to do, else the command is refused before any rank receives it.
    needs: tuple[str, ...] = ()
    verb: str | None = None  #: Its name in the command line, if it has one.
    #: Makes the result out of every rank's value, by rank; without it the result is rank 0's ``value``.
    combine: Callable[[dict[int, Json]], dict[str, Json]] | None = None
    #: Whether all ranks carry it out or none: where one cannot, the others undo it before their next step. Its effect
    #: returns a ``training.settings.Change``.
    is_atomic: bool = False
    #: Whether it changes nothing. Cautious by default, as is the next: assistants may always call what only reads.
    reads_only: bool = False
    #: Whether it ends, changes and takes back nothing: it adds, such as a checkpoint, or delays.
    is_harmless: bool = False

    @property
    def is_command(self) -> bool:
        """Whether it acts on training, rather than being answered at once."""
        return bool(self.finishes_when)

    @property
    def ends_unsaved(self) -> bool:
        """Whether it ends training and leaves it to the trainer whether to save."""
        return "stop" in self.needs and "save" not in self.needs

    @property
    def rank_report(self) -> str | None:
        """The event that every rank reports for itself, if the command finishes with one."""
        return next((event for event in states.RANK_REPORTS if event in self.finishes_when), None)

    @property
    def summary(self) -> str:
        """The first paragraph of ``doc``, for help and tables."""
        return self.doc.partition("\n\n")[0].replace("\n", " ")

    def bind(self, given: list[Json] | dict[str, Json]) -> dict[str, Json]:
        """Return every parameter's value by name, checked, with defaults filled in.

        Raises:
            InvalidParams: names the value, what was expected, and what the method takes.
        """
        names = [param.name for param in self.params]
        if isinstance(given, list):
            if len(given) > len(names):
                raise InvalidParams(f"{self.name} takes {len(names)} parameters, not {len(given)}", expected=names)
            given = dict(zip(names, given))
        unknown = sorted(given.keys() - set(names))
        if unknown:
            takes = ", ".join(names) or "no parameters"
            text = f"{self.name} has no parameter {ascii(unknown[0][:64])}; it takes {takes}"
            raise InvalidParams(text, expected=names)
        return {param.name: self._value(param, given, names) for param in self.params}

    def _value(self, param: Param, given: dict[str, Json], names: list[str]) -> Json:
        if param.name not in given:
            if param.required:
                raise InvalidParams(f"{self.name} needs {param.name}", expected=names)
            return param.default
        try:
            return schemas.check(param.schema, given[param.name])
        except ValueError as err:
            text = f"{param.name} must be {err}, not {shown(given[param.name])}"
            raise InvalidParams(text, parameter=param.name) from err

    def own_params(self, bound: dict[str, Json]) -> dict[str, Json]:
        """Return a command's own parameters out of all bound ones."""
        return {name: value for name, value in bound.items() if name not in COMMON_NAMES}

    def describe(self) -> dict[str, Json]:
        """Return the method object of an OpenRPC document."""
        params = [
            {"name": p.name, "description": p.doc, "required": p.required, "schema": p.schema} for p in self.params
        ]
        return {
            "name": self.name,
            "summary": self.summary,
            "description": self.doc,
            "paramStructure": "either",
            "params": params,
            "result": {"name": "record" if self.is_command else "answer", "schema": schemas.results()[self.returns]},
        }


class MethodTable(dict[str, Method]):
    """The methods of one job by name: the built-in ones, and those added before its first step.

    Written on the training thread before it is frozen, read on any thread. ``table[name]`` raises MethodNotFound.
    """

    def __init__(self, built_in: Mapping[str, Method]) -> None:
        super().__init__(built_in)
        self._built_in = frozenset(built_in)
        #: Whether additions are refused.
        self.frozen = False

    def __missing__(self, name: str) -> Method:
        raise MethodNotFound(f"no method {ascii(name[:64])}; rpc.discover lists them", methods=sorted(self))

    def add(self, method: Method) -> None:
        """Add a method.

        Raises:
            ValueError: the name is taken, or the table is frozen.
        """
        if self.frozen:
            raise ValueError(f"{method.name} cannot be added: the methods are fixed at the first step")
        if method.name in self:
            raise ValueError(f"{method.name} is declared twice")
        self[method.name] = method

    def added(self) -> dict[str, str]:
        """Return a digest of each method that was added, by name; ranks compare them."""
        import hashlib  # not needed at the start of the command line

        added = {name: json.dumps(self[name].describe(), sort_keys=True) for name in self if name not in self._built_in}
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in added.items()}
