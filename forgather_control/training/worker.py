"""A thread for calls that may block for long, such as those of a file system that hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any


class Worker:
    """Runs calls in order on one thread. All methods may be called on any thread.

    A daemon thread, because the interpreter waits at exit for those of an executor, which may hang.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Run a call after those before it; return its future."""
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future

    def close(self, seconds: float | None = 0.0) -> None:
        """End the thread after the calls before; wait for it at most so many seconds."""
        self._calls.put(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except BaseException as err:  # boundary: it is the future's
                future.set_exception(err)
