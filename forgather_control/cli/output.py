"""What the CLI shows to people: pure functions from what the wire said to text.

Floor 3: imports jobs for its types. Text from a job or a file never reaches a terminal raw: what
could move the cursor, or pretend to be something else, is shown as an escape.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final

from .. import states
from ..jobs.registry import Job

_COLOURS: Final = {
    states.JOB_LIVE: "32",
    states.RANK_ANSWERING: "32",
    states.JOB_SILENT: "33",
    states.JOB_DEAD: "31",
    states.RANK_ABSENT: "31",
    states.JOB_FOREIGN: "36",
    states.RANK_ENDED: "36",
}
_BAR: Final = 32
#: Ranks that a sentence names one by one.
_NAMED: Final = 8
_KILL_OUTCOMES: Final = {
    states.KILL_ENDED: "ended when it was told to (SIGTERM)",
    states.KILL_KILLED: "killed (SIGKILL)",
    states.KILL_GONE: "had ended already",
    states.KILL_ELSEWHERE: "not reached: it runs on another host",
    states.KILL_REFUSED: "not ended: it belongs to another user",
    states.KILL_STUCK: "killed, and still there: it waits in the kernel",
}


def safe(value: object) -> str:
    """``value`` as text in which every character is one that prints, and stands where it seems to."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def safe_lines(value: object) -> str:
    """``value`` as text of several lines, each of them safe."""
    return "\n".join(safe(line) for line in str(value).split("\n"))


def _columns(head: tuple[str, ...], rows: list[tuple[str, ...]], coloured: int | None) -> str:
    """Aligned columns; the words in the column ``coloured`` have the colours of states."""
    widths = [max(map(len, cells)) for cells in zip(head, *rows)]
    lines = []
    for row in [head, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        if coloured is not None and row[coloured] in _COLOURS:
            cells[coloured] = f"\x1b[{_COLOURS[row[coloured]]}m{cells[coloured]}\x1b[0m"
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# A table of jobs...


def job_table(found: list[Job], colour: bool) -> str:
    """The jobs in aligned columns: state in words, id, host, port, pid, start, step."""
    head = ("STATE", "JOB", "HOST", "PORT", "PID", "STARTED", "STEP")
    return _columns(head, [_row(job) for job in found], 0 if colour else None)


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
    done = max(0, min(_BAR, int(progress * _BAR)))
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
    if state != states.COMMAND_FINISHED:
        step = record.get("applied_at_step")
        return where + safe(f"{record['command']} {state}" + (f" at step {step}" if step is not None else ""))
    path = result.get("path")
    if record["command"] == "save_checkpoint":
        return where + safe(f"saved at step {result.get('step')} in {duration(result.get('seconds'))}: {path}")
    ended = f"ended at step {result.get('step')}"
    return where + safe(f"{ended}, saved: {path}" if path else f"{ended}, no checkpoint was saved for it")


# The ranks of one job...


def rank_table(rows: list[dict[str, Any]], colour: bool) -> str:
    """The ranks in aligned columns, and below them who is behind, silent, gone."""
    head = ("RANK", "HOST", "PID", "STATE", "STEP", "BEHIND", "LAST STEP", "MEMORY", "DEVICE")
    behind = _behind(rows)
    table = _columns(head, [_rank(row, behind.get(row["rank"])) for row in rows], 3 if colour else None)
    return "\n".join([table, *_remarks(rows, behind)])


def _behind(rows: list[dict[str, Any]]) -> dict[int, int]:
    """How many steps each rank is behind the foremost one, by rank."""
    steps = {row["rank"]: row["step"] for row in rows if type(row.get("step")) is int}
    return {rank: max(steps.values()) - step for rank, step in steps.items()}


def _rank(row: dict[str, Any], behind: int | None) -> tuple[str, ...]:
    since = row.get("seconds_since_step")
    device = "-" if row.get("device") is None else safe(row["device"])
    return (
        str(row["rank"]),
        _cell(row.get("host")),
        _cell(row.get("pid")),
        _cell(row.get("state")),
        _cell(row.get("step")),
        str(behind) if behind else "-",
        "-" if since is None else f"{duration(since)} ago",
        mebibytes(row.get("rss_bytes")),
        device if row.get("device_memory_bytes") is None else f"{device}, {mebibytes(row['device_memory_bytes'])}",
    )


def _cell(value: Any) -> str:
    return "-" if value is None else safe(value)


def _remarks(rows: list[dict[str, Any]], behind: dict[int, int]) -> list[str]:
    late = [rank for rank, steps in behind.items() if steps]
    silent, absent = (
        [row["rank"] for row in rows if row.get("state") == state] for state in (states.RANK_SILENT, states.RANK_ABSENT)
    )
    return [
        *([f"behind, by {max(behind.values())} at most: {_ranks(late)}"] if late else []),
        *([f"no answer in time: {_ranks(silent)}"] if silent else []),
        *([f"gone: {_ranks(absent)}"] if absent else []),
    ]


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks[:_NAMED]))}{more}"


def stacks_text(rows: list[dict[str, Any]]) -> str:
    """The stacks, rank by rank, each under a line that says whose they are."""
    return "\n\n".join(f"{_who(row)}, {_cell(row.get('state'))}\n{_stacks(row.get('stacks'))}" for row in rows)


def _stacks(stacks: Any) -> str:
    return "  no stacks" if stacks is None else safe_lines(stacks).rstrip("\n")


def process_outcomes(rows: list[dict[str, Any]]) -> str:
    """What became of processes that were to end, a line each."""
    return "\n".join(f"{_who(row)}: {_KILL_OUTCOMES[row['outcome']]}" for row in rows)


def _who(row: dict[str, Any]) -> str:
    return f"rank {row['rank']}, pid {_cell(row.get('pid'))} on {_cell(row.get('host'))}"


# Pieces...


def number(value: Any) -> str:
    """A metric in at most five digits."""
    return f"{value:.5g}" if isinstance(value, float) else safe(value)


def mebibytes(size: Any) -> str:
    """Bytes, where they are a number."""
    return f"{size / 2**20:.0f} MiB" if isinstance(size, (int, float)) and math.isfinite(size) else "-"


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
