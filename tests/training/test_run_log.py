"""The job's own log: its start, and who did what; printed once where logging is not configured."""

from __future__ import annotations

import logging
import os
import threading

import pytest

import forgather_control
from forgather_control import states
from forgather_control.training import run_log
from forgather_control.wire.records import CommandRecord

from ..support.harness import SOON, Process, running_loop, until

BY = {"via": "socket", "uid": 1000, "user": "ada", "pid": 4242, "program": "python"}


def record(**changes):
    known = CommandRecord("id", "save_checkpoint", states.COMMAND_APPLIED, 1.0, applied_at_step=5, requested_by=BY)
    return known._replace(**changes)


def lines(caplog):
    """Our lines at INFO, without those of ranks.select."""
    found = [each.getMessage() for each in caplog.records if each.levelname == "INFO"]
    return [line for line in found if "rank" not in line]


def test_a_run_in_its_log(jobs_dir, caplog):
    """One line for the start, two for a command: applied, and finished with its checkpoint; nothing at WARNING."""
    caplog.set_level(logging.INFO, "forgather_control")
    with running_loop() as run:
        path = forgather_control.save_checkpoint("job", wait="finished", reason="before lunch").result["path"]
        forgather_control.graceful_stop("job", wait="finished")
        run.thread.join(SOON)
    start, applied, finished, *stop = lines(caplog)
    assert start == "controlled as job: forgather-control status job"
    assert applied.startswith("save_checkpoint applied at step ") and finished.endswith(f": {path}")
    for line in (applied, finished):
        assert f"(pid {os.getpid()}, " in line and "(before lunch)" in line
    assert [line.split()[:2] for line in stop] == [["graceful_stop", "applied"], ["graceful_stop", "finished"]]
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "save_checkpoint applied at step 5, requested by ada (pid 4242, python)"),
        ({"reason": "why"}, "save_checkpoint applied at step 5, requested by ada (pid 4242, python) (why)"),
        (
            {"state": "failed", "error": {"code": 1, "message": "the disk is full"}},
            "save_checkpoint failed at step 5, requested by ada (pid 4242, python): the disk is full",
        ),
        (
            {"state": "cancelled", "applied_at_step": None},
            "save_checkpoint cancelled, requested by ada (pid 4242, python)",
        ),
        (
            {"state": "finished", "result": {"step": 5, "path": "/c-5"}},
            "save_checkpoint finished at step 5, requested by ada (pid 4242, python): /c-5",
        ),
        ({"requested_by": None}, "save_checkpoint applied at step 5"),
        ({"requested_by": None, "reason": "a\nCRITICAL b"}, r"save_checkpoint applied at step 5 (a\nCRITICAL b)"),
    ],
    ids=range(7),
)
def test_lines(caplog, changes, line):
    """Who asked, why, and what became of it, on one line whatever a client sends."""
    caplog.set_level(logging.INFO, "forgather_control")
    run_log.note(record(**changes))
    assert caplog.messages == [line]


NOBODY = dict.fromkeys(("uid", "user", "pid", "program"))


@pytest.mark.parametrize(
    ("by", "who"),
    [
        (BY, "ada (pid 4242, python)"),
        ({**BY, "user": None}, "uid 1000 (pid 4242, python)"),
        ({**BY, "pid": None, "program": None}, "ada"),
        ({**BY, "via": "rule"}, "ada (pid 4242, python, by a rule)"),
        ({**BY, "via": "file", "pid": None, "program": None}, "ada (by a file)"),
        ({**NOBODY, "via": "signal"}, "a signal"),
        ({**NOBODY, "via": "rule"}, "a rule"),
        ({**NOBODY, "via": "tcp"}, "an unknown client over tcp"),
        ({**BY, "user": "a\x1b[2J"}, r"a\x1b[2J (pid 4242, python)"),
    ],
)
def test_who(by, who):
    """As far as the kernel tells."""
    assert run_log.who(by) == who


def test_nothing_below_its_level(caplog):
    """A log at WARNING has none of it."""
    caplog.set_level(logging.WARNING, "forgather_control")
    run_log.start("job", False)
    run_log.note(record())
    assert caplog.messages == []


def test_a_handler_that_raises_or_blocks_costs_the_command_nothing(jobs_dir):
    """The command is finished, and other clients are answered while a handler of the script hangs."""
    entered, go = threading.Event(), threading.Event()

    class Bad(logging.Handler):
        def handle(self, found):
            if "applied" in found.getMessage():
                entered.set()
                go.wait(SOON)
            raise RuntimeError("a handler of the script")

    log = logging.getLogger("forgather_control")
    handler, level = Bad(), log.level
    log.setLevel(logging.INFO)
    with running_loop() as run:
        until(lambda: run.steps)
        log.addHandler(handler)
        try:
            sent = forgather_control.save_checkpoint("job")
            assert entered.wait(SOON)
            assert forgather_control.get_command("job", sent.command_id).state == "applied"
            go.set()
            until(lambda: forgather_control.get_command("job", sent.command_id).state == "finished")
        finally:
            go.set()
            log.removeHandler(handler)
            log.setLevel(level)
        assert run.thread.is_alive()


SCRIPT = """
import logging, sys
from forgather_control import TrainingJob
exec(sys.argv[1])
options = eval(sys.argv[2])
for _ in range(2):
    with TrainingJob(job_id="run1", **options) as job:
        job.step(1)
print("done")
"""
LINE = "controlled as run1: forgather-control status run1\n"


@pytest.mark.parametrize(
    ("before", "options", "errors"),
    [
        ("", "{}", [LINE]),
        ("", "{'quiet': True}", []),
        ("", "{'enabled': False}", []),
        ("logging.basicConfig()", "{}", []),
        ("logging.basicConfig(level='INFO', format='%(message)s')", "{'quiet': True}", [LINE, LINE]),
        ("logging.getLogger('forgather_control').addHandler(logging.NullHandler())", "{}", []),
        ("logging.getLogger('another').addHandler(logging.StreamHandler())", "{}", [LINE]),
        ("import os; os.close(2)", "{}", []),
        ("sys.stderr = None", "{}", []),
        ("sys.stderr.close()", "{}", []),
    ],
)
def test_where_logging_is_not_configured(jobs_dir, before, options, errors):
    """The start is printed once on stderr, unless it is to be quiet; training goes on whatever stderr is."""
    with Process(SCRIPT, before, options) as process:
        assert process.line() == "done" and process.end() == 0
    assert [line for line in process.errors if "rank" not in line] == errors


def test_an_option(jobs_dir):
    """Of all integrations, as the others are."""
    from forgather_control.training.options import ControlOptions

    assert ControlOptions().quiet is False
    assert forgather_control.TrainingJob(quiet=True)._options.quiet is True
