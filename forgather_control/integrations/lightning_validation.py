"""A validation that Lightning's trainer runs on request, between two training batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from . import random_state
from .overrides import AttributeOverrides, do_nothing


def no_evaluation(trainer: Any) -> str | None:
    """Return why this trainer cannot validate; ``None`` if it can."""
    return None if trainer.enable_validation else "the trainer has no validation data or no validation_step"


def evaluation_counter(trainer: Any) -> str | None:
    """Return the name of what counts evaluations, so that an extra one would change training; ``None`` if nothing does.

    That is a scheduler that steps by metrics, EarlyStopping, and every callback that acts on validations and has a
    state to save. ModelCheckpoint is none: ``validate`` can disable it.
    """
    if any(config.reduce_on_plateau for config in trainer.lr_scheduler_configs):
        return "ReduceLROnPlateau"
    for callback in trainer.callbacks:
        kind = type(callback)
        if any(base.__name__ == "EarlyStopping" for base in kind.__mro__):
            return kind.__name__
        acts = any(
            _overrides(kind, f"on_validation_{moment}") for moment in ("start", "epoch_start", "epoch_end", "end")
        )
        if acts and _overrides(kind, "state_dict") and callback not in trainer.checkpoint_callbacks:
            return kind.__name__
    return None


def validate(trainer: Any, counted: bool = False) -> dict[str, Any]:
    """Run the trainer's validation loop, and return the metrics that it logged.

    All ranks call it together, in ``on_train_batch_end``. Afterwards training continues as if it had not been run:
    checkpoint callbacks do not act on it, schedules of validations do not move, and the random numbers that follow are
    the same. Unlike the trainer's own validations it leaves the gradients alone.

    Args:
        counted: checkpoint callbacks act on it all the same.

    Raises:
        Exception: what the user's code raises; the trainer can train on.
    """
    connector = trainer._logger_connector
    before = dict(connector._callback_metrics)
    restore_random = random_state.capture()
    try:
        with nullcontext() if counted else _without_checkpoints(trainer), _as_scheduled(trainer):
            trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        restore_random()
    after: Mapping[str, Any] = connector._callback_metrics
    return {name: value for name, value in after.items() if before.get(name) is not value}


@contextmanager
def _as_scheduled(trainer: Any) -> Iterator[None]:
    """Prepare and clean up as the trainer's training loop does, see ``_TrainingEpochLoop.on_advance_end``."""
    connector, val_loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    kept = connector._first_loop_iter, connector._current_fx
    last = getattr(trainer, "_last_val_time", None)  # since Lightning 2.6
    progress = val_loop.batch_progress.state_dict()
    modes = [(module, module.training) for module in trainer.lightning_module.modules()]
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True
        connector._first_loop_iter, connector._current_fx = kept
        trainer._last_val_time = last
        val_loop.batch_progress.load_state_dict(progress)
        for module, training in modes:
            module.training = training


@contextmanager
def _without_checkpoints(trainer: Any) -> Iterator[None]:
    overrides = AttributeOverrides()
    for callback in trainer.checkpoint_callbacks:
        for name in [name for name in dir(callback) if name.startswith("on_validation")]:
            overrides.set(callback, name, do_nothing)
    try:
        yield
    finally:
        overrides.restore()


def _overrides(kind: type, name: str) -> bool:
    """Return whether a callback's class defines a method that Lightning's base class has, too."""
    definer = next(base for base in kind.__mro__ if name in vars(base))
    return definer.__name__ != "Callback"
