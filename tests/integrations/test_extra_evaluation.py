"""An evaluation on request: the random states are restored after it, and only after it."""

from __future__ import annotations

import random

from forgather_control.integrations.extra_evaluation import ExtraEvaluation

from ..support.forgather_loop import Control


def test_every_data_set_is_evaluated_without_a_trace():
    """A trainer that evaluates on several sets calls the hook after each: the numbers after the last are the same."""
    control, extra = Control(), ExtraEvaluation()
    extra.request(control)
    assert control.should_evaluate
    state = random.getstate()
    for _ in range(2):
        random.random()
        extra.evaluated()
    assert random.getstate() == state


def test_it_can_stand_for_a_scheduled_evaluation():
    """Then the random states are those after it, as if the schedule had evaluated."""
    control, extra = Control(), ExtraEvaluation()
    extra.request(control)
    random.random()
    after = random.getstate()
    extra.evaluated()
    assert random.getstate() != after
    extra.stand_in()
    assert random.getstate() == after
    extra.settle()
    random.random()
    extra.stand_in()
    assert random.getstate() != after


def test_a_scheduled_evaluation_is_left_alone():
    """It draws what it draws, as it would without a request; nor does an extra one that is settled restore anything."""
    control, extra = Control(should_evaluate=True), ExtraEvaluation()
    extra.request(control)
    state = random.getstate()
    random.random()
    extra.evaluated()
    assert random.getstate() != state
    control.should_evaluate = False
    extra.request(control)
    extra.settle()
    state = random.getstate()
    random.random()
    extra.evaluated()
    assert random.getstate() != state
