"""The tables of jobs: aligned, safe, sorted, and readable on any terminal."""

from __future__ import annotations

import time

import pytest

from forgather_control.cli import job_table, options, output
from forgather_control.jobs.ended import EndedJob
from forgather_control.jobs.registry import Job

from .test_output import STATUS, harmless, tricks

NOW = 10_000_000.0
JOB = Job(job_id="job", host="node", port=None, pid=4242, started_at=NOW - 7200, state="live", status=STATUS)
SILENT = Job(
    "longer-name", "n", 8900, 1, NOW - 90, "silent",
    last_status={"global_step": 7, "max_steps": None}, last_status_at=NOW - 61, silent_because="stopped by a signal",
)  # fmt: skip
DEAD = Job("gone", "n", None, 2, NOW - 90_000, "dead")
NOTE = "stopped by a signal; last known 1m 01s ago"
ENDED = EndedJob("job", 1.0, "stopped", 86_400.0, 340, "/c/checkpoint-340", 340)
WORDS = ["STATE", "JOB", "STEP", "PROGRESS", "SPEED", "LEFT", "AGE", "HOST", "PID", "PORT", "NOTE"]


@pytest.fixture(autouse=True)
def now(monkeypatch):
    """The time, in one time zone."""
    monkeypatch.setattr(job_table.time, "time", lambda: NOW)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_table():
    """Columns are aligned, states are words, what is unknown is a dash, and the last known step has its age."""
    assert job_table.job_table([JOB, SILENT, DEAD], colour=False).splitlines() == [
        "STATE   JOB          STEP      PROGRESS  SPEED      LEFT    AGE     HOST  PID   PORT  NOTE",
        "live    job          500/1000  50 %      2 steps/s  4m 10s  2h 00m  node  4242  -",
        f"silent  longer-name  7         -         -          -       1m 30s  n     1     8900  {NOTE}",
        "dead    gone         -         -         -          -       1d 01h  n     2     -",
    ]


def test_table_of_nothing():
    """Without jobs there is the head alone, or where there are none."""
    assert job_table.job_table([], colour=True).split() == WORDS
    assert job_table.job_table([], colour=True, place="in /\x1b") == r"no jobs in /\x1b"
    assert job_table.ended_table([], "in /x") == "no ended jobs in /x"


@pytest.mark.parametrize("state", ["live", "silent", "dead", "foreign", "running"])
def test_colour_changes_no_width(state):
    """Colour is put around the state's cell, and taking it away gives the plain table."""
    jobs = [JOB, Job("b", "h", None, 1, 0.0, state)]
    coloured = job_table.job_table(jobs, colour=True)
    assert coloured.count("\x1b[") == (2 if state == "running" else 4)
    for code in (*output._COLOURS.values(), "0"):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == job_table.job_table(jobs, colour=False)


@tricks
def test_table_is_safe(text, wanted):
    """No field of a record, and nothing that a job claims, gets to the terminal raw."""
    status = {"global_step": text, "max_steps": text, "progress": text, "steps_per_second": text, "status": text}
    job = Job(text, text, None, 1, 0.0, "live", status=status)
    table = harmless(job_table.job_table([job, JOB], colour=False), 3)
    assert table.count(wanted) == 3
    ended = EndedJob(text, 1.0, text, 2.0, checkpoint=text, reason=text)
    assert harmless(job_table.ended_table([ended], "x"), 2).count(wanted) == 4


@pytest.mark.parametrize("value", [None, "x", True, [], {}, float("nan"), float("inf"), -1, 10**30])
def test_figures_of_any_kind(value):
    """Whatever a job or its file says, the table is shown and can be sorted."""
    names = ("global_step", "max_steps", "progress", "steps_per_second", "eta_seconds", "status")
    odd = JOB._replace(status=dict.fromkeys(names, value))
    for column in (None, *options.SORTABLE):
        assert job_table.job_table(job_table.ordered([odd, JOB, SILENT], column), colour=False).count("\n") == 3


@pytest.mark.parametrize(
    ("step", "end", "cell"), [(5, None, "5"), (0, 0, "0/0"), (None, 10, "-"), ("NaN", 1e9, "-"), (5, "NaN", "5")]
)
def test_step_cell(step, end, cell):
    """A job without an end shows its step alone; one that claims nothing shows nothing."""
    job = Job("j", "h", None, 1, 0.0, "live", status={"global_step": step, "max_steps": end})
    assert job_table.job_table([job], colour=False).split()[len(WORDS) + 2] == cell


def test_what_a_live_job_does():
    """Only if it does not train."""
    paused = JOB._replace(status={**STATUS, "status": "paused"})
    assert job_table.job_table([paused], colour=False).splitlines()[1].endswith("  -     paused")


@pytest.mark.parametrize(
    ("column", "order"),
    [
        (None, ["job", "longer-name", "gone"]),
        ("step", ["longer-name", "job", "gone"]),
        ("age", ["longer-name", "job", "gone"]),
        ("job", ["gone", "job", "longer-name"]),
        ("pid", ["longer-name", "gone", "job"]),
        ("port", ["longer-name", "job", "gone"]),
        ("speed", ["job", "longer-name", "gone"]),
    ],
)
def test_order(column, order):
    """Upwards by a column, what is unknown at the end; otherwise as they were found."""
    assert [job.job_id for job in job_table.ordered([JOB, SILENT, DEAD], column)] == order


def test_every_column_can_be_sorted_by():
    """All but the note."""
    assert {name.lower() for name in job_table._COLUMNS} - {"note"} == set(options.SORTABLE)


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40, 20, 1])
def test_any_width(width):
    """Lines fit where that is possible: states and ids stay, the least important columns go first."""
    jobs = [JOB, SILENT, DEAD] * 10
    lines = job_table.job_table(jobs, colour=False, width=width).splitlines()
    head = lines[0].split()
    assert len(lines) == 31 and max(map(len, lines)) <= max(width, len("silent  longer-name"))
    assert head[:2] == ["STATE", "JOB"] and [word for word in WORDS if word in head] == head
    assert (head == WORDS) == (width > 110)
    assert ("STEP" in head) == (width >= 40) and ("PROGRESS" in head) == (width >= 40)
    assert {line.split()[1] for line in lines[1:]} == {"job", "longer-name", "gone"}


def test_a_note_is_cut_where_it_has_no_room():
    """With dots; the other columns stay."""
    (line,) = job_table.job_table([SILENT], colour=False, width=80).splitlines()[1:]
    assert len(line) <= 80 and line.endswith("...") and "stopped by" in line


def test_ended_jobs():
    """How, when, at which step, with which checkpoint, and why."""
    failed = EndedJob("other", 1.0, "failed", 0.0, reason="training ended by KeyError")
    assert job_table.ended_table([ENDED, failed], "in /x").splitlines() == [
        "HOW      JOB    ENDED                STEP  CHECKPOINT         REASON",
        "stopped  job    1970-01-02 00:00:00  340   /c/checkpoint-340",
        "failed   other  1970-01-01 00:00:00  -     -                  training ended by KeyError",
    ]
    for width in (40, 80):
        assert max(map(len, job_table.ended_table([ENDED, failed], "in /x", width).splitlines())) <= width
