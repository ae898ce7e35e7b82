"""A pipe with which any thread can wake the server thread out of its selector."""

from __future__ import annotations

import os
import select
import threading


class Waker:
    """A pipe; ``wake`` makes its reading end readable.

    ``wake`` may be called on any thread and in signal handlers and finalizers, also after ``close``.
    """

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        os.set_blocking(self._out, False)
        os.set_blocking(self._in, False)
        # Without it a wake during close could write into a file that has just got the same descriptor. Reentrant, as a
        # signal handler may interrupt its holder.
        self._lock = threading.RLock()

    def fileno(self) -> int:
        """Return the descriptor for a selector."""
        return self._out

    def wake(self) -> None:
        """Make the pipe readable. Never waits for the server thread."""
        with self._lock:
            if self._in >= 0:
                try:
                    os.write(self._in, b"\0")
                except BlockingIOError:
                    pass  # the pipe is full, so the thread is about to wake up

    def drain(self) -> None:
        """Make the pipe unreadable until the next wake."""
        try:
            os.read(self._out, 4096)
        except BlockingIOError:
            pass

    def wait(self, seconds: float) -> bool:
        """Wait for a wake at most so long; return whether there was one."""
        poller = select.poll()
        poller.register(self._out, select.POLLIN)
        woken = bool(poller.poll(seconds * 1000))
        if woken:
            self.drain()
        return woken

    def close(self) -> None:
        """Close the pipe. May be called twice."""
        with self._lock:
            ends, self._in, self._out = (self._in, self._out), -1, -1
            for end in ends:
                if end >= 0:
                    os.close(end)

    def abandon(self) -> None:
        """Close the pipe in a forked child, where a thread that does not exist there may hold the lock."""
        self._lock = threading.RLock()
        self.close()
