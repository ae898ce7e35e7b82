"""How far a job is and how fast it goes.

The training thread writes, the server thread reads; each attribute is one immutable value that is
assigned whole, so neither needs a lock and a step costs no more than that.
"""

from __future__ import annotations

import time
from typing import Any

from . import limits


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

    def beat(self, step: int, epoch: float | None = None) -> None:
        """Note that a step is finished. On the training thread, every step."""
        now = time.monotonic()
        self._last = (step, epoch, now)
        if now >= self._sample_at:
            self._sample_at = now + limits.SPEED_SAMPLE_PERIOD
            self._samples = (*self._samples[1 - limits.SPEED_SAMPLES :], (now, step))

    def report(self) -> dict[str, Any]:
        """Return the figures of ``status``; ``None`` where one is unknown. On the server thread."""
        (step, epoch, at), samples, end = self._last, self._samples, self._max_steps
        speed = None
        if at is not None and samples:
            since, first = samples[0]
            speed = (step - first) / (at - since) if at > since and step > first else None
        return {
            "global_step": step,
            "epoch": epoch,
            "max_steps": end,
            "progress": None if end is None else min(1.0, max(0.0, step / end)),
            "steps_per_second": speed,
            "eta_seconds": max(0, end - step) / speed if end is not None and speed else None,
            "seconds_since_step": None if at is None else time.monotonic() - at,
        }
