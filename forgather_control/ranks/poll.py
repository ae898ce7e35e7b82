"""The collectives of ranks that poll: for jobs whose store cannot carry the channel.

torch.distributed is used as it is found loaded, on the training thread of every rank, and only at the end of a step,
which all ranks reach.

A poll costs one small all-reduce (on a device, with a synchronisation), and a command waits for the next one. All
ranks must take every step: one that ends early, or whose control fails while its training continues, leaves the
others waiting in that all-reduce. The channel has none of these faults, so this is the second choice.
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
        self._device = _device(self._torch)

    def exchange(self, message: Any) -> dict[int, Any]:
        """Send ``message`` to all ranks; return the messages of all ranks, by rank. A collective.

        It costs one all-reduce of one number while no rank has a message, and three where some have.

        Args:
            message: a JSON value, or ``None`` for no message.
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
        """Return the sums over all ranks; one all-reduce."""
        summed = self._torch.tensor(numbers, dtype=self._torch.int64, device=self._device)
        self._dist.all_reduce(summed)
        found: list[int] = summed.tolist()
        return found


def _device(torch: Any) -> Any:
    """Return where the default group can send from: the CPU if it can, else the device that this rank uses."""
    backends = dict(pair.partition(":")[::2] for pair in torch.distributed.get_backend_config().split(","))
    if "cpu" in backends:
        return torch.device("cpu")
    kind = next(iter(backends), "cuda")
    return torch.device(kind, getattr(torch, kind).current_device())
