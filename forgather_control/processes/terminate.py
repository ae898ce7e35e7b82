"""End processes of this host: SIGTERM, and after a grace period SIGKILL. Any thread.

psutil compares the start time right before each signal, so a process that has taken over the pid is spared; what
remains are the microseconds between that check and kill(2).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from typing import Any

from .. import states
from ..deadline import Deadline
from . import proc
from .liveness import Identity, judge

#: The ``psutil.Process`` of each process that still runs, and what became of each other one.
Processes = dict[Identity, Any]
Outcomes = dict[Identity, states.KillOutcome]


def terminate(
    identities: Iterable[Identity], grace_seconds: float, *, owner: int | None = None
) -> list[tuple[Identity, states.KillOutcome]]:
    """Send SIGTERM to all processes at once, then SIGKILL to those that are left; return what became of each.

    Args:
        grace_seconds: between the two signals.
        owner: end only processes of this user id; ``None``: of all users.
    """
    identities = list(identities)
    outcomes: Outcomes = {}
    left = {identity: found for identity in identities if (found := _acquire(identity, owner, outcomes))}
    left = _send(left, signal.SIGTERM, states.KILL_GONE, outcomes)
    left = _wait(left, grace_seconds, states.KILL_ENDED, outcomes)
    left = _send(left, signal.SIGKILL, states.KILL_ENDED, outcomes)
    # The kernel needs a while to take down a process that has gigabytes to give back.
    left = _wait(left, 5.0, states.KILL_KILLED, outcomes)
    outcomes.update(dict.fromkeys(left, states.KILL_STUCK))
    return [(identity, outcomes[identity]) for identity in identities]


def _acquire(identity: Identity, owner: int | None, outcomes: Outcomes) -> Any:
    """Return the ``psutil.Process`` if it may be ended; else record its outcome and return ``None``."""
    process = uid = None
    if psutil := proc.psutil():
        with contextlib.suppress(psutil.Error):  # it is gone, or hidden
            # Before it is judged, so that the process that was judged is the one that is signalled.
            process = psutil.Process(identity.pid)
            uid = process.uids().real
    state = judge(identity)
    if state == states.PROCESS_ELSEWHERE:
        outcomes[identity] = states.KILL_ELSEWHERE
    elif state == states.PROCESS_GONE:
        outcomes[identity] = states.KILL_GONE
    elif process is None or identity.pid == os.getpid() or owner not in (None, uid):
        outcomes[identity] = states.KILL_REFUSED
    else:
        return process
    return None


def _send(processes: Processes, signum: int, if_ended: states.KillOutcome, outcomes: Outcomes) -> Processes:
    """Send a signal; return the processes that it reached."""
    psutil = proc.psutil()

    for identity, process in processes.items():
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            outcomes[identity] = if_ended
        except psutil.AccessDenied:
            outcomes[identity] = states.KILL_REFUSED
    return {identity: process for identity, process in processes.items() if identity not in outcomes}


def _wait(processes: Processes, seconds: float, if_ended: states.KillOutcome, outcomes: Outcomes) -> Processes:
    """Wait until all processes have ended or the time is over; return those that still run.

    Not by ``psutil.wait_procs``: it waits for zombies, and reaps children of this process that others wait for.
    """
    deadline = Deadline(seconds)
    while True:
        left = {identity: process for identity, process in processes.items() if not _has_ended(process)}
        if not left or deadline.passed():
            outcomes.update(dict.fromkeys(processes.keys() - left, if_ended))
            return left
        time.sleep(min(0.05, deadline.left() or 0.0))


def _has_ended(process: Any) -> bool:
    """Return whether a process has ended, reaped or not."""
    psutil = proc.psutil()

    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
