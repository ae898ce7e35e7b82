"""Settings of a run that clients list and change: those of the trainer, and those that the script declares.

Getters and setters run on the training thread only. The server thread reads the declarations and the snapshot of the
values, both assigned whole.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ..errors import CommandFailed, CommandRefused, InvalidParams
from ..schema import shown
from . import outcomes
from .setting import TYPES, Setting, as_json

log = logging.getLogger("forgather_control")


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
        for undo, (name, value) in reversed([*zip(self.undo, self.values.items())]):
            try:
                undo()
            except Exception as err:  # boundary: the script's setter
                error = outcomes.failure(err)["error"]["message"]
                problems.append(f"{name} could not be restored, and may still be {shown(value['new'])}: {error}")
        text = "; ".join([why, *problems]) if problems else f"nothing was changed: {why}"
        if problems:
            log.warning("A change could not be undone on this rank: %s", text)
        self.set_exception(CommandFailed(text, restored=not problems))


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
        for setting, old, new in self._plan(changes):
            try:
                change.undo.append(setting.put(new, old))
            except Exception as err:  # boundary: the script's setter
                why = f"{setting.name} cannot be {shown(new)}: {outcomes.failure(err)['error']['message']}"
                with suppress(Exception):  # boundary: as above; it may have changed a part
                    setting.put(old, old)
                change.settle(why)
                raise CommandRefused(str(change.exception())) from err
            change.values[setting.name] = {"old": as_json(old), "new": new}
        return change

    def _plan(self, changes: Mapping[str, Any]) -> list[tuple[Setting, Any, Any]]:
        """Return each setting with its value in force and the new one; CommandRefused: one cannot be put in force."""
        found = [self._find(name) for name in changes]
        plan = [(each, old := each.restorable(), each.wanted(changes[each.name], old)) for each in found]
        values = {setting.name: new for setting, _, new in plan}
        for setting, _, new in plan:
            if why := setting.obstacle(values):
                raise CommandRefused(f"{setting.name} cannot be {shown(new)}: {why}")
        return plan

    def read_back(self, step: int | None = None) -> None:
        """Read what is in force after changes, and take a snapshot if one is asked for. On the training thread."""
        while self.read_back in self._on_step:
            self._on_step.remove(self.read_back)
        unread, self._unread = self._unread, []
        for change in unread:
            for name, value in change.values.items():
                setting = self._settings[name]
                value["effective"] = setting.value()
                if note := setting.remark():
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
