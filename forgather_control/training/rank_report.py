"""What ranks say of themselves, also while their training hangs: who is where, and in which line of code.

Floor 3, training side: imports dump, exchange, process, progress, roster, stacks, process_stats and group. Made and
closed on the training thread of every rank; ``tell`` runs on the ear's thread, on rank 0 the rest on the
server's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from .. import states
from ..jobs import rank_processes
from ..processes import stacks, usage
from ..processes.liveness import Identity, current_process
from ..processes.stack_dump import StackDumper
from ..ranks.group import RankGroup, RankQuery
from ..server.dispatcher import PENDING, Deferred
from .progress import Progress

log = logging.getLogger("forgather_control")

#: Most characters of stacks in one reply, all ranks together; a thousand ranks then say two pages each.
_MAX_STACKS: Final = 4 << 20
#: What each question's answer has for a rank that gave none.
_UNKNOWN: Final[dict[str, dict[str, Any]]] = {
    "ranks": dict.fromkeys(("step", "seconds_since_step", "rss_bytes", "device", "device_memory_bytes")),
    "stacks": {"stacks": None},
}


class Census:
    """One rank's part in the questions to all ranks.

    Args:
        progress: of this rank.
        thread: the identifier of the thread that trains, at present.
    """

    def __init__(self, progress: Progress, thread: Callable[[], int | None]) -> None:
        self._progress, self._thread = progress, thread
        self._recorder = StackDumper(self._stacks)
        self._ranks: list[rank_processes.RankRecord] = []

    def about(self) -> dict[str, Any]:
        """What the other ranks are told of this process; from here on its stacks can be had from outside, too."""
        self._recorder.start()
        return {**current_process()._asdict(), "stack_fd": self._recorder.fd}

    def close(self) -> None:
        """End. May be called twice."""
        self._recorder.close()

    def tell(self, what: str) -> dict[str, Any]:
        """What this rank answers. Never raises: that would cut the line between the ranks."""
        try:
            mine = usage.process_stats()
            if what == "stacks":
                return {"host": mine["host"], "pid": mine["pid"], "stacks": self._stacks()}
            report = self._progress.report()
            mine.update(step=report["global_step"], seconds_since_step=report["seconds_since_step"])
            return {name: mine[name] for name in ("host", "pid", *_UNKNOWN["ranks"])}
        except Exception:  # border: as above
            log.exception("this rank could not say how it is")
            return {}

    def _stacks(self) -> str:
        return stacks.python_stacks(self._thread())

    def meet(self, about: dict[int, dict[str, Any]]) -> None:
        """Note who all the ranks are."""
        self._ranks = [_record(rank, about[rank]) for rank in sorted(about)]

    def write(self, directory: str) -> None:
        """Leave the ranks' processes where they can be read when nobody answers any more."""
        try:
            rank_processes.write(directory, self._ranks)
        except OSError as err:
            log.warning("%s cannot be written: %s", rank_processes.RANKS_FILE, err.strerror)

    def ask(self, group: RankGroup, what: str, timeout: float) -> Any:
        """All ranks' answers in order: now, or deferred, when all that can have answered, or after ``timeout`` s."""
        inquiry = group.query(what)
        deadline = time.monotonic() + timeout

        def poll() -> Any:
            silent = any(
                rank not in inquiry.answers and group.state(rank) == states.RANK_SILENT for rank in range(group.size)
            )
            if silent and time.monotonic() < deadline:
                return PENDING
            return [_row(group, inquiry, what, rank) for rank in range(group.size)]

        return Deferred(poll, deadline) if (answers := poll()) is PENDING else answers


def _record(rank: int, about: dict[str, Any]) -> rank_processes.RankRecord:
    identity = Identity(**{name: about.get(name) for name in Identity._fields})  # type: ignore[arg-type]
    return rank_processes.RankRecord.of(rank, identity, about.get("stack_fd"))


def _row(group: RankGroup, inquiry: RankQuery, what: str, rank: int) -> dict[str, Any]:
    answer = inquiry.answers.get(rank)
    about = group.description(rank)
    known = {"rank": rank, "host": about.get("host"), "pid": about.get("pid")}
    state = group.state(rank) if answer is None else states.RANK_ANSWERING
    row = {**known, "state": state, **_UNKNOWN[what], **(answer or {})}
    if row.get("stacks") is not None:
        row["stacks"] = row["stacks"][: _MAX_STACKS // group.size]
    return row
