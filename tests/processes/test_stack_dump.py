"""Stacks read from outside: real processes that wait, that keep the interpreter lock in C, that are stopped or busy."""

from __future__ import annotations

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
from forgather_control.processes import proc, stack_dump
from forgather_control.processes.liveness import Identity, current_process, judge
from forgather_control.processes.stack_dump import StackDumper, dump_stacks
from forgather_control.processes.stacks import python_stacks

from ..support.harness import MS, SOON, Process, descriptors, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memfds and /proc")

#: Starts a stack dumper, prints its identity, then runs the code that the test appends.
DUMPS = """
import ctypes, json, os, signal, socket, sys, threading, time
from forgather_control.processes.stack_dump import StackDumper
from forgather_control.processes.liveness import current_process
from forgather_control.processes.stacks import python_stacks

def hold_the_lock_in_c():
    # PyDLL does not release the interpreter lock; read(2) lasts until the test writes.
    return ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)

dumper = StackDumper(python_stacks)
assert dumper.start()
threading.Thread(target=threading.Event().wait, name="idle", daemon=True).start()
print(json.dumps([current_process()._asdict(), dumper.fd]), flush=True)
"""


@contextmanager
def dumping(source):
    """Yields a process with a stack dumper, its identity, and the descriptor of its file."""
    with Process(DUMPS + source) as other:
        identity, fd = json.loads(other.line())
        yield other, Identity(**identity), fd


@pytest.fixture
def quick(monkeypatch):
    """The lock counts as held after a tenth of the time; nothing here is that busy."""
    monkeypatch.setattr(stack_dump, "_LOCK_HELD", 300 * MS)


@pytest.fixture
def dumper():
    """A dumper of this process, closed in the end."""
    one = StackDumper(python_stacks)
    assert one.start()
    yield one
    one.close()


def status(pid, name):
    """Return a field of /proc/PID/status."""
    return proc.field(f"/proc/{pid}/status", name)


def forced(identity, fd):
    """Return the faulthandler dump, once the process holds the lock."""
    return until(lambda: "most recent call first" in (text := dump_stacks(identity, fd, Deadline(SOON))) and text)


def refusal(identity, fd):
    """Return why the stacks cannot be read; ``None`` while the process does not hold the lock yet."""
    try:
        dump_stacks(identity, fd, Deadline(SOON))
    except FindError as err:
        return str(err)
    return None


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_descriptor_that_other_code_closed(index, tmp_path):
    """The file that has its number is neither read, nor written, nor closed, and the thread ends."""
    dumper = StackDumper(python_stacks)
    assert dumper.start()
    lost, pipe = dumper._files[index].number, os.dup(dumper._files[1].number)
    until(lambda: proc.field(f"/proc/self/task/{dumper._thread.native_id}/status", "State")[0] == "S")
    with open(tmp_path / "file", "w+b", buffering=0) as file:
        file.write(b"data")
        file.seek(0)
        os.dup2(file.fileno(), lost)
    os.write(pipe, b"?")
    os.close(pipe)
    dumper._thread.join(SOON)
    assert not dumper._thread.is_alive()
    dumper.close()
    assert os.read(lost, 10) == b"data" and (tmp_path / "file").read_bytes() == b"data"
    os.close(lost)


# The two kinds of dump...


def test_a_waiting_process_writes_a_python_dump():
    """Its main thread waits as in a collective, without the lock: stacks with thread names, and no signal is sent."""
    source = "signal.signal(42, signal.SIG_IGN)\nsys.stdin.readline()\nprint('unhurt', dumper._signum, flush=True)"
    with dumping(source) as (other, identity, fd):
        for _ in range(3):
            text = dump_stacks(identity, fd, Deadline(SOON))
            assert "MainThread (most recent call last)" in text.splitlines()[0] and " idle " in text
        other.say("go on")
        assert other.line().startswith("unhurt")


def test_a_process_that_holds_the_lock_in_c_is_dumped_by_faulthandler(quick):
    """No Python thread can run; all are shown, the main thread first; afterwards the process continues unharmed."""
    with dumping("hold_the_lock_in_c()\nprint('unhurt', flush=True)\nsys.stdin.read()") as (other, identity, fd):
        for _ in range(2):
            text = forced(identity, fd)
            first = text.split("\n\n")[0]
            assert first.startswith("Thread") and "in hold_the_lock_in_c" in first
            assert text.count("hread 0x") == 3 and "wait" in text
        other.say("go on")
        assert other.line() == "unhurt"
        assert "most recent call last" in dump_stacks(identity, fd, Deadline(SOON)), "now a Python dump again"
        other.popen.stdin.close()
        assert other.end() == 0


def test_another_thread_holds_the_lock(quick):
    """The main thread waits for the lock, and is shown together with the thread that holds it."""
    source = """
def wait_for_helper():
    one = threading.Thread(target=hold_the_lock_in_c)
    one.start()
    one.join()

wait_for_helper()
print("unhurt", flush=True)
"""
    with dumping(source) as (other, identity, fd):
        text = forced(identity, fd)
        assert "in wait_for_helper" in text.split("\n\n")[0] and "in hold_the_lock_in_c" in text
        other.say("go on")
        assert other.line() == "unhurt" and other.end() == 0


@pytest.mark.once
def test_a_busy_process_is_never_sent_a_signal():
    """Python code runs in eight threads: a handler that reads their frames would crash it."""
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
    with dumping(source) as (other, identity, fd):
        for _ in range(30):
            assert "most recent call last" in dump_stacks(identity, fd, Deadline(SOON))
        assert other.popen.poll() is None


def test_no_call_in_c_is_interrupted(quick):
    """The signal goes to the dump thread alone: a sleep in C, which a signal would end, lasts its full time."""
    source = """
def sleep_in_c():
    return ctypes.PyDLL(None).usleep(900_000)

assert sys.stdin.readline()
begun = time.monotonic()
print(sleep_in_c(), time.monotonic() - begun >= 0.9, flush=True)
"""
    with dumping(source) as (other, identity, fd):
        other.say("go on")
        assert "in sleep_in_c" in forced(identity, fd).split("\n\n")[0]
        assert other.line() == "0 True"


# When there must be none...


def test_a_stopped_process_is_not_sent_a_signal(quick):
    """Its signal would stay pending and be handled when Python code runs again; the error says that it is stopped."""
    with dumping("sys.stdin.readline()\nprint('unhurt', flush=True)") as (other, identity, fd):
        os.kill(other.pid, signal.SIGSTOP)
        until(lambda: status(other.pid, "State").startswith("T"))
        with pytest.raises(JobNotAnswering, match="stopped"):
            dump_stacks(identity, fd, Deadline(600 * MS))
        threads = [f"/proc/{other.pid}/task/{thread}/status" for thread in os.listdir(f"/proc/{other.pid}/task")]
        assert not any(int(proc.field(thread, name), 16) for thread in threads for name in ("SigPnd", "ShdPnd"))
        os.kill(other.pid, signal.SIGCONT)
        assert "MainThread" in dump_stacks(identity, fd, Deadline(SOON))
        other.say("go on")
        assert other.line() == "unhurt"


def test_a_process_that_no_longer_catches_the_signal_lives(quick):
    """The default action of a real-time signal ends the process: it is not sent, and the error says so."""
    source = "import faulthandler\nfaulthandler.unregister(dumper._signum)\nprint('off', flush=True)\n"
    with dumping(source + "hold_the_lock_in_c()\nprint('unhurt', flush=True)") as (other, identity, fd):
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
def test_another_process_is_left_alone(dumper, changes, error):
    """With the same pid but another start, on another host, in another namespace: nothing is opened."""
    with pytest.raises(error) as caught:
        dump_stacks(current_process()._replace(**changes), dumper.fd, Deadline(SOON))
    assert type(caught.value) is error


def test_a_dead_process_is_reported_as_dead():
    """Killed before the request or during it: JobDead at once."""
    with dumping("sys.stdin.read()") as (other, identity, fd):
        os.kill(other.pid, signal.SIGSTOP)
        until(lambda: status(other.pid, "State").startswith("T"))
        killer = threading.Timer(100 * MS, other.popen.kill)
        killer.start()
        with pytest.raises(JobDead):
            dump_stacks(identity, fd, Deadline(SOON))
        killer.join(SOON)
        other.popen.wait(SOON)
        with pytest.raises(JobDead):
            dump_stacks(identity, fd, Deadline(SOON))


def test_a_descriptor_that_is_now_another_file(tmp_path, dumper):
    """A file, a FIFO, a socket, a memfd of another name, or nothing: refused, and none is touched."""
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
                dump_stacks(current_process(), number, Deadline(SOON))
    assert (tmp_path / f"memfd:{stack_dump.NAME} (deleted)").read_text() == "mine"
    for file in (fifo, named, memory):
        os.close(file)


@pytest.mark.parametrize(
    "facts", [b"", b"{}", b"[1,2]", b'["a",1,2,3]', b"[9,{pipe},{inode},1]", b"[42,{fifo},{inode},1]", b"\xff" * 200]
)
def test_a_damaged_or_hostile_header(tmp_path, facts):
    """A file of the right name with a bad header is refused: no other pipe gets a byte, no other signal is sent."""
    ours, theirs = os.pipe(), os.pipe()
    facts = facts.replace(b"{pipe}", b"%d" % ours[1]).replace(b"{inode}", b"%d" % os.fstat(ours[1]).st_ino)
    fake = os.memfd_create(stack_dump.NAME)
    os.write(fake, facts.replace(b"{fifo}", b"%d" % theirs[1]).ljust(stack_dump._HEADER_SIZE))
    with pytest.raises(FindError):
        dump_stacks(current_process(), fake, Deadline(300 * MS))
    os.set_blocking(theirs[0], False)
    with pytest.raises(BlockingIOError):
        os.read(theirs[0], 1)
    for file in (*ours, *theirs, fake):
        os.close(file)


# Several at once...


def test_two_clients_at_once_are_both_answered(quick):
    """One after the other, by a lock on the file; each gets a whole dump."""
    with dumping("hold_the_lock_in_c()") as (_other, identity, fd):
        dumps = []
        clients = [
            threading.Thread(target=lambda: dumps.append(dump_stacks(identity, fd, Deadline(SOON)))) for _ in "ab"
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join(SOON)
        assert len(dumps) == 2 and all(text.count("hread 0x") == 3 for text in dumps)


def test_a_client_that_waits_for_another_gives_up_in_time(dumper):
    """While another client holds the lock on the file, the deadline holds."""
    other = os.open(f"/proc/self/fd/{dumper.fd}", os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(JobNotAnswering, match="another client"):
        dump_stacks(current_process(), dumper.fd, Deadline(50 * MS))
    os.close(other)


def test_the_file_does_not_grow(dumper):
    """However often a dump is requested, the file holds one."""
    sizes = set()
    for _ in range(5):
        dump_stacks(current_process(), dumper.fd, Deadline(SOON))
        sizes.add(os.fstat(dumper.fd).st_size)
    assert max(sizes) < 64 * 1024 and max(sizes) < 2 * min(sizes)  # stacks differ a little


def test_an_error_of_the_dump_thread_is_an_answer():
    """What goes wrong in the job is what the client reads, and the next client too."""
    one = StackDumper(lambda: 1 / 0)
    assert one.start()
    for _ in range(2):
        assert (
            dump_stacks(current_process(), one.fd, Deadline(SOON))
            == "no stacks: ZeroDivisionError('division by zero')\n"
        )
    one.close()


def test_a_text_without_end_is_bounded():
    """What is read from another process is bounded."""
    one = StackDumper(lambda: "x" * (1 << 20))
    assert one.start()
    assert len(dump_stacks(current_process(), one.fd, Deadline(SOON))) < 70_000
    one.close()


def test_the_main_thread_of_a_long_dump_is_not_cut_off():
    """faulthandler writes the main thread last; here it is first, and the end is left out."""
    text = "".join(f"Thread {n:#x} (most recent call first):\n" + "  File x\n" * 90 + "\n" for n in range(100))
    shown = stack_dump._main_thread_first(text + "Thread 0x0 (most recent call first):\n  File main\n")
    assert shown.startswith("Thread 0x0 (") and shown.endswith("left out\n") and len(shown) < 70_000


@pytest.mark.parametrize("parts", [("handler",), ("handler", "python"), ("python", "handler")])
def test_the_dump_thread_may_write_late(parts):
    """Where the lock was released in the end and both have written, what the handler saw is returned: the culprit."""
    texts = {"handler": b"Thread 0x1 (most recent call first):\n", "python": stack_dump._MARK % 8 + b"Thread:\n"}
    late = b"Thread:\n" if "python" in parts else None
    assert stack_dump._split(b"".join(texts[part] for part in parts)) == (late, texts["handler"])


@pytest.mark.parametrize("length", range(len(b"Thread:\n")))
def test_half_a_text_is_not_taken(length):
    """While the dump thread is writing, there is no Python dump yet."""
    assert stack_dump._split(stack_dump._MARK % 8 + b"Thread:\n"[:length])[0] is None


# Start and close...


def test_close_leaves_nothing():
    """Descriptors, threads and the signal are as before; closing twice is allowed."""
    before = descriptors(), threading.active_count(), status(os.getpid(), "SigCgt")
    for _ in range(3):
        one = StackDumper(python_stacks)
        assert one.start() and one.fd is not None
        one.close()
        assert one.fd is None
        one.close()
    assert (descriptors(), threading.active_count(), status(os.getpid(), "SigCgt")) == before


def test_it_starts_on_any_thread(dumper):
    """Training may run in another thread than the main one, and a second job in the same process."""
    second = StackDumper(python_stacks)
    began = []
    helper = threading.Thread(target=lambda: began.append(second.start()))
    helper.start()
    helper.join(SOON)
    assert began == [True] and second._signum != dumper._signum
    assert "MainThread" in dump_stacks(current_process(), second.fd, Deadline(SOON))
    second.close()
    assert "MainThread" in dump_stacks(current_process(), dumper.fd, Deadline(SOON))


def test_close_waits_for_a_client_but_not_for_long():
    """While a client reads, the signal must stay caught: everything stays as it is, and training ends all the same."""
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
    """The parent writes its stacks while the child lives; the child neither answers nor dies."""
    source = """
child = os.fork()
if child == 0:
    sys.stdin.readline()
    dumper.close()
    print("child unhurt", flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent unhurt", flush=True)
sys.stdin.readline()
"""
    with dumping(source) as (other, identity, fd):
        for _ in range(3):
            assert "MainThread" in dump_stacks(identity, fd, Deadline(SOON))
        other.say("go on")
        assert (other.line(), other.line()) == ("child unhurt", "parent unhurt")
        assert "MainThread" in dump_stacks(identity, fd, Deadline(SOON))
        other.say("go on")
        assert other.end() == 0


def test_it_delays_no_exit():
    """A process that does not close its dumper ends at once and cleanly, also by an exception."""
    for source, code in (("sys.exit(7)", 7), ("raise KeyError", 1)):
        with dumping(source) as (other, identity, _fd):
            assert other.end() == code
            assert judge(identity) == "gone"


def test_without_room_nothing_is_left_behind():
    """Without descriptors, threads or signals: False, and the last of them are left for training."""
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


def test_where_pids_mean_other_processes_nothing_is_read(monkeypatch):
    """Without a /proc of this PID namespace, the files of a pid would be another process's."""
    monkeypatch.setattr("forgather_control.processes.proc.psutil", lambda: None)
    with pytest.raises(FindError, match="cannot be seen from here"):
        dump_stacks(current_process(), 3, Deadline(1.0))
