"""Ending processes: real children that end, ignore SIGTERM, are stopped, or only have the pid."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess

import psutil
import pytest

from forgather_control.processes import terminate as terminate_module
from forgather_control.processes.liveness import Identity, current_process, judge
from forgather_control.processes.terminate import terminate

from ..support.harness import MS, ROOT, SOON, Process, descriptors, needs_root, until
from .conftest import WHO

#: As WHO, but it ignores SIGTERM.
DEAF = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{WHO}"
LAST_PID = "/proc/sys/kernel/ns_last_pid"


def identity_of(other):
    """Return the identity that a child of WHO prints."""
    return Identity(**json.loads(other.line()))


@pytest.mark.once
def test_sigterm_first_then_sigkill():
    """All get SIGTERM at once; after the grace, those that ignore it or are stopped get SIGKILL."""
    gc.collect()  # descriptors that earlier tests left are not counted
    before = descriptors()
    with Process(WHO) as good, Process(DEAF) as deaf, Process(WHO) as stopped, Process(WHO) as dead:
        all_of_them = [identity_of(one) for one in (good, deaf, stopped, dead)]
        os.kill(stopped.pid, signal.SIGSTOP)
        until(lambda: psutil.Process(stopped.pid).status() == psutil.STATUS_STOPPED)  # else SIGTERM may come first
        dead.kill()
        far = all_of_them[0]._replace(host="another.example.org")
        got = terminate([*all_of_them, far], 1500 * MS)
        assert got == list(zip([*all_of_them, far], ["ended", "killed", "killed", "gone", "elsewhere"]))
        assert [one.popen.wait(SOON) for one in (good, deaf, stopped)] == [-15, -9, -9]
    assert descriptors() == before


def test_it_returns_when_the_last_process_has_ended():
    """A grace of an hour is not waited for; a zombie counts as ended, and is left for its parent to reap."""
    with Process(WHO) as other:
        identity = identity_of(other)
        assert terminate([identity], 3600.0) == [(identity, "ended")]
        assert other.popen.wait(SOON) == -15


def test_a_process_that_only_has_the_pid_is_spared(child):
    """For an identity of another start, boot or namespace nothing is sent."""
    other, identity = child
    for changes in ({"started_at": identity.started_at - 60}, {"boot_id": "another"}):
        assert terminate([identity._replace(**changes)], 0.0)[0][1] == "gone"
    assert terminate([identity._replace(pid_namespace=1)], 0.0)[0][1] == "elsewhere"
    other.popen.stdin.close()
    assert other.end() == 0


def test_other_users_processes_and_this_one_are_spared(child):
    """With an owner, root ends no other user's process; and no process ends itself."""
    _, identity = child
    assert terminate([identity], 0.0, owner=os.getuid() + 1) == [(identity, "refused")]
    assert terminate([current_process()], 0.0) == [(current_process(), "refused")]
    assert judge(identity) == "running"
    assert terminate([identity, identity], SOON, owner=os.getuid()) == [(identity, "ended")] * 2


@needs_root
def test_a_process_that_may_not_be_signalled():
    """Where the kernel refuses the signal, the outcome is "refused"."""
    source = f"""
    import os, select, signal
    from forgather_control.processes.liveness import Identity, judge
    from forgather_control.processes.terminate import terminate
    judge(Identity({socket.gethostname()!r}, 1))  # loads what the other user may not read
    os.setgid(65534); os.setuid(65534)
    print(terminate([Identity({socket.gethostname()!r}, 1)], 0.0)[0][1])
    """
    with Process(source, cwd=ROOT) as other:
        assert other.line() == "refused", other.errors


@needs_root
@pytest.mark.skipif(not os.path.exists(LAST_PID), reason="this kernel does not let us choose a pid")
def test_a_signal_is_not_sent_to_the_next_owner_of_a_pid():
    """The pid really is reused, after the identity was checked and before the signal."""
    outcomes = {}
    with Process(WHO) as first:
        identity = identity_of(first)
        process = terminate_module._acquire(identity, None, outcomes)
        first.popen.stdin.close()
        first.end()
        with _of_pid(identity.pid) as second:
            assert terminate_module._has_ended(process)
            left = terminate_module._send({identity: process}, signal.SIGKILL, "ended", outcomes)
            assert (left, outcomes) == ({}, {identity: "ended"}) and second.poll() is None
            assert terminate([identity._replace(started_at=1.0)], 0.0)[0][1] == "gone" and second.poll() is None
            second.kill()
            second.wait(SOON)


def _of_pid(pid):
    """Start a process of this pid."""
    for _ in range(1000):
        with open(LAST_PID, "w", encoding="ascii") as file:
            file.write(str(pid - 1))
        child = subprocess.Popen(["sleep", "1000"])
        if child.pid == pid:
            return child
        child.kill()
        child.wait(SOON)
    raise AssertionError(f"pid {pid} was not assigned again")


def test_what_cannot_be_identified_is_spared(child, monkeypatch):
    """Without psutil, or where /proc hides the process, no start can be compared, and no signal is sent."""
    _, identity = child
    with monkeypatch.context() as patch:
        patch.setattr("forgather_control.processes.proc.psutil", lambda: None)
        assert terminate([identity], 0.0) == [(identity, "refused")]
    assert judge(identity) == "running" and terminate([identity], SOON) == [(identity, "ended")]
