"""The words JOB of verbs that take several jobs: where they end, and whether they mean one job or several."""

from __future__ import annotations

import argparse
import re
from typing import Final

from ..client import target
from ..errors import ControlError, NoSuchJob
from . import options

#: The verbs that take several jobs.
SEVERAL: Final = frozenset(
    ("status", "watch", "save", "stop", "save-stop", "abort", "evaluate", "pause", "resume", "set", "when", "ranks")
)
#: Those that end jobs, and ask before they end more than one.
ENDING: Final = frozenset(("stop", "save-stop", "abort"))
#: What a condition contains, and no job id or pattern.
IN_CONDITION: Final = r"[\s<>=]"
#: What follows JOB in the usage of a verb whose words argparse cannot tell apart.
_BEHIND: Final = {"set": "[NAME=VALUE ...]", "when": "[EXPR VERB ...]"}


def add(parser: argparse.ArgumentParser, verb: str) -> None:
    """Add the words JOB and the options of a verb that takes several jobs."""
    doc = "exact id, or nothing where one job is live; several of them, or quoted patterns such as 'run*'"
    if verb in _BEHIND:
        parser.usage = f"{parser.prog} [OPTIONS] [JOB ...] {_BEHIND[verb]}"
    parser.add_argument("jobs", metavar="JOB", nargs="*", help=doc)
    options.add(parser, "--all", *(["--parallel"] if verb != "watch" else []), *(["--force"] if verb in ENDING else []))


def read(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Split the words of a verb that takes several jobs; set ``job``, ``is_many``, and ``values`` or ``when``."""
    words = args.jobs
    if args.verb == "set":
        at = next((at for at, word in enumerate(words) if "=" in word), len(words))
        args.jobs, args.values = words[:at], words[at:]
    if args.verb == "when":
        is_rule = bool(words) and re.search(IN_CONDITION, words[-1]) is not None
        args.jobs, args.when = (words[:-1], words[-1]) if is_rule else (words, None)
    if args.all and args.jobs:
        parser.error(f"--all means all live jobs: it cannot be combined with {ascii(args.jobs[0])[:140]}")
    args.job = args.jobs[0] if len(args.jobs) == 1 else None
    # The id of a SLURM array is a number, and names several jobs, too. Over ssh the other side looks names up.
    may_be_array = args.job is not None and args.job.isdecimal() and args.ssh is None and args.connect is None
    args.is_many = args.all or len(args.jobs) > 1 or may_be_array or any(map(target.is_pattern, args.jobs))
    if args.is_many and args.connect is not None:
        parser.error("--connect is the address of one job")


def hint(args: argparse.Namespace, err: ControlError) -> str:
    """Explain ``--wait 30``, which names a job "30"."""
    job = str(err.data.get("job") or "")
    if not isinstance(err, NoSuchJob) or not getattr(args, "wait", False) or not job.replace(".", "", 1).isdigit():
        return ""
    return f". To give up waiting after {job} s, use --timeout {job}"
