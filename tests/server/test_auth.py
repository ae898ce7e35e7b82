"""Authentication over TCP: only the token opens a connection, and nothing before it is carried out."""

from __future__ import annotations

import base64
import json
import logging
import re
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from forgather_control.server import auth, limits
from forgather_control.server.auth import TokenAuthenticator
from forgather_control.server.connection import Connection
from forgather_control.server.dispatcher import Peer
from forgather_control.wire import limits as wire_limits

from ..support.harness import MS, SOON, TOKEN, Wire, descriptors, serving_tcp, until

AUTH = {"jsonrpc": "2.0", "id": 1, "method": "authenticate", "params": {"token": TOKEN}}


def line(message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def padded(length: int) -> bytes:
    """An authenticate line of this many bytes, with the right token."""
    return json.dumps(AUTH).encode().ljust(length) + b"\n"


class Answers:
    """Answers a request with its parameters, and keeps the methods that were asked for."""

    def __init__(self):
        self.asked = []

    def __call__(self, request, sink):
        self.asked.append(request.method)
        return request.params


@pytest.fixture(autouse=True)
def nothing_is_left():
    """After each test threads and descriptors are back to where they were."""
    before = threading.active_count(), descriptors()
    yield
    until(lambda: (threading.active_count(), descriptors()) == before)


@pytest.fixture
def answers():
    return Answers()


@pytest.fixture
def control(answers, jobs_dir):
    """A server at a port, and at ``s`` in the jobs directory."""
    jobs_dir.mkdir(mode=0o700)
    with serving_tcp(answers, path=jobs_dir / "s") as control:
        yield control


# The check of a first line...


@contextmanager
def stranger():
    """An unauthenticated connection, and its client's end."""
    ours, client = socket.socketpair()
    with ours, client:
        yield Connection(ours, limits.MAX_FIRST_LINE, Peer("tcp")), client


def check(judge, first):
    """The verdict on a first line, and what its client receives."""
    with stranger() as (connection, client):
        accepted = judge.admit(connection, first)
        connection.stream()
        connection.sock.shutdown(socket.SHUT_WR)
        verdict = "accepted" if accepted else "not authenticate" if connection.broken else "wrong token"
        assert (connection.authenticated, connection.at_end) == (accepted, verdict == "wrong token")
        return verdict, client.recv(65536)


@pytest.fixture
def at_once(monkeypatch):
    """Wrong tokens are answered without a delay."""
    monkeypatch.setattr(limits, "AUTH_FAILURE_DELAY", 0.0)


def test_a_token_is_long_random_and_fit_for_a_shell():
    """256 bits, different each time, of characters that need no quotes."""
    tokens = {auth.new_token() for _ in range(100)}
    assert len(tokens) == 100
    for token in tokens:
        assert len(base64.urlsafe_b64decode(token + "=")) * 8 >= 128
        assert token.replace("-", "").replace("_", "").isalnum()


@pytest.mark.parametrize(
    ("params", "verdict"),
    [
        ({"token": TOKEN}, "accepted"),
        ([TOKEN], "accepted"),
        ({"token": TOKEN[:-1]}, "wrong token"),
        ({"token": TOKEN + "0"}, "wrong token"),
        ({"token": TOKEN.upper()}, "wrong token"),
        ({"token": ""}, "wrong token"),
        ({"token": None}, "wrong token"),
        ({"token": [TOKEN]}, "wrong token"),
        ({"token": "\u00e9"}, "wrong token"),
        ({"token": TOKEN + "\0"}, "wrong token"),
        ([], "wrong token"),
        ([TOKEN, TOKEN], "wrong token"),
        ({}, "wrong token"),
    ],
)
def test_only_the_token_itself_is_welcome(at_once, params, verdict):
    """Not a beginning of it, not more than it, nothing that only looks like it; the refusal does not repeat it."""
    found, reply = check(TokenAuthenticator(TOKEN), line({**AUTH, "params": params}))
    assert found == verdict
    assert (b"-31025" in reply) == (verdict == "wrong token") and TOKEN.encode()[:-1] not in reply


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"\n",
        b"{}",
        b"null",
        b"\xff\xfe",
        line({name: value for name, value in AUTH.items() if name != "id"}),
        line([{name: value for name, value in AUTH.items() if name != "id"}, AUTH]),
        line([{**AUTH, "method": "ping"}, AUTH]),
        line([1, AUTH]),
        line({**AUTH, "method": "ping"}),
        line({**AUTH, "method": "Authenticate"}),
        line({**AUTH, "more": 1}),
        line({**AUTH, "jsonrpc": "1.0"}),
        line({**AUTH, "params": TOKEN}),
        line(AUTH)[:-2],
        b'{"method":"x",' + line(AUTH)[1:],
    ],
)
def test_what_is_no_authenticate_request_is_noise(first):
    """A batch that begins with another request and a notification, too; it gets no reply."""
    assert check(TokenAuthenticator(TOKEN), first.rstrip(b"\n")) == ("not authenticate", b"")


@pytest.mark.parametrize(
    ("start", "noise"),
    [(b"", False), (b" \t\r", False), (b" {", False), (b'{"js', False), (b"P", True), (b" [", False), (b"\x16", True)],
)
def test_what_can_become_no_first_line_is_known_by_its_beginning(start, noise):
    """A line that begins neither an object nor a batch is not waited for."""
    judge = TokenAuthenticator(TOKEN)
    with stranger() as (connection, client):
        client.sendall(start)
        connection.read()  # nothing, where the start is empty
        judge.check_start(connection)
        assert connection.broken is noise and judge.refused == noise


def test_refusals_are_counted_and_logged_ever_more_seldom(caplog):
    """1, 10, 100: a scan fills no log; and the log does not hold what was shown."""
    judge = TokenAuthenticator(TOKEN)
    for number in range(150):
        check(judge, line({**AUTH, "params": {"token": f"guess-{number}"}}))
    assert judge.refused == 150
    counted = [re.search(r"Rejected .*\((\d+) so far\)", record.getMessage()).group(1) for record in caplog.records]
    assert counted == ["1", "10", "100"]
    assert "guess" not in caplog.text and TOKEN not in caplog.text


# Over TCP...

#: Commands as they would follow a first line that was let pass.
BEHIND = line({"jsonrpc": "2.0", "id": 2, "method": "abort"}) + line({"jsonrpc": "2.0", "method": "abort"})


@pytest.mark.parametrize(
    "first",
    [
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\nContent-Length: 900\r\n\r\n" + line(AUTH),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500,
        b"SSH-2.0-scan\r\n",
        b"[1]",
        line([{"jsonrpc": "2.0", "id": 2, "method": "abort"}, AUTH]),
        line({name: value for name, value in AUTH.items() if name != "id"}),
        line({**AUTH, "method": "abort"}),
        line({**AUTH, "method": "rpc.discover"}),
    ],
    ids=["post", "get", "tls", "ssh", "bracket", "batch", "notification", "abort", "discover"],
)
def test_a_first_line_that_is_no_authenticate_ends_the_connection(control, answers, first):
    """At once, without an answer, and what stands behind it, even the token, is never read."""
    with Wire(control.at) as wire:
        try:
            wire.send(first + BEHIND)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert wire.is_closed()
    with Wire(control.at) as owner:
        assert owner.authenticate()["result"] == {"token": TOKEN}
    assert answers.asked == ["authenticate"]


def test_the_token_opens_for_all_that_follows(control, answers):
    """Pipelined behind it, commands are answered in order; the connection stays."""
    with Wire(control.at) as wire:
        wire.send(line(AUTH) + BEHIND)
        assert [wire.reply()["id"] for _ in range(2)] == [1, 2]
        wire.still_answers()
    assert answers.asked == ["authenticate", "abort", "abort", "ping"]


def test_a_batch_may_begin_with_the_token(control, answers):
    """The whole batch is answered in one line, and the connection is open for more."""
    with Wire(control.at) as wire:
        wire.send(line([AUTH, {"jsonrpc": "2.0", "id": 2, "method": "abort"}]))
        assert [reply["id"] for reply in wire.reply()] == [1, 2]
        wire.still_answers()
    assert answers.asked == ["authenticate", "abort", "ping"]


def test_a_batch_with_a_wrong_token_is_refused_as_a_whole(control, answers, monkeypatch):
    """Each of its requests gets the error, in one line after the delay, and none is carried out."""
    monkeypatch.setattr(limits, "AUTH_FAILURE_DELAY", 50 * MS)
    abort = {"jsonrpc": "2.0", "method": "abort"}
    with Wire(control.at) as wire:
        wire.send(line([{**AUTH, "params": {"token": "guess"}}, {**abort, "id": 2}, abort, 3]))
        found = [(reply["id"], reply["error"]["code"]) for reply in wire.reply()]
        assert found == [(1, -31025), (2, -31025), (None, -31025)] and wire.is_closed()
    assert answers.asked == []


def test_blank_lines_before_the_token_are_ignored(control):
    """As anywhere else."""
    with Wire(control.at) as wire:
        wire.send(b"\n \r\n" + line(AUTH))
        assert wire.reply()["id"] == 1


def test_the_token_may_come_byte_by_byte(control):
    """Whatever the packets are, a line is a line."""
    with Wire(control.at) as wire:
        for byte in line(AUTH):
            wire.send(bytes([byte]))
        assert wire.reply()["id"] == 1


def test_a_token_without_a_newline_before_the_end(control):
    """``printf ... | nc -N``: answered, then closed."""
    with Wire(control.at) as wire:
        wire.send(line(AUTH).rstrip())
        wire.sock.shutdown(socket.SHUT_WR)
        assert wire.reply()["id"] == 1 and wire.line() == b""


def test_a_wrong_token_is_answered_late_and_nothing_behind_it_runs(control, answers, monkeypatch):
    """After the penalty there is one error, then the end; others are served meanwhile."""
    monkeypatch.setattr(limits, "AUTH_FAILURE_DELAY", 300 * MS)
    with Wire(control.at) as wire, Wire(control.at) as owner:
        owner.authenticate()
        start = time.monotonic()
        wire.send(line({**AUTH, "id": "x", "params": {"token": "guess"}}) + line(AUTH) + BEHIND)
        owner.still_answers()
        reply = wire.reply()
        assert time.monotonic() - start >= 300 * MS
        assert (reply["id"], reply["error"]["code"]) == ("x", -31025) and "guess" not in str(reply)
        assert wire.is_closed()
    assert answers.asked == ["authenticate", "ping"]


def test_a_refusal_reaches_who_has_sent_more_meanwhile(control, answers, monkeypatch):
    """What arrives while the penalty runs is not executed, and does not cost the client its answer."""
    monkeypatch.setattr(limits, "AUTH_FAILURE_DELAY", 200 * MS)
    with Wire(control.at) as wire, Wire(control.at) as other:
        wire.send(line({**AUTH, "params": {"token": "guess"}}))
        other.authenticate()  # the first line has been checked now
        other.still_answers()
        wire.send(BEHIND * 100)
        assert wire.reply()["error"]["code"] == -31025 and wire.is_closed()
    assert "abort" not in answers.asked


def test_a_penalty_ends_by_itself(answers, monkeypatch):
    """The reply waits for no tick."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 10 * SOON)
    monkeypatch.setattr(limits, "AUTH_FAILURE_DELAY", 50 * MS)
    with serving_tcp(answers) as control, Wire(control.at) as wire:
        wire.send(line({**AUTH, "params": {"token": "guess"}}))
        assert wire.reply()["error"]["code"] == -31025


def test_who_leaves_before_the_penalty_costs_nothing(control, monkeypatch):
    """A delayed reply to a client that has left is not an error."""
    monkeypatch.setattr(limits, "AUTH_FAILURE_DELAY", 50 * MS)
    for _ in range(20):
        with Wire(control.at) as wire:
            wire.send(line({**AUTH, "params": {"token": "guess"}}))
    until(lambda: not control._connections.subscribed)
    with Wire(control.at) as owner:
        owner.authenticate()
        owner.still_answers()


def test_a_port_scan_costs_nothing(control, caplog):
    """Connect and close, connect and reset, a hundred times: nothing is left, nothing is said but a warning."""
    before = descriptors()
    for number in range(100):
        with socket.create_connection(control.at, SOON) as sock:
            if number % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    with Wire(control.at) as owner:
        owner.authenticate()
    until(lambda: descriptors() == before)
    assert [record for record in caplog.records if record.levelno > logging.WARNING] == []


def test_a_megabyte_without_a_newline_is_not_kept(control, answers):
    """The connection ends long before."""
    with Wire(control.at) as wire:
        with pytest.raises(OSError):
            for _ in range(1000):
                wire.send(b"{" * 65536)
        assert wire.is_closed()
    assert answers.asked == []


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_longest_first_line_and_one_more(control, more):
    """1,024 bytes are a line; one more ends the connection, with the right token in it."""
    with Wire(control.at) as wire:
        wire.send(padded(limits.MAX_FIRST_LINE + more))
        if more > 0:
            assert wire.is_closed()
        else:
            assert wire.reply()["id"] == 1


def test_half_a_line_and_silence_end_in_time(answers, monkeypatch):
    """A client must authenticate in time; after that it may be silent."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    monkeypatch.setattr(limits, "AUTH_TIMEOUT", 300 * MS)
    with serving_tcp(answers) as control, Wire(control.at) as owner:
        start = time.monotonic()
        owner.authenticate()
        with Wire(control.at) as half, Wire(control.at) as silent:
            half.send(line(AUTH)[:20])
            assert half.is_closed() and silent.is_closed()
        assert time.monotonic() - start >= 300 * MS
        owner.still_answers()


def test_trickling_wins_no_time(answers, monkeypatch):
    """A byte now and then is no reason to wait longer."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    monkeypatch.setattr(limits, "AUTH_TIMEOUT", 200 * MS)
    with serving_tcp(answers) as control, Wire(control.at) as wire:

        def trickle():
            try:
                wire.send(b" ")
            except OSError:
                return True
            return False

        until(trickle)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_beyond_the_limit_the_first_stranger_goes(answers, monkeypatch, more):
    """MAX_STRANGERS have a place; for one more the one that came first goes, and no other."""
    monkeypatch.setattr(limits, "MAX_UNAUTHENTICATED", 8)
    with serving_tcp(answers) as control:
        before = descriptors()
        socks = [socket.create_connection(control.at, SOON) for _ in range(8 + more)]
        until(lambda: descriptors() == before + 8 + more + min(8, 8 + more))
        socks[0].settimeout(None if more > 0 else 0)
        if more > 0:
            assert socks[0].recv(1) == b""
        else:
            with pytest.raises(BlockingIOError):
                socks[0].recv(1)
        wire = Wire(socks[1])
        assert wire.authenticate()["id"] == "auth"  # the second is still there
        wire.close()
        for sock in socks:
            sock.close()


def test_two_hundred_strangers_do_not_lock_the_owner_out(control, jobs_dir):
    """Silent ones, half lines, and wrong tokens: the owner gets in at once, over TCP and over the socket."""
    with Wire(jobs_dir / "s") as local, Wire(control.at) as remote:
        local.still_answers()
        remote.authenticate()
        crowd = [socket.create_connection(control.at, SOON) for _ in range(200)]
        for number, sock in enumerate(crowd):
            try:
                if number % 3 == 1:
                    sock.sendall(line(AUTH)[:30])
                elif number % 3 == 2:
                    sock.sendall(line({**AUTH, "params": {"token": "guess"}}))
            except OSError:
                pass  # its place was taken already
        with Wire(control.at) as owner, Wire(jobs_dir / "s") as other:
            assert owner.authenticate()["id"] == "auth"
            for wire in (owner, other, local, remote):
                wire.still_answers()
        for sock in crowd:
            sock.close()


def test_strangers_take_no_place_of_the_owners(answers, monkeypatch, jobs_dir):
    """At the limit of all connections, unauthenticated ones are closed for one another."""
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 8)
    jobs_dir.mkdir(mode=0o700)
    with (
        serving_tcp(answers, path=jobs_dir / "s") as control,
        Wire(jobs_dir / "s") as local,
        Wire(control.at) as remote,
    ):
        local.still_answers()
        remote.authenticate()
        crowd = [socket.create_connection(control.at, SOON) for _ in range(30)]
        with Wire(control.at) as owner:  # came last, so the crowd has been accepted
            owner.authenticate()
        local.still_answers()
        remote.still_answers()
        for sock in crowd:
            sock.close()


# After the token, the limits of the wire...


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_limits_of_the_wire_hold_over_tcp(control, more):
    """Length, nesting and batch, each at its limit and beside it."""
    shell = len(json.dumps({"jsonrpc": "2.0", "id": 2, "method": "echo", "params": [""]}))
    long = {"jsonrpc": "2.0", "id": 2, "method": "echo", "params": ["x" * (wire_limits.MAX_LINE + more - shell)]}
    deep = b'{"jsonrpc":"2.0","id":3,"method":"echo","params":' + b"[" * (wire_limits.MAX_DEPTH - 1 + more)
    deep += b"]" * (wire_limits.MAX_DEPTH - 1 + more) + b"}\n"
    batch = [{"jsonrpc": "2.0", "id": number, "method": "echo"} for number in range(wire_limits.MAX_BATCH + more)]
    with Wire(control.at) as wire:
        wire.authenticate()
        wire.send(deep)
        assert ("result" in wire.reply()) == (more <= 0)
        wire.send(line(batch))
        reply = wire.reply()
        assert len(reply) == len(batch) if more <= 0 else reply["error"]["code"] == -32600
        wire.still_answers()
        assert len(line(long)) == wire_limits.MAX_LINE + more + 1
        wire.send(line(long))
        reply = wire.reply()
        if more <= 0:
            assert reply["result"] == long["params"]
            wire.still_answers()
        else:
            assert reply["error"]["code"] == -32600 and wire.is_closed()
