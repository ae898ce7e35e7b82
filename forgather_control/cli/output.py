"""What the command line shows: pure functions from JSON values to text.

Text from a job or a file never reaches a terminal raw: characters that could move the cursor or imitate other
text are shown as escapes.
"""

from __future__ import annotations

import math
import time
from typing import Any, Final

from .. import states
from ..jobs.registry import Job
from ..wire.builtin import BUILTIN

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
    states.KILL_ENDED: "ended after SIGTERM",
    states.KILL_KILLED: "killed (SIGKILL)",
    states.KILL_GONE: "had ended already",
    states.KILL_ELSEWHERE: "not reached: it runs on another host",
    states.KILL_REFUSED: "not ended: it belongs to another user",
    states.KILL_STUCK: "killed, and still there: it waits in the kernel",
}


def safe(value: object) -> str:
    """Return ``value`` as text of printable characters only; the others are shown as escapes."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def safe_lines(value: object) -> str:
    """Return ``value`` as text of several lines, each of them safe."""
    return "\n".join(safe(line) for line in str(value).split("\n"))


def _columns(head: tuple[str, ...], rows: list[tuple[str, ...]], coloured: int | None) -> str:
    """Align cells in columns; the words in the column ``coloured`` get the colours of states."""
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
    """Show jobs in aligned columns: state, id, host, port, pid, start, step."""
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
    """Show how far the job is, on a few lines."""
    head = f"{safe(status['job_id'])}  {safe(status['status'])}"
    lines = [head, _progress_line(status, unicode), _speed_line(status)]
    lines.append(_pairs(status.get("metrics") or {}))
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
    note = _note(record)
    return safe(f"{record['command']} {record['state']}{_applied(record)}" + (f": {note}" if note else ""))


def _applied(record: dict[str, Any]) -> str:
    step = record.get("applied_at_step")
    return "" if step is None else f" at step {step}"


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
    """Say in one line what became of a command; how it ended depends on what its method finishes with."""
    name, result = record["command"], record.get("result") or {}
    method = BUILTIN.get(name)
    finishes_when = method.finishes_when if method is not None else frozenset()
    path = result.get("path")
    at_step = f" at step {result['step']}" if "step" in result else _applied(record)
    took = f"{at_step} in {duration(result.get('seconds'))}: "
    if record["state"] != states.COMMAND_FINISHED:
        text = f"{name} {record['state']}{_applied(record)}"
    elif states.WHEN_ENDED in finishes_when:
        text = f"ended{at_step}, " + (f"saved: {path}" if path else "no checkpoint was saved for it")
    elif states.WHEN_SAVED in finishes_when:
        text = f"saved{took}{path}"
    elif states.WHEN_EVALUATED in finishes_when:
        text = f"evaluated{took}{_pairs(result.get('metrics') or {})}"
    else:
        text = f"{name} finished{at_step}" + (f": {_pairs(result)}" if result else "")
    return safe(f"{job}: {text}")


def command_table(records: list[dict[str, Any]]) -> str:
    """Show command records in aligned columns, oldest first."""
    if not records:
        return "no commands"
    head = ("ID", "COMMAND", "STATE", "STEP", "REQUESTED", "BY", "NOTE")
    return _columns(head, [_command_row(record) for record in records], None)


def _command_row(record: dict[str, Any]) -> tuple[str, ...]:
    return (
        safe(record["command_id"]),
        safe(record["command"]),
        safe(record["state"]),
        _cell(record.get("applied_at_step")),
        moment(record.get("requested_at")),
        safe(_requester(record.get("requested_by") or {})),
        safe(_note(record) or record.get("reason") or ""),
    )


def _requester(by: dict[str, Any]) -> str:
    """Name the user and the process that gave a command, as far as the job knows them."""
    user = by.get("user") or ("" if by.get("uid") is None else f"uid {by['uid']}")
    process = "" if by.get("pid") is None else f"{by.get('program') or 'pid'} {by['pid']}"
    return ", ".join(part for part in (user, process, by.get("via")) if part) or "-"


def _note(record: dict[str, Any]) -> str:
    """Return what a command's record adds to its state: why it failed, or where its checkpoint is."""
    if record.get("error"):
        return str(record["error"]["message"])
    return (record.get("result") or {}).get("path") or ""


def _pairs(values: dict[str, Any]) -> str:
    return "   ".join(f"{safe(name)} {number(value)}" for name, value in values.items())


def values(answer: Any) -> str:
    """Show the answer of a method that has no screen of its own: a line for each member or item."""
    if isinstance(answer, dict):
        return "\n".join(f"{safe(name)}: {number(value)}" for name, value in answer.items())
    return "\n".join(_pairs(item) if isinstance(item, dict) else safe(item) for item in answer)


# The ranks of one job...


def rank_table(rows: list[dict[str, Any]], colour: bool) -> str:
    """Show ranks in aligned columns, and below them which are behind, silent or gone."""
    head = ("RANK", "HOST", "PID", "STATE", "STEP", "BEHIND", "LAST STEP", "MEMORY", "DEVICE")
    behind = _behind(rows)
    table = _columns(head, [_rank(row, behind.get(row["rank"])) for row in rows], 3 if colour else None)
    return "\n".join([table, *_remarks(rows, behind)])


def _behind(rows: list[dict[str, Any]]) -> dict[int, int]:
    """Return by how many steps each rank is behind the foremost one."""
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
    """Show stacks rank by rank, each under a line that names the rank."""
    return "\n\n".join(f"{_who(row)}, {_cell(row.get('state'))}\n{_stacks(row.get('stacks'))}" for row in rows)


def _stacks(stacks: Any) -> str:
    return "  no stacks" if stacks is None else safe_lines(stacks).rstrip("\n")


def process_outcomes(rows: list[dict[str, Any]]) -> str:
    """Say what became of processes that were to end, a line for each."""
    return "\n".join(f"{_who(row)}: {_KILL_OUTCOMES[row['outcome']]}" for row in rows)


def _who(row: dict[str, Any]) -> str:
    return f"rank {row['rank']}, pid {_cell(row.get('pid'))} on {_cell(row.get('host'))}"


# Pieces...


def number(value: Any) -> str:
    """Show a metric in at most five digits."""
    return f"{value:.5g}" if isinstance(value, float) else safe(value)


def mebibytes(size: Any) -> str:
    """Show a number of bytes."""
    return f"{size / 2**20:.0f} MiB" if isinstance(size, (int, float)) and math.isfinite(size) else "-"


def duration(seconds: float | None) -> str:
    """Show seconds in the units that a reader expects."""
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):  # a job may send anything
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
    """Show a time in this host's time zone."""
    if epoch is None:
        return "?"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch))
    except (TypeError, ValueError, OverflowError, OSError):  # a file may hold any number
        return "?"
