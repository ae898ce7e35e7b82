"""A connection on a real socket pair: whole lines out of any cut of bytes, replies in whatever the client reads."""

from __future__ import annotations

import json
import random
import select
import socket
from contextlib import closing, contextmanager

import pytest

from forgather_control.server.connection import Connection, TlsConnection
from forgather_control.wire.tls import server_context

from ..support.harness import SOON, needs, until

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
