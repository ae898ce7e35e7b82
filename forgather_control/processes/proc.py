"""Whether /proc and psutil can be trusted; threads and their signals (proc(5)), and signals to one thread."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cache
from typing import Any, Final

#: The first real-time signal that may be free: glibc keeps the first two, and other libraries begin at the next.
FIRST_SIGNAL: Final = 42
_STATES: Final = {
    "D": "its main thread waits in the kernel, for a disk, a network file system or a device",
    "T": "it is stopped (SIGSTOP)",
    "t": "a debugger has stopped it",
    "R": "its main thread runs",
    "S": "its main thread sleeps",
}


def psutil() -> Any:
    """Return the module psutil; ``None`` where it is missing, or would take other processes for those of these pids."""
    if not _shows_own_pids(os.getpid()):
        return None
    try:
        import psutil
    except Exception:  # boundary: not installed, or it cannot be loaded on this system
        return None
    return psutil


@cache
def _shows_own_pids(pid: int) -> bool:
    """Return whether /proc has the pids of this PID namespace; True where psutil does not read it."""
    if sys.platform != "linux":
        return True
    try:
        pids = field("/proc/self/status", "NSpid").split()  # in the namespace of /proc, and in those below it
    except ValueError:  # Linux before 4.1
        pids = [os.readlink("/proc/self")]
    except OSError:
        return False
    return pids == [str(pid)]


def field(path: str, name: str) -> str:
    """Return a field of a ``status`` file; raise OSError if there is no such file, ValueError if no such field."""
    with open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return line.partition(":")[2].strip()
    raise ValueError(f"{path} has no {name}")


def is_in(path: str, name: str, signum: int) -> bool:
    """Return whether a signal is in a mask of a ``status`` file, such as ``SigCgt``, the signals that are caught."""
    return bool(int(field(path, name), 16) >> signum - 1 & 1)


def state(pid: int) -> str:
    """Return in words what the main thread of a process is doing."""
    letter = field(f"/proc/{pid}/status", "State")[:1]
    return _STATES.get(letter, f"its state is {ascii(letter)}")


def free_signal() -> int | None:
    """Return a real-time signal that this process neither catches, ignores, blocks nor waits for."""
    import signal  # not needed at the start of the command line

    with suppress(OSError, AttributeError):  # this system has no /proc, or no real-time signals
        blocked_here = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        for signum in range(max(FIRST_SIGNAL, signal.SIGRTMIN), signal.SIGRTMAX + 1):
            used = (is_in("/proc/self/status", mask, signum) for mask in ("SigCgt", "SigIgn", "SigBlk"))
            if signum not in blocked_here and not any(used):
                return signum
    return None


def send_to_thread(pid: int, thread: int, signum: int) -> None:
    """Send a signal to one thread of a process (tgkill(2)); raise OSError if it has none such, or the system cannot."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "tgkill"):  # glibc has it since 2.30
        raise OSError("this system's C library cannot send a signal to one thread")
    if libc.tgkill(pid, thread, signum) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
