"""An evaluation on request: the random states are restored after it, and only after it."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest

from forgather_control.integrations.extra_evaluation import ExtraEvaluation

from ..support.forgather_loop import Control

ARGS: Any = None
STATE: Any = None


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
