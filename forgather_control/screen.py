"""What the CLI shows to people: pure functions from what the wire said to text.

Floor 3: imports jobs for its types. Text from a job or a file never reaches a terminal raw: what
could move the cursor, or pretend to be something else, is shown as an escape.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final

from .jobs import Job

_COLOURS: Final = {"live": "32", "silent": "33", "dead": "31", "foreign": "36"}
_BAR: Final = 32


def safe(value: object) -> str:
    """``value`` as text in which every character is one that prints, and stands where it seems to."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# A table of jobs...


def job_table(found: list[Job], colour: bool) -> str:
    """The jobs in aligned columns: state in words, id, host, port, pid, start, step."""
    head = ("STATE", "JOB", "HOST", "PORT", "PID", "STARTED", "STEP")
    rows = [head, *(_row(job) for job in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row, job in zip(rows, [None, *found]):
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        if colour and job is not None:
            cells[0] = f"\x1b[{_COLOURS[job.state]}m{cells[0]}\x1b[0m"
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(job: Job) -> tuple[str, ...]:
    status = job.status or {}
    step, end = status.get("global_step"), status.get("max_steps")
    return (
        job.state,
        safe(job.job_id),
        safe(job.host),
        "-" if job.port is None else str(job.port),
        str(job.pid),
        moment(job.started_at),
        "-" if step is None else safe(step if end is None else f"{step}/{end}"),
    )


# One job's status...


def status_screen(status: dict[str, Any], unicode: bool) -> str:
    """How far the job is, on a few lines."""
    head = f"{safe(status['job_id'])}  {safe(status['status'])}"
    lines = [head, _progress_line(status, unicode), _speed_line(status)]
    values = "   ".join(f"{safe(name)} {number(value)}" for name, value in (status.get("metrics") or {}).items())
    lines.append(values)
    lines += [_command_line(record) for record in status.get("commands") or []]
    lines.append(_process_line(status))
    return "\n".join(line for line in lines if line)


def _progress_line(status: dict[str, Any], unicode: bool) -> str:
    step, end, progress = status["global_step"], status.get("max_steps"), status.get("progress")
    if end is None or progress is None:
        return f"step {safe(step)}"
    full, empty = ("█", "░") if unicode else ("#", ".")
    done = int(progress * _BAR)
    return f"[{full * done}{empty * (_BAR - done)}] {100 * progress:5.1f} %  step {safe(step)} of {safe(end)}"


def _speed_line(status: dict[str, Any]) -> str:
    speed, left, since = (status.get(name) for name in ("steps_per_second", "eta_seconds", "seconds_since_step"))
    parts = [
        f"epoch {number(status['epoch'])}" if status.get("epoch") is not None else "",
        _speed(speed) if speed else "",
        f"{duration(left)} left" if left is not None else "",
        f"last step {duration(since)} ago" if since is not None else "no step yet",
    ]
    return "   ".join(part for part in parts if part)


def _speed(steps_per_second: float) -> str:
    if steps_per_second >= 1:
        return f"{steps_per_second:.3g} steps/s"
    return f"{1 / steps_per_second:.3g} s/step"


def _command_line(record: dict[str, Any]) -> str:
    words = f"{record['command']} {record['state']}"
    if record.get("applied_at_step") is not None:
        words += f" at step {record['applied_at_step']}"
    if record.get("error"):
        words += f": {record['error']['message']}"
    elif (record.get("result") or {}).get("path"):
        words += f": {record['result']['path']}"
    return safe(words)


def _process_line(status: dict[str, Any]) -> str:
    parts = [f"pid {status['pid']} on {status['host']}"]
    if status.get("world_size", 1) != 1:
        parts.append(f"{status['world_size']} ranks")
    if status.get("rss_bytes") is not None:
        parts.append(f"{status['rss_bytes'] / 2**20:.0f} MiB")
    if status.get("cpu_percent") is not None:
        parts.append(f"{status['cpu_percent']:.0f} % cpu")
    if status.get("device_memory_bytes") is not None:
        parts.append(f"{status['device_memory_bytes'] / 2**20:.0f} MiB on devices")
    parts.append(f"started {moment(status['started_at'])}")
    return safe(", ".join(parts))


# A command's record...


def outcome(job: str, record: dict[str, Any]) -> str:
    """What became of a command, in one line."""
    result, state = record.get("result") or {}, record["state"]
    where = f"{safe(job)}: "
    if state != "finished":
        step = record.get("applied_at_step")
        return where + safe(f"{record['command']} {state}" + (f" at step {step}" if step is not None else ""))
    path = result.get("path")
    if record["command"] == "save_checkpoint":
        return where + safe(f"saved at step {result.get('step')} in {duration(result.get('seconds'))}: {path}")
    ended = f"ended at step {result.get('step')}"
    return where + safe(f"{ended}, saved: {path}" if path else f"{ended}, no checkpoint was saved for it")


# Pieces...


def number(value: Any) -> str:
    """A metric in at most five digits."""
    return f"{value:.5g}" if isinstance(value, float) else safe(value)


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):  # a job may claim anything
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {whole:02d}s"


def moment(epoch: float | None) -> str:
    """A time of this host's clock and zone."""
    if epoch is None:
        return "?"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch))
    except (TypeError, ValueError, OverflowError, OSError):  # a file may claim any number
        return "?"
