"""The verb ``completion``: print the script that completes in a shell, and the words that only this machine knows.

The scripts are made from the parser by ``docs/generated.py``, so that the installed package needs no library for
them. They complete verbs and options by themselves; for job ids and own commands they run this verb.
"""

import argparse
from typing import Final

from .. import states
from ..client import target
from ..client.connection import Client
from ..errors import ControlError
from ..jobs import registry
from ..jobs.record import jobs_dir
from . import options
from .exit_codes import DONE
from .terminal import print_text

SHELLS: Final = ("bash", "zsh", "fish")
#: What the scripts ask for: ids, and the own commands of the job that is named in the words after it.
_JOBS, _COMMANDS = "jobs", "commands"
#: Seconds that a job may take to name its commands: the user waits for it with a half-typed line.
_TIMEOUT: Final = 1.0


def add(parser: argparse.ArgumentParser) -> None:
    """Add the words of the verb."""
    parser.usage = f"{parser.prog} [OPTIONS] SHELL"
    parser.add_argument("what", metavar="SHELL", help=", ".join(SHELLS))
    parser.add_argument("words", nargs="*", default=[], help=argparse.SUPPRESS)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what is no shell."""
    if args.what not in (*SHELLS, _JOBS, _COMMANDS):
        hint = target.suggestion(args.what, SHELLS, f"choose from {', '.join(SHELLS)}")
        parser.error(f"no shell {ascii(args.what)[:140]}; {hint}")
    if args.words and args.what != _COMMANDS:
        parser.error(f"unrecognized arguments: {' '.join(args.words)}")


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    if args.what in SHELLS:
        print_text(script(args.what).rstrip("\n"))
        return DONE
    for word in job_ids() if args.what == _JOBS else own_commands(args.words):
        print_text(word)
    return DONE


def script(shell: str) -> str:
    """Return the script for a shell."""
    from importlib.resources import files

    return (files(__package__) / "completions" / f"forgather-control.{shell}").read_text("utf-8")


def job_ids() -> list[str]:
    """Return the ids of all jobs that are not dead, newest first; no job is connected to."""
    root = jobs_dir()
    return [one.job_id for one in registry.scan(root)[0] if registry.judge(one, root) != states.JOB_DEAD]


def own_commands(words: list[str]) -> list[str]:
    """Return the own commands of the job that a command line ``run JOB`` names, or nothing if it does not answer."""
    from . import run

    _, others = options.split(words)
    job = others[others.index("run") + 1 :] if "run" in others else []
    if not job:
        return []
    try:
        with Client(target.resolve(job[0]), _TIMEOUT) as client:
            return [*run.own(client.call("rpc.discover"))]
    except ControlError:
        return []
