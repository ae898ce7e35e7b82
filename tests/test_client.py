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
from forgather_control import caller, client, errors
from forgather_control.endpoint import UnixEndpoint
from forgather_control.record import parse_record

from .world import MS, SOON, cli, job_process, running_loop, until


class Peer:
    """A server of the test's own: accepts one connection and does what ``act(file, socket)`` does."""

    def __init__(self, folder: Path, act) -> None:
        self.path = str(folder / "peer.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, args=(act,))
        self._thread.start()

    def _serve(self, act) -> None:
        sock, _ = self._listener.accept()
        with sock, sock.makefile("rb") as file:
            act(file, sock)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.join(SOON)
        self._listener.close()
        assert not self._thread.is_alive()


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
        assert client.find().job_id == client.find("al").job_id == client.find("alpha").job_id == "alpha"
        with running_loop("alphabet"):
            assert client.find("alpha").job_id == "alpha"
            for name in ("al", None):
                with pytest.raises(errors.AmbiguousJob) as caught:
                    client.find(name)
                assert sorted(caught.value.data["candidates"]) == ["alpha", "alphabet"]


@pytest.mark.parametrize("name", ["", "nobody", "../jobs/alpha", "/etc", "a\x1b[2J", "é", "." * 3, "x" * 300])
def test_a_name_that_fits_nothing_is_no_such_job(name):
    """No name is ever taken for a path, and the error prints safely."""
    with running_loop("alpha"), pytest.raises(errors.NoSuchJob) as caught:
        client.find(name)
    assert str(caught.value).isprintable()


def test_no_live_job_is_no_such_job():
    """Without a name and without a job there is nothing to choose from."""
    with pytest.raises(errors.NoSuchJob):
        client.find()


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
    return any(command["state"] == "accepted" for command in client.get_job_status(job_id)["commands"])


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
        stale = client.find("phoenix")
        old.kill()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
        with job_process("phoenix") as new:
            words = rf"restarted as pid {new.pid} on .*, restart 3, before it answered; whether its abort .* ask again$"
            with pytest.raises(errors.JobDead, match=words) as caught:
                job.call("abort")
            assert caught.value.data["pid"] == new.pid
            assert "ask again" in str(client._unreachable(stale))
            assert client.get_job_status("phoenix")["pid"] == new.pid


def test_a_job_that_hangs_up_and_lives_is_not_called_dead(folder, monkeypatch):
    """Its process runs, its record stands: it does not answer, which is all that is known."""
    monkeypatch.setattr(caller, "_DYING", 50 * MS)
    mine = {"job_id": "peer", "host": socket.gethostname(), "port": None, "pid": os.getpid(), "started_at": 1.0}
    (folder / "peer").mkdir()
    with Peer(folder, lambda file, sock: file.readline()) as peer:
        (folder / "peer" / "endpoint.json").write_text(json.dumps({**mine, "socket": peer.path}))
        with forgather_control.connect("peer") as job:
            with pytest.raises(
                errors.JobNotAnswering, match=f"hung up .* though pid {os.getpid()} .* still runs; whether"
            ):
                job.call("save_checkpoint")


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
            assert client.find(name).job_id == "alpha"
        assert client.get_job_status("1200_3")["job_id"] == "alpha"
        assert forgather_control.save_checkpoint("1204", wait="finished", timeout=SOON).state == "finished"
        for name in ("12", "1200_", "my", "3", "none"):
            with pytest.raises(errors.NoSuchJob):
                client.find(name)
        _launched(monkeypatch, **{**array, "SLURM_JOB_ID": "1205", "SLURM_ARRAY_TASK_ID": "4"})
        with running_loop("beta"):
            assert [client.find(name).job_id for name in ("1200_3", "1200_4")] == ["alpha", "beta"]
            with pytest.raises(errors.AmbiguousJob) as caught:
                client.find("1200")
            assert sorted(caught.value.data["candidates"]) == ["alpha", "beta"]


def test_an_id_goes_before_a_launchers_name_and_a_prefix_beside_it(monkeypatch):
    """An exact id wins; what is one job's run and the beginning of another's id is ambiguous, of its own id is not."""
    _launched(monkeypatch, SLURM_JOB_ID="7", TORCHELASTIC_RUN_ID="exp")
    with running_loop("exp-1"):
        assert client.find("exp").job_id == "exp-1"
        _launched(monkeypatch)
        with running_loop("exp-2"):
            with pytest.raises(errors.AmbiguousJob):
                client.find("exp")
            with running_loop("exp"):
                assert client.find("exp").job_id == "exp"
            with running_loop("7"):
                assert client.find("7").job_id == "7"
            assert client.find("7").job_id == "exp-1"


def test_what_an_earlier_turn_left_does_not_hide_the_run(monkeypatch):
    """Restarted under a new id, a run is found by its name; two dead ones of one turn stay ambiguous, as ids do."""
    _launched(monkeypatch, SLURM_JOB_ID="7")
    with job_process("first") as first:
        first.kill()
    assert client.find("7").job_id == "first"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with job_process("second") as second:
        assert client.find("7").job_id == "second"
        second.kill()
    assert client.find("7").job_id == "second"
    with job_process("third") as third:
        third.kill()
    with pytest.raises(errors.AmbiguousJob) as caught:
        client.find("7")
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
    assert isinstance(client._unreachable(gone), errors.NoSuchJob)


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff\xfe\n", b"[]\n", b"{}\n", b'{"jsonrpc":"2.0","id":1}\n', b"null\n"],
)
def test_a_peer_that_is_none_of_us_is_named(folder, answer):
    """Garbage instead of a reply is an error of ours, not a traceback of json's."""

    def act(file, sock) -> None:
        file.readline()
        sock.sendall(answer)

    with Peer(folder, act) as peer, client.Client(UnixEndpoint(peer.path), "peer") as job:
        with pytest.raises(errors.InternalError):
            job.call("ping")


def test_an_unknown_error_code_is_kept():
    """A newer job's error arrives as a ControlError with its code and data."""
    error = errors.from_wire(-32077, "new", {"fact": 1})
    assert type(error) is errors.ControlError and error.data == {"code": -32077, "fact": 1}


def test_a_patient_wait_asks_whether_anybody_is_there(folder, monkeypatch):
    """Without a deadline a silent peer is asked, and given up after the silence; one that answers is not."""
    monkeypatch.setattr(caller, "_ARE_YOU_THERE", 30 * MS)
    monkeypatch.setattr(caller, "_SILENCE", 150 * MS)
    asked: list[str] = []

    def act(file, sock) -> None:
        for line in file:
            message = json.loads(line)
            asked.append(message["method"])
            if message["method"] == "ping" and len(asked) < 12:
                sock.sendall(b'{"jsonrpc":"2.0","id":null,"result":{}}\n')

    with Peer(folder, act) as peer, client.Client(UnixEndpoint(peer.path), "peer") as job:
        with pytest.raises(errors.JobNotAnswering):
            job.call("save_checkpoint", wait="finished")
    assert asked[0] == "save_checkpoint" and len(asked) >= 12


def test_replies_of_earlier_calls_are_not_taken_for_later_ones(folder):
    """A reply with another id is passed over."""

    def act(file, sock) -> None:
        file.readline()
        sock.sendall(b'{"jsonrpc":"2.0","id":99,"result":"old"}\n{"jsonrpc":"2.0","id":1,"result":"new"}\n')

    with Peer(folder, act) as peer, client.Client(UnixEndpoint(peer.path), "peer") as job:
        assert job.call("ping") == "new"


def test_a_reply_without_a_record_is_named(folder):
    """A peer that answers a command with something else is an error of ours."""

    def act(file, sock) -> None:
        file.readline()
        sock.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"state":"finished"}}\n')

    with Peer(folder, act) as peer, client.Client(UnixEndpoint(peer.path), "peer") as job:
        with pytest.raises(errors.InternalError, match="no command record"):
            job.command("abort")


def test_only_commands_are_waited_for_without_a_deadline(folder):
    """A query whose first parameter, by position, is no wait keeps its deadline."""
    with Peer(folder, lambda file, sock: file.readline() and file.readline()) as peer:
        with client.Client(UnixEndpoint(peer.path), "peer", timeout=100 * MS) as job:
            with pytest.raises(errors.JobNotAnswering):
                job.call_raw("get_command", ["some-id"])


def test_cleanup_removes_what_was_agreed_to_and_judges_it_again():
    """Of the jobs that were shown, one has been started again meanwhile: it stays."""
    with job_process("one") as one, job_process("two") as two:
        one.kill()
        two.kill()
        shown = client.dead_jobs()
    with running_loop("two"):
        assert client.cleanup(shown) == ["one"]
        assert [job.job_id for job in forgather_control.list_jobs()] == ["two"]
