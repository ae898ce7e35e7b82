"""The script's own commands that are being run, on which ranks and for how long: for ``status``, as one may hang."""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

from ..ranks.group import RankGroup
from ..wire.methods import OWN
from ..wire.records import ScheduledCommand


class _Running(NamedTuple):
    command_id: str
    command: str
    since: float  # monotonic
    is_here: bool  # whether this rank still runs it


class RunningCommands:
    """What a rank knows of them. ``_lock`` guards each change of the tuple, which is read without it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commands: tuple[_Running, ...] = ()

    def begin(self, command: ScheduledCommand) -> None:
        """Note that this rank begins a command. On the training thread."""
        if command.name.startswith(OWN):
            with self._lock:
                begun = _Running(command.command_id, command.name, time.monotonic(), True)
                self._commands = (*self._commands, begun)

    def end(self, command: ScheduledCommand) -> None:
        """Note that this rank is done with a command; others may not be. On the training thread."""
        if command.name.startswith(OWN):
            with self._lock:
                ended = command.command_id
                self._commands = tuple(
                    each._replace(is_here=each.is_here and each.command_id != ended) for each in self._commands
                )

    def forget(self) -> None:
        """Note that the other ranks have acknowledged all of them, or never will. On any thread."""
        with self._lock:
            self._commands = tuple(each for each in self._commands if each.is_here)

    def report(self, group: RankGroup) -> list[dict[str, Any]]:
        """Return an object for each, with the ranks that have not acknowledged it. On the server thread of rank 0."""
        commands, now = self._commands, time.monotonic()
        others = [rank for rank in group.unacknowledged() if rank != group.rank] if commands else []
        found = []
        for each in commands:
            if ranks := [group.rank] * each.is_here + others:
                facts = {"command_id": each.command_id, "command": each.command}
                found.append({**facts, "seconds": round(now - each.since, 3), "ranks": ranks})
        return found
