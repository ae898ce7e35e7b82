"""The control object of an aborted run: its flags stay, and copies of it are ordinary."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from forgather_control.integrations.locked_control import locked

from ..support.forgather_loop import Control

try:
    from transformers import TrainerControl
except ImportError:
    KINDS: list[Any] = [Control]
else:
    KINDS = [Control, TrainerControl]

every_kind = pytest.mark.parametrize("kind", KINDS)


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
