"""TLS: which certificates are trusted, and clients that do not speak it or stop in the handshake."""

from __future__ import annotations

import json
import os
import select
import socket
import ssl
import subprocess
import threading
import time
from contextlib import closing

import pytest

from forgather_control import connect, errors
from forgather_control.client.connection import Client
from forgather_control.client.target import Target
from forgather_control.deadline import Deadline
from forgather_control.server import limits, server
from forgather_control.wire import limits as wire_limits
from forgather_control.wire import tls
from forgather_control.wire.addresses import TcpEndpoint

from ..support.harness import (
    MS,
    ROOT,
    SOON,
    TOKEN,
    Process,
    Wire,
    descriptors,
    needs,
    running_loop,
    serving_tcp,
    strict,
    until,
)

pytestmark = [pytest.mark.once, needs("openssl")]

HERE = "127.0.0.1"
AUTH = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "authenticate", "params": {"token": TOKEN}}).encode() + b"\n"
#: Resets the connection when it is closed.
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


class Answers:
    """``big N`` is N characters, ``hold`` waits for ``release``; all else is answered with its parameters."""

    def __init__(self):
        self.asked, self.held, self.release = [], threading.Event(), threading.Event()

    def __call__(self, request, sink):
        self.asked.append(request.method)
        if request.method == "big":
            return "x" * request.params[0]
        if request.method == "hold":
            self.held.set()
            assert self.release.wait(SOON)
        return request.params


@pytest.fixture(autouse=True)
def nothing_is_left(pem):
    """After each test threads and descriptors are back to where they were."""
    before = threading.active_count(), descriptors()
    yield
    until(lambda: (threading.active_count(), descriptors()) == before)


@pytest.fixture
def answers():
    return Answers()


@pytest.fixture
def control(answers, pem):
    """A server whose port speaks TLS."""
    with serving_tcp(answers, tls=tls.server_context(pem.cert, pem.key)) as control:
        yield control


def spoken(at, **settings):
    """A TLS connection of a client that trusts every certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    for name, value in settings.items():
        setattr(context, name, value)
    return context.wrap_socket(socket.create_connection(at, SOON))


def wire(control, **settings):
    return Wire(spoken(control.at, **settings))


def line(method, *params, id=1):
    return json.dumps({"jsonrpc": "2.0", "id": id, "method": method, "params": params}).encode() + b"\n"


# Whom a client trusts...


def test_the_right_fingerprint(control, pem):
    """With colons or without, in any case; the socket is an ordinary one then."""
    for sha256 in (pem.sha256, pem.sha256.replace(":", "").lower(), f" {pem.sha256}\n"):
        with TcpEndpoint(*control.at, True, sha256).connect(Deadline(SOON)) as sock:
            assert sock.gettimeout() is None
            sock.sendall(AUTH)
            assert strict(sock.recv(4096))["id"] == 1


@pytest.mark.parametrize("sha256", ["", "0" * 64, "é", "right-but-one"])
def test_a_wrong_fingerprint_ends_it_before_the_token(answers, pem, sha256):
    """The job at that port sees a handshake and nothing more."""
    wrong = pem.sha256[:-1] + ("0" if pem.sha256[-1] != "0" else "1")
    seen = []

    def serve(listener):
        context = tls.server_context(pem.cert, pem.key)
        sock, _ = listener.accept()
        try:
            with context.wrap_socket(sock, server_side=True) as spoke:
                seen.append(spoke.recv(4096))
        except OSError:
            seen.append(b"")

    with closing(socket.create_server((HERE, 0))) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        at = TcpEndpoint(*listener.getsockname(), True, wrong if sha256 == "right-but-one" else sha256)
        with pytest.raises(errors.NotAuthenticated, match="is not the job's"):
            Client(Target("job", "job", endpoint=at, token=TOKEN))
        thread.join(SOON)
    assert seen == [b""]


def test_authorities_vouch_for_a_host(control, pem):
    """Its own certificate as the authority: the name must be in it."""
    port = control.at[1]
    for host in ("localhost", HERE):
        TcpEndpoint(host, port, True, cafile=pem.cert).connect(Deadline(SOON)).close()
    for cafile in (pem.other_cert, None):
        with pytest.raises(errors.NotAuthenticated, match="is not trusted"):
            TcpEndpoint(HERE, port, True, cafile=cafile).connect(Deadline(SOON))
    other = server.Server(print, lambda: None)
    host, port = other.listen_tcp("127.0.0.2", 0, TOKEN, tls.server_context(pem.cert, pem.key))
    other.start()
    with pytest.raises(errors.NotAuthenticated, match="is not trusted"):
        TcpEndpoint(host, port, True, cafile=pem.cert).connect(Deadline(SOON))
    other.close(SOON)


def test_the_systems_authorities(control, pem, monkeypatch):
    """What $SSL_CERT_FILE names is what the system trusts."""
    monkeypatch.setenv("SSL_CERT_FILE", pem.cert)
    with connect(at=f"tls://localhost:{control.at[1]}", token=TOKEN) as job:
        assert job.call("echo", x=1) == {"x": 1}


def test_a_server_that_speaks_no_tls_is_named(answers):
    """A port without TLS closes a connection that begins a handshake, so the client does not wait for its time-out."""
    with serving_tcp(answers) as control:
        start = time.monotonic()
        with pytest.raises(errors.JobNotAnswering, match="does not speak TLS"):
            TcpEndpoint(*control.at, True, "0" * 64).connect(Deadline(SOON))
        assert time.monotonic() - start < limits.AUTH_TIMEOUT


def test_a_server_that_says_nothing_is_given_up():
    """The deadline holds for the handshake, too."""
    with closing(socket.create_server((HERE, 0))) as silent:
        with pytest.raises(errors.JobNotAnswering, match="TLS"):
            TcpEndpoint(*silent.getsockname(), True, "0" * 64).connect(Deadline(100 * MS))


# Clients that do not speak TLS, or stop in the handshake...


@pytest.mark.parametrize("first", [AUTH, b"POST / HTTP/1.1\r\n\r\n", b"\n", b"\x80\x2e\x01\x03\x01", b"{" * 60_000])
def test_a_plain_client_is_told_and_closed(control, answers, first):
    """One line says what to do, even to a client with the token; nothing is carried out."""
    with Wire(control.at) as plain:
        plain.send(first)
        reply = plain.reply()
        assert reply["error"]["code"] == -31025 and "tls://" in reply["error"]["message"] and reply["id"] is None
        assert plain.is_closed()
    assert answers.asked == []


def test_our_plain_client_says_so(control):
    """The sentence that the job sent is the error that is raised."""
    with pytest.raises(errors.NotAuthenticated, match="This port speaks TLS"):
        connect(at=f"tcp://{HERE}:{control.at[1]}", token=TOKEN)


def test_a_slow_handshake_keeps_nobody_waiting(control):
    """Byte by byte, and others are served between any two of them; in the end it is a connection like any."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    spoke = context.wrap_bio(incoming, outgoing)
    with closing(socket.create_connection(control.at, SOON)) as sock, wire(control) as other:
        other.authenticate()
        other.still_answers()

        def patiently(call):
            while True:
                try:
                    return call()
                except ssl.SSLWantReadError:
                    for number, byte in enumerate(outgoing.read()):
                        sock.sendall(bytes([byte]))
                        if number % 50 == 0:
                            other.still_answers()
                    incoming.write(sock.recv(4096))

        patiently(spoke.do_handshake)
        spoke.write(AUTH)
        assert strict(patiently(lambda: spoke.read(4096)))["id"] == 1


def test_half_a_handshake_ends_in_time(answers, pem, monkeypatch):
    """The time to authenticate holds for it, too."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    monkeypatch.setattr(limits, "AUTH_TIMEOUT", 200 * MS)
    with serving_tcp(answers, tls=tls.server_context(pem.cert, pem.key)) as control:
        with Wire(control.at) as half, Wire(control.at) as silent:
            half.send(b"\x16\x03\x01\x02\x00")
            assert half.is_closed() and silent.is_closed()


@pytest.mark.parametrize(
    "garbage", [b"\x16" + b"x" * 500, b"\x16\x03\x01\x00\x02\x01\x00", b"\x16\x03\x01\xff\xff" + b"\0" * 70_000]
)
def test_garbage_after_a_hello(control, garbage):
    """The connection ends; the server does not stumble."""
    with Wire(control.at) as broken:
        try:
            broken.send(garbage)
            broken.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        try:
            while broken.sock.recv(4096):  # an alert
                pass
        except ConnectionResetError:
            pass
    with wire(control) as owner:
        owner.authenticate()
        owner.still_answers()


def test_garbage_after_the_handshake(control, caplog):
    """Bytes that are no records, between two requests: the connection ends, nothing else."""
    with wire(control) as spoke:
        spoke.authenticate()
        raw = socket.socket(fileno=os.dup(spoke.sock.fileno()))
        with raw:
            raw.sendall(b"\x17\x03\x03\x00\x20" + b"x" * 32 + AUTH)
            with pytest.raises(OSError):
                assert not spoke.line()
                raise OSError  # an end, or an alert
    with wire(control) as owner:
        owner.authenticate()
    assert "stumbled" not in caplog.text


@pytest.mark.parametrize("first", [b"\x16", b"\x16\x03\x01\x00\x05hello", b""], ids=["hello", "record", "nothing"])
def test_who_resets_before_the_handshake_begins_costs_nothing(control, answers, first, caplog):
    """ssl closes such a socket itself (CVE-2023-40217); its number may be the next one's."""
    with wire(control) as busy:
        busy.authenticate()
        busy.send(line("hold"))
        assert answers.held.wait(SOON)
        before = descriptors()
        for _ in range(20):
            with socket.create_connection(control.at, SOON) as sock:
                sock.sendall(first)
                sock.setsockopt(*RESET)
        answers.release.set()
        assert busy.reply()["id"] == 1
        for _ in range(5):
            with wire(control) as owner:
                owner.authenticate()
                owner.still_answers()
        busy.still_answers()
        until(lambda: descriptors() == before)
    assert "stumbled" not in caplog.text


def test_who_says_goodbye_and_resets_costs_nothing(control, answers, caplog):
    """A reply to a client that left that way breaks the connection and raises nothing."""
    with wire(control) as busy:
        busy.authenticate()
        with wire(control) as brief:
            brief.authenticate()
            busy.send(line("hold"))
            assert answers.held.wait(SOON)
            brief.send(line("big", 200_000))
            brief.sock.settimeout(0)
            with pytest.raises(ssl.SSLWantReadError):
                brief.sock.unwrap()
            brief.sock.setsockopt(*RESET)
        answers.release.set()
        assert busy.reply()["id"] == 1
        busy.still_answers()
    assert "stumbled" not in caplog.text


# Clients that speak TLS...


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_half_closed_connections_are_answered(control, version):
    """A client that sends the closing alert and still reads gets its replies, then our alert."""
    with closing(spoken(control.at, maximum_version=version)) as sock:
        sock.sendall(AUTH + line("echo", id=2))
        with sock.makefile("rb") as file:
            assert strict(file.readline())["id"] == 1
            sock.settimeout(SOON)
            assert strict(file.readline())["id"] == 2
        raw = sock.unwrap()  # returns when the other side has said goodbye, too
        with raw:
            assert raw.recv(1) == b""


def test_a_goodbye_is_said_to_whom_the_server_leaves(answers, pem):
    """So that a client tells the end of a job from a cut line."""
    with serving_tcp(answers, tls=tls.server_context(pem.cert, pem.key)) as control:
        sock = spoken(control.at)
        sock.suppress_ragged_eofs = False  # a cut would raise
        with closing(sock):
            sock.sendall(AUTH)
            assert strict(sock.recv(4096))["id"] == 1
            control.close(SOON)
            assert sock.recv(1) == b""


def test_a_wrong_token_is_answered_late(control, monkeypatch):
    """As without TLS, and with a goodbye."""
    monkeypatch.setattr(limits, "AUTH_FAILURE_DELAY", 100 * MS)
    with wire(control) as spoke:
        spoke.sock.suppress_ragged_eofs = False
        start = time.monotonic()
        assert spoke.authenticate("guess")["error"]["code"] == -31025
        assert time.monotonic() - start >= 100 * MS and spoke.line() == b""


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_large_replies_arrive_whole(control, version):
    """Beyond every buffer, to a reader that comes later."""
    with wire(control, maximum_version=version) as spoke, wire(control) as other:
        spoke.authenticate()
        other.authenticate()
        spoke.send(line("big", 3 << 20) + line("echo", "after", id=2))
        for _ in range(5):
            other.still_answers()
        assert spoke.reply()["result"] == "x" * (3 << 20) and spoke.reply()["result"] == ["after"]
        spoke.still_answers()


def test_a_slow_reader_that_moves_is_not_dropped(answers, pem, monkeypatch):
    """Progress within one large reply is progress."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    monkeypatch.setattr(limits, "STALL_TIMEOUT", 600 * MS)
    monkeypatch.setattr(limits, "CPU_SHARE", 1.0)  # else it is the server that stands still
    with serving_tcp(answers, tls=tls.server_context(pem.cert, pem.key)) as control, wire(control) as spoke:
        spoke.authenticate()
        spoke.send(line("big", 24 << 20))
        start, got = time.monotonic(), 0
        while got < 24 << 20:
            data = spoke.sock.recv(65536)
            assert data, f"dropped after {got} bytes"
            got += len(data)
            if got < 12 << 20:
                time.sleep(1.5 * MS)  # 10 MB/s at most: a second and more for all of it
        assert time.monotonic() - start > 600 * MS


def test_ten_thousand_pipelined_requests_are_answered_in_order(answers, pem, monkeypatch):
    """Written whenever there is room, read whenever something is there."""
    monkeypatch.setattr(limits, "CPU_SHARE", 1.0)
    lines = b"".join(line("echo", number, id=number) for number in range(10_000))
    with serving_tcp(answers, tls=tls.server_context(pem.cert, pem.key)) as wide, wire(wide) as spoke:
        spoke.authenticate()
        # On one thread: two may not use one TLS connection at once (Python before 3.13).
        sent, got = 0, bytearray()
        spoke.sock.setblocking(False)
        while got.count(b"\n") < 10_000:
            try:
                sent += spoke.sock.send(lines[sent : sent + 16384]) if sent < len(lines) else 0
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                pass
            try:
                data = spoke.sock.recv(65536)
                assert data, "hung up"
                got += data
            except ssl.SSLWantReadError:
                select.select([spoke.sock], [spoke.sock] if sent < len(lines) else [], [], SOON)
        assert [strict(reply)["id"] for reply in got.splitlines(keepends=True)] == list(range(10_000))
        spoke.sock.settimeout(SOON)
        spoke.still_answers()


def test_first_lines_have_their_limit(control):
    """A line of 1,024 bytes, and one more, in records of any size."""
    for more in (0, 1):
        with wire(control) as spoke:
            first = AUTH.rstrip().ljust(limits.MAX_FIRST_LINE + more) + b"\n"
            for cut in (first[:700], first[700:]):
                spoke.send(cut)
            assert spoke.is_closed() if more else spoke.reply()["id"] == 1


def test_the_longest_line_and_one_more(control):
    """As without TLS."""
    shell = len(line("echo", "")) - 1
    for more in (-1, 0, 1):
        with wire(control) as spoke:
            spoke.authenticate()
            spoke.send(line("echo", "x" * (wire_limits.MAX_LINE + more - shell)))
            assert ("result" in spoke.reply()) == (more <= 0)


def test_a_client_that_is_still_sending_reads_why_it_was_refused(control):
    """As without TLS; the closing alert comes behind the reply."""
    with wire(control) as spoke:
        spoke.authenticate()
        spoke.send(b"x" * (4 << 20))
        assert spoke.reply()["error"]["code"] == -32600 and spoke.line() == b""


def test_old_versions_are_refused(control):
    """TLS 1.2 at least."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(control.at, SOON) as sock, pytest.raises(OSError):
        context.wrap_socket(sock)


def test_openssl_is_shown_the_certificate_of_the_record(control, pem):
    """The certificate that openssl reads is the one whose fingerprint the record has."""
    done = subprocess.run(
        ["openssl", "s_client", "-connect", f"{HERE}:{control.at[1]}"], input=b"", capture_output=True, timeout=SOON
    )
    shown = subprocess.run(
        ["openssl", "x509", "-noout", "-fingerprint", "-sha256"], input=done.stdout, capture_output=True, timeout=SOON
    )
    assert shown.stdout.decode().strip().endswith(pem.sha256)


# A job...


def test_a_job_over_tls_is_reached_by_its_record(pem, jobs_dir):
    """Found by its port, the fingerprint is the record's, and TLS is spoken even where tcp:// was typed."""
    with running_loop(port=0, certfile=pem.cert, keyfile=pem.key):
        port = json.loads((jobs_dir / "job" / "endpoint.json").read_text())["port"]
        for at in (f"tls://{HERE}:{port}", f"tls://localhost:{port}", f"tcp://{HERE}:{port}"):
            with connect(at=at) as job:
                assert job.call("rpc.discover")["openrpc"] and job.call("status")["job_id"] == "job"
        with connect("job", at=f"tls://{HERE}:{port}") as job:
            assert job.command("save_checkpoint", wait="finished", timeout=SOON).state == "finished"
        os.unlink(jobs_dir / "job" / "control.sock")
        with connect("job") as job:
            assert isinstance(job._transport.sock, ssl.SSLSocket), "the socket is gone, so over the port"


#: A job in a script that gave SIGPIPE back its default, and whose TLS clients vanish.
PIPE = """
import signal, sys, time
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
from forgather_control.wire import limits as wire_limits
from forgather_control.wire import tls
from forgather_control.server.server import Server
server = Server(lambda request, sink: "x" * 100_000, lambda: None)
address, port = server.listen_tcp("127.0.0.1", 0, sys.argv[1], tls.server_context(sys.argv[2], sys.argv[3]))
server.start()
print(port, flush=True)
sys.stdin.readline()
server.close(5)
print("alive", flush=True)
"""


def test_writing_to_who_is_gone_never_ends_the_process(pem):
    """OpenSSL writes without MSG_NOSIGNAL; a training script that wants SIGPIPE must survive that."""
    with Process(PIPE, TOKEN, pem.cert, pem.key, cwd=ROOT) as process:
        port = int(process.line())
        for _ in range(20):
            with closing(spoken((HERE, port))) as sock:
                sock.sendall(AUTH + line("big") * 20)
                sock.setsockopt(*RESET)
            with Wire((HERE, port)) as plain:
                plain.sock.setsockopt(*RESET)
                plain.send(b"plain")
        with Wire(spoken((HERE, port)), made_up=True) as owner:
            owner.authenticate()
        process.say("")
        assert process.line() == "alive" and process.end() == 0


def test_a_forked_child_says_no_goodbye(pem):
    """It lets go of the port and of the connections, and the parent's client notices nothing."""
    source = """
    import os, sys
    from forgather_control.wire import tls
    from forgather_control.server.server import Server
    server = Server(lambda request, sink: {"pid": os.getpid()}, lambda: None)
    address, port = server.listen_tcp("127.0.0.1", 0, sys.argv[1], tls.server_context(sys.argv[2], sys.argv[3]))
    server.start()
    print(port, flush=True)
    sys.stdin.readline()
    child = os.fork()
    if child == 0:
        left = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if fd != "3"]
        os.write(1, b"%d\\n" % sum(name.startswith("socket:") for name in left if os.path.basename(name)))
        os._exit(0)
    os.waitpid(child, 0)
    os.write(1, b"waited\\n")
    sys.stdin.readline()
    server.close(5)
    """
    with Process(source, TOKEN, pem.cert, pem.key, cwd=ROOT) as process:
        port = int(process.line())
        with Wire(spoken((HERE, port)), made_up=True) as spoke, Wire((HERE, port)) as other:
            spoke.sock.suppress_ragged_eofs = False
            spoke.authenticate()
            other.send(b"")
            process.say("")
            assert [process.line(), process.line()] == ["0", "waited"]
            spoke.still_answers()
            assert spoke.call("who")["result"] == {"pid": process.pid}
        process.say("")
        assert process.end() == 0
