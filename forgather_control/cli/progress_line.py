"""The line that a terminal shows while commands are waited for: what a job is doing, and for how long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final

from .. import states
from ..client.connection import Client
from ..client.reading import reading
from ..client.target import Target
from ..errors import ControlError
from . import output, terminal

#: Seconds between two looks at the job, and before the first one: most commands need no line.
PERIOD: Final = 0.5


class Line:
    """A line on stderr, where that is a terminal: written again and again while a block runs, and erased at its end.

    Args:
        source: makes the texts: a context manager, entered on the thread that writes, around a function from the
            seconds since the block began to a text. Where it raises ControlError or OSError, there is no line any
            more: the block finds out by itself what is wrong.
        is_wanted: whether there is a line at all.
    """

    def __init__(
        self, source: Callable[[], AbstractContextManager[Callable[[float], str]]], is_wanted: bool = True
    ) -> None:
        self._source, self._began = source, time.monotonic()
        self._done, self._lock = threading.Event(), threading.Lock()  # the lock is held while the terminal is written
        self._is_shown = is_wanted and terminal.can_rewrite()

    def __enter__(self) -> Line:
        if self._is_shown:
            threading.Thread(target=self._show, name="forgather-line", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        with self.hidden():
            self._done.set()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Erase the line; it is not written while the inner block runs."""
        with self._lock:
            self._write("")
            yield

    def _show(self) -> None:
        if self._done.wait(PERIOD):
            return
        with suppress(ControlError, OSError), reading(), self._source() as say:
            while not self._done.is_set():
                text = output.safe(say(time.monotonic() - self._began))
                with self._lock:
                    if not self._done.is_set():
                        self._write(text[: (terminal.width(sys.stderr) or 80) - 1])  # a line that wraps stays
                self._done.wait(PERIOD)

    def _write(self, text: str) -> None:
        if self._is_shown:
            sys.stderr.write(f"\r\x1b[K{text}")
            sys.stderr.flush()


def of_command(
    where: Target, command: str, command_id: str | None
) -> Callable[[], AbstractContextManager[Callable[[float], str]]]:
    """Return the source of a line that says what becomes of a command that was given with an id."""

    @contextmanager
    def asked() -> Iterator[Callable[[float], str]]:
        with Client(where) as job:
            yield lambda seconds: doing(job.call("status"), command, command_id, seconds)

    return asked


def doing(status: dict[str, Any], command: str, command_id: str | None, seconds: float) -> str:
    """Say in one line what becomes of a command at present."""
    took = output.duration(seconds)
    return f"{output.verb(command)}: {why_open(status, command_id)}, {took}"


def why_open(status: dict[str, Any], command_id: str | None) -> str:
    """Say why a command is not finished."""
    records = [record for record in status.get("commands") or [] if record.get("command_id") == command_id]
    state, phase = (records[-1]["state"] if records else states.COMMAND_ACCEPTED), status.get("status")
    busy = phase in (states.STATUS_SAVING, states.STATUS_EVALUATING)
    if state == states.COMMAND_ACCEPTED:
        if busy or phase == states.STATUS_PAUSED:
            return f"accepted, the job is {phase}"
        return f"accepted, waiting for the end of step {(status.get('global_step') or 0) + 1}"
    return f"{phase}" if busy else f"{state}, waiting until it is finished"
