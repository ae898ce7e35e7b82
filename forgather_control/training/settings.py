"""Settings of a run that clients list and change: those of the trainer, and those that the script declares.

Getters and setters run on the training thread only. The server thread reads the declarations and the snapshot of the
values, both assigned whole.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from ..errors import CommandFailed, CommandRefused, InvalidParams
from ..schema import shown
from ..wire import schemas
from ..wire.limits import MAX_LINE
from . import metrics, outcomes, script

log = logging.getLogger("forgather_control")

#: The types of values: the words of JSON Schema, and the classes of Python that stand for them.
TYPES: Final[dict[type, str]] = {float: "number", int: "integer", bool: "boolean", str: "string"}
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
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
        return _as_json(self.read())

    def old(self) -> Any:
        """Return the value in force, which a change can be taken back to.

        Raises:
            CommandRefused: there is none.
        """
        value = self.read()
        if value is None:
            raise CommandRefused(f"{self.name} cannot be changed: its value cannot be read")
        if not isinstance(value, str if self.type == "string" else (int, float)):
            text = f"{self.name} cannot be changed: its value is no {self.type}, but {shown(_as_json(value))}"
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
            also = ', or a factor such as "x0.5"' if self.type in ("number", "integer") else ""
            was = f" ({text} of {old})" if factor is not None else ""
            raise CommandRefused(f"{self.name} must be {err}{also}, not {shown(value)}{was}") from err

    def put(self, value: Any, old: Any) -> Callable[[], object]:
        """Put a value in force; return a function that restores the earlier one."""
        put = partial(script.call, f"the setter of {self.name}")
        undo = put(self.set, value)
        is_undo = inspect.isroutine(undo) or isinstance(undo, partial)  # not a module, which some setters return
        return partial(put, undo if is_undo else partial(self.set, old))

    def told(self) -> str | None:
        """Return what a caller should know after a change, if anything."""
        with suppress(Exception):  # boundary: objects of a trainer that are unlike those we know
            return None if self.note is None else self.note()
        return None


def _as_json(value: Any) -> Any:
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
    return [Setting.of(one) for one in each]


class Change(Future[dict[str, Any]]):
    """A change that this rank has made, and that all ranks made or none; its result is what is in force then."""

    def __init__(self, keep: Callable[[Change], None]) -> None:
        super().__init__()
        self._keep = keep
        self.values: dict[str, dict[str, Any]] = {}  #: What was, and what was put in force, by name.
        self.undo: list[Callable[[], object]] = []

    def settle(self, why: str | None) -> None:
        """Keep the change, or restore what was, and say why."""
        if why is None:
            self._keep(self)
            return
        problems = []
        for undo in reversed(self.undo):
            try:
                undo()
            except Exception as err:  # boundary: the script's setter
                problems.append(f"; an earlier value could not be restored: {type(err).__name__}: {err}")
        self.set_exception(CommandFailed(f"nothing was changed: {why}{''.join(problems)}"))


class Settings:
    """The settings of one run.

    Args:
        on_step: the functions that are called with each finished step; see ``Controller``.
        on_read: called after a snapshot that was asked for; must not block.
        last_step: returns the last finished step.
    """

    def __init__(
        self, on_step: list[Callable[[int], None]], on_read: Callable[[], None], last_step: Callable[[], int]
    ) -> None:
        self._on_step, self._on_read, self._last_step = on_step, on_read, last_step
        self._settings: dict[str, Setting] = {}
        self._unread: list[Change] = []  # kept, and not read back yet
        #: The last snapshot, after which step it was taken, and how many there were. Read on the server thread.
        self.snapshot: list[dict[str, Any]] = []
        self.read_at_step = 0
        self.snapshots = 0
        self._wanted = False
        #: What clients have put in force, by name; assigned whole.
        self.changed: dict[str, Any] = {}

    def add(self, settings: Iterable[Setting]) -> None:
        """Declare settings; InvalidParams if a name is taken. On the training thread of every rank."""
        for setting in settings:
            if setting.name in self._settings:
                raise InvalidParams(f"the setting {setting.name} is declared twice")
            if setting.type is None:
                setting = replace(setting, type=TYPES.get(type(setting.read()), "number"))
            self._settings = {**self._settings, setting.name: setting}
        self._take_snapshot()

    def cannot(self, changes: Mapping[str, Any]) -> str | None:
        """Say why a change is impossible whatever the values in force are; ``None`` if it is not. On any thread."""
        try:
            for name, text in changes.items():
                self._find(name).wanted(text, None)
        except CommandRefused as err:
            return err.message
        return None if changes else f"no change is given; this run has {self._names()}"

    def change(self, changes: Mapping[str, Any]) -> Change:
        """Put all values in force, or none. On the training thread of every rank, at one step.

        Raises:
            CommandRefused: why, and which value; nothing has changed.
        """
        change = Change(self._keep)
        found = [(self._find(name), text) for name, text in changes.items()]
        plan = []
        for setting, text in found:
            old = setting.old()
            new = setting.wanted(text, old)
            if setting.check is not None and (why := setting.check(new)):
                raise CommandRefused(f"{setting.name} cannot be {shown(new)}: {why}")
            plan.append((setting, old, new))
        for setting, old, new in plan:
            try:
                change.undo.append(setting.put(new, old))
            except Exception as err:  # boundary: the script's setter
                why = f"{setting.name} cannot be {shown(new)}: {outcomes.failure(err)['error']['message']}"
                with suppress(Exception):  # boundary: as above; it may have changed a part
                    setting.put(old, old)
                change.settle(why)
                raise CommandRefused(str(change.exception())) from err
            change.values[setting.name] = {"old": _as_json(old), "new": new}
        return change

    def read_back(self, step: int | None = None) -> None:
        """Read what is in force after changes, and take a snapshot if one is asked for. On the training thread."""
        while self.read_back in self._on_step:
            self._on_step.remove(self.read_back)
        unread, self._unread = self._unread, []
        for change in unread:
            for name, value in change.values.items():
                setting = self._settings[name]
                value["effective"] = setting.value()
                if note := setting.told():
                    value["note"] = note
        if unread or self._wanted:
            self._wanted = False
            self._take_snapshot()
            self._on_read()
        for change in unread:
            change.set_result(change.values)

    def want_snapshot(self) -> int:
        """Have a snapshot taken after the next step; return the number of the last one. On the server thread."""
        self._wanted = True
        self._on_step.append(self.read_back)
        return self.snapshots

    def _keep(self, change: Change) -> None:
        self.changed = {**self.changed, **{name: value["new"] for name, value in change.values.items()}}
        self._unread.append(change)
        self._on_step.append(self.read_back)

    def _take_snapshot(self) -> None:
        self.read_at_step = self._last_step()
        self.snapshot = [
            {
                "name": each.name,
                "value": each.value(),
                "type": each.type,
                "minimum": each.minimum,
                "maximum": each.maximum,
                "doc": each.doc,
            }
            for each in self._settings.values()
        ]
        self.snapshots += 1

    def _find(self, name: str) -> Setting:
        if (setting := self._settings.get(name)) is None:
            near = difflib.get_close_matches(name, self._settings, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise CommandRefused(f"there is no setting {ascii(name[:64])}{hint}; this run has {self._names()}")
        return setting

    def _names(self) -> str:
        return ", ".join(sorted(self._settings)) or "no settings"
