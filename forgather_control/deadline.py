"""Deadlines on the monotonic clock, and the wait for a file lock, which has none of its own."""

from __future__ import annotations

import time
from typing import Final

#: Seconds between two attempts to lock: flock(2) has no time-out, and its signals belong to the application.
_LOCK_RETRY: Final = 0.005


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


def lock_file(file: int, deadline: Deadline) -> bool:
    """Take an exclusive lock on an open file (flock(2)); return whether it was free before the deadline.

    Raises:
        OSError: the file system has no locks.
    """
    import fcntl

    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if deadline.passed():
                return False
        time.sleep(_LOCK_RETRY)
