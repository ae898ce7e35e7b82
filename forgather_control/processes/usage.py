"""What a rank reports about its process: host, pid, memory, processor time, device.

Runs on any thread, also while the training thread hangs; torch is used only where it is loaded already.

Nothing here initialises a device or synchronises with one. One wait is left: torch counts its memory under its
allocator's lock, with the interpreter lock held. Where a device hangs while torch allocates from it or returns
memory to it, callers wait as well; a hanging collective does not hold that lock.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from functools import cache
from typing import Any


def process_stats() -> dict[str, Any]:
    """Return ``host pid rss_bytes cpu_percent device device_memory_bytes device_memory_reserved_bytes``.

    ``cpu_percent`` is of one core, since the last call; 0.0 at the first. What is unknown is ``None``.
    """
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "rss_bytes": _rss_bytes(pid),
        "cpu_percent": _meter(pid).percent(),
        **device(),
    }


def device() -> dict[str, Any]:
    """Return the devices on which this process holds memory, and how much; ``None`` where torch is not loaded."""
    torch = sys.modules.get("torch")
    try:
        name, used, reserved = (None, None, None) if torch is None else _of_torch(torch)
    except Exception:  # boundary: torch is being imported, or its device has failed and every call raises
        name, used, reserved = None, None, None
    return {"device": name, "device_memory_bytes": used, "device_memory_reserved_bytes": reserved}


def _of_torch(torch: Any) -> tuple[str, int | None, int | None]:
    if not torch.cuda.is_initialized():
        return _other_accelerator(torch) or "cpu", None, None
    indices = range(torch.cuda.device_count())
    used = {index: torch.cuda.memory_allocated(index) for index in indices}
    return _cuda(torch, used), sum(used.values()), sum(map(torch.cuda.memory_reserved, indices))


def _rss_bytes(pid: int) -> int | None:
    import psutil

    try:
        return int(_process(pid).memory_info().rss)
    except (psutil.Error, OSError):  # /proc is not mounted or not readable, or no descriptors are left
        return None


@cache
def _process(pid: int) -> Any:
    import psutil  # cached by pid: a forked child needs its own

    return psutil.Process(pid)


@cache
def _meter(pid: int) -> _CpuMeter:
    return _CpuMeter()


class _CpuMeter:
    """This process's processor time by its own clock: psutil would read two files for it."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None  # replaced as a whole: callers may be on several threads

    def percent(self) -> float:
        """Return the percentage of one core since the last call; 0.0 at the first."""
        now, last = (time.monotonic(), time.process_time()), self._last
        self._last = now
        if last is None or now[0] <= last[0]:
            return 0.0
        return round(100 * (now[1] - last[1]) / (now[0] - last[0]), 1)


def _cuda(torch: Any, used: dict[int, int]) -> str:
    """The device with the most memory: torch's current device is per thread, and this is not the training thread."""
    in_use = [index for index, size in used.items() if size]
    if not in_use:
        return "cuda"
    most = max(in_use, key=used.__getitem__)
    more = f" and {len(in_use) - 1} more" if len(in_use) > 1 else ""
    return f"cuda:{most} {torch.cuda.get_device_name(most)}{more}"


def _other_accelerator(torch: Any) -> str | None:
    """Another accelerator of this build of torch, such as mps or xpu; its memory is not known here."""
    accelerator = getattr(torch, "accelerator", None)  # torch 2.6 and later
    found = None if accelerator is None else accelerator.current_accelerator()
    return None if found is None or found.type in ("cpu", "cuda") else str(found.type)
