"""Deadlines on the monotonic clock, and the wait for a file lock until one."""

from __future__ import annotations

import time


class Deadline:
    """A moment at which a wait times out: so many seconds from now, or never (``None``)."""

    def __init__(self, seconds: float | None) -> None:
        #: The moment in ``time.monotonic()`` seconds, or ``None`` for never.
        self.at = None if seconds is None else time.monotonic() + seconds

    def left(self) -> float | None:
        """Return the seconds left, never below 0; ``None`` for ever, as ``socket.settimeout`` and ``wait`` take it."""
        return None if self.at is None else max(0.0, self.at - time.monotonic())

    def passed(self) -> bool:
        """Return whether the moment has come."""
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
        time.sleep(0.005)  # flock(2) has no time-out, and signals belong to the application
