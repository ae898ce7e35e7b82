"""The settings of Hugging Face's real Trainer, and of a trainer that keeps to the rules of Forgather's."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from forgather_control import get_job_status
from forgather_control.integrations import huggingface_trainer

from ..support.forgather_loop import Strategy
from ..support.harness import needs_torch, needs_transformers
from .test_huggingface import (  # noqa: F401
    JOB,
    STEPS,
    At,
    Events,
    Tiny,
    Watcher,
    checkpoints,
    hang_up,
    loop,
    make,
    ours,
    quick_collections,
    same,
    warnings,
    weights,
)

try:
    import torch
    import transformers
    from torch.optim import lr_scheduler as made
except ImportError:  # every test here is skipped then
    pass

pytestmark = [
    *(needs_torch, needs_transformers),
    *(
        pytest.mark.filterwarnings(f"ignore::{kind}")
        for kind in ("FutureWarning:transformers.*", "UserWarning:torch.*")
    ),
]


def change(step: int, **changes: Any) -> At:
    """Change settings at a step."""
    return At(step, "change_settings", changes=changes)


def effective(at: At) -> dict[str, Any]:
    """What is in force after a change; the test fails if it failed."""
    record = at.record()
    assert record["state"] == "finished", record
    return {name: value["effective"] for name, value in record["result"].items()}


def refusal(at: At) -> str:
    """Why it was not made."""
    record = at.record()
    assert record["state"] == "failed", record
    return str(record["error"]["message"])


def built_in(step: int, factor: float) -> Watcher:
    """Multiply rates and decays by code of the script's."""

    def multiply(state: Any, control: Any) -> None:
        if state.global_step == step:
            for group in trainer[0].optimizer.param_groups:
                group["lr"] *= factor
                group["initial_lr"] *= factor
            scheduler = trainer[0].lr_scheduler
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]

    trainer: list[Any] = []
    watcher = Watcher(on_step_end=multiply)
    watcher.trainer = trainer  # type: ignore[attr-defined]
    return watcher


def test_what_there_is(tmp_path):
    """Every setting, with its value and a sentence."""
    seen: list[Any] = []

    def look(state: Any, control: Any) -> None:
        if state.global_step == 2:
            from forgather_control import connect

            with connect(JOB) as client:
                seen.append(client.call("list_settings"))

    make(tmp_path, Watcher(on_step_end=look), ours(), weight_decay=0.1, lr_scheduler_type="constant").train()
    (listed,) = seen
    assert {each["name"]: each["value"] for each in listed} == {
        "learning_rate": 0.1,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "logging_steps": 3,
        "eval_steps": 2,
        "save_steps": 4,
        "max_steps": STEPS,
    }
    assert all(each["doc"].endswith(".") for each in listed)


def test_learning_rate_as_if_built_in(tmp_path):
    """The schedule goes on, multiplied; the weights are those of a script that does it by itself."""
    at = change(4, learning_rate="x0.25")
    one = make(tmp_path / "one", at, ours())
    one.train()
    code = built_in(4, 0.25)
    other = make(tmp_path / "other", code)
    code.trainer.append(other)
    other.train()
    assert same(weights(one.model), weights(other.model))
    record = at.record()["result"]["learning_rate"]
    assert record == {"old": 0.1 * 0.6, "new": 0.1 * 0.6 * 0.25, "effective": pytest.approx(0.1 * 0.5 * 0.25)}
    rates = {entry["step"]: entry["learning_rate"] for entry in one.state.log_history if "learning_rate" in entry}
    assert rates == pytest.approx({3: 0.1 * 0.8, 6: 0.025 * 0.5, 9: 0.025 * 0.2})


def test_learning_rate_survives_a_resume(tmp_path):
    """Resumed from a checkpoint after the change, training goes on with it, to the same weights."""
    at, save = change(3, learning_rate="x0.5"), At(6, "save_checkpoint")
    one = make(tmp_path / "one", at, save, ours(), model=Tiny(dropout=0.0))
    one.train()
    path = save.record()["result"]["path"]
    other = make(tmp_path / "other", ours(), model=Tiny(dropout=0.0))
    other.train(resume_from_checkpoint=path)
    assert same(weights(one.model), weights(other.model)) and effective(at)
    found = [entry["learning_rate"] for entry in other.state.log_history if entry.get("step") == 9]
    assert found == pytest.approx([0.05 * 0.2])


def test_a_resumed_run_names_earlier_changes(tmp_path, caplog):
    """In one line, with what is in force now: the periods of the state, the rest of the arguments."""
    first, second = change(2, max_grad_norm=2, logging_steps=2), change(4, max_grad_norm="x2", max_steps=9)
    save = At(6, "save_checkpoint")
    trainer = make(tmp_path / "one", first, second, save, ours())
    trainer.train()
    assert warnings(caplog) == []
    path = save.record()["result"]["path"]
    make(tmp_path / "other", ours()).train(resume_from_checkpoint=path)
    (line,) = warnings(caplog)
    assert line == (
        "Training is resumed from a checkpoint after changes of its settings: "
        "logging_steps was set to 2, and is 2 now; max_grad_norm was set to 4.0, and is 1.0 now; "
        "max_steps was set to 9, and is 10 now."
    )
    trainer.train()  # anew
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("kind", ["ReduceLROnPlateau", "greedy"])
def test_schedules_by_metrics(tmp_path, kind):
    """They step after evaluations; the rate is the optimizer's."""
    at = change(4, learning_rate=0.05)
    name = "reduce_lr_on_plateau" if kind != "greedy" else "greedy"
    if name not in [each.value for each in transformers.SchedulerType]:
        pytest.skip(f"transformers {transformers.__version__} has no schedule {name}")
    trainer = make(
        *(tmp_path, at, ours()),
        eval_strategy="steps",
        lr_scheduler_type=name,
        metric_for_best_model="loss",
    )
    trainer.train()
    assert effective(at)["learning_rate"] == 0.05


class Absolute(made.LRScheduler if "made" in globals() else object):  # type: ignore[misc]
    """Computes its rates from nothing."""

    def get_lr(self) -> list[float]:
        return [0.1 / (self.last_epoch + 1)] * len(self.base_lrs)


def test_a_scheduler_that_would_overwrite_it(tmp_path):
    """Is named, and nothing changes."""
    at = change(4, learning_rate=0.05, max_grad_norm=2.0)
    trainer = make(tmp_path, at, ours())
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.optimizer, trainer.lr_scheduler = optimizer, Absolute(optimizer)
    trainer.train()
    assert "the scheduler Absolute would overwrite it" in refusal(at) and trainer.args.max_grad_norm == 1.0


def test_max_grad_norm(tmp_path):
    """Gradients are clipped to it from the next step on; 0 clips none."""
    ats = [change(2, max_grad_norm=1e-3), change(4, max_grad_norm=0)]
    seen: dict[int, float] = {}
    trainer = make(tmp_path, ours(), *ats)

    def look(state: Any, control: Any) -> None:
        squares = sum(float(weight.grad.pow(2).sum()) for weight in trainer.model.parameters())
        seen[state.global_step + 1] = math.sqrt(squares)

    trainer.callback_handler.callbacks = [*ats, trainer.callback_handler.callbacks[0], ours()]
    trainer.add_callback(Watcher(on_pre_optimizer_step=look))
    trainer.train()
    assert seen[3] == pytest.approx(1e-3, rel=1e-3) == seen[4] and seen[5] > 2e-3
    assert [effective(at)["max_grad_norm"] for at in ats] == [1e-3, 0.0]


def test_periods(tmp_path):
    """Logs, evaluations and checkpoints follow the new ones, which the state has, too."""
    at, events = change(3, logging_steps=2, eval_steps=1, save_steps="x0.5"), Events()
    trainer = make(tmp_path, at, ours(), events, save_strategy="steps", eval_strategy="steps")
    trainer.train()
    assert effective(at) == {"logging_steps": 2, "eval_steps": 1, "save_steps": 2}
    assert events.steps("evaluate") == [2, 4, 5, 6, 7, 8, 9, 10]
    assert checkpoints(tmp_path) == {4, 6, 8, 10}
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 4, 6, 8, 10]
    saved = json.loads((tmp_path / "checkpoint-10" / "trainer_state.json").read_text())
    assert [saved[name] for name in ("logging_steps", "eval_steps", "save_steps")] == [2, 1, 2]


def test_periods_that_fit_each_other_only_together(tmp_path):
    """Each alone would be refused, as load_best_model_at_end needs one to be a multiple of the other."""
    at, events = change(3, eval_steps=3, save_steps=3), Events()
    options = {"save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": True}
    make(tmp_path, at, ours(), events, **options).train()
    assert effective(at) == {"eval_steps": 3, "save_steps": 3}
    assert events.steps("evaluate")[:3] == [2, 6, 9]  # and at the end, in newer versions


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({}, {"save_steps": 2}, 'save_steps cannot be 2: save_strategy is "no"'),
        ({"logging_strategy": "epoch"}, {"logging_steps": 2}, 'logging_strategy is "epoch"'),
        ({}, {"eval_steps": 2}, 'eval_strategy is "no"'),
        (
            {"save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": True},
            {"save_steps": 3},
            "save_steps to be a multiple of eval_steps, unlike 3 and 2",
        ),
        (
            {"save_strategy": "steps", "eval_strategy": "steps", "load_best_model_at_end": True},
            {"eval_steps": 3},
            "save_steps to be a multiple of eval_steps, unlike 4 and 3",
        ),
        ({}, {"max_steps": 4}, "step 4 is finished already; stop ends training now"),
        ({}, {"max_steps": 11}, "as many epochs as have 10 steps, and ends there"),
        ({}, {"learning_rate": 0}, "could never be raised again"),
    ],
)
def test_refused(tmp_path, options, changes, words):
    """In words; everything is as it was."""
    at = change(4, **changes)
    trainer = make(tmp_path, at, ours(), **options)
    before = trainer.args.to_json_string()
    trainer.train()
    message = refusal(at)
    assert words in message and trainer.args.to_json_string() == before and trainer.state.global_step == STEPS


@pytest.mark.parametrize(
    ("options", "end", "wanted"),
    [({}, 10, 7), ({"max_steps": 7}, 7, 10), ({"max_steps": 8}, 8, 5)],
)
def test_max_steps(tmp_path, options, end, wanted):
    """Earlier or later, as far as the trainer's loop goes; progress follows, and the schedule is named."""
    at, seen, events = change(4, max_steps=wanted), {}, Events()

    def look(state: Any, control: Any) -> None:
        found = get_job_status(JOB)
        seen[state.global_step] = (found["max_steps"], found["progress"])

    trainer = make(tmp_path, at, Watcher(on_step_begin=look), ours(), events, save_strategy="steps", **options)
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == wanted
    assert seen[3] == (end, 3 / end) and seen[4] == (wanted, 4 / wanted)
    assert events.steps("save")[-1] == wanted
    (result,) = at.record()["result"].values()
    assert result["effective"] == wanted and result["old"] == end
    assert result["note"] == (
        f"the schedule of the learning rate keeps its shape: LambdaLR has num_training_steps={end}"
    )
    trainer.train()
    assert trainer.state.global_step == (wanted if options else STEPS)


def test_max_steps_of_data_without_a_length(tmp_path):
    """The loop has no end of its own."""

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[name-defined, misc]
        def __iter__(self) -> Any:
            yield from huge

    at = change(4, max_steps=30)
    trainer = make(tmp_path, at, ours(), max_steps=6, lr_scheduler_type="constant")
    huge, trainer.train_dataset = trainer.train_dataset * 4, Stream()
    trainer.train()
    assert at.record()["result"] == {"max_steps": {"old": 6, "new": 30, "effective": 30}}
    assert trainer.state.global_step == 30


def test_where_the_loop_is_not_known(tmp_path, monkeypatch):
    """Training can end earlier, and not later."""
    monkeypatch.setattr(huggingface_trainer, "loop_locals", lambda *names: None)
    later, earlier = change(3, max_steps=9), change(4, max_steps=5)
    trainer = make(tmp_path, later, earlier, ours(), max_steps=7)
    trainer.train()
    assert "it is not known how far" in refusal(later) and effective(earlier) == {"max_steps": 5}
    assert trainer.state.global_step == 5


def test_settings_of_the_script_come_first(tmp_path):
    """One of the same name replaces that of the trainer."""
    heat = {"value": 1.0}
    mine = {"get": lambda: heat["value"], "set": lambda value: heat.update(value=value)}
    at = change(4, learning_rate=3, temperature=2)
    make(tmp_path, at, ours(settings={"learning_rate": mine, "temperature": mine})).train()
    assert effective(at) == {"learning_rate": 2.0, "temperature": 2.0} and heat["value"] == 2.0


def test_a_trainer_unlike_those_we_know(tmp_path, monkeypatch, caplog):
    """Its settings cannot be changed, which is one warning; control goes on."""

    def broken(*names: str) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr(huggingface_trainer, "loop_locals", broken)
    save = At(4, "save_checkpoint")
    make(tmp_path, save, ours()).train()
    assert save.record()["state"] == "finished"
    assert "The settings of this trainer cannot be changed: AttributeError: no such thing" in caplog.text


# Forgather...


def forgather(out: Any, *callbacks: Any, **options: Any) -> Any:
    """A trainer with an optimizer, whose rate falls by steps."""
    trainer = loop(out, *callbacks, **options)
    trainer.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.4, weight_decay=0.1)
    trainer.lr_scheduler = made.StepLR(trainer.optimizer, 5, 0.5)
    return trainer


def test_forgather(tmp_path):
    """All settings, some of them in the counters of its loop; saves on request and by schedule go on."""
    changes = {"learning_rate": 0.1, "weight_decay": 0.2, "max_grad_norm": 3, "logging_steps": 2, "save_steps": 2}
    at, save, events = change(3, max_steps=13, **changes), At(6, "save_checkpoint"), Events()
    trainer = forgather(tmp_path, at, save, ours(), events)
    trainer.train()
    assert effective(at) == {**changes, "max_steps": 13}
    assert trainer.args.max_grad_norm == 3 and trainer.lr_scheduler.base_lrs == [0.1]
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**2)
    assert trainer.state.global_step == 13
    assert events.steps("save") == [3, 5, 6, 8, 10, 12, 13] and save.record()["result"]["step"] == 6


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({}, {"eval_steps": 3}, 'eval_strategy is "no"'),
        ({"save_strategy": Strategy.EPOCH}, {"save_steps": 3}, 'save_strategy is "epoch"'),
        ({}, {"max_steps": 3}, "step 3 is finished already"),
    ],
)
def test_forgather_refuses(tmp_path, options, changes, words):
    """As Hugging Face's."""
    at = change(3, **changes)
    trainer = forgather(tmp_path, at, ours(), **options)
    trainer.train()
    assert words in refusal(at) and trainer.state.global_step == 10


@pytest.mark.parametrize("changes", [{"save_steps": 2}, {"max_steps": 12}])
def test_forgather_whose_loop_is_not_known(tmp_path, monkeypatch, changes):
    """Nothing is changed that would have no effect."""
    monkeypatch.setattr(huggingface_trainer, "loop_locals", lambda *names: None)
    at = change(3, **changes)
    forgather(tmp_path, at, ours()).train()
    assert "this trainer reads it only when training begins" in refusal(at)
