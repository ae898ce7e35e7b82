"""What is read of the objects of Hugging Face's Trainer and of Forgather's trainers."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any


def find_trainer(callback: Any) -> Any:
    """Return the trainer that is calling a hook of ``callback``; ``None`` if there is none.

    Hooks are not passed their trainer, which alone tells whether there are data for an evaluation: so it is
    looked for in the calling frames.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        handler = getattr(caller, "__dict__", {}).get("callback_handler")  # without the code of a __getattr__
        if any(each is callback for each in getattr(handler, "callbacks", ())):
            return caller
        frame = frame.f_back
    return None


def no_evaluation(args: Any, trainer: Any, eval_dataloader: Any) -> str | None:
    """Return why this trainer cannot evaluate on request; ``None`` if it can.

    Args:
        trainer: Hugging Face's, if known.
        eval_dataloader: what Forgather's trainers pass to their hooks.
    """
    can = word(getattr(args, "eval_strategy", "no")) != "no" or eval_dataloader is not None
    if can or getattr(trainer, "eval_dataset", None) is not None:
        return None
    return "the trainer has no eval_dataset"


def evaluation_counter(state: Any, trainer: Any, lr_scheduler: Any) -> str | None:
    """Return the name of what counts evaluations, so that an extra one would change training; ``None`` if nothing does.

    That is a scheduler that steps by metrics, and every callback whose state is saved with the checkpoints, such as
    EarlyStoppingCallback.
    """
    scheduler = type(lr_scheduler).__name__
    if scheduler in ("ReduceLROnPlateau", "GreedyLR"):
        return scheduler
    handler = getattr(trainer, "callback_handler", None)
    callbacks = [each for each in getattr(handler, "callbacks", ()) if callable(getattr(each, "state", None))]
    stateful: Iterable[Any] = [*callbacks, *(getattr(state, "stateful_callbacks", None) or ())]
    names = [each if isinstance(each, str) else type(each).__name__ for each in stateful]
    return next((name for name in names if name != "TrainerControl"), None)


def checkpoint_path(output_dir: str, step: int, place: str = "") -> str | None:
    """Return the absolute path of the checkpoint directory of ``step``; ``None`` if there is none.

    Args:
        place: where below ``output_dir`` this trainer saves, ``"*"`` for any directory in it. If no checkpoint is
            there, the newest directory of that name counts.
    """
    name = f"checkpoint-{step}"
    root = glob.escape(output_dir)
    for pattern in (place, "", "*"):
        found = [path for path in glob.glob(os.path.join(root, pattern, name)) if os.path.isdir(path)]
        if found:
            return os.path.abspath(max(found, key=os.path.getmtime))
    return None


def checkpoint_place(state: Any, control: Any) -> str:
    """Return where below the output directory this trainer saves its checkpoints."""
    if is_forgather(control):
        return "checkpoints"
    return "*" if getattr(state, "is_hyper_param_search", False) else ""


def log_steps(args: Any, state: Any) -> int | None:
    """Return after how many steps the trainer logs; the setting may be a fraction of all steps."""
    steps = getattr(args, "logging_steps", None)
    if not isinstance(steps, (int, float)) or steps <= 0:
        return None
    return max(1, int(steps * state.max_steps if steps < 1 else steps))


def save_period(args: Any, state: Any, control: Any) -> int | None:
    """Return after how many steps Forgather's trainer saves by its schedule; ``None`` for other trainers."""
    if not is_forgather(control):
        return None
    steps = {"steps": args.save_steps, "epoch": getattr(state, "epoch_train_steps", None)}
    period = steps.get(word(args.save_strategy))
    return None if period is None else max(1, int(period))


def is_forgather(control: Any) -> bool:
    """Return whether a control object is one of Forgather's."""
    return hasattr(control, "should_abort_without_save")


def set_abort(control: Any, value: bool) -> None:
    """Set the flag for an abort, which Forgather has."""
    if is_forgather(control):
        control.should_abort_without_save = value


def word(strategy: Any) -> str:
    """Return a strategy, which may be an enum of strings, as a string."""
    return str(getattr(strategy, "value", strategy)).lower()
