"""What is read of a Hugging Face trainer's objects, on stand-ins; ``test_huggingface`` has the real trainer."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
import random
from types import SimpleNamespace
from typing import Any

import pytest

from forgather_control.integrations.huggingface_trainer import (
    ExtraEvaluation,
    checkpoint_path,
    evaluation_counter,
    find_trainer,
    locked,
    log_steps,
    loop_locals,
    no_evaluation,
    saves_by_own_code,
    written,
)

from ..support.forgather_loop import Control, Strategy

try:
    from transformers import TrainerControl
except ImportError:
    KINDS: list[Any] = [Control]
else:
    KINDS = [Control, TrainerControl]

ARGS: Any = None
STATE: Any = None
every_kind = pytest.mark.parametrize("kind", KINDS)


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


def path_of(out: Any, control: Any = None, **state: Any) -> str | None:
    """The path of the checkpoint of step 3."""
    return checkpoint_path(str(out), SimpleNamespace(global_step=3, **state), control)


def test_where_a_checkpoint_is(tmp_path, monkeypatch):
    """The place of this trainer first, then the output directory, then the newest below it; always absolute."""
    out = tmp_path / "out [1]*"
    assert path_of(out) is None
    (out / "run-2" / "checkpoint-3").mkdir(parents=True)
    assert path_of(out) == str(out / "run-2" / "checkpoint-3")
    (out / "checkpoint-3").write_text("no directory")
    assert path_of(out, Control()) == str(out / "run-2" / "checkpoint-3")
    (out / "checkpoint-3").unlink()
    (out / "checkpoint-3").mkdir()
    (out / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    assert path_of(out) == str(out / "checkpoint-3")
    assert path_of(out, Control()) == str(out / "checkpoints" / "checkpoint-3")
    monkeypatch.chdir(tmp_path)
    assert path_of("out [1]*") == str(out / "checkpoint-3")


@pytest.mark.parametrize("name", [None, "run", "lr=3e-04/n=0", "lr [1]*/n=0"])
def test_where_a_trial_of_a_search_saves(tmp_path, name):
    """In the directory of its name, which may hold slashes; of the names that the trainer makes up, in the newest."""
    for folder in ("", name or "run-2", "other"):
        (tmp_path / folder / "checkpoint-3").mkdir(parents=True)
    os.utime(tmp_path / "other" / "checkpoint-3", (1, 1))
    found = path_of(tmp_path, is_hyper_param_search=True, trial_name=name)
    assert found == str(tmp_path / (name or "run-2") / "checkpoint-3")


# The control object of an aborted run: its flags stay, and copies of it are ordinary...


@every_kind
def test_its_flags_stay(kind):
    """Setting a flag is ignored without an error; the object that it was made of still changes."""
    control = kind(should_training_stop=True)
    held = locked(control)
    held.should_save, held.should_training_stop = True, False
    assert (held.should_save, held.should_training_stop) == (False, True)
    control.should_save = True
    assert control.should_save and not held.should_save


@every_kind
def test_it_is_one_of_its_kind(kind):
    """It passes for the trainer's own: class, class name, fields."""
    control = kind(should_epoch_stop=True)
    held = locked(control)
    assert isinstance(held, kind) and type(held).__name__ == kind.__name__
    assert dataclasses.asdict(held) == dataclasses.asdict(control)
    if hasattr(kind, "state"):
        assert held.state() == control.state()


@every_kind
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, dataclasses.replace, lambda held: pickle.loads(pickle.dumps(held))]
)
def test_copies_are_ordinary(kind, duplicate):
    """A copy has the same flags and the original's class, and can be changed; no pickle needs this package."""
    held = locked(kind(should_training_stop=True))
    made = duplicate(held)
    assert type(made) is kind and made == kind(should_training_stop=True)
    made.should_save = True
    assert made.should_save
    assert b"forgather_control" not in pickle.dumps(held) or kind is Control


@every_kind
def test_replace_changes_what_it_is_given(kind):
    """``dataclasses.replace`` gives an ordinary object with the change."""
    made = dataclasses.replace(locked(kind(should_training_stop=True)), should_save=True)
    assert made.should_save and made.should_training_stop


# An evaluation on request: the random states are restored after it, and only after it...


@pytest.mark.parametrize(("strategy", "greater"), [("steps", False), ("best", False), ("best", True)])
def test_an_evaluation_that_is_not_saved_is_not_the_best(strategy, greater):
    """What the trainer notes of its best is as before; where it would save a new best one, none is better."""
    args = SimpleNamespace(save_strategy=strategy, greater_is_better=greater)
    state = SimpleNamespace(best_metric=0.5, best_global_step=2, best_model_checkpoint=None)
    control, extra, before = Control(), ExtraEvaluation(), dict(vars(state))
    extra.request(control)
    extra.evaluated(args, state, {"eval_loss": 0.1}, hide_best=True)
    if strategy == "best":
        assert state.best_metric == (math.inf if greater else -math.inf)
    state.best_metric, state.best_global_step = 0.1, 3
    extra.evaluated(args, state, {"eval_other": 0.2}, hide_best=True)
    assert extra.metrics == {"eval_loss": 0.1, "eval_other": 0.2}
    extra.settle(state)
    assert vars(state) == before and extra.metrics == {}


def test_every_data_set_is_evaluated_without_a_trace():
    """A trainer that evaluates on several sets calls the hook after each: the numbers after the last are the same."""
    control, extra = Control(), ExtraEvaluation()
    extra.request(control)
    assert control.should_evaluate
    state = random.getstate()
    for _ in range(2):
        random.random()
        extra.evaluated(ARGS, STATE, {}, hide_best=False)
    assert random.getstate() == state


def test_it_can_stand_for_a_scheduled_evaluation():
    """Then the random states are those after it, as if the schedule had evaluated."""
    control, extra = Control(), ExtraEvaluation()
    extra.request(control)
    random.random()
    after = random.getstate()
    extra.evaluated(ARGS, STATE, {}, hide_best=False)
    assert random.getstate() != after
    extra.stand_in()
    assert random.getstate() == after
    extra.settle(STATE)
    random.random()
    extra.stand_in()
    assert random.getstate() != after


def test_a_scheduled_evaluation_is_left_alone():
    """It draws what it draws, as it would without a request; nor does an extra one that is settled restore anything."""
    control, extra = Control(should_evaluate=True), ExtraEvaluation()
    extra.request(control)
    state = random.getstate()
    random.random()
    extra.evaluated(ARGS, STATE, {}, hide_best=False)
    assert random.getstate() != state
    control.should_evaluate = False
    extra.request(control)
    extra.settle(STATE)
    state = random.getstate()
    random.random()
    extra.evaluated(ARGS, STATE, {}, hide_best=False)
    assert random.getstate() != state


# Saves in the background...


def test_a_trainer_that_saves_by_code_of_its_own():
    """Its class has a method of that name that is not of transformers."""
    theirs = type("Trainer", (), {"_save_checkpoint": type("f", (), {"__module__": "transformers.trainer"})()})
    assert not saves_by_own_code(None) and not saves_by_own_code(theirs())
    assert saves_by_own_code(type("Mine", (theirs,), {"_save_checkpoint": lambda self: None})())


def test_a_checkpoint_is_complete_with_its_last_file(tmp_path):
    """Until then it can be seen that it is being written."""
    state, control = SimpleNamespace(global_step=3), object()
    path, seen = tmp_path / "checkpoint-3", []
    for change in (
        lambda: None,
        path.mkdir,
        (path / "part").mkdir,
        (path / "part" / "model").touch,
        lambda: (path / "part" / "model").write_text("x"),
    ):
        change()
        found, now = written(str(tmp_path), state, control)
        assert found is None and now not in seen
        seen.append(now)
    (path / "trainer_state.json").touch()
    assert written(str(tmp_path), state, control)[0] == str(path)


def test_local_variables_of_a_loop():
    """Those of the innermost caller that has all of them; none where nobody has."""

    def outer():
        epochs, steps = 1, 2
        return inner(), epochs + steps

    def inner():
        epochs = 3
        found = loop_locals("epochs", "steps"), loop_locals("epochs"), loop_locals("epochs", "x1y2")
        return found, epochs

    (found, _), _ = outer()
    assert found == ({"epochs": 1, "steps": 2}, {"epochs": 3}, None)
