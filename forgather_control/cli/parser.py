"""The words of the command line: verbs, options and their help, most of them taken from the method table.

Options may stand before or after the verb and the JOB: the words are sorted first, then argparse sees one verb.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Final, NoReturn

from ..wire import methods
from ..wire.builtin import BUILTIN
from . import exit_codes, options

EPILOG: Final = f"""\
JOB is the exact id of a job, or what SLURM or torchrun call it; leave it out where exactly one job is live.
Options may stand before or after the verb.
{exit_codes.HELP}"""

_DIAL_HELP: Final = """\
Copy between standard input and output and a job's socket. This is what --ssh runs on the other side.

The first line says that the job is reached: "forgather-control dial-stdio 1 JOB". Everything after it comes from
the job, until it closes the connection or the reader of the output goes. The end of the input is passed on to
the job, and its replies still come."""

#: What cannot be combined with --ssh, and why.
_NOT_OVER_SSH: Final = {
    "connect": "--connect: both say where the job is",
    "remote": "--remote: both say where the jobs are",
    "token": "--token-file: ssh needs no token",
    "kill_after": "--kill-after, which ends processes of this host: run it there",
}


# Reading the words...


def parse(words: Sequence[str], prog: str) -> argparse.Namespace:
    """Parse one command line.

    ``verb`` names what to do, ``method`` the row of the table behind it, if any, and ``params`` its parameters.

    Raises:
        SystemExit: the words are wrong (2), or asked for help or the version (0).
    """
    given, others = _sorted(words)
    if not others or others[0] not in _verbs():
        _without_verb(prog, given, others[0] if others else None)
    verb = others.pop(0)
    parser = _parser(f"{prog} {verb}", options.plain(_verbs()[verb].doc))
    _verbs()[verb].add(parser)
    if any(word.startswith("--wait=") for word in given):
        parser.error("--wait takes no value; --timeout SECONDS gives up waiting")
    is_odd = any(word.startswith("-") for word in others)
    args = parser.parse_args([*given, *(["--"] if is_odd else []), *others])
    args.verb = verb
    _check(parser, args)
    args.params = _params(args)
    return args


def _sorted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options, each with its value behind it, and the other words."""
    given: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            others += rest
        elif not word.startswith("-") or word == "-":
            others.append(word)
        else:
            given.append(word)
            if word in options.value_options():
                given += (value for value in [next(rest, None)] if value is not None)
    return given, others


def _without_verb(prog: str, given: list[str], word: str | None) -> NoReturn:
    """Print what was asked for, or say what is wrong with the verb."""
    parser = _parser(prog, "Find, watch, save, stop and abort running training jobs.")
    parser.usage = f"{prog} [OPTIONS] VERB ..."
    listed = {name: verb.doc.partition("\n\n")[0] for name, verb in _verbs().items() if verb.is_listed}
    group = parser.add_subparsers(title="verbs", metavar="VERB")
    for name, doc in listed.items():
        group.add_parser(name, help=options.plain(doc), add_help=False)
    asks = [option for option in given if option in ("-h", "--help", "--version")]
    if asks or word is None:
        parser.parse_args(asks)
        parser.error("a verb is missing")
    from difflib import get_close_matches  # only for a message

    similar = get_close_matches(word, listed, 1)
    hint = f"did you mean {similar[0]}?" if similar else f"choose from {', '.join(listed)}"
    parser.error(f"no verb {ascii(word)[:140]}; {hint}")


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse options that cannot be meant together."""
    given = vars(args)
    if given.get("kill_after") is not None and (given["wait"] or given["timeout"] is not None):
        parser.error("--kill-after waits by itself: it cannot be combined with --wait or --timeout")
    if args.ssh is None:
        return
    if args.verb == "cleanup":
        parser.error(f"cleanup asks about what it shows: run ssh -t {args.ssh} forgather-control cleanup")
    if args.verb == "dial-stdio":
        parser.error("dial-stdio is what --ssh runs on the other side")
    for name, other in _NOT_OVER_SSH.items():
        if given.get(name) is not None:
            parser.error(f"--ssh cannot be combined with {other}")


def _params(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters of the call."""
    given = vars(args)
    params = {
        name.removeprefix(options.PARAM): value for name, value in given.items() if name.startswith(options.PARAM)
    }
    if given.get("wait") or given.get("timeout") is not None:
        params |= {"wait": "finished", "timeout": given["timeout"]}
    return {name: value for name, value in params.items() if value is not None}


# Verbs...


class _Verb:
    """A verb: its help, and the function that adds its words to a parser."""

    def __init__(self, doc: str, add: Callable[[argparse.ArgumentParser], None], is_listed: bool = True) -> None:
        self.doc, self.add, self.is_listed = doc, add, is_listed


def _add_method(parser: argparse.ArgumentParser, method: methods.Method) -> None:
    parser.set_defaults(method=method.name)
    if method.name == "list_jobs":
        return options.add(parser, "--remote", "--token-file", "--ssh")
    parser.add_argument("job", metavar="JOB", nargs="?", help="exact id, or nothing where one job is live")
    for param in options.own_params(method):
        options.add_param(parser, param)
    options.add(parser, "--connect", "--token-file", "--ssh")
    if method.is_command:
        options.add(parser, "--wait", "--timeout", "--reason")
    if method.name == "abort":
        options.add(parser, "--kill-after", "--force")
    return None


def _add_cleanup(parser: argparse.ArgumentParser) -> None:
    options.add(parser, "--force")
    options.add(parser, "--ssh", help=argparse.SUPPRESS)


def _add_rpc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB")
    parser.add_argument("method", metavar="METHOD")
    parser.add_argument("json_params", metavar="PARAMS-JSON", nargs="?", default="{}", help="an object or an array")
    options.add(parser, "--connect", "--token-file", "--ssh")


def _add_dial(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", nargs="?")
    options.add(parser, "--until-input-ends")
    options.add(parser, "--ssh", help=argparse.SUPPRESS)


@cache
def _verbs() -> dict[str, _Verb]:
    """Return all verbs by name: first those of the table, then those that stand for no method."""
    verbs = {
        method.verb: _Verb(method.doc, partial(_add_method, method=method))
        for method in BUILTIN.values()
        if method.verb is not None
    }
    return verbs | {
        "cleanup": _Verb("Remove what dead jobs of this host left; list it and ask first.", _add_cleanup),
        "rpc": _Verb("Call any method of the job and print its result.", _add_rpc),
        "dial-stdio": _Verb(_DIAL_HELP, _add_dial, is_listed=False),
    }


# Help...


def _parser(prog: str, doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=doc, epilog=EPILOG, formatter_class=_formatter, allow_abbrev=False
    )
    options.add(parser, "--json", "--version")
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, width=_width())


@cache
def _width() -> int:
    """Return the columns for help. argparse would ask shutil, which imports compressors, for each argument."""
    try:
        width = os.get_terminal_size().columns
    except OSError:
        width = 80
    return max(40, width - 2)
