"""How far a run is, how fast it goes, what it is doing, and what it logged.

The training thread writes, the server thread reads; each attribute is one immutable value that is
assigned whole, so neither needs a lock and a step costs no more than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import states
from . import limits, metrics
from .events import EventLog
from .metrics_history import MetricsHistory
from .running_commands import RunningCommands


class Progress:
    """The step counter of one job.

    Args:
        step: where training begins; not 0 when it is resumed.
        max_steps: where it ends, or ``None`` if unknown.
    """

    def __init__(self, step: int, max_steps: int | None) -> None:
        self._max_steps = max_steps if max_steps and max_steps > 0 else None
        self._last: tuple[int, float | None, float | None] = (step, None, None)
        self._samples: tuple[tuple[float, int], ...] = ()
        self._sample_at = 0.0

    @property
    def step(self) -> int:
        """The last finished step."""
        return self._last[0]

    @property
    def epoch(self) -> float | None:
        """The passes over the data at that step, if they are known."""
        return self._last[1]

    def beat(self, step: int, epoch: float | None = None) -> None:
        """Note that a step is finished. On the training thread, every step."""
        now = time.monotonic()
        self._last = (step, epoch, now)
        if now >= self._sample_at:
            self._sample_at = now + limits.SPEED_SAMPLE_PERIOD
            self._samples = (*self._samples[1 - limits.SPEED_SAMPLES :], (now, step))

    def skip(self, seconds: float) -> None:
        """Leave out the last seconds of the speed, because training was paused. On the training thread."""
        self._samples = tuple((at + seconds, step) for at, step in self._samples)
        step, epoch, last = self._last
        self._last = step, epoch, None if last is None else last + seconds

    def set_end(self, max_steps: int | None) -> None:
        """Note that training ends at another step. On the training thread."""
        self._max_steps = max_steps if max_steps and max_steps > 0 else None

    @property
    def speed(self) -> float | None:
        """The steps per second of the last minute, if they are known."""
        (step, _, at), samples = self._last, self._samples
        if at is None or not samples:
            return None
        since, first = samples[0]
        return (step - first) / (at - since) if at > since and step > first else None

    def report(self) -> dict[str, Any]:
        """Return the figures of ``status``; ``None`` where one is unknown. On the server thread."""
        (step, epoch, at), speed, end = self._last, self.speed, self._max_steps
        return {
            "global_step": step,
            "epoch": epoch,
            "max_steps": end,
            "progress": None if end is None else min(1.0, max(0.0, step / end)),
            "steps_per_second": speed,
            "eta_seconds": max(0, end - step) / speed if end is not None and speed else None,
            "seconds_since_step": None if at is None else time.monotonic() - at,
        }


class Evaluation:
    """One evaluation, from its begin to its end."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self.batches = 0  #: Those that are done, where the trainer tells.
        self.total: int | None = None  #: All that it will take.

    def report(self) -> dict[str, Any]:
        """Return how far it is, as ``status`` has it. On the server thread."""
        seconds, done, total = time.monotonic() - self._since, self.batches, self.total
        if total is not None and total < done:  # the loader does not know itself
            total = None
        left = (total - done) * seconds / done if done and total else None
        return {"seconds": seconds, "batches": done, "total_batches": total, "eta_seconds": left}


class RunState:
    """The present state of one run; ``on_event``: see ``EventLog``."""

    def __init__(self, step: int, max_steps: int | None, on_event: Callable[[], None]) -> None:
        #: The job id, once one is claimed; before that the one that was asked for.
        self.job_id: str | None = None
        self.started_at = time.time()
        self.progress = Progress(step, max_steps)
        self.events = EventLog(on_event, self._sample)
        self.running = RunningCommands()
        self.ended = False
        #: Whether a command that ends training was applied.
        self.ending = False
        #: Whether training is paused, also while it saves or evaluates.
        self.paused = False
        #: What training is doing: starting, training, evaluating or saving.
        self.phase: states.TrainingStatus = states.STATUS_STARTING
        self._published: states.TrainingStatus = states.STATUS_STARTING
        self.metrics: dict[str, Any] = {}
        #: What was logged so far; on rank 0, which answers clients.
        self.history: MetricsHistory | None = None
        self._logged = 0
        #: The present evaluation, and the batches of all of them.
        self.evaluation: Evaluation | None = None
        self._evaluated_batches = 0

    def note(
        self, phase: states.TrainingStatus | None = None, ending: bool = False, paused: bool | None = None
    ) -> None:
        """Note a phase, a pause, or that a command that ends training was applied; publish a status that changed."""
        if phase is not None and phase != self.phase:
            self.evaluation = Evaluation() if phase == states.STATUS_EVALUATING else None
        self.phase, self.ending = phase or self.phase, ending or self.ending
        self.paused = self.paused if paused is None else paused
        if self.status != self._published:
            self._published = self.status
            self.events.publish(states.EVENT_PHASE, phase=self._published)

    def evaluate_batch(self, total: Callable[[], int | None]) -> None:
        """Note that a batch of the present evaluation is done. On the training thread, each batch.

        Args:
            total: returns the batches of this evaluation, if they are known; called at the first one.
        """
        if self.evaluation is not None:
            if self.evaluation.batches == 0:
                self.evaluation.total = total()
            self.evaluation.batches += 1
            self._evaluated_batches += 1

    @property
    def status(self) -> states.TrainingStatus:
        """The phase, unless training is paused, is stopping or has ended."""
        if self.ended:
            return states.STATUS_ENDED
        if self.phase != states.STATUS_TRAINING or not (self.ending or self.paused):
            return self.phase
        return states.STATUS_STOPPING if self.ending else states.STATUS_PAUSED

    def log(self, logs: Mapping[Any, Any]) -> dict[str, Any]:
        """Keep the latest value of each name; return them. Never a collective, nor a synchronisation with a device."""
        held = metrics.hold(logs)
        self.metrics = metrics.merge(self.metrics, held)
        if self.history is not None:
            self.history.log(self.progress.step, held)
        self._logged += 1
        return held

    def mark(self) -> object:
        """Return a value that differs when ``report`` has something new; cheap."""
        return self.progress.step, self.status, self._logged, self._evaluated_batches

    def report(self) -> dict[str, Any]:
        """Return the part of ``status`` that is about training, without the metrics."""
        known = {"job_id": self.job_id, "status": self.status, **self.progress.report(), "started_at": self.started_at}
        return {**known, **self._evaluation()}

    def _evaluation(self) -> dict[str, Any]:
        now = self.evaluation  # the training thread may end it meanwhile
        return {} if now is None else {"evaluation": now.report()}

    def _sample(self) -> dict[str, tuple[object, dict[str, Any]]]:
        figures = self.progress.report()
        step, _ = figures.pop("global_step"), figures.pop("seconds_since_step")
        return {
            states.EVENT_PROGRESS: (
                (step, self._evaluated_batches),
                {"step": step, **figures, **self._evaluation()},
            ),
            states.EVENT_METRICS: (self._logged, {"step": step, "metrics": metrics.on_host(self.metrics)}),
        }
