"""The four commands in Hugging Face's real Trainer, and in a trainer that keeps to the rules of Forgather's.

Commands go over the real socket while training runs. A callback sends them at a chosen place and continues
once they are accepted, so that each is applied at a known step; the answers are read when training is over.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import logging
import math
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import forgather_control
from forgather_control import TrainerControlCallback, connect, get_command, get_job_status
from forgather_control.client.target import find
from forgather_control.training import limits
from forgather_control.training.controller import Controller

from ..support import forgather_loop
from ..support.forgather_loop import Strategy
from ..support.harness import ROOT, SOON, Process, Wire, needs_torch, needs_transformers, running_loop, until

try:
    import torch
    import transformers
    from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerControl, TrainingArguments

    Module = torch.nn.Module
except ImportError:  # every test here is skipped then
    TrainerCallback = Trainer = Module = object  # type: ignore[assignment, misc]

pytestmark = [needs_torch, needs_transformers, pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")]

JOB = "job"
COMMANDS = ("save_checkpoint", "graceful_stop", "save_and_stop", "abort")
STEPS_A_EPOCH = 5
STEPS = 10


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> Iterator[None]:
    """Each train() begins with gc.collect(), four fifths of its time here: what is imported need not be looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# A real trainer, small...


class Tiny(Module):
    """Two weights and a dropout. Its n-th evaluation answers ``loss_of(n)``: by default each is worse than the last."""

    def __init__(self, loss_of: Callable[[int], float] = float, dropout: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = torch.nn.Linear(2, 1)
        self.dropout = torch.nn.Dropout(dropout)
        self.loss_of = loss_of
        self.evaluations = 0
        self.train_loss: float | None = None

    def forward(self, x: Any, labels: Any) -> dict[str, Any]:
        y = self.line(self.dropout(x))
        loss = torch.nn.functional.mse_loss(y, labels)
        if not self.training:
            self.evaluations += 1
            loss = torch.tensor(float(self.loss_of(self.evaluations)))
        elif self.train_loss is not None:
            loss = loss * 0 + self.train_loss
        return {"loss": loss, "logits": y}


def data(size: int) -> list[dict[str, Any]]:
    """As many examples."""
    made = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(2, generator=made), "labels": torch.randn(1, generator=made)} for _ in range(size)]


def make(
    out: Path, *callbacks: Any, model: Any = None, kind: Any = None, eval_dataset: Any = None, **options: Any
) -> Any:
    """A trainer of 2 epochs of 5 steps that saves at steps 4 and 8 and evaluates at 2, 4, 6, 8, if it does by steps."""
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "num_train_epochs": STEPS // STEPS_A_EPOCH,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "save_strategy": "no",
        "save_steps": 4,
        "eval_steps": 2,
        "logging_steps": 3,
        "learning_rate": 0.1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **options,
    }
    if settings["save_strategy"] == "best":
        settings.setdefault("metric_for_best_model", "loss")
    batches = 2 * settings.get("gradient_accumulation_steps", 1)
    made = (kind or Trainer)(
        model=model or Tiny(),
        args=TrainingArguments(**settings),
        train_dataset=data(STEPS_A_EPOCH * batches),
        eval_dataset=data(2) if settings.get("eval_strategy", "no") != "no" else eval_dataset,
        callbacks=list(callbacks),
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def ours(**options: Any) -> TrainerControlCallback:
    """The callback under test."""
    return TrainerControlCallback(**{"job_id": JOB, **options})


# Senders and watchers...

#: Of this test, to be hung up at its end.
SENT: list[Sent] = []


class Sent:
    """A command whose sender waits for its end, accepted already."""

    def __init__(self, command: str, job: str = JOB, **params: Any) -> None:
        self.id = f"{command}-{len(SENT)}"
        with connect(job) as client:
            self.wire = Wire(find(job).socket)
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


class Watcher(TrainerCallback):
    """Calls functions at hooks: ``Watcher(on_step_end=...)``, each with state and control; counts nothing."""

    name = "Watcher"

    def __init__(self, **calls: Callable[[Any, Any], Any]) -> None:
        for hook, call in calls.items():
            setattr(self, hook, self._wrap(call))

    @staticmethod
    def _wrap(call: Callable[[Any, Any], Any]) -> Any:
        def hook(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            call(state, control)

        return hook


class At(Watcher):
    """Sends ``command`` when ``hook`` is first called at ``step``; before ours, it is applied at that very step."""

    def __init__(self, step: int, command: str, hook: str = "on_step_end", job: str = JOB, **params: Any) -> None:
        self.step, self.command, self.job, self.params = step, command, job, params
        self.sent: Sent | None = None
        self.before: Callable[[], Any] = lambda: None
        self.seen: Any = None
        super().__init__(**{hook: self._send})

    def _send(self, state: Any, control: Any) -> None:
        if state.global_step == self.step and self.sent is None:
            self.best = state.best_model_checkpoint
            self.seen = self.before()
            self.sent = Sent(self.command, self.job, **self.params)

    def record(self) -> Any:
        """What became of it."""
        assert self.sent is not None, "it was never sent"
        return self.sent.record()


class Events(Watcher):
    """What happened, as (word, step)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        super().__init__(
            **{
                f"on_{word}": (lambda state, control, word=word: self.seen.append((word, state.global_step)))
                for word in ("evaluate", "save")
            }
        )

    def steps(self, word: str) -> list[int]:
        return [step for seen, step in self.seen if seen == word]


class Hostile(Watcher):
    """Wants something else at every call of some hooks, from one step to another."""

    def __init__(self, *hooks: str, since: int = 0, until: int = STEPS, **flags: bool) -> None:
        def insist(state: Any, control: Any) -> None:
            for name, value in flags.items() if since <= state.global_step <= until else ():
                setattr(control, name, value)

        super().__init__(**dict.fromkeys(hooks, insist))


def files(out: Path) -> dict[str, int]:
    """Every checkpoint's files, with their times."""
    found = out.rglob("checkpoint-*/**/*")
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in found}


def checkpoints(out: Path) -> set[int]:
    """The steps that are on disk."""
    return {int(path.name.rpartition("-")[2]) for path in out.rglob("checkpoint-*")}


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


def is_saved(record: Any, out: Path, step: int) -> None:
    """Assert that a command finished with a whole checkpoint of ``step``."""
    assert record["state"] == "finished", record
    path = Path(record["result"]["path"])
    assert path == (out / f"checkpoint-{step}").absolute()
    assert record["result"]["step"] == step and record["result"]["seconds"] >= 0
    assert (path / "trainer_state.json").is_file() and (path / "model.safetensors").is_file()
    assert f'"global_step": {step},' in (path / "trainer_state.json").read_text()


# The matrix...

#: save_strategy, load_best_model_at_end, eval_strategy: all that the Trainer takes, at least once.
SETTINGS = [
    ("no", False, "no"),
    ("no", False, "epoch"),
    ("no", True, "no"),
    ("steps", False, "no"),
    ("steps", False, "epoch"),
    ("steps", True, "steps"),
    ("epoch", False, "no"),
    ("epoch", True, "epoch"),
    ("best", False, "steps"),
    ("best", False, "epoch"),
    ("best", True, "steps"),
    ("best", True, "epoch"),
    ("best", True, "no"),
]
#: An ordinary step, one that evaluates, one that evaluates and saves, the last of an epoch, the last.
WHERE = [3, 2, 4, 5, 10]


@pytest.fixture(params=SETTINGS, ids=lambda row: f"save_{row[0]}-{'best' if row[1] else 'last'}-eval_{row[2]}")
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One way to set up the Trainer."""
    save, best, evaluate = request.param
    return {"save_strategy": save, "load_best_model_at_end": best, "eval_strategy": evaluate}


@pytest.mark.parametrize("step", WHERE)
def test_save_checkpoint_saves_and_trains_on(tmp_path, settings, step):
    """save_checkpoint saves at its step whatever save_strategy says, names the directory, and training continues."""
    at, events = At(step, "save_checkpoint"), Events()
    trainer = make(tmp_path, at, ours(), events, **settings)
    trainer.train()
    record = at.record()
    assert record["applied_at_step"] == step
    is_saved(record, tmp_path, record["result"]["step"])
    assert trainer.state.global_step == STEPS
    evaluates = settings["load_best_model_at_end"] and settings["eval_strategy"] != "no"
    if settings["save_strategy"] == "best" and step not in (5, 10):
        assert record["result"]["step"] in (step, step + 1)  # not the best: it is saved without, one step on
    else:
        assert record["result"]["step"] == step
    if evaluates:
        first = events.seen.index(("save", record["result"]["step"]))
        assert ("evaluate", step) in events.seen[:first]


@pytest.mark.parametrize("step", WHERE)
def test_graceful_stop_saves_as_the_strategy_says(tmp_path, settings, step):
    """graceful_stop ends at its step, with exactly one checkpoint there, or none where save_strategy is "no"."""
    at, events = At(step, "graceful_stop"), Events()
    at.before = lambda: files(tmp_path)
    trainer = make(tmp_path, at, ours(), events, **settings)
    trainer.train()
    record = at.record()
    assert trainer.state.global_step == step == record["applied_at_step"]
    assert record.get("note", "").startswith("nothing will be saved") == (settings["save_strategy"] == "no")
    if settings["save_strategy"] == "no":
        assert files(tmp_path) == at.seen == {}
        assert record["state"] == "finished"
        assert record["result"] == {"step": step, "path": None, "seconds": None, "evaluated": False}
    else:
        is_saved(record, tmp_path, step)
        assert events.steps("save").count(step) == 1


@pytest.mark.parametrize("step", WHERE)
def test_save_and_stop_saves_once_and_ends(tmp_path, settings, step):
    """save_and_stop ends at its step with exactly one checkpoint there, also where save_strategy is "no"."""
    at, events = At(step, "save_and_stop"), Events()
    trainer = make(tmp_path, at, ours(), events, **settings)
    trainer.train()
    is_saved(at.record(), tmp_path, step)
    assert trainer.state.global_step == step
    assert events.steps("save").count(step) == 1
    assert max(events.steps("evaluate").count(at) for at in range(STEPS + 1)) <= 1


@pytest.mark.parametrize("step", WHERE)
def test_abort_leaves_the_disk_as_it_is(tmp_path, settings, step):
    """abort ends at its step; no file appears, changes or goes; the last weights stay; the best is not forgotten."""
    at, events, model = At(step, "abort"), Events(), Tiny()
    at.before = lambda: (files(tmp_path), weights(model))
    callback = ours()
    trainer = make(tmp_path, at, callback, events, model=model, **settings)
    trainer.train()
    record = at.record()
    assert record["state"] == "finished" and record["result"]["path"] is None
    assert trainer.state.global_step == step == record["applied_at_step"]
    assert files(tmp_path) == at.seen[0]
    assert same(weights(model), at.seen[1])
    assert trainer.state.best_model_checkpoint == at.best
    assert not any(seen == step for seen in events.steps("evaluate"))
    assert callback.aborted


@pytest.mark.parametrize("step", [3, 5, 10])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_step_is_one_of_the_optimizer(tmp_path, command, step):
    """With gradients accumulated over three batches, commands are applied at whole steps only."""
    at, events = At(step, command), Events()
    trainer = make(tmp_path, at, ours(), events, gradient_accumulation_steps=3, save_strategy="steps")
    trainer.train()
    record = at.record()
    assert record["state"] == "finished" and record["applied_at_step"] == step
    assert trainer.state.global_step == (STEPS if command == "save_checkpoint" else step)
    assert events.steps("save").count(step) == (0 if command == "abort" else 1)


def test_a_command_amid_accumulation_waits_for_the_step(tmp_path):
    """A command that comes between two batches of one step is applied at that step's end."""
    at = At(2, "graceful_stop", hook="on_substep_end")
    trainer = make(tmp_path, at, ours(), gradient_accumulation_steps=3)
    trainer.train()
    assert at.record()["applied_at_step"] == trainer.state.global_step == 3


# Beside others...


@pytest.mark.parametrize("behind", [False, True], ids=["early_stopping_first", "early_stopping_behind"])
@pytest.mark.parametrize("strategy", ["steps", "best"])
@pytest.mark.parametrize("command", COMMANDS)
def test_beside_early_stopping(tmp_path, command, strategy, behind):
    """EarlyStoppingCallback, before or behind ours, neither loses a save nor is lost."""
    at, early, callback = At(4, command), EarlyStoppingCallback(2), ours()
    at.before = lambda: files(tmp_path)
    order = [at, callback, early] if behind else [early, at, callback]
    settings = {"save_strategy": strategy, "save_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
    trainer = make(tmp_path, *order, **settings)
    trainer.train()
    record = at.record()
    assert record["state"] == "finished", record
    if command == "abort":
        assert files(tmp_path) == at.seen
    else:
        is_saved(record, tmp_path, record["result"]["step"])
    # Losses are 1 at step 2 (the best), 2 at step 4, 3 at step 6: patience ends there.
    assert trainer.state.global_step == (6 if command == "save_checkpoint" else 4)


@pytest.mark.parametrize("strategy", ["no", "steps", "epoch", "best"])
@pytest.mark.parametrize("hooks", [("on_step_end",), ("on_step_end", "on_epoch_end", "on_log", "on_evaluate")])
def test_no_callback_makes_an_aborted_job_save(tmp_path, strategy, hooks):
    """A callback behind ours that wants a save at every chance gets none once abort is applied."""
    at, evaluate = At(3, "abort"), "steps" if strategy == "best" else "no"
    at.before = lambda: files(tmp_path)
    hostile = Hostile(*hooks, should_save=True, should_evaluate=evaluate == "steps", should_training_stop=False)
    trainer = make(tmp_path, at, ours(), hostile, save_strategy=strategy, eval_strategy=evaluate)
    trainer.train()
    assert at.record()["state"] == "finished"
    assert files(tmp_path) == at.seen and trainer.state.global_step == 3


def test_control_is_as_before_after_an_abort(tmp_path):
    """The trainer has its own control object back, of its own class, and it can be set."""
    trainer = make(tmp_path, At(3, "abort"), ours())
    control, kind = trainer.control, type(trainer.control)
    trainer.train()
    trainer.control.should_save = True
    assert trainer.control is control and type(control) is kind and control.should_save


def test_an_aborted_control_can_be_copied(tmp_path):
    """Callbacks before and behind ours pickle and copy the control object at every hook, also after an abort."""
    seen = []

    def copies(state: Any, control: Any) -> None:
        if control.should_training_stop:
            made = [pickle.loads(pickle.dumps(control)), copy.deepcopy(control), dataclasses.replace(control)]
            seen.extend(one.should_training_stop and type(one) is TrainerControl for one in made)

    watch = dict.fromkeys(("on_step_end", "on_epoch_end", "on_log", "on_train_end"), copies)
    trainer = make(tmp_path, Watcher(**watch), At(3, "abort"), ours(), Watcher(**watch), save_strategy="steps")
    trainer.train()
    assert len(seen) >= 3 * 7 and all(seen) and checkpoints(tmp_path) == set()


@pytest.mark.parametrize("step", [3, 4, 5, 10])
@pytest.mark.parametrize("command", ["save_checkpoint", "graceful_stop", "save_and_stop"])
def test_a_callback_that_takes_saves_back_only_delays_them(tmp_path, command, step):
    """should_save=False in on_evaluate of a callback behind ours: the save still happens, and is evaluated for."""
    at, events = At(step, command), Events()
    hostile = Hostile("on_evaluate", should_save=False)
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    trainer = make(tmp_path, at, ours(), hostile, events, **settings)
    trainer.train()
    record = at.record()
    is_saved(record, tmp_path, min(step + 1, STEPS) if command == "save_checkpoint" and step != 5 else step)
    assert step in events.steps("evaluate")


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("step", [1, 3, 5, 9, 10])
@pytest.mark.parametrize("loss_of", [float, lambda n: math.nan], ids=["worse", "nan"])
def test_a_save_is_not_starved_by_bad_metrics(tmp_path, loss_of, step, best):
    """Evaluated at every step and never better: the save happens, and no evaluation is lost for it."""
    at, events = At(step, "save_checkpoint"), Events()
    settings = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": best}
    trainer = make(tmp_path, at, ours(), events, model=Tiny(loss_of), **settings)
    trainer.train()
    record = at.record()
    is_saved(record, tmp_path, record["result"]["step"])
    assert record["result"]["step"] in (step, step + 1)
    assert set(events.steps("evaluate")) | {record["result"]["step"]} == set(range(1, STEPS + 1))
    assert STEPS in events.steps("evaluate")  # the last one counts, and comes


def test_a_save_at_an_epochs_end_is_made_once(tmp_path):
    """What is evaluated for a save at the end of an epoch is not evaluated again by its schedule."""
    at, events = At(5, "save_checkpoint"), Events()
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    trainer = make(tmp_path, at, ours(), events, **settings)
    trainer.train()
    is_saved(at.record(), tmp_path, 5)
    assert events.seen == [("evaluate", 5), ("save", 5), ("evaluate", 10), ("save", 10)]


@pytest.mark.parametrize("step", [3, 5])
def test_a_save_does_not_cost_patience(tmp_path, step):
    """Beside EarlyStoppingCallback a save does not evaluate, so training continues as long as without it."""
    at, events, early = At(step, "save_checkpoint"), Events(), EarlyStoppingCallback(2)
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    trainer = make(tmp_path, early, at, ours(), events, **settings)
    trainer.train()
    record = at.record()
    is_saved(record, tmp_path, step)
    assert record["result"]["evaluated"] is False
    assert events.steps("evaluate") == [5, 10] and trainer.state.global_step == STEPS
    assert early.early_stopping_patience_counter == 1


@pytest.mark.parametrize("step", [3, 4, 5, 10])
@pytest.mark.parametrize(("evaluate", "best"), [("auto", True), ("auto", False), (True, False), (False, True)])
def test_a_save_evaluates_first(tmp_path, evaluate, best, step):
    """As its parameter says; "auto" where the best model is wanted. What the schedule evaluates counts, too."""
    at, events, model = At(step, "save_checkpoint", evaluate=evaluate), Events(), Tiny()
    settings = {"save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": best}
    make(tmp_path, at, ours(), events, model=model, **settings).train()
    record = at.record()
    is_saved(record, tmp_path, step)
    forced = evaluate is True or (evaluate == "auto" and best)
    assert set(events.steps("evaluate")) == {2, 4, 6, 8, 10} | ({step} if forced else set())
    assert record["result"]["evaluated"] is (forced or step in (4, 10))
    assert model.evaluations == len(set(events.steps("evaluate")))
    if record["result"]["evaluated"]:
        assert events.seen.index(("evaluate", step)) < events.seen.index(("save", step))


# Evaluations...


@pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
@pytest.mark.parametrize("step", WHERE)
def test_evaluate(tmp_path, strategy, step):
    """At its step, whatever the schedule; the metrics are in the result; nothing is saved, and the schedule stays."""
    at, events, model = At(step, "evaluate"), Events(), Tiny()
    trainer = make(tmp_path, at, ours(), events, model=model, eval_strategy=strategy, eval_dataset=data(2))
    trainer.train()
    record = at.record()
    assert (record["state"], record["applied_at_step"], record["result"]["step"]) == ("finished", step, step)
    assert record["result"]["metrics"]["eval_loss"] == events.steps("evaluate").index(step) + 1
    assert record["result"]["seconds"] >= 0 and events.steps("save") == []
    scheduled = {"no": [], "steps": [2, 4, 6, 8, 10], "epoch": [5, 10]}[strategy]
    extra = [] if strategy == "steps" and step in scheduled else [step]
    assert events.steps("evaluate") == sorted(scheduled + extra) and trainer.state.global_step == STEPS


def test_evaluate_on_several_data_sets(tmp_path):
    """The result has the metrics of all; the random states are those of before the first."""
    alone, watched = Tiny(), Tiny()
    make(tmp_path / "alone", model=alone).train()
    at, sets = At(3, "evaluate"), {"one": data(2), "two": data(4)}
    make(tmp_path / "watched", at, ours(), model=watched, eval_dataset=sets).train()
    assert {"eval_one_loss", "eval_two_loss"} <= at.record()["result"]["metrics"].keys()
    assert same(weights(alone), weights(watched))


def test_evaluate_does_not_raise_into_training(tmp_path):
    """Without data it is refused, also from a signal, and training runs to its end."""
    said, heard = [], At(5, "save_checkpoint")

    def send(state: Any, control: Any) -> None:
        if state.global_step == 2:
            with connect(JOB) as client, pytest.raises(forgather_control.errors.CommandRefused) as caught:
                client.call("evaluate")
            said.append(str(caught.value))
            signal.raise_signal(signal.SIGUSR2)
        elif state.global_step == 4:
            with connect(JOB) as client:
                said.append(client.call("list_commands")[0])

    trainer = make(tmp_path, Watcher(on_step_end=send), heard, ours(signals={"SIGUSR2": "evaluate"}))
    trainer.train()
    assert "no eval_dataset" in said[0]
    assert said[1]["state"] == "failed" and "no eval_dataset" in said[1]["error"]["message"]
    assert heard.record()["state"] == "finished" and trainer.state.global_step == STEPS


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("counter", ["EarlyStoppingCallback", "ReduceLROnPlateau"])
def test_evaluate_where_evaluations_are_counted(tmp_path, counter, counted):
    """It is refused, and names what counts, unless it may count."""
    said, early = [], EarlyStoppingCallback(3)

    def send(state: Any, control: Any) -> None:
        if state.global_step == 3 and not said:
            with connect(JOB) as client:
                try:
                    said.append(client.call("evaluate", counted=counted))
                except forgather_control.errors.CommandRefused as err:
                    said.append(str(err))

    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 4, "metric_for_best_model": "loss"}
    if counter == "ReduceLROnPlateau":
        settings["lr_scheduler_type"] = "reduce_lr_on_plateau"
    events = Events()
    others = [early] if counter == "EarlyStoppingCallback" else []
    trainer = make(tmp_path, Watcher(on_step_end=send), ours(), *others, events, **settings)
    trainer.train()
    last = [10] if int(transformers.__version__.split(".")[0]) >= 5 else []  # transformers 4 ends without one
    assert events.steps("evaluate") == [3, 4, 8, *last][not counted :]
    assert not others or early.early_stopping_patience_counter == len(events.steps("evaluate")) - 1
    assert counted or f"{counter} counts evaluations" in said[0]


@pytest.mark.parametrize(("save", "best"), [("steps", True), ("best", False), ("best", True), ("epoch", True)])
def test_evaluate_changes_nothing_but_the_log(tmp_path, save, best):
    """The best model, the checkpoints and the weights are those of a run without it, though its metric is the best."""
    better = lambda n: float(n != 2)  # noqa: E731  the second evaluation is the extra one, and by far the best
    outcomes = []
    for name, callbacks in (("alone", []), ("watched", [At(3, "evaluate"), ours()])):
        model, events = Tiny(better if callbacks else lambda n: 1.0), Events()
        settings = {"save_strategy": save, "save_steps": 2, "load_best_model_at_end": best}
        settings["eval_strategy"] = "epoch" if save == "epoch" else "steps"
        trainer = make(tmp_path / name, *callbacks, events, model=model, **settings)
        if save == "epoch":
            model.evaluations += 1
        trainer.train()
        state = trainer.state
        found = state.best_model_checkpoint and Path(state.best_model_checkpoint).name
        outcomes.append((state.best_metric, state.best_global_step, found, events.steps("save"), weights(model)))
        if callbacks:
            assert callbacks[0].record()["result"]["metrics"]["eval_loss"] == 0.0
    assert outcomes[0][:4] == outcomes[1][:4] and same(outcomes[0][4], outcomes[1][4])


def test_evaluate_with_a_save_and_a_stop(tmp_path):
    """All at one step: evaluated once, saved, ended; the save's result says that it was evaluated."""
    sent = [At(3, name) for name in ("evaluate", "save_and_stop")]
    events = Events()
    make(tmp_path, *sent, ours(), events, eval_dataset=data(2)).train()
    evaluated, saved = (at.record() for at in sent)
    assert evaluated["state"] == "finished" and events.seen == [("evaluate", 3), ("save", 3)]
    assert saved["result"]["evaluated"] is True


def test_evaluate_is_asked_for_until_it_happens(tmp_path):
    """A callback that takes the flag back delays it; an abort makes it fail."""
    at, events = At(3, "evaluate"), Events()
    hostile = Hostile("on_step_end", until=5, should_evaluate=False)
    make(tmp_path, at, ours(), hostile, events, eval_dataset=data(2)).train()
    record = at.record()
    assert (record["applied_at_step"], record["result"]["step"], events.seen) == (3, 5, [("evaluate", 5)])
    sent = [At(3, name) for name in ("evaluate", "abort")]
    make(tmp_path, *sent, ours(), eval_dataset=data(2)).train()
    assert "abort" in sent[0].record()["error"]["message"]


@pytest.mark.parametrize("hook", ["on_step_end", "on_train_begin"])
@pytest.mark.parametrize("data_is_there", [False, True])
def test_a_save_that_is_to_evaluate_without_a_strategy(tmp_path, data_is_there, hook):
    """With data it evaluates; without, it is refused before any rank hears of it, and training is not hurt."""
    events, said = Events(), []

    def send(state: Any, control: Any) -> None:
        if not said:
            with connect(JOB) as client:
                try:
                    said.append(client.call("save_checkpoint", evaluate=True))
                except forgather_control.ControlError as err:
                    said.append(str(err))

    trainer = make(tmp_path, ours(), Watcher(**{hook: send}), events, eval_dataset=data(2) if data_is_there else None)
    trainer.train()
    if data_is_there:
        assert said[0]["state"] == "accepted" and len(events.seen) == 2 and events.seen[0][0] == "evaluate"
    else:
        assert "the trainer has no eval_dataset" in said[0] and events.seen == []


def test_where_nothing_can_be_evaluated_a_save_does_not_ask_for_it(tmp_path):
    """load_best_model_at_end without evaluation data: a save must not raise into the trainer."""
    at = At(3, "save_checkpoint")
    trainer = make(tmp_path, at, ours(), save_strategy="no", load_best_model_at_end=True)
    trainer.train()
    is_saved(at.record(), tmp_path, 3)


# Again and again...


@pytest.mark.parametrize("first", [None, *COMMANDS])
def test_train_can_be_called_twice(tmp_path, first):
    """A second train() of one trainer runs to its end under the same job id, and can be controlled too."""
    one = At(3, first) if first else None
    events, callback = Events(), ours()
    trainer = make(tmp_path, *([one] if one else []), callback, events, save_strategy="steps")
    trainer.train()
    assert trainer.state.global_step == (STEPS if first in (None, "save_checkpoint") else 3)
    assert one is None or one.record()["state"] == "finished"
    two = At(7, "save_checkpoint")
    trainer.callback_handler.callbacks.insert(0, two)
    trainer.train()
    is_saved(two.record(), tmp_path, 7)
    assert trainer.state.global_step == STEPS and not callback.aborted


@pytest.mark.parametrize("step", [3, 5])
@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("fresh", [False, True], ids=["same_trainer", "new_trainer"])
def test_resumed_from_what_save_and_stop_saved(tmp_path, fresh, restore, step):
    """A job resumed from the checkpoint of save_and_stop trains on, to the same weights, and is controllable."""
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "restore_callback_states_from_checkpoint": restore}
    settings["metric_for_best_model"] = "loss"
    model, resumed = Tiny(dropout=0.0), Tiny(dropout=0.0)  # the epoch's evaluation draws from the same numbers
    make(tmp_path / "whole", model=model, **settings).train()
    at, early = At(step, "save_and_stop"), EarlyStoppingCallback(5)
    trainer = make(tmp_path, early, at, ours(), model=resumed, **settings)
    trainer.train()
    saved = at.record()["result"]["path"]
    later = At(7, "save_checkpoint")
    if fresh:
        resumed = Tiny(dropout=0.0)
        trainer = make(tmp_path, EarlyStoppingCallback(5), later, ours(), model=resumed, **settings)
    else:
        trainer.callback_handler.callbacks.insert(0, later)
    trainer.train(resume_from_checkpoint=saved)
    assert trainer.state.global_step == STEPS
    is_saved(later.record(), tmp_path, 7)
    assert same(weights(resumed), weights(model))


@pytest.mark.parametrize("command", ["save_checkpoint", "save_and_stop"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_trainer_that_saves_in_the_background(tmp_path, command, begun):
    """A command is finished when the file that is written last is there, and not before, also at the end."""
    gate, early = threading.Event(), []

    class Background(Trainer):
        def _save_checkpoint(self, *args: Any) -> None:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            if begun:
                folder.mkdir()
            save = super()._save_checkpoint
            self.writer = threading.Thread(target=lambda: gate.wait(SOON) and save(*args))
            self.writer.start()

    def look(state: Any, control: Any) -> None:
        if at.sent is not None:
            early.append(get_command(JOB, at.sent.id).state)
            gate.set()

    at = At(STEPS, command)
    trainer = make(tmp_path, at, ours(), Watcher(on_epoch_end=look), kind=Background)
    trainer.train()
    trainer.writer.join(SOON)
    assert early == ["applied"]
    is_saved(at.record(), tmp_path, STEPS)


# When it is sent...


@pytest.mark.parametrize(
    ("hook", "sent_at", "applied_at"),
    [
        ("on_train_begin", 0, 1),
        ("on_prediction_step", 2, 3),
        ("on_log", 3, 4),
        ("on_save", 4, 5),
        ("on_step_begin", 6, 7),
    ],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted_at_any_time(tmp_path, command, hook, sent_at, applied_at):
    """Sent before the first step, during evaluation or a save: applied at the end of the next step."""
    at = At(sent_at, command, hook=hook)
    trainer = make(tmp_path, ours(), at, save_strategy="steps", eval_strategy="steps")
    trainer.train()
    record = at.record()
    assert record["state"] == "finished" and record["applied_at_step"] == applied_at
    assert trainer.state.global_step == (STEPS if command == "save_checkpoint" else applied_at)


def test_a_command_too_late_is_answered(tmp_path):
    """Sent when the last step is over: it fails, and its sender is told that training ended."""
    at = At(STEPS, "save_checkpoint", hook="on_epoch_end")
    make(tmp_path, at, ours()).train()
    record = at.record()
    assert record["state"] == "failed" and "ended before the command could be applied" in record["error"]["message"]


def test_all_four_at_once(tmp_path):
    """Of commands applied at the same step abort wins: the saves fail and say why, the stops are finished."""
    at = [At(4, command) for command in COMMANDS]
    trainer = make(tmp_path, *at, ours(), save_strategy="steps")
    trainer.train()
    states = {one.command: one.record() for one in at}
    assert [states[command]["state"] for command in COMMANDS] == ["failed", "finished", "failed", "finished"]
    assert "abort" in states["save_checkpoint"]["error"]["message"]
    assert files(tmp_path) == {} and trainer.state.global_step == 4


def test_the_python_api_from_another_thread(tmp_path):
    """A thread that saves with wait="finished" gets the path while training continues."""
    records: list[Any] = []

    def client() -> None:
        records.append(forgather_control.save_checkpoint(JOB, wait="finished", timeout=SOON))
        records.append(forgather_control.graceful_stop(JOB, wait="finished", timeout=SOON))

    thread = threading.Thread(target=client)
    begin = Watcher(on_train_begin=lambda state, control: thread.start())
    trainer = make(tmp_path, ours(), begin, num_train_epochs=100_000)
    trainer.train()
    thread.join(SOON)
    saved, stopped = records
    assert Path(saved.result["path"]).is_dir()
    assert saved.applied_at_step <= stopped.applied_at_step == trainer.state.global_step


def test_status_words(tmp_path):
    """status names what the job does: starting, training, evaluating, saving, stopping."""
    seen: dict[str, str] = {}

    def look(name: str) -> Callable[[Any, Any], None]:
        return lambda state, control: seen.setdefault(f"{name} {state.global_step}", get_job_status(JOB)["status"])

    hooks = ("on_train_begin", "on_step_begin", "on_prediction_step", "on_step_end")
    behind = Watcher(**{hook: look(hook) for hook in hooks})
    at = At(6, "save_and_stop")
    order = (Watcher(on_save=look("on_save")), at, ours(), behind)
    make(tmp_path, *order, save_strategy="steps", eval_strategy="steps").train()
    assert seen["on_train_begin 0"] == "starting"
    assert seen["on_step_begin 0"] == seen["on_step_begin 3"] == "training"
    assert seen["on_prediction_step 2"] == "evaluating"
    assert seen["on_save 4"] == seen["on_save 6"] == "saving"
    at = At(3, "graceful_stop")
    make(tmp_path, at, ours(), Watcher(on_epoch_end=look("stopped"))).train()
    assert seen["stopped 3"] == "stopping"


@pytest.mark.parametrize("endless", [False, True])
def test_status_tells_how_far_an_evaluation_is(tmp_path, endless):
    """Batch by batch, with the time left, where the loader has a length; anew for each evaluation."""
    seen: list[dict[str, Any]] = []

    def look(state: Any, control: Any) -> None:
        seen.append(get_job_status(JOB).get("evaluation", {}))

    callbacks = ours(), Watcher(on_prediction_step=look, on_step_begin=look)
    trainer = make(tmp_path, *callbacks, eval_strategy="epoch", per_device_eval_batch_size=1)
    if endless:
        loader = trainer.get_eval_dataloader
        trainer.get_eval_dataloader = lambda *args: Unmeasured(loader(*args))
    trainer.train()
    found = [each for each in seen if each]
    assert [each["batches"] for each in found] == [1, 2, 1, 2] and len(seen) == STEPS + len(found)
    assert {each["total_batches"] for each in found} == {None if endless else 2}
    assert all((each["eta_seconds"] is None) == endless for each in found)


class Unmeasured:
    """A loader without a length."""

    def __init__(self, loader: Any) -> None:
        self.__dict__.update(loader=loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def test_logged_names_do_not_overwrite(tmp_path):
    """Logged names stand in metrics, also those that status itself uses; NaN and tensors travel."""
    seen: list[Any] = []
    trainer: Any = None

    def look(state: Any, control: Any) -> None:
        if state.global_step == 3:
            trainer.log({"status": "mine", "job_id": "other", "pid": -1, "odd": torch.tensor(2.0), "bad": math.inf})
            seen.append(get_job_status(JOB))

    trainer = make(tmp_path, ours(), Watcher(on_step_end=look))
    trainer.train()
    status = seen[0]
    assert status["job_id"] == JOB and status["status"] == "training" and status["pid"] > 0
    assert status["global_step"] == 3 and status["max_steps"] == STEPS and status["progress"] == 0.3
    assert status["metrics"]["job_id"] == "other" and status["metrics"]["odd"] == 2.0
    assert status["metrics"]["bad"] in ("Infinity", math.inf)


def test_a_loss_that_is_not_a_number(tmp_path):
    """A NaN loss changes nothing: status answers, a save is saved."""
    model, seen = Tiny(), []
    model.train_loss = math.nan
    look = Watcher(on_step_end=lambda state, control: seen.append(get_job_status(JOB)["metrics"].get("loss")))
    at = At(7, "save_and_stop")
    make(tmp_path, at, ours(), look, model=model, logging_nan_inf_filter=False).train()
    assert seen[-1] == "NaN" or math.isnan(seen[-1])
    is_saved(at.record(), tmp_path, 7)


# It never hurts training...


@pytest.mark.parametrize("steps", [(), (2, 3, 5, 10)], ids=["nothing", "saves"])
@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_weights_are_those_of_an_uncontrolled_run(tmp_path, strategy, steps):
    """Asked nothing, or only to save, training ends with the same weights bit by bit, dropout included."""
    alone, watched = Tiny(), Tiny()
    make(tmp_path / "alone", model=alone, save_strategy=strategy).train()
    sent = [At(step, "save_checkpoint") for step in steps]
    make(tmp_path / "watched", *sent, ours(), model=watched, save_strategy=strategy).train()
    for at in sent:
        is_saved(at.record(), tmp_path / "watched", at.step)
    assert same(weights(alone), weights(watched))
    assert checkpoints(tmp_path / "watched") == checkpoints(tmp_path / "alone") | set(steps)


@pytest.mark.parametrize(("strategy", "extra"), [("steps", 4), ("epoch", 4), ("no", 5)])
def test_weights_are_the_same_after_extra_evaluations(tmp_path, strategy, extra):
    """Saves that evaluate at steps without a scheduled evaluation: dropout draws as it would have, to the end."""
    alone, watched = Tiny(), Tiny()
    settings = {"eval_strategy": strategy, "eval_steps": 4, "eval_dataset": data(2), "num_train_epochs": 3}
    make(tmp_path / "alone", model=alone, **settings).train()
    sent = [At(step, "save_checkpoint", evaluate=True) for step in (2, 3, 4, 5, 7)]
    make(tmp_path / "watched", *sent, ours(), model=watched, **settings).train()
    assert all(at.record()["result"]["evaluated"] for at in sent)
    assert watched.evaluations == alone.evaluations + extra
    assert same(weights(alone), weights(watched))


def test_random_states_are_those_of_the_evaluation_that_came(tmp_path):
    """An evaluation that another callback prevents restores nothing later, where the schedule evaluates."""
    alone, watched, settings = Tiny(), Tiny(), {"eval_strategy": "steps", "eval_steps": 4}
    make(tmp_path / "alone", model=alone, **settings).train()
    hostile = Hostile("on_step_end", until=3, should_evaluate=False)
    at = At(3, "save_checkpoint", evaluate=True)
    make(tmp_path / "watched", at, ours(), hostile, model=watched, **settings).train()
    assert at.record()["result"]["evaluated"] is False
    assert same(weights(alone), weights(watched))


@pytest.mark.parametrize("limit", [1, 2])
def test_abort_deletes_nothing(tmp_path, limit):
    """With save_total_limit and a best model the Trainer deletes and loads at its end; after an abort it does not."""
    at, model = At(7, "abort"), Tiny()
    at.before = lambda: (files(tmp_path), weights(model))
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
    trainer = make(tmp_path, at, ours(), model=model, save_total_limit=limit, **settings)
    trainer.train()
    assert at.record()["state"] == "finished"
    assert files(tmp_path) == at.seen[0] and checkpoints(tmp_path) == {2, 6}
    assert same(weights(model), at.seen[1])
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")


def test_a_stop_still_loads_the_best_model(tmp_path):
    """graceful_stop is the Trainer's own end: its best model is loaded."""
    at, model = At(5, "graceful_stop"), Tiny()
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "load_best_model_at_end": True}
    trainer = make(tmp_path, at, ours(), model=model, **settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = Tiny()
    transformers.trainer.safetensors.torch.load_model(best, tmp_path / "checkpoint-2" / "model.safetensors")
    assert same(weights(model), weights(best))


class Boom(Exception):
    """Somebody else's."""


def boom_at(step: int, *commands: str) -> Watcher:
    """Sends, and raises."""

    def raise_it(state: Any, control: Any) -> None:
        if state.global_step == step:
            watcher.sent = [Sent(command) for command in commands]
            raise Boom

    watcher = Watcher(on_step_end=raise_it)
    return watcher


def test_an_exception_and_then_nothing(tmp_path, jobs_dir):
    """train() raises: when the trainer is gone, so is the job, and applied and pending commands have failed."""
    at, boom = At(3, "save_and_stop"), boom_at(3, "abort")
    trainer = make(tmp_path, at, ours(), boom)
    with pytest.raises(Boom):
        trainer.train()
    assert get_command(JOB, at.sent.id).state == "applied"
    del trainer
    gc.collect()
    until(lambda: not (jobs_dir / JOB).exists())
    for sent in (at.sent, boom.sent[0]):
        record = sent.record()
        assert record["state"] == "failed" and "training ended by an exception" in record["error"]["message"]


def test_an_exception_and_then_train_again(tmp_path):
    """train() raises and is called again: the old commands have failed, the new run is controllable."""
    at, boom, events = At(3, "graceful_stop"), boom_at(3, "save_checkpoint"), Events()
    trainer = make(tmp_path, at, ours(), boom, events, save_strategy="steps")
    with pytest.raises(Boom):
        trainer.train()
    trainer.remove_callback(boom)
    later = At(6, "save_checkpoint")
    trainer.callback_handler.callbacks.insert(0, later)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert events.steps("save") == [4, 6, 8, 10]
    is_saved(later.record(), tmp_path, 6)
    for sent in (at.sent, boom.sent[0]):
        assert "training was started again" in sent.record()["error"]["message"]


def test_an_exception_after_an_abort_and_then_train_again(tmp_path):
    """What an abort has set does not outlive its run, even if that ends by an exception."""
    at, boom = At(3, "abort"), boom_at(3)
    trainer = make(tmp_path, at, ours(), boom, save_strategy="steps")
    control = trainer.control
    with pytest.raises(Boom):
        trainer.train()
    trainer.remove_callback(boom)
    trainer.train()
    assert at.record()["state"] == "failed" and trainer.control is control
    assert trainer.state.global_step == STEPS and checkpoints(tmp_path) == {4, 8, 10}


EXIT = """
import sys
from tests.integrations.test_huggingface import *

def wait(state, control):
    if state.global_step == 3:
        print("at 3", flush=True)
        assert sys.stdin.readline() == "go\\n"
        raise Boom("the end")

make(Path(sys.argv[1]), Watcher(on_step_end=wait), ours()).train()
"""


def test_an_exception_and_then_the_interpreters_exit(tmp_path, jobs_dir):
    """A job that dies of an exception answers its waiting clients, and leaves no directory."""
    with Process(EXIT, str(tmp_path), cwd=ROOT) as process:
        assert process.line() == "at 3", "".join(process.errors)
        sent = Sent("save_checkpoint")
        process.say("go")
        record = sent.record()
        assert process.end() == 1
        assert "Boom: the end" in "".join(process.errors)
    assert record["state"] == "failed" and record["error"]
    assert not (jobs_dir / JOB).exists()


class FullDisk(Trainer):
    """Cannot save."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("command", ["save_checkpoint", "save_and_stop", "graceful_stop"])
def test_saving_fails(tmp_path, command):
    """A save that raises is the Trainer's own exception, and a failed command."""
    at = At(3, command)
    trainer = make(tmp_path, at, ours(), kind=FullDisk, save_strategy="epoch")
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    del trainer
    gc.collect()
    record = at.record()
    assert record["state"] == "failed" and record["error"]["message"]


class Elsewhere(Trainer):
    """Saves to an unexpected place."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        Path(self.args.output_dir, "mine").mkdir()


def test_a_checkpoint_that_is_nowhere_is_no_success(tmp_path, monkeypatch):
    """on_save without a checkpoint of that step in the output directory fails the command, as none appears later."""
    monkeypatch.setattr(limits, "WRITE_TIMEOUT", 0.1)
    at = At(3, "save_checkpoint")
    make(tmp_path, at, ours(), kind=Elsewhere).train()
    record = at.record()
    assert record["state"] == "failed" and "checkpoint-3" in record["error"]["message"]


@pytest.mark.parametrize("method", ["step", "log", "start", "saved"])
def test_what_goes_wrong_in_our_hooks_stays_there(tmp_path, monkeypatch, caplog, method):
    """An exception inside our hooks is logged once; training continues; waiting clients are told."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(Controller, method, broken)
    at = At(0, "save_checkpoint", hook="on_train_begin")
    trainer = make(tmp_path, ours(), *([at] if method != "start" else []))
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert len(warnings(caplog)) == 1
    if method in ("step", "saved"):
        assert at.record()["state"] == "failed"


def test_a_job_id_that_is_taken(tmp_path, caplog):
    """The second job of an id trains on, with one warning; the first is not disturbed."""
    with running_loop(JOB):
        trainer = make(tmp_path, ours())
        trainer.train()
        assert trainer.state.global_step == STEPS
        (warning,) = warnings(caplog)
        assert "Control is off" in warning and "pid" in warning
        assert get_job_status(JOB)["max_steps"] == 10**9


def test_not_enabled(tmp_path, jobs_dir):
    """enabled=False makes nothing and does nothing."""
    seen: list[bool] = []
    look = Watcher(on_step_end=lambda state, control: seen.append(jobs_dir.exists()))
    trainer = make(tmp_path, ours(enabled=False), look, save_strategy="steps")
    trainer.train()
    assert trainer.state.global_step == STEPS and checkpoints(tmp_path) == {4, 8, 10}
    assert not any(seen)


def test_the_job_is_gone_after_training(tmp_path, jobs_dir):
    """The directory exists while training runs, and not after it."""
    seen: list[bool] = []
    look = Watcher(on_step_end=lambda state, control: seen.append((jobs_dir / JOB / "endpoint.json").is_file()))
    callback = ours()
    make(tmp_path, callback, look).train()
    assert all(seen) and len(seen) == STEPS
    assert not (jobs_dir / JOB).exists() and callback.job_id == JOB


def test_a_generated_job_id(tmp_path):
    """Without an id one is made; it is known while training runs."""
    callback = TrainerControlCallback()
    seen: list[Any] = []
    make(tmp_path, callback, Watcher(on_step_end=lambda *_: seen.append(callback.job_id))).train()
    assert seen[0].startswith("job_") and len(set(seen)) == 1


def test_evaluate_and_predict_outside_training(tmp_path):
    """evaluate() and predict() before and after train() meet a callback without a job."""
    trainer = make(tmp_path, ours(), eval_strategy="epoch")
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.predict(data(2))
    assert trainer.state.global_step == STEPS


def test_evaluation_before_the_first_step(tmp_path):
    """With eval_on_start a command that comes during that evaluation is applied at step 1."""
    at = At(0, "graceful_stop", hook="on_prediction_step")
    trainer = make(tmp_path, ours(), at, eval_strategy="epoch", eval_on_start=True)
    trainer.train()
    assert at.record()["applied_at_step"] == trainer.state.global_step == 1


def test_every_hook_exists():
    """Each hook that TrainerCallback has, ours has: Hugging Face calls them without looking."""
    hooks = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    assert len(hooks) >= 15
    assert all(callable(getattr(ours(), name)) for name in hooks)


def test_neither_transformers_nor_torch_is_imported():
    """The callback knows the trainer's objects by their attributes alone."""
    source = """
    import sys, forgather_control.integrations.huggingface as hf
    hf.TrainerControlCallback()
    print({'torch', 'transformers'} & set(sys.modules))
    """
    with Process(source) as process:
        assert process.line() == "set()", "".join(process.errors)


# Forgather's rules...


def loop(out: Path, *callbacks: Any, **options: Any) -> forgather_loop.Loop:
    """A trainer of 2 epochs of 5 steps, saving after every 4."""
    losses = options.pop("losses", (1.0, 2.0, 3.0))
    return forgather_loop.Loop(forgather_loop.Args(str(out), **options), list(callbacks), losses=losses)


FORGATHER = [
    {"save_strategy": Strategy.NO},
    {"save_strategy": Strategy.STEPS},
    {"save_strategy": Strategy.EPOCH},
    {"save_strategy": Strategy.STEPS, "eval_strategy": Strategy.STEPS, "load_best_model_at_end": True},
    {"save_strategy": Strategy.NO, "load_best_model_at_end": True},
]


@pytest.fixture(params=FORGATHER, ids=lambda row: f"{row['save_strategy'].value}{'-best' * (len(row) > 1)}{len(row)}")
def rules(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One way to set up Forgather's trainer."""
    return dict(request.param)


@pytest.mark.parametrize("step", WHERE)
@pytest.mark.parametrize("command", ["save_checkpoint", "save_and_stop", "graceful_stop"])
def test_forgather_saves(tmp_path, rules, command, step):
    """Under Forgather's rules each command saves, or not, at its step; once, and evaluated first if that matters."""
    at, events = At(step, command), Events()
    trainer = loop(tmp_path, at, ours(), events, **rules)
    trainer.train()
    record = at.record()
    assert record["state"] == "finished" and record["applied_at_step"] == step
    assert trainer.state.global_step == (STEPS if command == "save_checkpoint" else step)
    if command == "graceful_stop" and rules["save_strategy"] == Strategy.NO:
        assert checkpoints(tmp_path) == set() and record["result"]["path"] is None
        return
    assert record["result"]["path"] == str(tmp_path / "checkpoints" / f"checkpoint-{step}")
    assert events.steps("save").count(step) == 1
    if "eval_strategy" in rules:
        assert ("evaluate", step) in events.seen[: events.seen.index(("save", step))]
    assert trainer.stopped_by == (None if command == "save_checkpoint" else "TrainerControlCallback")


@pytest.mark.parametrize("command", ["save_checkpoint", "save_and_stop", "graceful_stop"])
def test_forgather_cannot_save_a_part(tmp_path, command):
    """A checkpoint without its optimizer is not reported as saved: the command fails, and says what is missing."""
    at, callback = At(3, command), ours()
    at.before = lambda: pickle.dumps(callback)
    trainer = loop(tmp_path, at, callback)
    trainer.unsaved = "optimizer"
    trainer.train()
    record = at.record()
    assert record["state"] == "failed" and record["applied_at_step"] == 3
    assert "Failed to save optional component 'optimizer': no space left on device" in record["error"]["message"]
    assert not logging.getLogger("forgather.ml.trainer.checkpoint_coordinator").handlers
    trainer.unsaved = None
    at.sent, at.step = None, 5
    trainer.train()
    assert at.record()["state"] == "finished"


@pytest.mark.parametrize("step", WHERE)
def test_forgather_aborts(tmp_path, rules, step):
    """Under Forgather's rules nothing is written once abort is applied, and the best model is not loaded.

    Where the trainer's own schedule saves at the very step, that comes first: no flag can stop it.
    """
    at, saved = At(step, "abort"), []
    at.before = lambda: files(tmp_path)
    due = (rules["save_strategy"], step) in [(Strategy.STEPS, 4), (Strategy.EPOCH, 5), (Strategy.EPOCH, 10)]

    def look(state: Any, control: Any) -> None:
        if at.sent is not None:
            saved.append((files(tmp_path), get_command(JOB, at.sent.id).state))

    hostile = Hostile("on_step_end", "on_epoch_end", "on_log", "on_save", since=step, should_save=True)
    trainer = loop(tmp_path, at, Watcher(on_save=look), ours(), hostile, **rules)
    trainer.train()
    record = at.record()
    assert record["state"] == "finished" and record["applied_at_step"] == trainer.state.global_step == step
    assert [state for _, state in saved] == (["accepted"] if due else [])  # not applied before it was saved
    assert files(tmp_path) == (saved[0][0] if due else at.seen)
    assert trainer.loaded == [] and trainer.weight == step
    if "eval_strategy" in rules and step > 4:
        assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoints" / "checkpoint-4")


@pytest.mark.parametrize("step", WHERE)
def test_forgather_aborts_where_it_keeps_its_control_object(tmp_path, rules, step):
    """A trainer that ignores what hooks return: its own object's flags are set again at the end of step and epoch."""
    at = At(step, "abort")
    hostile = Hostile("on_step_end", "on_epoch_end", since=step, should_save=True, should_training_stop=False)
    trainer = loop(tmp_path, at, hostile, ours(), **rules)
    trainer.uses_returned_control = False
    trainer.train()
    assert at.record()["state"] == "finished" and trainer.state.global_step == step
    due = (rules["save_strategy"], step) in [(Strategy.STEPS, 4), (Strategy.EPOCH, 5), (Strategy.EPOCH, 10)]
    assert (step in checkpoints(tmp_path)) == due and trainer.loaded == []


@pytest.mark.parametrize("step", [3, 4, 10])
@pytest.mark.parametrize("first", COMMANDS)
def test_forgather_trains_twice(tmp_path, first, step):
    """Forgather's control keeps its flags; a second train() runs to its end all the same, and obeys."""
    one = At(step, first)
    trainer = loop(tmp_path, one, ours())
    trainer.train()
    assert one.record()["state"] == "finished"
    two = At(7, "save_and_stop")
    trainer.callbacks.insert(0, two)
    trainer.train()
    assert two.record()["result"]["path"] == str(tmp_path / "checkpoints" / "checkpoint-7")
    assert trainer.state.global_step == 7


def test_forgather_leaves_the_stops_of_others_alone(tmp_path):
    """A stop that another callback requested is not cleared when training starts again."""
    trainer = loop(tmp_path, ours(), Hostile("on_train_begin", should_training_stop=True))
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 1


def test_forgather_at_the_end_of_data(tmp_path):
    """A command that comes with the on_step_end that ends no step waits for the next step, and is evaluated for."""
    events, calls = Events(), []

    def second(state: Any, control: Any) -> None:
        if state.global_step == 5:
            calls.append(state.global_step)
            if len(calls) == 2:
                at.append(Sent("save_checkpoint"))

    at: list[Sent] = []
    rules = {"save_strategy": Strategy.STEPS, "eval_strategy": Strategy.STEPS, "load_best_model_at_end": True}
    trainer = loop(tmp_path, Watcher(on_step_end=second), ours(), events, eval_steps=4, **rules)
    trainer.train()
    record = at[0].record()
    assert record["applied_at_step"] == record["result"]["step"] == 6
    assert ("evaluate", 6) in events.seen[: events.seen.index(("save", 6))]


def test_forgather_all_four_at_a_step_that_saves(tmp_path):
    """Applied after the step's own save, saves fail all the same where an abort came with them."""
    at = [At(4, command) for command in COMMANDS]
    trainer = loop(tmp_path, *at, ours())
    trainer.train()
    assert [one.record()["state"] for one in at] == ["failed", "finished", "failed", "finished"]
    assert checkpoints(tmp_path) == {4} and trainer.state.global_step == 4


@pytest.mark.parametrize("command", ["save_checkpoint", "save_and_stop"])
@pytest.mark.parametrize("step", [3, 4, 5, 10])
def test_forgather_saves_and_evaluates_first(tmp_path, step, command):
    """evaluate=true also where the trainer's own save of the step comes first: then it saves once more."""
    at, events = At(step, command, evaluate=True), Events()
    trainer = loop(tmp_path, at, ours(), events, eval_strategy=Strategy.STEPS, eval_steps=100)
    trainer.train()
    record = at.record()
    assert record["applied_at_step"] == step
    again = step == 4 and command == "save_checkpoint"
    assert record["result"]["step"] == (5 if again else step) and record["result"]["evaluated"] is True
    assert trainer.state.global_step == (STEPS if command == "save_checkpoint" else step)
    assert events.steps("evaluate") == [record["result"]["step"]]


@pytest.mark.parametrize("step", [3, 4, 5, 10])
def test_forgather_evaluates(tmp_path, step):
    """At its step; where the trainer's own save comes first, after the next, unless that step was evaluated."""
    at, events = At(step, "evaluate"), Events()
    trainer = loop(tmp_path, at, ours(), events, eval_strategy=Strategy.STEPS, eval_steps=100)
    trainer.train()
    record = at.record()
    assert record["state"] == "finished" and record["applied_at_step"] == step
    assert record["result"]["metrics"] == {"eval_loss": 1.0}
    assert events.steps("evaluate") == [record["result"]["step"]] == [5 if step == 4 else step]
    assert events.steps("save") == [4, 8, 10] and trainer.state.global_step == STEPS


def test_forgather_reports_the_evaluation_of_its_schedule(tmp_path):
    """At a step that evaluates and saves by itself, that evaluation counts for the command."""
    at, events = At(4, "evaluate"), Events()
    trainer = loop(tmp_path, at, ours(), events, eval_strategy=Strategy.STEPS, eval_steps=4)
    trainer.train()
    assert at.record()["result"]["step"] == 4 and events.steps("evaluate") == [4, 8]


def test_forgather_when_the_save_does_not_come(tmp_path):
    """Commands that were to wait for the step's own save are applied before the next step if there is none."""
    at = At(4, "graceful_stop")
    trainer = loop(tmp_path, at, ours())
    save = trainer.save
    trainer.save = lambda metrics: None if trainer.state.global_step == 4 else save(metrics)
    trainer.train()
    record = at.record()
    assert record["state"] == "finished" and record["applied_at_step"] == 4
    assert trainer.state.global_step == 5 and checkpoints(tmp_path) == {5}


# The script's own commands...


def test_an_own_command_has_the_trainers_objects(tmp_path):
    """It runs at its step, on the real objects; training is then that of a run with the same change built in."""

    @torch.no_grad()
    def scale(context: Any, factor: float, names: list[str] = ()) -> list[Any]:
        """Multiply all weights."""
        for weight in context.model.parameters():
            weight.mul_(factor)
        rates = [group["lr"] for group in context.optimizer.param_groups]
        others = [context.trainer.model is context.model, context.lr_scheduler is not None, context.args.max_steps]
        return [context.step, context.state.global_step, names, len(rates), *others]

    at, control = At(5, "user.scale", factor=0.5, names=["a"]), ours(commands=[scale])
    given = make(tmp_path / "given", at, control)
    given.train()
    record = at.record()
    assert (record["state"], record["applied_at_step"]) == ("finished", 5), record
    assert record["result"] == {"value": [5, 5, ["a"], 2, True, True, -1]}
    built_in: Any = None

    @torch.no_grad()
    def halve(state: Any, flags: Any) -> None:
        for weight in built_in.model.parameters() if state.global_step == 5 else ():
            weight.mul_(0.5)

    built_in = make(tmp_path / "built-in", Watcher(on_step_end=halve))
    built_in.train()
    assert given.state.global_step == built_in.state.global_step == STEPS
    assert same(weights(given.model), weights(built_in.model)) and control._objects == {}


def test_an_own_command_that_raises_leaves_the_trainer_alone(tmp_path):
    """The weights are those of a run without it."""
    found = []
    for callbacks in ([], [At(3, "user.fail"), At(4, "user.leave"), ours(commands=[fail, leave])]):
        trainer = make(tmp_path, *callbacks)
        trainer.train()
        found.append(weights(trainer.model))
    assert same(*found)
    messages = [at.record()["error"]["message"] for at in callbacks[:2]]
    assert "this run has no teacher to offer; it has args, control, " in messages[0]
    assert messages[1].startswith("user.leave called sys.exit('over')")


def fail(context: Any) -> None:
    """Ask for what this trainer has not."""
    raise ValueError(context.teacher)


def leave() -> None:
    """Call sys.exit."""
    sys.exit("over")
