"""Threads that gevent, eventlet or others replaced: control is refused with one warning, and training runs."""

from __future__ import annotations

import _thread
import importlib.util
import threading
from contextlib import suppress

import pytest

from forgather_control.errors import Unsupported
from forgather_control.processes import threads

from ..support.harness import JOB, MS, Process, Wire, until


def needs_module(name):
    """Return the mark that skips a test where a library is not installed."""
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "only gevent's threads": "from gevent import monkey; monkey.patch_thread()",
    "only gevent's sockets": "from gevent import monkey; monkey.patch_socket()",
    "only gevent's select": "from gevent import monkey; monkey.patch_select()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}
LOOP = JOB.replace("100_001", "21")


@needs_module("gevent")
@needs_module("eventlet")
@pytest.mark.parametrize("patch", PATCHES)
def test_training_runs_without_control(patch, jobs_dir):
    """One warning that names the library; no job, no thread that waits, and every step is taken."""
    library = "eventlet" if patch == "eventlet" else "gevent"
    import_ours = "from forgather_control import TrainingJob; TrainingJob()\n"
    for source in (f"{PATCHES[patch]}\n{LOOP}", f"{import_ours}{PATCHES[patch]}\n{LOOP}"):
        with Process(source, "job") as process:
            assert process.line() == "ready" and process.line() == "ended 20 False"
            assert process.end() == 0 and not jobs_dir.exists()
        said = [line for line in process.errors if "Control is off" in line or "Traceback" in line]
        assert len(said) == 1 and f"{library} has replaced" in said[0] and "Training continues" in said[0]


#: Threads and sockets are replaced when the run has begun, and the job is asked after that.
LATE = """
import sys, time
from forgather_control import TrainingJob

with TrainingJob(job_id="job") as job:
    exec(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    for step in range(1, 50):
        job.log(loss=1 / step)
        job.step(step)
        time.sleep(0.001)
print("ended", flush=True)
"""


@needs_module("gevent")
@needs_module("eventlet")
@pytest.mark.parametrize("patch", ["gevent", "only gevent's sockets", "eventlet"])
def test_threads_that_are_replaced_during_training(patch, jobs_dir):
    """Control ends with one warning when it is used next; the client is not left waiting, nor is training."""
    with Process(LATE, PATCHES[patch]) as process:
        assert process.line() == "ready"
        with Wire(jobs_dir / "job" / "control.sock") as wire:
            process.say("")
            with suppress(ConnectionResetError):
                assert wire.file.readline() == b""
        until(lambda: not (jobs_dir / "job").exists())
        assert process.line() == "ended" and process.end() == 0
    assert sum("Control is off" in line for line in process.errors) == 1
    assert "replaced Python's threads or sockets. Training continues." in "".join(process.errors)


def _run_at_once(call, args):
    call(*args)


def _no_thread_left(call, args):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("start", [_run_at_once, lambda call, args: None, _no_thread_left])
def test_threads_that_do_not_run_beside_this_one(start, monkeypatch):
    """Whatever replaced them: run by their starter, never run, or not to be had."""
    threads.check()
    monkeypatch.setattr(threads, "_PROBE_TIMEOUT", 10 * MS)
    monkeypatch.setattr(_thread, "start_new_thread", start)
    with pytest.raises(Unsupported, match="thread"):
        threads.check()


def test_threads_that_a_debugger_wraps(monkeypatch):
    """They run beside this one, so control works."""
    real = _thread.start_new_thread
    monkeypatch.setattr(_thread, "start_new_thread", lambda *args: real(*args))
    threads.check()
    before = threading.active_count()
    threads.check()
    assert threading.active_count() == before
