"""What a rank says of its process: where it runs, what it uses, on which device.

Floor 0, training side: imports nothing of ours; psutil when it is asked, torch only if it is loaded.
Runs on any thread, also while the training thread hangs.

Nothing here initialises a device or waits for one. One wait is left: torch counts its memory under
its allocator's lock, with the interpreter lock held. Where a device hangs while torch allocates from
it or gives memory back to it, whoever asks waits for that, too; a hanging collective holds no such lock.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from functools import cache
from typing import Any


def process_stats() -> dict[str, Any]:
    """``host pid rss_bytes cpu_percent``, ``device``, ``device_memory_bytes`` and ``device_memory_reserved_bytes``.

    ``cpu_percent`` is that since the last call, 0.0 at the first. Each is ``None`` where it is unknown.
    """
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "rss_bytes": _process(pid).memory_info().rss,
        "cpu_percent": _meter(pid).percent(),
        **device(),
    }


def device() -> dict[str, Any]:
    """The devices on which this process holds memory, and how much; all ``None`` where torch is not loaded."""
    torch = sys.modules.get("torch")
    try:
        name, used, reserved = (None, None, None) if torch is None else _of_torch(torch)
    except Exception:  # border: torch is being imported, or its device has failed, and says so at every call
        name, used, reserved = None, None, None
    return {"device": name, "device_memory_bytes": used, "device_memory_reserved_bytes": reserved}


def _of_torch(torch: Any) -> tuple[str, int | None, int | None]:
    if not torch.cuda.is_initialized():
        return _other_accelerator(torch) or "cpu", None, None
    indices = range(torch.cuda.device_count())
    used = {index: torch.cuda.memory_allocated(index) for index in indices}
    return _cuda(torch, used), sum(used.values()), sum(map(torch.cuda.memory_reserved, indices))


@cache
def _process(pid: int) -> Any:
    """A new one after a fork."""
    import psutil

    return psutil.Process(pid)


@cache
def _meter(pid: int) -> _Meter:
    """The same each time, as it remembers the last reading; a new one after a fork."""
    return _Meter()


class _Meter:
    """This process's processor time by its own clock: psutil reads two files for it, and waits for each."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None  # assigned whole

    def percent(self) -> float:
        """Of one core, since the last call; 0.0 at the first."""
        now, last = (time.monotonic(), time.process_time()), self._last
        self._last = now
        if last is None or now[0] <= last[0]:
            return 0.0
        return round(100 * (now[1] - last[1]) / (now[0] - last[0]), 1)


def _cuda(torch: Any, used: dict[int, int]) -> str:
    """The device in use. The current one is a thread's own, and whoever asks is not the thread that trains."""
    in_use = [index for index, size in used.items() if size]
    if not in_use:
        return "cuda"
    most = max(in_use, key=used.__getitem__)
    more = f" and {len(in_use) - 1} more" if len(in_use) > 1 else ""
    return f"cuda:{most} {torch.cuda.get_device_name(most)}{more}"


def _other_accelerator(torch: Any) -> str | None:
    """What else this build of torch may train on, of which no more is known here: mps, xpu."""
    accelerator = getattr(torch, "accelerator", None)  # torch 2.6 and later
    found = None if accelerator is None else accelerator.current_accelerator()
    return None if found is None or found.type in ("cpu", "cuda") else str(found.type)
