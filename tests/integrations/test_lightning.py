"""The four commands in Lightning's real Trainer.

As in ``test_hf``: commands go over the real socket while training runs, sent by a callback at a chosen
place, so that each is applied at a known step; the answers are read when training is over.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import forgather_control
from forgather_control import LightningControlCallback, connect, get_command, get_job_status
from forgather_control.client.target import find
from forgather_control.training.controller import Controller
from forgather_control.training.options import ControlOptions

from ..support.harness import (
    ROOT,
    SOON,
    Process,
    Wire,
    needs_lightning,
    needs_torch,
    needs_version,
    running_loop,
    until,
)

try:
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
    from lightning.pytorch.loggers import CSVLogger, Logger
    from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
    from torch.utils._python_dispatch import TorchDispatchMode

    Dataset = torch.utils.data.IterableDataset
except ImportError:  # every test here is skipped then
    Callback = Dataset = LightningModule = Logger = TorchCheckpointIO = object  # type: ignore[assignment, misc]

pytestmark = [needs_torch, needs_lightning, pytest.mark.filterwarnings("ignore")]

JOB = "job"
COMMANDS = ("save_checkpoint", "graceful_stop", "save_and_stop", "abort")
STEPS_A_EPOCH = 5
STEPS = 10
every_command = pytest.mark.parametrize("command", COMMANDS)


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Lightning's tips."""
    loud = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    for one in loud:
        one.setLevel(logging.ERROR)
    yield
    for one in loud:
        one.setLevel(logging.INFO)


# A real trainer, small...


class Tiny(LightningModule):
    """Two weights and a dropout. Each evaluation is worse than the last; they are counted."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = torch.nn.Linear(2, 1)
        self.dropout = torch.nn.Dropout(dropout)
        self.evaluated: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.line(self.dropout(batch)).pow(2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(1.0 + self.global_step))

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.evaluated.append(self.global_step)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def data(batches: int = STEPS_A_EPOCH) -> Any:
    """As many batches of two rows, all alike, so that a training that is resumed may begin with any of them."""
    return torch.utils.data.DataLoader(torch.ones(2 * batches, 2), batch_size=2)


def make(out: Path, *callbacks: Any, **options: Any) -> Any:
    """A trainer of 2 epochs of 5 steps; without a ModelCheckpoint if none is given."""
    settings: dict[str, Any] = {
        "max_epochs": STEPS // STEPS_A_EPOCH,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
        "default_root_dir": str(out),
        "callbacks": list(callbacks),
        **options,
    }
    return Trainer(**settings)


def fit(
    trainer: Any, model: Any = None, *, validate: bool = False, batches: int = STEPS_A_EPOCH, **options: Any
) -> Any:
    """Train; the model."""
    model = model or Tiny()
    trainer.fit(model, data(batches), data(1) if validate else None, **options)
    return model


def ours(**options: Any) -> LightningControlCallback:
    """The callback under test."""
    return LightningControlCallback(**{"job_id": JOB, **options})


# Senders and watchers...

#: Of this test, to be hung up at its end.
SENT: list[Sent] = []


class Sent:
    """A command whose sender waits for its end, accepted already."""

    def __init__(self, command: str, **params: Any) -> None:
        self.id = f"{command}-{len(SENT)}"
        with connect(JOB) as client:
            self.wire = Wire(find(JOB).socket)
            SENT.append(self)
            request = {"wait": "finished", "command_id": self.id, **params}
            message = {"jsonrpc": "2.0", "id": 1, "method": command, "params": request}
            self.wire.send(json.dumps(message).encode() + b"\n")
            until(lambda: any(known["command_id"] == self.id for known in client.call("list_commands")))

    def record(self) -> Any:
        """The answer; the test fails where there is none."""
        return self.wire.reply()["result"]


@pytest.fixture(autouse=True)
def hang_up() -> Iterator[None]:
    """Close the senders' connections, also of those whose record no test asked for."""
    yield
    while SENT:
        SENT.pop().wire.close()


class Watcher(Callback):
    """Calls functions at hooks: ``Watcher(on_train_batch_end=...)``, each with the trainer."""

    def __init__(self, **calls: Callable[[Any], Any]) -> None:
        for hook, call in calls.items():
            setattr(self, hook, functools.partial(self._call, call))

    @staticmethod
    def _call(call: Callable[[Any], Any], trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        call(trainer)


class At(Watcher):
    """Sends ``command`` when ``hook`` is first called at ``step``; before ours, it is applied at that very step."""

    def __init__(self, step: int, command: str, hook: str = "on_train_batch_end", **params: Any) -> None:
        self.step, self.command, self.params = step, command, params
        self.sent: Sent | None = None
        self.before: Callable[[], Any] = lambda: None
        self.seen: Any = None
        super().__init__(**{hook: self._send})

    def _send(self, trainer: Any) -> None:
        if trainer.global_step == self.step and self.sent is None and not trainer.sanity_checking:
            self.seen = self.before()
            self.sent = Sent(self.command, **self.params)

    def record(self) -> Any:
        """What became of it."""
        assert self.sent is not None, "it was never sent"
        return self.sent.record()


def files(out: Path) -> dict[str, int]:
    """Every checkpoint, with its time."""
    return {str(path.relative_to(out)): path.lstat().st_mtime_ns for path in out.rglob("*.ckpt")}


def weights(model: Any) -> list[Any]:
    """A copy of all of them."""
    return [value.detach().clone() for value in model.state_dict().values()]


def same(one: list[Any], other: list[Any]) -> bool:
    """Whether they are equal bit by bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What we logged that a user should notice."""
    ours = [line for line in caplog.records if line.name == "forgather_control"]
    return [line.getMessage() for line in ours if line.levelno >= logging.WARNING]


def is_saved(record: Any, folder: Path, step: int) -> None:
    """Assert that a command finished with a whole checkpoint of ``step``."""
    assert record["state"] == "finished", record
    path = Path(record["result"]["path"])
    assert path == folder / f"control-step={step}.ckpt"
    assert record["result"]["step"] == step and record["result"]["seconds"] >= 0
    inside = torch.load(path, weights_only=False)
    assert inside["global_step"] == step and inside["optimizer_states"] and inside["state_dict"]


# The four commands...

#: How the trainer itself saves: not at all, and in several ways; in each the one of ours is one more.
SAVERS: dict[str, Callable[[Path], list[Any]]] = {
    "none": lambda out: [],
    "epochs": lambda out: [ModelCheckpoint(dirpath=out / "mine")],
    "steps": lambda out: [ModelCheckpoint(dirpath=out / "mine", every_n_train_steps=1, save_last=True)],
    "best": lambda out: [ModelCheckpoint(dirpath=out / "mine", monitor="val_loss", mode="max", save_last="link")],
    "several": lambda out: [
        ModelCheckpoint(dirpath=out / "mine", every_n_train_steps=2, save_top_k=-1),
        ModelCheckpoint(dirpath=out / "mine", filename="last", save_last=True, save_top_k=0, every_n_epochs=2),
    ],
}
every_saver = pytest.mark.parametrize("saver", SAVERS)
#: An ordinary step, the last of an epoch, the last.
WHERE = pytest.mark.parametrize("step", [3, 5, 10])


@WHERE
@every_saver
def test_save_checkpoint_saves_and_trains_on(tmp_path, saver, step):
    """save_checkpoint saves at its step, whatever ModelCheckpoint does, and training continues to its end."""
    at = At(step, "save_checkpoint")
    trainer = make(tmp_path, at, ours(), *SAVERS[saver](tmp_path))
    fit(trainer, validate=True)
    record = at.record()
    is_saved(record, tmp_path / ("checkpoints" if saver == "none" else "mine"), step)
    assert record["applied_at_step"] == step and trainer.global_step == STEPS


@WHERE
@every_saver
@pytest.mark.parametrize("command", ["graceful_stop", "save_and_stop"])
def test_a_stop_ends_at_its_step(tmp_path, saver, command, step):
    """A stop ends at its step with a checkpoint of it; graceful_stop without one where the trainer saves none."""
    at, before = At(step, command), []
    at.before = lambda: before.extend(files(tmp_path))
    trainer = make(tmp_path, at, ours(), *SAVERS[saver](tmp_path))
    fit(trainer, validate=True)
    record = at.record()
    assert trainer.global_step == step == record["applied_at_step"]
    assert ("note" in record) == ((saver, command) == ("none", "graceful_stop"))
    if (saver, command) == ("none", "graceful_stop"):
        assert record["state"] == "finished"
        assert record["result"] == {"step": step, "path": None, "seconds": None, "evaluated": False}
        assert files(tmp_path) == {}
    else:
        is_saved(record, tmp_path / ("checkpoints" if saver == "none" else "mine"), step)


@WHERE
@every_saver
def test_abort_leaves_the_disk_as_it_is(tmp_path, saver, step):
    """abort ends at its step; no checkpoint appears, changes or goes; nothing is evaluated; the books still hold."""
    at, model, callback = At(step, "abort"), Tiny(), ours()
    at.before = lambda: (files(tmp_path), weights(model), list(model.evaluated))
    savers = SAVERS[saver](tmp_path)
    trainer = make(tmp_path, at, callback, EarlyStopping("val_loss"), *savers)
    fit(trainer, model, validate=True)
    record = at.record()
    assert record["state"] == "finished" and record["result"]["path"] is None
    assert trainer.global_step == step == record["applied_at_step"] and callback.aborted
    assert (files(tmp_path), model.evaluated) == (at.seen[0], at.seen[2])
    assert same(weights(model), at.seen[1])
    for one in savers:
        for path in filter(None, [one.best_model_path, one.last_model_path, *one.best_k_models]):
            assert Path(path).exists()


@every_command
@pytest.mark.parametrize("limits", [{"min_epochs": 2}, {"min_steps": 8}, {"min_epochs": 2, "min_steps": 8}])
def test_a_stop_does_not_wait_for_the_least_of_a_run(tmp_path, command, limits):
    """min_steps and min_epochs hold EarlyStopping back, not the user; afterwards they are as before."""
    at = At(3, command)
    trainer = make(tmp_path, at, ours(), **limits)
    fit(trainer)
    assert at.record()["state"] == "finished"
    assert trainer.global_step == (STEPS if command == "save_checkpoint" else 3)
    assert (trainer.min_steps, trainer.min_epochs) == (limits.get("min_steps"), limits.get("min_epochs", 1))


# What a step is...


@every_command
@pytest.mark.parametrize("step", [2, 5])
def test_a_step_is_one_of_the_optimizer(tmp_path, command, step):
    """With gradients accumulated over three batches, commands are applied at whole steps only, and once."""
    at = At(step - 1, command, hook="on_train_batch_start")  # the first batch of that step
    trainer = make(tmp_path, at, ours(), accumulate_grad_batches=3)
    fit(trainer, batches=3 * STEPS_A_EPOCH)
    record = at.record()
    assert record["state"] == "finished" and record["applied_at_step"] == step
    assert trainer.global_step == (STEPS if command == "save_checkpoint" else step)
    assert len(files(tmp_path)) == (command in ("save_checkpoint", "save_and_stop"))


class TwoOptimizers(Tiny):
    """Optimizes by hand, with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.line(batch).pow(2).mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.01)]


class BareOptimizer(Tiny):
    """Steps the torch optimizer itself, so that global_step does not move."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.line(batch).pow(2).mean())
        optimizer.step()


@pytest.mark.parametrize("command", ["save_checkpoint", "graceful_stop", "save_and_stop"])
def test_batches_count_where_global_step_does_not_move(tmp_path, command):
    """A command is applied at the end of a batch, and what it saves has that step."""
    sent: list[Sent] = []

    def send(trainer: Any) -> None:
        if trainer.fit_loop.total_batch_idx == 3:
            sent.append(Sent(command))

    trainer = make(tmp_path, Watcher(on_train_batch_start=send), ours())
    fit(trainer, BareOptimizer())
    record, saves = sent[0].record(), command != "graceful_stop"
    assert record["state"] == "finished" and record["applied_at_step"] == record["result"]["step"] == 4, record
    assert not saves or Path(record["result"]["path"]).exists()
    assert trainer.global_step == 0
    assert trainer.fit_loop.total_batch_idx + 1 == (STEPS if command == "save_checkpoint" else 4)


def test_a_stop_in_the_epoch_without_steps(tmp_path):
    """StochasticWeightAveraging ends with an epoch that only averages: a stop ends it at a batch."""
    sent: list[Sent] = []

    def send(trainer: Any) -> None:
        if trainer.current_epoch == 2 and not sent:
            sent.append(Sent("graceful_stop"))

    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    model = Tiny()
    model.norm = torch.nn.BatchNorm1d(1)
    trainer = make(tmp_path, averaging, Watcher(on_train_batch_start=send), ours(), max_epochs=2)
    fit(trainer, model)
    record = sent[0].record()
    assert record["state"] == "finished" and record["applied_at_step"] == trainer.global_step + 1
    assert trainer.fit_loop.total_batch_idx + 1 < 3 * STEPS_A_EPOCH


SPAWNS = """
import torch
import lightning.pytorch
from forgather_control import LightningControlCallback, abort

class Line(lightning.pytorch.LightningModule):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(2, 1)

    def training_step(self, batch, index):
        return self.line(batch).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

class Abort(lightning.pytorch.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == 3:
            abort("job")

if __name__ == "__main__":
    callback = LightningControlCallback("job")
    for extra in ([Abort()], []):
        trainer = lightning.pytorch.Trainer(
            max_epochs=1, accelerator="cpu", strategy="ddp_spawn", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[*extra, callback],
        )
        trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(8, 2)))
        print("aborted", callback.aborted)
"""


@pytest.mark.once
def test_the_launching_script_knows_of_an_abort(tmp_path):
    """Where Lightning trains in processes that it spawns, aborted is true in the script, until it trains again."""
    script = tmp_path / "script.py"
    script.write_text(SPAWNS)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=4 * SOON)
    assert [line for line in done.stdout.splitlines() if "aborted" in line] == ["aborted True", "aborted False"], done


@every_command
def test_steps_of_two_optimizers(tmp_path, command):
    """Both count in global_step, and a command is applied when both have stepped."""
    at, seen = At(6, command), []
    look = Watcher(on_train_batch_start=lambda trainer: seen.append(get_job_status(JOB)["max_steps"]))
    trainer = make(tmp_path, at, ours(), look)
    fit(trainer, TwoOptimizers())
    assert at.record()["applied_at_step"] == 6
    assert trainer.global_step == (2 * STEPS if command == "save_checkpoint" else 6)
    assert seen[0] is None  # the steps of a batch are not known


# When it is sent...


@pytest.mark.parametrize(
    ("hook", "sent_at", "applied_at"),
    [
        ("on_train_start", 0, 1),
        ("on_validation_batch_end", 2, 3),
        ("on_validation_end", 4, 5),
        ("on_save_checkpoint", 3, 4),
        ("on_train_epoch_end", 5, 6),
        ("on_train_batch_start", 6, 7),
    ],
)
@every_command
def test_commands_are_accepted_at_any_time(tmp_path, command, hook, sent_at, applied_at):
    """Sent before the first step, during validation or a save: applied at the end of the next step."""
    at = At(sent_at, command, hook=hook)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3)
    trainer = make(tmp_path, ours(), at, saver, val_check_interval=2)
    fit(trainer, validate=True)
    record = at.record()
    assert record["state"] == "finished" and record["applied_at_step"] == applied_at
    assert trainer.global_step == (STEPS if command == "save_checkpoint" else applied_at)


def test_a_command_too_late_is_answered(tmp_path):
    """Sent when the last step is over: it fails, and its sender is told that training ended."""
    at = At(STEPS, "save_checkpoint", hook="on_train_end")
    fit(make(tmp_path, at, ours()))
    record = at.record()
    assert record["state"] == "failed" and "ended before the command could be applied" in record["error"]["message"]


def test_all_four_at_once(tmp_path):
    """Of commands applied at the same step abort wins: the saves fail and say why, the stops are finished."""
    at = [At(4, command) for command in COMMANDS]
    trainer = make(tmp_path, *at, ours(), *SAVERS["epochs"](tmp_path))
    fit(trainer)
    states = {one.command: one.record() for one in at}
    assert [states[command]["state"] for command in COMMANDS] == ["failed", "finished", "failed", "finished"]
    assert files(tmp_path) == {} and trainer.global_step == 4


def test_an_abort_behind_a_stop(tmp_path):
    """A callback that takes a stop back delays it by a step; the abort that comes then is one all the same."""
    stop, abort = At(3, "graceful_stop"), At(4, "abort")

    def take_back(trainer: Any) -> None:
        if trainer.global_step == 3:
            trainer.should_stop = False

    trainer = make(tmp_path, stop, abort, ours(), Watcher(on_train_batch_end=take_back), *SAVERS["epochs"](tmp_path))
    fit(trainer)
    is_saved(stop.record(), tmp_path / "mine", 3)
    assert abort.record()["state"] == "finished" and trainer.global_step == 4
    assert list(files(tmp_path)) == ["mine/control-step=3.ckpt"]


def test_the_python_api_from_another_thread(tmp_path):
    """A thread that saves with wait="finished" gets the path while training continues."""
    records: list[Any] = []

    def client() -> None:
        records.append(forgather_control.save_checkpoint(JOB, wait="finished", timeout=SOON))
        records.append(forgather_control.graceful_stop(JOB, wait="finished", timeout=SOON))

    thread = threading.Thread(target=client)
    trainer = make(tmp_path, ours(), Watcher(on_train_start=lambda _: thread.start()), max_epochs=-1)
    fit(trainer)
    thread.join(SOON)
    saved, stopped = records
    assert Path(saved.result["path"]).is_file()
    assert saved.applied_at_step <= stopped.applied_at_step == trainer.global_step


@pytest.mark.parametrize("fresh", [0.0, 1e9])
@pytest.mark.parametrize("behind", [False, True])
def test_a_signal_gives_a_command(tmp_path, behind, fresh):
    """SIGTERM saves and stops, rather than raising as in Lightning; a fresh checkpoint will do; all is put back."""
    before, early = signal.getsignal(signal.SIGTERM), At(2, "save_checkpoint")

    def send(trainer: Any) -> None:
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    sender, callback = Watcher(on_train_batch_end=send), ours(signals={"SIGTERM": "save_and_stop"}, fresh_seconds=fresh)
    trainer = make(tmp_path, early, *([callback, sender] if behind else [sender, callback]))
    fit(trainer, validate=True)
    step = 4 if behind else 3
    assert trainer.global_step == step and trainer.state.status == "finished"
    assert files(tmp_path).keys() == {f"checkpoints/control-step={n}.ckpt" for n in ([2] if fresh else [2, step])}
    is_saved(early.record(), tmp_path / "checkpoints", 2)
    assert signal.getsignal(signal.SIGTERM) == before


# What status says...


def test_status_words(tmp_path):
    """status names what the job does: starting, training, evaluating, saving, stopping; the sanity check has no job."""
    seen: dict[str, str] = {}

    def look(name: str) -> Callable[[Any], None]:
        def note(trainer: Any) -> None:
            if trainer.sanity_checking:
                assert forgather_control.list_jobs() == []
                return
            seen.setdefault(f"{name} {trainer.global_step}", get_job_status(JOB)["status"])

        return note

    hooks = ("on_train_start", "on_train_batch_start", "on_validation_batch_end", "on_save_checkpoint", "on_train_end")
    behind = Watcher(**{hook: look(hook) for hook in hooks})
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=3)
    trainer = make(tmp_path, At(8, "save_and_stop"), ours(), behind, saver, val_check_interval=2)
    fit(trainer, validate=True)
    assert seen["on_train_start 0"] == "starting"
    assert (
        seen["on_train_batch_start 0"] == seen["on_train_batch_start 2"] == seen["on_train_batch_start 3"] == "training"
    )
    assert seen["on_validation_batch_end 2"] == "evaluating"
    assert seen["on_save_checkpoint 3"] == seen["on_save_checkpoint 8"] == "saving"
    assert seen["on_train_end 8"] == "stopping"


def test_status_figures(tmp_path):
    """Steps, parts of an epoch and metrics; these no more often than the trainer logs, and after a validation."""
    seen: dict[int, Any] = {}
    look = Watcher(on_train_batch_start=lambda trainer: seen.setdefault(trainer.global_step, get_job_status(JOB)))
    fit(make(tmp_path, ours(), look, log_every_n_steps=3), validate=True)
    assert [seen[step]["global_step"] for step in range(STEPS)] == list(range(STEPS))
    assert {status["max_steps"] for status in seen.values()} == {STEPS}
    assert seen[2]["epoch"] == 0.4 and seen[5]["epoch"] == 1.0 and seen[9]["progress"] == 0.9
    assert seen[2]["metrics"] == {}
    assert seen[3]["metrics"].keys() == {"loss"} and seen[4]["metrics"] == seen[3]["metrics"]
    assert seen[5]["metrics"]["val_loss"] == 6.0 and seen[5]["metrics"]["loss"] != seen[3]["metrics"]["loss"]
    assert seen[5]["metrics"] != seen[6]["metrics"] == seen[7]["metrics"] == seen[8]["metrics"] != seen[9]["metrics"]


def test_status_tells_how_far_a_validation_is(tmp_path):
    """Batch by batch, with the time left; also of one that was requested."""
    seen: list[dict[str, Any]] = []
    on_step: list[dict[str, Any]] = []
    look = Watcher(
        on_validation_batch_end=lambda trainer: seen.append(_evaluation()),
        on_train_batch_end=lambda trainer: on_step.append(get_job_status(JOB)),
    )
    fit(make(tmp_path, At(2, "evaluate"), ours(), look), validate=True)
    known = [each for each in seen if each]
    assert known[0]["batches"] == 1 and known[-1]["batches"] == known[-1]["total_batches"]
    assert all(each["eta_seconds"] is not None for each in known)
    assert sum(each["batches"] == 1 for each in known) == 3  # two epochs, and ours
    assert "evaluation" not in on_step[-1] and "eta_seconds" in on_step[-1]


def _evaluation() -> dict[str, Any]:
    """What the job says of its evaluation; nothing during the sanity check, which no job has."""
    return {} if not forgather_control.list_jobs() else get_job_status(JOB)["evaluation"]


class Endless(Dataset):
    """Data of no length."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.ones(2)


@pytest.mark.parametrize(
    ("options", "max_steps"),
    [
        ({"max_epochs": -1}, None),
        ({"max_steps": 7, "max_epochs": -1}, 7),
        ({"max_steps": 99, "max_epochs": 3}, 15),
        ({"max_epochs": 4, "limit_train_batches": 2}, 8),
        ({"max_epochs": 2, "accumulate_grad_batches": 2}, 6),
    ],
)
def test_where_it_will_end(tmp_path, options, max_steps):
    """max_steps is where training ends, if that is known."""
    seen: list[Any] = []

    def look(trainer: Any) -> None:
        seen.append(get_job_status(JOB)["max_steps"])
        trainer.should_stop = True

    fit(make(tmp_path, ours(), Watcher(on_train_batch_end=look), **options))
    assert seen[0] == max_steps


def test_data_of_no_length(tmp_path):
    """An epoch that has no end is epoch 0, and a stop stops it."""
    at, seen = At(3, "graceful_stop"), []
    look = Watcher(on_train_batch_end=lambda trainer: seen.append(get_job_status(JOB)))
    make(tmp_path, at, ours(), look).fit(Tiny(), torch.utils.data.DataLoader(Endless(), batch_size=2))
    assert at.record()["applied_at_step"] == 3
    assert seen[-1]["epoch"] == 0 and seen[-1]["max_steps"] is None


# Where it is saved...


def test_beside_the_logs(tmp_path):
    """Without ModelCheckpoint, but with a logger: where ModelCheckpoint would save."""
    at = At(3, "save_and_stop")
    fit(make(tmp_path, at, ours(), logger=CSVLogger(tmp_path / "logs", name="run")))
    is_saved(at.record(), tmp_path / "logs" / "run" / "version_0" / "checkpoints", 3)


class OddLogger(Logger):
    """Does not say what it is called."""

    version = None

    @property
    def name(self) -> str:
        raise RuntimeError("odd")

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        pass

    log_hyperparams = log_metrics


def test_beside_a_logger_that_fails(tmp_path):
    """A logger that cannot say where it writes does not prevent a save."""
    at = At(3, "save_and_stop")
    fit(make(tmp_path, at, ours(), logger=OddLogger()))
    is_saved(at.record(), tmp_path / "checkpoints", 3)


def test_no_checkpoint_is_overwritten(tmp_path):
    """A name that is taken, as by an earlier run, gets a version, as ModelCheckpoint gives one."""
    taken = tmp_path / "checkpoints" / "control-step=3.ckpt"
    for number, name in enumerate(("", "-v1", "-v2")):
        at = At(3, "save_and_stop")
        fit(make(tmp_path, at, ours()))
        path = Path(at.record()["result"]["path"])
        assert path == taken.with_name(f"control-step=3{name}.ckpt")
        assert len(files(tmp_path)) == number + 1


def test_fast_dev_run(tmp_path):
    """A dry run saves what it is asked to, and nothing for a stop."""
    at = At(1, "graceful_stop")
    fit(make(tmp_path, at, ours(), ModelCheckpoint(dirpath=tmp_path), fast_dev_run=3))
    assert at.record()["result"]["path"] is None and files(tmp_path) == {}


# Again and again...


@needs_version("lightning", "2.5", "a fit() after one that was stopped does nothing")
@pytest.mark.parametrize("limits", [{"max_epochs": 2}, {"max_steps": 10, "max_epochs": -1}], ids=["epochs", "steps"])
@pytest.mark.parametrize("first", [None, *COMMANDS])
@pytest.mark.parametrize("step", [3, 5])
def test_fit_can_be_called_twice(tmp_path, first, limits, step):
    """A second fit() runs to its end under the same job id, saves and evaluates as before, and can be controlled."""
    one = At(step, first) if first else None
    callback, model = ours(), Tiny()
    saver = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1)
    trainer = make(tmp_path, *([one] if one else []), callback, EarlyStopping("loss", patience=99), saver, **limits)
    own = {id(each): dict(vars(each)).keys() for each in (trainer, trainer.fit_loop, *trainer.callbacks)}
    fit(trainer, model, validate=True)
    middle = trainer.global_step
    assert middle == (STEPS if first in (None, "save_checkpoint") else step)
    assert one is None or one.record()["state"] == "finished"
    for each in (trainer, trainer.fit_loop, *trainer.callbacks):
        assert not {name for name in vars(each).keys() - own[id(each)] if name.startswith(("on_", "save"))}
    trainer.fit_loop.max_epochs = 4 if "max_steps" not in limits else -1
    trainer.fit_loop.epoch_loop.max_steps = 20 if "max_steps" in limits else -1
    two = At(middle + 2, "save_checkpoint")
    trainer.callbacks.insert(0, two)
    evaluated = len(model.evaluated)
    fit(trainer, model, validate=True)
    is_saved(two.record(), tmp_path, middle + 2)
    assert trainer.global_step >= middle + STEPS - 1 and not callback.aborted
    assert len(model.evaluated) > evaluated and f"step={trainer.global_step}" in saver.best_model_path


@needs_version("lightning", "2.5", "a fit() that is resumed within an epoch repeats a batch")
@pytest.mark.parametrize("command", ["save_checkpoint", "save_and_stop", "graceful_stop"])
@pytest.mark.parametrize("step", [3, 5, 7])
def test_resumed_from_what_was_saved(tmp_path, command, step):
    """A job resumed from our checkpoint trains on, to the same step and the same weights, and is controllable."""
    whole, first, resumed = Tiny(dropout=0.0), Tiny(dropout=0.0), Tiny(dropout=0.0)
    savers = SAVERS["epochs"]
    fit(make(tmp_path / "whole", *savers(tmp_path / "whole")), whole, validate=True)
    at, later = At(step, command), At(8, "save_checkpoint")
    fit(make(tmp_path, at, ours(), *savers(tmp_path)), first, validate=True)
    trainer = make(tmp_path, later, ours(), *savers(tmp_path))
    fit(trainer, resumed, validate=True, ckpt_path=at.record()["result"]["path"])
    assert trainer.global_step == STEPS and trainer.current_epoch == 2
    assert same(weights(resumed), weights(whole))
    is_saved(later.record(), tmp_path / "mine", 8)


def test_validate_and_test_outside_training(tmp_path):
    """validate() before and after an aborted fit() meets a callback without a job, and evaluates."""
    at, model = At(3, "abort"), Tiny()
    trainer = make(tmp_path, at, ours())
    trainer.validate(model, data(1), verbose=False)
    fit(trainer, model, validate=True)
    seen = len(model.evaluated)
    assert trainer.validate(model, data(1), verbose=False) == [{"val_loss": 4.0}]
    assert len(model.evaluated) == seen + 1 and at.record()["state"] == "finished"


# It never hurts training...


@pytest.mark.parametrize("steps", [(), (2, 3, 5, 10)], ids=["nothing", "saves"])
def test_weights_are_those_of_an_uncontrolled_run(tmp_path, steps):
    """Asked nothing, or only to save, training ends with the same weights bit by bit, dropout included."""
    alone = fit(make(tmp_path / "alone", *SAVERS["epochs"](tmp_path / "alone")), validate=True)
    sent = [At(step, "save_checkpoint") for step in steps]
    watched = fit(make(tmp_path, *sent, ours(), *SAVERS["epochs"](tmp_path)), validate=True)
    for at in sent:
        is_saved(at.record(), tmp_path / "mine", at.step)
    assert same(weights(alone), weights(watched))
    assert alone.evaluated == watched.evaluated


@pytest.mark.parametrize("saver", ["epochs", "steps"])
@pytest.mark.parametrize("schedule", [{}, {"val_check_interval": 2}, {"accumulate_grad_batches": 2}], ids=str)
def test_nothing_changes_after_extra_validations(tmp_path, saver, schedule):
    """Saves that evaluate first: weights, scheduled validations, ModelCheckpoint's files are those without them."""
    alone = fit(make(tmp_path / "alone", *SAVERS[saver](tmp_path / "alone"), **schedule), Counts(), validate=True)
    sent = [At(step, "save_checkpoint", evaluate=True) for step in (1, 2, 3, 5)]
    trainer = make(tmp_path / "watched", *sent, ours(), *SAVERS[saver](tmp_path / "watched"), **schedule)
    watched = fit(trainer, Counts(), validate=True)
    for at in sent:
        record = at.record()
        is_saved(record, tmp_path / "watched" / "mine", at.step)
        assert record["result"]["evaluated"] is True
    assert same(weights(alone), weights(watched)) and alone.modes == watched.modes == {True}
    assert sorted(watched.evaluated) == sorted([*alone.evaluated, 1, 2, 3, 5])
    made = {name for name in files(tmp_path / "watched") if "control-step" not in name}
    assert made == set(files(tmp_path / "alone"))


@WHERE
@pytest.mark.parametrize("saver", ["none", "epochs"])
def test_evaluate(tmp_path, saver, step):
    """At its step, with the metrics that validation logs; nothing is saved, and training continues as without it."""
    alone = fit(make(tmp_path / "alone", *SAVERS[saver](tmp_path / "alone")), Counts(), validate=True)
    at = At(step, "evaluate")
    trainer = make(tmp_path / "watched", at, ours(), *SAVERS[saver](tmp_path / "watched"))
    watched = fit(trainer, Counts(), validate=True)
    record = at.record()
    assert (record["state"], record["applied_at_step"], record["result"]["step"]) == ("finished", step, step)
    assert record["result"]["metrics"] == {"val_loss": 1.0 + step} and record["result"]["seconds"] >= 0
    assert same(weights(alone), weights(watched)) and watched.modes == {True}
    assert sorted(watched.evaluated) == sorted([*alone.evaluated, step])
    assert set(files(tmp_path / "watched")) == set(files(tmp_path / "alone"))


@pytest.mark.parametrize("counted", [False, True])
def test_evaluate_beside_early_stopping(tmp_path, counted):
    """It is refused, and names what counts, unless it may count: then patience is one less."""
    said, early = [], EarlyStopping("val_loss", patience=3, check_on_train_epoch_end=False)

    def send(trainer: Any) -> None:
        if trainer.global_step == 3 and not said:
            with connect(JOB) as client:
                try:
                    said.append(client.call("evaluate", counted=counted))
                except forgather_control.errors.CommandRefused as err:
                    said.append(str(err))

    trainer = make(tmp_path, Watcher(on_train_batch_end=send), ours(), early, max_epochs=3)
    fit(trainer, validate=True)
    if counted:
        assert said[0]["state"] == "accepted" and early.wait_count == 3 and trainer.global_step == 15
    else:
        assert "EarlyStopping counts evaluations" in said[0] and early.wait_count == 2


class Counts(Tiny):
    """Its validation draws random numbers; in which modes it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: set[bool] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.modes.add(self.training)
        self.modes.add(self.dropout.training)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        torch.rand(3)
        super().validation_step(batch, batch_idx)


def test_a_validation_that_fails_is_not_the_end_of_training(tmp_path, caplog):
    """What the user's validation_step raises is logged; the checkpoint is saved, and training continues as it was."""

    class Fails(Counts):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 3:
                raise RuntimeError("no such batch")
            super().validation_step(batch, batch_idx)

    alone = fit(make(tmp_path / "alone"), Counts(), validate=True)
    at, evaluate = At(3, "save_checkpoint", evaluate=True), At(3, "evaluate")
    watched = fit(make(tmp_path, at, evaluate, ours()), Fails(), validate=True)
    record = at.record()
    assert "no such batch" in evaluate.record()["error"]["message"]
    is_saved(record, tmp_path / "checkpoints", 3)
    assert record["result"]["evaluated"] is False and "no such batch" in caplog.text
    assert same(weights(alone), weights(watched)) and watched.modes == {True}
    assert alone.evaluated == watched.evaluated


def test_a_save_that_is_to_evaluate_without_data(tmp_path):
    """It is refused before any rank hears of it."""
    said = []

    def send(trainer: Any) -> None:
        if not said:
            with connect(JOB) as client, pytest.raises(forgather_control.ControlError) as caught:
                client.call("save_checkpoint", evaluate=True)
            with connect(JOB) as client, pytest.raises(forgather_control.ControlError, match="no validation data"):
                client.call("evaluate")
            said.append(str(caught.value))

    fit(make(tmp_path, ours(), Watcher(on_train_batch_start=send)))
    assert "no validation data" in said[0] and files(tmp_path) == {}


def reads_of_the_device(out: Path, *callbacks: Any) -> int:
    """How often a number was read from a tensor, which on a device waits for it."""

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted.append(func) if func is torch.ops.aten._local_scalar_dense.default else None
            return func(*args, **(kwargs or {}))

    counted: list[Any] = []
    with Counting():
        fit(make(out, *callbacks, log_every_n_steps=1), ShowsLoss())
    return len(counted)


class ShowsLoss(Tiny):
    """Its loss is read at every batch, for the progress bar."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("shown", loss, prog_bar=True)
        return loss


class OnDevice:
    """A number on a device, which a tensor of this machine stands for."""

    def __init__(self, tensor: Any) -> None:
        self.item, self.numel, self.device = tensor.item, tensor.numel, SimpleNamespace(type="cuda")

    def detach(self) -> Any:
        return self

    clone = detach


def test_nothing_is_read_from_the_device(tmp_path, monkeypatch):
    """Metrics are kept at every step without one read more than Lightning's own."""
    seen: list[Any] = []
    log = Controller.log
    on_device = lambda self, logs: log(self, {name: OnDevice(value) for name, value in logs.items()})  # noqa: E731
    monkeypatch.setattr(Controller, "log", on_device)
    look = Watcher(on_train_end=lambda trainer: seen.append(get_job_status(JOB)["metrics"]))
    alone = reads_of_the_device(tmp_path)
    assert reads_of_the_device(tmp_path, ours(), look) == alone > 0
    assert seen[0].keys() == {"loss", "shown"}


class NeedsValidation(Tiny):
    """Fails where an epoch ends without a validation; so does its schedule."""

    def on_train_epoch_end(self) -> None:
        assert self.trainer.callback_metrics["val_loss"] > 0

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}


@every_command
@WHERE
def test_nobody_misses_a_validation(tmp_path, command, step):
    """What relies on the validation of an epoch has it, or is not asked."""
    at = At(step, command)
    judge = Watcher(on_train_epoch_end=lambda trainer: trainer.callback_metrics["val_loss"])
    callbacks = (judge, at, ours(), EarlyStopping("val_loss", patience=9), *SAVERS["best"](tmp_path))
    trainer = make(tmp_path, *callbacks, num_sanity_val_steps=0)
    fit(trainer, NeedsValidation(), validate=True)
    assert at.record()["state"] == "finished"
    assert trainer.global_step == (STEPS if command == "save_checkpoint" else step)


def test_nobody_saves_after_an_abort(tmp_path, caplog):
    """trainer.save_checkpoint saves nothing in the hooks of an aborted run, says so, and saves again after it."""
    at = At(3, "abort")
    eager = Watcher(on_train_end=lambda trainer: trainer.save_checkpoint(tmp_path / "eager.ckpt"))
    trainer = make(tmp_path, at, ours(), eager)
    fit(trainer)
    assert at.record()["state"] == "finished" and files(tmp_path) == {}
    assert any("saves nothing" in line for line in warnings(caplog))
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    assert files(tmp_path).keys() == {"mine.ckpt"}


class FullDisk(TorchCheckpointIO):
    """Cannot save."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")


class Denied(TorchCheckpointIO):
    """Saves nothing and says nothing, as Lightning does where the folder may not be written."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize(("plugin", "said"), [(FullDisk, "No space left"), (Denied, "no file")])
@pytest.mark.parametrize("command", ["save_checkpoint", "save_and_stop"])
def test_saving_fails(tmp_path, caplog, command, plugin, said):
    """A save that raises, or leaves nothing, fails the command that asked for it, and does not raise into training."""
    at = At(3, command)
    trainer = make(tmp_path, at, ours(), plugins=[plugin()])
    fit(trainer)
    record = at.record()
    assert record["state"] == "failed" and said in record["error"]["message"]
    assert trainer.global_step == (STEPS if command == "save_checkpoint" else 3)
    assert len(warnings(caplog)) == 1


class Gate(TorchCheckpointIO):
    """Begins a file, and completes it when the gate is opened; or fails."""

    def __init__(self, error: Exception | None = None) -> None:
        self.open, self.error = threading.Event(), error

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
        assert self.open.wait(SOON)
        if self.error is not None:
            raise self.error
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("at_step", [6, STEPS])
def test_saved_in_the_background(tmp_path, at_step):
    """With AsyncCheckpointIO a save is finished when the file is complete, and not before."""
    at, gate, early = At(3, "save_checkpoint"), Gate(), []

    def open_it(trainer: Any) -> None:
        if trainer.global_step == at_step:
            early.append(get_command(JOB, at.sent.id).state)
            gate.open.set()

    opener = Watcher(**{"on_train_batch_end" if at_step < STEPS else "on_train_end": open_it})
    fit(make(tmp_path, at, ours(), opener, plugins=[AsyncCheckpointIO(gate)]))
    is_saved(at.record(), tmp_path / "checkpoints", 3)
    assert early == ["applied"]


def test_a_save_in_the_background_that_fails(tmp_path):
    """The command fails with the writer's error, though there is a file; Lightning raises that error at its end."""
    gate = Gate(OSError(28, "No space left on device"))
    at, opener = At(3, "save_checkpoint"), Watcher(on_train_end=lambda trainer: gate.open.set())
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(OSError, match="No space"):
        fit(make(tmp_path, at, ours(), opener, plugins=[AsyncCheckpointIO(gate)]))
    for number, handler in handlers.items():  # its teardown did not get that far
        signal.signal(number, handler)
    assert at.record()["error"]["message"] == "OSError: [Errno 28] No space left on device"


class Boom(Exception):
    """Somebody else's."""


def boom_at(step: int, kind: type[BaseException] = Boom, hook: str = "on_train_batch_end") -> Watcher:
    """Raises."""

    def raise_it(trainer: Any) -> None:
        if trainer.global_step == step:
            raise kind

    return Watcher(**{hook: raise_it})


@pytest.mark.parametrize(("kind", "seen"), [(Boom, Boom), (KeyboardInterrupt, SystemExit)])
def test_an_exception_and_then_fit_again(tmp_path, jobs_dir, kind, seen):
    """fit() raises, or is interrupted: waiting clients are told why, the job is gone, and fit() can be called again."""
    at, late, boom = (
        At(3, "graceful_stop"),
        At(3, "save_checkpoint", "on_validation_start"),
        boom_at(3, kind, "on_validation_end"),
    )
    trainer = make(tmp_path, at, ours(), late, boom, ModelCheckpoint(dirpath=tmp_path), min_steps=5)
    with pytest.raises(seen):
        fit(trainer, validate=True)
    assert not (jobs_dir / JOB).exists() and trainer.min_steps == 5
    for record in (at.record(), late.record()):
        assert record["state"] == "failed" and f"ended by {kind.__name__}" in record["error"]["message"]
    trainer.callbacks.remove(boom)
    later = At(6, "save_checkpoint")
    trainer.callbacks.insert(0, later)
    fit(trainer, validate=True)
    is_saved(later.record(), tmp_path, 6)


@needs_version("lightning", "2.5", "ModelCheckpoint has no save_on_exception")
def test_an_exception_after_an_abort(tmp_path):
    """Not even ModelCheckpoint(save_on_exception=True) saves after an abort; the next fit() is as ever."""
    at, boom = At(3, "abort"), boom_at(3, hook="on_train_end")
    saver = ModelCheckpoint(dirpath=tmp_path, save_on_exception=True)
    trainer = make(tmp_path, at, ours(), boom, saver)
    with pytest.raises(Boom):
        fit(trainer)
    assert at.record()["state"] == "failed" and files(tmp_path) == {}
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    trainer.callbacks.remove(boom)
    fit(trainer)
    assert trainer.global_step > 3 and Path(saver.best_model_path).exists()
    saved = len(files(tmp_path))
    trainer.callbacks.append(boom_at(trainer.global_step + 1))
    trainer.fit_loop.max_epochs = 9
    with pytest.raises(Boom):
        fit(trainer)
    assert len(files(tmp_path)) > saved  # it saves on exceptions again


@pytest.mark.parametrize("method", ["step", "log", "start", "saved"])
def test_what_goes_wrong_in_our_hooks_stays_there(tmp_path, monkeypatch, caplog, method):
    """An exception inside our hooks is logged once; training continues; waiting clients are told."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(Controller, method, broken)
    at = At(0, "save_checkpoint", hook="on_train_start")
    trainer = make(tmp_path, ours(), *([at] if method != "start" else []), log_every_n_steps=1)
    fit(trainer)
    assert trainer.global_step == STEPS
    assert len(warnings(caplog)) == 1
    if method in ("step", "saved"):
        assert at.record()["state"] == "failed"


def test_a_job_id_that_is_taken(tmp_path, caplog):
    """The second job of an id trains on, with one warning; the first is not disturbed."""
    with running_loop(JOB):
        trainer = make(tmp_path, ours())
        fit(trainer)
        assert trainer.global_step == STEPS
        (warning,) = warnings(caplog)
        assert "Control is off" in warning
        assert get_job_status(JOB)["max_steps"] == 10**9


def test_not_enabled(tmp_path, jobs_dir):
    """enabled=False makes nothing and does nothing."""
    seen: list[bool] = []
    trainer = make(tmp_path, ours(enabled=False), Watcher(on_train_batch_end=lambda _: seen.append(jobs_dir.exists())))
    fit(trainer)
    assert trainer.global_step == STEPS and not any(seen)


def test_the_job_is_gone_after_training(tmp_path, jobs_dir):
    """The directory exists while training runs, until ModelCheckpoint has saved its last, and not after it."""
    seen: list[bool] = []
    look = Watcher(on_save_checkpoint=lambda trainer: seen.append((jobs_dir / JOB / "endpoint.json").is_file()))
    callback = ours()
    fit(make(tmp_path, callback, look, ModelCheckpoint(dirpath=tmp_path, save_last=True)))
    assert all(seen) and seen
    assert not (jobs_dir / JOB).exists() and callback.job_id == JOB


# The class...


def test_it_is_one_of_the_family(tmp_path):
    """It is a Callback of Lightning's own class, so a single one needs no list; and it is ours by name."""
    callback = ours()
    assert isinstance(callback, Callback) and issubclass(LightningControlCallback, Callback)
    assert make(tmp_path, callbacks=callback).callbacks[0] is callback
    assert callback.state_dict() == {} and callback.state_key == "LightningControlCallback"
    with pytest.raises(AttributeError, match="no attribute 'on_nothing'"):
        callback.on_nothing  # noqa: B018
    with pytest.raises(forgather_control.ControlError):
        LightningControlCallback("../x")


def test_copies_control_nothing(tmp_path):
    """Pickled and copied, also while an abort is under way: the copy has no job, and sets nothing back."""
    callback, made = ours(), []
    assert pickle.loads(pickle.dumps(callback)).job_id == JOB
    copier = Watcher(on_train_batch_end=lambda _: made.append(copy.copy(callback)))
    at = At(3, "abort")
    fit(make(tmp_path, at, callback, copier))
    for one in made:
        one.teardown(None, None, "fit")
        assert isinstance(one, LightningControlCallback) and one.job_id == JOB
    assert at.record()["state"] == "finished"


CLASS = """
import sys, forgather_control.integrations.lightning as ours
assert not {'torch', 'lightning', 'pytorch_lightning'} & set(sys.modules)
%s
print([base.__module__.partition(".")[0] for base in ours.LightningControlCallback.__bases__][1:])
"""


@pytest.mark.parametrize(
    ("before", "bases"),
    [
        ("", ["lightning"]),
        ("import lightning.pytorch", ["lightning"]),
        ("import pytorch_lightning", ["pytorch_lightning"]),
        ("sys.modules['lightning'] = None", ["pytorch_lightning"]),
    ],
)
def test_it_is_a_callback_of_the_package_that_is_loaded(before, bases):
    """Importing our module imports no Lightning; the class derives from the loaded one, else the first installed."""
    with Process(CLASS % before) as process:
        assert process.line() == str(bases), "".join(process.errors)


def test_without_lightning():
    """The class can be named, as in a star import; to make one is an error that says what to install."""
    source = """
    import sys
    sys.modules.update(lightning=None, pytorch_lightning=None)
    from forgather_control import *
    try:
        LightningControlCallback("job")
    except ImportError as err:
        print(err)
    """
    with Process(source) as process:
        assert "Install lightning or pytorch-lightning" in process.line(), "".join(process.errors)


def test_its_signature_is_its_own():
    """LightningCLI reads the arguments from it: each with a name, an annotation and a default."""
    parameters = inspect.signature(LightningControlCallback).parameters
    assert list(parameters) == [field.name for field in dataclasses.fields(ControlOptions)]
    for one in parameters.values():
        assert one.annotation is not one.empty and one.default is not one.empty
    assert typing.get_type_hints(LightningControlCallback.__init__)["poll_steps"] == int | None


OTHER = """
import sys
from forgather_control import LightningControlCallback, graceful_stop
callback = LightningControlCallback("other")
import threading, torch, pytorch_lightning as lightning

class Model(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(2, 1)
    def training_step(self, batch):
        return self.line(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)
    def on_train_start(self):
        def stop():
            print(graceful_stop("other", wait="finished", timeout=60).result["path"], flush=True)
        threading.Thread(target=stop).start()

loader = torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)
trainer = lightning.Trainer(max_epochs=-1, accelerator="cpu", logger=False, callbacks=[callback],
                            enable_progress_bar=False, enable_model_summary=False, default_root_dir=sys.argv[1])
trainer.fit(Model(), loader)
"""


def test_the_other_package(tmp_path):
    """pytorch_lightning's Trainer is controlled too; the callback may be made before that is loaded."""
    with Process(OTHER, str(tmp_path)) as process:
        path = Path(process.line())
        assert process.end(4 * SOON) == 0, "".join(process.errors)
    assert path.parent == tmp_path / "checkpoints" and path.is_file()


# Several ranks...

RANKS = """
import os, sys, time
from pathlib import Path
from tests.integrations.test_lightning import *

class Slow(Tiny):
    def training_step(self, batch, batch_idx):
        time.sleep(0.01)
        return super().training_step(batch, batch_idx)

class Broken(TorchCheckpointIO):
    def save_checkpoint(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

out = Path(sys.argv[1])
saves = []
look = Watcher(on_save_checkpoint=lambda trainer: saves.append(trainer.global_step))
callback = ours()
trainer = make(out, callback, look, *SAVERS[sys.argv[2]](out), strategy="ddp", devices=2, max_epochs=-1,
               plugins=[Broken()] if sys.argv[3] == "broken" else None)
trainer.fit(Slow(), data(20), data(2))
rank = trainer.global_rank
(out / f"rank-{rank}.json").write_text(json.dumps([trainer.global_step, saves, callback.aborted]))
"""


@pytest.fixture
def two_ranks(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a job of two ranks; gives its process, and ends it."""
    begun: list[subprocess.Popen[str]] = []

    def start(saver: str = "epochs", how: str = "whole") -> subprocess.Popen[str]:
        script = tmp_path / "ranks.py"
        script.write_text(RANKS)
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with open(tmp_path / "said", "w") as said:
            args = [*run, str(script), str(tmp_path), saver, how]
            begun.append(subprocess.Popen(args, stdout=said, stderr=said, text=True, env=environment))
        until(lambda: any(job.state == "live" for job in forgather_control.list_jobs()), 4 * SOON)
        return begun[-1]

    yield start
    for process in begun:
        if process.poll() is None:
            process.terminate()
        process.wait(SOON)


def ranks_say(out: Path) -> list[Any]:
    """What the two ranks wrote at their ends; the same, or the test fails."""
    one, other = (json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    return one


@pytest.mark.parametrize("command", ["save_and_stop", "abort"])
def test_two_ranks(tmp_path, two_ranks, command):
    """Each rank saves, evaluates, stops and aborts at the same step, and what is said to be saved is there."""
    job = two_ranks()
    saved = forgather_control.save_checkpoint(JOB, wait="finished", timeout=SOON)
    is_saved(saved._asdict(), tmp_path / "mine", saved.result["step"])
    with connect(JOB) as client:
        evaluated = client.call("evaluate", wait="finished", timeout=SOON)
    assert evaluated["result"]["metrics"] == {"val_loss": 1.0 + evaluated["applied_at_step"]}
    record = getattr(forgather_control, command)(JOB, wait="finished", timeout=SOON)
    left = files(tmp_path)
    assert job.wait(SOON) == 0, (tmp_path / "said").read_text()
    step, saves, aborted = ranks_say(tmp_path)
    assert step == record.applied_at_step and saved.result["step"] in saves
    assert files(tmp_path) == left and aborted == (command == "abort")
    assert len([path for path in left if "control" in path]) == (1 if command == "abort" else 2)


def test_two_ranks_and_a_full_disk(tmp_path, two_ranks):
    """Rank 0 cannot write: the command fails, both ranks train on, and a stop stops both."""
    job = two_ranks("none", "broken")
    with pytest.raises(forgather_control.ControlError, match="No space left"):
        forgather_control.save_checkpoint(JOB, wait="finished", timeout=SOON)
    record = forgather_control.graceful_stop(JOB, wait="finished", timeout=SOON)
    assert job.wait(SOON) == 0, (tmp_path / "said").read_text()
    assert ranks_say(tmp_path)[0] == record.applied_at_step


# The script's own commands...


def test_an_own_command_has_the_trainers_objects(tmp_path):
    """It runs at its step, on trainer and module; training is then that of a run with the same change built in."""

    @torch.no_grad()
    def scale(context: Any, factor: float) -> list[Any]:
        """Multiply all weights."""
        for weight in context.model.parameters():
            weight.mul_(factor)
        return [context.step, context.trainer.global_step, len(context.trainer.optimizers)]

    def leave() -> None:
        sys.exit(1)

    at, failing = At(5, "user.scale", factor=0.5), At(3, "user.leave")
    given = fit(make(tmp_path, at, failing, ours(commands=[scale, leave])))
    record = at.record()
    assert (record["state"], record["result"]) == ("finished", {"value": [5, 5, 1]})
    assert failing.record()["error"]["message"].startswith("user.leave called sys.exit(1)")

    @torch.no_grad()
    def halve(trainer: Any) -> None:
        for weight in trainer.lightning_module.parameters() if trainer.global_step == 5 else ():
            weight.mul_(0.5)

    assert same(weights(given), weights(fit(make(tmp_path, Watcher(on_train_batch_end=halve)))))
