"""Printing for users and scripts, and asking the user: nothing from outside reaches a terminal raw."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

from ..client.reading import reading
from . import output
from .exit_codes import INTERRUPTED, REFUSED, USAGE


class Refusal(Exception):
    """The verb ends here; ``args`` are the sentence for stderr and the exit code."""


def discard_output() -> None:
    """Drop the rest of the output, whose reader has gone: flushing at exit must not fail (signal, note on SIGPIPE)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str, code: int = 0) -> int:
    """Print a line on stderr, unless that is closed; return ``code``."""
    if sys.stderr is not None:
        print(output.safe(text), file=sys.stderr)
    return code


def print_text(text: str) -> None:
    """Print to stdout; everything goes through here.

    Raises:
        BrokenPipeError: the reader has gone.
        Refusal: it cannot be written; the verb itself has done its work.
    """
    encoding = sys.stdout.encoding or "ascii"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        raise
    except OSError as err:
        discard_output()
        raise Refusal(f"the output is lost ({err.strerror}), but the verb was carried out", REFUSED) from err


def print_json(value: Any) -> None:
    """Print one JSON text."""
    print_text(json.dumps(value))


def print_answer(as_json: bool, answer: Any, show: Callable[..., str], *args: Any) -> None:
    """Print an answer as JSON, or as ``show(*args)`` makes it readable; InternalError: it cannot be shown."""
    if as_json:
        return print_json(answer)
    return print_text(shown(show, *args))


def shown(show: Callable[..., str], *args: Any) -> str:
    """Return ``show(*args)``; InternalError: what the job sent cannot be shown."""
    with reading("an answer that cannot be shown; --json prints it"):
        return show(*args)


def has_colour() -> bool:
    """Whether stdout is a terminal that wants colours (https://no-color.org: any non-empty value means no)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def can_rewrite() -> bool:
    """Whether stderr is a terminal on which a line can be written again."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in (None, "", "dumb")


def width(file: TextIO | None = None) -> int | None:
    """Return the columns of the terminal that a file, or stdout, is; ``None`` if it is none, or does not tell."""
    try:
        return os.get_terminal_size((file or sys.stdout).fileno()).columns or None
    except (OSError, ValueError):
        return None


def has_unicode() -> bool:
    """Whether stdout can print any character."""
    return (sys.stdout.encoding or "").lower().startswith("utf")


def confirm(what: str, question: str) -> None:
    """Ask the user on the terminal; Refusal: there is none, or the answer is no, or Ctrl-C."""
    if not (sys.stdin is not None and sys.stdin.isatty()):
        text = f"{what} needs confirmation, but stdin is not a terminal. Use --force to skip the question"
        raise Refusal(text, USAGE)
    try:  # Ctrl-C may come as soon as the question is there
        sys.stderr.write(f"{output.safe(question)} [y/N] ")
        sys.stderr.flush()
        answer = sys.stdin.readline()
    except KeyboardInterrupt as err:
        raise Refusal("interrupted; nothing was done", INTERRUPTED) from err
    if answer.strip().lower() not in ("y", "yes"):
        raise Refusal("nothing was done", REFUSED)
