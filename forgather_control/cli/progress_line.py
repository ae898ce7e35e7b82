"""The line that a terminal shows while a command is waited for: what the job is doing, and for how long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from .. import states
from ..client.connection import Client
from ..client.target import Target
from ..errors import ControlError
from . import output

#: Seconds between two looks at the job, and before the first one: most commands need no line.
PERIOD: Final = 0.5


@contextmanager
def shown(where: Target, command: str, command_id: str) -> Iterator[None]:
    """Show the line on stderr until the block ends, and erase it then.

    Args:
        command: the method's name.
        command_id: the id that the command was given.
    """
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(where, command, command_id, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(PERIOD)
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _show(where: Target, command: str, command_id: str, done: threading.Event) -> None:
    began = time.monotonic()
    with suppress(ControlError, OSError):  # the call that waits says what is wrong
        if done.wait(PERIOD):
            return
        with Client(where) as job:
            while not done.is_set():
                text = doing(job.call("status"), command, command_id, time.monotonic() - began)
                if not done.is_set():
                    sys.stderr.write(f"\r\x1b[K{output.safe(text)}")
                    sys.stderr.flush()
                done.wait(PERIOD)


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
        if busy:
            return f"accepted, the job is {phase}"
        return f"accepted, waiting for the end of step {(status.get('global_step') or 0) + 1}"
    return f"{phase}" if busy else f"{state}, waiting until it is finished"
