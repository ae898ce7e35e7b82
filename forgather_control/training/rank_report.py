"""What each rank reports of itself, also while training hangs: process, step, memory, stacks.

Made and closed on the training thread of every rank. ``answer`` runs on the channel's receiver thread, on rank 0 the
rest runs on the server thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from .. import states
from ..deadline import Deadline
from ..jobs import rank_processes
from ..processes import liveness, stacks, usage
from ..processes.stack_dump import StackDumper
from ..ranks.group import RankGroup
from ..server.dispatcher import PENDING, Deferred
from . import limits
from .progress import Progress

log = logging.getLogger("forgather_control")

#: What the answer to each query has for a rank that gave none.
_UNKNOWN: Final[dict[str, dict[str, Any]]] = {
    "ranks": dict.fromkeys(("step", "seconds_since_step", "rss_bytes", "device", "device_memory_bytes")),
    "stacks": {"stacks": None},
    "all stacks": {"stacks": None},  # those of our own threads, too
}


class RankReporter:
    """One rank's part in queries to all ranks.

    Args:
        progress: of this rank.
        thread: returns the identifier of the training thread.
    """

    def __init__(self, progress: Progress, thread: Callable[[], int | None]) -> None:
        self._progress, self._thread = progress, thread
        self._stack_dumper = StackDumper(self._stacks)
        self.close = self._stack_dumper.close
        self._ranks: list[rank_processes.RankRecord] = []

    def describe(self) -> dict[str, Any]:
        """Return what rank 0 keeps of this process, whose stacks can be read from outside from here on."""
        self._stack_dumper.start()
        return {**liveness.current_process()._asdict(), "stack_fd": self._stack_dumper.fd}

    def answer(self, what: str) -> dict[str, Any]:
        """Return what this rank answers. Never raises: that would break the channel between the ranks."""
        try:
            mine = usage.process_stats()
            report = self._progress.report()
            mine.update(step=report["global_step"], seconds_since_step=report["seconds_since_step"])
            if "stacks" in _UNKNOWN[what]:
                text = self._stacks()
                mine["stacks"] = text if what == "all stacks" else stacks.without_internal(text)
            return {name: mine[name] for name in ("host", "pid", *_UNKNOWN[what])}
        except Exception:  # boundary: as above
            log.exception("Internal error: this rank could not answer the query %r.", what)
            return {}

    def _stacks(self) -> str:
        return stacks.python_stacks(self._thread())

    def all_joined(self, descriptions: dict[int, dict[str, Any]]) -> bool:
        """Note the processes of all ranks; return whether they were not known before."""
        known, fields = self._ranks, rank_processes.RankRecord._fields[1:]
        self._ranks = [
            rank_processes.RankRecord(rank, *map(description.get, fields))  # type: ignore[arg-type]
            for rank, description in sorted(descriptions.items())
        ]
        return known != self._ranks

    def write(self, directory: str) -> None:
        """Write the ranks' processes to a file, for when no rank answers any more."""
        try:
            rank_processes.write(directory, self._ranks)
        except OSError as err:
            log.warning("%s cannot be written: %s", rank_processes.RANKS_FILE, err.strerror)

    def is_gone(self, rank: int) -> bool:
        """Return whether the process of a rank is proven to have ended."""
        known = [record.identity for record in self._ranks if record.rank == rank]
        return bool(known) and liveness.judge(known[0]) == states.PROCESS_GONE

    def ask(self, group: RankGroup, what: str, timeout: float) -> Any:
        """Return all ranks' answers in order: now, or deferred until all have answered or ``timeout`` s have passed."""
        query, deadline = group.query(what), Deadline(timeout)

        def poll() -> Any:
            missing = (rank for rank in range(group.size) if rank not in query.answers)
            if any(group.state(rank) == states.RANK_SILENT for rank in missing) and not deadline.passed():
                return PENDING
            return [_row(group, rank, what, query.answers.get(rank)) for rank in range(group.size)]

        return Deferred(poll, deadline.at) if (answers := poll()) is PENDING else answers


def _row(group: RankGroup, rank: int, what: str, answer: dict[str, Any] | None) -> dict[str, Any]:
    known = {name: group.description(rank).get(name) for name in ("host", "pid")}
    state = group.state(rank) if answer is None else states.RANK_ANSWERING
    row = {"rank": rank, **known, "state": state, **_UNKNOWN[what], **(answer or {})}
    if row.get("stacks"):
        row["stacks"] = row["stacks"][: limits.MAX_STACKS // group.size]
    return row
