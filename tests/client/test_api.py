"""The client: finding, calling, waiting, raising; against real jobs, and against peers that misbehave."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

import forgather_control
from forgather_control import errors
from forgather_control.client import api
from forgather_control.jobs.record import parse_record
from forgather_control.wire.addresses import TcpEndpoint

from ..support.harness import MS, SOON, Wire, cli, job_process, running_loop, until
from .test_connection import Peer


@pytest.fixture
def folder(jobs_dir: Path) -> Path:
    jobs_dir.mkdir(parents=True, exist_ok=True)
    return jobs_dir


def test_list_names_what_a_person_needs():
    """list_jobs gives id, host, port, pid, start, state and step, and no secrets."""
    with running_loop("one") as run:
        until(lambda: run.steps)
        (job,) = forgather_control.list_jobs()
        assert (job.job_id, job.pid, job.port, job.state) == ("one", os.getpid(), None, "live")
        assert job.host == socket.gethostname() and abs(job.started_at - time.time()) < SOON
        assert job.global_step >= 1 and "token" not in job.to_json()
    assert forgather_control.list_jobs() == []


def test_a_job_is_found_by_id_prefix_and_silence():
    """An id, a unique prefix, or nothing where one job is live; an exact id wins over a prefix."""
    with running_loop("alpha"):
        assert api.find().job_id == api.find("al").job_id == api.find("alpha").job_id == "alpha"
        with running_loop("alphabet"):
            assert api.find("alpha").job_id == "alpha"
            for name in ("al", None):
                with pytest.raises(errors.AmbiguousJob) as caught:
                    api.find(name)
                assert sorted(caught.value.data["candidates"]) == ["alpha", "alphabet"]


@pytest.mark.parametrize("name", ["", "nobody", "../jobs/alpha", "/etc", "a\x1b[2J", "é", "." * 3, "x" * 300])
def test_a_name_that_fits_nothing_is_no_such_job(name):
    """No name is ever taken for a path, and the error prints safely."""
    with running_loop("alpha"), pytest.raises(errors.NoSuchJob) as caught:
        api.find(name)
    assert str(caught.value).isprintable()


def test_no_live_job_is_no_such_job():
    """Without a name and without a job there is nothing to choose from."""
    with pytest.raises(errors.NoSuchJob):
        api.find()


def test_every_wait_returns_at_its_own_moment():
    """accepted, applied and finished come in this order, and finished has the path."""
    with running_loop(step_seconds=20 * MS):
        accepted = forgather_control.save_checkpoint("job")
        assert accepted.state == "accepted" and accepted.applied_at_step is None
        applied = forgather_control.save_checkpoint("job", wait="applied", timeout=SOON)
        assert applied.state in ("applied", "finished") and applied.applied_at_step >= 1
        finished = forgather_control.save_checkpoint("job", wait="finished", timeout=SOON)
        assert finished.state == "finished" and Path(finished.result["path"]).is_dir()
        assert finished.result["step"] == finished.applied_at_step and finished.result["seconds"] >= 0


@pytest.mark.parametrize("give", ["graceful_stop", "save_and_stop", "abort"])
def test_a_stop_is_finished_when_the_job_is_gone(give):
    """wait="finished" on a stop returns after training ended; by then the job is not listed any more."""
    with running_loop() as run:
        until(lambda: run.steps)
        record = getattr(forgather_control, give)("job", wait="finished", timeout=SOON)
        assert record.state == "finished"
        assert forgather_control.list_jobs() == []
        run.thread.join(SOON)
        assert run.steps == record.applied_at_step == record.result["step"]
        assert bool(run.saves) == (give == "save_and_stop") == (record.result["path"] is not None)


def test_the_same_id_twice_is_the_same_command():
    """A repeated command_id is answered with the first one's record, and saves once."""
    with running_loop() as run:
        one = forgather_control.save_checkpoint("job", wait="finished", timeout=SOON, command_id="mine")
        two = forgather_control.save_checkpoint("job", wait="finished", timeout=SOON, command_id="mine")
        assert one == two and len(run.saves) == 1
        assert forgather_control.get_command("job", "mine") == one
        with pytest.raises(errors.InvalidParams, match="belongs to"):
            forgather_control.abort("job", command_id="mine")
        with pytest.raises(errors.NotCancellable):
            forgather_control.cancel_command("job", "mine")
        with pytest.raises(errors.CommandNotFound):
            forgather_control.get_command("job", "nobody's")


def test_a_cancelled_command_is_never_applied():
    """What is cancelled before its step ends is cancelled for ever, and its waiter is told."""
    with running_loop(step_seconds=400 * MS) as run:
        until(lambda: run.steps)
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                forgather_control.save_checkpoint("job", wait="finished", timeout=SOON, command_id="x")
            except errors.CommandFailed as err:
                caught.append(err)

        waiter = threading.Thread(target=wait)
        waiter.start()
        with forgather_control.connect("job") as job:
            until(lambda: any(record["command_id"] == "x" for record in job.call("list_commands")))
            job.call("cancel_command", command_id="x")
        waiter.join(SOON)
        assert [err.data["state"] for err in caught] == ["cancelled"]
        assert run.saves == []


def test_a_deadline_passes_and_the_command_goes_on():
    """timeout=0 raises DeadlinePassed with the record; the command is finished all the same."""
    with running_loop(step_seconds=50 * MS):
        with pytest.raises(errors.DeadlinePassed) as caught:
            forgather_control.save_checkpoint("job", wait="finished", timeout=0)
        assert isinstance(caught.value, TimeoutError)
        command_id = caught.value.data["command_id"]
        until(lambda: forgather_control.get_command("job", command_id).state == "finished")


def test_wrong_parameters_are_errors_before_any_effect():
    """Unknown, missing and ill-typed parameters raise InvalidParams, and no command is recorded."""
    with running_loop(), forgather_control.connect("job") as job:
        for method, params in [
            ("save_checkpoint", {"wait": "soon"}),
            ("save_checkpoint", {"wiat": "finished"}),
            ("save_checkpoint", {"timeout": -1}),
            ("save_checkpoint", {"timeout": True}),
            ("save_checkpoint", {"command_id": ""}),
            ("get_command", {}),
            ("status", {"job_id": "job"}),
        ]:
            with pytest.raises(errors.InvalidParams):
                job.call(method, **params)
        with pytest.raises(errors.MethodNotFound):
            job.call("__class__")
        assert job.call("list_commands") == []


def test_a_killed_job_is_dead_at_once():
    """After kill -9 the client says dead, not silence, and a connection that was open says so, too."""
    with job_process("victim") as process:
        with forgather_control.connect("victim") as job:
            job.call("ping")
            process.kill()
            with pytest.raises(errors.JobDead, match=f"pid {process.pid} on .*, ended before it answered$"):
                job.call("ping")
        with pytest.raises(errors.JobDead, match="cleanup"):
            forgather_control.get_job_status("victim")
        assert [job.state for job in forgather_control.list_jobs()] == ["dead"]
        assert forgather_control.cleanup() == ["victim"]
        assert forgather_control.list_jobs() == []


def _all_stopped(pid: int) -> bool:
    return all(
        path.read_text().rpartition(")")[2].split()[0] == "T" for path in Path(f"/proc/{pid}/task").glob("*/stat")
    )


@pytest.mark.once
def test_a_stopped_process_is_silent_and_never_cleaned_up():
    """SIGSTOP: the job lives and does not answer; the client says so by its deadline, cleanup leaves it alone."""
    with job_process("frozen") as process:
        os.kill(process.pid, signal.SIGSTOP)
        # The signal reaches one thread after the other; the server's is stopped when all are.
        until(lambda: _all_stopped(process.pid))
        try:
            assert [job.state for job in forgather_control.list_jobs(timeout=300 * MS)] == ["silent"]
            with forgather_control.connect("frozen", timeout=300 * MS) as job, pytest.raises(errors.JobNotAnswering):
                job.call("ping")
            assert forgather_control.cleanup() == []
        finally:
            os.kill(process.pid, signal.SIGCONT)
        until(lambda: [job.state for job in forgather_control.list_jobs()] == ["live"])


def _waits(job_id: str) -> bool:
    """Whether the job has a command that is not over."""
    return any(command["state"] == "accepted" for command in api.get_job_status(job_id)["commands"])


def test_a_job_that_dies_while_somebody_waits_says_so():
    """A waiter without a deadline hears of the death at once, and that its command's fate is not known."""
    with job_process("victim", step_seconds=SOON) as process:
        killer = threading.Thread(target=lambda: (until(lambda: _waits("victim")), process.kill()))
        killer.start()
        with pytest.raises(errors.JobDead) as caught:
            forgather_control.save_checkpoint("victim", wait="finished")
        killer.join(SOON)
    assert str(caught.value) == (
        f"the process of job victim, pid {process.pid} on {socket.gethostname()}, ended before it answered; "
        "whether its save_checkpoint was carried out is not known"
    )


def test_on_the_command_line_a_death_is_one_sentence():
    """save --wait on a job that is killed meanwhile: exit code 4, no traceback."""
    with job_process("victim", step_seconds=SOON) as process:
        killer = threading.Thread(target=lambda: (until(lambda: _waits("victim")), process.kill()))
        killer.start()
        done = cli("save", "victim", "--wait")
        killer.join(SOON)
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "is not known" in done.stderr, done.stderr


def test_a_job_that_was_restarted_says_as_whom(monkeypatch):
    """Who was connected to the old process is told of the new one, and told to ask again."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with job_process("phoenix") as old, forgather_control.connect("phoenix") as job:
        job.call("ping")
        stale = api.find("phoenix")
        old.kill()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
        with job_process("phoenix") as new:
            words = rf"restarted as pid {new.pid} on .*, restart 3, before it answered; whether its abort .* ask again$"
            with pytest.raises(errors.JobDead, match=words) as caught:
                job.call("abort")
            assert caught.value.data["pid"] == new.pid
            assert "ask again" in str(api._unreachable(stale))
            assert api.get_job_status("phoenix")["pid"] == new.pid


def test_a_job_that_ends_while_a_connection_is_open_says_so(folder):
    """Its directory went with it; its process may run on."""
    with running_loop("brief"):
        job = forgather_control.connect("brief")
        job.call("ping")
    with job, pytest.raises(errors.JobDead, match=r"job brief ended before it answered$"):
        job.call("ping")


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
            assert api.find(name).job_id == "alpha"
        assert api.get_job_status("1200_3")["job_id"] == "alpha"
        assert forgather_control.save_checkpoint("1204", wait="finished", timeout=SOON).state == "finished"
        for name in ("12", "1200_", "my", "3", "none"):
            with pytest.raises(errors.NoSuchJob):
                api.find(name)
        _launched(monkeypatch, **{**array, "SLURM_JOB_ID": "1205", "SLURM_ARRAY_TASK_ID": "4"})
        with running_loop("beta"):
            assert [api.find(name).job_id for name in ("1200_3", "1200_4")] == ["alpha", "beta"]
            with pytest.raises(errors.AmbiguousJob) as caught:
                api.find("1200")
            assert sorted(caught.value.data["candidates"]) == ["alpha", "beta"]


def test_an_id_goes_before_a_launchers_name_and_a_prefix_beside_it(monkeypatch):
    """An exact id wins; what is one job's run and the beginning of another's id is ambiguous, of its own id is not."""
    _launched(monkeypatch, SLURM_JOB_ID="7", TORCHELASTIC_RUN_ID="exp")
    with running_loop("exp-1"):
        assert api.find("exp").job_id == "exp-1"
        _launched(monkeypatch)
        with running_loop("exp-2"):
            with pytest.raises(errors.AmbiguousJob):
                api.find("exp")
            with running_loop("exp"):
                assert api.find("exp").job_id == "exp"
            with running_loop("7"):
                assert api.find("7").job_id == "7"
            assert api.find("7").job_id == "exp-1"


def test_what_an_earlier_turn_left_does_not_hide_the_run(monkeypatch):
    """Restarted under a new id, a run is found by its name; two dead ones of one turn stay ambiguous, as ids do."""
    _launched(monkeypatch, SLURM_JOB_ID="7")
    with job_process("first") as first:
        first.kill()
    assert api.find("7").job_id == "first"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with job_process("second") as second:
        assert api.find("7").job_id == "second"
        second.kill()
    assert api.find("7").job_id == "second"
    with job_process("third") as third:
        third.kill()
    with pytest.raises(errors.AmbiguousJob) as caught:
        api.find("7")
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


def test_a_job_that_has_just_ended_is_no_such_job(folder):
    """The record was read, then the job went: that is an ended job, not a dead one."""
    record = {"job_id": "brief", "host": socket.gethostname(), "port": None, "pid": os.getpid(), "started_at": 1.0}
    gone = parse_record(json.dumps({**record, "socket": str(folder / "s")}).encode(), "brief")
    assert isinstance(api._unreachable(gone), errors.NoSuchJob)


def test_an_unknown_error_code_is_kept():
    """A newer job's error arrives as a ControlError with its code and data."""
    error = errors.from_wire(-32077, "new", {"fact": 1})
    assert type(error) is errors.ControlError and error.data == {"code": -32077, "fact": 1}


def test_cleanup_removes_what_was_agreed_to_and_judges_it_again():
    """Of the jobs that were shown, one has been started again meanwhile: it stays."""
    with job_process("one") as one, job_process("two") as two:
        one.kill()
        two.kill()
        shown = api.dead_jobs()
    with running_loop("two"):
        assert api.cleanup(shown) == ["one"]
        assert [job.job_id for job in forgather_control.list_jobs()] == ["two"]


# Over TCP...

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
        port = api.find("job").port
        for at in (f"tcp://{HERE}:{port}", f"tcp://localhost:{port}", f"tcp://{socket.gethostname()}:{port}"):
            with forgather_control.connect(at=at) as job:
                assert job.call("status")["job_id"] == "job" and job._sock.family == socket.AF_INET
        os.unlink(api.find("job").socket)
        assert forgather_control.save_checkpoint("job", wait="finished", timeout=SOON).state == "finished" and run.saves
        with forgather_control.connect("job") as job:
            assert job._sock.family == socket.AF_INET
            assert job.call_raw("ping", {})["job_id"] == "job"


@pytest.mark.parametrize(
    "host", ["127.0.0.1.example.org", "localhost.example.org", "192.0.2.1", "example.org", "::2", "[::2]", "127.1"]
)
def test_the_token_is_for_the_jobs_host_alone(host):
    """The same port of another host is somebody else's: nothing is connected to, nothing shown."""
    with running_loop(port=0):
        port = api.find("job").port
        with pytest.raises(errors.NotAuthenticated, match="wants the job's token") as caught:
            forgather_control.connect(at=f"tcp://{host}:{port}")
        assert api.find("job").token not in str(caught.value)


def test_the_token_goes_to_the_address_that_the_job_has_bound():
    """Another user may listen at the same port of another loopback address."""
    with running_loop(port=0):
        port, seen = api.find("job").port, []
        with Peer(None, lambda file, sock: seen.append(file.readline()), host="127.0.0.2", port=port) as peer:
            with forgather_control.connect(at=f"tcp://127.0.0.2:{port}") as job:
                assert job.call("ping")["job_id"] == "job"
            peer.leave()
        assert seen == []


def test_the_token_of_the_dead_is_shown_to_nobody(folder):
    """Its port is somebody else's by now; the sentence says that the job is dead."""
    seen = []
    with Peer(None, lambda file, sock: seen.append(file.readline())) as peer:
        put(folder, "gone", port=peer.at[1], socket=str(folder / "gone" / "s"))
        with pytest.raises(errors.JobDead, match="job gone is dead"):
            forgather_control.connect("gone")
        peer.leave()
    assert seen == []


def test_what_dead_jobs_left_does_not_hide_who_has_the_port_now(folder):
    """ "auto" gives the same number again and again."""
    with running_loop(port=0):
        for name in ("gone", "lost"):
            put(folder, name, port=api.find("job").port)
        with forgather_control.connect(at=f"tcp://{HERE}:{api.find('job').port}") as job:
            assert job.call("ping")["job_id"] == "job"


def test_a_port_that_asks_for_no_tls_gets_no_token_of_who_typed_it(folder):
    """tls:// is never silently weaker than typed."""
    with running_loop(port=0), pytest.raises((errors.JobNotAnswering, errors.NotAuthenticated)):
        forgather_control.connect(at=f"tls://{HERE}:{api.find('job').port}")


def test_the_token_comes_from_the_caller_else_the_environment_else_the_record(monkeypatch):
    """In this order; an empty variable is none."""
    with running_loop(port=0):
        record = api.find("job")
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
        record = api.find("one")
        for at in (f"tcp://{HERE}:{record.port}", f"unix:{record.socket}"):
            with forgather_control.connect("one", at=at, token=record.token) as job:
                assert job.call("ping")["job_id"] == "one"
            with pytest.raises(errors.ControlError, match="another job answers"):
                forgather_control.connect("two", at=at, token=record.token)
        monkeypatch.setenv("FORGATHER_JOBS_DIR", str(folder / "elsewhere"))
        with pytest.raises(errors.NoSuchJob, match="another job answers there, 'one'"):
            forgather_control.connect("two", at=f"tcp://{HERE}:{record.port}", token=record.token)
        forgather_control.connect("on", at=f"tcp://{HERE}:{record.port}", token=record.token).close()
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
    found = api._port(record)
    assert found == (expected and TcpEndpoint(expected, 8900, True, "ab"))
