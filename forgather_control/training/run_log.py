"""What the log of a job says of its control: one line for the start, and for each command when it is applied and final.

These lines are INFO; warnings are for what needs attention. Nothing is raised, whatever the handlers of the script do.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

from .. import states
from ..wire.records import CommandRecord

log = logging.getLogger("forgather_control")

START: Final = "controlled as {0}: forgather-control status {0}"

_printed: set[str] = set()  # the job ids whose start was printed in this process


def start(job_id: str | None, quiet: bool) -> None:
    """Say how to control the job: in the log or, where logging is not configured at all, once on stderr."""
    line = START.format(job_id)
    try:
        if log.hasHandlers():
            log.info("%s", line)
        elif not quiet and line not in _printed and sys.stderr is not None:  # print(file=None) would use stdout
            _printed.add(line)
            print(line, file=sys.stderr, flush=True)
    except Exception:  # boundary: a handler of the script's, or a stderr that is closed
        pass


def note(record: CommandRecord) -> None:
    """Say that a command is applied or final: who gave it, why, and what became of it. On any thread."""
    if not log.isEnabledFor(logging.INFO):
        return
    try:
        log.info("%s %s%s%s%s", record.command, record.state, _step(record), _asked(record), _outcome(record))
    except Exception:  # boundary: a handler of the script's; the command goes on
        pass


def _step(record: CommandRecord) -> str:
    return "" if record.applied_at_step is None else f" at step {record.applied_at_step}"


def _asked(record: CommandRecord) -> str:
    by = "" if record.requested_by is None else f", requested by {who(record.requested_by)}"
    return by + ("" if record.reason is None else f" ({_shown(record.reason)})")


def who(by: dict[str, Any]) -> str:
    """Name the caller of a command: user, pid and program as far as they are known, else how it came."""
    user = by.get("user") or (None if by.get("uid") is None else f"uid {by['uid']}")
    process = [] if by.get("pid") is None else [f"pid {by['pid']}"]
    process += [] if by.get("program") is None else [str(by["program"])]
    via = by.get("via")
    if user is None:
        return f"a {via}" if via in (states.VIA_SIGNAL, states.VIA_RULE) else f"an unknown client over {via}"
    process += [] if via in (None, states.VIA_SOCKET) else [f"by a {via}"]
    return _shown(user) + (f" ({_shown(', '.join(process))})" if process else "")


def _outcome(record: CommandRecord) -> str:
    if record.error is not None:
        return f": {_shown(record.error.get('message'))}"
    path = (record.result or {}).get("path")
    return f": {_shown(path)}" if record.is_final and path else ""


def _shown(text: object) -> str:
    """Return a text on one line of printable characters: a client gave it."""
    text = str(text)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
