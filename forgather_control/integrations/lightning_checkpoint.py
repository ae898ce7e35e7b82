"""Checkpoints that Lightning's trainer saves on request: where they go, and when they are complete.

All of it runs on the training thread. ``write`` is called on all ranks together: the path is chosen by rank 0, the save
ends in a barrier, and it counts if no rank had an error. A rank that cannot save still goes to the barrier. (If every
rank takes part in gathering the state, and one of them fails on the way, no rank can leave: that ends as it does for
the trainer's own saves, by a time-out of the process group.)
"""

from __future__ import annotations

import itertools
import logging
import os
from typing import Any

log = logging.getLogger("forgather_control")


def saves_by_itself(trainer: Any) -> bool:
    """Return whether the trainer saves checkpoints without a request, so that a stop should save a last one."""
    if trainer.fast_dev_run:
        return False
    return any(getattr(one, "save_top_k", 1) or getattr(one, "save_last", None) for one in trainer.checkpoint_callbacks)


def write(trainer: Any) -> tuple[str, str | None]:
    """Save a checkpoint on all ranks together.

    Returns:
        its path, and what went wrong on any rank, or ``None``.
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
    return path, trouble


def exists(path: str) -> bool:
    """Return whether a checkpoint is on disk. A remote one counts as soon as the call that wrote it returned."""
    return _is_remote(path) or os.path.exists(path)


def saves_in_background(trainer: Any) -> bool:
    """Return whether a save may be incomplete when the call returns, as with AsyncCheckpointIO."""
    writer = getattr(trainer.strategy, "checkpoint_io", None)
    while writer is not None:
        if any("Async" in kind.__name__ for kind in type(writer).__mro__):
            return True
        writer = getattr(writer, "checkpoint_io", None)  # a plugin may wrap another
    return False


def _free_path(trainer: Any) -> str:
    """Return a path that does not exist. Runs on rank 0 and must not raise, as the other ranks wait for the path."""
    try:
        folder = _folder(trainer)
    except Exception:  # boundary: a user's logger
        folder = os.path.join(trainer.default_root_dir, "checkpoints")
    stem = os.path.join(folder, f"control-step={trainer.global_step}")
    names = (f"{stem}-v{version}.ckpt" if version else f"{stem}.ckpt" for version in itertools.count())
    path = next(path for path in names if not os.path.lexists(path))
    return path if _is_remote(path) else os.path.abspath(path)


def _folder(trainer: Any) -> str:
    """Return the directory in which ModelCheckpoint saves, or would save."""
    for one in trainer.checkpoint_callbacks:
        if getattr(one, "dirpath", None):
            return str(one.dirpath)
    for logger in trainer.loggers[:1]:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version, "checkpoints")
    return os.path.join(trainer.default_root_dir, "checkpoints")


def _is_remote(path: str) -> bool:
    return "://" in path
