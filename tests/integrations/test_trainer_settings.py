"""What the settings of the trainers share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from forgather_control.integrations.trainer_settings import assign, note_of_end, tell_resumed
from forgather_control.training.setting import Setting
from forgather_control.training.settings import Settings


def test_attributes_are_set_and_restored():
    """In one object and in several."""
    one, other = SimpleNamespace(a=1, b=2), SimpleNamespace(a=3)
    undo = assign((one, "a", 10), (one, "b", 20), (other, "a", 30))
    assert (one, other) == (SimpleNamespace(a=10, b=20), SimpleNamespace(a=30))
    undo()
    assert (one, other) == (SimpleNamespace(a=1, b=2), SimpleNamespace(a=3))


def test_the_note_names_schedulers_that_were_made_for_a_number_of_steps():
    """Without one there is no note."""
    assert note_of_end([SimpleNamespace()]) is None
    note = note_of_end([SimpleNamespace(T_max=7)])
    assert note == "the schedule of the learning rate keeps its shape: SimpleNamespace has T_max=7"


@pytest.mark.parametrize("changed", [None, {}, "learning_rate", [1]])
def test_nothing_is_told_of_what_is_no_change(changed, caplog):
    """What a file holds may be anything."""
    tell_resumed(changed, SimpleNamespace(is_main=True, settings=Settings([], lambda: None, lambda: 0)))
    assert not caplog.records


def test_changes_are_told_with_what_is_in_force(caplog):
    """On rank 0; also where a setting does not exist any more."""
    settings = Settings([], lambda: None, lambda: 0)
    settings.add([Setting("speed", lambda: 3, lambda value: None)])
    for is_main in (True, False):
        tell_resumed({"speed": 2, "heat": 1.5}, SimpleNamespace(is_main=is_main, settings=settings))
    (line,) = [line.getMessage() for line in caplog.records]
    assert line.endswith("heat was set to 1.5, and is no setting now; speed was set to 2, and is 3 now.")
