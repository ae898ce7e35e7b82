"""The pipe that wakes the server thread."""

from __future__ import annotations

import os
import select
import threading
from contextlib import suppress

from ..descriptors import Kept


class Waker:
    """A pipe with which any thread, signal handler or finalizer wakes the server thread, also after ``close``."""

    def __init__(self) -> None:
        self._out, self._in = map(Kept.of, os.pipe())
        os.set_blocking(self._in.number, False)
        # Without it a wake during close could write into a file that has just got the same descriptor. Reentrant, as a
        # signal handler may interrupt its holder.
        self._lock = threading.RLock()

    def fileno(self) -> int:
        """Return the descriptor for a selector."""
        return self._out.number

    def is_whole(self) -> bool:
        """Return whether both ends are open."""
        return self._out.is_open() and self._in.is_open()

    def wake(self) -> None:
        """Make the pipe readable."""
        with self._lock, suppress(BlockingIOError):  # it is full, so the thread is about to wake up
            if self.is_whole():  # else SIGPIPE might end the process
                os.write(self._in.number, b"\0")

    def wait(self, seconds: float) -> bool:
        """Return whether there was a wake, or is one within so many seconds."""
        poller = select.poll()
        poller.register(self._out.number, select.POLLIN)
        return bool(poller.poll(seconds * 1000) and self._out.is_open() and os.read(self._out.number, 4096))

    def close(self) -> None:
        """Close the pipe. May be called twice."""
        with self._lock:
            self._in.close()
            self._out.close()

    def abandon(self) -> None:
        """Close the pipe in a forked child, where a thread that does not exist there may hold the lock."""
        self._lock = threading.RLock()
        self.close()
