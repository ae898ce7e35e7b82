"""What is read of a Hugging Face trainer's objects, on stand-ins; ``test_huggingface`` has the real trainer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from forgather_control.integrations.huggingface_trainer import (
    checkpoint_path,
    evaluation_counter,
    find_trainer,
    log_steps,
    no_evaluation,
)

from ..support.forgather_loop import Strategy


class Handler:
    """Calls a hook as transformers does."""

    def __init__(self, callback: Any) -> None:
        self.callbacks = [object(), callback]

    def call(self) -> Any:
        return self.callbacks[1].on_train_begin()


class Trainer:
    """Owns a handler; its attributes cannot be asked for what it has not."""

    def __init__(self, callback: Any) -> None:
        self.callback_handler = Handler(callback)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def train(self) -> Any:
        return self.callback_handler.call()


class Callback:
    """Looks for its trainer in a hook."""

    def on_train_begin(self) -> Any:
        return find_trainer(self)


def test_the_trainer_that_calls_is_found():
    """The one whose callback it is, also where a trainer trains within another's hook; none where none calls."""
    callback = Callback()
    inner = Trainer(callback)
    outer = Trainer(SimpleNamespace(on_train_begin=inner.train))
    assert outer.train() is inner
    assert callback.on_train_begin() is None


@pytest.mark.parametrize(
    ("strategy", "dataset", "dataloader", "can"),
    [
        (Strategy.STEPS, None, None, True),
        ("epoch", None, None, True),
        ("no", [1], None, True),
        ("no", None, [1], True),
        (Strategy.NO, None, None, False),
    ],
)
def test_whether_it_can_evaluate(strategy, dataset, dataloader, can):
    """By its strategy, for which the trainer wants data, or by data that only wait to be used."""
    args, trainer = SimpleNamespace(eval_strategy=strategy), SimpleNamespace(eval_dataset=dataset)
    assert (no_evaluation(args, trainer, dataloader) is None) is can
    assert no_evaluation(SimpleNamespace(), None, None) == "the trainer has no eval_dataset"


class ReduceLROnPlateau:
    """A scheduler that steps by metrics."""


class Patience:
    """A callback with a state."""

    def state(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("stateful", "callbacks", "scheduler", "wanted"),
    [
        ({"TrainerControl": {}}, [object()], object(), None),
        (None, [], None, None),
        ({"TrainerControl": {}, "EarlyStoppingCallback": {}}, [], object(), "EarlyStoppingCallback"),
        ([Patience()], [], object(), "Patience"),
        ({"TrainerControl": {}}, [object(), Patience()], object(), "Patience"),
        ({"TrainerControl": {}}, [], ReduceLROnPlateau(), "ReduceLROnPlateau"),
    ],
)
def test_what_counts_evaluations(stateful, callbacks, scheduler, wanted):
    """The state names it, also where it is a list of objects; else the trainer's callbacks; else the scheduler."""
    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=callbacks))
    assert evaluation_counter(SimpleNamespace(stateful_callbacks=stateful), trainer, scheduler) == wanted
    if callbacks == []:
        assert evaluation_counter(SimpleNamespace(stateful_callbacks=stateful), None, scheduler) == wanted


@pytest.mark.parametrize(("given", "steps"), [(10, 10), (0.25, 25), (0.001, 1), (0, None), ("x", None)])
def test_after_how_many_steps_it_logs(given, steps):
    """A number of steps, or a fraction of all."""
    assert log_steps(SimpleNamespace(logging_steps=given), SimpleNamespace(max_steps=100)) == steps
    assert log_steps(SimpleNamespace(), None) is None


def test_where_a_checkpoint_is(tmp_path, monkeypatch):
    """The place of this trainer first, then the output directory, then the newest below it; always absolute."""
    out = tmp_path / "out [1]*"
    assert checkpoint_path(str(out), 3) is None
    (out / "run-2" / "checkpoint-3").mkdir(parents=True)
    assert checkpoint_path(str(out), 3) == str(out / "run-2" / "checkpoint-3")
    (out / "checkpoint-3").write_text("no directory")
    assert checkpoint_path(str(out), 3, "checkpoints") == str(out / "run-2" / "checkpoint-3")
    (out / "checkpoint-3").unlink()
    (out / "checkpoint-3").mkdir()
    (out / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    assert checkpoint_path(str(out), 3) == str(out / "checkpoint-3")
    assert checkpoint_path(str(out), 3, "checkpoints") == str(out / "checkpoints" / "checkpoint-3")
    monkeypatch.chdir(tmp_path)
    assert checkpoint_path("out [1]*", 3) == str(out / "checkpoint-3")
