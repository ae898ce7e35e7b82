"""The command line: arguments to one client call each, printing, exit codes. No logic.

Floor 6: imports caller, errors, commands, jobs, jsonrpc, record, client, rescue and screen; never torch. Verbs and
help come from the command table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from . import client, commands, jobs, jsonrpc, screen
from .caller import Client
from .errors import (
    AmbiguousJob,
    ControlError,
    DeadlinePassed,
    JobDead,
    JobNotAnswering,
    NoSuchJob,
)
from .record import JobRecord, jobs_dir

if TYPE_CHECKING:  # loaded when a verb needs it
    from .rescue import Sight

DONE, REFUSED, USAGE, NO_SUCH_JOB, NO_ANSWER, TOO_LATE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

#: The first class that fits gives the exit code; what fits none was refused.
_EXIT_CODES: Final[tuple[tuple[type[ControlError], int], ...]] = (
    (AmbiguousJob, USAGE),
    (NoSuchJob, NO_SUCH_JOB),
    (JobDead, NO_ANSWER),
    (JobNotAnswering, NO_ANSWER),
    (DeadlinePassed, TOO_LATE),
)

_EPILOG: Final = """\
JOB is an id, a prefix that no other id has, or left out where exactly one job is live.
exit codes: 0 done, 1 the job refused or failed it, 2 usage, 3 no such job,
4 the job is dead or does not answer, 5 the deadline passed, 130 interrupted"""


class _Refused(Exception):
    """The person, or the lack of one, said no; ``args`` are the sentence and the exit code."""


def main(argv: Sequence[str] | None = None, prog: str = "forgather-control") -> int:
    """Run one verb and return its exit code (``forgather-control VERB ...``)."""
    words = sys.argv[1:] if argv is None else list(argv)
    if sys.stdout is None:  # closed by who started us (>&-); what is printed goes nowhere, as was asked
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    # argparse would take the word behind a bare --wait for its value: --wait JOB.
    args = _parser(prog).parse_args(["--wait=" if word == "--wait" else word for word in words])
    try:
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except _Refused as err:
        return _complain(*err.args)
    except ControlError as err:
        if args.json:
            _print_json({"error": jsonrpc.error_object(err)})
        return _complain(str(err), next((code for kind, code in _EXIT_CODES if isinstance(err, kind)), REFUSED))
    except KeyboardInterrupt:
        return _complain("interrupted; a command that was accepted goes on", INTERRUPTED)
    except BrokenPipeError:
        _mute()
        return DONE  # whoever read us has had enough
    except OSError as err:  # this process is out of files, say; nothing was done
        return _complain(str(err), REFUSED)


def forgather(argv: Sequence[str] | None = None) -> int:
    """``forgather control VERB ...`` is ours; any other first word is the real Forgather's, where installed."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words[:1] == ["control"]:
        return main(words[1:], prog="forgather control")
    from importlib.util import find_spec

    if find_spec("forgather") is None:
        return _complain("only 'forgather control' is installed here, not Forgather itself", USAGE)
    from importlib import import_module

    return int(import_module("forgather.cli").main() or 0)


def _mute() -> None:
    """Nothing more can be printed; flushing at the exit must not complain about it (signal, note on SIGPIPE)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(text: str, code: int) -> int:
    if sys.stderr is not None:
        print(screen.safe(text), file=sys.stderr)
    return code


# Arguments...


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Find, watch, save, stop and abort running training jobs.",
        epilog=_EPILOG,
        formatter_class=_formatter,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True, prog=prog)
    for method in commands.TABLE.values():
        if method.verb is not None:
            _add_method(verbs, method)
    cleanup = _add(verbs, "cleanup", "Remove what dead jobs of this host left; list it and ask first.", _cleanup)
    cleanup.add_argument("--force", action="store_true", help="do not ask")
    rpc = _add(verbs, "rpc", "Call any method of the job and print its result.", _rpc)
    rpc.add_argument("job", metavar="JOB")
    rpc.add_argument("method", metavar="METHOD")
    rpc.add_argument("params", metavar="PARAMS-JSON", nargs="?", default="{}", help="an object or an array")
    _add_ways(rpc)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    """Without a width argparse loads shutil, with all its compressors, at every start, to ask for it."""
    try:
        width = os.get_terminal_size().columns
    except OSError:
        width = 80
    return argparse.RawDescriptionHelpFormatter(prog, width=max(40, width - 2))


def _add(verbs: Any, verb: str, doc: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        verb,
        help=doc.partition("\n\n")[0].replace("%", "%%"),
        description=doc.replace("%", "%%"),
        epilog=_EPILOG,
        formatter_class=_formatter,
    )
    parser.add_argument("--json", action="store_true", help="print what the wire said, one JSON text")
    parser.set_defaults(run=run)
    return parser


def _add_method(verbs: Any, method: commands.Method) -> None:
    assert method.verb is not None
    parser = _add(verbs, method.verb, method.doc, _QUERIES.get(method.name, _command))
    parser.set_defaults(method=method.name)
    if method.name == "list_jobs":
        parser.add_argument(
            "--remote", metavar="HOST:PORT", help="the jobs of another host, told by the one at this port"
        )
        _add_token(parser)
        return
    parser.add_argument("job", metavar="JOB", nargs="?", help="id, unique prefix, or nothing where one job is live")
    _add_ways(parser)
    if method.name == "abort":
        parser.add_argument("--force", action="store_true", help="do not ask")
    if commands.PATIENCE in method.params:
        parser.add_argument(
            "--timeout",
            metavar="SECONDS",
            type=lambda text: _checked(text, commands.PATIENCE),
            default=commands.PATIENCE.default,
            help="how long to wait for each rank (default %(default)g)",
        )
    if method.is_command:
        _add_waits(parser, method)


def _add_ways(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--connect", metavar="ADDRESS", help="tcp://HOST:PORT, tls://HOST:PORT or unix:PATH")
    _add_token(parser)


def _add_token(parser: argparse.ArgumentParser) -> None:
    # Never the token itself: every user of this host sees the arguments of every process.
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        type=_first_line,
        dest="token",
        help="holds the token to be shown there; else $FORGATHER_CONTROL_TOKEN, else the job's endpoint.json",
    )


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            token = file.readline().strip()
    except (OSError, ValueError) as err:
        raise argparse.ArgumentTypeError(f"{path!r} cannot be read ({err})") from err
    if not token:
        raise argparse.ArgumentTypeError(f"{path!r} holds no token in its first line")
    return token


def _add_waits(parser: argparse.ArgumentParser, method: commands.Method) -> None:
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--wait",
        metavar="SECONDS",
        nargs="?",
        # A bare --wait waits as long as the job lives.
        type=lambda text: _checked(text, commands.TIMEOUT) if text else None,
        default=argparse.SUPPRESS,
        help="return when it is over; --wait=SECONDS gives up waiting after that time",
    )
    if method.name == "abort":
        either.add_argument(
            "--kill-after",
            metavar="SECONDS",
            type=lambda text: _checked(text, commands.TIMEOUT),
            help="wait, and kill those of its processes on this host that have not ended by then",
        )


def _checked(text: str, param: commands.Param) -> float:
    try:
        return float(param.check(float(text)))
    except ValueError as err:
        most = f"{param.schema['maximum']:g}"
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {most}") from err


# Verbs...


def _open(args: argparse.Namespace) -> Client:
    return client.connect(args.job, at=args.connect, token=args.token)


def _list(args: argparse.Namespace) -> int:
    if args.remote is not None:
        return _list_remote(args)
    found, left_out = jobs.discover(jobs_dir(), client.LIST_TIMEOUT)
    if args.json:
        _print_json([job.to_json() for job in found])
    elif found:
        _print_text(screen.job_table(found, _colour()))
    else:
        _print_text(f"no jobs in {screen.safe(jobs_dir())}")
    for name, why in left_out.items():
        _complain(f"left out {name}: {why}", DONE)
    return DONE


def _list_remote(args: argparse.Namespace) -> int:
    at = args.remote if "://" in args.remote else f"tcp://{args.remote}"
    with client.connect(at=at, token=args.token) as job:
        rows = job.call("list_jobs")
    if args.json:
        _print_json(rows)
    else:
        _print_text(screen.job_table([jobs.Job.from_json(row) for row in rows], _colour()))
    return DONE


def _status(args: argparse.Namespace) -> int:
    with _open(args) as job:
        status = job.call("status")
    if args.json:
        _print_json(status)
    else:
        _print_text(screen.status_screen(status, unicode=(sys.stdout.encoding or "").lower().startswith("utf")))
    return DONE


def _command(args: argparse.Namespace) -> int:
    kill_after = getattr(args, "kill_after", None)
    if kill_after is not None and args.connect is not None:
        raise _Refused("--kill-after ends processes of this host, so it does not go with --connect", USAGE)
    record = client.find(args.job) if args.connect is None else None
    name = args.job or args.connect if record is None else record.job_id
    if args.method == "abort" and not args.force:
        by_force = "" if kill_after is None else f" Its processes on this host are killed after {kill_after:g} s."
        _confirm(f"abort {name}? What it learnt since its last checkpoint is lost.{by_force}")
    if kill_after is not None and record is not None:
        return _abort_or_kill(args, record)
    args.job = name if record is not None else args.job
    wait = {"wait": "finished", "timeout": args.wait} if hasattr(args, "wait") else {}
    with _open(args) as job:
        return _report(args, name, job.call(args.method, **wait))


def _report(args: argparse.Namespace, job_id: str, result: dict[str, Any]) -> int:
    if args.json:
        _print_json(result)
    trouble = commands.CommandRecord.from_json(result).trouble
    if trouble is not None:
        return _complain(f"{job_id}: {trouble}", REFUSED)
    if not args.json:
        _print_text(screen.outcome(job_id, result))
    return DONE


def _abort_or_kill(args: argparse.Namespace, record: JobRecord) -> int:
    from . import rescue

    end = rescue.abort(record, args.kill_after)
    if end.problem is None:
        return _report(args, record.job_id, end.record or {})
    _complain(str(end.problem), DONE)
    if args.json:
        _print_json({"error": jsonrpc.error_object(end.problem), "processes": end.fates})
    else:
        _print_text(screen.fates(end.fates))
    if end.missing:
        _complain(f"{end.missing} more of its processes are not recorded, and were left alone", DONE)
    outcomes = {fate["outcome"] for fate in end.fates}
    if outcomes & {"refused", "stuck"}:
        return REFUSED
    return NO_ANSWER if end.missing or "elsewhere" in outcomes else DONE


def _ranks(args: argparse.Namespace) -> int:
    sight = _look(args)
    if args.json:
        _print_json(sight.rows)
    else:
        _print_text(screen.rank_table(sight.rows, _colour()))
    return DONE if sight.problem is None else NO_ANSWER


def _stacks(args: argparse.Namespace) -> int:
    from . import rescue

    rows, missing = rescue.read_stacks(_look(args))
    if args.json:
        _print_json(rows)
    else:
        _print_text(screen.stacks_text(rows))
    for rank, why in missing.items():
        _complain(f"rank {rank}: {why}", DONE)
    return DONE if any(row.get("stacks") for row in rows) else NO_ANSWER


def _look(args: argparse.Namespace) -> Sight:
    from . import rescue

    if args.connect is not None:
        with _open(args) as job:
            return rescue.told(job.call(args.method, timeout=args.timeout))
    sight = rescue.look(client.find(args.job), args.method, args.timeout)
    if sight.problem is not None:
        _complain(f"{sight.problem}; what can be seen from here:", DONE)
    return sight


def _cleanup(args: argparse.Namespace) -> int:
    dead = client.dead_jobs()
    if dead and not args.json:
        _print_text(screen.job_table(dead, _colour()))
    if dead and not args.force:
        _confirm(f"remove what {len(dead)} dead jobs left?" if len(dead) > 1 else "remove what this dead job left?")
    removed = client.cleanup(dead)
    if args.json:
        _print_json({"removed": removed})
    else:
        _print_text(f"removed {len(removed)} of {len(dead)}" if dead else "nothing to clean up")
    return DONE


def _rpc(args: argparse.Namespace) -> int:
    try:
        params = jsonrpc.parse_json(args.params.encode("utf-8", "surrogateescape"))
    except ControlError as err:
        raise _Refused(f"PARAMS-JSON: {err}", USAGE) from err
    if not isinstance(params, (dict, list)):
        raise _Refused("PARAMS-JSON must be a JSON object or array", USAGE)
    with _open(args) as job:
        _print_json(job.call_raw(args.method, params))
    return DONE


_QUERIES: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "list_jobs": _list,
    "status": _status,
    "ranks": _ranks,
    "stacks": _stacks,
}


# Talking to a person...


def _confirm(question: str) -> None:
    """Ask on the terminal.

    Raises:
        _Refused: there is none, or the answer is no.
    """
    if not (sys.stdin is not None and sys.stdin.isatty()):
        raise _Refused("this wants an answer and there is no terminal to ask on; use --force", USAGE)
    sys.stderr.write(f"{screen.safe(question)} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise _Refused("nothing was done", REFUSED)


def _colour() -> bool:
    # https://no-color.org: any non-empty value means no.
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _print_text(text: str) -> None:
    """The one way to stdout.

    Raises:
        BrokenPipeError: whoever read us has gone.
        _Refused: it cannot be written, so the result is lost; by then the verb has done its work.
    """
    encoding = sys.stdout.encoding or "ascii"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        raise
    except OSError as err:
        _mute()
        why = f"what was to be printed is lost ({err.strerror}); what was asked for is done"
        raise _Refused(why, REFUSED) from err


def _print_json(value: Any) -> None:
    _print_text(json.dumps(value))
