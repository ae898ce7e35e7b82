"""Verbs for several jobs: one question, one line per job as it finishes, one summary, the worst exit code."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Final, NamedTuple

from .. import states
from ..client.connection import Client
from ..client.limits import LIST_TIMEOUT
from ..client.many import Calls
from ..client.selection import select
from ..client.target import Target, is_pattern
from ..errors import ControlError, DeadlinePassed, FindError, JobDead, NoSuchJob
from ..jobs import registry
from ..jobs.record import jobs_dir
from ..wire import jsonrpc
from ..wire.builtin import BUILTIN
from ..wire.records import CommandRecord
from . import command_output, job_table, job_words, output, progress_line, terminal
from .exit_codes import DONE, INTERRUPTED, NO_ANSWER, NO_SUCH_JOB, REFUSED, TOO_LATE, exit_code, kill_code
from .terminal import Refusal, complain

#: What the summary calls an error, by its exit code; others are "refused".
_FAILURES: Final = {NO_ANSWER: "without answer", NO_SUCH_JOB: "not found", TOO_LATE: "not finished in time"}
#: So many names are listed in a sentence.
_NAMES: Final = 8


class _Told(NamedTuple):
    """What is printed about one job."""

    json: dict[str, Any]
    code: int
    word: str  #: For the summary.
    text: Callable[[], str] | None = None  #: For stdout.
    problem: str | None = None  #: For stderr, with --json, too.


def run(args: argparse.Namespace) -> int | None:
    """Run the verb; return the worst exit code, or ``None`` if the words mean one job, as an id or a name."""
    found = select(args.jobs, args.all, args.ssh)
    is_one = len(args.jobs) == 1 and not is_pattern(args.jobs[0])
    if is_one and len(found.targets) < 2:
        return None
    if args.all and not found.targets:
        raise NoSuchJob(f"No live job {'in ' + jobs_dir() if args.ssh is None else 'on ' + args.ssh}")
    report = _Report(args)
    for name, why in found.left_out.items():
        complain(f"left out {name}: {why}")
    for word, err in found.problems.items():
        report.add(word, err)
    if args.verb in job_words.ENDING and not args.force:
        _confirm(args, found.targets)
    calls = Calls(found.targets, _Asking(args).ask, args.parallel)
    is_waiting = "wait" in args.params and not args.json
    try:
        with progress_line.Line(lambda: nullcontext(partial(_progress, report, calls)), is_waiting) as line:
            for target, answer in calls:
                with line.hidden():
                    report.add(target.name, answer)
    except KeyboardInterrupt:
        return _interrupted(report, calls)
    if found.targets:
        report.sum_up(args.verb)
    return report.code


def _confirm(args: argparse.Namespace, targets: list[Target]) -> None:
    """Show the jobs and ask once, if more than one would end; before an abort, also if it is one."""
    names, lines = [target.name for target in targets], [f"  {target.name}" for target in targets]
    records = [target.record for target in targets if target.record is not None]
    if records:
        jobs = [job for job in registry.look(jobs_dir(), records, LIST_TIMEOUT) if job.state != states.JOB_DEAD]
        names, lines = (
            [job.job_id for job in jobs],
            job_table.job_table(jobs, colour=False, width=terminal.width()).splitlines(),
        )
    if not names or (len(names) == 1 and args.verb != "abort"):
        return
    for line in lines:
        complain(line)
    question = f"{args.verb} " + (f"these {len(names)} jobs?" if len(names) > 1 else f"{names[0]}?")
    if args.verb == "abort":
        question += f" Progress since the last checkpoint is lost.{output.kill_warning(args.kill_after)}"
    terminal.confirm(args.verb, question)


class _Asking:
    """What the verb does for one job. ``ask`` runs on any thread."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        #: A rule's command is looked up in each job, as jobs may have different ones.
        self._is_own = args.verb == "when" and args.command is not None and args.command.verb == "run"

    def ask(self, target: Target) -> Any:
        args = self._args
        if args.verb == "ranks":
            return self._ranks(target)
        if getattr(args, "kill_after", None) is not None and target.record is not None:
            from ..client import recovery

            return recovery.abort(target.record, args.kill_after)
        with Client(target) as job:
            if BUILTIN[args.method].is_command:
                return job.give(args.method, **args.params)
            params = args.params
            if self._is_own:
                from . import run

                do, inner = run.as_rule(job, args.command)
                params = {**params, "do": do, "params": inner}
            return job.call(args.method, **params)

    def _ranks(self, target: Target) -> Any:
        from ..client import recovery

        params = {"timeout": BUILTIN["ranks"].params[0].default, **self._args.params}
        if target.record is not None:
            return recovery.query(target.record, "ranks", **params)
        with Client(target) as job:
            return recovery.from_reply(job.call("ranks", **params))


class _Report:
    """Prints what became of each job, and keeps the sum. A reader that has gone stops no job's command."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._words: Counter[tuple[int, str]] = Counter()  # by exit code and word
        self.reported: list[str] = []
        self.code = DONE

    def add(self, name: str, answer: Any) -> None:
        """Print one job's answer or error."""
        try:
            told = self._told(name, answer)
            text = None if told.text is None or self._args.json else terminal.shown(told.text)
        except ControlError as err:
            told, text = self._told(name, err), None
        self.reported.append(name)
        self._words[told.code, told.word] += 1
        self.code = max(self.code, told.code)
        if told.problem is not None:
            with suppress(BrokenPipeError):
                complain(told.problem)
        if self._args.json:
            self._print(terminal.print_json, told.json)
        elif text is not None:
            self._print(terminal.print_text, text)

    def _print(self, show: Callable[[Any], None], what: Any) -> None:
        try:
            show(what)
        except BrokenPipeError:
            terminal.discard_output()
        except Refusal as err:
            self.code = max(self.code, complain(*err.args))

    def sum_up(self, verb: str) -> None:
        """Print the summary, unless a program reads the output."""
        count = sum(self._words.values())
        if not self._args.json:
            words = ", ".join(f"{number} {word}" for (_, word), number in sorted(self._words.items()))
            self._print(terminal.print_text, f"{verb} of {count} {'job' if count == 1 else 'jobs'}: {words}")

    def _told(self, name: str, answer: Any) -> _Told:
        if isinstance(answer, ControlError):
            text = output.in_verbs(str(answer)) + job_words.hint(self._args, answer)
            known = {"job_id": name, "error": jsonrpc.error_object(answer)}
            told = _Told(known, exit_code(answer), _failure(answer), problem=f"{name}: {text}")
            return told if self._args.verb != "status" or self._args.ssh is not None else _with_past(told, answer)
        if self._args.verb == "ranks":
            problem = answer.problem and f"{name}: {answer.problem}; what can be seen from here:"
            code, word = (DONE, "answered") if problem is None else (NO_ANSWER, "without answer")
            table = partial(_ranks_text, name, answer.rows)
            return _Told({"job_id": name, "result": answer.rows}, code, word, table, problem)
        if getattr(self._args, "kill_after", None) is not None and not isinstance(answer, dict):
            return self._aborted(name, answer)
        known = {"job_id": name, "result": answer}
        if not BUILTIN[self._args.method].is_command:
            return _Told(known, DONE, "answered", partial(_screen, self._args.method, name, answer))
        record = CommandRecord.from_json(answer)
        if record.trouble is not None:
            return _Told(known, REFUSED, record.state, problem=f"{name}: {output.in_verbs(record.trouble)}")
        return _Told(known, DONE, record.state, partial(command_output.outcome, name, answer))

    def _aborted(self, name: str, end: Any) -> _Told:
        """Tell how an abort with --kill-after ended."""
        if end.problem is None:
            return self._told(name, end.record)
        late, seconds = isinstance(end.problem, DeadlinePassed), self._args.kill_after
        problem = f"did not end within {seconds:g} s" if late else output.in_verbs(str(end.problem))
        if end.missing:
            problem += f"; {end.missing} more of its processes are not recorded, and were left alone"
        code = kill_code({process["outcome"] for process in end.outcomes}, end.missing)
        known = {"job_id": name, "error": jsonrpc.error_object(end.problem), "processes": end.outcomes}
        word = "killed" if code == DONE else "not killed"
        return _Told(known, code, word, partial(_killed_text, name, end.outcomes), f"{name}: {problem}")


def _with_past(told: _Told, error: ControlError) -> _Told:
    """Add what is left of a job that does not answer ``status``; if it has ended, that is the answer."""
    from . import status

    name = told.json["job_id"]
    past = status.one_of_many(name, error) if isinstance(error, FindError) else None
    if past is None:
        return told
    if past.is_ended:
        return _Told({"job_id": name, **past.json}, DONE, "ended", past.line)
    return told._replace(json={**told.json, **past.json}, text=past.line)


def _failure(error: ControlError) -> str:
    return "dead" if isinstance(error, JobDead) else _FAILURES.get(exit_code(error), "refused")


def _ranks_text(name: str, rows: list[dict[str, Any]]) -> str:
    return f"{name}:\n{output.rank_table(rows, terminal.has_colour())}"


def _killed_text(name: str, outcomes: list[dict[str, Any]]) -> str:
    return "\n".join(f"{name}: {line}" for line in output.process_outcomes(outcomes).split("\n"))


def _screen(method: str, name: str, answer: Any) -> str:
    """Show a query's answer: in one line, or below a line with the job's name."""
    if method == "status":
        return output.status_line(name, answer)
    if method == "list_settings":
        return f"{name}:\n{command_output.settings_table(answer)}"
    if method == "list_rules":
        return f"{name}:\n{command_output.rules_text('', answer)}"
    done = {"remove_rule": "removed", "add_rule": "added"}[method]
    rule, *note = command_output.rules_text("", [answer]).split("\n")
    return "; ".join([f"{name}: {done} rule {rule}", *map(str.strip, note)])


def _progress(report: _Report, calls: Calls[Any], seconds: float) -> str:
    """Say how many jobs have answered, and for which a command is waited for."""
    waiting = [target.name for target in calls.not_begun]
    asked, took = _listed(_without_answer(report, waiting, calls)), output.duration(seconds)
    return f"{len(report.reported)} of {len(calls.targets)} jobs done; waiting for {asked}, {took}"


def _without_answer(report: _Report, not_asked: list[str], calls: Calls[Any]) -> list[str]:
    return [target.name for target in calls.targets if target.name not in {*report.reported, *not_asked}]


def _interrupted(report: _Report, calls: Calls[Any]) -> int:
    not_asked = [target.name for target in calls.not_begun]
    asked = _without_answer(report, not_asked, calls)
    text = "interrupted; a command that was accepted is still carried out"
    for names, what in ((asked, "without an answer yet"), (not_asked, "not asked")):
        if names:
            text += f"; {what}: {_listed(names)}"
    return complain(text, INTERRUPTED)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return f"{', '.join(names[:_NAMES])}{more}"
