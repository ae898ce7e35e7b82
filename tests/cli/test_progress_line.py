"""The line that shows what a command waits for: on a terminal only, and gone at the end."""

from __future__ import annotations

import os
import pty
import sys
import threading

import pytest

from forgather_control import connect
from forgather_control.cli import progress_line

from ..support.harness import ROOT, SOON, cli, running_loop, until

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("state", "phase", "text"),
    [
        ("accepted", "training", "accepted, waiting for the end of step 8"),
        ("accepted", "evaluating", "accepted, the job is evaluating"),
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


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_on_a_terminal(jobs_dir):
    """It shows the phase, and is erased before the outcome is printed."""
    with Held() as held:
        pid, terminal = pty.fork()
        if pid == 0:
            os.chdir(ROOT)
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, "-m", "forgather_control", "save", "job", "--wait"])
        shown = b""
        while b"save: saving" not in shown:
            shown += os.read(terminal, 4096)
        held.go.set()
        while b"saved at step" not in shown:
            shown += os.read(terminal, 4096)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        os.close(terminal)
    last = shown.decode().rpartition("\x1b[K")[2]
    assert last.startswith("job: saved at step") and "save: saving" not in last


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
