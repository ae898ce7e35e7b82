"""Wait until a condition on a job holds, or the job ends: it is asked, and judged from outside where it is silent."""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple

from .. import states
from ..deadline import Deadline
from ..errors import CommandRefused, DeadlinePassed, JobDead, JobNotAnswering, MethodNotFound, NoSuchJob
from ..jobs import last_status
from ..jobs.ended import EndedJob
from ..jobs.record import jobs_dir
from ..wire import conditions
from . import diagnosis, limits
from .connection import Client
from .reading import reading
from .target import Target

#: What a condition may name beside metrics, step, epoch and hours, also alone.
WORDS: Final = frozenset({"ended", "dead", "stalled"})
#: The name under which ``stalled`` alone is watched: its threshold follows the job's speed.
_BY_ITSELF: Final = "stalled by itself"
_LONG: Final = (states.STATUS_SAVING, states.STATUS_EVALUATING)


def parse(text: str) -> conditions.Condition:
    """Return the condition that a text means; InvalidParams: it means none."""
    found = conditions.parse(text, WORDS)
    is_alone = [term.op == conditions.IS_TRUE and term.name == "stalled" for term in found.terms]
    terms = [term._replace(name=_BY_ITSELF) if alone else term for term, alone in zip(found.terms, is_alone)]
    return found._replace(terms=tuple(terms))


class Outcome(NamedTuple):
    """How a wait ended."""

    holds: bool  #: Whether the condition holds.
    state: str  #: "live", "silent", "ended" or "dead"; the last two end every wait.
    step: int | None  #: The last step that was seen.


def of_ended(job: EndedJob, until: conditions.Condition) -> Outcome:
    """Return the outcome of a wait for a job that has ended before: only its end and its last step are known."""
    state = "dead" if job.how == states.ENDING_DIED else "ended"
    facts = {"ended": float(state == "ended"), "dead": float(state == "dead")}
    if job.global_step is not None:
        facts["step"] = float(job.global_step)
    return Outcome(conditions.Watch(until).feed(facts), state, job.global_step)


class Waiter:
    """Waits for one job. Not thread-safe.

    Args:
        target: the job; it may be dead or silent.
        until: the condition, as ``parse`` returns it.
    """

    def __init__(self, target: Target, until: conditions.Condition) -> None:
        self._target, self._watch = target, conditions.Watch(until)
        self._metrics = sorted(until.names - WORDS - {_BY_ITSELF, *conditions.STEP_NAMES})
        self._client: Client | None = None
        self._seen_at: dict[str, float] = {}  # by metric: the time of the last value
        self._older: dict[str, list[Any]] = {}  # by metric: the last point of a job that keeps no history
        self._points: dict[str, list[Any]] = {}  # by metric: what the last answer holds
        self._has_history = True
        self.status: dict[str, Any] = {}  #: The last answer of the job.
        self._answered = time.monotonic()

    def wait(self, timeout: float | None) -> Outcome:
        """Wait until the condition holds or the job is over.

        Raises:
            DeadlinePassed: ``timeout`` seconds have passed.
            CommandRefused: a metric is logged in a way that cannot be waited for.
            InternalError: the other side sent what cannot be read.
        """
        deadline = Deadline(timeout)
        try:
            while True:
                with reading():
                    state = self._look()
                    holds = self._feed(state)
                if holds or state in ("ended", "dead"):
                    return Outcome(holds, state, self.status.get("global_step"))
                if deadline.passed():
                    step = self.status.get("global_step")
                    text = f"{self._target.name} is at step {step}, and the condition does not hold after {timeout:g} s"
                    raise DeadlinePassed(text)
                left = deadline.left()
                time.sleep(limits.LOOK_PERIOD if left is None else min(limits.LOOK_PERIOD, max(0.0, left)))
        finally:
            self._close()

    # The state of the job...

    def _look(self) -> str:
        """Ask the job, and return its state."""
        self._points = {}
        try:
            if self._client is None:
                self._client = Client(self._target, limits.LOOK_TIMEOUT)
            self.status = self._client.call("status")
            self._answered = time.monotonic()
            self._points = self._history(self._client) if self._metrics else {}
            self._check_readable()
            return "ended" if self.status.get("status") == states.STATUS_ENDED else "live"
        except (JobDead, JobNotAnswering, NoSuchJob) as err:
            self._close()
            state = diagnosis.judge(self._target.record, err, self.status.get("status"))
            if not self.status:
                self._read_status()
            return state

    def _read_status(self) -> None:
        """Take the last status that a job of this host wrote which has not answered so far."""
        record = self._target.record
        last = None if record is None else last_status.read(jobs_dir(), record.job_id)
        if record is not None and last is not None and last.status.get("pid") == record.pid:
            self.status, self._answered = last.status, time.monotonic() - last.age

    def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.close()

    # The numbers...

    def _feed(self, state: str) -> bool:
        for name, value in self._new_values():
            if self._watch.feed({name: value}):
                return True
        stalled = self._stalled_seconds()
        facts: dict[str, Any] = {
            "step": self.status.get("global_step"),
            "epoch": self.status.get("epoch"),
            "hours": (time.time() - self.status["started_at"]) / 3600 if self.status.get("started_at") else None,
            "ended": float(state == "ended"),
            "dead": float(state == "dead"),
            "stalled": stalled,
            _BY_ITSELF: float(stalled > self._usual_limit()),
        }
        numbers = {name: conditions.number(value) for name, value in facts.items()}
        return self._watch.feed({name: value for name, value in numbers.items() if value is not None})

    def _stalled_seconds(self) -> float:
        """Return the seconds without a step, as far as they are known; 0 while the job is paused."""
        if self.status.get("status") == states.STATUS_PAUSED:
            return 0.0
        known = self.status.get("seconds_since_step") or 0.0
        return float(known + time.monotonic() - self._answered)

    def _usual_limit(self) -> float:
        """Return the seconds without a step after which a job has stalled: ten times the usual, at least a minute."""
        speed = self.status.get("steps_per_second")
        usual = max(limits.STALLED_AFTER, 10 / speed if speed else 0.0)
        return usual * (limits.STALLED_FACTOR if self.status.get("status") in _LONG else 1)

    def _new_values(self) -> list[tuple[str, float]]:
        """Return the values of the metrics that were logged since the last look, oldest first."""
        fresh = []
        for name, points in self._points.items():
            after = self._seen_at.get(name)
            new = points[-1:] if after is None else [point for point in points if point[1] > after]
            fresh += [(at, name, conditions.number(value)) for _, at, value in new]
            if points:
                self._seen_at[name] = points[-1][1]
        return [(name, value) for _, name, value in sorted(fresh, key=lambda each: each[0]) if value is not None]

    def _history(self, job: Client) -> dict[str, Any]:
        if self._has_history:
            try:
                found: dict[str, Any] = job.call("metrics_history", names=self._metrics, points=limits.POINTS)
                return found
            except MethodNotFound:  # an older job
                self._has_history = False
        for name, value in (self.status.get("metrics") or {}).items():
            if name in self._metrics and self._older.get(name, [None])[-1] != value:  # the same is no other log
                self._older[name] = [0, time.time(), value]
        return {name: [point] for name, point in self._older.items()}

    def _check_readable(self) -> None:
        """Raise CommandRefused for a metric that is logged, but not as a number of the host."""
        for name in self._metrics:
            if name in (self.status.get("metrics") or {}) and not self._points.get(name):
                text = f"{name} is logged as a tensor of a device, or as no number, so it cannot be waited for"
                raise CommandRefused(f"{text}; log a number of the host, such as loss.item()")
