"""Which process, since when: real children, real namespaces, and clocks that jump."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import psutil
import pytest

from forgather_control.processes import liveness
from forgather_control.processes.liveness import Grip, Identity, end, judge, myself

from ..support.harness import MS, ROOT, SOON, Process, descriptors, needs, needs_root, until

#: Prints who it is, and lives until its standard input ends.
WHO = """
import json, sys
from forgather_control.processes.liveness import myself
print(json.dumps(myself()._asdict()), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child():
    """A process and its identity as it gave it itself."""
    with Process(WHO) as other:
        yield other, Identity(**json.loads(other.line()))


def _in_namespace(*options, code=""):
    """Who a process is that runs in namespaces of its own."""
    done = subprocess.run(
        ["unshare", *options, sys.executable, "-c", code + WHO],
        capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=SOON, check=True,
    )  # fmt: skip
    return Identity(**json.loads(done.stdout))


def test_myself_is_this_process():
    """An identity names pid, host and start as the system knows them."""
    me = myself()
    assert (me.pid, me.host, me.started_at) == (os.getpid(), socket.gethostname(), psutil.Process().create_time())
    assert me.booted_at == psutil.boot_time() and judge(me) == "running"


def test_the_machine_id_stays_at_home():
    """What names the machine is a digest, as machine-id(5) asks."""
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            secret = file.readline().strip()
    except OSError:
        pytest.skip("no /etc/machine-id")
    assert secret and secret not in repr(myself()) and len(myself().machine) == 16


def test_a_child_is_judged_by_what_it_said_of_itself(child):
    """A process that lives is running; killed and not yet reaped (a zombie) or reaped, it is gone."""
    other, identity = child
    assert judge(identity) == "running"
    os.kill(other.pid, signal.SIGKILL)
    until(lambda: psutil.Process(other.pid).status() == psutil.STATUS_ZOMBIE)
    assert judge(identity) == "gone"
    other.popen.wait(SOON)
    assert judge(identity) == "gone"


def test_a_stopped_process_runs(child):
    """SIGSTOP makes a process silent, not gone."""
    other, identity = child
    os.kill(other.pid, signal.SIGSTOP)
    until(lambda: psutil.Process(other.pid).status() == psutil.STATUS_STOPPED)
    assert judge(identity) == "running"


@pytest.mark.parametrize("shift", [-1e9, -3600, -5, 5, 3600, 1e9, 1e308])
def test_a_reused_pid_is_gone(child, shift):
    """A live process of the same pid that started at another time is another process."""
    _, identity = child
    assert judge(identity._replace(started_at=identity.started_at + shift)) == "gone"
    assert judge(identity._replace(started_at=identity.started_at + shift, booted_at=None)) == "gone"
    assert judge(identity._replace(booted_at=identity.booted_at + shift)) == "gone"


@pytest.mark.parametrize("jump", [-3e8, -3600, 3600, 3e8])
def test_a_clock_that_jumped_moves_nobody(child, jump):
    """A wall clock set anew moves boot and start alike; the process is the same."""
    _, identity = child
    moved = identity._replace(started_at=identity.started_at + jump, booted_at=identity.booted_at + jump)
    assert judge(moved) == "running"


@pytest.mark.parametrize("off", [-1.0, 1.0])
def test_a_boot_time_is_rounded(child, off):
    """A second more or less is a rounded boot time, not another process."""
    _, identity = child
    assert judge(identity._replace(booted_at=identity.booted_at + off)) == "running"


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "running"),
        ({"started_at": None}, "running"),
        ({"booted_at": None}, "running"),
        ({"boot_id": None, "machine": None, "pid_namespace": None}, "running"),
        ({"boot_id": "another"}, "gone"),
        ({"host": "another.example.org"}, "elsewhere"),
        ({"machine": "another"}, "elsewhere"),
        ({"pid_namespace": 1}, "elsewhere"),
        # Another host's boot, and its pids, prove nothing here ...
        ({"host": "another.example.org", "boot_id": "another", "started_at": 1.0}, "elsewhere"),
        ({"machine": "another", "boot_id": "another", "started_at": 1.0}, "elsewhere"),
        ({"pid_namespace": 1, "started_at": 1.0}, "elsewhere"),
        # ... but no container outlives the boot of its machine.
        ({"pid_namespace": 1, "boot_id": "another"}, "gone"),
        # Two containers of one image share a machine id; two hosts that were cloned, too.
        ({"host": "another.example.org", "machine": None}, "elsewhere"),
        ({"pid": 2**31 - 1}, "gone"),
    ],
)
def test_what_is_judged_by_what(monkeypatch, changes, verdict):
    """Host and machine come first, then the boot, the namespace, the pid and its start."""
    monkeypatch.setattr(liveness, "_machine", lambda: "this machine")
    monkeypatch.setattr(liveness, "_boot_id", lambda: "this boot")
    monkeypatch.setattr(liveness, "_pid_namespace", lambda: 4026531836)
    assert judge(myself()._replace(**changes)) == verdict


@pytest.mark.parametrize("unknown", ["_machine", "_boot_id", "_pid_namespace"])
def test_what_this_system_does_not_tell_is_not_held_against_anybody(monkeypatch, unknown):
    """Where we cannot read our own boot, machine or namespace, another's differs from nothing."""
    field = unknown.lstrip("_")
    recorded = myself()._replace(**{field: "something"})
    monkeypatch.setattr(liveness, unknown, lambda: None)
    assert judge(recorded) == "running"


@needs_root
@needs("unshare")
def test_what_is_surely_gone_is_gone(child):
    """Only of this host, boot and namespace, and only without anybody of its pid; all else is left to ``judge``."""
    other, who = child
    assert not liveness.is_gone(who) and not liveness.is_gone(who._replace(started_at=1.0))
    other.kill()
    until(lambda: liveness.is_gone(who))
    unsure = [{"boot_id": None}, {"boot_id": "x"}, {"pid_namespace": None}, {"pid_namespace": 1}, {"host": "x"}]
    for changes in unsure:
        assert not liveness.is_gone(who._replace(**changes))
    assert not liveness.is_gone(who._replace(pid=1)) and judge(who) == "gone"


def test_a_real_pid_namespace_is_elsewhere():
    """In a container, pid 1 is the job; here it is init: nobody judges it by that."""
    inside = _in_namespace("--pid", "--fork", "--mount-proc")
    assert (inside.pid, inside.host, inside.boot_id) == (1, socket.gethostname(), myself().boot_id)
    assert inside.pid_namespace != myself().pid_namespace and judge(inside) == "elsewhere"


@needs_root
@needs("unshare")
def test_a_real_other_host_name_is_elsewhere():
    """A process that sees another host name is another host's."""
    inside = _in_namespace("--uts", code="import socket; socket.sethostname('node0123')\n")
    assert inside.host == "node0123" and judge(inside) == "elsewhere"
    assert judge(inside._replace(host=socket.gethostname())) == "gone", "control: it did run on this machine"


def test_an_identity_survives_json():
    """Floats and all, what is read is what was written: no rounding makes a job look dead."""
    me = myself()
    assert Identity(**json.loads(json.dumps(me._asdict()))) == me


# Ending others...

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
        got = end([*all_of_them, far], 1500 * MS)
        assert got == list(zip([*all_of_them, far], ["ended", "killed", "killed", "gone", "elsewhere"]))
        assert [one.popen.wait(SOON) for one in (good, deaf, stopped)] == [-15, -9, -9]
    assert descriptors() == before


@both_ways
def test_end_waits_no_longer_than_it_takes(choose, pidfd):
    """A grace of an hour is over when the last one has ended; a zombie has ended."""
    choose(pidfd)
    with Process(WHO) as other:
        identity = who(other)
        assert end([identity], 3600.0) == [(identity, "ended")]
        assert other.popen.wait(SOON) == -15


@both_ways
def test_end_hits_no_process_that_only_has_the_pid(choose, pidfd, child):
    """An identity of another start, boot or namespace: nothing is sent."""
    choose(pidfd)
    other, identity = child
    for changes in ({"started_at": identity.started_at - 60}, {"boot_id": "another"}):
        assert end([identity._replace(**changes)], 0.0)[0][1] == "gone"
    assert end([identity._replace(pid_namespace=1)], 0.0)[0][1] == "elsewhere"
    other.popen.stdin.close()
    assert other.end() == 0


def test_end_lets_them_end_by_themselves_first(child):
    """Who goes within the patience is told as gone, and was sent nothing."""
    other, identity = child
    ended = threading.Timer(50 * MS, other.popen.stdin.close)
    ended.start()
    assert end([identity], 0.0, patience=3600.0) == [(identity, "gone")]
    assert other.end() == 0
    ended.join(SOON)


def test_end_spares_others_users_and_itself(child):
    """Root is not talked into ending another user's process, and nobody into ending himself."""
    _, identity = child
    assert end([identity], 0.0, owner=os.getuid() + 1) == [(identity, "refused")]
    assert end([myself()], 0.0) == [(myself(), "refused")]
    assert judge(identity) == "running"
    assert end([identity, identity], SOON, owner=os.getuid()) == [(identity, "ended")] * 2


@needs_root
def test_end_of_what_may_not_be_signalled():
    """Where the kernel says no, it is told as refused."""
    source = f"""
    import os, select, signal
    from forgather_control.processes.liveness import Identity, end, judge
    judge(Identity({socket.gethostname()!r}, 1))  # loads what the other user may not read
    os.setgid(65534); os.setuid(65534)
    print(end([Identity({socket.gethostname()!r}, 1)], 0.0)[0][1])
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
                assert end([identity._replace(started_at=1.0)], 0.0)[0][1] == "gone" and second.poll() is None
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
