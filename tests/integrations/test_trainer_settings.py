"""What the settings of the trainers share."""

from __future__ import annotations

from types import SimpleNamespace

from forgather_control.integrations.trainer_settings import assign, note_of_end


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
