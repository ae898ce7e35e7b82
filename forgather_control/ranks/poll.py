"""The collectives of ranks that poll: for jobs whose store cannot carry the channel.

A poll, on the training thread at the end of a step, costs one small all-reduce (on a device, with a synchronisation),
and a command waits for the next one. All ranks must take every step: one that ends early, or whose control fails while
its training continues, leaves the others waiting in that all-reduce. The channel has none of these faults, so this is
the second choice.

Before the first collective each rank waits in the store for all others: a rank without control, or one that trains in
another sub-group under another job id, would be met in a collective of its training.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from itertools import accumulate
from typing import Any

from ..errors import Unsupported
from . import failures, keys, limits


class CollectivePoll:
    """Exchange of messages between all ranks, by all-reduces on the default process group.

    Args:
        store: where ranks wait for one another before the first exchange; ``None``: they cannot.
    """

    def __init__(self, rank: int, size: int, store: Any) -> None:
        self._rank, self._size, self._store = rank, size, store
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

        Raises:
            Unsupported: at the first exchange, some ranks did not come within ``limits.JOIN_TIMEOUT``.
        """
        store, self._store = self._store, None
        if store is not None:
            self._wait_for_all(store)
        data = b"" if message is None else json.dumps(message).encode()
        total = self._sum([len(data)])[0]
        if store is not None:  # all ranks are in here, so they have read the decision
            store.delete_key(keys.here(self._rank))
            store.delete_key(keys.MISSING)
        if not total:
            return {}
        sizes = self._sum([len(data) if rank == self._rank else 0 for rank in range(self._size)])
        *starts, total = accumulate(sizes, initial=0)
        after = total - starts[self._rank] - len(data)
        received = bytes(self._sum([*[0] * starts[self._rank], *data, *[0] * after]))
        parts = (received[start : start + size] for start, size in zip(starts, sizes))
        return {rank: json.loads(part) for rank, part in enumerate(parts) if part}

    def _wait_for_all(self, store: Any) -> None:
        """Wait for the other ranks. All obey the first decision on which are missing, so none begins alone."""
        ranks = range(self._size)
        store.set(keys.here(self._rank), "")
        try:
            store.wait([keys.here(rank) for rank in ranks], timedelta(seconds=limits.JOIN_TIMEOUT))
            missing = []
        except RuntimeError:  # the time-out; torch's DistStoreError is one
            missing = [rank for rank in ranks if not store.check([keys.here(rank)])]
        if missing := json.loads(store.compare_set(keys.MISSING, "", json.dumps(missing))):
            raise Unsupported(failures.not_joined(missing))

    def _sum(self, numbers: list[int]) -> list[int]:
        summed = self._torch.tensor(numbers, dtype=self._torch.int64, device=self._device)
        self._dist.all_reduce(summed)
        return list(summed.tolist())
