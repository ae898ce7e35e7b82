"""What is known of a run: its step, phase and metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping
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

    def __init__(self, step: int, max_steps: int | None, on_event: Any) -> None:
        #: The job id, once one is claimed; before that the one that was asked for.
        self.job_id: str | None = None
        self.started_at = time.time()
        self.progress = Progress(step, max_steps)
        self.events = EventLog(on_event, self._sample)
        self.ended = False
        self._ending = False
        self._phase: states.TrainingStatus = states.STATUS_STARTING
        self._told: states.TrainingStatus = states.STATUS_STARTING
        self._metrics: dict[str, Any] = {}
        self._logged = 0

    @property
    def phase(self) -> states.TrainingStatus:
        """What training is doing: starting, training, evaluating or saving."""
        return self._phase

    @phase.setter
    def phase(self, phase: states.TrainingStatus) -> None:
        if phase != self._phase:
            self._phase = phase
            self._status_changed()

    @property
    def ending(self) -> bool:
        """Whether a command that ends training was applied."""
        return self._ending

    @ending.setter
    def ending(self, ending: bool) -> None:
        self._ending = ending
        self._status_changed()

    def _status_changed(self) -> None:
        if self.status != self._told:
            self._told = self.status
            self.events.publish(states.EVENT_PHASE, phase=self._told)

    @property
    def status(self) -> states.TrainingStatus:
        """The word for it: the phase, unless training is stopping or has ended."""
        if self.ended:
            return states.STATUS_ENDED
        return states.STATUS_STOPPING if self.ending and self._phase == states.STATUS_TRAINING else self._phase

    def log(self, logs: Mapping[Any, Any]) -> None:
        """Keep the latest value of each name; no synchronisation with a device."""
        self._metrics = metrics.merge(self._metrics, metrics.hold(logs))
        self._logged += 1

    def mark(self) -> object:
        """Return a value that differs when ``report`` has something new; cheap."""
        return self.progress.step, self.status, self._logged

    def report(self) -> dict[str, Any]:
        """Return the part of ``status`` that is about training. Logged names are in ``metrics``, apart from ours."""
        return {
            "job_id": self.job_id,
            "status": self.status,
            **self.progress.report(),
            "metrics": metrics.plain(self._metrics),
            "started_at": self.started_at,
        }

    def _sample(self) -> dict[str, tuple[object, dict[str, Any]]]:
        progress = self.progress.report()
        names = ("epoch", "max_steps", "progress", "steps_per_second", "eta_seconds")
        facts = {"step": progress["global_step"], **{name: progress[name] for name in names}}
        values = metrics.on_host(self._metrics)
        return {
            states.EVENT_PROGRESS: (progress["global_step"], facts),
            states.EVENT_METRICS: (self._logged, {"step": progress["global_step"], "metrics": values}),
        }
