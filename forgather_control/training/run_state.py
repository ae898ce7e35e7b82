"""What is known of a run: its step, phase and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import states
from . import metrics
from .events import EventLog
from .progress import Progress


class RunState:
    """The present state of one run. The training thread writes; any thread reads, as values are assigned whole.

    Args:
        step: where training begins.
        max_steps: where it ends, if known.
        on_event: see ``EventLog``.
    """

    def __init__(self, step: int, max_steps: int | None, on_event: Callable[[], None]) -> None:
        #: The job id, once one is claimed; before that the one that was asked for.
        self.job_id: str | None = None
        self.started_at = time.time()
        self.progress = Progress(step, max_steps)
        self.events = EventLog(on_event, self._sample)
        self.ended = False
        #: Whether a command that ends training was applied.
        self.ending = False
        #: What training is doing: starting, training, evaluating or saving.
        self.phase: states.TrainingStatus = states.STATUS_STARTING
        self._published: states.TrainingStatus = states.STATUS_STARTING
        self.metrics: dict[str, Any] = {}
        self._logged = 0

    def note(self, phase: states.TrainingStatus | None = None, ending: bool = False) -> None:
        """Note a phase, or that a command that ends training was applied; publish the status if it has changed."""
        self.phase, self.ending = phase or self.phase, ending or self.ending
        if self.status != self._published:
            self._published = self.status
            self.events.publish(states.EVENT_PHASE, phase=self._published)

    @property
    def status(self) -> states.TrainingStatus:
        """The phase, unless training is stopping or has ended."""
        if self.ended:
            return states.STATUS_ENDED
        return states.STATUS_STOPPING if self.ending and self.phase == states.STATUS_TRAINING else self.phase

    def log(self, logs: Mapping[Any, Any]) -> None:
        """Keep the latest value of each name. Never a collective, never a synchronisation with a device."""
        self.metrics = metrics.merge(self.metrics, metrics.hold(logs))
        self._logged += 1

    def mark(self) -> object:
        """Return a value that differs when ``report`` has something new; cheap."""
        return self.progress.step, self.status, self._logged

    def report(self) -> dict[str, Any]:
        """Return the part of ``status`` that is about training, without the metrics."""
        return {
            "job_id": self.job_id,
            "status": self.status,
            **self.progress.report(),
            "started_at": self.started_at,
        }

    def _sample(self) -> dict[str, tuple[object, dict[str, Any]]]:
        progress = self.progress.report()
        step = progress["global_step"]
        names = ("epoch", "max_steps", "progress", "steps_per_second", "eta_seconds")
        facts = {"step": step, **{name: progress[name] for name in names}}
        values = metrics.on_host(self.metrics)
        return {
            states.EVENT_PROGRESS: (step, facts),
            states.EVENT_METRICS: (self._logged, {"step": step, "metrics": values}),
        }
