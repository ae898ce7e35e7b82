"""What a rank reports about its process: true figures, for which no device is initialised."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from types import SimpleNamespace

import psutil
import pytest

from forgather_control.processes.usage import device, process_stats

from ..support.harness import MS, SOON, Process, needs_torch, until

NAMES = {"host", "pid", "rss_bytes", "cpu_percent", "device", "device_memory_bytes", "device_memory_reserved_bytes"}
UNKNOWN = {"device": None, "device_memory_bytes": None, "device_memory_reserved_bytes": None}


def cuda(memory, initialized=True):
    """The part of torch that ``process_stats`` uses, with these bytes on its devices."""
    return SimpleNamespace(
        cuda=SimpleNamespace(
            is_initialized=lambda: initialized,
            device_count=lambda: len(memory),
            memory_allocated=lambda index: memory[index],
            memory_reserved=lambda index: 2 * memory[index],
            get_device_name=lambda index: f"H{index}00",
        )
    )


def test_the_figures_are_the_systems():
    """Host, pid and memory as the operating system has them."""
    found = process_stats()
    assert found.keys() == NAMES
    assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
    assert found["rss_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def test_what_the_system_does_not_tell_is_none(monkeypatch):
    """Without psutil, or a /proc of this PID namespace, memory is unknown, and the rest is there."""
    monkeypatch.setattr("forgather_control.processes.proc.psutil", lambda: None)
    found = process_stats()
    assert (found["rss_bytes"], found["pid"]) == (None, os.getpid()) and found["cpu_percent"] >= 0


def test_processor_time_is_that_since_the_last_call():
    """A second reading has what was used in between, on any thread."""
    process_stats()
    end = time.monotonic() + 200 * MS
    while time.monotonic() < end:
        pass
    found = []
    thread = threading.Thread(target=lambda: found.append(process_stats()))
    thread.start()
    thread.join(SOON)
    assert found[0]["cpu_percent"] > 10


def test_a_forked_child_reports_itself():
    """The figures of a child are not its parent's."""
    source = """
    import os, sys
    from forgather_control.processes.usage import process_stats
    filled = process_stats() and b"x" * (64 << 20)
    child = os.fork()
    found = process_stats()
    if child == 0:
        assert found["pid"] == os.getpid()
        os._exit(7 if found["cpu_percent"] == 0.0 else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """
    with Process(source) as other:
        assert other.line() == "7", other.errors


@pytest.mark.parametrize("error", [psutil.AccessDenied(), psutil.NoSuchProcess(1), OSError(24, "no descriptors")])
def test_memory_that_cannot_be_read_is_unknown(monkeypatch, error):
    """Where /proc is hidden, or no descriptors are left, the other figures are reported all the same."""
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: (_ for _ in ()).throw(error))
    found = process_stats()
    assert found["rss_bytes"] is None and found["pid"] == os.getpid()


def test_without_torch_the_device_is_unknown(monkeypatch):
    """Without torch the job may train on anything; torch is not loaded to find out."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert device() == UNKNOWN and "torch" not in sys.modules


@pytest.mark.parametrize(
    ("memory", "name", "used"),
    [
        ([5, 0], "cuda:0 H000", 5),
        ([0, 0, 7], "cuda:2 H200", 7),
        ([1, 9, 3], "cuda:1 H100 and 2 more", 13),
        ([0, 0], "cuda", 0),
    ],
)
def test_the_device_is_the_one_in_use(monkeypatch, memory, name, used):
    """Not the calling thread's current device, which is 0 whatever the training thread chose."""
    monkeypatch.setitem(sys.modules, "torch", cuda(memory))
    assert device() == {"device": name, "device_memory_bytes": used, "device_memory_reserved_bytes": 2 * used}


@pytest.mark.parametrize(("kind", "name"), [(None, "cpu"), ("cuda", "cpu"), ("mps", "mps"), ("xpu", "xpu")])
def test_a_device_that_was_not_touched(monkeypatch, kind, name):
    """CUDA that is not initialised is not in use; another accelerator may be."""
    torch = cuda([1], initialized=False)
    torch.accelerator = SimpleNamespace(current_accelerator=lambda: kind and SimpleNamespace(type=kind))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert device() == {**UNKNOWN, "device": name}


@pytest.mark.parametrize("torch", [SimpleNamespace(), cuda([])], ids=["half imported", "failed"])
def test_a_torch_that_raises_costs_the_device_only(monkeypatch, torch):
    """After a device-side assert every call raises: the other figures are reported all the same."""
    if hasattr(torch, "cuda"):
        torch.cuda.device_count = lambda: (_ for _ in ()).throw(RuntimeError("CUDA error: device-side assert"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    found = process_stats()
    assert found["device"] is None and found["rss_bytes"] > 0


@needs_torch
def test_real_torch_on_the_processor():
    """In a separate process whose training thread hangs: the device is "cpu", and CUDA stays uninitialised."""
    source = """
    import sys, threading, torch
    from forgather_control.processes.usage import process_stats
    def ask():
        print(process_stats()["device"], torch.cuda.is_initialized(), flush=True)
    threading.Timer(0.05, ask).start()
    sys.stdin.read()
    """
    with Process(source) as other:
        assert other.line() == "cpu False", other.errors


def test_it_answers_while_the_main_thread_hangs():
    """Called again and again on a helper thread, it needs nothing from the thread that hangs."""
    source = """
    import sys, threading
    from forgather_control.processes.usage import process_stats
    threading.Thread(target=lambda: [print(process_stats()["pid"], flush=True) for _ in range(3)], daemon=True).start()
    sys.stdin.read()
    """
    with Process(source) as other:
        assert until(lambda: [other.line() for _ in range(3)]) == [str(other.pid)] * 3
