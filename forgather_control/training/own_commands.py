"""Commands of the training script: its functions as methods ``user.NAME``, with parameters from the signature.

A function runs as if the loop called it at the end of a step: on the training thread of every rank, after the same
step. What it does to the model, to random numbers or by collectives is what the script wants.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

from .. import states
from ..errors import InvalidParams
from ..schema import shown
from ..wire import schemas
from ..wire.builtin import TrainingLoop
from ..wire.methods import COMMON, COMMON_NAMES, OWN, Method, Param
from ..wire.schemas import Schema
from . import outcomes, script

#: The first parameter that receives the trainer's objects.
_CONTEXT: Final = "context"
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SCALARS: Final[dict[Any, str]] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_TYPES: Final = "int, float, str, bool, Literal, a list of one of them, or one of all these | None"
#: A parameter in a docstring: ``name: text`` or ``name (type): text``, perhaps after ``:param``.
_DOCUMENTED: Final = r"^[ \t]*(?::param )?{}(?: \([^)]*\))?:[ \t]*(\S.*)$"


class Context:
    """The objects of the trainer by name, as far as the framework has them, and ``step``, the last finished step.

    Hugging Face's callbacks get ``model optimizer lr_scheduler state args trainer`` and more, Lightning's ``trainer``
    and ``model``. In a plain loop there is what the loop has told its job; a function there uses the loop's variables.
    """

    def __init__(self, objects: dict[str, Any]) -> None:
        self.__dict__.update(objects)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this run has no {name} to offer; it has {', '.join(sorted(self.__dict__))}")


class OwnCommand(NamedTuple):
    """A function of the script that clients can run."""

    name: str  #: Of the method.
    function: Callable[..., Any]
    doc: str
    params: tuple[Param, ...]
    takes_context: bool

    def method(self, context: Callable[[], Context], is_main: Callable[[], bool]) -> Method:
        """Return the row of a job's method table; its result is rank 0's value alone."""

        def run(loop: TrainingLoop, /, **params: Any) -> Any:
            given = copy.deepcopy(params)  # the record keeps them, and defaults are used again
            if self.takes_context:
                given[_CONTEXT] = context()
            value = script.call(self.name, self.function, **given)
            return outcomes.value(self.name, value) if is_main() else None

        finishes_when = frozenset({states.WHEN_APPLIED})
        return Method(self.name, self.doc, (*COMMON, *self.params), "CommandRecord", run, finishes_when)


def parse_all(functions: Iterable[Callable[..., Any]]) -> list[OwnCommand]:
    """Return the commands that these functions are; InvalidParams: as ``parse``, or two have one name."""
    if not isinstance(functions, Sequence) or isinstance(functions, str):
        text = f"commands must be a list of functions, not {shown(functions)}"
        raise InvalidParams(text, parameter="commands")
    found: list[OwnCommand] = []
    for function in functions:
        found.append(unique(parse(function), found))
    return found


def unique(own: OwnCommand, others: Iterable[OwnCommand]) -> OwnCommand:
    """Return a command; InvalidParams: one of the others has its name."""
    if any(other.name == own.name for other in others):
        raise InvalidParams(f"{own.name} is registered twice; give one of the functions another name")
    return own


def parse(function: Callable[..., Any], name: str | None = None) -> OwnCommand:
    """Return the command that a function is.

    Args:
        name: behind ``user.``; ``None``: the function's.

    Raises:
        InvalidParams: it is no function, or its name or a parameter cannot be called from outside; and what to change.
    """
    if isinstance(function, type) or not callable(function):
        raise InvalidParams(f"a command must be a function, not {shown(function)}")
    named = getattr(function, "__name__", None) if name is None else name
    if not isinstance(named, str) or not _NAME.fullmatch(named):
        what = "a lambda has none" if named == "<lambda>" else f"not {shown(named)}"
        raise InvalidParams(f"a command needs a name of 1 to 64 of A-Z a-z 0-9 _ -; {what}: use def, or name=")
    plain = script.plain(function)
    is_odd = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
    if any(is_that(plain) for is_that in is_odd):
        raise InvalidParams(f"{named} is async or a generator; a command must return its value: use a plain def")
    try:
        given = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as err:
        raise InvalidParams(f"{named} has no signature that can be read ({err}); use a def around it") from err
    takes_context = bool(given) and given[0].name == _CONTEXT and given[0].kind is not given[0].VAR_POSITIONAL
    doc = inspect.getdoc(plain) or f"Run {named}, a function of the training script."
    kinds = _types(plain, given[takes_context:], named)
    params = [_param(each, kinds.get(each.name), named, doc) for each in given[takes_context:]]
    if takes_context and given[0].kind is given[0].POSITIONAL_ONLY:
        raise InvalidParams(f"{named}: context is positional-only; remove the / after it")
    return OwnCommand(OWN + named, function, doc, tuple(params), takes_context)


def _types(plain: Any, params: list[inspect.Parameter], named: str) -> dict[str, Any]:
    """Return the types of the parameters, whose annotations may be text (``from __future__ import annotations``)."""
    found = {}
    for each in params:
        if each.annotation is each.empty:
            continue
        holder = type("Holder", (), {"__annotations__": {each.name: each.annotation}})
        try:
            found.update(typing.get_type_hints(holder, getattr(plain, "__globals__", {})))
        except Exception as err:  # boundary: the annotation is the script's code
            text = f"{named}: the type of {each.name}, {shown(each.annotation)}, cannot be read here: {err}"
            raise InvalidParams(text, parameter=each.name) from err
    return found


def _param(given: inspect.Parameter, kind: Any, named: str, doc: str) -> Param:
    """Return what a client may give for a parameter."""

    def wrong(why: str) -> InvalidParams:
        return InvalidParams(f"{named} cannot be a command: {why}", parameter=given.name)

    if given.kind in (given.VAR_POSITIONAL, given.VAR_KEYWORD):
        raise wrong(f"{given} takes any arguments; name each parameter, with its type")
    if given.kind is given.POSITIONAL_ONLY:
        raise wrong(f"{given.name} is positional-only; remove the / behind it")
    if given.name == _CONTEXT:
        raise wrong("context must be the first parameter")
    if given.name in COMMON_NAMES:
        raise wrong(f"{given.name} is a parameter of every command; choose another name")
    if given.annotation is given.empty:
        raise wrong(f"{given.name} has no type; write {given.name}: int, for example. A type is {_TYPES}")
    schema = _schema(kind)
    if schema is None:
        raise wrong(f"{given.name} has the type {shown(given.annotation)}; a type is {_TYPES}")
    if given.default is not given.empty:
        default = list(given.default) if isinstance(given.default, tuple) else given.default
        try:
            schema = {**schema, "default": _finite(schemas.check(schema, default))}
        except ValueError as err:
            raise wrong(f"the default of {given.name} must be {err}, not {shown(given.default)}") from err
    text = re.search(_DOCUMENTED.format(re.escape(given.name)), doc, re.MULTILINE)
    return Param(given.name, schema, text[1] if text else "")


def _finite(value: Any) -> Any:
    if any(isinstance(each, float) and not math.isfinite(each) for each in (value if type(value) is list else [value])):
        raise ValueError("a finite number")
    return value


def _schema(kind: Any) -> Schema | None:
    """Return the schema of a type; ``None`` if it is none of those that a command can have."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        rest = [each for each in arguments if each is not type(None)]
        schema = _schema(rest[0]) if len(rest) == 1 else None
        return schema and _nullable(schema)
    if origin is list and len(arguments) == 1:
        items = _schema(arguments[0])
        return None if items is None or items["type"] == "array" else {"type": "array", "items": items}
    if origin is typing.Literal:
        names = list(dict.fromkeys(_SCALARS.get(type(word)) for word in arguments))
        if None in names or "number" in names or names == ["null"]:
            return None
        return {"type": names[0] if len(names) == 1 else names, "enum": list(arguments)}
    return {"type": _SCALARS[kind]} if isinstance(kind, type) and kind in _SCALARS and kind is not type(None) else None


def _nullable(schema: Schema) -> Schema:
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    more = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
    return {**schema, **more, "type": [*kinds, "null"]}
