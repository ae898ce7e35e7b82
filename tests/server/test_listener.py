"""The listening sockets: which port is had, and that it is had at once."""

from __future__ import annotations

import errno
import socket
from contextlib import ExitStack, closing, contextmanager

import pytest

from forgather_control.server import limits
from forgather_control.server.listener import UnixListener, open_port

from ..support.harness import SOON, Process, descriptors, needs_root, until

HERE = "127.0.0.1"


def opened(port, host=HERE):
    """A listener whose connections are closed at once."""
    return closing_server(open_port(host, port, lambda sock, peer: sock.close()))


@contextmanager
def closing_server(listener):
    with closing(listener.socket):
        yield listener


def bound(listener):
    """The address and port of a listener."""
    return listener.socket.getsockname()[:2]


def taken(port=0):
    """A port that another program listens on."""
    return closing(socket.create_server((HERE, port)))


@pytest.fixture
def range_of_ports(monkeypatch):
    """ "auto" tries five ports that are free here, not 8900, which may be in use."""
    with ExitStack() as stack:
        for first in range(18900, 60000, 50):
            try:
                for port in range(first, first + 5):
                    stack.enter_context(taken(port))
            except OSError:
                stack.close()
                continue
            break
        stack.close()
    monkeypatch.setattr(limits, "DEFAULT_PORT", first)
    monkeypatch.setattr(limits, "PORTS_TRIED", 5)
    return range(first, first + 5)


def test_auto_begins_at_8900():
    """As the documentation says."""
    assert limits.DEFAULT_PORT == 8900


def test_any_port_and_a_number():
    """0 is any; a number is that one, and listens before the call returns."""
    with opened(0) as free:
        host, port = bound(free)
        assert (host, port > 1023) == (HERE, True)
        socket.create_connection((HERE, port), SOON).close()
    with opened(port) as chosen:
        assert bound(chosen) == (HERE, port)


def test_a_port_that_is_taken_is_an_error_and_leaves_nothing():
    """No second listener beside the first, and no descriptor lost."""
    with taken() as other:
        before = descriptors()
        with pytest.raises(OSError) as caught:
            open_port(HERE, other.getsockname()[1], print)
        assert caught.value.errno == errno.EADDRINUSE and descriptors() == before


def test_a_port_is_free_again_at_once():
    """Connections that the last job closed (TIME_WAIT) do not keep it taken."""
    with opened(0) as first:
        port = bound(first)[1]
        with socket.create_connection((HERE, port), SOON) as client:
            until(first.accept)  # closed by the server first
            assert client.recv(1) == b""
    with opened(port) as second:
        assert bound(second)[1] == port


def test_auto_takes_the_first_free_one(range_of_ports):
    """Taken ones are skipped, in order, and each is bound at once."""
    with taken(range_of_ports[0]), taken(range_of_ports[2]):
        with opened(None) as one, opened(None) as two:
            assert [bound(one)[1], bound(two)[1]] == [range_of_ports[1], range_of_ports[3]]
    with opened(None) as again:
        assert bound(again)[1] == range_of_ports[0]


def test_auto_gives_up_in_the_end(range_of_ports):
    """When all are taken, that is the error; and another fault is not tried a hundred times."""
    with ExitStack() as stack:
        for port in range_of_ports:
            stack.enter_context(taken(port))
        with pytest.raises(OSError) as caught:
            open_port(HERE, None, print)
        assert caught.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError) as caught:
        open_port("192.0.2.1", None, print)  # TEST-NET-1 belongs to no host (RFC 5737)
    assert caught.value.errno == errno.EADDRNOTAVAIL


#: Binds "auto" after a line on standard input, prints the port and keeps it.
RACER = """
import sys
from forgather_control.server import limits, listener
limits.DEFAULT_PORT, limits.PORTS_TRIED = int(sys.argv[1]), 5
print("ready", flush=True)
sys.stdin.readline()
held = listener.open_port("127.0.0.1", None, print)
print(held.socket.getsockname()[1], flush=True)
sys.stdin.readline()
"""


def test_two_at_once_get_two_ports(range_of_ports):
    """Four processes that look at the same time share nothing."""
    with ExitStack() as stack:
        racers = [stack.enter_context(Process(RACER, str(range_of_ports[0]))) for _ in range(4)]
        assert [racer.line() for racer in racers] == ["ready"] * 4
        for racer in racers:
            racer.say("")
        assert sorted(int(racer.line()) for racer in racers) == list(range_of_ports[:4])


def test_ipv6():
    """A host with colons is an IPv6 address."""
    try:
        six = open_port("::1", 0, lambda sock, peer: sock.close())
    except OSError as err:
        assert err.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT), err
        return  # there is no IPv6 here
    with closing_server(six):
        assert bound(six)[0] == "::1"
        socket.create_connection(("::1", bound(six)[1]), SOON).close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "300.1.1.1", "a" * 64, "x..y", "\0", "[::1]", "192.0.2.1"])
def test_a_host_that_is_none_is_an_error(host):
    """One of three errors, for the caller to turn into a warning; nothing is left open."""
    before = descriptors()
    with pytest.raises((OSError, ValueError, TypeError)):
        open_port(host, 0, print)
    assert descriptors() == before


def test_accept_takes_what_is_there_and_does_not_block():
    """False for an empty backlog; a connection that was reset before it was accepted is not an error."""
    got = []
    with closing_server(open_port(HERE, 0, lambda sock, peer: got.append(sock))) as tcp:
        assert not tcp.accept()
        with socket.create_connection(bound(tcp), SOON) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        with socket.create_connection(bound(tcp), SOON):
            until(lambda: tcp.accept() and len(got) == 2)
            assert got[1].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert got[1].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        for sock in got:
            sock.close()


@needs_root
def test_another_user_is_not_let_in(jobs_dir, caplog):
    """Even where the file's mode would allow it: the kernel tells the user id."""
    jobs_dir.mkdir()
    jobs_dir.parent.chmod(0o755)
    source = """
    import os, socket, sys
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    print("connected", flush=True)
    print(sock.recv(1), flush=True)
    """
    got = []
    with closing_server(UnixListener(str(jobs_dir / "s"), lambda sock, peer: got.append(sock))) as listening:
        (jobs_dir / "s").chmod(0o777)
        with Process(source, str(jobs_dir / "s")) as nobody:
            assert nobody.line() == "connected"
            until(listening.accept)
            assert nobody.line() == "b''" and got == []
    assert "Refused a connection from uid 65534" in caplog.text
