"""Deadlines on the monotonic clock."""

from __future__ import annotations

import time


class Deadline:
    """A moment at which a wait times out, on the monotonic clock.

    Args:
        seconds: from now; ``None`` means never.
    """

    def __init__(self, seconds: float | None) -> None:
        #: The moment in ``time.monotonic()`` seconds, or ``None`` for never.
        self.at = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Return the seconds left, never below 0; ``None`` for ever, as ``socket.settimeout`` and ``wait`` take it."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def passed(self) -> bool:
        """Whether the moment is over."""
        return self.at is not None and time.monotonic() >= self.at
