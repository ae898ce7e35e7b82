"""The objects of Hugging Face's Trainer and of Forgather's trainers: what the callback reads and changes in them."""

from __future__ import annotations

import dataclasses
import glob
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any, Final

from . import random_state
from .trainer_settings import CHANGED


def note_changes(state: Any, changed: Mapping[str, Any]) -> None:
    """Note in the trainer's log of the run, which its checkpoints hold, what clients have changed."""
    if isinstance(history := getattr(state, "log_history", None), list):
        history.append({"step": state.global_step, CHANGED: dict(changed)})


def changed_settings(state: Any) -> dict[str, Any]:
    """Return what clients had changed before the checkpoint from which a run is resumed."""
    found: dict[str, Any] = {}
    for entry in getattr(state, "log_history", None) or ():
        if isinstance(entry, dict) and isinstance(entry.get(CHANGED), dict):
            found |= entry[CHANGED]
    return found


def find_trainer(callback: Any) -> Any:
    """Return the trainer that is calling a hook of ``callback``, from the calling frames; ``None`` if there is none.

    Only the trainer tells whether there are data for an evaluation: the ``eval_dataloader`` that Hugging Face passes to
    hooks exists only after one.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        handler = getattr(caller, "__dict__", {}).get("callback_handler")  # without the code of a __getattr__
        if any(each is callback for each in getattr(handler, "callbacks", ())):
            return caller
        frame = frame.f_back
    return None


def loop_locals(*names: str) -> dict[str, Any] | None:
    """Return the local variables of the innermost calling function that has all of these names.

    How far a trainer's loop can go, and after how many steps it acts, is kept nowhere else.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if all(name in frame.f_code.co_varnames or name in frame.f_code.co_cellvars for name in names):
            found = frame.f_locals
            if all(name in found for name in names):
                return {name: found[name] for name in names}
        frame = frame.f_back
    return None


def no_evaluation(args: Any, trainer: Any, eval_dataloader: Any) -> str | None:
    """Return why this trainer cannot evaluate on request; ``None`` if it can (Forgather passes its data)."""
    can = word(getattr(args, "eval_strategy", "no")) != "no" or eval_dataloader is not None
    if can or getattr(trainer, "eval_dataset", None) is not None:
        return None
    return "the trainer has no eval_dataset"


def batches(dataloader: Any) -> int | None:
    """Return how many batches a loader has; ``None`` if it does not tell, as that of an iterable data set."""
    try:
        return len(dataloader)
    except Exception:  # boundary: whatever the user's data set raises
        return None


def nan_filter(args: Any) -> str | None:
    """Return why the logged loss is never NaN; ``None`` if it may be."""
    filters = getattr(args, "logging_nan_inf_filter", False)
    return (
        "the trainer replaces NaN in the loss that it logs, unless logging_nan_inf_filter is false" if filters else None
    )


def evaluation_counter(state: Any, trainer: Any, lr_scheduler: Any) -> str | None:
    """Return the name of what counts evaluations, so that an extra one would change training; ``None`` if nothing does.

    That is a scheduler that steps by metrics, or a callback whose state checkpoints hold (EarlyStoppingCallback).
    """
    scheduler = type(lr_scheduler).__name__
    if scheduler in ("ReduceLROnPlateau", "GreedyLR"):
        return scheduler
    handler = getattr(trainer, "callback_handler", None)
    callbacks = [each for each in getattr(handler, "callbacks", ()) if callable(getattr(each, "state", None))]
    stateful = [*callbacks, *(getattr(state, "stateful_callbacks", None) or ())]
    names = (each if isinstance(each, str) else type(each).__name__ for each in stateful)
    return next((name for name in names if name != "TrainerControl"), None)


def checkpoint_path(output_dir: str, state: Any, control: Any) -> str | None:
    """Return the absolute path of this step's checkpoint: where this trainer saves, else the newest of that name."""
    place = "checkpoints" if is_forgather(control) else ""
    if getattr(state, "is_hyper_param_search", False):  # the name of a trial may hold slashes
        place = glob.escape(getattr(state, "trial_name", None) or "") or "*"
    for folder in (place, "", "*"):
        pattern = os.path.join(glob.escape(output_dir), folder, f"checkpoint-{state.global_step}")
        found = [path for path in glob.glob(pattern) if os.path.isdir(path)]
        if found:
            return os.path.abspath(max(found, key=os.path.getmtime))
    return None


def saves_by_own_code(trainer: Any) -> bool:
    """Return whether a trainer's checkpoints are written by code of its own, so perhaps in the background."""
    method = getattr(type(trainer), "_save_checkpoint", None)
    return method is not None and method.__module__.partition(".")[0] != "transformers"


def written(output_dir: str, state: Any, control: Any) -> tuple[str | None, object]:
    """Return the path of this step's checkpoint, once transformers' last file is in it, and what is in it by now."""
    path = checkpoint_path(output_dir, state, control)
    if path is None:
        return None, None
    found = {name: _size(name) for name in glob.iglob(f"{glob.escape(path)}/**", recursive=True)}
    return path if os.path.join(path, "trainer_state.json") in found else None, found


def _size(path: str) -> int | None:
    with suppress(OSError):  # it may be renamed meanwhile
        return os.path.getsize(path)
    return None


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


class SaveFaults(logging.Handler):
    """What Forgather could not save: it only logs that a part of a checkpoint is missing, and calls the whole saved.

    Filled and read on the training thread, which saves.
    """

    #: The modules of its ``src/forgather/ml/trainer`` that write checkpoints.
    LOGGERS: Final = tuple(f"forgather.ml.trainer.checkpoint_{name}" for name in ("coordinator", "manager"))

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._faults: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if (text := record.getMessage()).startswith("Failed to save"):
            self._faults.append(text)

    def take(self) -> str | None:
        """Return what failed since the last call, or ``None``."""
        faults, self._faults = self._faults, []
        return "; ".join(faults) or None

    def attach(self) -> None:
        for name in self.LOGGERS:
            logging.getLogger(name).addHandler(self)

    def detach(self) -> None:
        for name in self.LOGGERS:
            logging.getLogger(name).removeHandler(self)


def is_forgather(control: Any) -> bool:
    """Return whether a control object is one of Forgather's."""
    return hasattr(control, "should_abort_without_save")


def word(strategy: Any) -> str:
    """Return a strategy, which may be an enum of strings, as a string."""
    return str(getattr(strategy, "value", strategy)).lower()


def locked(control: Any) -> Any:
    """Return a copy of a control object, a dataclass, that ignores changes: for the rest of an aborted run.

    Callbacks and trainers set flags at any time and expect no error. Copies of the copy are ordinary control objects.
    """
    kind = type(control)
    members = {
        "__slots__": (),
        "__module__": kind.__module__,
        "__new__": lambda cls, *args, **kwargs: kind(*args, **kwargs),  # which dataclasses.replace calls
        "__setattr__": lambda self, name, value: None,
        "__reduce_ex__": lambda self, protocol: (dataclasses.replace, (dataclasses.replace(self),)),
    }
    copied = dataclasses.replace(control)
    # The name stays: transformers saves a control object's state under the name of its class.
    copied.__class__ = type(kind.__name__, (kind,), members)
    return copied


class ExtraEvaluation:
    """Evaluation without a trace in training, at a step at which none is scheduled."""

    def __init__(self) -> None:
        # Set the random states of before the evaluation, and of after it.
        self._restore_random: Callable[[], None] | None = None
        self._evaluated_random: Callable[[], None] | None = None
        self._best: dict[str, Any] = {}
        #: Of the evaluations since ``settle``, scheduled ones, too.
        self.metrics: dict[str, Any] = {}

    def request(self, control: Any) -> None:
        """Set the trainer's flag. Does nothing where an evaluation is scheduled: that leaves its traces."""
        if not control.should_evaluate:
            control.should_evaluate = True
            self._restore_random = random_state.capture()

    def evaluated(self, args: Any, state: Any, metrics: Mapping[str, Any], hide_best: bool) -> None:
        """Restore the random states, after each of the data sets that the trainer evaluates on.

        ``hide_best``: this evaluation must not become the best one, as no checkpoint is saved for it.
        """
        self.metrics.update(metrics)
        if self._restore_random is None:
            return
        self._evaluated_random = random_state.capture()
        self._restore_random()
        if hide_best and not self._best:
            names = ("best_metric", "best_global_step", "best_model_checkpoint")
            self._best = {name: getattr(state, name) for name in names if hasattr(state, name)}
            if word(args.save_strategy) == "best":  # a new best metric would be saved
                state.best_metric = math.inf if args.greater_is_better else -math.inf

    def stand_in(self) -> None:
        """Leave the traces after all, because this evaluation replaces the one that is scheduled at this step."""
        if self._evaluated_random is not None:
            self._evaluated_random()

    def settle(self, state: Any) -> None:
        """Forget the evaluation, because it is finished or did not happen."""
        for name, value in self._best.items():
            setattr(state, name, value)
        self._restore_random = self._evaluated_random = None
        self._best, self.metrics = {}, {}
