"""The port that a job may offer: what is checked early, what is one warning later, what is published."""

from __future__ import annotations

import json
import logging
import os
import socket
import stat
from contextlib import closing

import pytest

from forgather_control import get_job_status, list_jobs
from forgather_control.errors import InvalidParams, PortTaken, TlsUnusable
from forgather_control.server import tcp
from forgather_control.server.server import Server
from forgather_control.server.tcp import TcpOptions
from forgather_control.wire import addresses

from ..support.harness import SOON, TOKEN, Wire, cli, descriptors, needs, remove_folder, running_loop, until

HERE = "127.0.0.1"


@pytest.fixture
def server():
    """One that is closed unstarted."""
    server = Server(lambda request, sink: None, lambda: None)
    yield server
    server.close(SOON)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def published(jobs_dir, job_id="job"):
    return json.loads((jobs_dir / job_id / "endpoint.json").read_text())


# What is checked when the adapter is made...


@pytest.mark.parametrize("port", [0, 1, 8900, 65535, "auto"])
def test_ports(port):
    """Any number that a port can have, and auto."""
    assert tcp.check(port, HERE, None, None) == TcpOptions(port, HERE)


def test_without_a_port_nothing_is_offered():
    """Whatever the host is."""
    assert tcp.check(None, HERE, None, None) is None


@pytest.mark.parametrize("port", [-1, 65536, 10**30, True, False, 8900.0, "8900", "Auto", "", b"auto", [8900]])
def test_ports_that_are_none(port):
    """The error names the parameter and the value."""
    with pytest.raises(InvalidParams, match="port must be") as caught:
        tcp.check(port, HERE, None, None)
    assert caught.value.data["parameter"] == "port"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", ""),
        ("host", None),
        ("host", 127),
        ("certfile", ""),
        ("certfile", 1),
        ("keyfile", b"k"),
        ("keyfile", "k"),
    ],
)
def test_other_values_that_are_none(name, value):
    """A key without a certificate, too."""
    given = {"host": HERE, "certfile": None, "keyfile": None, name: value}
    with pytest.raises(InvalidParams) as caught:
        tcp.check(0, **given)
    assert caught.value.data["parameter"] == name


# What is found out at the start...


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 64 + ".x", "x\0y", "[::1]", "é" * 80])
def test_a_host_that_cannot_be_bound(server, host):
    """It is a StartError, whatever Python makes of such a name, and prints on one line."""
    before = descriptors()
    with pytest.raises(PortTaken) as caught:
        TcpOptions(0, host).open(server)
    assert str(caught.value).isprintable() and descriptors() == before


@needs("openssl")
def test_certificates_that_cannot_be_used(server, pem, tmp_path):
    """Missing, a directory, another's key, a key with a password, no certificate: each is named, none opens a port."""
    text = tmp_path / "text.pem"
    text.write_text("hello\n")
    trusted = tmp_path / "trusted.pem"
    with open(pem.cert) as file:
        trusted.write_text(file.read().replace(" CERTIFICATE", " TRUSTED CERTIFICATE"))
    for cert, key, word in (
        ("/no/cert.pem", None, "/no/cert.pem cannot be read"),
        (pem.cert, "/no/key.pem", "/no/key.pem cannot be read"),
        (str(tmp_path), None, "cannot be read"),
        ("a\0b", None, "null"),
        (pem.cert, pem.other_key, "are not a certificate and its key"),
        (pem.cert, pem.locked, "password"),
        (pem.cert, None, "are not a certificate and its key"),
        (pem.key, None, "are not a certificate and its key"),
        (str(text), pem.key, "are not a certificate and its key"),
        (str(trusted), pem.key, "BEGIN CERTIFICATE"),
    ):
        with pytest.raises(TlsUnusable, match=word):
            TcpOptions(0, HERE, cert, key).open(server)
    assert server._listeners._listeners == {}


@needs("openssl")
@pytest.mark.parametrize("form", ["two files", "one file"])
def test_the_fingerprint_is_what_openssl_says(server, pem, form):
    """So that a person can compare them."""
    files = (pem.cert, pem.key) if form == "two files" else (pem.both, None)
    opened = TcpOptions(0, HERE, *files).open(server)
    assert opened.tls_sha256 == pem.sha256.replace(":", "").lower() and (opened.address, opened.port > 0) == (
        HERE,
        True,
    )


def test_the_address_is_a_number(server):
    """A name may lead a client elsewhere (::1, where another user listens)."""
    assert TcpOptions(0, "localhost").open(server).address == HERE


# A job with a port...


@pytest.mark.once
def test_the_token_stands_in_the_record_and_nowhere_else(jobs_dir, caplog):
    """Mode 0600, 128 bits and more; not in a list, a status, a log, a refusal, the process's arguments."""
    caplog.set_level(logging.DEBUG)
    with running_loop(port=0) as run:
        until(lambda: run.steps)
        record = published(jobs_dir)
        token, path = record["token"], jobs_dir / "job" / "endpoint.json"
        assert len(token) >= 22 and stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert (record["address"], record["tls_sha256"]) == (HERE, None) and record["port"] > 0
        (job,) = list_jobs()
        assert (job.port, token in repr(job)) == (record["port"], False)
        with Wire((HERE, record["port"])) as wire:
            assert wire.authenticate(token)["result"]["job_id"] == "job"
            said = [wire.call(method) for method in ("status", "list_jobs", "ping", "rpc.discover", "ranks", "stacks")]
            said.append(wire.call("get_command", {"command_id": "none"}))
        said += [get_job_status("job")]
        for words in (("list", "--json"), ("list",), ("status", "job", "--json"), ("list", "--remote", f"{HERE}:1")):
            done = cli(*words)
            said.append(done.stdout + done.stderr)
        with Wire((HERE, record["port"])) as wire:
            said.append(wire.authenticate(token[:-1]))
    assert token not in repr(said) and token not in caplog.text
    with running_loop(port=0):
        assert published(jobs_dir)["token"] != token, "each run has its own"


def test_a_job_without_a_port_has_none(jobs_dir):
    """Off by default."""
    with running_loop():
        record = published(jobs_dir)
        assert record["port"] == 0 and record["address"] is record["token"] is record["tls_sha256"] is None


def test_a_taken_port_is_one_warning_and_the_job_is_controlled_by_its_socket(jobs_dir, caplog):
    """Training goes on, and so does everything else."""
    with closing(socket.create_server((HERE, 0))) as other, running_loop(port=other.getsockname()[1]) as run:
        until(lambda: run.steps)
        assert get_job_status("job")["status"] == "training" and published(jobs_dir)["port"] == 0
        assert published(jobs_dir)["token"] is None
    (warning,) = warnings(caplog)
    assert "No control over TCP" in warning and "already in use" in warning


@needs("openssl")
@pytest.mark.parametrize("fault", ["missing", "other", "locked"])
def test_an_unusable_certificate_opens_no_plain_port(jobs_dir, caplog, pem, fault):
    """One warning; the job is controlled by its socket, and has no port that would speak without TLS."""
    key = {"missing": "/no/key.pem", "other": pem.other_key, "locked": pem.locked}[fault]
    with running_loop(port=0, certfile=pem.cert, keyfile=key) as run:
        until(lambda: run.steps)
        assert get_job_status("job")["status"] == "training" and published(jobs_dir)["port"] == 0
    (warning,) = warnings(caplog)
    assert "No control over TCP" in warning


@needs("openssl")
@pytest.mark.parametrize("tls", [False, True])
def test_the_network_without_tls_is_one_warning(jobs_dir, caplog, pem, tls):
    """It says what that means; loopback, or TLS, says nothing."""
    files = {"certfile": pem.cert, "keyfile": pem.key} if tls else {}
    with running_loop(port=0, host="0.0.0.0", **files):
        assert published(jobs_dir)["address"] == "0.0.0.0"
    assert len(warnings(caplog)) == (0 if tls else 1)
    assert tls or ("without TLS" in warnings(caplog)[0] and "token" in warnings(caplog)[0])


@pytest.mark.parametrize("name", ["certfile", "keyfile"])
def test_a_certificate_without_a_port_is_one_warning(jobs_dir, caplog, name):
    """TLS would protect nothing; the job is controlled by its socket."""
    with running_loop(**{name: "/no/file.pem"}):
        assert published(jobs_dir)["port"] == 0
    assert warnings(caplog) == ["Ignored certfile and keyfile: TLS needs a port. Give port=, too."]


def test_loopback_is_no_warning(jobs_dir, caplog):
    """Other hosts cannot reach it."""
    with running_loop(port="auto", host="localhost"):
        record = published(jobs_dir)
        assert record["port"] >= 8900 and addresses.is_loopback(record["address"])
    assert warnings(caplog) == []


def test_two_jobs_at_once_have_two_ports(jobs_dir):
    """ "auto" for both."""
    with running_loop("one", port="auto"), running_loop("two", port="auto"):
        one, two = published(jobs_dir, "one"), published(jobs_dir, "two")
        assert one["port"] != two["port"] and one["token"] != two["token"]
        for record in (one, two):
            with Wire((HERE, record["port"])) as wire:
                assert wire.authenticate(record["token"])["result"]["job_id"] == record["job_id"]
        with Wire((HERE, one["port"])) as wire:
            assert wire.authenticate(two["token"])["error"]["code"] == -31025


def test_a_job_whose_id_is_taken_leaves_no_port():
    """What was bound for it is free again."""
    with running_loop("job"), closing(socket.create_server((HERE, 0))) as free:
        port = free.getsockname()[1]
        free.close()
        with running_loop("job", port=port):
            pass
        with closing(socket.create_server((HERE, port))):
            pass


def test_a_deleted_directory_comes_back_with_its_port(jobs_dir, monkeypatch):
    """What the housekeeping restores can be reached over TCP as before."""
    from forgather_control.server import limits

    monkeypatch.setattr(limits, "TICK_PERIOD", 0.02)
    with running_loop(port=0):
        record = published(jobs_dir)
        remove_folder(jobs_dir)
        until(lambda: (jobs_dir / "job" / "endpoint.json").exists())
        assert published(jobs_dir) == record and record["token"] != TOKEN
