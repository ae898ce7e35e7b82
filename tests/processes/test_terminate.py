"""Ending processes: real children that end, ignore SIGTERM, are stopped, or only have the pid."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import threading

import psutil
import pytest

from forgather_control.processes.liveness import Identity, current_process, judge
from forgather_control.processes.terminate import Grip, terminate

from ..support.harness import MS, ROOT, SOON, Process, descriptors, needs_root, until
from .conftest import WHO

#: As WHO, but SIGTERM does not end it.
DEAF = f"import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n{WHO}"
LAST_PID = "/proc/sys/kernel/ns_last_pid"

both_ways = pytest.mark.parametrize("pidfd", [True, False], ids=["pidfd", "without"])


@pytest.fixture
def choose(monkeypatch):
    """Lets a test run on a system without pidfd_open(2)."""

    def choose(pidfd):
        if not pidfd:
            monkeypatch.setattr(os, "pidfd_open", lambda pid: (_ for _ in ()).throw(OSError(38, "not here")))

    return choose


def who(other):
    """The identity that a child of WHO prints."""
    return Identity(**json.loads(other.line()))


@pytest.mark.once
@both_ways
def test_end_asks_first_and_then_kills(choose, pidfd):
    """SIGTERM to all at once, SIGKILL after the grace to the deaf and the stopped; each is told as it went."""
    choose(pidfd)
    gc.collect()  # what earlier tests left is not ours to count
    before = descriptors()
    with Process(WHO) as good, Process(DEAF) as deaf, Process(WHO) as stopped, Process(WHO) as dead:
        all_of_them = [who(one) for one in (good, deaf, stopped, dead)]
        os.kill(stopped.pid, signal.SIGSTOP)
        until(lambda: psutil.Process(stopped.pid).status() == psutil.STATUS_STOPPED)  # else SIGTERM may come first
        dead.kill()
        far = all_of_them[0]._replace(host="another.example.org")
        got = terminate([*all_of_them, far], 1500 * MS)
        assert got == list(zip([*all_of_them, far], ["ended", "killed", "killed", "gone", "elsewhere"]))
        assert [one.popen.wait(SOON) for one in (good, deaf, stopped)] == [-15, -9, -9]
    assert descriptors() == before


@both_ways
def test_end_waits_no_longer_than_it_takes(choose, pidfd):
    """A grace of an hour is over when the last one has ended; a zombie has ended."""
    choose(pidfd)
    with Process(WHO) as other:
        identity = who(other)
        assert terminate([identity], 3600.0) == [(identity, "ended")]
        assert other.popen.wait(SOON) == -15


@both_ways
def test_end_hits_no_process_that_only_has_the_pid(choose, pidfd, child):
    """An identity of another start, boot or namespace: nothing is sent."""
    choose(pidfd)
    other, identity = child
    for changes in ({"started_at": identity.started_at - 60}, {"boot_id": "another"}):
        assert terminate([identity._replace(**changes)], 0.0)[0][1] == "gone"
    assert terminate([identity._replace(pid_namespace=1)], 0.0)[0][1] == "elsewhere"
    other.popen.stdin.close()
    assert other.end() == 0


def test_end_lets_them_end_by_themselves_first(child):
    """Who goes within the patience is told as gone, and was sent nothing."""
    other, identity = child
    ended = threading.Timer(50 * MS, other.popen.stdin.close)
    ended.start()
    assert terminate([identity], 0.0, patience=3600.0) == [(identity, "gone")]
    assert other.end() == 0
    ended.join(SOON)


def test_end_spares_others_users_and_itself(child):
    """Root is not talked into ending another user's process, and nobody into ending himself."""
    _, identity = child
    assert terminate([identity], 0.0, owner=os.getuid() + 1) == [(identity, "refused")]
    assert terminate([current_process()], 0.0) == [(current_process(), "refused")]
    assert judge(identity) == "running"
    assert terminate([identity, identity], SOON, owner=os.getuid()) == [(identity, "ended")] * 2


@needs_root
def test_end_of_what_may_not_be_signalled():
    """Where the kernel says no, it is told as refused."""
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
def test_a_signal_never_reaches_the_next_owner_of_a_pid():
    """The pid is really used again, within the two seconds in which a start time proves nothing."""
    with Process(WHO) as first:
        identity = who(first)
        with Grip(identity) as grip:
            first.popen.stdin.close()
            first.end()
            with _of_pid(identity.pid) as second:
                with pytest.raises(ProcessLookupError):
                    grip.send(signal.SIGKILL)
                assert grip.has_ended() and second.poll() is None
                assert terminate([identity._replace(started_at=1.0)], 0.0)[0][1] == "gone" and second.poll() is None
                second.kill()
                second.wait(SOON)


def _of_pid(pid):
    """A process of this very pid."""
    for _ in range(1000):
        with open(LAST_PID, "w", encoding="ascii") as file:
            file.write(str(pid - 1))
        child = subprocess.Popen(["sleep", "1000"])
        if child.pid == pid:
            return child
        child.kill()
        child.wait(SOON)
    raise AssertionError(f"pid {pid} did not come again")


def test_a_grip_sees_the_end_and_lets_go(child):
    """Held, a process ends as any other; what holds it is one descriptor, until it is closed."""
    other, identity = child
    before = descriptors()
    with Grip(identity) as grip:
        assert not grip.has_ended()
        other.kill()
        assert grip.has_ended()
        with pytest.raises(ProcessLookupError):
            grip.send(0)
    assert descriptors() == before
    with pytest.raises(ProcessLookupError):
        Grip(identity)
