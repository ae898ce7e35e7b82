"""Which process, on which host, started when; and whether it still runs. Runs on any thread.

A pid alone says little: it is reused, and it means another process on another host that shares the home directory,
and in another PID namespace. A process is its pid *and* its start time (psutil's ``Process.__eq__`` explains
why), on one boot of one machine. Start times are compared relative to the boot: when the wall clock is set, all start
times move, but not their distance to the boot.
"""

import os
import socket
from contextlib import suppress
from functools import cache
from typing import NamedTuple

from .. import states
from . import proc


class Identity(NamedTuple):
    """One process on one boot of one machine; ``None`` for what the system does not tell."""

    host: str
    pid: int  #: In its own PID namespace.
    started_at: float | None = None  #: Seconds since the epoch.
    booted_at: float | None = None  #: When its machine booted, by the same clock.
    boot_id: str | None = None  #: Random, new at each boot (random(4), /proc/sys/kernel/random/boot_id).
    machine: str | None = None  #: A hash of machine-id(5), which distinguishes two hosts of the same name.
    pid_namespace: int | None = None  #: The inode of its PID namespace (pid_namespaces(7)).


def current_process() -> Identity:
    """Return the identity of this process."""
    started_at = booted_at = None
    if psutil := proc.psutil():
        with suppress(
            Exception
        ):  # boundary: what psutil raises where files of /proc are hidden differs from one to the other
            started_at, booted_at = psutil.Process().create_time(), psutil.boot_time()
    return Identity(socket.gethostname(), os.getpid(), started_at, booted_at, _boot_id(), _machine(), _pid_namespace())


def is_elsewhere(other: Identity) -> bool:
    """Return whether a process is on another host, as far as is known."""
    return other.host != socket.gethostname() or _differ(other.machine, _machine())


def is_same_boot(other: Identity) -> bool:
    """Return whether a process was started on this machine since it booted; False if that is not known."""
    return other.boot_id is not None and other.boot_id == _boot_id()


def judge(other: Identity) -> states.ProcessState:
    """Return whether a process runs, is gone (proven: what is unknown proves nothing), or cannot be seen from here."""
    if is_elsewhere(other):
        return states.PROCESS_ELSEWHERE
    if _differ(other.boot_id, _boot_id()):
        return states.PROCESS_GONE
    if _differ(other.pid_namespace, _pid_namespace()):
        return states.PROCESS_ELSEWHERE
    return states.PROCESS_RUNNING if _exists(other.pid) and _runs(other) else states.PROCESS_GONE


def is_gone(other: Identity) -> bool:
    """Return whether a cheap test proves that a process is gone: this host, boot and PID namespace, and a free pid."""
    here = (_boot_id(), _pid_namespace())
    if None in here or here != (other.boot_id, other.pid_namespace) or _exists(other.pid):
        return False
    return not is_elsewhere(other)  # last, because it imports hashlib


def held_up(other: Identity) -> str | None:
    """Return in words why a process does nothing; ``None`` if it runs, or if the system does not tell."""
    psutil = proc.psutil()
    if psutil is None or judge(other) != states.PROCESS_RUNNING:
        return None
    words = {
        psutil.STATUS_STOPPED: "stopped by a signal (SIGSTOP)",
        psutil.STATUS_TRACING_STOP: "stopped by a debugger",
        psutil.STATUS_DISK_SLEEP: "in uninterruptible sleep: it waits for a disk, a network file system or a device",
    }
    with suppress(psutil.Error, OSError):
        return words.get(psutil.Process(other.pid).status())
    return None


def _exists(pid: int) -> bool:
    """Return whether a process has this pid: by kill(2), because psutil takes fifty times as long."""
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
    """Return whether the process with this pid may be the one that is meant: False only on proof."""
    psutil = proc.psutil()
    if psutil is None:
        return True
    try:
        process = psutil.Process(other.pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        started_at = process.create_time()
    except psutil.ZombieProcess:
        return False
    except psutil.NoSuchProcess:
        # /proc hides it (hidepid, proc(5)), if not even its directory can be seen; that of a thread can.
        return _exists(other.pid) and not os.path.exists(f"/proc/{other.pid}")
    except (psutil.AccessDenied, OSError):
        return True
    if other.started_at is None:
        return True
    clock_was_set_by = 0.0 if other.booted_at is None else psutil.boot_time() - other.booted_at
    return bool(
        abs(started_at - clock_was_set_by - other.started_at) <= 2.0
    )  # s: boot times are rounded to whole seconds


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
        with open(path, encoding="utf-8") as file:
            return file.readline().strip() or None
    except (OSError, ValueError):
        return None
