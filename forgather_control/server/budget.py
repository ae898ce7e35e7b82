"""The processor time that a thread may use."""

from __future__ import annotations

import time


class CpuBudget:
    """A share of one core for the thread that makes it: a bucket of processor seconds that fills with the clock.

    Args:
        share: processor seconds that come in a second.
        burst: processor seconds that the bucket holds, and starts with.
    """

    def __init__(self, share: float, burst: float) -> None:
        self._share, self._burst, self._left = share, burst, burst
        self._clock, self._used = time.monotonic(), time.thread_time()

    def throttle_delay(self) -> float:
        """Seconds to do nothing until the bucket is no longer overdrawn; 0 while it is not."""
        clock, used = time.monotonic(), time.thread_time()
        self._left = min(self._burst, self._left + (clock - self._clock) * self._share) - (used - self._used)
        self._clock, self._used = clock, used
        return max(0.0, -self._left / self._share)
