"""Which process, on which host, since when: what tells a live owner from a dead or a foreign one, and ends it.

Floor 0: imports nothing of ours; psutil only when the operating system is asked about a process.
Runs on any thread.

A pid alone says little: it is reused, it means another process on another host that shares the
home directory, and in another PID namespace. A process is its pid *and* its start time (psutil's
``Process.__eq__`` gives the reason), on one boot of one machine. Its start is compared relative to
the boot, because a wall clock that jumps moves every start time but not their distance.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable
from functools import cache
from typing import Final, Literal, NamedTuple

#: What can be known of a process from outside.
Verdict = Literal["running", "gone", "elsewhere"]
#: What became of a process that was to end: it did so when asked (SIGTERM), or only when killed
#: (SIGKILL), or had done so before; it lives where this host cannot see it; it is not ours to end;
#: it has not gone though it was killed (it hangs in the kernel).
Outcome = Literal["ended", "killed", "gone", "elsewhere", "refused", "stuck"]

#: Seconds that two readings of one start time may differ: the boot time is rounded to whole seconds.
_TOLERANCE: Final = 2.0
#: Seconds that the kernel may need for taking down a killed process: gigabytes are to be given back.
_AFTER_KILL: Final = 5.0
#: Seconds between two looks at a process where the system has no descriptor to wait on.
_LOOK: Final = 0.05


class Identity(NamedTuple):
    """One process on one boot of one machine. ``None`` where the system does not tell.

    Attributes:
        host: the host's name.
        pid: the process id, in its own PID namespace.
        started_at: when the process started, seconds since the epoch.
        booted_at: when its machine booted, seconds since the epoch, by the same clock.
        boot_id: random, new at each boot (random(4), /proc/sys/kernel/random/boot_id).
        machine: stands for the machine; tells two hosts of one name apart (machine-id(5), hashed).
        pid_namespace: the inode of its PID namespace (pid_namespaces(7)).
    """

    host: str
    pid: int
    started_at: float | None = None
    booted_at: float | None = None
    boot_id: str | None = None
    machine: str | None = None
    pid_namespace: int | None = None


def myself() -> Identity:
    """The identity of this process."""
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
    """Whether its host is another one, as far as is known."""
    return other.host != socket.gethostname() or _differ(other.machine, _machine())


def judge(other: Identity) -> Verdict:
    """Whether the process runs, is gone, or lives where this host cannot see it.

    What ``other`` or this system leaves open is not held against it: "gone" needs a proof.
    """
    if is_elsewhere(other):
        return "elsewhere"
    if _differ(other.boot_id, _boot_id()):
        return "gone"
    if _differ(other.pid_namespace, _pid_namespace()):
        return "elsewhere"
    return "running" if _exists(other.pid) and _runs(other) else "gone"


def is_gone(other: Identity) -> bool:
    """Whether it is proven at next to no cost that the process is gone; False proves nothing.

    The same host, boot and namespace, and nobody has its pid.
    """
    here = (_boot_id(), _pid_namespace())
    there = (other.boot_id, other.pid_namespace)
    return None not in here and here == there and not is_elsewhere(other) and not _exists(other.pid)


def _exists(pid: int) -> bool:
    """Whether somebody has this pid (kill(2)), asked without psutil, which costs fifty times that."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass  # another user's; or no pid at all, which psutil knows how to say
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
    # machine-id(5): confidential, so what leaves the machine is a keyed digest of it.
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


# Ending others...


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
        if judge(identity) != "running":
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


def end(
    identities: Iterable[Identity], grace_seconds: float, *, patience: float = 0.0, owner: int | None = None
) -> list[tuple[Identity, Outcome]]:
    """End processes of this host: all are sent SIGTERM, and after the grace those that are left SIGKILL.

    Args:
        grace_seconds: between the two.
        patience: seconds before the first, in which they may end by themselves.
        owner: end only processes of this user id; ``None`` ends whatever the kernel lets us.
    """
    import signal

    identities = list(identities)
    fates: dict[Identity, Outcome] = {}
    grips = [grip for identity in dict.fromkeys(identities) if (grip := _grasp(identity, owner, fates))]
    try:
        left = _settle(grips, "gone", patience, fates)
        left = _settle(_sent(left, signal.SIGTERM, "gone", fates), "ended", grace_seconds, fates)
        left = _settle(_sent(left, signal.SIGKILL, "ended", fates), "killed", _AFTER_KILL, fates)
        fates.update({grip.identity: "stuck" for grip in left})
    finally:
        for grip in grips:
            grip.close()
    return [(identity, fates[identity]) for identity in identities]


def _grasp(identity: Identity, owner: int | None, fates: dict[Identity, Outcome]) -> Grip | None:
    try:
        grip = Grip(identity)
    except ProcessLookupError:
        fates[identity] = "elsewhere" if judge(identity) == "elsewhere" else "gone"
        return None
    if identity.pid == os.getpid() or owner not in (None, _user_of(identity.pid)):
        grip.close()
        fates[identity] = "refused"
        return None
    return grip


def _sent(grips: list[Grip], signum: int, if_over: Outcome, fates: dict[Identity, Outcome]) -> list[Grip]:
    """Those that the signal reached."""
    reached = []
    for grip in grips:
        try:
            grip.send(signum)
            reached.append(grip)
        except ProcessLookupError:
            fates[grip.identity] = if_over
        except PermissionError:
            fates[grip.identity] = "refused"
    return reached


def _settle(grips: list[Grip], word: Outcome, seconds: float, fates: dict[Identity, Outcome]) -> list[Grip]:
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
        over += [grip for grip in left if grip._pidfd is None and judge(grip.identity) != "running"]
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
