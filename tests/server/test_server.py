"""One thread for all connections: half lines, floods, slow readers, forks, other users, no files, and the end."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import resource
import select
import signal
import socket
import subprocess
import threading
import time

import psutil
import pytest

from forgather_control.deadline import Deadline
from forgather_control.errors import InvalidParams, NotCancellable
from forgather_control.server import limits
from forgather_control.server.budget import CpuBudget
from forgather_control.server.dispatcher import PENDING, Deferred
from forgather_control.server.server import Server
from forgather_control.wire import limits as wire_limits

from ..support.harness import (
    MS,
    ROOT,
    SOON,
    TOKEN,
    Process,
    Wire,
    descriptors,
    job_process,
    needs,
    needs_root,
    remove_folder,
    serving,
    serving_tcp,
    strict,
    until,
)


class Answers:
    """What the server under test answers: ping, echo, big N, fail, crash, odd, hold (blocks), later KEY."""

    def __init__(self):
        self.given, self.asked = {}, []
        self.held, self.release = threading.Event(), threading.Event()

    def __call__(self, request, sink):
        self.asked.append(request.method)
        if request.method == "later":
            return Deferred(lambda: self.given.get(request.params[0], PENDING))
        if request.method == "big":
            return "x" * request.params[0]
        if request.method == "fail":
            raise NotCancellable("no")
        if request.method == "crash":
            raise RuntimeError("as the test wants it")
        if request.method == "odd":
            return object()
        if request.method == "hold":
            self.held.set()
            assert self.release.wait(SOON)
        elif request.method not in ("ping", "echo"):
            raise InvalidParams("unknown")
        return request.params


@pytest.fixture(autouse=True)
def nothing_is_left():
    """After each test there are no more threads and descriptors than before, and maybe fewer of earlier tests."""
    threads, files, callbacks = threading.active_count(), descriptors(), len(gc.callbacks)
    yield
    _close(_connected)
    until(lambda: threading.active_count() <= threads and descriptors() <= files)
    assert len(gc.callbacks) <= callbacks


@pytest.fixture
def path(jobs_dir):
    """Where the server listens."""
    jobs_dir.mkdir(mode=0o700)
    return jobs_dir / "s"


@pytest.fixture
def answers():
    """What the server answers, to be looked into."""
    return Answers()


@pytest.fixture
def control(path, answers):
    """A running server."""
    with serving(path, answers) as control:
        yield control


@pytest.fixture
def unbounded(monkeypatch):
    """A server that may take a whole core: for tests of much work that are not about the budget."""
    monkeypatch.setattr(limits, "CPU_SHARE", 1.0)


def _line(method, *params, id=1):
    return json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).encode() + b"\n"


def _rss():
    return psutil.Process().memory_info().rss


def _accepted(path):
    """How many connections to the socket this process has accepted."""
    sockets = psutil.Process().net_connections("unix")
    return sum(sock.laddr == str(path) for sock in sockets) - 1  # one listens


def _is_closed(sock):
    """Whether the other end has closed, asked without reading."""
    poller = select.poll()
    poller.register(sock, 0)
    return any(events & select.POLLHUP for _fd, events in poller.poll(0))


_connected = []  # closed after the test at the latest


def _connect(path, count):
    socks = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(count)]
    _connected.extend(socks)
    for sock in socks:
        sock.connect(str(path))
    return socks


def _close(socks):
    while socks:
        socks.pop().close()


@pytest.fixture
def many_files():
    """Room for thousands of descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Lines...


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b" \t\r\n"])
def test_a_line_in_one_byte_writes(control, path, end):
    """However a line arrives, and whatever white space closes it, it is answered once."""
    with Wire(path) as wire:
        for byte in _line("echo", "a", id="bytes").rstrip(b"\n") + end:
            wire.send(bytes([byte]))
        assert wire.reply() == {"jsonrpc": "2.0", "id": "bytes", "result": ["a"]}
        wire.still_answers()


def test_blank_lines_get_no_reply(control, path):
    """Empty, or only white space, before, between and after requests, and at the end of the stream."""
    with Wire(path) as wire:
        wire.send(b"\n\r\n \t \n" + _line("echo", id=1) + b"\r\n" + _line("echo", id=2) + b"\n \r")
        wire.sock.shutdown(socket.SHUT_WR)
        assert [wire.reply()["id"], wire.reply()["id"]] == [1, 2] and wire.line() == b""


def test_a_blank_line_that_is_too_long_is_refused(control, path):
    """Like any other: what follows a part of it is no line."""
    with Wire(path) as wire:
        wire.send(b" " * (wire_limits.MAX_LINE + 1) + _line("echo"))
        assert wire.reply()["error"]["code"] == -32600 and wire.line() == b""


def test_the_handler_is_told_the_peer(path, answers):
    """The kernel's word over the socket; over TCP there is none."""
    seen = []
    with serving_tcp(lambda request, sink: seen.append(sink.peer), path=path) as control:
        with Wire(path) as wire, Wire(control.at) as remote:
            wire.call("ping")
            remote.authenticate()
        with Process(OTHER_USER, str(path), str(os.geteuid())) as other:
            other.say("")
            other.line()
            assert seen == [
                ("socket", os.geteuid(), os.getpid()),
                ("tcp", None, None),
                ("socket", os.geteuid(), other.pid),
            ]


def test_several_requests_in_one_packet(control, path):
    """Two and a half lines in one write: two replies in order, the third when its end has come."""
    with Wire(path) as wire:
        whole = _line("echo", "3", id=3)
        wire.send(_line("echo", "1", id=1) + _line("echo", "2", id=2) + whole[:20])
        assert [wire.reply()["id"], wire.reply()["id"]] == [1, 2]
        with Wire(path) as other:
            other.still_answers()  # half a line delays no other client
        wire.send(whole[20:])
        assert wire.reply()["id"] == 3


def test_no_newline_before_the_end(control, path):
    """``printf '{...}' | nc`` is answered, and then the connection is closed."""
    with Wire(path) as wire:
        wire.send(_line("echo", "a")[:-1])
        wire.sock.shutdown(socket.SHUT_WR)
        assert wire.reply()["result"] == ["a"] and wire.line() == b""


def test_a_half_closed_client_gets_its_late_reply(control, path, answers):
    """A client that has shut down its writing side still gets its replies, then the end of the stream."""
    with Wire(path) as wire:
        wire.send(_line("later", "x", id=1) + _line("echo", id=2))
        wire.sock.shutdown(socket.SHUT_WR)
        assert wire.reply()["id"] == 2
        answers.given["x"] = "at last"
        control.wake()
        assert wire.reply() == {"jsonrpc": "2.0", "id": 1, "result": "at last"} and wire.line() == b""


@needs("socat")
def test_socat_waits_for_a_late_reply(control, path, answers):
    """The one-liner of the README prints the reply that takes its time."""
    command = ["socat", "-t", "20", "-", f"UNIX-CONNECT:{path}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as socat:
        socat.stdin.write(_line("later", "x"))
        socat.stdin.close()
        until(lambda: answers.asked)
        answers.given["x"] = "at last"
        control.wake()
        assert strict(socat.stdout.read())["result"] == "at last" and socat.wait(SOON) == 0


def test_replies_come_when_they_are_ready(control, path, answers):
    """A quick request overtakes a slow one on the same connection; the id says which is which."""
    with Wire(path) as wire:
        wire.send(_line("later", "b", id="slow") + _line("later", "a", id="slower") + _line("echo", id="quick"))
        assert wire.reply()["id"] == "quick"
        for key, id_ in (("b", "slow"), ("a", "slower")):
            answers.given[key] = key
            control.wake()
            assert wire.reply() == {"jsonrpc": "2.0", "id": id_, "result": key}


def test_100_mb_without_a_newline(control, path, unbounded):
    """A line without end is refused once, the connection closed, and no memory taken for it."""
    chunk = b"x" * (1 << 20)
    with Wire(path) as wire, Wire(path) as other:
        other.still_answers()
        before = _rss()
        for _ in range(100):
            wire.send(chunk)
        assert wire.reply()["error"]["code"] == -32600 and wire.line() == b""
        other.still_answers()
    assert _rss() - before < 10 << 20


def test_a_client_that_is_still_sending_reads_why_it_was_refused(path, answers, unbounded):
    """Over TCP a socket that is closed with unread bytes would reset the connection; the client may read late."""
    with serving_tcp(answers, path=path) as control:
        for where in (path, control.at):
            with Wire(where) as wire:
                if where != path:
                    wire.authenticate()
                wire.send(_line("echo", id="first") + b"x" * (4 << 20))
                assert wire.reply()["id"] == "first" and wire.reply()["error"]["code"] == -32600
                wire.send(_line("echo", id="dropped"))
                assert wire.line() == b""


@pytest.mark.once
def test_a_client_that_sends_without_end_is_cut_off(control, path, answers, monkeypatch):
    """After the time in which others would have read their reply."""
    monkeypatch.setattr(limits, "STALL_TIMEOUT", 0.2)
    monkeypatch.setattr(limits, "TICK_PERIOD", 0.1)
    with Wire(path) as wire, pytest.raises(OSError):
        deadline = Deadline(SOON)
        while not deadline.passed():
            wire.sock.sendall(b"x" * (1 << 20))


def test_the_longest_line_and_one_more(control, path):
    """64 KiB are a line; one byte more is an error, be its newline there or not, and ends the connection."""
    shell = _line("echo", "")[:-1]
    for more, end in ((-1, b"\n"), (0, b"\n"), (1, b"\n"), (1, b"")):
        line = _line("echo", "x" * (wire_limits.MAX_LINE + more - len(shell)))[:-1]
        assert len(line) == wire_limits.MAX_LINE + more
        with Wire(path) as wire:
            wire.send(line + end)
            reply = wire.reply()
            assert ("result" in reply) == (more <= 0)
            if more > 0:
                assert reply["error"]["code"] == -32600 and wire.line() == b""


@pytest.mark.once
def test_any_line_is_answered_or_closed(control, path, unbounded):
    """3,000 seeded lines, half of them a valid request broken somewhere, in random pieces: the server answers on."""
    rng = random.Random(20)
    good = [_line("echo", "ä", {"a": [1, 2.5, None]}), _line("later", "never"), _line("crash")]
    good.append(b"[" + _line("echo")[:-1] + b"]\n")
    wire = Wire(path)
    for number in range(3000):
        data = bytearray(rng.choice(good) if rng.random() < 0.5 else rng.randbytes(rng.randrange(80)) + b"\n")
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        while data:
            size = rng.choice((1, 7, 1000))
            wire.send(bytes(data[:size]))
            del data[:size]
        if number % 500 == 499:
            wire.send(b"\n")
            wire.still_answers()
            wire.close()
            wire = Wire(path)
    wire.close()
    with Wire(path) as wire:
        wire.still_answers()


# Many, slow, and greedy clients...


@pytest.mark.once
def test_ten_thousand_requests_before_the_first_reply_is_read(control, path, unbounded):
    """The server stops reading from a client that only writes: memory is bounded, and no reply is lost."""
    lines = b"".join(_line("big", 100, id=number) for number in range(10_000))
    with Wire(path) as other, Wire(path) as wire:
        other.still_answers()
        before, sent = _rss(), 0
        wire.sock.setblocking(False)
        while select.select([], [wire.sock], [], 200 * MS)[1]:
            sent += wire.sock.send(lines[sent : sent + 65536])
        assert 0 < sent < len(lines), "the server stopped reading"
        other.still_answers()
        assert _rss() - before < 10 << 20
        wire.sock.settimeout(SOON)
        rest = threading.Thread(target=wire.send, args=(lines[sent:],))
        rest.start()
        assert [wire.reply()["id"] for _ in range(10_000)] == list(range(10_000))
        rest.join(SOON)
        wire.still_answers()


@pytest.mark.parametrize("half_closed", [False, True])
def test_no_request_is_forgotten_behind_a_full_buffer(control, path, unbounded, half_closed):
    """200 requests in one packet, replies far beyond the buffer: read later, each is there, though no more is sent."""
    with Wire(path) as wire:
        wire.send(b"".join(_line("big", 10_000, id=number) for number in range(200)))
        if half_closed:
            wire.sock.shutdown(socket.SHUT_WR)
        with Wire(path) as other:
            for _ in range(5):
                other.still_answers()  # the first client's buffer is full now
        assert [wire.reply()["id"] for _ in range(200)] == list(range(200))
        assert not half_closed or wire.line() == b""


def test_a_reader_that_stands_still_is_dropped(path, answers, monkeypatch):
    """After STALL_TIMEOUT without progress, and no earlier; a client that waits for an answer is kept."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    monkeypatch.setattr(limits, "STALL_TIMEOUT", 300 * MS)
    with serving(path, answers) as control, Wire(path) as slow, Wire(path) as patient:
        patient.send(_line("later", "x"))
        start = time.monotonic()
        slow.send(_line("big", 1 << 20))
        until(lambda: _is_closed(slow.sock))
        assert time.monotonic() - start >= 300 * MS
        answers.given["x"] = 1
        control.wake()
        assert patient.reply()["result"] == 1


def test_who_hung_up_while_waiting_is_let_go(path, answers, monkeypatch):
    """A client that disappears before its answer costs no descriptor until then."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    with serving(path, answers):
        before = descriptors()
        with Wire(path) as wire:
            wire.send(_line("later", "never"))
            until(lambda: answers.asked)
        until(lambda: descriptors() == before)


def test_a_thousand_idle_connections(control, path, many_files):
    """They cost no thread and below 5 MB, the owner is answered beside them, and all may hang up at once."""
    with Wire(path) as wire:
        wire.still_answers()
        threads, before = threading.active_count(), _rss()
        idle = _connect(path, 1000)
        until(lambda: _accepted(path) == 1001)
        assert threading.active_count() <= threads and _rss() - before < 5 << 20
        wire.still_answers()
        _close(idle)
        wire.still_answers()
        until(lambda: _accepted(path) == 1)


def test_two_hundred_idle_and_one_real_client(control, path, many_files):
    """A newcomer behind 200 that say nothing has its answer; how soon is for the benchmarks."""
    idle = _connect(path, 200)
    with Wire(path) as wire:
        wire.still_answers()
    _close(idle)


@pytest.mark.parametrize("half", [b"", b'{"jsonrpc"'], ids=["silent", "half a line"])
def test_beyond_the_limit_the_idlest_goes(path, answers, monkeypatch, half):
    """The owner can always connect: the connection that is idle the longest is closed, even one with half a line."""
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 8)
    with serving(path, answers), Wire(path) as first:
        first.still_answers()
        base = descriptors() - 2
        idle = _connect(path, 7)
        for sock in idle:  # one after the other: its reply proves that the server has read the half line, too
            sock.settimeout(SOON)
            sock.sendall(_line("x") + half)
            assert sock.recv(4096).endswith(b"\n")
        assert descriptors() == base + 16
        first.still_answers()  # so it is not the idlest any more
        with Wire(path) as owner:
            owner.still_answers()
            assert [_is_closed(sock) for sock in idle] == [True] + [False] * 6 and not _is_closed(first.sock)
            flood = _connect(path, 30)
            until(lambda: descriptors() <= base + 8 + 39)
            with Wire(path) as late:
                late.still_answers()
        _close([*idle, *flood])


#: A server whose process takes all of its descriptors at "full", and lets go of some at "free".
STARVED = """
import resource, sys, threading, time
from forgather_control.server.server import Server
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]),) * 2)
server = Server(lambda request, sink: request.params, lambda: None)
server.listen(sys.argv[1])
server.start()
files = []
print("ready", flush=True)
for line in sys.stdin:
    if line == "full\\n":
        try:
            while True:
                files.append(open("/dev/null"))
        except OSError:
            pass
    elif line == "free\\n":
        while files:
            files.pop().close()
    print(time.process_time(), flush=True)
server.close(5.0)
print(threading.active_count(), flush=True)
"""


@pytest.mark.once
def test_without_descriptors_the_server_waits_and_recovers(path):
    """While the process can open no file, new clients wait at no cost; they are answered when it can again."""
    with Process(STARVED, str(path), "64") as job:
        assert job.line() == "ready"
        with Wire(path) as early:
            early.still_answers()
            job.say("full")
            used = float(job.line())
            with Wire(path) as late:
                late.send(_line("echo", id="late"))
                assert not select.select([late.sock], [], [], 1000 * MS)[0], "it cannot be in"
                early.still_answers()
                job.say("free")
                assert float(job.line()) - used < 0.3
                assert late.reply()["id"] == "late"
        flood = _connect(path, 100)
        with Wire(path) as owner:
            owner.still_answers()
        _close(flood)
        job.popen.stdin.close()
        assert job.line() == "1" and job.end() == 0


#: Twenty connections that send valid requests as fast as they can, and read what comes.
FLOOD = """
import selectors, socket, sys, time
lines = b'{"jsonrpc":"2.0","id":1,"method":"echo","params":["x"]}\\n' * 500
selector, sent = selectors.DefaultSelector(), {}
for _ in range(20):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    sock.setblocking(False)
    selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
    sent[sock] = 0
print("ready", flush=True)
while True:
    for key, events in selector.select():
        if events & selectors.EVENT_READ and not key.fileobj.recv(65536):
            sys.exit("closed")
        if events & selectors.EVENT_WRITE:
            place = sent[key.fileobj] % len(lines)
            sent[key.fileobj] += key.fileobj.send(lines[place : place + 8192])
    time.sleep(0.001)
"""


@pytest.mark.once
def test_a_flood_is_held_to_its_share(path):
    """20 connections that never stop share little of a core; an ordinary caller has its answer within a second."""
    with Process(STARVED, str(path), "1024") as job:
        assert job.line() == "ready"
        with Process(FLOOD, str(path)) as flood:
            assert flood.line() == "ready"
            job.say("how much")
            used, start, slowest = float(job.line()), time.monotonic(), 0.0
            while time.monotonic() < start + 2.5:
                asked = time.monotonic()
                with Wire(path) as wire:
                    wire.still_answers()
                slowest = max(slowest, time.monotonic() - asked)
            job.say("how much")
            share = (float(job.line()) - used) / (time.monotonic() - start)
            assert flood.popen.poll() is None, flood.errors
        assert 0.02 < share < 0.15 and slowest < 1.5


def test_the_burst_stays_within_what_is_promised():
    """The README's "at most 5 % of one core" holds over any six seconds, with all that may be saved up in them."""
    assert 6 * limits.CPU_SHARE + limits.CPU_BURST + limits.CPU_SLICE <= 6 * 0.05
    assert "at most 5 % of one core" in " ".join((ROOT / "README.md").read_text().split())


# Forks and other users...

#: A server with one connected client that forks a child; the child prints its pid, then waits.
FORKS = """
import os, sys
from forgather_control.jobs.directory import JobDirectory
from forgather_control.server.server import Server
server = Server(lambda request, sink: {"pid": os.getpid()}, lambda: None)
job = JobDirectory("job", server.listen, 1)
job.claim()
server.start()
print("ready", flush=True)
sys.stdin.readline()
out, held = os.pipe()
child = os.fork()
if child == 0:
    os.close(held)
    os.write(1, b"%d\\n" % len(os.listdir("/proc/self/fd")))  # whole: the parent prints at the same time
    os.read(out, 1)
    server.wake(); server.close(5.0)
    sys.exit(0)
os.write(1, b"%d\\n" % child)
sys.stdin.readline()
os.write(held, b"x")
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def forked(jobs_dir):
    """A job, a connection to it that is older than its forked child, and the child's pid."""
    with Process(FORKS) as job:
        assert job.line() == "ready"
        with Wire(jobs_dir / "job" / "control.sock") as wire:
            wire.still_answers()
            job.say("fork")
            pid, files = sorted(map(int, (job.line(), job.line())), reverse=True)
            assert files <= 7, "standard streams, the test's pipe, and the directory that is listed"
            try:
                yield job, wire, pid
            finally:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass


def test_a_forked_child_does_not_keep_the_socket_alive(forked, jobs_dir):
    """The parent killed, its child alive: open connections end, new ones are refused at once."""
    job, wire, pid = forked
    job.kill()
    assert wire.line() == b"" and psutil.pid_exists(pid)
    with pytest.raises(ConnectionRefusedError):
        Wire(jobs_dir / "job" / "control.sock")


def test_a_forked_child_disturbs_nothing(forked, jobs_dir):
    """Before, while and after it ends as a process should, the parent's connections and files stay as they are."""
    job, wire, _ = forked
    wire.still_answers()
    before = {name: os.lstat(jobs_dir / "job" / name).st_ino for name in os.listdir(jobs_dir / "job")}
    job.say("end the child")
    assert job.line() == "0"
    wire.still_answers()
    assert wire.call("pid")["result"]["pid"] == job.pid
    assert {name: os.lstat(jobs_dir / "job" / name).st_ino for name in os.listdir(jobs_dir / "job")} == before
    with Wire(jobs_dir / "job" / "control.sock") as late:
        late.still_answers()


#: Connects as another user, sends a ping, and prints what comes back.
OTHER_USER = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
for _ in sys.stdin:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        try:
            sock.connect(sys.argv[1])
            sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"ping"}\\n')
            print(sock.recv(1000), flush=True)
        except OSError as err:
            print(type(err).__name__, flush=True)
"""


@needs_root
def test_another_user_is_refused_by_the_kernels_word(control, path, answers, caplog):
    """Even where all modes are open, another uid gets no answer; root and the owner do."""
    path.parent.parent.chmod(0o755)
    with Process(OTHER_USER, str(path), "65534") as other, Process(OTHER_USER, str(path), "0") as friend:
        other.say("")
        assert other.line() == "PermissionError", "closed modes keep it out in the first place"
        path.parent.chmod(0o777)
        path.chmod(0o777)
        for _ in range(3):
            other.say("")
            assert other.line() in ("b''", "ConnectionResetError", "BrokenPipeError")
        friend.say("")
        assert b'"result"' in friend.line().encode() and answers.asked == ["ping"]
    assert "Refused a connection from uid 65534" in caplog.text


@needs_root
def test_root_may_control_an_ordinary_users_job(path):
    """A job of the user nobody accepts connections of root."""
    program = """
    import os, sys
    from forgather_control.server.server import Server
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    server = Server(lambda request, sink: os.getuid(), lambda: None)
    server.listen(sys.argv[1]); server.start()
    print("ready", flush=True)
    sys.stdin.read()
    """
    path.parent.parent.chmod(0o755)
    os.chown(path.parent, 65534, 65534)
    with Process(program, str(path)) as job:
        assert job.line() == "ready"
        with Wire(path, made_up=True) as wire:
            assert wire.call("ping")["result"] == 65534


# Faults, wakes and the end...


def test_a_crash_in_an_answer_ends_nothing(control, path):
    """Each caller gets an error, each connection goes on."""
    with Wire(path) as wire, Wire(path) as other:
        for method in ("crash", "odd", "fail"):
            assert "error" in wire.call(method, [])
            wire.still_answers()
        other.still_answers()


def test_a_crash_in_a_tick_ends_nothing(path, answers, monkeypatch, caplog):
    """It is logged, and the tick is called again."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 10 * MS)
    ticks = []

    def tick():
        ticks.append(1)
        raise RuntimeError("as the test wants it")

    with serving(path, answers, tick), Wire(path) as wire, caplog.at_level(logging.ERROR):
        until(lambda: len(ticks) > 3)
        wire.still_answers()
    assert (
        "Internal error in the control server (recovered): as the test wants it" in caplog.text
        and "as the test wants it" in caplog.text
    )


def test_a_tick_that_crashes_delays_no_reply(path, answers, monkeypatch):
    """The pause after a failure is the tick's, not the thread's."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 1000 * MS)
    ticked = threading.Event()

    def tick():
        ticked.set()
        raise RuntimeError("as the test wants it")

    with serving(path, answers, tick), Wire(path) as wire:
        assert ticked.wait(SOON)
        start = time.monotonic()
        wire.still_answers()
        assert time.monotonic() - start < 500 * MS


def test_a_tick_that_keeps_crashing_is_called_ever_more_rarely(answers):
    """After 1, 3, 7, ... 31 skipped periods; after a success in each again."""
    calls, now, broken = [], 0, True

    def tick():
        calls.append(now)
        if broken:
            raise RuntimeError("as the test wants it")

    control = Server(answers, tick)
    for now in range(70):
        broken = now < 60
        control._try_tick()
    assert calls == [0, 2, 6, 14, 30, *range(62, 70)]
    control.close(SOON)


def test_a_tick_comes_by_itself_and_under_load(path, answers, monkeypatch):
    """The housekeeping is neither waiting for a request nor kept from its turn by many."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 50 * MS)
    ticks = []
    with serving(path, answers, lambda: ticks.append(threading.current_thread().name)), Wire(path) as wire:
        until(lambda: len(ticks) > 2)
        wire.send(_line("echo") * 1000)
        seen = len(ticks)
        until(lambda: len(ticks) > seen + 2)
        assert set(ticks) == {"forgather-control"}


def test_a_tick_comes_however_far_the_budget_is_overdrawn(path, answers, monkeypatch):
    """The thread does nothing for a while, but not for longer than a tick."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 10 * MS)
    monkeypatch.setattr(CpuBudget, "throttle_delay", lambda budget: 10 * SOON)
    ticks = []
    with serving(path, answers, lambda: ticks.append(1)):
        until(lambda: len(ticks) > 3)


def test_a_wake_never_blocks(control, path, answers):
    """100,000 wakes while the thread stands still, and more after the end, return at once."""
    with Wire(path) as wire:
        wire.send(_line("hold"))
        assert answers.held.wait(SOON)
        start = time.monotonic()
        for _ in range(100_000):
            control.wake()
        assert time.monotonic() - start < 5
        answers.release.set()
        wire.reply()
        wire.still_answers()
    control.close(SOON)
    control.wake()


def test_a_client_that_hangs_up_is_no_signal(path):
    """Even where SIGPIPE has its default action, a reply to a client that has left does not end the process."""
    program = """
    import signal, sys
    from forgather_control.server.dispatcher import PENDING, Deferred
    from forgather_control.server.server import Server
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    given = []
    answer = lambda request, sink: Deferred(lambda: given[0] if given else PENDING) if request.method == "later" else 1
    server = Server(answer, lambda: None)
    server.listen(sys.argv[1]); server.start()
    print("ready", flush=True)
    sys.stdin.readline()
    given.append("x" * 100)
    server.wake()
    print("alive", flush=True)
    sys.stdin.read()
    """
    with Process(program, str(path)) as job:
        assert job.line() == "ready"
        with Wire(path) as wire, Wire(path) as other:
            wire.send(_line("later", "x"))
            wire.still_answers()
            wire.close()
            other.send(_line("later", "x"))
            other.still_answers()
            job.say("answer")
            assert job.line() == "alive" and other.reply()["result"] == "x" * 100


def test_listening_again_keeps_who_is_connected(path, answers):
    """A new socket file replaces the old one; a path that cannot be had leaves all as it was."""
    with serving(path, answers) as control, Wire(path) as wire:
        wire.still_answers()
        moved = path.with_name("moved")
        ticked = threading.Event()

        def again():
            with pytest.raises(OSError):
                control.listen(str(path.parent / "missing" / "s"))
            control.listen(str(moved))
            ticked.set()

        control._dispatcher._handler = lambda request, sink: (
            again() if request.method == "again" else answers(request, sink)
        )
        assert wire.call("again")["result"] is None and ticked.is_set()
        wire.still_answers()
        with Wire(moved) as late:
            late.still_answers()
        with pytest.raises(ConnectionRefusedError):
            Wire(path)


def test_listening_again_loses_nobody_who_has_connected(path, answers):
    """A client in the backlog of the old socket is answered over it."""
    entered, go = threading.Event(), threading.Event()

    def answer(request, sink):
        if request.method == "move":
            entered.set()
            assert go.wait(SOON)
            os.unlink(path)
            control.listen(str(path))
        return answers(request, sink)

    with serving(path, answer) as control, Wire(path) as one:
        one.send(b'{"jsonrpc":"2.0","id":1,"method":"move"}\n')
        assert entered.wait(SOON)
        with Wire(path) as other:
            other.send(b'{"jsonrpc":"2.0","id":2,"method":"ping"}\n')
            go.set()
            assert other.reply()["id"] == 2 and one.reply()["id"] == 1


def test_at_the_end_everybody_is_answered(path, answers):
    """Waiting requests, ready values, unread requests and clients in the backlog are answered, then comes the end."""
    with serving(path, answers) as control, Wire(path) as waiting, Wire(path) as holding:
        waiting.send(_line("later", "never", id=1) + _line("later", "ready", id=2))
        until(lambda: answers.asked == ["later", "later"])
        holding.send(_line("hold", id="held"))
        assert answers.held.wait(SOON)
        with Wire(path) as backlog:
            backlog.send(_line("echo", "in time"))
            waiting.send(_line("echo", id=3))
            answers.given["ready"] = True
            closing = threading.Thread(target=control.close, args=(SOON,))
            closing.start()
            until(lambda: control._closing)
            answers.release.set()
            closing.join(SOON)
            assert holding.reply()["id"] == "held" and backlog.reply()["result"] == ["in time"]
            replies = {reply["id"]: reply for reply in (waiting.reply() for _ in range(3))}
            assert replies[1]["error"]["code"] == -32006 and replies[2]["result"] is True and "result" in replies[3]
            assert [wire.line() for wire in (waiting, holding, backlog)] == [b""] * 3
    with pytest.raises(ConnectionRefusedError):
        Wire(path)


def test_closing_is_not_delayed_by_the_silent(path, answers):
    """A hundred idle clients and half lines cost nothing at the end; one that does not read, half a second."""
    with serving(path, answers) as control:
        idle = _connect(path, 100)
        idle[0].sendall(b'{"half')
        start = time.monotonic()
        control.close(SOON)
        assert time.monotonic() - start < limits.CLOSE_GRACE
        assert all(_is_closed(sock) for sock in idle)
        _close(idle)
    path.unlink()
    with serving(path, answers) as control, Wire(path) as deaf:
        deaf.send(_line("big", 1 << 20))
        until(lambda: "big" in answers.asked)
        start = time.monotonic()
        control.close(SOON)
        assert time.monotonic() - start < limits.CLOSE_GRACE + 1


def test_a_slow_reader_may_take_its_last_reply(path, answers):
    """A reply larger than the socket's buffer, under way when the server closes, arrives whole."""
    with serving(path, answers) as control, Wire(path) as wire:
        wire.send(_line("big", 1 << 20))
        until(lambda: "big" in answers.asked)
        closing = threading.Thread(target=control.close, args=(SOON,))
        closing.start()
        assert len(wire.reply()["result"]) == 1 << 20 and wire.line() == b""
        closing.join(SOON)


def test_every_order_of_life_ends_well(path, answers):
    """Closed unstarted, closed twice, unable to listen, closed by its own thread: nothing is left (see the fixture)."""
    Server(answers, lambda: None).close(SOON)
    never = Server(answers, lambda: None)
    with pytest.raises(OSError):
        never.listen(str(path / "missing"))
    never.listen(str(path))
    never.close(SOON)
    never.close(SOON)
    path.unlink()
    holder = []
    own = Server(answers, lambda: holder[0].close(SOON))
    holder.append(own)
    own.listen(str(path))
    own._tick()
    own.close(SOON)


def test_a_server_closed_by_its_own_tick_leaves_nothing(path, answers, monkeypatch):
    """When the thread that trained is gone, the server ends itself: thread, sockets and pipe."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 10 * MS)
    control = Server(answers, lambda: control.close(SOON))
    control.listen(str(path))
    control.start()
    until(lambda: "forgather-control" not in {thread.name for thread in threading.enumerate()})


def test_the_socket_is_private(control, path):
    """Mode 0600 in a directory of 0700, and its peers are known by uid."""
    assert os.stat(path).st_mode & 0o777 == 0o600 and os.stat(path.parent).st_mode & 0o777 == 0o700


def test_a_running_job_counts_as_a_whole(jobs_dir):
    """In a job of its own: one thread more than without control, and a thousand connections change nothing."""
    with job_process() as job:
        process = psutil.Process(job.pid)
        threads = process.num_threads()
        socks = _connect(jobs_dir / "job" / "control.sock", 300)
        with Wire(jobs_dir / "job" / "control.sock") as wire:
            wire.still_answers()
            assert process.num_threads() == threads
            _close(socks)
            wire.still_answers()
            remove_folder(jobs_dir)
            wire.still_answers()


@pytest.mark.parametrize("taken_by", ["a file", "the next connection"])
def test_a_connection_whose_descriptor_other_code_closed(taken_by, path, answers, monkeypatch, tmp_path):
    """The number's new owner is neither taken for that client nor closed, and other clients are served."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    with serving(path, answers) as control, Wire(path, made_up=True) as lost:
        lost.still_answers()
        [connection] = until(lambda: [each for each in control._connections if each.watched])
        if taken_by == "a file":
            with open(tmp_path / "file", "w") as file:
                os.dup2(file.fileno(), connection.fd)
            until(lambda: not list(control._connections))
            os.close(connection.fd)
        with socket.socket(socket.AF_UNIX) as sock:
            if taken_by == "the next connection":
                os.close(connection.fd)
            sock.connect(str(path))
            with Wire(sock, made_up=True) as wire:
                wire.still_answers()
                wire.still_answers()
                assert taken_by == "a file" or [each.fd for each in control._connections] == [connection.fd]


# Over TCP; authentication is in test_auth...


def _let_in(control):
    wire = Wire(control.at)
    wire.authenticate()
    return wire


def test_ten_thousand_pipelined_requests_over_tcp_come_back_in_order(answers, unbounded):
    """Written without reading first: the server stops listening, memory is bounded, and no reply is lost."""
    lines = b"".join(_line("big", 100, id=number) for number in range(10_000))
    with serving_tcp(answers) as control, _let_in(control) as other, _let_in(control) as wire:
        before, sent = _rss(), 0
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        wire.sock.setblocking(False)
        while sent < len(lines) and select.select([], [wire.sock], [], 200 * MS)[1]:
            sent += wire.sock.send(lines[sent : sent + 65536])
        other.still_answers()
        assert _rss() - before < 10 << 20
        wire.sock.settimeout(SOON)
        rest = threading.Thread(target=wire.send, args=(lines[sent:],))
        rest.start()
        assert [wire.reply()["id"] for _ in range(10_000)] == list(range(10_000))
        rest.join(SOON)
        wire.still_answers()


def test_who_sends_and_never_reads_over_tcp_is_not_listened_to_and_then_dropped(answers, monkeypatch, unbounded):
    """Beyond MAX_UNSENT its requests wait; after MAX_STALL without progress it is gone; others notice nothing."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    monkeypatch.setattr(limits, "STALL_TIMEOUT", 300 * MS)
    with serving_tcp(answers) as control, _let_in(control) as other, _let_in(control) as deaf:
        before = descriptors()
        deaf.send(_line("big", 32 << 20) + _line("echo", "never asked"))
        until(lambda: "big" in answers.asked)
        other.still_answers()
        until(lambda: descriptors() == before - 1)  # over TCP the end of the stream, too, waits until the client reads
        other.still_answers()
        assert "echo" not in answers.asked


def test_who_is_silent_for_long_over_tcp_is_let_go(answers, monkeypatch, path):
    """The other host may have vanished; a client that waits for an answer stays, and so do those of the Unix socket."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    monkeypatch.setattr(limits, "IDLE_TIMEOUT", 300 * MS)
    with serving_tcp(answers, path=path) as control, Wire(path) as local, _let_in(control) as waiting:
        local.still_answers()
        waiting.send(_line("later", "x"))
        with _let_in(control) as silent:
            assert silent.is_closed()
        answers.given["x"] = 1
        control.wake()
        assert waiting.reply()["result"] == 1
        local.still_answers()


def test_at_the_end_who_shows_the_token_is_answered_and_strangers_are_not(answers):
    """Also from the backlog; a wrong token and half a line are simply closed, without delay."""
    with serving_tcp(answers) as control, _let_in(control) as holding:
        holding.send(_line("hold", id="held"))
        assert answers.held.wait(SOON)
        with Wire(control.at) as owner, Wire(control.at) as wrong, Wire(control.at) as half:
            owner.send(_line("authenticate", TOKEN, id="auth") + _line("echo", "in time", id="echo"))
            wrong.send(_line("authenticate", "guess") + _line("echo", "no"))
            half.send(b'{"jsonrpc"')
            closing = threading.Thread(target=control.close, args=(SOON,))
            closing.start()
            until(lambda: control._closing)
            answers.release.set()
            closing.join(SOON)
            assert holding.reply()["id"] == "held"
            # The handler does not know "authenticate", but the authenticator has accepted it.
            assert [owner.reply()["id"] for _ in range(2)] == ["auth", "echo"]
            assert wrong.is_closed() and half.is_closed()
    assert answers.asked.count("echo") == 1


def test_connections_over_tcp_cost_no_thread_and_leave_nothing(answers, many_files):
    """A hundred authenticated connections at once, and back to no descriptor."""
    with serving_tcp(answers) as control:
        threads, files = threading.active_count(), descriptors()
        wires = [_let_in(control) for _ in range(100)]
        assert threading.active_count() == threads and descriptors() == files + 200
        for wire in wires:
            wire.still_answers()
            wire.close()
        until(lambda: descriptors() == files)


#: Serves a port, and forks; the child says how many sockets it has left.
FORKS_TCP = """
import os, sys
from forgather_control.server.server import Server
server = Server(lambda request, sink: {"pid": os.getpid()}, lambda: None)
os.write(1, (str(server.listen_tcp("127.0.0.1", 0, sys.argv[1], None)[1]) + "\\n").encode())
server.start()
sys.stdin.readline()
child = os.fork()
if child == 0:
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    os.write(1, b"%d\\n" % sum(name.startswith("socket:") for name in names))
    sys.stdin.readline()
    os._exit(0)
os.write(1, (str(child) + "\\n").encode())
os.waitpid(child, 0)
"""


def test_a_forked_child_keeps_neither_port_nor_connections():
    """A DataLoader's worker; when the parent is killed, its port refuses connections, and open ones end."""
    with Process(FORKS_TCP, TOKEN) as process:
        at = ("127.0.0.1", int(process.line()))
        with Wire(at, made_up=True) as wire, Wire(at) as other:
            assert wire.authenticate()["result"]["pid"] == process.pid
            other.send(b" ")
            wire.still_answers()  # so the other connection is accepted
            process.say("")
            said = {process.line(), process.line()}
            assert "0" in said, said
            (child,) = said - {"0"}
            wire.still_answers()
            process.kill()
            try:
                assert wire.is_closed() and other.is_closed()
                with pytest.raises(ConnectionRefusedError):
                    Wire(at)
            finally:
                os.kill(int(child), signal.SIGKILL)
