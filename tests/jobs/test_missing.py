"""Systems that have less than Linux: a whole job works without each thing, and what is missing then is said once."""

from __future__ import annotations

import json

import pytest

from forgather_control.jobs import missing

from ..support.harness import JOB, Process

NO_PROC = """
real = open
def not_proc(path, *args, **options):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", path)
    return real(path, *args, **options)
builtins.open = not_proc
"""
#: What is taken away before anything of ours is imported, and what the warning names then.
LACKS = {
    "epoll": ("selectors.DefaultSelector = selectors.PollSelector", []),
    "pidfd": ("del os.pidfd_open, signal.pidfd_send_signal", []),
    "memfd": ("del os.memfd_create, os.MFD_CLOEXEC", ["stacks"]),
    "memfd in a sandbox": (
        "def refuse(*args): raise OSError(38, 'not implemented')\nos.memfd_create = refuse",
        ["stacks"],
    ),
    "real-time signals": ("del signal.SIGRTMIN, signal.SIGRTMAX", ["stacks"]),
    "SO_PEERCRED": ("del socket.SO_PEERCRED", ["senders"]),
    "other constants": ("del socket.MSG_NOSIGNAL, socket.SOCK_CLOEXEC, os.O_PATH, os.sched_getaffinity", []),
    "108 bytes": ("name = os.uname_result(('Darwin', *os.uname()[1:]))\nos.uname = lambda: name", []),
    "/proc": (NO_PROC, ["start and memory", "stacks"]),
}
LACKS["all of it"] = (
    "\n".join(lack for name, (lack, _) in LACKS.items() if "sandbox" not in name),
    ["start and memory", "stacks", "senders"],
)
WITHOUT = "import builtins, os, selectors, signal, socket, sys\nexec(sys.argv.pop())\n"

#: A client that uses each way to a job.
CLIENT = """
import json
from forgather_control import get_job_status, graceful_stop, list_jobs, save_checkpoint

print(json.dumps([
    [(job.job_id, job.state) for job in list_jobs()],
    get_job_status("job")["status"],
    save_checkpoint("job", wait="finished", timeout=20).state,
    graceful_stop("job", wait="finished", timeout=20).state,
]))
"""


@pytest.mark.parametrize("what", LACKS)
def test_a_whole_job(what, jobs_dir, monkeypatch):
    """Start, list, status, save and stop, by a client that lacks the same; at most one warning, and no error."""
    lack, named = LACKS[what]
    jobs = jobs_dir.parent / "x".ljust(105 - len(f"{jobs_dir.parent}//job/control.sock"), "x")  # a socket's path of 105
    monkeypatch.setenv("FORGATHER_JOBS_DIR", str(jobs))
    with Process(WITHOUT + JOB, "job", "0.01", lack) as job:
        assert job.line() == "ready", job.errors
        socket = json.loads((jobs / "job" / "endpoint.json").read_text())["socket"]
        assert len(socket) < 104 if what in ("108 bytes", "all of it") else len(socket) == 105
        with Process(WITHOUT + CLIENT, lack) as client:
            assert json.loads(client.line()) == [[["job", "live"]], "training", "finished", "finished"], client.errors
            assert client.end() == 0
        assert job.line().startswith("ended") and job.end() == 0
    problems = [line for line in [*job.errors, *client.errors] if not line.startswith("INFO")]
    assert len(problems) == bool(named) and all(word in problems[0] for word in named), problems


def test_it_is_said_once(monkeypatch, caplog):
    """Not in each run of a process."""
    monkeypatch.setattr(missing, "_warned", False)
    for _ in range(2):
        missing.warn_once(True)
    assert not caplog.messages
    for _ in range(2):
        missing.warn_once(False)
    assert len(caplog.messages) == 1 and "start and memory" in caplog.text
