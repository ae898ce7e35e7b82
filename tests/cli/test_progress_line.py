"""The line that shows what a command waits for: on a terminal only, and gone at the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading

import pytest

from forgather_control import JobDead, connect
from forgather_control.cli import main, progress_line

from ..support.harness import ROOT, SOON, cli, running_loop, until

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("state", "phase", "text"),
    [
        ("accepted", "training", "accepted, waiting for the end of step 8"),
        ("accepted", "evaluating", "accepted, the job is evaluating"),
        ("accepted", "paused", "accepted, the job is paused"),
        ("applied", "paused", "applied, waiting until it is finished"),
        ("applied", "saving", "saving"),
        ("applied", "training", "applied, waiting until it is finished"),
        (None, "training", "accepted, waiting for the end of step 8"),
    ],
)
def test_what_it_says(state, phase, text):
    """The state of the command, and what the job does meanwhile."""
    commands = [{"command_id": "other", "state": "finished"}]
    commands += [{"command_id": "id", "state": state}] if state else []
    status = {"status": phase, "global_step": 7, "commands": commands}
    assert progress_line.why_open(status, "id") == text
    assert progress_line.doing(status, "save_checkpoint", "id", 12) == f"save: {text}, 12 s"


class Held:
    """A loop whose save takes until the test says so."""

    def __init__(self):
        self.go = threading.Event()

    def __enter__(self):
        self.context = running_loop()
        self.run = self.context.__enter__()
        saved = self.run.job.saved
        self.run.job.saved = lambda path: (self.go.wait(SOON), saved(path))
        return self

    def __exit__(self, *exc):
        self.go.set()
        self.context.__exit__(*exc)


class Terminal:
    """A command line on a terminal of so many columns; ``shown`` is all that it wrote."""

    def __init__(self, *words, columns=80):
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
            os.chdir(ROOT)
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-m", "forgather_control", *words])
        self.shown = ""

    def until(self, text):
        """Read until it was written."""
        while text not in self.shown:
            self.shown += os.read(self._fd, 4096).decode()

    def end(self):
        """The exit code."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._fd)
        return code


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("columns", [80, 12])
def test_on_a_terminal(jobs_dir, columns):
    """It shows the phase in one line, and is erased before the outcome is printed."""
    with Held() as held:
        terminal = Terminal("save", "job", "--wait", columns=columns)
        terminal.until("save: savin")
        held.go.set()
        terminal.until("saved at step")
        assert terminal.end() == 0
    *before, last = terminal.shown.split("\x1b[K")
    assert last.startswith("job: saved at step") and "save: savin" not in last
    assert all(len(line.strip("\r")) < columns for line in before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_several_jobs_on_a_terminal(jobs_dir):
    """It counts the jobs and names those that are waited for, and no outcome is written into it."""
    with Held() as held, running_loop("quick"):
        terminal = Terminal("save", "job", "quick", "--wait")
        terminal.until("quick: saved at step")
        terminal.until("1 of 2 jobs done; waiting for job, ")
        held.go.set()
        terminal.until("2 finished")
        assert terminal.end() == 0
    assert len(re.findall(r"(?:^|\x1b\[K|\n)(?:job|quick): saved at step", terminal.shown)) == 2
    assert "waiting" not in terminal.shown.rpartition("\x1b[K")[2]


def test_a_job_that_dies_after_the_deadline(jobs_dir, monkeypatch, capsys):
    """The exit code is still that of the deadline."""

    def why_open(status, command_id):
        raise JobDead("gone")

    monkeypatch.setattr(progress_line, "why_open", why_open)
    with Held():
        assert main.main(["save", "job", "--timeout", "0.3"]) == 5
    assert capsys.readouterr().err.startswith("save is still running (applied); ")


def test_silent_in_a_pipe(jobs_dir):
    """Only the outcome."""
    with running_loop():
        done = cli("save", "job", "--wait")
        assert done.stderr == "" and done.stdout.startswith("job: saved at step")


def test_after_a_deadline_it_says_what_has_not_happened(jobs_dir):
    """And how to see what becomes of it."""
    with Held() as held:
        done = cli("save", "job", "--timeout", "0.3")
        held.go.set()
        assert done.returncode == 5 and done.stderr == (
            "save is still running (saving); forgather-control commands job shows what becomes of it\n"
        )
        with connect("job") as client:
            until(lambda: client.call("list_commands")[0]["state"] == "finished")
