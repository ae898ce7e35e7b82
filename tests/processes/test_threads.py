"""Threads that gevent, eventlet or others replaced: control is refused with one warning, and training runs."""

from __future__ import annotations

import _thread
import importlib.util
import threading

import pytest

from forgather_control.errors import Unsupported
from forgather_control.processes import threads

from ..support.harness import JOB, MS, Process


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
