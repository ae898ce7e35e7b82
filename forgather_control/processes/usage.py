"""What a rank reports about its process: host, pid, memory, processor time, device. Any thread.

Nothing here loads torch, initialises a device or synchronises with one. One wait is left: torch counts its memory
under its allocator's lock, with the interpreter lock held. Where a device hangs while torch allocates from it or
returns memory to it, callers wait as well; a hanging collective does not hold that lock.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from typing import Any

from . import proc


def process_stats() -> dict[str, Any]:
    """Return ``host pid rss_bytes cpu_percent device device_memory_bytes device_memory_reserved_bytes``.

    ``cpu_percent`` is of one core, since the last call; 0.0 at the first. What is unknown is ``None``.
    """
    pid = os.getpid()
    figures = {"rss_bytes": _rss_bytes(pid), "cpu_percent": _cpu_percent(pid)}
    return {"host": socket.gethostname(), "pid": pid, **figures, **device()}


def device() -> dict[str, Any]:
    """Return the devices on which this process holds memory, and how much; ``None`` where torch is not loaded."""
    name = used = reserved = None
    if torch := sys.modules.get("torch"):
        # boundary: torch is being imported, or its device has failed and every call raises
        with contextlib.suppress(Exception):
            name, used, reserved = _of_torch(torch)
    return {"device": name, "device_memory_bytes": used, "device_memory_reserved_bytes": reserved}


def _of_torch(torch: Any) -> tuple[str, int | None, int | None]:
    """Name the device with the most memory: torch's current one is per thread, and this is not the training thread."""
    if not torch.cuda.is_initialized():
        accelerator = getattr(torch, "accelerator", None)  # torch 2.6 and later, such as mps or xpu
        kind = str(getattr(accelerator and accelerator.current_accelerator(), "type", "cpu"))
        return "cpu" if kind == "cuda" else kind, None, None
    indices = range(torch.cuda.device_count())
    used = [torch.cuda.memory_allocated(index) for index in indices]
    name, in_use = "cuda", sum(map(bool, used))
    if in_use:
        most = used.index(max(used))
        more = f" and {in_use - 1} more" if in_use > 1 else ""
        name = f"cuda:{most} {torch.cuda.get_device_name(most)}{more}"
    return name, sum(used), sum(map(torch.cuda.memory_reserved, indices))


def _rss_bytes(pid: int) -> int | None:
    if psutil := proc.psutil():
        with contextlib.suppress(psutil.Error, OSError):  # its file is not readable, or no descriptors are left
            return int(psutil.Process(pid).memory_info().rss)
    return None


#: The clocks at the last call, by pid; replaced as a whole, because callers may be on several threads.
_last_clocks: dict[int, tuple[float, float]] = {}


def _cpu_percent(pid: int) -> float:
    """Return the processor time since the last call by the process's own clock: psutil would read two files for it."""
    now, last = (time.monotonic(), time.process_time()), _last_clocks.get(pid)
    _last_clocks[pid] = now
    if last is None or now[0] <= last[0]:
        return 0.0
    return round(100 * (now[1] - last[1]) / (now[0] - last[0]), 1)
