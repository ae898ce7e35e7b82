"""Which process, on which host, started when; and whether it still runs. Runs on any thread.

A pid alone says little: it is reused, and it means another process on another host that shares the home directory,
and in another PID namespace. A process is its pid *and* its start time (psutil's ``Process.__eq__`` explains
why), on one boot of one machine. Start times are compared relative to the boot: when the wall clock is set, all start
times move, but not their distance to the boot.
"""

from __future__ import annotations

import os
import socket
from functools import cache
from typing import Final, NamedTuple

from .. import states

#: Seconds by which two readings of one start time may differ: the boot time is rounded to whole seconds.
_TOLERANCE: Final = 2.0


class Identity(NamedTuple):
    """One process on one boot of one machine; ``None`` for what the system does not tell.

    Attributes:
        host: the host's name.
        pid: the process id, in its own PID namespace.
        started_at: when the process started, seconds since the epoch.
        booted_at: when its machine booted, seconds since the epoch, by the same clock.
        boot_id: random, new at each boot (random(4), /proc/sys/kernel/random/boot_id).
        machine: a hash of machine-id(5), which distinguishes two hosts of the same name.
        pid_namespace: the inode of its PID namespace (pid_namespaces(7)).
    """

    host: str
    pid: int
    started_at: float | None = None
    booted_at: float | None = None
    boot_id: str | None = None
    machine: str | None = None
    pid_namespace: int | None = None


def current_process() -> Identity:
    """Return the identity of this process."""
    import psutil

    return Identity(
        host=socket.gethostname(),
        pid=os.getpid(),
        started_at=psutil.Process().create_time(),
        booted_at=psutil.boot_time(),
        boot_id=_boot_id(),
        machine=_machine(),
        pid_namespace=_pid_namespace(),
    )


def is_elsewhere(other: Identity) -> bool:
    """Whether a process is on another host, as far as is known."""
    return other.host != socket.gethostname() or _differ(other.machine, _machine())


def judge(other: Identity) -> states.ProcessState:
    """Whether a process runs, is gone, or is where this host cannot see it.

    "gone" needs a proof: what is unknown of ``other`` or of this system proves nothing.
    """
    if is_elsewhere(other):
        return states.PROCESS_ELSEWHERE
    if _differ(other.boot_id, _boot_id()):
        return states.PROCESS_GONE
    if _differ(other.pid_namespace, _pid_namespace()):
        return states.PROCESS_ELSEWHERE
    return states.PROCESS_RUNNING if _exists(other.pid) and _runs(other) else states.PROCESS_GONE


def is_gone(other: Identity) -> bool:
    """Whether a process is proven to be gone by a test that costs next to nothing; False proves nothing.

    It was on this host, in this boot and PID namespace, and its pid is free.
    """
    here = (_boot_id(), _pid_namespace())
    there = (other.boot_id, other.pid_namespace)
    return None not in here and here == there and not is_elsewhere(other) and not _exists(other.pid)


def _exists(pid: int) -> bool:
    """Whether a process has this pid: kill(2), because psutil takes fifty times as long."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # another user's process; or no valid pid, which psutil reports
    return True


def _differ(one: object, two: object) -> bool:
    return one is not None and two is not None and one != two


def _runs(other: Identity) -> bool:
    import psutil

    try:
        process = psutil.Process(other.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        started_at = process.create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
    if other.started_at is None:
        return True
    if other.booted_at is None:
        return abs(started_at - other.started_at) <= _TOLERANCE
    age_at_start = other.started_at - other.booted_at
    return abs(started_at - psutil.boot_time() - age_at_start) <= _TOLERANCE


@cache
def _boot_id() -> str | None:
    return _first_line("/proc/sys/kernel/random/boot_id")


@cache
def _machine() -> str | None:
    import hashlib

    line = _first_line("/etc/machine-id")
    # machine-id(5) is confidential: only a keyed digest of it leaves the machine.
    return hashlib.sha256(b"forgather_control:" + line.encode()).hexdigest()[:16] if line else None


@cache
def _pid_namespace() -> int | None:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None


def _first_line(path: str) -> str | None:
    try:
        with open(path, encoding="ascii") as file:
            return file.readline().strip() or None
    except (OSError, ValueError):
        return None
