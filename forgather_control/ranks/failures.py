"""The sentences about lost ranks: why commands can no longer be agreed on, or why a command did not reach all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from . import limits

#: The warning in rank 0's log when the ranks can no longer agree, and the error of commands that are queued then, or
#: submitted later; with why a rank left.
CONTROL_OFF: Final = "Control is off: %s, so ranks can no longer agree on commands. Training continues."
REFUSED: Final = "the command was not carried out: %s, so ranks can no longer agree on commands; training continues"
#: The warning where ranks did not join; with who did not.
NOT_JOINED: Final = "Control is off until all ranks take part: %s. Training continues."
#: Why a rank left: its channel broke, with a reason; or the store did not answer within so many seconds.
LOST_CONNECTION: Final = "rank %d lost its connection to the store (%s)"
STORE_SILENT: Final = "rank %d got no answer from the store within %g s"
#: Why a rank does not start control: these could not.
NOT_STARTED: Final = "control could not start on rank %s; the log of that rank says why"

#: Why an atomic command is undone: these ranks could not do it, or did not say in time that they did.
NOT_DONE: Final = "rank %s could not do it"
NOT_SETTLED: Final = "not all ranks did it within %g s"


def not_joined(ranks: Sequence[int]) -> str:
    """Return why nothing can be agreed on: these ranks did not join in time."""
    advice = "control must be on in every rank of the process group, with the same job_id (callback or TrainingJob)"
    return f"{_named(ranks)} never joined within {limits.JOIN_TIMEOUT:g} s; {advice}"


def control_failed(rank: int, reason: str | None) -> str | None:
    """Return why a rank left: its control failed; ``None`` if its training ended as it should."""
    return None if reason is None else f"rank {rank}: {reason}"


def not_reported(ranks: Sequence[int]) -> str:
    """Return why commands of these ranks are not known to be done: rank 0 ended and could not wait any longer."""
    return f"it is unknown whether {_named(ranks)} completed it: no report had come when rank 0 ended"


def _named(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{more}"
