"""What a job lacks on a system that does not tell or have everything; nothing that Linux alone has is needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from ..processes import stack_dump
from ..wire import addresses

log = logging.getLogger("forgather_control")
_warned = False


def warn_once(process_is_known: bool) -> None:
    """Log one warning that names all that is missing, once in this process.

    Args:
        process_is_known: whether the system tells when this process started.
    """
    global _warned
    if not _warned and (found := list(_missing(process_is_known))):
        log.warning("On this system %s. Everything else works.", "; ".join(found))
        _warned = True


def _missing(process_is_known: bool) -> Iterator[str]:
    if not process_is_known:
        why = "(/proc is not mounted, or is that of another PID namespace)"
        yield f"the start and memory of this process are unknown {why}, so only the job's lock shows whether it lives"
    if not stack_dump.is_possible():
        yield "the stacks of a hanging process cannot be read (no memfd_create, free real-time signal, or /proc)"
    if not addresses.knows_peers():
        yield "the senders of commands are unknown (no SO_PEERCRED), so only file modes keep other users out"
