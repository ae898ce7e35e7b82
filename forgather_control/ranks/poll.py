"""Ranks that ask one another at every so many steps: for jobs whose store cannot carry the line.

Floor 0, training side: imports nothing of ours, and torch.distributed only as it finds it loaded. Runs on
the training thread of every rank, and there only at the end of a step, which all ranks reach.

It costs one small all-reduce every ``poll_steps`` steps (on a device, with a synchronisation), and a
command waits for the next of them. All ranks must take every step: one that ends early, or whose
control fails while its training goes on, leaves the others waiting in that all-reduce. The line
between ranks has none of these faults; so this is the second choice.
"""

from __future__ import annotations

import json
import sys
from typing import Any


class CollectivePoll:
    """The small collectives of one rank, on the default process group.

    Args:
        names: what any rank may ask for, in one order on all ranks.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._torch = sys.modules["torch"]
        self._dist: Any = self._torch.distributed
        self._names = names
        self._device = _device(self._torch)

    def sum(self, numbers: list[int]) -> list[int]:
        """The sums over all ranks; one all-reduce."""
        summed = self._torch.tensor(numbers, dtype=self._torch.int64, device=self._device)
        self._dist.all_reduce(summed)
        found: list[int] = summed.tolist()
        return found

    def ask(self, size: int, wanted: list[str]) -> tuple[int, list[str]]:
        """The sum of all sizes, and whatever any rank wants; one all-reduce."""
        total, *counts = self.sum([size, *(wanted.count(name) for name in self._names)])
        return total, [name for name, count in zip(self._names, counts) if count]

    def share(self, data: bytes, size: int) -> Any:
        """What rank 0 holds as JSON, ``size`` bytes of it; returns when all ranks have it."""
        buffer = self._torch.zeros(size, dtype=self._torch.uint8)
        if data:
            buffer = self._torch.frombuffer(bytearray(data), dtype=self._torch.uint8)
        buffer = buffer.to(self._device)
        self._dist.broadcast(buffer, src=0)
        self.ask(0, [])  # a broadcast returns on its source before the others have it
        return json.loads(bytes(buffer.tolist()))


def _device(torch: Any) -> Any:
    """Where the default group can send from: the processor if it can, else the device that this rank uses."""
    backends = dict(pair.partition(":")[::2] for pair in torch.distributed.get_backend_config().split(","))
    if "cpu" in backends:
        return torch.device("cpu")
    kind = next(iter(backends), "cuda")
    return torch.device(kind, getattr(torch, kind).current_device())
