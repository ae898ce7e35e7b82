"""Addresses: their text, which paths and ports can have one, and how connecting fails."""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
import sys
import threading
import time

import pytest

from forgather_control.deadline import Deadline
from forgather_control.errors import InvalidParams, JobDead, JobNotAnswering
from forgather_control.wire import addresses
from forgather_control.wire.addresses import (
    TcpEndpoint,
    UnixEndpoint,
    bind,
    fits,
    is_loopback,
    knows_peers,
    parse,
    peer_ids,
)

from ..support.harness import SOON, Process, descriptors, needs_root

#: Connects as the user nobody to each path on its standard input, and prints the outcome.
NOBODY = """
import os, sys
from forgather_control import errors
from forgather_control.wire import addresses as endpoint
from forgather_control.deadline import Deadline
os.setgroups([]); os.setgid(65534); os.setuid(65534)
for line in sys.stdin:
    try:
        sock = endpoint.UnixEndpoint(line.strip()).connect(Deadline(20))
        print("connected", endpoint.peer_ids(sock)[0], flush=True)
    except errors.ControlError as err:
        print(type(err).__name__, err, flush=True)
"""


@pytest.fixture
def place(jobs_dir):
    """An empty directory with a short path."""
    jobs_dir.mkdir()
    return jobs_dir


@pytest.fixture
def listener(place):
    """A listening socket at ``place / "s"`` with room for one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        bind(sock, str(place / "s"))
        sock.listen(0)
        yield sock


def _fill(path):
    """Connections until the backlog takes no more."""
    taken = []
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            sock.connect(str(path))
        except BlockingIOError:
            sock.close()
            return taken
        taken.append(sock)


def test_an_endpoint_is_printed_with_its_scheme():
    """``unix:PATH``, whatever the path holds."""
    for path in ("/run/s", "relative", "/with space/and:colon", "/ä"):
        assert str(UnixEndpoint(path)) == f"unix:{path}"


@pytest.mark.parametrize("letter", ["x", "ä"])
def test_a_path_fits_up_to_107_bytes(place, letter):
    """``fits`` agrees with bind(2), in bytes, not characters."""
    start = str(place) + "/"
    for length in range(100, 112):
        name = letter * ((length - len(start)) // len(letter.encode()))
        path = (start + name).ljust(length - len(name.encode()) + len(name), "y")
        assert len(os.fsencode(path)) == length
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            if fits(path):
                bind(sock, path)
            else:
                with pytest.raises(OSError, match="too long"):
                    bind(sock, path)
        assert fits(path) == (length <= 107) == os.path.exists(path)


@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_a_bound_socket_is_its_owners(place, umask):
    """Mode 0600 under every umask, set before clients can connect."""
    old = os.umask(umask)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            bind(sock, str(place / "s"))
            assert stat.S_IMODE(os.stat(place / "s").st_mode) == 0o600
            with pytest.raises(JobDead):
                UnixEndpoint(str(place / "s")).connect(Deadline(0))
    finally:
        os.umask(old)


def test_a_connection_blocks_and_knows_its_peer(place, listener):
    """What ``connect`` returns is an ordinary blocking socket; both ends are this user's."""
    with UnixEndpoint(str(place / "s")).connect(Deadline(SOON)) as sock:
        assert sock.gettimeout() is None and sock.getblocking()
        other, _ = listener.accept()
        with other:
            other.sendall(b"hello")
            assert sock.recv(10) == b"hello" and peer_ids(sock) == peer_ids(other) == (os.geteuid(), os.getpid())


def test_nobody_there_is_dead(place):
    """A missing file, a directory, a regular file, a stale socket and an impossible path: nothing listens there."""
    (place / "file").touch()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(place / "stale"))
    before = descriptors()
    for path in (place / "missing", place, place / "file", place / "stale", place / "missing" / "s", "x" * 200):
        with pytest.raises(JobDead, match="Nothing listens at unix:") as caught:
            UnixEndpoint(str(path)).connect(Deadline(SOON))
        assert caught.value.data == {"endpoint": f"unix:{path}"}
    assert descriptors() == before


def test_a_full_backlog_is_retried_until_the_deadline(place, listener):
    """EAGAIN is not the end: it is tried again, and at the deadline the job is not answering."""
    taken, before, start = _fill(place / "s"), descriptors(), time.monotonic()
    with pytest.raises(JobNotAnswering, match="accepts no more connections"):
        UnixEndpoint(str(place / "s")).connect(Deadline(0.2))
    assert 0.2 <= time.monotonic() - start < 2 and descriptors() == before and taken
    for sock in taken:
        sock.close()


def test_a_backlog_with_room_again_is_entered(place, listener):
    """A client that waits for a full backlog connects as soon as one connection is accepted."""
    taken, entered, tried = _fill(place / "s"), [], threading.Event()

    class Retry(Deadline):
        def passed(self):
            tried.set()  # so the first attempt has failed
            return super().passed()

    thread = threading.Thread(target=lambda: entered.append(UnixEndpoint(str(place / "s")).connect(Retry(SOON))))
    thread.start()
    assert tried.wait(SOON)
    first, _ = listener.accept()
    thread.join(SOON)
    assert len(entered) == 1
    for sock in [first, *taken, *entered]:
        sock.close()


def test_the_backlog_of_a_server_is_long():
    """As many as the design asks for, since a full backlog fails at once."""
    assert addresses.BACKLOG >= 1024


@needs_root
def test_another_users_socket_is_not_called_dead(place, listener):
    """Without permission nothing is known of the job but whose it is; with it, the kernel tells both uids."""
    place.parent.chmod(0o755)
    with Process(NOBODY) as nobody:
        nobody.say(str(place / "s"))
        assert nobody.line().startswith(f"FindError unix:{place}/s belongs to another user")
        (place / "s").chmod(0o777)
        place.chmod(0o700)
        nobody.say(str(place / "s"))
        assert nobody.line().startswith("FindError"), "the directory alone keeps others out"
        place.chmod(0o755)
        nobody.say(str(place / "s"))
        assert nobody.line() == f"connected {os.geteuid()}"
        sock, _ = listener.accept()
        with sock:
            assert peer_ids(sock) == (65534, nobody.pid)


def test_a_system_without_peer_credentials_says_nothing(monkeypatch):
    """Where the kernel does not tell, both ids are unknown."""
    one, two = socket.socketpair()
    with one, two:
        assert peer_ids(one) == (os.geteuid(), os.getpid())
        monkeypatch.delattr(socket, "SO_PEERCRED")
        assert peer_ids(one) == (None, None) and not knows_peers()


@pytest.mark.parametrize("pid", [4242, 0, None])
def test_the_peer_on_macos(pid, monkeypatch):
    """As sys/un.h has it there: struct xucred of 76 bytes, and a pid, which is unknown once the peer has gone."""

    class Sock:
        def getsockopt(self, level, option, size=None):
            assert level == 0 and (option, size) in ((1, 76), (2, None))
            if option == 2 and pid is None:
                raise OSError(errno.ENOTCONN, "gone")
            return struct.pack("=IIh2x16I", 0, 501, 1, 20, *[0] * 15) if option == 1 else pid

    monkeypatch.delattr(socket, "SO_PEERCRED")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert knows_peers() and peer_ids(Sock()) == (501, pid or None)


# TCP...


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:/run/s", UnixEndpoint("/run/s")),
        ("unix:tcp://h:1", UnixEndpoint("tcp://h:1")),
        ("tcp://host:8900", TcpEndpoint("host", 8900)),
        ("tls://10.0.0.1:65535", TcpEndpoint("10.0.0.1", 65535, True)),
        ("tcp://[::1]:1", TcpEndpoint("::1", 1)),
    ],
)
def test_an_address_is_read_as_it_is_printed(text, expected):
    """There and back."""
    assert parse(text) == expected and str(expected) == text


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "host:1", "tcp://host", "tcp://host:", "tcp://:1", "tcp://host:0", "tcp://host:65536", "tcp://host:-1",
     "tcp://host:1/x", "tcp://host: 1", "tcp://host:1_0", "tcp://host:\u0661", "http://host:1", "TCP://host:1",
     "tcp://[::1:1", "tcp://::1]:1", "tcp://[[h]]:1", "tcp://[]:1", "tcp:host:1", "tcp://host:" + "9" * 5000, "\x1b[2J://host:1"],
)  # fmt: skip
def test_what_is_no_address(text):
    """The error repeats the beginning of it, prints on one line, and says what an address is."""
    with pytest.raises(InvalidParams, match="is not an address") as caught:
        parse(text)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.255.0.9", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("127.0.0.1.example.org", False), ("127.evil", False), ("", False), ("x\0", False)],
)  # fmt: skip
def test_loopback(host, expected):
    """A name that begins like an address is a name."""
    assert is_loopback(host) is expected


def test_nobody_at_a_port_is_dead_and_a_silent_host_is_not_answering():
    """Refused at once; a host that is none, in a sentence; a full backlog, by the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    before = descriptors()
    with pytest.raises(JobDead, match=f"Nothing listens at tcp://127.0.0.1:{port}"):
        TcpEndpoint("127.0.0.1", port).connect(Deadline(SOON))
    for host in ("no.such.host.invalid", "a" * 64 + ".x", "x..y", "300.1.1.1", "\x1b[2J"):
        with pytest.raises(JobNotAnswering, match="cannot be reached") as caught:
            TcpEndpoint(host, port).connect(Deadline(SOON))
        assert str(caught.value).isprintable()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        filled = [socket.socket() for _ in range(3)]
        for sock in filled:
            sock.setblocking(False)
            sock.connect_ex(full.getsockname())
        for seconds in (0.0, 0.2):
            with pytest.raises(JobNotAnswering, match="did not answer"):
                TcpEndpoint(*full.getsockname()).connect(Deadline(seconds))
        for sock in filled:
            sock.close()
    assert descriptors() == before


def test_a_connection_over_tcp_blocks_and_sends_at_once():
    """An ordinary socket without a timeout."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with TcpEndpoint(*server.getsockname()).connect(Deadline(SOON)) as sock:
            assert sock.gettimeout() is None and sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
