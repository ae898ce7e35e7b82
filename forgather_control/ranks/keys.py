"""The keys that ranks use in the store of torch.distributed."""

from __future__ import annotations

from typing import Final

#: The numbers of ranks that have joined, and that have left.
JOINED: Final = "joined"
LEFT: Final = "left"
#: The number of rounds, once rank 0 has left.
ROUNDS: Final = "rounds"

#: What the keys of a process group begin with where its store cannot be cloned.
SCOPE: Final = "forgather_control/scope"

#: The ranks that are missing where ranks poll, as the first rank found that had waited for all.
MISSING: Final = "missing"


def prefix(name: str, restart: str, run: int) -> str:
    """Return what all keys of the run-th training run of this name in this process begin with.

    ``restart`` is how often torchrun restarted the workers, which may then get the old store with all its keys.
    """
    return f"forgather_control/{name}/{restart}.{run}"


def count(rank: int) -> str:
    """Return the key of the number of messages sent to a rank so far."""
    return f"{rank}/count"


def message(rank: int, number: int) -> str:
    """Return the key of a message to a rank; they are numbered from 1."""
    return f"{rank}/{number}"


def received(rank: int) -> str:
    """Return the key of the number of messages that a rank had received when it left."""
    return f"{rank}/received"


def here(rank: int) -> str:
    """Return the key that says that a rank will poll."""
    return f"{rank}/here"


def reports(rank: int) -> str:
    """Return the key of the last reports of a rank that polled."""
    return f"{rank}/reports"


def verdict(number: int) -> str:
    """Return the key that says whether what a round did is kept."""
    return f"verdict/{number}"


def decision(number: int) -> str:
    """Return the key of a round's decision."""
    return f"decision/{number}"
