"""The command line's words: which verbs and options there are, and their help, out of the command table.

Floor 3: imports commands, endpoint, errors and ssh. Runs on the CLI's thread; what a verb does stands in ``cli``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

from ..errors import ControlError
from ..wire import addresses, builtin, methods, schemas

#: Characters of a token's file that are read; ours have 43.
_MAX_TOKEN: Final = 4096

EPILOG: Final = """\
JOB is an id, a prefix that no other id has, or left out where exactly one job is live.
exit codes: 0 done, 1 the job refused or failed it, 2 usage, 3 no such job,
4 the job is dead or does not answer, 5 the deadline passed, 130 interrupted"""

#: What the end of an ssh runs; no person types it, so that the list of verbs does without it.
_DIAL: Final = """\
Copy between standard input and output and a job's socket. This is what --ssh runs on the other side.

The first line says that the job is reached: "forgather-control dial-stdio 1 JOB". All that follows is what the job
sends, until it hangs up or nobody reads any more; the end of the input is handed on, and replies still come."""

#: What does not go with --ssh, and why.
_NOT_OVER_SSH: Final = {
    "connect": "--connect: both say where the job is",
    "remote": "--remote: both say where the jobs are",
    "token": "--token-file: whom ssh lets in need show no token",
    "kill_after": "--kill-after, which ends processes of this host; run it there",
}


def parse(words: Sequence[str], prog: str) -> argparse.Namespace:
    """The words of one command line; ``verb`` names what to do, ``ssh`` the host to do it on, or is ``None``.

    Raises:
        SystemExit: they are wrong (2), or were a question for help (0).
    """
    first = words[0] if words else None
    parser = _parser(prog, first if first in _VERBS else None)
    # argparse would take the word behind a bare --wait for its value: --wait JOB.
    args = parser.parse_args(["--wait=" if word == "--wait" else word for word in words])
    if args.ssh is not None:
        if args.verb == "cleanup":
            parser.error(f"cleanup asks about what it shows; run it there: ssh -t {args.ssh} forgather-control cleanup")
        if args.verb == "dial-stdio":
            parser.error("dial-stdio is what --ssh runs on the other side")
        for name, other in _NOT_OVER_SSH.items():
            if getattr(args, name, None) is not None:
                parser.error(f"--ssh does not go with {other}")
    return args


def _parser(prog: str, verb: str | None = None) -> argparse.ArgumentParser:
    """With all verbs, or with one: making the others' would take longer than anything else at a start."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Find, watch, save, stop and abort running training jobs.",
        epilog=EPILOG,
        formatter_class=_formatter,
    )
    _add_ssh(parser, None)
    verbs = parser.add_subparsers(metavar="VERB", required=True, prog=prog, dest="verb")
    for method in builtin.BUILTIN:
        if method.verb is not None and verb in (None, method.verb):
            _add_method(verbs, method)
    for name, add in _MORE.items():
        if verb in (None, name):
            add(verbs)
    return parser


def _add_cleanup(verbs: Any) -> None:
    cleanup = _add(verbs, "cleanup", "Remove what dead jobs of this host left; list it and ask first.")
    cleanup.add_argument("--force", action="store_true", help="do not ask")
    _add_ssh(cleanup, argparse.SUPPRESS, is_listed=False)


def _add_rpc(verbs: Any) -> None:
    rpc = _add(verbs, "rpc", "Call any method of the job and print its result.")
    rpc.add_argument("job", metavar="JOB")
    rpc.add_argument("method", metavar="METHOD")
    rpc.add_argument("params", metavar="PARAMS-JSON", nargs="?", default="{}", help="an object or an array")
    _add_ways(rpc)


def _add_dial(verbs: Any) -> None:
    dial = _add(verbs, "dial-stdio", _DIAL, is_listed=False)
    dial.add_argument("job", metavar="JOB", nargs="?")
    dial.add_argument("--until-input-ends", action="store_true", help="do not wait for replies then")


#: The verbs that stand for no method.
_MORE: Final[dict[str, Callable[[Any], None]]] = {
    "cleanup": _add_cleanup,
    "rpc": _add_rpc,
    "dial-stdio": _add_dial,
}
_VERBS: Final = {*_MORE, *(method.verb for method in builtin.BUILTIN if method.verb)}


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, width=_width())


@cache
def _width() -> int:
    """Columns for the help. argparse would load shutil, with all its compressors, and ask anew for each argument."""
    try:
        width = os.get_terminal_size().columns
    except OSError:
        width = 80
    return max(40, width - 2)


def _add(verbs: Any, verb: str, doc: str, is_listed: bool = True) -> argparse.ArgumentParser:
    listed = {"help": doc.partition("\n\n")[0].replace("%", "%%")} if is_listed else {}
    parser: argparse.ArgumentParser = verbs.add_parser(
        verb, description=doc.replace("%", "%%"), epilog=EPILOG, formatter_class=_formatter, **listed
    )
    parser.add_argument("--json", action="store_true", help="print what the wire said, one JSON text")
    return parser


def _add_method(verbs: Any, method: methods.Method) -> None:
    assert method.verb is not None
    parser = _add(verbs, method.verb, method.doc)
    parser.set_defaults(method=method.name)
    if method.name == "list_jobs":
        parser.add_argument(
            "--remote",
            metavar="HOST:PORT",
            type=lambda text: _address(text if "://" in text else f"tcp://{text}"),
            help="the jobs of another host, told by the one at this port",
        )
        _add_token(parser)
        _add_ssh(parser, argparse.SUPPRESS)
        return
    parser.add_argument("job", metavar="JOB", nargs="?", help="id, unique prefix, or nothing where one job is live")
    _add_ways(parser)
    if method.name == "abort":
        parser.add_argument("--force", action="store_true", help="do not ask")
    timeout = method.param("timeout")
    if timeout is not None and not method.is_command:
        parser.add_argument(
            "--timeout",
            metavar="SECONDS",
            type=lambda text: _checked(text, timeout),
            default=timeout.default,
            help="how long to wait for each rank (default %(default)g)",
        )
    if method.is_command:
        _add_waits(parser, method)


def _add_ways(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--connect", metavar="ADDRESS", type=_address, help="tcp://HOST:PORT, tls://HOST:PORT or unix:PATH"
    )
    _add_token(parser)
    _add_ssh(parser, argparse.SUPPRESS)


def _add_ssh(parser: argparse.ArgumentParser, default: str | None, is_listed: bool = True) -> None:
    """Before the verb and behind it: the one behind has no default, which would undo what stands before."""
    doc = "do it on that host, over ssh: an alias, or [USER@]HOST; no port is opened for it"
    parser.add_argument(
        "--ssh", metavar="HOST", type=_host, default=default, help=doc if is_listed else argparse.SUPPRESS
    )


def _host(text: str) -> str:
    from ..client.ssh import check_host

    try:
        return check_host(text)
    except ControlError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


def _add_token(parser: argparse.ArgumentParser) -> None:
    # Never the token itself: every user of this host sees the arguments of every process.
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        type=_first_line,
        dest="token",
        help="holds the token to be shown there; else $FORGATHER_CONTROL_TOKEN, else the job's endpoint.json",
    )


def _address(text: str) -> str:
    try:
        addresses.parse(text)
    except ControlError as err:
        raise argparse.ArgumentTypeError(str(err)) from err
    return text


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            token = file.readline(_MAX_TOKEN).strip()
    except (OSError, ValueError) as err:
        raise argparse.ArgumentTypeError(f"{path!r} cannot be read ({err})") from err
    if not token:
        raise argparse.ArgumentTypeError(f"{path!r} holds no token in its first line")
    return token


def _add_waits(parser: argparse.ArgumentParser, method: methods.Method) -> None:
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--wait",
        metavar="SECONDS",
        nargs="?",
        # A bare --wait waits as long as the job lives.
        type=lambda text: _checked(text, methods.TIMEOUT) if text else None,
        default=argparse.SUPPRESS,
        help="return when it is over; --wait=SECONDS gives up waiting after that time",
    )
    if method.name == "abort":
        either.add_argument(
            "--kill-after",
            metavar="SECONDS",
            type=lambda text: _checked(text, methods.TIMEOUT),
            help="wait, and kill those of its processes on this host that have not ended by then",
        )


def _checked(text: str, param: methods.Param) -> float:
    try:
        return float(schemas.check(param.schema, float(text)))
    except ValueError as err:
        most = f"{param.schema['maximum']:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {most}") from err
