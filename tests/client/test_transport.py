"""Lines over a socket: whole lines in order, deadlines, signs of life, the end."""

from __future__ import annotations

import socket

import pytest

from forgather_control.client import limits
from forgather_control.client.transport import SocketTransport
from forgather_control.deadline import Deadline

from ..support.harness import MS, SOON


@pytest.fixture
def ends():
    """A transport, and the socket at its other end."""
    ours, theirs = socket.socketpair()
    with theirs:
        transport = SocketTransport(ours)
        yield transport, theirs
        transport.close()


def test_lines_come_whole_and_in_order(ends):
    """However the bytes are cut."""
    transport, peer = ends
    peer.sendall(b"one\ntw")
    assert transport.receive(Deadline(SOON)) == b"one"
    assert transport.receive(Deadline(0)) is None
    peer.sendall(b"o\n\n")
    assert [transport.receive(Deadline(SOON)) for _ in range(2)] == [b"two", b""]


def test_a_deadline_passes_without_a_line(ends):
    """Half a line is kept for the next try."""
    transport, peer = ends
    peer.sendall(b"half")
    assert transport.receive(Deadline(20 * MS)) is None
    peer.sendall(b" line\n")
    assert transport.receive(Deadline(SOON)) == b"half line"


def test_the_end_is_an_error_after_the_last_line(ends):
    """What came whole is returned; half a line at the end is not."""
    transport, peer = ends
    peer.sendall(b"last\nhalf")
    peer.close()
    assert transport.receive(Deadline(SOON)) == b"last"
    with pytest.raises(OSError):
        transport.receive(Deadline(SOON))
    assert transport.why_lost() is None and not transport.withdraw()


def test_a_peer_that_does_not_read_is_a_time_out(ends):
    """A full socket is given up after the time that was allowed."""
    transport, _ = ends
    with pytest.raises(TimeoutError):
        transport.send(b"x" * (1 << 24), 20 * MS)


def test_signs_of_life(ends, monkeypatch):
    """A probe is a ping without an id; silence since the last line, or since the request, ends the patience."""
    monkeypatch.setattr(limits, "SILENCE", 0.0)
    ours, theirs = socket.socketpair()
    with theirs:
        hasty = SocketTransport(ours)
        hasty.send(b"request\n", SOON)
        assert not hasty.probe()
        hasty.close()
    transport, peer = ends
    transport.send(b"request\n", SOON)
    assert transport.probe()
    assert peer.recv(1000) == b'request\n{"jsonrpc":"2.0","id":null,"method":"ping","params":{}}\n'


def test_closing_twice_is_closing_once(ends):
    """As a client that failed in the middle may do."""
    transport, _ = ends
    transport.close()
    transport.close()
