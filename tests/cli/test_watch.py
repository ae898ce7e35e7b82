"""The verb ``watch``: once, in a pipe, and on a real terminal of several sizes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading

import pytest

from forgather_control import connect
from forgather_control.cli import watch
from forgather_control.client.following import Follower

from ..support.harness import ROOT, SOON, Process, cli, job_process, needs, running_loop, until


def follower(**status):
    """What is known of a job."""
    found = Follower(lambda: None, threading.Event())
    found.name, found.state = "run", "live"
    known = {"job_id": "run", "status": "training", "global_step": 7, "pid": 1, "host": "h", "started_at": 0.0}
    found.status = {**known, "metrics": {"loss": 0.5}, "seconds_since_step": 1.0, **status}
    return found


def test_the_screen_of_one_job():
    """Status, a curve for each metric, and the last events."""
    job = follower(max_steps=10, progress=0.7)
    job.history = {"loss": [[step, 0.0, 1.0 / step] for step in range(1, 50)]}
    job.events.append({"seq": 1, "time": 0.0, "kind": "phase", "phase": "saving"})
    shown = watch.job_lines(job, 80, 9)
    assert shown[0].startswith("run") and any("70.0 %" in line for line in shown)
    (curve,) = [line for line in shown if line.startswith("loss  ")]
    assert "0.020408 to 1" in curve and len(curve) <= 80 and len(shown) <= 9
    assert shown[-1].endswith("  phase       saving") and shown[-1][2] == ":"


def test_a_large_terminal_has_axes():
    """The curve takes the lines that are left, and the metrics that do not fit stay in sight."""
    job = follower(max_steps=10, progress=0.7)
    job.history = {"loss": [[step, 0.0, 1.0 / step] for step in range(1, 50)]}
    shown = watch.job_lines(job, 100, 24)
    assert "loss   steps 1 to 49" in shown and sum(" ┤" in line for line in shown) == 8
    assert len(watch.job_lines(job, 100, 8)) == len(watch.job_lines(job, 60, 24)) == len(shown) - 8


def test_a_narrow_terminal_shows_all():
    """The bar is shorter, and lines that are too long are continued in the next one; a table leaves columns out."""
    job = follower(max_steps=10, progress=0.7, metrics={f"metric_{number}": 0.5 for number in range(5)})
    job.status |= {"epoch": 1.5, "steps_per_second": 2.5, "eta_seconds": 4000}
    shown = watch.job_lines(job, 40, 24)
    assert shown[2:4] == ["epoch 1.5   2.5 steps/s   1h 06m left", "last step 1.0 s ago"]
    assert max(map(len, shown)) <= 40 and "step 7 of 10" in shown[1] and "metric_4 0.5" in "\n".join(shown)
    assert max(map(len, watch.table_lines([job], 30))) <= 30 and watch.table_lines([job], 30)[1].startswith("run")
    assert watch.table_lines([job], 60)[1].endswith("...")


def test_ranks_that_are_behind_or_silent_have_a_line():
    """Not those that did half a second's steps while the others answered; nor of a job that is lost."""
    job = follower(steps_per_second=10.0, world_size=4)
    job.ranks = [{"rank": rank, "state": "answering", "step": step} for rank, step in enumerate((100, 93, 94))]
    job.ranks.append({"rank": 3, "state": "silent", "step": None})
    shown = watch.job_lines(job, 80, 24)
    assert shown[-2:] == ["behind, by 7 at most: rank 1", "no answer in time: rank 3"]
    job.state = "dead"
    assert not {*shown[-2:]} & {*watch.job_lines(job, 80, 24)}


def test_a_table_has_no_room_for_the_time_left_of_an_evaluation():
    """But says how far it is; the screen of one job has both."""
    evaluation = {"seconds": 6.0, "batches": 34, "total_batches": 100, "eta_seconds": 12.4}
    job = follower(status="evaluating", evaluation=evaluation)
    assert watch.table_lines([job], 40)[1].startswith("run  evaluating 34 %  7")
    assert watch.job_lines(job, 80, 24)[0] == "run  evaluating 34 %, 12 s left"


@pytest.mark.parametrize("state", ["ended", "silent"])
def test_a_job_that_is_lost_degrades_in_words(state):
    """What is known stays."""
    job = follower(steps_per_second=2.0, eta_seconds=100)
    assert "1m 40s" in watch.table_lines([job], 80)[1]
    job.state, job.problem = state, "why"
    assert watch.job_lines(job, 80, 9)[0] == f"run  {state}" and "left" not in "".join(watch.job_lines(job, 80, 9))
    assert "1m 40s" not in watch.table_lines([job], 80)[1]
    assert watch.job_lines(job, 80, 9)[1] == f"{state}: why; this is the last that is known"
    assert watch.table_lines([job], 80)[1].split()[:3] == ["run", state, "7"]


def test_a_job_that_was_never_reached():
    """One line."""
    job = Follower(lambda: None, threading.Event())
    job.state, job.problem = "silent", "no answer"
    assert watch.job_lines(job, 80, 9) == ["?  silent: no answer"]


def test_odd_values_break_no_screen():
    """Texts and NaN among the points of a curve, and control characters in names."""
    job = follower(metrics={"a\x1b[2J": float("nan")})
    job.history = {"a\x1b[2J": [[1, 0, "NaN"], [2, 0, 1.0], [3, 0, 1.0]]}
    assert "\x1b" not in "\n".join(watch.job_lines(job, 40, 24))


def test_once(jobs_dir):
    """As status, for each job."""
    with running_loop("one"), running_loop("two"):
        shown = cli("watch", "one", "two", "--once").stdout
        assert shown.count("pid") == 2 and "one  training" in shown and "two  training" in shown
        lines = cli("watch", "one", "two", "--once", "--json").stdout.splitlines()
        assert [json.loads(line)["job_id"] for line in lines] == ["one", "two"]
        assert cli("watch", "nowhere", "--once").returncode == 3
        for words in (["o*", "two"], ["--all"], ["[ot]*"]):
            assert [line for line in cli("watch", *words, "--once").stdout.splitlines() if "training" in line] == [
                line for line in shown.splitlines() if "training" in line
            ]
        for words in (["o*", "nowhere"], ["x*"]):
            assert cli("watch", *words, "--once").returncode == 3
    assert cli("watch", "--all", "--once").returncode == 3


def test_in_a_pipe_each_event_is_a_line(jobs_dir):
    """Until the job has ended."""
    code = "import sys; from forgather_control.cli.main import main; sys.exit(main(['watch', 'job']))"
    with running_loop(), Process(code) as process:
        first = json.loads(process.line())
        with connect("job") as client:
            client.call("graceful_stop")
        kinds = [first["kind"]]
        while kinds[-1] != "ended":
            kinds.append(json.loads(process.line())["kind"])
        assert process.end() == 0 and "progress" in kinds and "command" in kinds


class Tmux:
    """A real terminal."""

    def __init__(self, columns, lines, words, env):
        self.name = f"watch-{os.getpid()}-{columns}"
        shell = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in env.items()), *map(shlex.quote, words)])
        command = f"cd {ROOT}; env {shell}; echo exit-$?; cat"
        size = ["-x", str(columns), "-y", str(lines)]
        subprocess.run(["tmux", "-u", "-L", self.name, "new-session", "-d", *size, command], check=True, timeout=SOON)

    def shown(self):
        """What is on the screen."""
        words = ["tmux", "-L", self.name, "capture-pane", "-p"]
        return subprocess.run(words, capture_output=True, text=True, timeout=SOON).stdout

    def press(self, key):
        """Type it."""
        subprocess.run(["tmux", "-L", self.name, "send-keys", key], check=True, timeout=SOON)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        print(self.shown())  # where a test fails
        subprocess.run(["tmux", "-L", self.name, "kill-server"], timeout=SOON)


@needs("tmux")
@pytest.mark.once
@pytest.mark.parametrize(
    ("columns", "env"),
    [
        (120, {"LC_ALL": "C.UTF-8"}),
        (80, {"NO_COLOR": "1"}),
        (40, {}),
        (80, {"TERM": "dumb"}),
        (80, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}),
    ],
    ids=["wide", "no colour", "narrow", "dumb", "C"],
)
def test_on_a_terminal(jobs_dir, columns, env):
    """It follows the job over a kill and a restart, and Ctrl-C leaves the screen clean."""
    words = [sys.executable, "-m", "forgather_control", "watch", "run"]
    env = {"FORGATHER_JOBS_DIR": str(jobs_dir), "PYTHONPATH": str(ROOT), **env}
    with job_process("run") as first, Tmux(columns, 24, words, env) as terminal:
        until(lambda: "run  training" in terminal.shown())
        until(lambda: "loss" in terminal.shown())
        assert max(map(len, terminal.shown().splitlines())) <= columns
        if "LC_ALL" in env:
            assert ("░" in terminal.shown()) == (env["LC_ALL"] == "C.UTF-8")
        first.kill()
        until(lambda: "dead: " in terminal.shown())
        with job_process("run"):
            until(lambda: f"pid {first.pid}" not in terminal.shown() and "run  training" in terminal.shown())
            terminal.press("C-c")
            until(lambda: "exit-0" in terminal.shown())
            assert "Traceback" not in terminal.shown()


@needs("tmux")
@pytest.mark.once
def test_several_jobs_are_a_table(jobs_dir):
    """One line for each."""
    words = [sys.executable, "-m", "forgather_control", "watch", "one", "two"]
    env = {"FORGATHER_JOBS_DIR": str(jobs_dir), "PYTHONPATH": str(ROOT)}
    with running_loop("one"), running_loop("two"), Tmux(100, 10, words, env) as terminal:
        until(lambda: all(f"{name} " in terminal.shown() for name in ("JOB", "one", "two")))
        until(lambda: "loss" in terminal.shown())
        terminal.press("C-c")
        until(lambda: "exit-0" in terminal.shown())
