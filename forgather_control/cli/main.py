"""The command line: one function for each verb, which makes one call of the client and prints the answer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from ..client import target
from ..client.connection import Client
from ..client.reading import reading
from ..client.target import Target
from ..errors import ControlError, DeadlinePassed
from ..jobs.record import JobRecord
from ..wire import jsonrpc
from ..wire.builtin import BUILTIN
from . import command_output, job_words, output, parser, terminal
from .exit_codes import DONE, INTERRUPTED, NO_ANSWER, REFUSED, USAGE, exit_code, kill_code
from .terminal import Refusal, complain, print_answer, print_json, print_text

if TYPE_CHECKING:
    import argparse

    from ..client.recovery import RankView  # imported by the verbs that need it


def main(argv: Sequence[str] | None = None, prog: str = "forgather-control") -> int:
    """Run one verb and return its exit code (``forgather-control VERB ...``)."""
    if sys.stdout is None:  # closed (``>&-``), which asks to print nowhere
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for as long as the process lives
    args = parser.parse(sys.argv[1:] if argv is None else argv, prog)
    try:
        return _do(args)
    except Refusal as err:
        return complain(*err.args)
    except ControlError as err:
        if args.json:
            print_json({"error": jsonrpc.error_object(err)})
        text = str(err) if args.verb == "rpc" else output.in_verbs(str(err))
        return complain(f"{text}{job_words.hint(args, err)}", exit_code(err))
    except KeyboardInterrupt:
        return complain("interrupted; a command that was accepted is still carried out", INTERRUPTED)
    except BrokenPipeError:
        terminal.discard_output()
        return DONE  # the reader has seen enough
    except OSError as err:  # for example, this process is out of file descriptors; nothing was done
        return complain(str(err), REFUSED)


def forgather(argv: Sequence[str] | None = None) -> int:
    """Run ``forgather control VERB ...``; any other first word is left to Forgather, where that is installed."""
    words = sys.argv[1:] if argv is None else list(argv)
    prog = "forgather control"
    if words[:1] == ["control"]:
        return main(words[1:], prog)
    from importlib import import_module, util

    if util.find_spec("forgather") is not None:
        return int(import_module("forgather.cli").main() or 0)
    complain(f"Forgather itself is not installed here, only its control. Usage: {prog} [OPTIONS] VERB ...")
    return USAGE if words[:1] not in ([], ["-h"], ["--help"], ["--version"]) else main(words[:1], prog)


def _do(args: argparse.Namespace) -> int:
    """Run the verb, for one job or for several."""
    if args.is_many and args.verb != "watch":
        from . import many

        code = many.run(args)
        if code is not None:
            return code
    return _VERBS.get(args.verb, _call)(args)


def _target(args: argparse.Namespace) -> Target:
    return target.resolve(args.job, args.connect, args.token, args.ssh)


def _call(args: argparse.Namespace) -> int:
    """Run a verb of the method table."""
    if BUILTIN[args.method].is_command:
        return _command(args)
    with Client(_target(args)) as job:
        answer, name = job.call(args.method, **args.params), job.name
    screens: dict[str, tuple[Any, ...]] = {
        "list_commands": (command_output.command_table, answer),
        "list_settings": (command_output.settings_table, answer),
        "cancel_command": (command_output.outcome, name, answer),
    }
    print_answer(args.json, answer, *screens.get(args.method, (output.values, answer)))
    return DONE


def _command(args: argparse.Namespace) -> int:
    kill_after = getattr(args, "kill_after", None)
    if kill_after is not None and args.connect is not None:
        raise Refusal("--kill-after ends processes of this host, so it cannot be combined with --connect", USAGE)
    where = _target(args)
    if args.method == "abort" and not args.force:
        if where.record is None:  # ask about the one job that is meant, and abort no other one
            with Client(where) as job:
                args.job = job.job_id
            where = _target(args)
        lost = "Progress since its last checkpoint is lost."
        terminal.confirm("abort", f"abort {where.name}? {lost}{output.kill_warning(kill_after)}")
    if kill_after is not None and where.record is not None:
        return _abort_or_kill(args, where.record, kill_after)
    with Client(where) as job:
        return _report(args, job.name, _given(args, where, job))


def _given(args: argparse.Namespace, where: Target, job: Client) -> Any:
    """Give a command; where that waits, a terminal shows what for, and a deadline what has not happened."""
    if "wait" not in args.params or args.json:
        return job.give(args.method, **args.params)
    from . import progress_line

    params = args.params
    if terminal.can_rewrite():  # to find it in the status; without an id, equal commands that are pending are one
        import uuid

        params = {"command_id": uuid.uuid4().hex, **params}
    doing = progress_line.of_command(where, args.method, params.get("command_id"))
    try:
        with progress_line.Line(doing):
            return job.give(args.method, **params)
    except DeadlinePassed as err:
        if "state" not in err.data:
            raise
        why = err.data["state"]
        with suppress(ControlError), reading():  # the job may answer no more
            why = progress_line.why_open(job.call("status"), err.data.get("command_id"))
        verb = output.verb(args.method)
        text = f"{verb} is still running ({why}); forgather-control commands {job.name} shows what becomes of it"
        raise Refusal(text, exit_code(err)) from err


def _report(args: argparse.Namespace, job: str, record: Any) -> int:
    from ..wire.records import CommandRecord

    trouble = CommandRecord.from_json(record).trouble
    if trouble is None:
        print_answer(args.json, record, command_output.outcome, job, record)
        return DONE
    if args.json:
        print_json(record)
    return complain(f"{job}: {output.in_verbs(trouble)}", REFUSED)


def _abort_or_kill(args: argparse.Namespace, record: JobRecord, kill_after: float) -> int:
    from ..client import recovery

    end = recovery.abort(record, kill_after)
    if end.problem is None:
        return _report(args, record.job_id, end.record)
    late = isinstance(end.problem, DeadlinePassed)  # its sentence would say that the abort is still carried out
    complain(f"{record.job_id} did not end within {kill_after:g} s" if late else output.in_verbs(str(end.problem)))
    told = {"error": jsonrpc.error_object(end.problem), "processes": end.outcomes}
    print_answer(args.json, told, output.process_outcomes, end.outcomes)
    if end.missing:
        complain(f"{end.missing} more of its processes are not recorded, and were left alone")
    return kill_code({process["outcome"] for process in end.outcomes}, end.missing)


def _ranks(args: argparse.Namespace) -> int:
    view = _view(args)
    print_answer(args.json, view.rows, output.rank_table, view.rows, terminal.has_colour())
    return DONE if view.problem is None else NO_ANSWER


def _stacks(args: argparse.Namespace) -> int:
    from ..client import recovery

    rows, missing = recovery.read_stacks(_view(args), args.params.get("internal", False))
    print_answer(args.json, rows, output.stacks_text, rows)
    for rank, why in missing.items():
        complain(f"rank {rank}: {why}")
    return DONE if any(row.get("stacks") for row in rows) else NO_ANSWER


def _view(args: argparse.Namespace) -> RankView:
    from ..client import recovery

    where = _target(args)
    params = {"timeout": BUILTIN[args.method].params[0].default, **args.params}
    if args.connect is not None or where.record is None:
        with Client(where) as job:
            return recovery.from_reply(job.call(args.method, **params))
    view = recovery.query(where.record, args.method, **params)
    if view.problem is not None:
        complain(f"{view.problem}; what can be seen from here:")
    return view


def _rpc(args: argparse.Namespace) -> int:
    try:
        params = jsonrpc.parse_json(args.json_params.encode("utf-8", "surrogateescape"))
    except ControlError as err:
        raise Refusal(f"PARAMS-JSON: {err}", USAGE) from err
    if not isinstance(params, (dict, list)):
        raise Refusal("PARAMS-JSON must be a JSON object or array", USAGE)
    with Client(_target(args)) as job:
        print_json(job.call_raw(args.method, params))
    return DONE


def _run(args: argparse.Namespace) -> int:
    from . import run

    return run.run(args)


def _when(args: argparse.Namespace) -> int:
    command = args.command
    with Client(_target(args)) as job:
        if command is not None and command.verb == "run":
            from . import run

            do, params = run.as_rule(job, command)
            args.params.update(do=do, params=params)
        answer, name = job.call(args.method, **args.params), job.name
    if args.method == "list_rules":
        print_answer(args.json, answer, command_output.rules_text, "", answer)
    else:
        done = {"remove_rule": "removed", "add_rule": "added"}[args.method]
        print_answer(args.json, answer, command_output.changed_rule, name, answer, done)
    return DONE


def _wait(args: argparse.Namespace) -> int:
    from . import wait

    return wait.run(args)


def _watch(args: argparse.Namespace) -> int:
    from . import watch

    return watch.run(args)


def _dial(args: argparse.Namespace) -> int:
    from ..client import stdio_proxy

    job_id, sock = target.dial(args.job)
    with sock:
        stdio_proxy.copy(job_id, sock, until_input_ends=args.until_input_ends)
    return DONE


def _completion(args: argparse.Namespace) -> int:
    from . import completion

    return completion.run(args)


def _list(args: argparse.Namespace) -> int:
    from . import listing

    return listing.run(args)


def _status(args: argparse.Namespace) -> int:
    from . import status

    return status.run(args)


def _events(args: argparse.Namespace) -> int:
    from . import events

    return events.run(args)


def _mcp(args: argparse.Namespace) -> int:
    from ..mcp import server

    server.serve(args.allow, args.job)
    return DONE


def _cleanup(args: argparse.Namespace) -> int:
    from ..client import api
    from . import job_table

    dead = api.dead_jobs()
    if dead and not args.json:
        print_text(job_table.job_table(dead, terminal.has_colour(), width=terminal.width()))
    if dead and not args.force:
        what = f"{len(dead)} dead jobs" if len(dead) > 1 else "this dead job"
        terminal.confirm("cleanup", f"remove what {what} left?")
    removed = api.cleanup(dead)
    text = f"removed {len(removed)} of {len(dead)}" if dead else "nothing to clean up"
    print_answer(args.json, {"removed": removed}, str, text)
    return DONE


#: The verbs that need more than one call and its answer.
_VERBS: Final[dict[str, Callable[[argparse.Namespace], int]]] = {
    "list": _list,
    "status": _status,
    "events": _events,
    "mcp": _mcp,
    "ranks": _ranks,
    "stacks": _stacks,
    "cleanup": _cleanup,
    "rpc": _rpc,
    "run": _run,
    "wait": _wait,
    "watch": _watch,
    "when": _when,
    "completion": _completion,
    "dial-stdio": _dial,
}
