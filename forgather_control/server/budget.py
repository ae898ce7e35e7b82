"""The processor time that a thread may use."""

from __future__ import annotations

import math
import time


class CpuBudget:
    """A share of one core for the thread that makes it: a bucket of processor seconds that fills with the clock.

    Args:
        share: processor seconds that come in a second.
        burst: processor seconds that the bucket holds, and starts with.
        refill: processor seconds that an overdrawn bucket must hold before it is used again: more than finding that out
            costs. With less, a thread that looks again and again uses up all that comes in, and does nothing else.
        debt: processor seconds by which it can be overdrawn at most. What is more was no answer: a garbage collection,
            which any thread may have to do for all, takes a quarter of a second beside torch and its trainers.
    """

    def __init__(self, share: float, burst: float, refill: float = 0.0, debt: float = math.inf) -> None:
        self._share, self._burst, self._refill, self._debt, self._left = share, burst, refill, debt, burst
        self._clock, self._used = time.monotonic(), time.thread_time()

    def throttle_delay(self) -> float:
        """Seconds to do nothing until an overdrawn bucket is refilled; 0 while it is not overdrawn."""
        clock, used = time.monotonic(), time.thread_time()
        left = min(self._burst, self._left + (clock - self._clock) * self._share) - (used - self._used)
        self._left = max(left, -self._debt)
        self._clock, self._used = clock, used
        return (self._refill - self._left) / self._share if self._left < 0 else 0.0
