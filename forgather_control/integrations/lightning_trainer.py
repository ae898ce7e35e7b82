"""Lightning's Trainer: the checkpoints and the validations that it makes on request.

All of it runs on the training thread, ``write`` and ``validate`` on all ranks together.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import os
import shutil
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from typing import Any, Final

from ..errors import CommandFailed
from . import random_state

log = logging.getLogger("forgather_control")

_UNKNOWN: Final = object()


def override(until: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until a stack is closed; leave an object that does not allow it as it is."""
    with suppress(AttributeError, TypeError):
        own = vars(owner)
        undo = functools.partial(setattr, owner, name, own[name]) if name in own else None
        setattr(owner, name, value)
        until.callback(undo or functools.partial(delattr, owner, name))


def disable(until: ExitStack, owner: Any, prefix: str) -> None:
    """Let the methods whose name begins with ``prefix`` do nothing until a stack is closed."""
    for name in [name for name in dir(owner) if name.startswith(prefix)]:
        override(until, owner, name, _do_nothing)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def saves_by_itself(trainer: Any) -> bool:
    """Return whether the trainer saves checkpoints without a request, so that a stop should save a last one."""
    if trainer.fast_dev_run:
        return False
    return any(getattr(one, "save_top_k", 1) or getattr(one, "save_last", None) for one in trainer.checkpoint_callbacks)


def write(trainer: Any) -> tuple[str, str | None]:
    """Save a checkpoint; return its path, which rank 0 chooses, and what went wrong on any rank, or ``None``.

    The save ends in a barrier, to which a rank that cannot save goes, too. (If every rank takes part in gathering the
    state, and one of them fails on the way, no rank can leave: that ends as it does for the trainer's own saves, by a
    time-out of the process group.)
    """
    path, trouble, strategy = "", None, trainer.strategy
    try:
        path = strategy.broadcast(_free_path(trainer) if trainer.is_global_zero else "")
        trainer.save_checkpoint(path, weights_only=False)
    except Exception as err:  # boundary: a full disk, a user's on_save_checkpoint
        trouble = f"{type(err).__name__}: {err}"
        log.debug("saving failed", exc_info=True)
        strategy.barrier("Trainer.save_checkpoint")  # where the other ranks wait
    if not strategy.reduce_boolean_decision(trouble is None):
        trouble = trouble or "another rank could not save its part"
        if trainer.is_global_zero and "://" not in path:
            _remove_part(path)  # training must not be resumed from it
    return path, trouble


def _remove_part(path: str) -> None:
    """Remove what a failed save left: nothing else had that name."""
    with suppress(OSError):
        if os.path.isdir(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def background_save(trainer: Any) -> Future[None] | None:
    """Return when the last save of this rank is complete, if it may not be when the call returns."""
    writer = getattr(trainer.strategy, "checkpoint_io", None)
    while writer is not None:
        if any("Async" in kind.__name__ for kind in type(writer).__mro__):
            return _last_save(writer)
        writer = getattr(writer, "checkpoint_io", None)  # a plugin may wrap another
    return None


def _last_save(writer: Any) -> Future[None] | None:
    executor: Any = getattr(writer, "_executor", _UNKNOWN)
    if executor is None:  # nothing was saved on this rank
        return None
    if getattr(executor, "_max_workers", None) == 1:  # that of AsyncCheckpointIO: after the save
        return executor.submit(_raise_error, writer)  # type: ignore[no-any-return]
    future: Future[None] = Future()
    why = f"it is unknown whether the checkpoint was completed: {type(writer).__name__} does not tell"
    future.set_exception(CommandFailed(why))
    return future


def _raise_error(writer: Any) -> None:
    if (error := getattr(writer, "_error", None)) is not None:
        raise error


def _free_path(trainer: Any) -> str:
    """Return a path that does not exist. Runs on rank 0 and must not raise, as the other ranks wait for the path."""
    stem = os.path.join(_folder(trainer), f"control-step={trainer.global_step}")
    names = (f"{stem}-v{version}.ckpt" if version else f"{stem}.ckpt" for version in itertools.count())
    path = next(path for path in names if not os.path.lexists(path))
    return path if "://" in path else os.path.abspath(path)


def _folder(trainer: Any) -> str:
    """Return the directory in which ModelCheckpoint saves, or would save."""
    for one in trainer.checkpoint_callbacks:
        if getattr(one, "dirpath", None):
            return str(one.dirpath)
    root = trainer.default_root_dir
    with suppress(Exception):  # boundary: a user's logger
        for logger in trainer.loggers[:1]:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            root = os.path.join(logger.save_dir or root, str(logger.name), version)
    return os.path.join(root, "checkpoints")


def max_steps(trainer: Any, module: Any) -> int | None:
    """Return the step at which training ends, if known. The data are loaded already, so this is cheap."""
    try:
        # With manual optimization a batch may have any number of steps.
        steps = trainer.estimated_stepping_batches if module.automatic_optimization else trainer.max_steps
        return int(steps) if 0 < steps < math.inf else None
    except Exception:  # boundary: some schedules cannot be estimated, and raise
        return None


def last_step(trainer: Any, module: Any) -> int | None:
    """Return the step at which training would end for its number of epochs alone, if known."""
    batches = trainer.num_training_batches
    if not module.automatic_optimization or batches == math.inf or max_steps(trainer, module) is None:
        return None
    return int(math.ceil(batches / trainer.accumulate_grad_batches) * max(trainer.max_epochs, 1))


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
        moments = ("start", "epoch_start", "epoch_end", "end")
        acts = any(_overrides(kind, f"on_validation_{moment}") for moment in moments)
        if acts and _overrides(kind, "state_dict") and callback not in trainer.checkpoint_callbacks:
            return kind.__name__
    return None


def _overrides(kind: type, name: str) -> bool:
    """Return whether a callback's class defines a method that Lightning's base class has, too."""
    definer = next(base for base in kind.__mro__ if name in vars(base))
    return definer.__name__ != "Callback"


def validation_batches(trainer: Any) -> int | None:
    """Return how many batches a validation has, of all its loaders; ``None`` if one of them does not tell."""
    total = sum(trainer.num_val_batches)
    return int(total) if math.isfinite(total) else None


def validate(trainer: Any, counted: bool = False) -> dict[str, Any]:
    """Run the trainer's validation loop, in ``on_train_batch_end``, and return the metrics that it logged.

    Afterwards training continues as if it had not been run: checkpoint callbacks do not act on it (unless it is
    ``counted``), schedules of validations do not move, and the random numbers that follow are the same. Unlike the
    trainer's own validations it leaves the gradients alone.

    Raises:
        Exception: what the user's code raises; the trainer can train on.
    """
    connector, val_loop = trainer._logger_connector, trainer.fit_loop.epoch_loop.val_loop
    before = dict(connector._callback_metrics)
    with ExitStack() as undo:
        undo.callback(random_state.capture())
        for callback in () if counted else trainer.checkpoint_callbacks:
            disable(undo, callback, "on_validation")
        # Prepare and clean up as the trainer's training loop does, see _TrainingEpochLoop.on_advance_end.
        for owner, name in ((connector, "_first_loop_iter"), (connector, "_current_fx"), (trainer, "_last_val_time")):
            undo.callback(setattr, owner, name, getattr(owner, name, None))  # _last_val_time: since Lightning 2.6
        undo.callback(val_loop.batch_progress.load_state_dict, val_loop.batch_progress.state_dict())
        for module in trainer.lightning_module.modules():
            undo.callback(setattr, module, "training", module.training)
        undo.callback(setattr, trainer, "training", True)
        trainer.validating = True
        val_loop.run()
    return {name: value for name, value in connector._callback_metrics.items() if before.get(name) is not value}
