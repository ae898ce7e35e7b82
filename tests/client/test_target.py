"""Which job a name, an address or a host means, and what is shown to it."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

import forgather_control
from forgather_control import errors
from forgather_control.client import api, target
from forgather_control.client.target import find
from forgather_control.jobs.record import parse_record
from forgather_control.wire.addresses import TcpEndpoint

from ..support.harness import SOON, Wire, job_process, running_loop
from .test_connection import Peer


@pytest.fixture
def folder(jobs_dir: Path) -> Path:
    jobs_dir.mkdir(parents=True, exist_ok=True)
    return jobs_dir


# Names...


def test_a_job_is_found_by_its_exact_id_or_alone():
    """An exact id, or nothing where one job is live; the beginning of an id names no job, and the id is suggested."""
    with running_loop("alpha"):
        assert find().job_id == find("alpha").job_id == "alpha"
        for name in ("al", "alph", "Alpha", "alpha "):
            with pytest.raises(errors.NoSuchJob, match=r"did you mean alpha\?"):
                find(name)
        with running_loop("alphabet"):
            assert find("alpha").job_id == "alpha"
            with pytest.raises(errors.NoSuchJob, match=r"did you mean alpha(bet)?\?"):
                find("alp")
            with pytest.raises(errors.NoSuchJob, match="list shows"):
                find("omega")
            with pytest.raises(errors.AmbiguousJob) as caught:
                find()
            assert sorted(caught.value.data["candidates"]) == ["alpha", "alphabet"]


@pytest.mark.parametrize("name", ["", "nobody", "../jobs/alpha", "/etc", "a\x1b[2J", "é", "." * 3, "x" * 300])
def test_a_name_that_fits_nothing_is_no_such_job(name):
    """No name is ever taken for a path, and the error prints safely."""
    with running_loop("alpha"), pytest.raises(errors.NoSuchJob) as caught:
        find(name)
    assert str(caught.value).isprintable()


def test_no_live_job_is_no_such_job():
    """Without a name and without a job there is nothing to choose from."""
    with pytest.raises(errors.NoSuchJob):
        find()


def _launched(monkeypatch, **variables: str) -> None:
    for variable in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)


def test_a_job_is_found_by_what_its_launcher_calls_it(monkeypatch):
    """SLURM's number, array and task, torchrun's run: whole, not as a prefix; all verbs take them."""
    array = {"SLURM_ARRAY_JOB_ID": "1200", "SLURM_JOB_ID": "1204", "SLURM_ARRAY_TASK_ID": "3"}
    _launched(monkeypatch, **array, TORCHELASTIC_RUN_ID="my run")
    with running_loop("alpha"):
        for name in ("1200_3", "1204", "1200", "my run"):
            assert find(name).job_id == "alpha"
        assert api.get_job_status("1200_3")["job_id"] == "alpha"
        assert forgather_control.save_checkpoint("1204", wait="finished", timeout=SOON).state == "finished"
        for name in ("12", "1200_", "my", "3", "none"):
            with pytest.raises(errors.NoSuchJob):
                find(name)
        _launched(monkeypatch, **{**array, "SLURM_JOB_ID": "1205", "SLURM_ARRAY_TASK_ID": "4"})
        with running_loop("beta"):
            assert [find(name).job_id for name in ("1200_3", "1200_4")] == ["alpha", "beta"]
            with pytest.raises(errors.AmbiguousJob) as caught:
                find("1200")
            assert sorted(caught.value.data["candidates"]) == ["alpha", "beta"]


def test_a_number_is_a_name_as_well(monkeypatch):
    """SLURM's id as an integer names the job wherever a name does; one that names none is in the message."""
    _launched(monkeypatch, SLURM_JOB_ID="1204")
    with running_loop("alpha", port=0):
        record = find(1204)
        for at in (None, f"unix:{record.socket}", f"tcp://{HERE}:{record.port}"):
            with forgather_control.connect(1204, at=at) as job:
                assert job.job_id == record.job_id == "alpha"
        assert forgather_control.save_checkpoint(1204, wait="finished", timeout=SOON).state == "finished"
        with pytest.raises(errors.NoSuchJob, match="No job '12' in"):
            forgather_control.get_job_status(12)


def test_an_id_goes_before_a_launchers_name(monkeypatch):
    """An exact id wins over a run of this name; the beginning of another id is nothing beside it."""
    _launched(monkeypatch, SLURM_JOB_ID="7", TORCHELASTIC_RUN_ID="exp")
    with running_loop("exp-1"):
        assert find("exp").job_id == "exp-1"
        _launched(monkeypatch)
        with running_loop("exp-2"):
            assert find("exp").job_id == "exp-1"
            with running_loop("exp"):
                assert find("exp").job_id == "exp"
            with running_loop("7"):
                assert find("7").job_id == "7"
            assert find("7").job_id == "exp-1"


@pytest.mark.once
def test_what_an_earlier_turn_left_does_not_hide_the_run(monkeypatch):
    """Restarted under a new id, a run is found by its name; two dead ones of one turn stay ambiguous, as ids do."""
    _launched(monkeypatch, SLURM_JOB_ID="7")
    with job_process("first") as first:
        first.kill()
    assert find("7").job_id == "first"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with job_process("second") as second:
        assert find("7").job_id == "second"
        second.kill()
    assert find("7").job_id == "second"
    with job_process("third") as third:
        third.kill()
    with pytest.raises(errors.AmbiguousJob) as caught:
        find("7")
    assert sorted(caught.value.data["candidates"]) == ["second", "third"]


def test_foreign_and_socketless_jobs_are_told_apart(folder):
    """A record of another host is not answering, never dead; a record without a socket says so."""
    record = {"job_id": "far", "host": "elsewhere", "port": None, "pid": 1, "started_at": 1.0, "socket": "/nowhere/s"}
    for name, changes in {"far": {}, "bare": {"job_id": "bare", "socket": None}}.items():
        (folder / name).mkdir()
        (folder / name / "endpoint.json").write_text(json.dumps({**record, **changes}))
    with pytest.raises(errors.JobNotAnswering, match="another host"):
        forgather_control.connect("far")
    with pytest.raises(errors.JobNotAnswering, match="no socket"):
        forgather_control.connect("bare")
    assert {job.state for job in forgather_control.list_jobs()} == {"foreign"}


# Addresses...

HERE = "127.0.0.1"


def published(jobs_dir: Path, job_id: str = "job") -> dict:
    return json.loads((jobs_dir / job_id / "endpoint.json").read_text())


def put(folder: Path, name: str, **changes) -> None:
    """A record of a process that is gone."""
    dead = {"job_id": name, "host": socket.gethostname(), "pid": 2**22 + 1, "started_at": 1.0}
    (folder / name).mkdir()
    (folder / name / "endpoint.json").write_text(json.dumps({**dead, "token": "secret", "address": HERE, **changes}))


def test_a_job_is_reached_at_its_port():
    """By address, by name, by the record alone where the socket is gone."""
    with running_loop(port=0) as run:
        port = find("job").port
        for at in (f"tcp://{HERE}:{port}", f"tcp://localhost:{port}", f"tcp://{socket.gethostname()}:{port}"):
            with forgather_control.connect(at=at) as job:
                assert job.call("status")["job_id"] == "job" and job._transport.sock.family == socket.AF_INET
        os.unlink(find("job").socket)
        assert forgather_control.save_checkpoint("job", wait="finished", timeout=SOON).state == "finished" and run.saves
        with forgather_control.connect("job") as job:
            assert job._transport.sock.family == socket.AF_INET
            assert job.call_raw("ping", {})["job_id"] == "job"


@pytest.mark.parametrize(
    "host", ["127.0.0.1.example.org", "localhost.example.org", "192.0.2.1", "example.org", "::2", "[::2]", "127.1"]
)
def test_the_token_is_for_the_jobs_host_alone(host):
    """The same port of another host belongs to another program: no connection is made, no token shown."""
    with running_loop(port=0):
        port = find("job").port
        with pytest.raises(errors.NotAuthenticated, match="needs the job's token") as caught:
            forgather_control.connect(at=f"tcp://{host}:{port}")
        assert find("job").token not in str(caught.value)


def test_the_token_goes_to_the_address_that_the_job_has_bound():
    """Another user may listen at the same port of another loopback address."""
    with running_loop(port=0):
        port, seen = find("job").port, []
        with Peer(None, lambda file, sock: seen.append(file.readline()), host="127.0.0.2", port=port) as peer:
            with forgather_control.connect(at=f"tcp://127.0.0.2:{port}") as job:
                assert job.call("ping")["job_id"] == "job"
            peer.leave()
        assert seen == []


def test_the_token_of_the_dead_is_shown_to_nobody(folder):
    """Another program may have its port; the message says that the job is dead."""
    seen = []
    with Peer(None, lambda file, sock: seen.append(file.readline())) as peer:
        put(folder, "gone", port=peer.at[1], socket=str(folder / "gone" / "s"))
        with pytest.raises(errors.JobDead, match="Job gone is dead"):
            forgather_control.connect("gone")
        peer.leave()
    assert seen == []


def test_what_dead_jobs_left_does_not_hide_who_has_the_port_now(folder):
    """ "auto" gives the same number again and again."""
    with running_loop(port=0):
        for name in ("gone", "lost"):
            put(folder, name, port=find("job").port)
        with forgather_control.connect(at=f"tcp://{HERE}:{find('job').port}") as job:
            assert job.call("ping")["job_id"] == "job"


def test_a_port_that_asks_for_no_tls_gets_no_token_of_who_typed_it(folder):
    """tls:// is never silently weaker than typed."""
    with running_loop(port=0), pytest.raises((errors.JobNotAnswering, errors.NotAuthenticated)):
        forgather_control.connect(at=f"tls://{HERE}:{find('job').port}")


@pytest.mark.once
def test_the_token_comes_from_the_caller_else_the_environment_else_the_record(monkeypatch):
    """In this order; an empty variable is none."""
    with running_loop(port=0):
        record = find("job")
        at = f"tcp://{HERE}:{record.port}"
        monkeypatch.setenv("FORGATHER_CONTROL_TOKEN", "wrong")
        with pytest.raises(errors.NotAuthenticated, match="not the job's token") as caught:
            forgather_control.connect(at=at)
        assert record.token not in str(caught.value)
        forgather_control.connect(at=at, token=record.token).close()
        for given in (record.token, ""):
            monkeypatch.setenv("FORGATHER_CONTROL_TOKEN", given)
            forgather_control.connect(at=at).close()


def test_another_job_than_the_named_one_is_not_called(monkeypatch, folder):
    """Neither with its record here, nor without, nor over a socket: an abort must not meet the wrong one."""
    with running_loop("one", port=0) as one, running_loop("two", port=0):
        record = find("one")
        for at in (f"tcp://{HERE}:{record.port}", f"unix:{record.socket}"):
            with forgather_control.connect("one", at=at, token=record.token) as job:
                assert job.call("ping")["job_id"] == "one"
            with pytest.raises(errors.ControlError, match="Another job answers"):
                forgather_control.connect("two", at=at, token=record.token)
        monkeypatch.setenv("FORGATHER_JOBS_DIR", str(folder / "elsewhere"))
        with pytest.raises(errors.NoSuchJob, match="Another job answers there, 'one'"):
            forgather_control.connect("two", at=f"tcp://{HERE}:{record.port}", token=record.token)
        for at in (f"tcp://{HERE}:{record.port}", f"unix:{record.socket}"):
            with pytest.raises(errors.NoSuchJob, match="Another job answers there, 'one', not 'on'"):
                forgather_control.connect("on", at=at, token=record.token)
        assert not one.job.should_stop


def test_a_named_job_may_be_reached_through_a_tunnel(jobs_dir):
    """Any port that leads to it will do, with its token and its fingerprint."""

    def tunnel(file, sock) -> None:
        with Wire((HERE, published(jobs_dir)["port"])) as wire:
            for line in file:
                wire.send(line)
                sock.sendall(wire.line())

    with running_loop(port=0), Peer(None, tunnel) as peer:
        with forgather_control.connect("job", at=f"tcp://{HERE}:{peer.at[1]}") as job:
            assert job.call("ping")["job_id"] == "job"


@pytest.mark.parametrize(
    ("address", "here", "expected"),
    [
        (HERE, True, HERE),
        (HERE, False, None),
        ("::1", False, None),
        ("0.0.0.0", False, "elsewhere"),
        ("0.0.0.0", True, "0.0.0.0"),
        ("10.1.2.3", False, "10.1.2.3"),
        (None, False, None),
    ],
)
def test_where_a_port_is_seen_from_here(address, here, expected):
    """Loopback is this host's alone; all addresses are, from elsewhere, the host's name."""
    known = {"job_id": "x", "host": socket.gethostname() if here else "elsewhere", "port": 8900, "pid": 1}
    record = parse_record(
        json.dumps({**known, "started_at": 1.0, "address": address, "tls_sha256": "ab"}).encode(), "x"
    )
    found = target._port(record)
    assert found == (expected and TcpEndpoint(expected, 8900, True, "ab"))
