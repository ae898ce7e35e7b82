"""A thread for calls that may block for long, such as those of a file system that hangs."""

from __future__ import annotations

import threading
from _thread import allocate_lock  # the system's, also once gevent or eventlet has replaced those of threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Task(Generic[Value]):
    """A call that a worker runs. All methods but ``run`` may be called on any thread.

    Args:
        call: what to run.
        then: called on the worker's thread with this task when it is done.
    """

    def __init__(self, call: Callable[[], Value], then: Callable[[Task[Value]], object] = lambda task: None) -> None:
        self._call, self._then = call, then
        self._undone = allocate_lock()
        self._undone.acquire()
        self._value: Value
        self.error: BaseException | None = None  #: What the call raised, once it is done.

    def run(self) -> None:
        """Run the call, on the worker's thread."""
        try:
            self._value = self._call()
        except BaseException as err:  # boundary: it is the task's
            self.error = err
        self._undone.release()
        self._then(self)

    def wait(self, seconds: float = 0.0) -> bool:
        """Return whether the call is done, or is within so many seconds."""
        done = self._undone.acquire(timeout=max(0.0, seconds))
        if done:
            self._undone.release()
        return done

    def result(self) -> Value:
        """Return what the finished call returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self._value


class Worker:
    """Runs calls in order on one thread. All methods may be called on any thread.

    A daemon thread, because the interpreter waits at exit for those of an executor, which may hang.
    """

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[Task[object] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(
        self, call: Callable[[], Value], then: Callable[[Task[Value]], object] = lambda task: None
    ) -> Task[Value]:
        """Run a call after those before it."""
        task = Task(call, then)
        self._tasks.put(task)  # type: ignore[arg-type]
        return task

    def close(self, seconds: float = 0.0) -> None:
        """End the thread after the calls before; wait for it at most so many seconds."""
        self._tasks.put(None)
        if seconds > 0:
            self._thread.join(seconds)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.run()
