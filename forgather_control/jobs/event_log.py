"""The event log ``events.jsonl`` of a job: one event a line, oldest first. Any thread, any process.

The job writes it, see ``training.event_file``; clients read it and do not trust it.
"""

import errno
import os
import stat
from typing import Any, Final

from .. import states
from ..schema import INTEGER, NUMBER, TEXT, Field, parse_json
from ..wire import jsonrpc
from . import limits, private_files

EVENTS: Final = "events.jsonl"
#: The kinds that are written: not those that are sampled.
LOGGED: Final = tuple(kind for kind in states.EVENT_KINDS if kind not in (states.EVENT_PROGRESS, states.EVENT_METRICS))

_APPEND: Final = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FIELDS: Final = {"seq": Field(INTEGER, 1), "time": Field(NUMBER), "kind": Field(TEXT)}


def append(directory: int, lines: bytes) -> bool:
    """Add lines to the log in a directory; return False if there is none that this process can have made.

    Raises:
        OSError: it cannot be written; no part of the lines is.
    """
    try:
        file = os.open(EVENTS, _APPEND, dir_fd=directory)
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):  # none, a link, a FIFO
            return False
        raise
    try:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or facts.st_uid != os.geteuid():
            return False
        if facts.st_size + len(lines) > limits.MAX_EVENT_LOG:
            old, _ = private_files.read(directory, EVENTS, limits.MAX_EVENT_LOG)
            private_files.write(directory, EVENTS, shortened(old + lines))
        elif os.write(file, lines) < len(lines):
            os.ftruncate(file, facts.st_size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), EVENTS)
    finally:
        os.close(file)
    return True


def shortened(data: bytes) -> bytes:
    """Return the first line, and so many of the last ones that they take half of what a log may have.

    The first of those says how many were ``lost`` before it.
    """
    first, *lines = data.splitlines(keepends=True)
    kept: list[bytes] = []
    room = limits.MAX_EVENT_LOG // 2
    while lines and (room := room - len(lines[-1])) >= 0:
        kept.append(lines.pop())
    if lines and kept and (event := _event(kept[-1])) is not None:
        lost = sum(1 + int(known.get("lost", 0)) for known in parse(b"".join(lines)))
        kept[-1] = jsonrpc.encode({**event, "lost": lost + int(event.get("lost", 0))})
    head = first if len(first) <= limits.MAX_EVENT_LOG // 4 else b""
    return head + b"".join(reversed(kept))


def read(path: str, parent: int | None = None) -> list[dict[str, Any]]:
    """Return the events in the log of a directory, oldest first; lines that hold none are left out.

    Args:
        path, parent: the directory, as for :func:`private_files.opened`.

    Raises:
        ValueError: the file cannot be read, is too long, or another user may have written it.
    """
    data = private_files.read_trusted(path, EVENTS, limits.MAX_EVENT_LOG, parent)
    return [] if data is None else parse(data)


def parse(data: bytes) -> list[dict[str, Any]]:
    """Return the events among some lines."""
    return [event for event in map(_event, data.split(b"\n")) if event is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        value = parse_json(line) if line.strip() else None
    except ValueError:  # half a line, of a job whose disk was full
        return None
    return value if isinstance(value, dict) and is_event(value) and value["kind"] in LOGGED else None


def is_event(value: Any) -> bool:
    """Return whether a JSON value is an event: it has a number, a time and a kind."""
    if not isinstance(value, dict) or type(value.get("lost", 0)) is not int:
        return False
    return all(field.accepts(value.get(name)) for name, field in _FIELDS.items())
