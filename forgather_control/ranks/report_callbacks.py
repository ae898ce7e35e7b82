"""What is called when all ranks have reported on a command. Rank 0."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..wire.records import Outcome
from . import limits

#: Called with what the ranks reported on one command, by rank, and why not all ranks ever will, if so.
ReportCallback = Callable[[dict[int, Outcome], "str | None"], None]


class ReportCallbacks:
    """The callbacks that wait for reports on commands, and the last results for those that come later. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, list[ReportCallback]] = {}
        self._results: dict[str, tuple[dict[int, Outcome], str | None]] = {}

    def expect(self, command_id: str) -> None:
        """Hold back callbacks for this command until it is complete."""
        with self._lock:
            if command_id not in self._results:
                self._waiting.setdefault(command_id, [])

    def add(self, command_id: str, callback: ReportCallback) -> None:
        """See ``RankGroup.when_reported``."""
        with self._lock:
            if command_id in self._waiting:
                self._waiting[command_id].append(callback)
                return
            result = self._results.get(command_id, ({}, None))
        callback(*result)

    def complete(self, command_id: str, outcomes: dict[int, Outcome], fault: str | None) -> None:
        """Call the callbacks of this command."""
        with self._lock:
            callbacks = self._waiting.pop(command_id, [])
            self._results[command_id] = outcomes, fault
            if len(self._results) > limits.MAX_RESULTS:
                del self._results[next(iter(self._results))]
        for callback in callbacks:
            callback(outcomes, fault)

    def complete_all(self, fault: str | None) -> None:
        """Call all callbacks: nothing more will be reported."""
        with self._lock:
            waiting = list(self._waiting)
        for command_id in waiting:
            self.complete(command_id, {}, fault)
