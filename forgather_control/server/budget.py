"""The processor time that a thread may use."""

from __future__ import annotations

import time
from _thread import get_ident  # the system's, also once gevent or eventlet has replaced that of threading
from typing import Any


class CpuBudget:
    """A share of one core for the thread that makes it: a bucket of processor seconds that fills with the clock.

    Args:
        share: processor seconds that come in a second.
        burst: processor seconds that the bucket holds, and starts with.
        refill: processor seconds that an overdrawn bucket must hold before it is used again: more than finding that out
            costs. With less, a thread that looks again and again uses up all that comes in, and does nothing else.
    """

    def __init__(self, share: float, burst: float, refill: float = 0.0) -> None:
        self._share, self._burst, self._refill, self._left = share, burst, refill, burst
        self._clock, self._used = time.monotonic(), time.thread_time()
        self._thread, self._collecting_since = get_ident(), 0.0

    def leave_out_collection(self, phase: str, info: dict[str, Any]) -> None:
        """Charge no full garbage collection; to be one of ``gc.callbacks``.

        Any thread may have to do one for all. Beside torch and its trainers it takes a quarter of a second, for which
        the thread would do nothing for six.
        """
        if info["generation"] != 2 or get_ident() != self._thread:
            return
        if phase == "start":
            self._collecting_since = time.thread_time()
        else:
            self._used += time.thread_time() - self._collecting_since

    def throttle_delay(self) -> float:
        """Seconds to do nothing until an overdrawn bucket is refilled; 0 while it is not overdrawn."""
        clock, used = time.monotonic(), time.thread_time()
        self._left = min(self._burst, self._left + (clock - self._clock) * self._share) - (used - self._used)
        self._clock, self._used = clock, used
        return (self._refill - self._left) / self._share if self._left < 0 else 0.0
