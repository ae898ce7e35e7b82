"""The method table: what a method is, how its parameters are checked, and which methods a job has.

Pure data and checks; callable from any thread. The built-in methods are declared in ``builtin``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, NamedTuple

from .. import states
from ..errors import InvalidParams, MethodNotFound
from . import schemas
from .limits import MAX_REASON, MAX_TIMEOUT
from .schemas import Schema

Json = Any


class Param(NamedTuple):
    """One named parameter of a method; optional if its schema has a default.

    Args:
        schema: the JSON Schema that its value is checked against.
        doc: one sentence for help and ``rpc.discover``.
    """

    name: str
    schema: Schema
    doc: str

    @property
    def required(self) -> bool:
        """Whether a caller must give it."""
        return "default" not in self.schema

    @property
    def default(self) -> Json:
        """The value that stands where a caller gives none."""
        return self.schema.get("default")


WAIT: Final = Param(
    "wait",
    {**schemas.words(*states.AWAITED_STATES), "default": states.COMMAND_ACCEPTED},
    "When to answer: once the command is queued, once every rank applied it, or once it is finished.",
)
TIMEOUT: Final = Param(
    "timeout",
    {"type": ["number", "null"], "minimum": 0, "maximum": MAX_TIMEOUT, "unit": "seconds", "default": None},
    "How long to wait, in seconds; null waits as long as the job lives. The command outlives the wait.",
)
COMMAND_ID: Final = Param(
    "command_id",
    {**schemas.nullable(schemas.COMMAND_ID), "default": None},
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
COMMON_NAMES: Final = frozenset(param.name for param in COMMON)


class Method(NamedTuple):
    """One row of the table.

    Args:
        doc: its help; the first paragraph is the summary.
        params: in positional order; a command's start with ``COMMON``.
        returns: the title of its answer in ``results.json``.
        run: the effect of a command: takes a ``builtin.TrainingLoop`` and the command's own parameters, on the training
            thread of every rank. A query has none: the method of its name in ``training.job_queries`` answers it.
        finishes_when: the events that must all have happened before a command is finished: every rank has
            ``applied`` it, ``saved``, ``evaluated`` or ``reported`` its part, training has ``ended``. Empty: a query.
        needs: what the training loop must be able to do, else the command is refused before any rank receives it.
        verb: its name in the command line, if it has one.
        combine: makes the result out of every rank's value, by rank; without it the result is rank 0's ``value``.
    """

    name: str
    doc: str
    params: tuple[Param, ...]
    returns: str
    run: Callable[..., Json] | None = None
    finishes_when: frozenset[str] = frozenset()
    needs: tuple[str, ...] = ()
    verb: str | None = None
    combine: Callable[[dict[int, Json]], dict[str, Json]] | None = None

    @property
    def is_command(self) -> bool:
        """Whether it acts on training, rather than being answered at once."""
        return bool(self.finishes_when)

    @property
    def result(self) -> Schema:
        """The JSON Schema of its answer."""
        return schemas.results()[self.returns]

    @property
    def rank_report(self) -> str | None:
        """The event that every rank reports for itself, if the command finishes with one."""
        return next(iter(self.finishes_when & states.RANK_REPORTS), None)

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
        """Return what was given by position, or by name, as by name; unchecked."""
        return dict(zip((param.name for param in self.params), given)) if isinstance(given, list) else given

    def _value(self, param: Param, given: dict[str, Json]) -> Json:
        if param.name not in given:
            if param.required:
                raise InvalidParams(f"{self.name} needs {param.name}", expected=[p.name for p in self.params])
            return param.default
        try:
            return schemas.check(param.schema, given[param.name])
        except ValueError as err:
            seen = ascii(given[param.name])
            text = f"{param.name} must be {err}, not {seen if len(seen) <= 80 else seen[:77] + '...'}"
            raise InvalidParams(text, parameter=param.name) from err

    def own_params(self, bound: dict[str, Json] | None = None) -> dict[str, Json]:
        """Return a command's own parameters out of all bound ones; without those, their defaults."""
        values = self.bind({}) if bound is None else bound
        return {name: value for name, value in values.items() if name not in COMMON_NAMES}

    def param(self, name: str) -> Param | None:
        """Return the parameter of this name, or ``None``."""
        return next((param for param in self.params if param.name == name), None)

    def describe(self) -> dict[str, Json]:
        """Return the method object of an OpenRPC document."""
        return {
            "name": self.name,
            "summary": self.summary,
            "description": self.doc,
            "paramStructure": "either",
            "params": [
                {"name": p.name, "description": p.doc, "required": p.required, "schema": p.schema} for p in self.params
            ],
            "result": {"name": "record" if self.is_command else "answer", "schema": self.result},
        }


class MethodTable:
    """The methods of one job: the built-in ones, and those added before its first step.

    Written on the training thread before ``freeze``, read on any thread.
    """

    def __init__(self, methods: Iterable[Method] = ()) -> None:
        self._methods = {method.name: method for method in methods}
        self._built_in = frozenset(self._methods)
        self._frozen = False

    def __iter__(self) -> Iterator[Method]:
        return iter(self._methods.values())

    def __contains__(self, name: object) -> bool:
        return name in self._methods

    def __getitem__(self, name: str) -> Method:
        return self._methods[name]

    def get(self, name: str) -> Method | None:
        """Return the method of this name, or ``None``."""
        return self._methods.get(name)

    def lookup(self, name: str) -> Method:
        """Return the method of this name.

        Raises:
            MethodNotFound: with the names that exist.
        """
        if name not in self._methods:
            known = sorted(self._methods)
            raise MethodNotFound(f"no method {ascii(name[:64])}; rpc.discover lists them", methods=known)
        return self._methods[name]

    def add(self, method: Method) -> None:
        """Add a method.

        Raises:
            ValueError: the name is taken, or the table is frozen.
        """
        if self._frozen:
            raise ValueError(f"{method.name} cannot be added: the methods are fixed at the first step")
        if method.name in self._methods:
            raise ValueError(f"{method.name} is declared twice")
        self._methods[method.name] = method

    def freeze(self) -> None:
        """Refuse all later additions."""
        self._frozen = True

    @property
    def is_frozen(self) -> bool:
        """Whether additions are refused."""
        return self._frozen

    @property
    def commands(self) -> list[str]:
        """The names of all commands."""
        return [method.name for method in self if method.is_command]

    def added(self) -> dict[str, str]:
        """Return a digest of each method that was added, by name; ranks compare them."""
        import hashlib  # not needed at the start of the command line

        return {
            name: hashlib.sha256(json.dumps(method.describe(), sort_keys=True).encode()).hexdigest()[:16]
            for name, method in self._methods.items()
            if name not in self._built_in
        }
