"""Time that runs out: a deadline for a wait of several steps, a budget for a thread.

Floor 0: imports nothing of ours.
"""

from __future__ import annotations

import time


class Deadline:
    """A moment after which a wait is over, on the monotonic clock.

    Args:
        seconds: from now; ``None`` means never.
    """

    def __init__(self, seconds: float | None) -> None:
        #: The moment in ``time.monotonic()`` seconds, or ``None`` for never.
        self.at = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Seconds left, never below 0; ``None`` means for ever. Fits ``socket.settimeout`` and ``wait``."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def passed(self) -> bool:
        """Whether the moment is over."""
        return self.at is not None and time.monotonic() >= self.at


class Budget:
    """A share of one core for the thread that makes it: a bucket of processor seconds that fills with the clock.

    Args:
        share: processor seconds that come in a second.
        burst: processor seconds that the bucket holds, and starts with.
    """

    def __init__(self, share: float, burst: float) -> None:
        self._share, self._burst, self._left = share, burst, burst
        self._clock, self._used = time.monotonic(), time.thread_time()

    def nap(self) -> float:
        """Seconds to do nothing until the bucket is no longer overdrawn; 0 while it is not."""
        clock, used = time.monotonic(), time.thread_time()
        self._left = min(self._burst, self._left + (clock - self._clock) * self._share) - (used - self._used)
        self._clock, self._used = clock, used
        return max(0.0, -self._left / self._share)
