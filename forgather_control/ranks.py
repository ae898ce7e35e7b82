"""Which ranks there are, and how they come to hold the same commands at the same step.

Floor 2, training side: imports errors only; the one module that knows ``torch.distributed``. Runs
on the training thread. Callers never ask whether anything is distributed: one process is a world
of one rank, for which every agreement holds by itself.
"""

from __future__ import annotations

import os
import sys
from typing import Protocol, TypeVar

from .errors import Unsupported

T = TypeVar("T")


class World(Protocol):
    """The ranks of this job, seen from one of them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def share(self, calls: list[T]) -> list[T]:
        """The calls of rank 0, on every rank, in the same order. All ranks call it after the same step."""


class OneProcess:
    """A world of one rank."""

    rank = 0
    size = 1

    def share(self, calls: list[T]) -> list[T]:
        """``calls`` themselves: what the only rank holds, all ranks hold."""
        return calls


def of_this_job() -> World:
    """The world this process trains in.

    Raises:
        Unsupported: it has several ranks. To act on one of them alone would leave the others
            waiting in a collective for ever, so nothing is better than that.
    """
    size = _world_size()
    if size > 1:
        raise Unsupported(f"this version controls jobs of one process, not of {size} ranks", world_size=size)
    return OneProcess()


def _world_size() -> int:
    # Whoever trains with several ranks has imported torch; whoever has not must not pay for it here.
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(torch.distributed.get_world_size())
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's, before the process group exists
    except ValueError:
        return 1
