"""Ends processes of this host: SIGTERM, and after a grace SIGKILL.

Runs on any thread.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Final

from .. import states
from .liveness import Identity, judge

#: Seconds that the kernel may need for taking down a killed process: gigabytes are to be given back.
_AFTER_KILL: Final = 5.0
#: Seconds between two looks at a process where the system has no descriptor to wait on.
_LOOK: Final = 0.05


class Grip:
    """One running process, held: what is sent reaches it or nobody, whoever has its pid by then.

    The descriptor is opened first and the process judged after that, so both mean the same one
    (pidfd_open(2)). Without such descriptors (before Linux 5.3, in some sandboxes) it is judged
    again each time, which leaves microseconds.

    Raises:
        ProcessLookupError: it is gone, or lives where this host cannot see it.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._pidfd = _open_pidfd(identity.pid)
        if judge(identity) != states.PROCESS_RUNNING:
            self.close()
            raise ProcessLookupError(f"pid {identity.pid} is not the process that it was")

    def __enter__(self) -> Grip:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let it go."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def send(self, signum: int) -> None:
        """Send a signal.

        Raises:
            ProcessLookupError: it has ended.
            PermissionError: it belongs to another user.
        """
        import signal

        if self._pidfd is not None:
            signal.pidfd_send_signal(self._pidfd, signum)
        elif self.has_ended():
            raise ProcessLookupError(f"pid {self.identity.pid} has ended")
        else:
            os.kill(self.identity.pid, signum)

    def has_ended(self) -> bool:
        """Whether it is over, reaped or not."""
        return not _still_running([self], 0.0)


def terminate(
    identities: Iterable[Identity], grace_seconds: float, *, patience: float = 0.0, owner: int | None = None
) -> list[tuple[Identity, states.KillOutcome]]:
    """End processes of this host: all are sent SIGTERM, and after the grace those that are left SIGKILL.

    Args:
        grace_seconds: between the two.
        patience: seconds before the first, in which they may end by themselves.
        owner: end only processes of this user id; ``None`` ends whatever the kernel lets us.
    """
    import signal

    identities = list(identities)
    fates: dict[Identity, states.KillOutcome] = {}
    grips = [grip for identity in dict.fromkeys(identities) if (grip := _grasp(identity, owner, fates))]
    try:
        left = _settle(grips, states.KILL_GONE, patience, fates)
        left = _settle(_sent(left, signal.SIGTERM, states.KILL_GONE, fates), states.KILL_ENDED, grace_seconds, fates)
        left = _settle(_sent(left, signal.SIGKILL, states.KILL_ENDED, fates), states.KILL_KILLED, _AFTER_KILL, fates)
        fates.update({grip.identity: states.KILL_STUCK for grip in left})
    finally:
        for grip in grips:
            grip.close()
    return [(identity, fates[identity]) for identity in identities]


def _grasp(identity: Identity, owner: int | None, fates: dict[Identity, states.KillOutcome]) -> Grip | None:
    try:
        grip = Grip(identity)
    except ProcessLookupError:
        fates[identity] = states.KILL_ELSEWHERE if judge(identity) == states.PROCESS_ELSEWHERE else states.KILL_GONE
        return None
    if identity.pid == os.getpid() or owner not in (None, _user_of(identity.pid)):
        grip.close()
        fates[identity] = states.KILL_REFUSED
        return None
    return grip


def _sent(
    grips: list[Grip], signum: int, if_over: states.KillOutcome, fates: dict[Identity, states.KillOutcome]
) -> list[Grip]:
    """Those that the signal reached."""
    reached = []
    for grip in grips:
        try:
            grip.send(signum)
            reached.append(grip)
        except ProcessLookupError:
            fates[grip.identity] = if_over
        except PermissionError:
            fates[grip.identity] = states.KILL_REFUSED
    return reached


def _settle(
    grips: list[Grip], word: states.KillOutcome, seconds: float, fates: dict[Identity, states.KillOutcome]
) -> list[Grip]:
    """Those that still run when all have ended, or the time is over; the others have this fate."""
    left = _still_running(grips, seconds)
    fates.update({grip.identity: word for grip in grips if grip not in left})
    return left


def _still_running(grips: list[Grip], seconds: float) -> list[Grip]:
    import select

    deadline = time.monotonic() + seconds
    left = list(grips)
    while True:
        poller = select.poll()
        files = {grip._pidfd: grip for grip in left if grip._pidfd is not None}
        for file in files:
            poller.register(file, select.POLLIN)
        pause = min(max(0.0, deadline - time.monotonic()), 60.0 if len(files) == len(left) else _LOOK)
        over = [files[file] for file, _ in poller.poll(pause * 1000)] if left else []
        over += [grip for grip in left if grip._pidfd is None and judge(grip.identity) != states.PROCESS_RUNNING]
        left = [grip for grip in left if grip not in over]
        if not left or time.monotonic() >= deadline:
            return left


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):  # no such call, or not allowed, or out of files; or gone, as is seen next
        return None


def _user_of(pid: int) -> int | None:
    import psutil

    try:
        return int(psutil.Process(pid).uids().real)
    except psutil.Error:
        return None
