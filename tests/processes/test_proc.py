"""Facts about threads from /proc, and signals to one thread."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

import pytest

from forgather_control.processes import proc

from ..support.harness import SOON, Process, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has this /proc")


@pytest.fixture
def fresh():
    """Nothing is known yet of /proc, and nothing of this test afterwards."""
    proc._shows_own_pids.cache_clear()
    yield
    proc._shows_own_pids.cache_clear()


@pytest.mark.parametrize(
    ("pids", "link", "own"),
    [("{me}", None, True), ("77\t{me}", None, False), ("77", None, False), (ValueError, "{me}", True)]
    + [(ValueError, "77", False), (OSError, None, False), (PermissionError, None, False)],
)
def test_psutil_is_used_only_where_pids_mean_the_same(fresh, monkeypatch, pids, link, own):
    """NSpid or, on an old kernel, the link /proc/self tells whose pids /proc shows."""

    def field(path, name):
        if isinstance(pids, str):
            return pids.format(me=os.getpid())
        raise pids

    monkeypatch.setattr(proc, "field", field)
    monkeypatch.setattr(os, "readlink", lambda path: str(link).format(me=os.getpid()))
    assert (proc.psutil() is not None) == own


def test_psutil_need_not_be_installed(monkeypatch):
    """Without it there is none, and no error."""
    assert proc.psutil() is not None
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert proc.psutil() is None


def test_where_psutil_asks_the_kernel_no_proc_is_needed(fresh, monkeypatch):
    """Not on Linux: there is no /proc to look at."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(proc, "field", lambda *_: pytest.fail("it looked"))
    assert proc.psutil() is not None


def test_fields_of_this_process():
    """A field is returned without its name; one that is not there is an error."""
    assert proc.field("/proc/self/status", "Pid") == str(os.getpid())
    with pytest.raises(ValueError, match="no Nonsense"):
        proc.field("/proc/self/status", "Nonsense")
    with pytest.raises(FileNotFoundError):
        proc.field("/proc/self/task/1/status", "Pid")


def test_a_state_is_words():
    """A stopped process is called stopped; an unknown letter is shown as it is."""
    with Process("import sys\nsys.stdin.read()") as other:
        until(lambda: "sleeps" in proc.state(other.pid))
        os.kill(other.pid, signal.SIGSTOP)
        until(lambda: "stopped" in proc.state(other.pid))
        os.kill(other.pid, signal.SIGKILL)
        until(lambda: proc.state(other.pid) == "its state is 'Z'")


def test_a_signal_in_use_is_not_free():
    """A signal is in use if Python or C code catches it, or if it is ignored or blocked: a thread may wait for it."""
    source = """
    import ctypes, signal
    from forgather_control.processes import proc
    signal.signal(42, lambda *_: None)
    signal.signal(43, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [44])
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: None)
    ctypes.CDLL(None).signal(45, handler)
    print(proc.free_signal(), flush=True)
    for signum in range(42, signal.SIGRTMAX + 1):
        signal.signal(signum, signal.SIG_IGN)
    print(proc.free_signal(), flush=True)
    """
    with Process(source) as other:
        assert (other.line(), other.line()) == ("46", "None"), other.errors


def test_the_first_signal_is_a_real_time_one():
    """It is none of those with a meaning of their own, nor one of glibc's."""
    assert signal.SIGRTMIN <= proc.FIRST_SIGNAL <= signal.SIGRTMAX
    assert ctypes.CDLL(None).__libc_current_sigrtmin() <= proc.FIRST_SIGNAL


def test_a_signal_reaches_the_thread_that_is_named():
    """Sent to a thread that blocks it, it stays pending there; a thread of another process is refused."""
    ready, done = threading.Event(), threading.Event()

    def block():
        signal.pthread_sigmask(signal.SIG_BLOCK, [proc.FIRST_SIGNAL])
        ready.set()
        done.wait(SOON)
        signal.sigtimedwait([proc.FIRST_SIGNAL], 0)

    thread = threading.Thread(target=block)
    thread.start()
    assert ready.wait(SOON)
    proc.send_to_thread(os.getpid(), thread.native_id, proc.FIRST_SIGNAL)
    assert proc.is_in(f"/proc/self/task/{thread.native_id}/status", "SigPnd", proc.FIRST_SIGNAL)
    assert not proc.is_in("/proc/self/status", "ShdPnd", proc.FIRST_SIGNAL)
    with pytest.raises(ProcessLookupError):
        proc.send_to_thread(1, thread.native_id, 0)
    done.set()
    thread.join(SOON)
