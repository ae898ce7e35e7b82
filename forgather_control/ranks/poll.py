"""The collectives of ranks that poll: for jobs whose store cannot carry the channel.

A poll, on the training thread at the end of a step, costs one small all-reduce (on a device, with a synchronisation),
and a command waits for the next one. All ranks must take every step: one that ends early, or whose control fails while
its training continues, leaves the others waiting in that all-reduce. The channel has none of these faults, so this is
the second choice.
"""

from __future__ import annotations

import json
import sys
from itertools import accumulate
from typing import Any


class CollectivePoll:
    """Exchange of messages between all ranks, by all-reduces on the default process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._torch = sys.modules["torch"]
        self._dist: Any = self._torch.distributed
        # What the default group can send from: the CPU if it can, else the device that this rank uses.
        backends = dict(pair.partition(":")[::2] for pair in self._dist.get_backend_config().split(","))
        kind = "cpu" if "cpu" in backends else next(iter(backends), "cuda")
        index = () if kind == "cpu" else (getattr(self._torch, kind).current_device(),)
        self._device = self._torch.device(kind, *index)

    def exchange(self, message: Any) -> dict[int, Any]:
        """Send a JSON value, or ``None`` for nothing, to all ranks; return the values of all, by rank. A collective.

        It costs one all-reduce of one number while no rank has a message, and three where some have.
        """
        data = b"" if message is None else json.dumps(message).encode()
        if not self._sum([len(data)])[0]:
            return {}
        sizes = self._sum([len(data) if rank == self._rank else 0 for rank in range(self._size)])
        *starts, total = accumulate(sizes, initial=0)
        after = total - starts[self._rank] - len(data)
        received = bytes(self._sum([*[0] * starts[self._rank], *data, *[0] * after]))
        parts = (received[start : start + size] for start, size in zip(starts, sizes))
        return {rank: json.loads(part) for rank, part in enumerate(parts) if part}

    def _sum(self, numbers: list[int]) -> list[int]:
        summed = self._torch.tensor(numbers, dtype=self._torch.int64, device=self._device)
        self._dist.all_reduce(summed)
        return list(summed.tolist())
