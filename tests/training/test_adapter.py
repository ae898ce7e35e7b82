"""The boundary around hooks, the runs of one integration after the other, and runs that are never closed."""

from __future__ import annotations

import copy
import gc
import json
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from forgather_control import get_command, get_job_status, save_and_stop, save_checkpoint
from forgather_control.client.target import find
from forgather_control.errors import JobsDirUnusable, NoSuchJob
from forgather_control.server import limits
from forgather_control.training.adapter import Adapter, controlled, guarded

from ..support.harness import MS, ROOT, SOON, Process, Wire, running_loop, until

JOB = "job"


class Hooks(Adapter):
    """An adapter with a few hooks of its own."""

    def __init__(self, job_id: str | None = None, **options: Any) -> None:
        super().__init__(job_id, **options)

    @guarded
    def begin(self, step: int = 0, max_steps: int | None = None) -> None:
        """Open."""
        self._open(step, max_steps)

    @controlled
    def step(self, step: int) -> None:
        """Apply."""
        self._run.step(step)

    @guarded
    def end(self) -> None:
        """Close."""
        self._close()

    @guarded
    def do(self, call: Callable[[], Any], *, twice: bool = False) -> Any:
        """Whatever is asked."""
        return (call(), call()) if twice else call()


@pytest.fixture
def adapter() -> Iterator[Hooks]:
    """One that runs, as "job"."""
    made = Hooks(JOB)
    made.begin()
    yield made
    made.end()


@pytest.fixture
def waiting() -> Iterator[Callable[[str], Wire]]:
    """Sends a command whose answer is to come at its end; accepted when it returns."""
    wires = []

    def send(command: str) -> Wire:
        wire = Wire(find(JOB).socket)
        wires.append(wire)
        params = {"wait": "finished", "command_id": command}
        wire.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": command, "params": params}).encode() + b"\n")
        until(lambda: is_known(command))
        return wire

    yield send
    for wire in wires:
        wire.close()


def is_known(command_id: str) -> bool:
    """Whether the job has accepted it."""
    try:
        return bool(get_command(JOB, command_id))
    except LookupError:
        return False


def fail() -> None:
    """Raise an unexpected error."""
    raise RuntimeError("ours")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged that a user should notice."""
    return [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING]


# The boundary...


def test_a_hook_hands_through():
    """Arguments, results, name and docstring of a hook are its own."""
    assert Hooks().do(lambda: 7, twice=True) == (7, 7)
    assert Hooks.do.__name__ == "do" and Hooks.do.__doc__ == "Whatever is asked."


def test_an_exception_stays_at_the_boundary(adapter, waiting, caplog, jobs_dir):
    """It is logged once with its traceback; the hook returns None; control is off, and waiting clients are told."""
    wire = waiting("save_checkpoint")
    assert adapter.do(fail) is None
    assert len(warnings(caplog)) == 1 and "Training continues" in caplog.text and "RuntimeError: ours" in caplog.text
    record = wire.reply()["result"]
    assert record["state"] == "failed" and record["error"]["message"] == "control failed in the job"
    assert not (jobs_dir / JOB).exists()
    adapter.step(2)
    adapter.end()
    assert len(warnings(caplog)) == 1


def test_a_second_exception_while_it_is_closed(adapter, caplog, monkeypatch):
    """Giving up may fail too, and still nothing reaches training."""
    controller = adapter._controller
    close = controller.close
    monkeypatch.setattr(controller, "close", lambda reason=None: fail())
    assert adapter.do(fail) is None
    assert warnings(caplog)[1:] == ["The control server could not be closed."]
    close()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_passes(adapter, kind):
    """Interrupts and exits are meant for the training script."""

    def interrupt() -> None:
        raise kind

    with pytest.raises(kind):
        adapter.do(interrupt)
    assert get_job_status(JOB)["job_id"] == JOB


def test_aborted_is_of_the_last_run(adapter, waiting):
    """``aborted`` says so until the next run begins."""
    waiting("abort")
    assert not adapter.aborted
    adapter.step(1)
    assert adapter.aborted
    adapter.end()
    assert adapter.aborted
    adapter.begin()
    assert not adapter.aborted


# One run after the other...


def test_job_id_before_during_and_after(jobs_dir):
    """The id that was asked for; a generated one is known while it runs."""
    chosen, generated = Hooks(JOB), Hooks()
    assert (chosen.job_id, generated.job_id) == (JOB, None)
    generated.begin()
    assert (jobs_dir / str(generated.job_id)).is_dir()
    generated.end()
    assert generated.job_id is None


def test_a_run_that_was_left_open_is_closed_by_the_next(adapter, waiting):
    """begin() again answers who waited, and the id is free for the new run."""
    wire = waiting("save_checkpoint")
    adapter.begin(step=5)
    assert "started again" in wire.reply()["result"]["error"]["message"]
    assert get_job_status(JOB)["global_step"] == 5


def test_a_taken_id_is_one_warning(adapter, caplog):
    """The second run with an id in use is not controllable, says so once, and trains."""

    def run():
        second = Hooks(JOB)
        second.begin()
        second.step(1)
        second.end()

    thread = threading.Thread(target=run)  # on the first one's thread it would end that one
    thread.start()
    thread.join(SOON)
    assert len(warnings(caplog)) == 1 and "Control is off" in warnings(caplog)[0]
    assert get_job_status(JOB)["global_step"] == 0


def test_jobs_dir_that_cannot_be_used(monkeypatch, caplog, tmp_path):
    """An unusable jobs directory is one warning that names it."""
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("FORGATHER_JOBS_DIR", str(file))
    hooks = Hooks(JOB)
    hooks.begin()
    hooks.step(1)
    assert len(warnings(caplog)) == 1 and str(file) in warnings(caplog)[0]
    with pytest.raises((NoSuchJob, JobsDirUnusable)):
        get_job_status(JOB)


def test_not_enabled(jobs_dir):
    """enabled=False opens nothing."""
    hooks = Hooks(JOB, enabled=False)
    hooks.begin()
    hooks.step(1)
    hooks.end()
    assert not jobs_dir.exists()


def test_copies(adapter):
    """Before and after a run an adapter can be copied, as hyper-parameter searches do."""
    adapter.end()
    assert copy.deepcopy(adapter).job_id == JOB


# Runs that are never closed...


def test_an_adapter_that_is_gone(waiting, jobs_dir):
    """Collected without an end: the directory goes, applied and pending commands have failed."""
    hooks = Hooks(JOB)
    hooks.begin()
    applied = waiting("graceful_stop")
    hooks.step(1)
    pending = waiting("save_checkpoint")
    del hooks
    gc.collect()
    until(lambda: not (jobs_dir / JOB).exists())
    for wire in (applied, pending):
        record = wire.reply()["result"]
        assert record["state"] == "failed" and record["error"]["message"] == "training ended by an exception"


def test_an_adapter_that_is_gone_on_another_thread(waiting, jobs_dir, monkeypatch):
    """Collected on a thread that may hold our locks, such as the server's: its next tick ends the job."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 100 * MS)
    kept = [Hooks(JOB)]
    kept[0].begin()
    wire = waiting("save_checkpoint")
    thread = threading.Thread(target=kept.clear)
    thread.start()
    thread.join()
    assert "ended by an exception" in wire.reply()["result"]["error"]["message"]
    until(lambda: not (jobs_dir / JOB).exists())


def test_a_training_thread_that_is_gone(waiting, monkeypatch):
    """A thread that trained and ended without an end of the run: the job ends too."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 100 * MS)
    hooks = Hooks(JOB)
    thread = threading.Thread(target=hooks.begin)
    thread.start()
    thread.join()
    try:
        wire = waiting("save_checkpoint")
    except (LookupError, ConnectionError):
        return  # it was quicker
    assert wire.reply()["result"]["state"] == "failed"


EXIT = """
import sys
from forgather_control import save_checkpoint
from tests.training.test_adapter import Hooks
hooks = Hooks("job")
hooks.begin()
print("begun", flush=True)
sys.stdin.readline()
raise SystemExit(3)
"""


def test_the_interpreters_exit(waiting, jobs_dir):
    """A script that ends in the middle of a run answers its waiting clients, and leaves no directory."""
    with Process(EXIT, cwd=ROOT) as process:
        assert process.line() == "begun", "".join(process.errors)
        wire = waiting("save_checkpoint")
        process.say("")
        assert wire.reply()["result"]["state"] == "failed"
        assert process.end() == 3
    assert not (jobs_dir / JOB).exists()


def test_a_closed_run_is_finalized_no_more(waiting, jobs_dir):
    """The finalizer of a run that ended does not touch the next job of that id."""
    hooks = Hooks(JOB)
    hooks.begin()
    hooks.end()
    with running_loop(JOB):
        del hooks
        gc.collect()
        assert save_checkpoint(JOB, wait="finished", timeout=20).state == "finished"


# Several ranks, signals...


def test_a_disabled_adapter_opens_no_port(caplog):
    """Not even to find that it is taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        hooks = Hooks(JOB, enabled=False, port=taken.getsockname()[1])
        hooks.begin()
        hooks.end()
    assert warnings(caplog) == []


def test_each_run_has_a_port_and_a_token_of_its_own(jobs_dir):
    """The same number again, where one was given; and after the run it is free."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hooks, tokens = Hooks(JOB, port=port), set()
    for _ in range(2):
        hooks.begin()
        assert find(JOB).port == port
        tokens.add(find(JOB).token)
        hooks.end()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    assert len(tokens) == 2


def test_a_signal_is_a_command_and_calls_who_was_there_before():
    """SIGUSR1 saves, the earlier handler is called, too, and has the signal back at the end."""
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *args: heard.append(args))
    try:
        job = Hooks(JOB, signals={"SIGUSR1": "save_checkpoint"})
        job.begin()
        signal.raise_signal(signal.SIGUSR1)
        assert len(heard) == 1 and not job._requested.save
        job.step(1)
        assert job._requested.save and [c["command"] for c in get_job_status(JOB)["commands"]] == ["save_checkpoint"]
        job.end()
        signal.raise_signal(signal.SIGUSR1)
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(("age", "spared"), [(0.0, False), (1e6, True)])
def test_a_young_checkpoint_is_spared(age, spared):
    """A signal that saves and stops stops only, and its record names the checkpoint that is there."""
    job = Hooks(JOB, signals={"SIGUSR1": "save_and_stop"}, fresh_seconds=age)
    job.begin()
    job.step(1)
    job._controller.saved(1, __file__)
    with Wire(find(JOB).socket) as wire:
        signal.raise_signal(signal.SIGUSR1)
        job.step(2)
        assert job._requested.stop and (job._requested.save, job._requested.skip_save) == (not spared, spared)
        (record,) = wire.call("list_commands")["result"]
        assert (record["command"], record["applied_at_step"]) == ("save_and_stop", 2)
        # Asked again by its id, the same command: the answer comes at its end.
        wait = {"wait": "finished", "command_id": record["command_id"]}
        wire.send(json.dumps({"jsonrpc": "2.0", "id": 1, "method": "save_and_stop", "params": wait}).encode() + b"\n")
        job.end()
        record = wire.reply()["result"]
    expected = (
        ("finished", {"step": 1, "path": __file__, "seconds": 0.0, "evaluated": False}) if spared else ("failed", None)
    )
    assert (record["state"], record["result"]) == expected


def test_a_command_saves_however_young_the_last_checkpoint_is():
    """Only a signal has no way to say what its sender knows."""
    job = Hooks(JOB, fresh_seconds=1e6)
    job.begin()
    job.step(1)
    job._controller.saved(1, "/checkpoint-1")
    save_and_stop(JOB)
    job.step(2)
    assert job._requested.save and job._requested.stop and not job._requested.skip_save
    job.end()


def test_signals_off_the_main_thread_are_one_warning(caplog):
    """A loop in another thread trains, controllable in every other way."""
    with running_loop(JOB, signals={"SIGUSR1": "abort"}) as run:
        until(lambda: run.steps)
        assert get_job_status(JOB)["status"] == "training"
    assert sum("Signals run no commands" in record.getMessage() for record in caplog.records) == 1
