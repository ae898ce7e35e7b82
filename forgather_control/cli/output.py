"""What the command line shows: pure functions from JSON values to text.

Text from a job or a file never reaches a terminal raw: characters that could move the cursor or imitate other
text are shown as escapes.
"""

import json
import math
import re
import time
from collections.abc import Sequence
from typing import Any, Final

from .. import states
from ..client.limits import KILL_GRACE
from ..wire.builtin import BUILTIN

_COLOURS: Final = {
    states.JOB_LIVE: "32",
    states.RANK_ANSWERING: "32",
    states.JOB_SILENT: "33",
    states.JOB_DEAD: "31",
    states.RANK_NEVER_JOINED: "33",
    states.RANK_UNKNOWN: "33",
    states.RANK_ABSENT: "31",
    states.JOB_FOREIGN: "36",
    states.RANK_ENDED: "36",
}
_RANK_REMARKS: Final = {
    states.RANK_SILENT: "no answer in time",
    states.RANK_NEVER_JOINED: "never joined, so commands cannot be carried out",
    states.RANK_UNKNOWN: "cannot be asked",
    states.RANK_ABSENT: "gone",
}
_KILL_OUTCOMES: Final = {
    states.KILL_ENDED: "ended after SIGTERM",
    states.KILL_KILLED: f"killed by SIGKILL, {KILL_GRACE:g} s after SIGTERM",
    states.KILL_GONE: "had ended already",
    states.KILL_ELSEWHERE: "not reached: it runs on another host",
    states.KILL_REFUSED: "not ended: it belongs to another user",
    states.KILL_STUCK: "killed, and still there: it waits in the kernel",
}

#: The columns of ``ranks``, from an object of the job's answer.
_RANK_COLUMNS: Final[dict[str, Any]] = {
    "RANK": "rank", "HOST": "host", "PID": "pid", "STATE": "state", "STEP": "step", "BEHIND": "behind",
    "LAST STEP": lambda row: _since(row.get("seconds_since_step")),
    "MEMORY": lambda row: mebibytes(row.get("rss_bytes")),
    "DEVICE": lambda row: _device(row.get("device"), row.get("device_memory_bytes")),
}  # fmt: skip


def safe(value: object) -> str:
    """Return ``value`` as text of printable characters only; the others are shown as escapes."""
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def verb(method: object) -> str:
    """Return the verb of a command's method, or the method where there is none."""
    known = BUILTIN.get(str(method))
    return (known and known.verb) or str(method)


def in_verbs(text: str) -> str:
    """Return a message of the job or the client with verbs for methods; not in paths, nor in what has a dash."""
    words = {method.name: method.verb for method in BUILTIN.values() if method.verb}
    words["get_command"] = "forgather-control commands"
    return re.sub(rf"(?<![\w./-])({'|'.join(words)})(?![\w/-])", lambda found: words[found[0]], text)


def safe_lines(value: object) -> str:
    """Return ``value`` as text of several lines, each of them safe."""
    return "\n".join(safe(line) for line in str(value).split("\n"))


def _cell(value: Any) -> str:
    return "-" if value is None else safe(value)


def cells(columns: dict[str, Any], row: Any) -> list[str]:
    """Return the texts of one row; a column is a member of it, or a function that makes something of it."""
    return [_cell(row.get(show) if isinstance(show, str) else show(row)) for show in columns.values()]


def align(columns: dict[str, Any], rows: Sequence[Any], colour: bool) -> str:
    """Align cells in columns; with ``colour``, states get theirs."""
    table = [list(columns), *(cells(columns, row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    state, lines = table[0].index("STATE") if colour else 0, []
    for texts in table:
        padded = [text.ljust(width) for text, width in zip(texts, widths)]
        if colour and texts[state] in _COLOURS:
            padded[state] = f"\x1b[{_COLOURS[texts[state]]}m{padded[state]}\x1b[0m"
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


# Jobs...


def status_screen(status: dict[str, Any], unicode: bool, past: str = "", width: int | None = None) -> str:
    """Show how far the job is, on a few lines.

    Args:
        past: what became of a job that does not answer any more; its status is the last that is known.
        width: columns of the terminal, to which the bar adapts.
    """
    lines = [
        f"{safe(status['job_id'])}  {safe(past or doing(status))}",
        _progress_line(status, unicode, width),
        _speed_line({**status, "eta_seconds": None} if past else status, is_past=bool(past)),
        pairs(status.get("metrics") or {}),
        *(_command_line(record) for record in status.get("commands") or []),
        *(_running_line(command) for command in status.get("running") or [] if not past),
        *(f"rule {rule_line(rule)}" for rule in status.get("rules") or [] if rule["fired_at_step"] is None),
        _process_line(status),
    ]
    return "\n".join(line for line in lines if line)


def doing(status: dict[str, Any]) -> str:
    """Say what training is doing; of an evaluation also how far it is, with its time left, or how long it has taken."""
    state, found = str(status.get("status")), status.get("evaluation")
    if not found:
        return state
    done, total, left = found.get("batches"), found.get("total_batches"), found.get("eta_seconds")
    taken = duration(found["seconds"])
    if not total:
        return f"{state} for {taken}"
    # None is left while the metrics are computed after the last batch, or where a batch takes longer than those before.
    return f"{state} {100 * done / total:.0f} %, " + (f"{duration(left)} left" if left else f"{taken} so far")


def status_line(job: str, status: dict[str, Any], past: str = "") -> str:
    """Show how far a job is, on one line; ``past`` as in :func:`status_screen`."""
    step, end, progress = status["global_step"], status.get("max_steps"), status.get("progress")
    share = "" if progress is None else f" ({100 * progress:.1f} %)"
    far = f"step {step}" + ("" if end is None else f" of {end}{share}")
    speed = "" if past else f", {_speed_line(status, is_past=False).replace('   ', ', ')}"
    return safe(f"{job}: {past or doing(status)}, {far}{speed}")


def _progress_line(status: dict[str, Any], unicode: bool, width: int | None) -> str:
    step, end, progress = status["global_step"], status.get("max_steps"), status.get("progress")
    if end is None or progress is None:
        return f"step {safe(step)}"
    full, empty = ("█", "░") if unicode else ("#", ".")
    share = f"{100 * progress:5.1f} %  step {safe(step)} of {safe(end)}"
    size = 32 if width is None else max(4, min(32, width - len(share) - 3))
    done = max(0, min(size, int(progress * size)))
    return f"[{full * done}{empty * (size - done)}] {share}"


def _speed_line(status: dict[str, Any], is_past: bool) -> str:
    epoch, speed, left, since = map(status.get, ("epoch", "steps_per_second", "eta_seconds", "seconds_since_step"))
    parts = []
    if epoch is not None:
        parts.append(f"epoch {number(epoch)}")
    if speed:
        parts.append(rate(speed))
    if left is not None:
        parts.append(f"{duration(left)} left")
    if not is_past:
        parts.append("no step yet" if since is None else f"last step {_since(since)}")
    return "   ".join(parts)


def _process_line(status: dict[str, Any]) -> str:
    ranks, memory, cpu, device = map(status.get, ("world_size", "rss_bytes", "cpu_percent", "device_memory_bytes"))
    parts = [f"pid {status['pid']} on {status['host']}"]
    if ranks not in (None, 1):
        missing = status.get("ranks_not_joined")
        parts.append(f"{ranks} ranks" + (f" ({_ranks(missing)} never joined)" if missing else ""))
    if memory is not None:
        parts.append(mebibytes(memory))
    if cpu is not None:
        parts.append(f"{cpu:.0f} % cpu")
    if device is not None:
        parts.append(f"{mebibytes(device)} on devices")
    return safe(", ".join([*parts, f"started {moment(status['started_at'])}"]))


# Commands...


def _command_line(record: dict[str, Any]) -> str:
    why = note(record)
    return safe(f"{verb(record['command'])} {record['state']}{applied(record)}" + (f": {why}" if why else ""))


def _running_line(command: dict[str, Any]) -> str:
    ranks, seconds = _ranks(command["ranks"]), duration(command["seconds"])
    return safe(f"{verb(command['command'])} has run for {seconds}; not acknowledged by {ranks}")


def rule_line(rule: dict[str, Any]) -> str:
    """Show one rule: its number, its condition, its command, and when it fired."""
    params = {**rule["params"], **rule["params"].get("changes", {})}
    given = " ".join(f"{name}={_given(value)}" for name, value in params.items() if _is_shown(name, value))
    begins = "" if rule["not_before"] is None else f", not before step {rule['not_before']}"
    fired = "" if rule["fired_at_step"] is None else f", fired at step {rule['fired_at_step']}"
    return safe(f"{rule['id']}: when {rule['when']}, {verb(rule['do'])} {given}".rstrip() + begins + fired)


def _is_shown(name: str, value: Any) -> bool:
    return value is not None and name != "changes"


def _given(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def applied(record: dict[str, Any]) -> str:
    """Say at which step a command was applied, if it was."""
    step = record.get("applied_at_step")
    return "" if step is None else f" at step {step}"


def note(record: dict[str, Any]) -> str:
    """Return what a command's record adds to its state: why it failed, where its checkpoint is, or its value."""
    if record.get("error"):
        return in_verbs(str(record["error"]["message"]))
    result = record.get("result") or {}
    value = "" if result.get("value") is None else json.dumps(result["value"], ensure_ascii=False)
    return result.get("path") or (value if len(value) <= 60 else value[:57] + "...")


# Ranks...


def rank_table(rows: list[dict[str, Any]], colour: bool) -> str:
    """Show ranks in aligned columns, and below them which are behind, silent or gone."""
    behind = _behind(rows)
    table = align(_RANK_COLUMNS, [{**row, "behind": behind.get(row["rank"])} for row in rows], colour)
    return "\n".join([table, *rank_remarks(rows)])


def rank_remarks(rows: list[dict[str, Any]], least: float = 1) -> list[str]:
    """Say, in a line for each remark, which ranks are behind by ``least`` steps or more, silent or gone."""
    behind = {rank: steps for rank, steps in _behind(rows).items() if steps >= least}
    remarks = {
        f"behind, by {max(behind.values(), default=0)} at most": list(behind),
        **{
            remark: [row["rank"] for row in rows if row.get("state") == state]
            for state, remark in _RANK_REMARKS.items()
        },
    }
    return [f"{remark}: {_ranks(ranks)}" for remark, ranks in remarks.items() if ranks]


def _behind(rows: list[dict[str, Any]]) -> dict[int, int]:
    """Return by how many steps ranks are behind the foremost."""
    steps = {row["rank"]: row["step"] for row in rows if type(row.get("step")) is int}
    foremost = max(steps.values(), default=0)
    return {rank: foremost - step for rank, step in steps.items() if step < foremost}


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks[:8]))}{more}"


def _device(name: Any, memory: Any) -> Any:
    return name if memory is None else f"{_cell(name)}, {mebibytes(memory)}"


def stacks_text(rows: list[dict[str, Any]]) -> str:
    """Show stacks rank by rank, each under a line that names the rank."""
    blocks = []
    for row in rows:
        stacks = "  no stacks" if row.get("stacks") is None else safe_lines(row["stacks"]).rstrip("\n")
        blocks.append(f"{_process(row)}, {_cell(row.get('state'))}\n{stacks}")
    return "\n\n".join(blocks)


def kill_warning(kill_after: float | None) -> str:
    """Say, before an abort, what happens to a job that does not end within ``kill_after`` seconds."""
    if kill_after is None:
        return ""
    return f" Processes on this host get SIGTERM after {kill_after:g} s, and SIGKILL {KILL_GRACE:g} s later."


def process_outcomes(rows: list[dict[str, Any]]) -> str:
    """Say what became of processes that were to end, a line for each."""
    return "\n".join(f"{_process(row)}: {_KILL_OUTCOMES[row['outcome']]}" for row in rows)


def _process(row: dict[str, Any]) -> str:
    return f"rank {row['rank']}, pid {_cell(row.get('pid'))} on {_cell(row.get('host'))}"


# Values...


def values(answer: Any) -> str:
    """Show the answer of a method that has no screen of its own: a line for each member or item."""
    if isinstance(answer, dict):
        return "\n".join(f"{safe(name)}: {number(value)}" for name, value in answer.items())
    return "\n".join(pairs(item) if isinstance(item, dict) else safe(item) for item in answer)


def pairs(members: dict[str, Any]) -> str:
    """Show members with their names in one line."""
    return "   ".join(f"{safe(name)} {number(value)}" for name, value in members.items())


def number(value: Any) -> str:
    """Show a metric in at most five digits."""
    return f"{value:.5g}" if isinstance(value, float) else safe(value)


def rate(speed: float) -> str:
    """Show steps per second; of slow ones the seconds per step."""
    return f"{speed:.3g} steps/s" if speed >= 1 else f"{1 / speed:.3g} s/step"


def mebibytes(size: Any) -> str:
    """Show a number of bytes."""
    return f"{size / 2**20:.0f} MiB" if isinstance(size, (int, float)) and math.isfinite(size) else "-"


def _since(seconds: Any) -> str | None:
    return None if seconds is None else f"{duration(seconds)} ago"


def duration(seconds: Any) -> str:
    """Show seconds in the units that a reader expects."""
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):  # a job may send anything
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{int(seconds)} s"
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {whole:02d}s"


def moment(epoch: Any) -> str:
    """Show a time in this host's time zone."""
    try:
        return "?" if epoch is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch))
    except (TypeError, ValueError, OverflowError, OSError):  # a file may hold any number
        return "?"
