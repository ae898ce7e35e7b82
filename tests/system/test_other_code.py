"""What other code in the process may do: close descriptors that are not its own, and fork after the run has started."""

from __future__ import annotations

import json

import pytest

from forgather_control import get_job_status
from forgather_control.errors import JobDead

from ..support.harness import Process, Wire

#: Closes all descriptors, opens others in their place, trains until control is off, and looks at what it opened.
CLOSING = """
import logging, os, selectors, signal, socket, sys, threading, time
if sys.argv[1] == "poll":
    selectors.DefaultSelector = selectors.PollSelector
from forgather_control import TrainingJob
from forgather_control.server import limits

limits.TICK_PERIOD = 0.1
logging.basicConfig(format="%(levelname)s %(message)s")
with TrainingJob(job_id="job", signals={"SIGTERM": "graceful_stop"}) as job:
    job.step(1)
    print("ready", flush=True)
    sys.stdin.readline()
    os.closerange(3, 4096)
    if sys.argv[2] == "files":
        opened = [open(f"{sys.argv[3]}/{number}", "w+b", buffering=0) for number in range(60)]
        for file in opened:
            file.write(b"data")
            file.seek(0)
    else:
        opened = [sock for _ in range(30) for sock in socket.socketpair()]
    step, end = 1, time.monotonic() + 15
    while any(thread.name.startswith("forgather") for thread in threading.enumerate()) and time.monotonic() < end:
        step += 1
        job.log(loss=1 / step)
        job.step(step)
        time.sleep(0.01)
    job.step(step + 1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    print(*(thread.name for thread in threading.enumerate()), flush=True)
for file in opened:
    if sys.argv[2] == "files":
        assert file.read() == b"data"
    else:
        file.setblocking(False)
        try:
            print("received", file.recv(10), flush=True)
        except BlockingIOError:
            pass
for file in opened:
    file.close()
print("intact", flush=True)
"""


@pytest.mark.parametrize("selector", ["epoll", "poll"])
@pytest.mark.parametrize("opened", ["files", "sockets"])
def test_closed_descriptors_end_control_alone(selector, opened, jobs_dir, tmp_path):
    """One warning; the files with the same numbers are not read, written or closed; nothing is left of the job.

    A number that is used again between our look at it and our use of it cannot be told from ours (docs/limits.md). That
    happens by chance, and may end the program where it opens or closes its files, so one of several runs must leave all
    files as they are.
    """
    for attempt in range(12):
        (folder := tmp_path / str(attempt)).mkdir()
        said, errors, code = close_under(jobs_dir, selector, opened, folder)
        assert "Control is off: other code" in "".join(errors) or code, errors
        assert not (jobs_dir / "job").exists() or code, errors
        if said == ["MainThread", "intact"] and len(errors) == 1:
            return
    raise AssertionError(errors)


def close_under(jobs_dir, selector, opened, folder):
    """Close all descriptors of a job; what it says then, its log, and its exit code."""
    with Process(CLOSING, selector, opened, str(folder)) as job:
        assert job.line() == "ready"
        with Wire(jobs_dir / "job" / "control.sock") as events, Wire(jobs_dir / "job" / "control.sock") as idle:
            events.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "subscribe"}).encode() + b"\n")
            events.file.readline()
            for _ in range(2):  # which socket it is, the job notes after the first reply
                idle.still_answers()
            job.say("")
            said = [job.line(), job.line()]
            code = job.end()
    return said, job.errors, code


#: Forks a child that does not train, then becomes a daemon that does.
FORKING = """
import logging, os, sys
from forgather_control import TrainingJob

logging.basicConfig(format="%(levelname)s %(message)s")
with TrainingJob(job_id="job") as job:
    job.step(1)
    if not (child := os.fork()):
        os._exit(0)
    os.waitpid(child, 0)
    print(os.getpid(), flush=True)
    if os.fork():
        os._exit(0)
    for step in range(2, 100):
        job.log(loss=1 / step)
        job.step(step)
        if job.should_save or job.should_stop:
            break
print(step, os.getpid(), job.job_id, flush=True)
"""


def test_a_daemon_that_was_forked_from_the_job_trains_without_control():
    """One warning that says where control is; a child that does not train says nothing; the parent's job is dead."""
    # Python 3.12 and later warn of forks where threads run.
    with Process(FORKING, env={"PYTHONWARNINGS": "ignore::DeprecationWarning"}) as parent:
        pid = int(parent.line())
        step, child, job_id = parent.line().split()
        assert parent.end() == 0
    assert (step, job_id) == ("99", "job") and int(child) != pid
    assert len(parent.errors) == 1 and f"(pid {child}): it was forked from pid {pid}" in parent.errors[0]
    with pytest.raises(JobDead, match=str(pid)):
        get_job_status("job")
