"""Tables of jobs: those that are there, and those that have ended. Pure functions from jobs to text."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from .. import states
from ..jobs.ended import EndedJob
from ..jobs.registry import Job
from . import output

#: What each column of ``list`` shows of a row; ``None`` is a dash. The last one is cut off where it has no room.
_COLUMNS: Final[dict[str, Any]] = {
    "STATE": "state", "JOB": "job",
    "STEP": lambda row: row["step"] if None in (row["step"], row["end"]) else f"{row['step']}/{row['end']}",
    "PROGRESS": lambda row: _shown(row["progress"], lambda part: f"{100 * part:.0f} %"),
    "SPEED": lambda row: _shown(row["speed"] or None, output.rate),
    "LEFT": lambda row: _shown(row["left"], output.duration),
    "AGE": lambda row: _shown(row["age"], output.duration),
    "HOST": "host", "PID": "pid", "PORT": "port", "NOTE": "note",
}  # fmt: skip
#: The columns that a narrow terminal does without, the first one first.
_DROPPED: Final = ("PORT", "PID", "HOST", "AGE", "SPEED", "LEFT", "NOTE", "PROGRESS", "STEP")

_ENDED_COLUMNS: Final[dict[str, Any]] = {
    "HOW": "how", "JOB": "job_id",
    "ENDED": lambda job: output.moment(job["ended_at"]),
    "STEP": "global_step", "CHECKPOINT": "checkpoint",
    "REASON": lambda job: job["reason"] or "",
}  # fmt: skip
_ENDED_DROPPED: Final = ("REASON", "ENDED", "STEP", "CHECKPOINT")

#: Columns of the last cell that are worth showing.
_MIN_LAST: Final = 12


def job_table(found: list[Job], colour: bool, place: str = "", width: int | None = None) -> str:
    """Show jobs in aligned columns; or that there are none at a place, if it is given.

    Args:
        width: of the terminal, on which what does not fit is left out.
    """
    if place and not found:
        return f"no jobs {output.safe(place)}"
    now = time.time()
    return fitted(_COLUMNS, _DROPPED, [_row(job, now) for job in found], colour, width)


def ended_table(found: list[EndedJob], place: str, width: int | None = None) -> str:
    """Show ended jobs in aligned columns; or that there are none."""
    if not found:
        return f"no ended jobs {output.safe(place)}"
    return fitted(_ENDED_COLUMNS, _ENDED_DROPPED, [job._asdict() for job in found], False, width)


def ordered(found: list[Job], column: str | None) -> list[Job]:
    """Return jobs sorted by a column of ``options.SORTABLE``, upwards, what is unknown at the end."""
    if column is None:
        return found
    now = time.time()

    def key(job: Job) -> tuple[bool, Any]:
        value = _row(job, now)[column]
        return value is None, 0 if value is None else value

    return sorted(found, key=key)


def _row(job: Job, now: float) -> dict[str, Any]:
    """Return what the columns are made of: texts, numbers, and ``None`` for what is unknown or of the wrong kind."""
    known = job.status or job.last_status or {}
    figures = {
        "step": known.get("global_step"),
        "end": known.get("max_steps"),
        "progress": known.get("progress"),
        "speed": job.status and job.status.get("steps_per_second"),
        "left": job.status and job.status.get("eta_seconds"),
        "age": max(0.0, now - job.started_at),
        "pid": job.pid,
        "port": job.port,
    }
    numbers = {name: value if _is_number(value) else None for name, value in figures.items()}
    return {"state": job.state, "job": job.job_id, **numbers, "host": job.host, "note": _note(job, now)}


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _note(job: Job, now: float) -> str:
    """Return what a live job does if it does not train; of others why they are silent, and how old what is known is."""
    if job.status is not None:
        return "" if job.status.get("status") == states.STATUS_TRAINING else output.doing(job.status)
    parts = [] if job.silent_because is None else [job.silent_because]
    if job.last_status_at is not None:
        parts.append(f"last known {output.duration(max(0.0, now - job.last_status_at))} ago")
    return "; ".join(parts)


def _shown(value: Any, show: Callable[[Any], str]) -> str | None:
    return None if value is None else show(value)


def fitted(
    columns: dict[str, Any], dropped: tuple[str, ...], rows: Sequence[Any], colour: bool, width: int | None
) -> str:
    """Align as many columns as fit, and cut off what is too long in the last one; all of them without a width.

    Args:
        columns: as ``output.align`` takes them.
        dropped: those that are left out where there is no room, the first one first.
    """
    if width is None:
        return output.align(columns, rows, colour)
    *_, last = kept = list(columns)
    cells = [list(columns), *(output.cells(columns, row) for row in rows)]
    widths = {name: max(map(len, column)) for name, column in zip(columns, zip(*cells))}

    def room() -> int:
        """Return the columns that are left for the last one."""
        return width - sum(widths[name] + 2 for name in kept if name != last)

    for name in dropped:
        if room() >= (min(widths[last], _MIN_LAST) if last in kept else -2):
            break
        kept.remove(name)
    chosen = {name: columns[name] for name in kept}
    if last in chosen:
        most = room()
        chosen[last] = lambda row: _cut(output.cells({last: columns[last]}, row)[0], most)
    return output.align(chosen, rows, colour)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: max(0, most - 3)]}..."
