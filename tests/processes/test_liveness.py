"""Which process, started when: real children, real namespaces, and clocks that jump."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from forgather_control.processes import liveness
from forgather_control.processes.liveness import Identity, current_process, judge

from ..support.harness import ROOT, SOON, needs, needs_root, until
from .conftest import WHO


def _in_namespace(*options, code=""):
    """Return the identity of a process in its own namespaces."""
    done = subprocess.run(
        ["unshare", *options, sys.executable, "-c", code + WHO],
        capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL, timeout=SOON, check=True,
    )  # fmt: skip
    return Identity(**json.loads(done.stdout))


def test_current_process():
    """An identity names pid, host and start as the system knows them."""
    me = current_process()
    assert (me.pid, me.host, me.started_at) == (os.getpid(), socket.gethostname(), psutil.Process().create_time())
    assert me.booted_at == psutil.boot_time() and judge(me) == "running"


def test_the_machine_id_is_not_disclosed():
    """The machine is identified by a digest, as machine-id(5) demands."""
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            secret = file.readline().strip()
    except OSError:
        pytest.skip("no /etc/machine-id")
    assert secret and secret not in repr(current_process()) and len(current_process().machine) == 16


def test_a_child_is_judged_by_its_identity(child):
    """A live process is running; a killed one is gone, reaped or not (a zombie)."""
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
def test_a_clock_that_jumped_changes_nothing(child, jump):
    """When the wall clock is set, boot and start move alike; the process is the same."""
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
def test_the_order_of_evidence(monkeypatch, changes, verdict):
    """Host and machine come first, then the boot, the namespace, the pid and its start."""
    monkeypatch.setattr(liveness, "_machine", lambda: "this machine")
    monkeypatch.setattr(liveness, "_boot_id", lambda: "this boot")
    monkeypatch.setattr(liveness, "_pid_namespace", lambda: 4026531836)
    assert judge(current_process()._replace(**changes)) == verdict


@pytest.mark.parametrize("unknown", ["_machine", "_boot_id", "_pid_namespace"])
def test_what_is_unknown_here_proves_nothing(monkeypatch, unknown):
    """Where this system does not tell its boot, machine or namespace, no recorded one differs from it."""
    field = unknown.lstrip("_")
    recorded = current_process()._replace(**{field: "something"})
    monkeypatch.setattr(liveness, unknown, lambda: None)
    assert judge(recorded) == "running"


def test_a_cheap_proof_that_a_process_is_gone(child):
    """Only for this host, boot and namespace, and only while the pid is free; all else is left to ``judge``."""
    other, identity = child
    assert not liveness.is_gone(identity) and not liveness.is_gone(identity._replace(started_at=1.0))
    other.kill()
    until(lambda: liveness.is_gone(identity))
    unsure = [{"boot_id": None}, {"boot_id": "x"}, {"pid_namespace": None}, {"pid_namespace": 1}, {"host": "x"}]
    for changes in unsure:
        assert not liveness.is_gone(identity._replace(**changes))
    assert not liveness.is_gone(identity._replace(pid=1)) and judge(identity) == "gone"


@needs_root
@needs("unshare")
def test_a_real_pid_namespace_is_elsewhere():
    """In a container pid 1 is the job; here it is init, which proves nothing."""
    inside = _in_namespace("--pid", "--fork", "--mount-proc")
    assert (inside.pid, inside.host, inside.boot_id) == (1, socket.gethostname(), current_process().boot_id)
    assert inside.pid_namespace != current_process().pid_namespace and judge(inside) == "elsewhere"


@needs_root
@needs("unshare")
def test_a_real_other_host_name_is_elsewhere():
    """A process that sees another host name is on another host."""
    inside = _in_namespace("--uts", code="import socket; socket.sethostname('node0123')\n")
    assert inside.host == "node0123" and judge(inside) == "elsewhere"
    assert judge(inside._replace(host=socket.gethostname())) == "gone", "control: it did run on this machine"


NO_PROC = ["--mount", "sh", "-c", 'mount -t tmpfs none /proc; exec "$@"', "sh"]


@needs_root
@needs("unshare")
@pytest.mark.parametrize("options", [NO_PROC, ["--pid", "--fork"]], ids=["none", "another namespace's"])
def test_without_a_proc_of_its_own_an_identity_has_no_start(options):
    """Where /proc is missing, or shows other processes under these pids, the start is unknown, never another's."""
    inside = _in_namespace(*options)
    assert (inside.started_at, inside.booted_at, inside.host) == (None, None, socket.gethostname())
    assert judge(inside._replace(pid=os.getpid(), pid_namespace=None)) == "running"


def test_without_psutil_only_a_free_pid_is_a_proof(child, monkeypatch):
    """A process that exists may be the one: its start cannot be compared."""
    other, identity = child
    monkeypatch.setattr(liveness.proc, "psutil", lambda: None)
    assert judge(identity) == judge(identity._replace(started_at=1.0)) == "running"
    assert current_process().started_at is None
    other.kill()
    other.popen.wait(SOON)
    assert judge(identity) == "gone"


@pytest.mark.parametrize("directory", [False, True], ids=["hidden", "a thread's"])
def test_a_process_that_proc_hides_is_not_gone(child, monkeypatch, directory):
    """With hidepid psutil finds no process, but kill(2) does; where /proc has its directory it is a thread."""

    def process(pid):
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(psutil, "Process", process)
    monkeypatch.setattr(os.path, "exists", lambda path: directory)
    assert judge(child[1]) == ("gone" if directory else "running")


def test_an_identity_survives_json():
    """What is read is what was written, to the last digit: no rounding makes a job look dead."""
    me = current_process()
    assert Identity(**json.loads(json.dumps(me._asdict()))) == me
