"""One value that can be changed while training runs: its declaration, its getter and its setter.

Both run on the training thread only.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ..errors import CommandRefused, InvalidParams
from ..schema import shown
from ..wire import schemas
from ..wire.limits import MAX_LINE
from . import metrics, script

log = logging.getLogger("forgather_control")

#: The types of values: the words of JSON Schema, and the classes of Python that stand for them.
TYPES: Final[dict[type, str]] = {float: "number", int: "integer", bool: "boolean", str: "string"}
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
#: What fits each type, beside what its schema says.
_ALSO: Final = dict.fromkeys(("number", "integer"), ', or a factor such as "x0.5"') | {
    "string": """ (to the command line one that looks like a number, true or false is given as NAME='"5"')"""
}
_FACTOR: Final = re.compile(r"x(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)")


@dataclass(frozen=True)
class Setting:
    """One value that can be changed while training runs.

    Raises:
        InvalidParams: an argument is wrong.
    """

    name: str  #: 1 to 64 of ``A-Z a-z 0-9 _ . -``
    get: Callable[[], Any]  #: Returns the value in force. On the training thread.
    #: Puts a checked value in force. On the training thread of every rank, at one step. What it raises refuses the
    #: change. It may return a function that restores the earlier value exactly; else it is called with that value.
    set: Callable[[Any], Callable[[], None] | None]
    minimum: float | None = None
    maximum: float | None = None
    type: Any = None  #: float, int, bool, str, or JSON's word for one; ``None``: that of its value
    doc: str = ""  #: One sentence.
    #: Says why a value cannot be put in force now; ``None`` if it can. On the training thread, before anything changes.
    check: Callable[[Any], str | None] | None = None
    note: Callable[[], str | None] | None = None  #: Says what a caller should know after a change.
    #: As ``check``, of all values of a change by name, where one depends on another.
    check_all: Callable[[Mapping[str, Any]], str | None] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidParams(f"a setting's name must be 1 to 64 of A-Z a-z 0-9 _ . -, not {shown(self.name)}")
        for part in ("get", "set"):
            if not callable(getattr(self, part)):
                raise InvalidParams(f"{part} of the setting {self.name} must be a function")
        kind = TYPES.get(self.type, self.type) if isinstance(self.type, type) else self.type
        if kind is not None and kind not in TYPES.values():
            raise InvalidParams(f"type of the setting {self.name} must be float, int, bool or str, not {self.type!r}")
        for part in ("minimum", "maximum"):
            limit = getattr(self, part)
            is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
            if limit is not None and not (is_number and _is_finite(limit)):
                raise InvalidParams(f"{part} of the setting {self.name} must be a finite number, not {shown(limit)}")
        if not isinstance(self.doc, str):
            raise InvalidParams(f"doc of the setting {self.name} must be a text, not {shown(self.doc)}")
        object.__setattr__(self, "type", kind)

    @classmethod
    def of(cls, found: Setting | Mapping[str, Any]) -> Setting:
        """Return a setting out of what a script declares."""
        if isinstance(found, Setting):
            return found
        if not isinstance(found, Mapping):
            raise InvalidParams(f"a setting is a mapping with name, get, set and more, not {shown(found)}")
        try:
            return cls(**found)
        except TypeError as err:
            raise InvalidParams(f"a setting takes name, get, set, minimum, maximum, type, doc: {err}") from err

    @property
    def schema(self) -> dict[str, Any]:
        """What values must fit."""
        limits = {"minimum": self.minimum, "maximum": self.maximum}
        return {"type": self.type or "number", **{name: limit for name, limit in limits.items() if limit is not None}}

    def read(self) -> Any:
        """Return the value in force; ``None`` if it cannot be read."""
        try:
            value = script.call(f"the getter of {self.name}", self.get)
            return value.item() if hasattr(value, "item") else value
        except Exception as err:  # boundary: the script's getter
            log.debug("the setting %s cannot be read", self.name, exc_info=err)
            return None

    def value(self) -> Any:
        """Return the value in force as a JSON value; ``None`` if it cannot be read."""
        return as_json(self.read())

    def restorable(self) -> Any:
        """Return the value in force, which a change that fails elsewhere can be taken back to.

        Raises:
            CommandRefused: there is none.
        """
        value = self.read()
        if value is None:
            raise CommandRefused(f"{self.name} cannot be changed: its value cannot be read")
        if not isinstance(value, str if self.type == "string" else (int, float)):
            text = f"{self.name} cannot be changed: its value is no {self.type}, but {shown(as_json(value))}"
            raise CommandRefused(text)
        return value

    def wanted(self, text: Any, old: Any) -> Any:
        """Return the value that a caller asks for.

        Args:
            text: the value, or a factor as "x0.5".
            old: the value in force; ``None`` leaves out what depends on it.

        Raises:
            CommandRefused: it does not fit.
        """
        value = text
        factor = _FACTOR.fullmatch(text) if isinstance(text, str) and self.type in ("number", "integer") else None
        if factor is not None:
            if old is None:
                return None
            value = old * float(factor[1])
        try:
            if isinstance(value, float) and not _is_finite(value):
                raise ValueError("a finite number")
            return schemas.check(self.schema, value)
        except ValueError as err:
            also = _ALSO.get(self.type or "number", "")
            was = f" ({text} of {old})" if factor is not None else ""
            raise CommandRefused(f"{self.name} must be {err}{also}, not {shown(value)}{was}") from err

    def obstacle(self, values: Mapping[str, Any]) -> str | None:
        """Return why its value cannot be put in force, as one of these, by name; ``None`` if it can."""
        why = None if self.check is None else self.check(values[self.name])
        return why or (None if self.check_all is None else self.check_all(values))

    def put(self, value: Any, old: Any) -> Callable[[], object]:
        """Put a value in force; return a function that restores the earlier one."""
        put = partial(script.call, f"the setter of {self.name}")
        undo = put(self.set, value)
        is_undo = inspect.isroutine(undo) or isinstance(undo, partial)  # not a module, which some setters return
        return partial(put, undo if is_undo else partial(self.set, old))

    def remark(self) -> str | None:
        """Return what a caller should know after a change, if anything."""
        with suppress(Exception):  # boundary: objects of a trainer that are unlike those we know
            return None if self.note is None else self.note()
        return None


def as_json(value: Any) -> Any:
    """Return a value as JSON carries it: longer texts than clients can set, and what is no number or text, cut."""
    is_text = type(value) is str and len(value) <= MAX_LINE
    return value if is_text else metrics.plain({"value": value})["value"]


def _is_finite(value: float) -> bool:
    return abs(value) <= sys.float_info.max  # math.isfinite raises for an integer beyond a double


def declared(found: Sequence[Any] | Mapping[str, Mapping[str, Any]]) -> list[Setting]:
    """Return the settings that a script declares: as a sequence, or by name.

    Raises:
        InvalidParams: an argument of one is wrong.
    """
    try:
        each = [{"name": name, **rest} for name, rest in found.items()] if isinstance(found, Mapping) else list(found)
    except TypeError as err:
        raise InvalidParams(f"settings must be a list of settings, or what each takes by its name: {err}") from err
    settings: dict[str, Setting] = {}
    for setting in map(Setting.of, each):
        if setting.name in settings:
            raise InvalidParams(f"the setting {setting.name} is declared twice")
        settings[setting.name] = setting
    return list(settings.values())
