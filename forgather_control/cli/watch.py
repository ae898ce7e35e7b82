"""The verb ``watch``: a screen of one job, or a table of several, that follows them; in a pipe a line per event."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import util
from typing import Any

from ..client import limits, target
from ..client.connection import Client
from ..client.following import Follower
from ..client.reading import reading
from ..client.target import Target
from ..errors import ControlError, NoSuchJob
from . import curves, event_output, job_table, output, status, terminal
from .exit_codes import DONE
from .terminal import print_json, print_text

#: Seconds within which the ranks answer: steps that they do meanwhile, and one more, put no rank behind.
_BEHIND = 0.5
_EXTRA = "colours: pip install 'forgather_control[watch]'"


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    names = _names(args)
    if args.once:
        return max(status.run(argparse.Namespace(**{**vars(args), "job": name})) for name in names)
    finds = [partial(_find, args, name) for name in names]
    if args.json or not sys.stdout.isatty():
        return _print_events(finds)
    changed = threading.Event()
    found = [Follower(partial(_again, find(), find), changed, len(finds) == 1).start() for find in finds]
    try:
        draw = _rich_screen if util.find_spec("rich") is not None and terminal.has_colour() else _plain_screen
        draw(found, changed, args.interval)
    except KeyboardInterrupt:
        print_text("")
    finally:
        for each in found:
            each.stop()
    return DONE


def _names(args: argparse.Namespace) -> Sequence[str | None]:
    """Return the jobs that the words mean; FindError: one of them means none."""
    if not args.is_many:
        return args.jobs or [None]
    from ..client.selection import select

    found = select(args.jobs, args.all, args.ssh)
    for problem in found.problems.values():
        raise problem
    if not found.targets:
        raise NoSuchJob("No live job; forgather-control list shows what is there")
    return [each.name for each in found.targets]


def _find(args: argparse.Namespace, name: str | None) -> Target:
    return target.resolve(name, args.connect, args.token, args.ssh)


def _again(first: Target, find: Callable[[], Target]) -> Target:
    """Return the job's present address: another run of the same id counts, another job does not."""
    if first.record is None:
        return find()
    return target.resolve(first.record.job_id)


# Without a screen...


def _print_events(finds: Sequence[Callable[[], Target]]) -> int:
    """Print each event of all jobs as one line of JSON, until they have ended."""
    lock, problems = threading.Lock(), []

    def follow(find: Callable[[], Target]) -> None:
        try:
            with Client(find()) as job:
                for event in job.events():
                    with lock:
                        print_json({"job_id": job.name, **event} if len(finds) > 1 else event)
        except ControlError as err:
            problems.append(err)

    threads = [threading.Thread(target=follow, args=(find,), daemon=True) for find in finds[1:]]
    for thread in threads:
        thread.start()
    follow(finds[0])
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return DONE


# Screens...


def _plain_screen(found: list[Follower], changed: threading.Event, interval: float) -> None:
    """Print the screen again after each change, at most every ``interval`` seconds."""
    clear = "\x1b[H\x1b[2J" if terminal.can_rewrite() else ""
    while True:
        width, height = os.get_terminal_size()
        height -= 2  # for the hint, and the cursor
        text = "\n".join(line[: width - 1] for line in lines(found, width - 1, height)[:height])
        hint = "" if util.find_spec("rich") else f"\n{_EXTRA}"
        print_text(f"{clear}{text}{hint[:width]}")
        _await(changed, interval)


def _await(changed: threading.Event, interval: float) -> None:
    """Let ``interval`` seconds pass, then return at the next change, or when the times on the screen have aged."""
    time.sleep(interval)
    changed.wait(limits.FOLLOW_PERIOD)
    changed.clear()


def _rich_screen(found: list[Follower], changed: threading.Event, interval: float) -> None:
    from . import watch_screen

    with watch_screen.live() as show:
        while True:
            size = os.get_terminal_size()
            show(lines(found, size.columns, size.lines))
            _await(changed, interval)


def lines(found: list[Follower], width: int, height: int) -> list[str]:
    """Return the screen of one job, or the table of several; InternalError: what a job sent cannot be shown."""
    with reading("what cannot be shown; watch --once --json prints it"):
        return job_lines(found[0], width, height) if len(found) == 1 else table_lines(found, width)


def job_lines(job: Follower, width: int, height: int) -> list[str]:
    """Return all that is known of one job: status, curves in the room that there is, last events."""
    if not job.status:
        return [output.safe(f"{job.name}  {job.state}: {job.problem or ''}")]
    unicode = terminal.has_unicode()
    past = "" if job.state == "live" else job.state
    shown = output.status_screen(job.present(), unicode, past, width).split("\n")
    if job.state != "live":
        shown.insert(1, output.safe(f"{job.state}: {job.problem or ''}; this is the last that is known"))
    else:
        shown += output.rank_remarks(job.ranks, 2 + _BEHIND * (job.status.get("steps_per_second") or 0))
    shown = [row for line in shown for row in _wrapped(line, width)]
    events = [event_output.line(event)[len("2000-01-01 ") :] for event in list(job.events)[-5:]]
    room = height - len(shown) - len(events)
    return [*shown, *curves.draw(job.history, list(job.status.get("metrics") or {}), width, room, unicode), *events]


def _wrapped(line: str, width: int) -> list[str]:
    """Return the lines that a long line takes; what stands between wide gaps stays together."""
    parts = line.split("   ")
    if len(parts) > 1:
        line = "   ".join(part.replace(" ", "\xa0") for part in parts)
    return [row.replace("\xa0", " ") for row in textwrap.wrap(line, width, break_on_hyphens=False)]


_COLUMNS: dict[str, Any] = {
    "JOB": lambda job: job.name,
    "STATE": lambda job: _state(job),
    "STEP": lambda job: job.status.get("global_step"),
    "%": lambda job: _shown(job, "progress", lambda share: f"{100 * share:.0f}"),
    "STEPS/S": lambda job: _shown(job, "steps_per_second", lambda speed: f"{speed:.3g}", is_past=False),
    "LEFT": lambda job: _shown(job, "eta_seconds", output.duration, is_past=False),
    "METRICS": lambda job: output.pairs(job.status.get("metrics") or {}),
}
#: The columns that a narrow terminal does without, the first one first.
_DROPPED = ("STEPS/S", "METRICS", "LEFT", "STEP")


def _state(job: Follower) -> str:
    """Say what a job is doing, without the time left, for which there is no room beside that of training."""
    return output.doing(job.present()).split(",")[0] if job.state == "live" and job.status else job.state


def _shown(job: Follower, name: str, show: Callable[[Any], str], is_past: bool = True) -> str | None:
    """Show a member of the status, where it is known; of a job that is not live only if that may be past."""
    value = job.status.get(name)
    return None if value is None or (job.state != "live" and not is_past) else show(value)


def table_lines(found: list[Follower], width: int) -> list[str]:
    """Return one line for each job."""
    return job_table.fitted(_COLUMNS, _DROPPED, found, colour=False, width=width).split("\n")
