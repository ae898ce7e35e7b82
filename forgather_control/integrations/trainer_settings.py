"""What the settings of the trainers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from . import rates

NORM_DOC: Final = "The norm to which gradients are clipped; 0 clips none."
END_DOC: Final = "The step at which training ends."


def assign(*places: tuple[Any, str, Any]) -> Callable[[], None]:
    """Set attributes, each given by its object, its name and its value; return a function that restores what was."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)

    def undo() -> None:
        for owner, name, value in before:
            setattr(owner, name, value)

    return undo


def note_of_end(schedulers: Iterable[Any]) -> str | None:
    """Return what a caller should know who has changed where training ends; ``None`` if nothing depends on it."""
    shape = rates.shape(schedulers)
    return shape and f"the schedule of the learning rate keeps its shape: {shape}"
