"""Attributes set in other objects and set back."""

from __future__ import annotations

from forgather_control.integrations.overrides import AttributeOverrides


class Owner:
    """Has an attribute of its class and one of its own."""

    of_class = 1

    def __init__(self) -> None:
        self.own = 2


def test_all_is_as_before():
    """The object's own attribute, the class's and a new one, each set twice."""
    owner, overrides = Owner(), AttributeOverrides()
    for value in (10, 20):
        for name in ("own", "of_class", "new"):
            overrides.set(owner, name, value)
    assert vars(owner) == {"own": 20, "of_class": 20, "new": 20}
    overrides.restore()
    assert vars(owner) == {"own": 2} and owner.of_class == 1
    owner.own = 3
    overrides.restore()
    assert owner.own == 3


def test_one_name_can_stay():
    """``keep`` names what a later call restores."""
    owner, overrides = Owner(), AttributeOverrides()
    overrides.set(owner, "own", 10)
    overrides.set(owner, "of_class", 10)
    overrides.restore(keep="own")
    assert vars(owner) == {"own": 10}
    overrides.restore()
    assert vars(owner) == {"own": 2}


def test_objects_that_cannot_be_set_are_left():
    """No attributes, or none that can be written: nothing happens, then or at the end."""
    overrides = AttributeOverrides()
    for owner in (object(), 1, property()):
        overrides.set(owner, "new", 1)
    overrides.restore()
