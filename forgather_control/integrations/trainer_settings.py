"""What the settings of the trainers share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Final

from ..training.controller import Controller
from ..training.progress import Progress
from . import rates

log = logging.getLogger("forgather_control")

NORM_DOC: Final = "The norm to which gradients are clipped; 0 clips none."
END_DOC: Final = "The step at which training ends."

#: The name in a checkpoint of the settings that clients had changed.
CHANGED: Final = "changed_settings"


def assign(*places: tuple[Any, str, Any]) -> Callable[[], None]:
    """Set attributes, each given by its object, its name and its value; return a function that restores what was."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, value in places:
        setattr(owner, name, value)

    def undo() -> None:
        for owner, name, value in before:
            setattr(owner, name, value)

    return undo


def assign_end(progress: Progress, before: int, steps: int, *places: tuple[Any, str, Any]) -> Callable[[], None]:
    """Set the step at which training ends, in a trainer's attributes and in the progress that is reported.

    Args:
        before: the step before; returned to by the function that this returns.
    """
    undo = assign(*places)
    progress.set_end(steps)

    def restore() -> None:
        undo()
        progress.set_end(before)

    return restore


def note_of_end(schedulers: Iterable[Any]) -> str | None:
    """Return what a caller should know who has changed where training ends; ``None`` if nothing depends on it."""
    shape = rates.shape(schedulers)
    return shape and f"the schedule of the learning rate keeps its shape: {shape}"


def tell_resumed(changed: Any, run: Controller) -> None:
    """Log one line if training is resumed from a checkpoint after changes: what they were, and what is in force now."""
    if not run.is_main or not isinstance(changed, dict) or not changed:
        return
    now = {each["name"]: each["value"] for each in run.settings.snapshot}
    words = [f"{name} was set to {changed[name]}, and is {now.get(name, 'no setting')} now" for name in sorted(changed)]
    log.warning("Training is resumed from a checkpoint after changes of its settings: %s.", "; ".join(words))
