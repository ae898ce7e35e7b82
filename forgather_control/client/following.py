"""Follow a job by its events: its present status, kept up to date on a thread, over ends and restarts of the job."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from .. import states
from ..errors import ControlError, MethodNotFound
from . import diagnosis, limits
from .connection import Client
from .reading import reading
from .target import Target

#: The members of a ``progress`` event that have another name in ``status``.
_RENAMED: Final = {"step": "global_step"}


class Follower:
    """What is known of one job. Its attributes are assigned whole on its thread, and can be read on any.

    Args:
        find: returns the job's address; called again after its connection was lost.
        changed: set after each change.
        asks_ranks: ask how far each rank is, too, where there are several. Not over ssh, which would log in twice.
    """

    def __init__(self, find: Callable[[], Target], changed: threading.Event, asks_ranks: bool = False) -> None:
        self._find, self._changed = find, changed
        self._stopped = threading.Event()
        self.name = "?"
        self.state = "connecting"  #: Or "live", "ended", "dead", "silent".
        self.problem: str | None = None  #: Why it is not live.
        self.status: dict[str, Any] = {}  #: The last that is known.
        self.at = time.monotonic()  #: When that was so.
        self.history: dict[str, list[Any]] = {}  #: The points of each metric.
        self.events: deque[dict[str, Any]] = deque(maxlen=limits.EVENTS_SHOWN)  #: The last rare ones.
        self.ranks: list[dict[str, Any]] = []  #: What each rank said of itself last, as ``ranks`` answers it.
        self._target: Target | None = None
        self._asks_ranks = asks_ranks
        self._thread = threading.Thread(target=self._run, name="forgather-follow", daemon=True)

    def start(self) -> Follower:
        """Begin to follow."""
        self._thread.start()
        if self._asks_ranks:
            threading.Thread(target=self._ask_ranks, name="forgather-ranks", daemon=True).start()
        return self

    def stop(self) -> None:
        """Follow no more; the thread ends with the process, as it may wait for an event."""
        self._stopped.set()

    def present(self) -> dict[str, Any]:
        """Return the status with its times as they are now."""
        status, passed = self.status, time.monotonic() - self.at
        since, evaluation = status.get("seconds_since_step"), status.get("evaluation")
        if since is not None:
            status = {**status, "seconds_since_step": since + passed}
        if evaluation:
            left = evaluation.get("eta_seconds")
            ages = {"seconds": evaluation["seconds"] + passed, "eta_seconds": left and max(0.0, left - passed)}
            status = {**status, "evaluation": {**evaluation, **ages}}
        return status

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._target = self._find()
                self.name = self._target.name
                with Client(self._target) as job, reading():
                    self._follow(job)
                self._note("ended", "training has ended")
            except ControlError as err:
                if self.state not in ("ended", "dead"):  # what came of that run is known already
                    record = None if self._target is None else self._target.record
                    self._note(diagnosis.judge(record, err, self.status.get("status")), str(err))
            self._stopped.wait(limits.FOLLOW_PERIOD)

    def _ask_ranks(self) -> None:
        """Keep ``ranks``, on a thread and a connection of its own: where a rank hangs, no event comes."""
        while not self._stopped.wait(limits.RANKS_PERIOD):
            where, self.ranks = self._target, []
            if where is None or where.ssh is not None or self.status.get("world_size") in (None, 1):
                continue
            with suppress(ControlError), Client(where) as job, reading():  # the other thread finds out what is wrong
                while self.state == "live" and not self._stopped.is_set():
                    self.ranks = job.call("ranks", timeout=limits.RANKS_TIMEOUT)
                    self._changed.set()
                    self._stopped.wait(limits.RANKS_PERIOD)

    def _note(self, state: str, problem: str | None) -> None:
        self.state, self.problem = state, problem
        self._changed.set()

    def _follow(self, job: Client) -> None:
        events = job.events()
        self._renew(job)
        self._note("live", None)
        renew_at = time.monotonic() + limits.RENEW_PERIOD
        for event in events:
            self._apply(event)
            if time.monotonic() >= renew_at:
                self._renew(job)
                renew_at = time.monotonic() + limits.RENEW_PERIOD
            self._changed.set()

    def _renew(self, job: Client) -> None:
        """Ask for what no event tells: process figures, rules, and the curves."""
        self.status, self.at = {**job.call("status")}, time.monotonic()  # another program may send anything
        with suppress(MethodNotFound):  # an older job
            self.history = {**job.call("metrics_history", points=limits.CURVE_POINTS)}

    def _apply(self, event: dict[str, Any]) -> None:
        kind = event["kind"]
        facts = {name: value for name, value in event.items() if name not in ("seq", "time", "kind", "lost")}
        if kind == states.EVENT_PROGRESS:
            known = {_RENAMED.get(name, name): value for name, value in facts.items()}
            if known.get("global_step") != self.status.get("global_step"):  # else it tells of an evaluation
                known["seconds_since_step"] = 0.0
            self.status, self.at = {**self.present(), **known}, time.monotonic()
        elif kind == states.EVENT_METRICS:
            self.status = {**self.status, "metrics": facts.get("metrics", {})}
            self._add_points(event)
        elif kind == states.EVENT_PHASE:
            known = {**self.present(), "status": facts.get("phase"), "evaluation": None}
            if known["status"] == states.STATUS_EVALUATING:
                known["evaluation"] = {"seconds": 0.0}
            self.status, self.at = known, time.monotonic()
        elif kind == states.EVENT_ENDED and facts.get("step") is not None:  # its last progress may not have been told
            end = self.status.get("max_steps")
            share = {"progress": min(1.0, max(0.0, facts["step"] / end))} if end else {}
            self.status = {**self.status, "global_step": facts["step"], **share}
        elif kind == states.EVENT_COMMAND:
            others = [each for each in self.status.get("commands") or [] if each["command_id"] != facts["command_id"]]
            self.status = {**self.status, "commands": [*others, facts][-limits.EVENTS_SHOWN :]}
        if kind not in (states.EVENT_PROGRESS, states.EVENT_METRICS):
            self.events.append(event)

    def _add_points(self, event: dict[str, Any]) -> None:
        for name, value in event.get("metrics", {}).items():
            if isinstance(value, (int, float)):
                points = self.history.get(name, [])
                if not points or points[-1][2] != value:  # else it may not have been logged anew
                    points = [*points, [event.get("step"), event["time"], value]]
                    self.history = {**self.history, name: points[-2 * limits.CURVE_POINTS :]}
