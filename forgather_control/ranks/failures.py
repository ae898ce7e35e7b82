"""The sentences about lost ranks: why commands can no longer be agreed on, or why a command did not reach all ranks."""

from __future__ import annotations

from collections.abc import Sequence


def control_off(why: str) -> str:
    """Return the warning in rank 0's log when the ranks can no longer agree."""
    return f"Control is off: {why}, so ranks can no longer agree on commands. Training continues."


def refused(why: str) -> str:
    """Return the error for commands that are queued then, or submitted later."""
    return f"the command was not carried out: {why}, so ranks can no longer agree on commands; training continues"


def lost_connection(rank: int, reason: str) -> str:
    """Return why a rank left: its channel broke, with ``reason``."""
    return f"rank {rank} lost its connection to the store ({reason})"


def store_silent(rank: int, seconds: float) -> str:
    """Return why a rank left: the store did not answer in time."""
    return f"rank {rank} got no answer from the store within {seconds:g} s"


def control_failed(rank: int, reason: str | None) -> str | None:
    """Return why a rank left: its control failed; ``None`` if its training ended as it should."""
    return None if reason is None else f"rank {rank}: {reason}"


def not_reported(ranks: Sequence[int]) -> str:
    """Return why commands of these ranks are not known to be done: rank 0 ended and could not wait any longer."""
    names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return f"{names} had not reported when rank 0 ended"


def not_started(ranks: Sequence[int]) -> str:
    """Return why a rank does not start control: another one could not."""
    return f"control could not start on rank {', '.join(map(str, ranks))}; the log of that rank says why"
