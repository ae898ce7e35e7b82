"""The command line: arguments to one client call each, printing, exit codes. No logic.

Floor 6: imports arguments, bridge, caller, errors, commands, jobs, jsonrpc, record, client, rescue, screen
and ssh; never torch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from .. import states
from ..client import api
from ..client.connection import CALL_TIMEOUT, Client
from ..errors import AmbiguousJob, ControlError, DeadlinePassed, InternalError, JobDead, JobNotAnswering, NoSuchJob
from ..jobs import registry
from ..jobs.record import JobRecord, jobs_dir
from ..wire import jsonrpc, records
from . import output, parser

if TYPE_CHECKING:
    import argparse

    from ..client.recovery import RankView  # loaded when a verb needs it

DONE, REFUSED, USAGE, NO_SUCH_JOB, NO_ANSWER, TOO_LATE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130

#: The first class that fits gives the exit code; what fits none was refused.
_EXIT_CODES: Final[tuple[tuple[type[ControlError], int], ...]] = (
    (AmbiguousJob, USAGE),
    (NoSuchJob, NO_SUCH_JOB),
    (JobDead, NO_ANSWER),
    (JobNotAnswering, NO_ANSWER),
    (DeadlinePassed, TOO_LATE),
)


class _Refused(Exception):
    """The person, or the lack of one, said no; ``args`` are the sentence and the exit code."""


def main(argv: Sequence[str] | None = None, prog: str = "forgather-control") -> int:
    """Run one verb and return its exit code (``forgather-control VERB ...``)."""
    words = sys.argv[1:] if argv is None else list(argv)
    if sys.stdout is None:  # closed by who started us (>&-); what is printed goes nowhere, as was asked
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    args = parser.parse(words, prog)
    try:
        return _VERBS.get(args.verb, _command)(args)
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
        print(output.safe(text), file=sys.stderr)
    return code


# Verbs...


def _open(args: argparse.Namespace) -> Client:
    return api.connect(args.job, at=args.connect, token=args.token, ssh=args.ssh)


def _is_told(args: argparse.Namespace) -> bool:
    """Whether it was said where the job is, so that this host's directory says nothing of it."""
    return args.connect is not None or args.ssh is not None


def _list(args: argparse.Namespace) -> int:
    if args.ssh is not None:
        return _list_ssh(args)
    if args.remote is not None:
        return _list_remote(args)
    found, left_out = registry.discover(jobs_dir(), api.LIST_TIMEOUT)
    if args.json:
        _print_json([job.to_json() for job in found])
    elif found:
        _print_text(output.job_table(found, _colour()))
    else:
        _print_text(f"no jobs in {output.safe(jobs_dir())}")
    for name, why in left_out.items():
        _complain(f"left out {name}: {why}", DONE)
    return DONE


def _list_remote(args: argparse.Namespace) -> int:
    with api.connect(at=args.remote, token=args.token) as job:
        rows = job.call("list_jobs")
    if not isinstance(rows, list):
        raise InternalError("the other side sent no list of jobs")
    found = [registry.Job.from_json(row) for row in rows]
    if args.json:
        _print_json(rows)
    else:
        _print_text(output.job_table(found, _colour()))
    return DONE


def _list_ssh(args: argparse.Namespace) -> int:
    from ..client import ssh

    rows, complaints = ssh.list_jobs(args.ssh, CALL_TIMEOUT)
    if not isinstance(rows, list):
        raise InternalError("the other side sent no list of jobs")
    found = [registry.Job.from_json(row)._replace(status=row.get("status")) for row in rows]
    if args.json:
        _print_json(rows)
    else:
        _print_text(output.job_table(found, _colour()) if found else f"no jobs on {args.ssh}")
    for line in complaints:
        _complain(line, DONE)
    return DONE


def _status(args: argparse.Namespace) -> int:
    with _open(args) as job:
        status = job.call("status")
    if args.json:
        _print_json(status)
    else:
        _print_text(_shown(output.status_screen, status, (sys.stdout.encoding or "").lower().startswith("utf")))
    return DONE


def _command(args: argparse.Namespace) -> int:
    kill_after = getattr(args, "kill_after", None)
    if kill_after is not None and args.connect is not None:
        raise _Refused("--kill-after ends processes of this host, so it does not go with --connect", USAGE)
    must_ask = args.method == "abort" and not args.force
    record = _settle(args, must_ask)
    name = args.job or args.connect or f"the job on {args.ssh}"
    if must_ask:
        by_force = "" if kill_after is None else f" Its processes on this host are killed after {kill_after:g} s."
        _confirm(f"abort {name}? What it learnt since its last checkpoint is lost.{by_force}")
    if kill_after is not None and record is not None:
        return _abort_or_kill(args, record)
    wait = {"wait": states.COMMAND_FINISHED, "timeout": args.wait} if hasattr(args, "wait") else {}
    with _open(args) as job:
        return _report(args, name, job.call(args.method, **wait))


def _settle(args: argparse.Namespace, must_ask: bool) -> JobRecord | None:
    """Which job is meant from here on, in ``args.job``; its record, if this host's directory is to have it."""
    if not _is_told(args):
        record = api.find(args.job)
        args.job = record.job_id
        return record
    if args.ssh is not None and must_ask:
        with _open(args) as job:  # who says yes says it of this one
            args.job = str(job.call("ping")["job_id"])
    return None


def _report(args: argparse.Namespace, job_id: str, result: dict[str, Any]) -> int:
    if args.json:
        _print_json(result)
    trouble = records.CommandRecord.from_json(result).trouble
    if trouble is not None:
        return _complain(f"{job_id}: {trouble}", REFUSED)
    if not args.json:
        _print_text(_shown(output.outcome, job_id, result))
    return DONE


def _abort_or_kill(args: argparse.Namespace, record: JobRecord) -> int:
    from ..client import recovery

    end = recovery.abort(record, args.kill_after)
    if end.problem is None:
        return _report(args, record.job_id, end.record or {})
    _complain(str(end.problem), DONE)
    if args.json:
        _print_json({"error": jsonrpc.error_object(end.problem), "processes": end.outcomes})
    else:
        _print_text(output.process_outcomes(end.outcomes))
    if end.missing:
        _complain(f"{end.missing} more of its processes are not recorded, and were left alone", DONE)
    outcomes = {process["outcome"] for process in end.outcomes}
    if outcomes & {states.KILL_REFUSED, states.KILL_STUCK}:
        return REFUSED
    return NO_ANSWER if end.missing or states.KILL_ELSEWHERE in outcomes else DONE


def _ranks(args: argparse.Namespace) -> int:
    sight = _look(args)
    if args.json:
        _print_json(sight.rows)
    else:
        _print_text(_shown(output.rank_table, sight.rows, _colour()))
    return DONE if sight.problem is None else NO_ANSWER


def _stacks(args: argparse.Namespace) -> int:
    from ..client import recovery

    rows, missing = recovery.read_stacks(_look(args))
    if args.json:
        _print_json(rows)
    else:
        _print_text(_shown(output.stacks_text, rows))
    for rank, why in missing.items():
        _complain(f"rank {rank}: {why}", DONE)
    return DONE if any(row.get("stacks") for row in rows) else NO_ANSWER


def _look(args: argparse.Namespace) -> RankView:
    from ..client import recovery

    if _is_told(args):
        with _open(args) as job:
            return recovery.from_reply(job.call(args.method, timeout=args.timeout))
    sight = recovery.query(api.find(args.job), args.method, args.timeout)
    if sight.problem is not None:
        _complain(f"{sight.problem}; what can be seen from here:", DONE)
    return sight


def _cleanup(args: argparse.Namespace) -> int:
    dead = api.dead_jobs()
    if dead and not args.json:
        _print_text(output.job_table(dead, _colour()))
    if dead and not args.force:
        _confirm(f"remove what {len(dead)} dead jobs left?" if len(dead) > 1 else "remove what this dead job left?")
    removed = api.cleanup(dead)
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


def _dial(args: argparse.Namespace) -> int:
    from ..client import stdio_proxy

    job_id, sock = api.dial(args.job)
    with sock:
        stdio_proxy.copy(job_id, sock, until_input_ends=args.until_input_ends)
    return DONE


#: What is not here is a command.
_VERBS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "list": _list,
    "status": _status,
    "ranks": _ranks,
    "stacks": _stacks,
    "cleanup": _cleanup,
    "rpc": _rpc,
    "dial-stdio": _dial,
}


# Talking to a person...


def _confirm(question: str) -> None:
    """Ask on the terminal.

    Raises:
        _Refused: there is none, or the answer is no.
    """
    if not (sys.stdin is not None and sys.stdin.isatty()):
        raise _Refused("this wants an answer and there is no terminal to ask on; use --force", USAGE)
    sys.stderr.write(f"{output.safe(question)} [y/N] ")
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


def _shown(show: Callable[..., str], *args: Any) -> str:
    """What a person reads of an answer.

    Raises:
        InternalError: it is none that this version knows.
    """
    try:
        return show(*args)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as err:
        raise InternalError("the other side sent an answer that cannot be shown; --json prints it") from err


def _print_json(value: Any) -> None:
    _print_text(json.dumps(value))
