"""Stacks read from outside: real processes that wait, that keep the interpreter lock in C, that are stopped or busy."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from forgather_control.deadline import Deadline
from forgather_control.errors import FindError, JobDead, JobNotAnswering
from forgather_control.processes import stack_dump
from forgather_control.processes.liveness import Identity, current_process, judge
from forgather_control.processes.stack_dump import StackDumper, dump_of
from forgather_control.processes.stacks import python_stacks

from ..support.harness import MS, SOON, Process, descriptors, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memfds and /proc")

#: Begins to record, prints who it is, then runs what the test appends.
RECORDS = """
import ctypes, json, os, signal, socket, sys, threading, time
from forgather_control.processes.stack_dump import StackDumper
from forgather_control.processes.liveness import current_process
from forgather_control.processes.stacks import python_stacks

def keep_the_lock_in_c():
    # PyDLL does not release the interpreter lock; read(2) lasts until the test writes.
    return ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)

recorder = StackDumper(python_stacks)
assert recorder.start()
threading.Thread(target=threading.Event().wait, name="idle", daemon=True).start()
print(json.dumps([current_process()._asdict(), recorder.fd]), flush=True)
"""


@contextmanager
def recording(source):
    """A process that records, its identity and its file's number."""
    with Process(RECORDS + source) as other:
        identity, fd = json.loads(other.line())
        yield other, Identity(**identity), fd


@pytest.fixture
def quick(monkeypatch):
    """A witness that proves its point in a tenth of the time; nothing here is that busy."""
    monkeypatch.setattr(stack_dump, "_SILENCE", 300 * MS)


@pytest.fixture
def recorder():
    """A recorder of this process, closed in the end."""
    one = StackDumper(python_stacks)
    assert one.start()
    yield one
    one.close()


def status(pid, name):
    """A field of /proc/PID/status."""
    return stack_dump._field(f"/proc/{pid}/status", name)


def sleeps(pid):
    """Whether the main thread waits for something."""
    return status(pid, "State").startswith("S")


def forced(identity, fd):
    """What ``faulthandler`` writes, once the process keeps the lock."""
    return until(lambda: "most recent call first" in (text := dump_of(identity, fd, Deadline(SOON))) and text)


def refusal(identity, fd):
    """Why a process cannot be asked; ``None`` while it does not keep the lock yet, and tells itself."""
    try:
        dump_of(identity, fd, Deadline(SOON))
    except FindError as err:
        return str(err)
    return None


# The two ways...


def test_a_process_that_waits_tells_itself():
    """Its main thread waits as in a collective, without the lock: Python's own stacks, by name, and no signal."""
    source = "signal.signal(42, signal.SIG_IGN)\nsys.stdin.readline()\nprint('unhurt', recorder._signum, flush=True)"
    with recording(source) as (other, identity, fd):
        for _ in range(3):
            text = dump_of(identity, fd, Deadline(SOON))
            assert "MainThread (most recent call last)" in text.splitlines()[0] and " idle " in text
        other.say("go on")
        assert other.line().startswith("unhurt")


def test_a_process_that_keeps_the_lock_in_c_is_told_by_faulthandler(quick):
    """No Python thread can run, and all are shown, the main one first; then it goes on as if nothing had been."""
    with recording("keep_the_lock_in_c()\nprint('unhurt', flush=True)\nsys.stdin.read()") as (other, identity, fd):
        for _ in range(2):
            text = forced(identity, fd)
            first = text.split("\n\n")[0]
            assert first.startswith("Thread") and "in keep_the_lock_in_c" in first
            assert text.count("hread 0x") == 3 and "wait" in text
        other.say("go on")
        assert other.line() == "unhurt"
        assert "most recent call last" in dump_of(identity, fd, Deadline(SOON)), "it can tell itself again"
        other.popen.stdin.close()
        assert other.end() == 0


def test_another_thread_keeps_the_lock(quick):
    """The main thread waits for it, and is shown with the one that has it."""
    source = """
def wait_for_helper():
    one = threading.Thread(target=keep_the_lock_in_c)
    one.start()
    one.join()

wait_for_helper()
print("unhurt", flush=True)
"""
    with recording(source) as (other, identity, fd):
        text = forced(identity, fd)
        assert "in wait_for_helper" in text.split("\n\n")[0] and "in keep_the_lock_in_c" in text
        other.say("go on")
        assert other.line() == "unhurt" and other.end() == 0


def test_a_busy_process_is_never_sent_a_signal():
    """Python runs in eight threads: a handler that reads their frames would kill it, so they tell themselves."""
    source = """
def busy(depth=20):
    exec(compile(f"def f(x): return x + {depth}\\nf(1)", "made", "exec"))
    return busy(depth - 1) if depth else None

def worker():
    while True:
        busy()

for _ in range(8):
    threading.Thread(target=worker, daemon=True).start()
worker()
"""
    with recording(source) as (other, identity, fd):
        for _ in range(30):
            assert "most recent call last" in dump_of(identity, fd, Deadline(SOON))
        assert other.popen.poll() is None


@pytest.mark.parametrize("pidfd", [True, False], ids=["pidfd", "tgkill"])
def test_no_call_in_c_is_interrupted(quick, monkeypatch, pidfd):
    """The signal goes to the witness alone: a sleep in C, which a signal would end, lasts its time."""
    if not pidfd:
        real = os.pidfd_open
        monkeypatch.setattr(os, "pidfd_open", lambda pid, flags=0: real(pid) if not flags else real(-1))
    source = """
def sleep_in_c():
    return ctypes.PyDLL(None).usleep(900_000)

assert sys.stdin.readline()
begun = time.monotonic()
print(sleep_in_c(), time.monotonic() - begun >= 0.9, flush=True)
"""
    with recording(source) as (other, identity, fd):
        other.say("go on")
        assert "in sleep_in_c" in forced(identity, fd).split("\n\n")[0]
        assert other.line() == "0 True"


# When it must not be done...


def test_a_stopped_process_is_not_sent_a_signal(quick):
    """Its signal would wait, and be handled when Python runs again; what stops it is said."""
    with recording("sys.stdin.readline()\nprint('unhurt', flush=True)") as (other, identity, fd):
        os.kill(other.pid, signal.SIGSTOP)
        until(lambda: status(other.pid, "State").startswith("T"))
        with pytest.raises(JobNotAnswering, match="stopped"):
            dump_of(identity, fd, Deadline(600 * MS))
        threads = [f"/proc/{other.pid}/task/{thread}/status" for thread in os.listdir(f"/proc/{other.pid}/task")]
        assert not any(stack_dump._mask(thread, name) for thread in threads for name in ("SigPnd", "ShdPnd"))
        os.kill(other.pid, signal.SIGCONT)
        assert "MainThread" in dump_of(identity, fd, Deadline(SOON))
        other.say("go on")
        assert other.line() == "unhurt"


def test_a_process_that_no_longer_catches_the_signal_lives(quick):
    """The default of a real-time signal is death: it is not sent, and that is said."""
    source = "import faulthandler\nfaulthandler.unregister(recorder._signum)\nprint('off', flush=True)\n"
    with recording(source + "keep_the_lock_in_c()\nprint('unhurt', flush=True)") as (other, identity, fd):
        assert other.line() == "off"
        assert "no longer catches" in until(lambda: refusal(identity, fd))
        other.say("go on")
        assert other.line() == "unhurt"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"started_at": 5.0}, JobDead),
        ({"pid": 2**22 + 1}, JobDead),
        ({"host": "another.example.org"}, FindError),
        ({"pid_namespace": 1}, FindError),
    ],
)
def test_another_process_is_left_alone(recorder, changes, error):
    """Of the same pid but another start, on another host, in another namespace: nothing is opened."""
    with pytest.raises(error) as caught:
        dump_of(current_process()._replace(**changes), recorder.fd, Deadline(SOON))
    assert type(caught.value) is error


def test_a_dead_process_is_told_as_dead():
    """Killed before it is asked, or while it is: JobDead at once."""
    with recording("sys.stdin.read()") as (other, identity, fd):
        os.kill(other.pid, signal.SIGSTOP)
        until(lambda: status(other.pid, "State").startswith("T"))
        killer = threading.Timer(100 * MS, other.popen.kill)
        killer.start()
        with pytest.raises(JobDead):
            dump_of(identity, fd, Deadline(SOON))
        killer.join(SOON)
        other.popen.wait(SOON)
        with pytest.raises(JobDead):
            dump_of(identity, fd, Deadline(SOON))


def test_a_number_that_is_another_file_by_now(tmp_path, recorder):
    """A file, a FIFO, a socket, a file in memory of another name, or nothing: refused, and none is touched."""
    (tmp_path / f"memfd:{stack_dump.NAME} (deleted)").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDWR)
    named = os.open(tmp_path / f"memfd:{stack_dump.NAME} (deleted)", os.O_RDWR)
    memory = os.memfd_create("something else")
    free = os.dup(memory)
    os.close(free)
    with socket.socket() as sock:
        for number in (fifo, named, memory, sock.fileno(), free, 0, 2**31 - 1):
            with pytest.raises(FindError, match="cannot be read"):
                dump_of(current_process(), number, Deadline(SOON))
    assert (tmp_path / f"memfd:{stack_dump.NAME} (deleted)").read_text() == "mine"
    for file in (fifo, named, memory):
        os.close(file)


@pytest.mark.parametrize(
    "facts", [b"", b"{}", b"[1,2]", b'["a",1,2,3]', b"[9,{pipe},{inode},1]", b"[42,{fifo},{inode},1]", b"\xff" * 200]
)
def test_a_record_that_lies(tmp_path, facts):
    """Of the right name, and broken or hostile within: refused; no other pipe gets a byte, no other signal is sent."""
    ours, theirs = os.pipe(), os.pipe()
    facts = facts.replace(b"{pipe}", b"%d" % ours[1]).replace(b"{inode}", b"%d" % os.fstat(ours[1]).st_ino)
    fake = os.memfd_create(stack_dump.NAME)
    os.write(fake, facts.replace(b"{fifo}", b"%d" % theirs[1]).ljust(stack_dump._HEADER))
    with pytest.raises(FindError):
        dump_of(current_process(), fake, Deadline(300 * MS))
    os.set_blocking(theirs[0], False)
    with pytest.raises(BlockingIOError):
        os.read(theirs[0], 1)
    for file in (*ours, *theirs, fake):
        os.close(file)


# Several at once...


def test_two_who_ask_at_once_are_both_answered(quick):
    """One after the other, by a lock on the file; each gets a whole text."""
    with recording("keep_the_lock_in_c()") as (_other, identity, fd):
        told = []
        askers = [threading.Thread(target=lambda: told.append(dump_of(identity, fd, Deadline(SOON)))) for _ in "ab"]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join(SOON)
        assert len(told) == 2 and all(text.count("hread 0x") == 3 for text in told)


def test_who_waits_for_another_gives_up_in_time(recorder):
    """While somebody else asks and does not end, the deadline holds."""
    other = os.open(f"/proc/self/fd/{recorder.fd}", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(JobNotAnswering, match="somebody else"):
        dump_of(current_process(), recorder.fd, Deadline(50 * MS))
    os.close(other)


def test_the_file_does_not_grow(recorder):
    """However often it is asked, one answer is kept."""
    sizes = set()
    for _ in range(5):
        dump_of(current_process(), recorder.fd, Deadline(SOON))
        sizes.add(os.fstat(recorder.fd).st_size)
    assert max(sizes) < 64 * 1024 and max(sizes) - min(sizes) < 1000


def test_an_error_of_the_witness_is_an_answer():
    """Whatever goes wrong in the job, who asks hears of it, and the next one, too."""
    one = StackDumper(lambda: 1 / 0)
    assert one.start()
    for _ in range(2):
        assert (
            dump_of(current_process(), one.fd, Deadline(SOON)) == "no stacks: ZeroDivisionError('division by zero')\n"
        )
    one.close()


def test_a_text_without_end_is_bounded():
    """What is read of another process has an end."""
    one = StackDumper(lambda: "x" * (1 << 20))
    assert one.start()
    assert len(dump_of(current_process(), one.fd, Deadline(SOON))) < 70_000
    one.close()


def test_the_main_thread_of_a_long_dump_is_not_cut_off():
    """faulthandler writes it last; here it is first, and the end is left out."""
    text = "".join(f"Thread {n:#x} (most recent call first):\n" + "  File x\n" * 90 + "\n" for n in range(100))
    shown = stack_dump._main_first(text + "Thread 0x0 (most recent call first):\n  File main\n")
    assert shown.startswith("Thread 0x0 (") and shown.endswith("left out\n") and len(shown) < 70_000


@pytest.mark.parametrize("parts", [("handler",), ("handler", "witness"), ("witness", "handler")])
def test_the_witness_may_be_late(parts):
    """Where the lock is let go of in the end and both have written, what the handler saw is told: the culprit."""
    texts = {"handler": b"Thread 0x1 (most recent call first):\n", "witness": stack_dump._MARK % 8 + b"Thread:\n"}
    assert stack_dump._without_testimony(b"".join(texts[part] for part in parts)) == texts["handler"]


# Begin and end...


def test_close_leaves_nothing():
    """Descriptors, threads and the signal are as before; it may be closed twice, and begun anew."""
    before = descriptors(), threading.active_count(), status(os.getpid(), "SigCgt")
    for _ in range(3):
        one = StackDumper(python_stacks)
        assert one.start() and one.fd is not None
        one.close()
        assert one.fd is None
        one.close()
    assert (descriptors(), threading.active_count(), status(os.getpid(), "SigCgt")) == before


def test_it_begins_on_any_thread(recorder):
    """Where training runs in another thread than the main one, and for a second job in the same process."""
    second = StackDumper(python_stacks)
    began = []
    helper = threading.Thread(target=lambda: began.append(second.start()))
    helper.start()
    helper.join(SOON)
    assert began == [True] and second._signum != recorder._signum
    assert "MainThread" in dump_of(current_process(), second.fd, Deadline(SOON))
    second.close()
    assert "MainThread" in dump_of(current_process(), recorder.fd, Deadline(SOON))


def test_close_waits_for_who_asks_and_no_longer():
    """While somebody asks, the signal must stay caught: all stays as it is, and training ends all the same."""
    one = StackDumper(python_stacks)
    assert one.start()
    other = os.open(f"/proc/self/fd/{one.fd}", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    begun = time.monotonic()
    one.close()
    assert time.monotonic() - begun < SOON / 2 and one.fd is not None
    assert int(status(os.getpid(), "SigCgt"), 16) >> one._signum - 1 & 1
    os.close(other)
    one.close()
    assert one.fd is None


def test_a_fork_does_not_matter():
    """The parent answers for itself while the child lives; the child neither answers nor dies of it."""
    source = """
child = os.fork()
if child == 0:
    sys.stdin.readline()
    recorder.close()
    print("child unhurt", flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent unhurt", flush=True)
sys.stdin.readline()
"""
    with recording(source) as (other, identity, fd):
        for _ in range(3):
            assert "MainThread" in dump_of(identity, fd, Deadline(SOON))
        other.say("go on")
        assert (other.line(), other.line()) == ("child unhurt", "parent unhurt")
        assert "MainThread" in dump_of(identity, fd, Deadline(SOON))
        other.say("go on")
        assert other.end() == 0


def test_it_delays_no_exit():
    """A process that ends without closing its recorder ends at once, and cleanly, also by an exception."""
    for source, code in (("sys.exit(7)", 7), ("raise KeyError", 1)):
        with recording(source) as (other, identity, _fd):
            assert other.end() == code
            assert judge(identity) == "gone"


def test_a_signal_in_use_is_not_taken():
    """Neither one that is caught by Python or by C, nor one that is ignored, or blocked (someone may wait for it)."""
    source = """
    import ctypes, signal
    from forgather_control.processes.stack_dump import StackDumper
    signal.signal(42, lambda *_: None)
    signal.signal(43, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [44])
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: None)
    ctypes.CDLL(None).signal(45, handler)
    recorder = StackDumper(str)
    print(recorder.start(), recorder._signum, flush=True)
    recorder.close()
    print(signal.getsignal(43) == signal.SIG_IGN, flush=True)
    """
    with Process(source) as other:
        assert (other.line(), other.line()) == ("True 46", "True"), other.errors


def test_without_room_nothing_is_left_behind():
    """Out of files, out of threads, out of signals: False, and training has the rest for itself."""
    source = """
    import os, resource, signal, threading
    from forgather_control.processes.stack_dump import StackDumper
    import faulthandler, fcntl
    def count():
        return len(os.listdir("/proc/self/fd"))
    before = count()
    for files in range(3):
        resource.setrlimit(resource.RLIMIT_NOFILE, (before - 1 + files, 4096))
        one = StackDumper(str)
        print(one.start(), one.fd, flush=True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
        assert count() == before, (count(), before)
    for signum in range(42, signal.SIGRTMAX + 1):
        signal.signal(signum, signal.SIG_IGN)
    print(StackDumper(str).start(), threading.active_count(), count() - before, flush=True)
    """
    with Process(source) as other:
        assert [other.line() for _ in range(4)] == ["False None"] * 3 + ["False 1 0"], other.errors


def test_the_default_signal_is_a_real_time_one():
    """It is none of those that have a meaning of their own, nor one of glibc's."""
    assert signal.SIGRTMIN <= stack_dump._FIRST_SIGNAL <= signal.SIGRTMAX
    assert ctypes.CDLL(None).__libc_current_sigrtmin() <= stack_dump._FIRST_SIGNAL
