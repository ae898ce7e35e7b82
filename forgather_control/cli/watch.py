"""The verb ``watch``: a screen of one job, or a table of several, that follows them; in a pipe a line per event."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import util
from typing import Any

from ..client import limits, target
from ..client.connection import Client
from ..client.following import Follower
from ..client.target import Target
from ..errors import ControlError, NoSuchJob
from . import event_output, output, status, terminal
from .exit_codes import DONE
from .terminal import print_json, print_text

#: The shades of a curve, from the lowest to the highest value.
_SHADES = "▁▂▃▄▅▆▇█", "_.-=+*#@"
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
    found = [Follower(partial(_again, find(), find), changed).start() for find in finds]
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
        size = os.get_terminal_size()
        text = "\n".join(line[: size.columns - 1] for line in lines(found, size.columns)[: size.lines - 2])
        hint = "" if util.find_spec("rich") else f"\n{_EXTRA}"
        print_text(f"{clear}{text}{hint[: size.columns]}")
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
            show(lines(found, size.columns))
            _await(changed, interval)


def lines(found: list[Follower], width: int) -> list[str]:
    """Return the screen of one job, or the table of several."""
    return job_lines(found[0], width) if len(found) == 1 else table_lines(found)


def job_lines(job: Follower, width: int) -> list[str]:
    """Return all that is known of one job: status, curves, last events."""
    if not job.status:
        return [output.safe(f"{job.name}  {job.state}: {job.problem or ''}")]
    shown = output.status_screen(job.present(), terminal.has_unicode()).split("\n")
    if job.state != "live":
        shown.insert(1, output.safe(f"{job.state}: {job.problem or ''}; this is the last that is known"))
    shown += [line for name in job.status.get("metrics") or {} for line in _curve(name, job.history.get(name), width)]
    return shown + [event_output.line(event)[len("2000-01-01 ") :] for event in list(job.events)[-5:]]


def _curve(name: str, points: list[Any] | None, width: int) -> Iterable[str]:
    values = [value for _, _, value in points or () if isinstance(value, (int, float)) and value == value]
    room = max(8, min(60, width - 36))
    if len(values) < 2:
        return ()
    shades = _SHADES[0 if terminal.has_unicode() else 1]
    chosen = [values[at * (len(values) - 1) // (room - 1)] for at in range(room)]
    low, high = min(values), max(values)
    scale = (len(shades) - 1) / (high - low) if high > low else 0
    bars = "".join(shades[int((value - low) * scale)] for value in chosen)
    return [f"{output.safe(name)[:16]:16} {bars} {output.number(low)} to {output.number(high)}"]


_COLUMNS: dict[str, Any] = {
    "JOB": lambda job: job.name,
    "STATE": lambda job: output.doing(job.present()) if job.state == "live" and job.status else job.state,
    "STEP": lambda job: job.status.get("global_step"),
    "%": lambda job: None if job.status.get("progress") is None else f"{100 * job.status['progress']:.0f}",
    "STEPS/S": lambda job: None if not job.status.get("steps_per_second") else f"{job.status['steps_per_second']:.3g}",
    "LEFT": lambda job: None if job.status.get("eta_seconds") is None else output.duration(job.status["eta_seconds"]),
    "METRICS": lambda job: output.pairs(job.status.get("metrics") or {}),
}


def table_lines(found: list[Follower]) -> list[str]:
    """Return one line for each job."""
    return output.align(_COLUMNS, found, colour=False).split("\n")
