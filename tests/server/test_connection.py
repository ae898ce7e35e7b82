"""A connection on a real socket pair: whole lines out of any cut of bytes, replies in whatever the client reads; and
subscriptions on a real server: a stream behind a reply, bounded by what its client reads.
"""

from __future__ import annotations

import json
import logging
import random
import select
import socket
import subprocess
import threading
import time
import weakref
from contextlib import closing, contextmanager

import pytest

from forgather_control.errors import InvalidParams, TooManyCommands
from forgather_control.server import limits
from forgather_control.server.connection import Connection, TlsConnection
from forgather_control.server.dispatcher import Dispatcher, Subscription
from forgather_control.server.file_requests import FileReply
from forgather_control.server.server import Server
from forgather_control.wire.tls import server_context

from ..support.harness import MS, SOON, Process, Wire, descriptors, needs, serving, serving_tcp, strict, until

MAX = 64
KINDS = [socket.AF_UNIX, socket.AF_INET]


@contextmanager
def pair(kind=socket.AF_UNIX, max_line=MAX):
    """A connection and the client's end of it."""
    if kind == socket.AF_UNIX:
        ours, theirs = socket.socketpair()
    else:
        with closing(socket.create_server(("127.0.0.1", 0))) as listener:
            theirs = socket.create_connection(listener.getsockname(), SOON)
            ours, _ = listener.accept()
    theirs.settimeout(SOON)
    with ours, theirs:
        yield Connection(ours, max_line), theirs


def arrived(connection):
    """Wait until the socket has something (bytes, or the end)."""
    assert select.select([connection.sock], [], [], SOON)[0]
    return connection


def lines(connection):
    """All lines that can be taken now."""
    return list(iter(connection.take_line, None))


@pytest.mark.parametrize("kind", KINDS, ids=["unix", "tcp"])
def test_lines_come_whole(kind):
    """Several lines in one packet, an empty one among them, and half a line that has to wait."""
    with pair(kind) as (connection, client):
        client.sendall(b'{"a":1}\n\n{"b":2}\r\n{"c"')
        arrived(connection).read()
        assert lines(connection) == [b'{"a":1}', b"", b'{"b":2}\r']
        assert not connection.is_idle
        client.sendall(b":3}\n")
        arrived(connection).read()
        assert lines(connection) == [b'{"c":3}']
        assert connection.is_idle and not connection.at_end and not connection.broken


@pytest.mark.parametrize("seed", range(5))
def test_any_cut_gives_the_same_lines(seed):
    """Byte by byte, or in random pieces: the lines do not depend on how they came."""
    rng = random.Random(seed)
    sent = [bytes(rng.choices(b'\0\r{}[]"\\\xff\xe2\x80\xa8 abc', k=rng.randrange(MAX))) for _ in range(40)]
    stream, found = b"".join(line + b"\n" for line in sent), []
    with pair() as (connection, client):
        while stream:
            cut = 1 if seed == 0 else rng.randrange(1, 2 * MAX)
            client.sendall(stream[:cut])
            stream = stream[cut:]
            while select.select([connection.sock], [], [], 0)[0]:
                connection.read()
                found += lines(connection)
        assert found == sent


def test_nothing_there():
    """Reading a quiet socket does not block, and is neither the end nor a fault."""
    with pair() as (connection, _client):
        connection.read()
        assert (connection.take_line(), connection.at_end, connection.broken) == (None, False, False)


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_last_line_needs_no_newline(end):
    """``printf '...' | nc`` is answered: at the end of the stream what is left is a line, once."""
    with pair() as (connection, client):
        client.sendall(b"first\nlast" + end)
        client.shutdown(socket.SHUT_WR)
        until(lambda: connection.read() or connection.at_end)
        assert lines(connection) == [b"first", b"last"]
        connection.send(b"reply\n")
        assert client.recv(100) == b"reply\n"
        assert connection.is_idle and not connection.broken


@pytest.mark.parametrize("length", [MAX - 1, MAX, MAX + 1])
def test_line_without_an_end(length):
    """What is longer than a line may be is handed out to be refused; what could still end is not."""
    with pair() as (connection, client):
        client.sendall(b"x" * length)
        while select.select([connection.sock], [], [], 0)[0]:
            connection.read()
        assert connection.take_line() == (b"x" * length if length > MAX else None)
        assert connection.is_idle == (length > MAX)


def test_one_read_is_bounded():
    """A client that has sent megabytes gives one line's limit a read, so that others get their turn."""
    with pair() as (connection, client):
        client.setblocking(False)
        sent = client.send(b"\n" * 100_000)
        connection.read()
        assert len(lines(connection)) == MAX < sent


@pytest.mark.parametrize("rest", [b"abort\n", b'\n{"method":"abort"}\n'])
def test_deaf_after_an_overlong_line(rest):
    """From the middle of an overlong line nothing is ever taken as a line, even if the server reads again."""
    with pair() as (connection, client):
        client.sendall(b"x" * (MAX + 1))
        while connection.take_line() is None:
            arrived(connection).read()
        connection.stop_reading()
        client.sendall(rest)
        arrived(connection).read()
        assert (connection.at_end, connection.take_line(), connection.is_idle) == (True, None, True)
        connection.send(b"too long\n")
        assert client.recv(100) == b"too long\n"


def test_slow_reader():
    """Unread replies are kept and counted, and arrive whole once the client reads."""
    reply = bytes(range(256)) * 4096
    with pair() as (connection, client):
        connection.send(reply)
        kept = connection.unsent
        assert 0 < kept < len(reply) and not connection.is_idle and not connection.broken
        connection.send(b"\n")
        assert connection.unsent == kept + 1
        got = bytearray()
        while len(got) <= len(reply):
            got += client.recv(65536)
            connection.flush()
        assert bytes(got) == reply + b"\n"
        assert connection.unsent == 0 and connection.is_idle


def test_open_request_is_not_idle():
    """A connection that waits for an answer is not the one to be closed for a new one."""
    with pair() as (connection, _client):
        connection.open += 1
        assert not connection.is_idle


@pytest.mark.parametrize("kind", KINDS, ids=["unix", "tcp"])
def test_client_is_gone(kind):
    """Writing to a client that hung up sets a state and raises nothing, and so do later writes."""
    with pair(kind) as (connection, client):
        client.close()
        until(lambda: connection.send(b"x" * 1000) or connection.broken)
        moved = connection.moved_at
        connection.send(b"y")
        connection.flush()
        assert connection.broken and connection.moved_at == moved


def test_reset_while_reading():
    """A reset connection (the client died with replies unread) breaks it without a word."""
    with pair() as (connection, client):
        connection.send(b"never read\n")
        client.close()
        connection.read()
        assert connection.broken


@pytest.mark.parametrize(
    ("how", "hung_up"),
    [
        (lambda client: None, False),
        (lambda client: client.shutdown(socket.SHUT_WR), False),
        (socket.socket.close, True),
    ],
    ids=["stays", "writes-no-more", "closes"],
)
def test_hung_up(how, hung_up):
    """A client that only finished writing still waits for its reply; one that closed does not."""
    with pair() as (connection, client):
        assert not connection.hung_up()
        how(client)
        assert connection.hung_up() is hung_up


def test_moved_at_is_progress_only():
    """The stall clock starts with bytes that moved, in either direction, and with nothing else."""
    with pair() as (connection, client):
        connection.moved_at = 0.0
        connection.read()
        connection.flush()
        assert connection.moved_at == 0.0
        client.sendall(b"a")
        arrived(connection).read()
        read_at, connection.moved_at = connection.moved_at, 0.0
        connection.send(b"b")
        assert read_at > 0 and connection.moved_at >= read_at
        client.setblocking(False)
        connection.send(b"x" * 2**22)
        connection.moved_at = 0.0
        connection.flush()
        assert connection.moved_at == 0.0


def test_nothing_waits_for_the_socket():
    """Though it is a blocking one: with nothing to read, and with a client that takes nothing, each call returns."""
    with pair() as (connection, _client):
        assert connection.sock.gettimeout() is None
        connection.read()
        connection.send(b"x" * 2**24)
        assert connection.unsent > 0 and not connection.broken and connection.take_line() is None


def test_the_limit_of_a_line_may_grow():
    """That of an unauthenticated connection is short; lines after the token may be as long as any."""
    with pair(max_line=8) as (connection, client):
        client.sendall(b"12345678\n" + b"x" * 32)
        while connection.take_line() is None:
            arrived(connection).read()
        connection.max_line = MAX
        client.sendall(b"\n")
        until(lambda: connection.read() or connection.partial_line.endswith(b"\n"))
        assert connection.partial_line == b"x" * 32 + b"\n" and lines(connection) == [b"x" * 32]


def test_half_a_line_is_shown_in_part():
    """Enough to judge it, no more."""
    with pair() as (connection, client):
        client.sendall(b"y" * 65)
        until(lambda: connection.read() or len(connection.partial_line) == 64)
        assert connection.partial_line == b"y" * 64


# TLS, as far as bytes are concerned; the rest is in test_tls...


@needs("openssl")
def test_who_does_not_speak_tls_is_told_once(pem):
    """Whatever the first byte is, if it is not that of a handshake."""
    with pair(socket.AF_INET) as (plain, client):
        connection = TlsConnection(plain.sock, MAX, server_context(pem.cert, pem.key))
        connection.read()
        assert not connection.broken  # nothing came yet
        client.sendall(b"{}\n")
        arrived(connection).read()
        assert connection.broken and json.loads(client.recv(1000))["error"]["code"] == -31025


@needs("openssl")
@pytest.mark.parametrize("data", [b"\x16", b"\x16\x03\x01\x00\x05hello"])
def test_a_reset_before_the_handshake_is_broken_not_raised(pem, data):
    """ssl closes the socket then; its number is known all the same."""
    with pair(socket.AF_INET) as (plain, client):
        connection = TlsConnection(plain.sock, MAX, server_context(pem.cert, pem.key))
        fd = connection.fd
        client.sendall(data)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        connection.read()
        assert connection.broken and connection.fd == fd
        connection.close()
        connection.close()


@needs("openssl")
def test_closed_in_the_middle_of_a_handshake(pem):
    """No goodbye is said to whom nothing was said before; closing does not raise."""
    with pair(socket.AF_INET) as (plain, client):
        connection = TlsConnection(plain.sock, MAX, server_context(pem.cert, pem.key))
        client.sendall(b"\x16\x03\x01\x02\x00")
        arrived(connection).read()
        assert not connection.broken
        connection.close()
        assert client.recv(100) == b""


# Subscriptions...


class Ring:
    """What the server under test answers, and its events: ``subscribe [SINCE]``, ``unsubscribe``, ``ping``.

    All events are kept, ``pulls`` counts the calls of subscribers, and ``pulled`` the bytes that they were given.
    """

    def __init__(self):
        self.events, self.opened, self.closed, self.pulls, self.pulled = [], 0, [], 0, 0
        self.next_at = None
        self.broken = False

    def add(self, text="x"):
        self.events.append(b'{"event":%d,"text":"%s"}\n' % (len(self.events), text.encode()))

    def __call__(self, request, sink):
        if request.method == "subscribe":
            return self.subscription(*request.params)
        if request.method == "unsubscribe":
            return sink.end_subscription()
        if request.method not in ("ping", "authenticate"):
            raise InvalidParams("unknown")
        return request.params

    def subscription(self, since=0):
        cursor, number = since, self.opened
        self.opened += 1

        def pull(size):
            nonlocal cursor
            if self.broken:
                raise RuntimeError("as the test wants it")
            data = b""
            while cursor < len(self.events) and len(data) + len(self.events[cursor]) <= size:
                data += self.events[cursor]
                cursor += 1
            self.pulls += 1
            self.pulled += len(data)
            return data

        next_at = lambda: self.next_at  # noqa: E731
        weakref.finalize(next_at, self.closed.append, number)  # when the server holds the subscription no longer
        return Subscription({"number": number}, pull, next_at)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """After each test threads and descriptors are back to where they were."""
    before = threading.active_count(), descriptors()
    yield
    until(lambda: (threading.active_count(), descriptors()) == before)


@pytest.fixture
def path(jobs_dir):
    """Where the server listens."""
    jobs_dir.mkdir(mode=0o700)
    return jobs_dir / "s"


@pytest.fixture
def ring():
    """The events, and what the server answers."""
    return Ring()


@pytest.fixture
def control(path, ring):
    """A running server."""
    with serving(path, ring) as control:
        yield control


@pytest.fixture
def unbounded(monkeypatch):
    """A server that may take a whole core: for tests of many events that are not about the budget."""
    monkeypatch.setattr(limits, "CPU_SHARE", 1.0)


def line(method, *params, id=1):
    return json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).encode() + b"\n"


def subscribed(where, *since):
    """A client that has subscribed."""
    wire = Wire(where, made_up=True)
    if isinstance(where, tuple):
        wire.authenticate()
    assert "result" in wire.call("subscribe", list(since))
    return wire


def numbers(wire, count):
    """The numbers of the next events."""
    return [wire.reply()["event"] for _ in range(count)]


# The stream...


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_the_reply_comes_first_and_then_each_event_once(path, ring, kind):
    """Those that were there, and those that a wake tells of; requests are answered meanwhile."""
    ring.add()
    ring.add()
    with serving_tcp(ring, path=path) as control, subscribed(path if kind == "unix" else control.at, 1) as wire:
        assert numbers(wire, 1) == [1]
        for number in range(2, 5):
            assert wire.call("ping")["id"] == 1
            ring.add()
            control.wake()
            assert numbers(wire, 1) == [number]
        for _ in range(1000):
            ring.add()
        control.wake()
        assert numbers(wire, 1000) == list(range(5, 1005))
        assert ring.closed == []
    until(lambda: ring.closed == [0])


def test_events_come_without_a_wake_when_they_are_due(control, path, ring):
    """At the moment that the subscription names; before it, it is left alone."""
    ring.next_at = time.monotonic() + 500 * MS
    with subscribed(path) as wire:
        until(lambda: ring.pulls)
        ring.add()
        assert numbers(wire, 1) == [0] and time.monotonic() >= ring.next_at


def test_many_subscribers_get_all_events(control, path, ring, unbounded):
    """A hundred, each in its order; one wake serves all."""
    wires = [subscribed(path) for _ in range(100)]
    for _ in range(50):
        ring.add()
        control.wake()
    for wire in wires:
        assert numbers(wire, 50) == list(range(50))
        wire.close()
    until(lambda: sorted(ring.closed) == list(range(100)))


@needs("socat")
def test_socat_shows_events_after_the_end_of_its_input(control, path, ring):
    """``printf ... | socat``: a client that has only finished writing stays subscribed."""
    command = ["socat", "-t", "20", "-", f"UNIX-CONNECT:{path}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as socat:
        socat.stdin.write(line("subscribe"))
        socat.stdin.close()
        assert "result" in strict(socat.stdout.readline())
        for number in range(3):
            ring.add()
            control.wake()
            assert strict(socat.stdout.readline())["event"] == number
        socat.kill()
    until(lambda: ring.closed == [0])


# Its end...


def test_unsubscribed_there_are_no_more_events(control, path, ring):
    """The answer says whether there was a subscription; the connection stays."""
    with subscribed(path) as wire:
        assert wire.call("unsubscribe")["result"] is True and ring.closed == [0]
        ring.add()
        control.wake()
        assert wire.call("unsubscribe")["result"] is False
        wire.still_answers()
    assert ring.pulled == 0 and ring.closed == [0]


def test_a_second_subscription_replaces_the_first(control, path, ring):
    """The first is closed once, and each event comes once."""
    with subscribed(path) as wire:
        assert wire.call("subscribe", [1])["result"] == {"number": 1} and ring.closed == [0]
        ring.add()
        ring.add()
        control.wake()
        assert numbers(wire, 1) == [1]
        wire.still_answers()
    until(lambda: ring.closed == [0, 1])


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_client_that_leaves_ends_its_subscription_once(path, ring, kind):
    """At once over a Unix socket; over TCP, where this looks like the end of its input, with the next events."""
    with serving_tcp(ring, path=path) as control, subscribed(path) as other:
        subscribed(path if kind == "unix" else control.at).close()
        until(lambda: ring.closed == [1] or (kind == "tcp" and (ring.add() or control.wake())))
        ring.add()
        control.wake()
        assert numbers(other, 1) == [0]
    assert sorted(ring.closed) == [0, 1]


def test_a_subscription_that_crashes_ends_its_connection_alone(control, path, ring, caplog):
    """It is logged, and others are answered."""
    with subscribed(path) as wire, Wire(path) as other:
        ring.broken = True
        with caplog.at_level(logging.ERROR):
            control.wake()
            assert wire.is_closed()
        other.still_answers()
    assert ring.closed == [0] and "as the test wants it" in caplog.text


def test_a_line_that_is_too_long_ends_the_subscription(control, path, ring):
    """The error is the last that comes."""
    with subscribed(path) as wire:
        wire.send(b"x" * 70_000)
        assert wire.reply()["error"]["code"] == -32600 and wire.is_closed()
    assert ring.closed == [0]


def test_the_last_event_arrives_before_the_end(path, ring):
    """What is added when the server has begun to close, and all that was not read yet."""
    control = Server(ring, lambda: None, lambda: ring.add("ended"))
    control.listen(str(path))
    control.start()
    for _ in range(5000):
        ring.add("x" * 100)
    with subscribed(path) as wire, subscribed(path, 5000) as late:
        closing = threading.Thread(target=control.close, args=(SOON,))
        closing.start()
        assert numbers(wire, 5001) == list(range(5001)) and wire.line() == b""
        assert late.reply() == {"event": 5000, "text": "ended"} and late.line() == b""
        closing.join(SOON)
    assert sorted(ring.closed) == [0, 1]


# Where there is none...


@pytest.mark.parametrize(
    "data",
    [
        b"[" + line("subscribe")[:-1] + b"]\n",
        b'{"jsonrpc":"2.0","method":"subscribe"}\n',
        b'[{"jsonrpc":"2.0","method":"subscribe"}]\n',
    ],
    ids=["batch", "notification", "both"],
)
def test_a_batch_and_a_notification_cannot_subscribe(control, path, ring, data):
    """The error says so, where there may be one; what the handler opened is closed."""
    with Wire(path) as wire:
        wire.send(data)
        if b'"id"' in data:
            (reply,) = wire.reply()
            assert reply["error"]["code"] == -32600 and "Send it on its own" in reply["error"]["message"]
        ring.add()
        control.wake()
        wire.still_answers()
    assert ring.closed == [0] and ring.pulled == 0


def test_a_request_file_cannot_subscribe(ring):
    """The reply says what to do instead."""
    replies = {}
    sink = FileReply("a.json", True, 0, lambda sink, data: replies.update({sink.name: data}))
    Dispatcher(ring).dispatch(sink, line("subscribe"))
    error = json.loads(replies["a.json"])["error"]
    assert error["code"] == -32600 and "Connect to the job's socket" in error["message"] and ring.closed == [0]
    Dispatcher(ring).dispatch(sink, line("unsubscribe"))
    assert json.loads(replies["a.json"])["result"] is False


# Clients that read slowly, and many of them...


def test_a_slow_reader_is_given_no_more_than_it_reads(control, path, ring, unbounded):
    """What it has not read stays in the ring, but for a bound; all arrives in order once it reads."""
    for _ in range(20_000):
        ring.add("x" * 100)
    with subscribed(path) as slow, Wire(path) as other:
        for _ in range(20):
            other.still_answers()
        pulled = ring.pulled
        assert 0 < pulled < limits.MAX_STREAM_UNSENT + limits.STREAM_CHUNK + (1 << 20)
        for _ in range(20):
            control.wake()
            other.still_answers()
        assert ring.pulled == pulled
        slow.send(line("ping", id="meanwhile"))
        seen = [slow.reply() for _ in range(20_001)]
        assert [event["event"] for event in seen if "event" in event] == list(range(20_000))
        assert [reply["id"] for reply in seen if "id" in reply] == ["meanwhile"]


def test_a_stalled_subscriber_is_dropped_and_an_idle_one_is_not(path, ring, monkeypatch):
    """The first accepts nothing of what there is; for the second there is nothing."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    monkeypatch.setattr(limits, "STALL_TIMEOUT", 300 * MS)
    monkeypatch.setattr(limits, "IDLE_TIMEOUT", 100 * MS)
    for _ in range(20_000):
        ring.add("x" * 100)
    with serving_tcp(ring, path=path) as control, subscribed(control.at, 20_000) as idle, subscribed(path) as stalled:
        start = time.monotonic()
        until(lambda: ring.closed == [1])
        assert time.monotonic() - start >= 200 * MS
        ring.add()
        control.wake()
        assert numbers(idle, 1) == [20_000]
        stalled.close()


def test_a_subscriber_that_reads_very_slowly_is_kept(path, ring, monkeypatch):
    """A few thousand bytes are progress, long before the kernel calls the socket writable."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    monkeypatch.setattr(limits, "STALL_TIMEOUT", 400 * MS)
    for _ in range(20_000):
        ring.add("x" * 100)
    with serving(path, ring), subscribed(path) as slow:
        start = time.monotonic()
        while time.monotonic() < start + 1200 * MS:
            time.sleep(20 * MS)
            slow.sock.recv(4000)
        assert ring.closed == []
        until(lambda: ring.closed == [0])


@pytest.mark.once
def test_a_hundred_subscribers_keep_nobody_waiting():
    """They read endless events as fast as they can: another client is answered soon, and the budget is kept."""
    with Process(ENDLESS) as job:
        path = job.line()
        with Process(READERS, path) as readers:
            assert readers.line() == "ready"
            job.say("how much")
            used, start, slowest = float(job.line()), time.monotonic(), 0.0
            while time.monotonic() < start + 2.5:
                asked = time.monotonic()
                with Wire(path) as wire:
                    wire.still_answers()
                slowest = max(slowest, time.monotonic() - asked)
            job.say("how much")
            share = (float(job.line()) - used) / (time.monotonic() - start)
            assert readers.popen.poll() is None, readers.errors
        assert 0.02 < share < 0.15 and slowest < 1.5


#: A server whose events have no end; says where it listens, then at each line how much processor time it has used.
ENDLESS = """
import os, sys, tempfile, time
from forgather_control.server.dispatcher import Subscription
from forgather_control.server.server import Server
os.chdir(tempfile.mkdtemp(prefix="fg"))
lines = b'{"event":1}\\n' * 10000
def handler(request, sink):
    if request.method == "subscribe":
        return Subscription(1, lambda size: lines[: size // 12 * 12], lambda: None)
    return 1
server = Server(handler, lambda: None)
server.listen(os.path.abspath("s"))
server.start()
print(os.path.abspath("s"), flush=True)
for line in sys.stdin:
    print(time.process_time(), flush=True)
"""

#: A hundred clients that subscribe, and read as fast as they can.
READERS = """
import selectors, socket, sys
selector = selectors.DefaultSelector()
for _ in range(100):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    sock.sendall(b'{"jsonrpc":"2.0","id":1,"method":"subscribe"}\\n')
    selector.register(sock, selectors.EVENT_READ)
print("ready", flush=True)
while True:
    for key, _ in selector.select():
        if not key.fileobj.recv(65536):
            sys.exit("closed")
"""


# Which connection is closed for a new one...


def test_a_subscriber_is_not_idle(path, ring, monkeypatch):
    """Beyond the limit those without a subscription go first, though they spoke last."""
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 8)
    with serving(path, ring), subscribed(path) as subscriber:
        others = []
        for _ in range(20):
            others.append(Wire(path))
            others[-1].still_answers()
        subscriber.still_answers()
        assert ring.closed == []
        for wire in others:
            wire.close()


def test_subscribers_alone_may_fill_the_limit(path, ring, monkeypatch):
    """A new client still gets in: in place of the one that received nothing for the longest time."""
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 8)
    with serving(path, ring):
        wires = [subscribed(path) for _ in range(9)]
        assert wires[0].is_closed() and ring.closed == [0]
        for wire in wires[1:]:
            wire.still_answers()
        for wire in wires:
            wire.close()


def test_without_room_to_wait_there_is_no_effect(path, ring, monkeypatch):
    """``check_room`` tells the handler before it carries anything out."""
    monkeypatch.setattr(limits, "MAX_DEFERRED", 0)
    control = Server(ring, lambda: None)
    with pytest.raises(TooManyCommands):
        control.check_room()
    control.close(SOON)


def test_listening_again_keeps_subscriptions(control, path, ring):
    """As after a jobs directory was restored."""
    with subscribed(path) as wire:
        moved = str(path.with_name("moved"))
        control._dispatcher._handler = lambda request, sink: control.listen(moved)
        wire.call("move")
        with pytest.raises(ConnectionRefusedError):
            Wire(path)
        ring.add()
        control.wake()
        assert numbers(wire, 1) == [0]
