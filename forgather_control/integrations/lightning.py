"""Lightning 2's Trainer: its hooks to the controller, wishes to its own saving and stopping.

Floor 6, training side: imports adapter; neither lightning nor torch, whose objects it knows by their
attributes. Runs on the training thread. How a trainer goes through one batch::

    on_train_batch_start
    on_train_batch_end            commands are applied here, if the optimizer has stepped; we save at once,
                                  where ModelCheckpoint saves by steps (it always comes behind us)
    on_validation_start, _end     if it is due, or if the trainer is to stop
    on_train_epoch_end            also when training stops; EarlyStopping judges, ModelCheckpoint saves
    on_train_end                  ModelCheckpoint may save its last one
    on_fit_end, teardown          the strategy is down, what was saved in the background is on disk

All of them come on every rank, and a save is asked of all ranks together: its path is that of rank 0,
it ends in a barrier, and it counts if no rank had an error. A rank that cannot save goes to the barrier
all the same. (Where every rank takes part in gathering the state, and one of them fails on the way, no
rank can leave: that ends as it does for the trainer's own saves, by a time-out of the process group.)

A stop is Lightning's own: with ``trainer.should_stop`` it validates once more, where it has data for it,
as others behind us count on that. Only ``min_steps`` and ``min_epochs`` are set aside. An abort leaves
the same way, as no other leaves the loops' counters whole, but through a house where all are asleep:
no validation, no end of an epoch, nobody who saves. What we set for that in objects of others is set back
when the run is over.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any, Final

from .. import states
from ..training.adapter import Adapter, guarded
from ..training.options import ControlOptions

log = logging.getLogger("forgather_control")

#: Where a Lightning that is loaded keeps its ``Callback``; the two are different packages with the same content.
_HOMES: Final = ("lightning.pytorch.callbacks.callback", "pytorch_lightning.callbacks.callback")
_ABSENT: Final = object()


class LightningControlCallback(Adapter):
    """Makes a training run controllable from outside: ``Trainer(..., callbacks=[LightningControlCallback()])``.

    Works with the Trainer of ``lightning.pytorch`` and of ``pytorch_lightning``. Checkpoints are saved by
    the trainer itself, also where ``enable_checkpointing=False``, as ``control-step=N.ckpt`` beside those of
    ``ModelCheckpoint``, or where it would put them; a name that is taken gets a ``-v1``. They hold all that
    ``trainer.fit(ckpt_path=...)`` needs, and are never deleted. A stop saves a last one if the trainer
    saves any. If a save fails, its command fails, and training goes on, or stops if that was asked too.

    ``global_step`` counts the steps of all optimizers; a model that optimizes by hand, without Lightning's
    optimizers, has no steps, and no command is applied.

    All arguments are :class:`~forgather_control.training.options.ControlOptions`, which documents and checks them.
    After that no hook raises into the trainer. All hooks run on the training thread.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> LightningControlCallback:
        """Whoever makes one has mostly loaded Lightning by now."""
        _join_family()
        return super().__new__(cls)

    def __init__(
        self,
        job_id: str | None = None,
        *,
        port: int | str | None = None,
        host: str = "127.0.0.1",
        enabled: bool = True,
        poll_steps: int | None = None,
        signals: Mapping[Any, str] | None = None,
        fresh_seconds: float = 0.0,
        certfile: str | None = None,
        keyfile: str | None = None,
    ) -> None:
        options = ControlOptions(job_id, port, host, enabled, poll_steps, signals, fresh_seconds, certfile, keyfile)
        super().__init__(options)
        self._takes_sigterm = any(getattr(key, "name", key) == "SIGTERM" for key in signals or ())
        self._overrides = AttributeOverrides()
        self._begin()

    def __getattr__(self, name: str) -> Any:
        # It was made before Lightning was loaded, and is now asked for what Lightning's own class would give.
        if _join_family():
            return getattr(self, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        """See ``Adapter``; nor does a copy set anything back."""
        return {**super().__getstate__(), "_overrides": AttributeOverrides()}

    def _begin(self) -> None:
        self._ending = False
        self._silenced = False
        self._steps = 0  # in this run, of whatever size
        self._fresh = False  # whether there are new metrics to show
        self._awaited: tuple[int, str] | None = None  # what is saved in the background: step and path

    # The hooks...

    @guarded
    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Any run begins; the last one may have died of an exception amid an abort."""
        self._overrides.restore()

    @guarded
    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Publish the job; the sanity check is over, and what is resumed from is loaded."""
        self._begin()
        if self._takes_sigterm and self._options.enabled:
            _put_sigterm_back(trainer)
        self._open(trainer.global_step, _max_steps(trainer, module), trainer.log_every_n_steps or None)

    @guarded
    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        """Evaluation and saving are over, and the metrics of the last batch are there."""
        if self._controller is not None:
            self._controller.phase = states.STATUS_TRAINING
            if self._fresh:
                self._show(trainer)

    @guarded
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Apply what is pending, if this batch has ended a step; carry out what is wished."""
        controller = self._controller
        if controller is None:
            return
        if self._awaited is not None:
            self._look_for_awaited()
        step = trainer.global_step
        if step == controller.last_step:
            return
        self._steps += 1
        every = trainer.log_every_n_steps
        self._fresh = self._fresh or bool(every and self._steps % every == 0)
        controller.step(step, self._requested, trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)
        if self._requested.any:
            self._carry_out(trainer, module)

    @guarded
    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Evaluation begins; that of the sanity check finds no job."""
        if self._controller is not None:
            self._controller.phase = states.STATUS_EVALUATING

    @guarded
    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Evaluation is over, and has left its metrics."""
        if self._controller is not None:
            self._controller.phase = states.STATUS_TRAINING
            self._show(trainer)

    @guarded
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """The metrics of the epoch come behind this."""
        self._fresh = True

    @guarded
    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        """Somebody saves."""
        if self._controller is not None:
            self._controller.phase = states.STATUS_SAVING

    @guarded
    def on_train_end(self, trainer: Any, module: Any) -> None:
        """The last metrics; the job stays until ModelCheckpoint has saved its last."""
        if self._controller is not None:
            self._show(trainer)

    @guarded
    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """Training ends by an error or Ctrl-C; after an abort not even then may a checkpoint be saved."""
        self._overrides.restore(keep="on_exception")
        self._close(f"training ended by {type(exception).__name__}")

    @guarded
    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """Take the job away: nothing is written any more."""
        self._overrides.restore()
        if self._controller is not None:
            self._look_for_awaited(last=True)
            self._close()

    # What is wished, by the trainer's own means...

    def _carry_out(self, trainer: Any, module: Any) -> None:
        requested = self._requested
        if requested.stop or requested.abort:
            trainer.should_stop = True
            if not self._ending:
                self._end(trainer)
        if requested.abort:
            if not self._silenced:
                self._silence(trainer, module)
        elif requested.save:
            # Nothing is evaluated first: Lightning has no load_best_model_at_end.
            self._save(trainer)

    def _end(self, trainer: Any) -> None:
        """Nothing holds the trainer back, and it goes with a checkpoint."""
        self._ending = True
        self._overrides.set(trainer.fit_loop, "min_epochs", 0)
        self._overrides.set(trainer.fit_loop.epoch_loop, "min_steps", None)
        if not self._requested.skip_save and _saves(trainer):
            self._requested.save = True

    def _silence(self, trainer: Any, module: Any) -> None:
        """From here to the end of the run nothing is written, and nobody misses a validation."""
        self._silenced = True
        override = self._overrides.set
        override(trainer, "save_checkpoint", _refuse_to_save)
        override(trainer, "limit_val_batches", 0)
        override(trainer.fit_loop.epoch_loop, "update_lr_schedulers", _nothing)
        for each in (*trainer.callbacks, module):
            override(each, "on_train_epoch_end", _nothing)
        for each in trainer.checkpoint_callbacks:
            # They would also take what they did not write into their books, and delete others for it.
            for name in [name for name in dir(each) if name.startswith("on_")]:
                override(each, name, _nothing)

    def _save(self, trainer: Any) -> None:
        controller, step = self._controller, trainer.global_step
        assert controller is not None
        controller.phase = states.STATUS_SAVING
        path, trouble = _write(trainer)
        controller.phase = states.STATUS_TRAINING
        self._requested.save = self._requested.evaluate = False
        self._awaited = None
        if trouble is not None:
            self._miss(trouble)
        elif _is_there(path) or not trainer.is_global_zero:
            controller.saved(step, path)
        elif _saves_in_background(trainer):
            self._awaited = step, path
        else:
            self._miss(f"no file {path} was found after saving it")

    def _look_for_awaited(self, last: bool = False) -> None:
        if self._awaited is None or self._controller is None:
            return
        step, path = self._awaited
        if _is_there(path):
            self._awaited = None
            self._controller.saved(step, path)
        elif last:
            self._miss(f"{path} was not written in the background")

    def _miss(self, reason: str) -> None:
        log.warning("a checkpoint that was asked for is not saved: %s", reason)
        if self._controller is not None:
            self._controller.save_failed(reason)

    def _show(self, trainer: Any) -> None:
        self._fresh = False
        if self._controller is not None:
            self._controller.log(_metrics(trainer))


class AttributeOverrides:
    """Attributes set in objects of others, to be set back."""

    def __init__(self) -> None:
        self._own: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set one; an object that cannot be set is left as it is."""
        with contextlib.suppress(AttributeError, TypeError):
            own = vars(owner).get(name, _ABSENT)
            setattr(owner, name, value)
            self._own.append((owner, name, own))

    def restore(self, keep: str = "") -> None:
        """Set all back, the last first, but those of the name ``keep``."""
        kept = [entry for entry in self._own if entry[1] == keep]
        for owner, name, own in reversed(self._own):
            if name == keep:
                continue
            if own is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self._own = kept


def _join_family() -> bool:
    """Make our callback a ``Callback`` of each Lightning that is loaded; whether there was one to add.

    The trainer, and above all LightningCLI, ask for the class. To import Lightning for that would cost
    seconds, and which of the two packages is in use is known only once it is loaded.
    """
    loaded = [kind for name in _HOMES if (kind := getattr(sys.modules.get(name), "Callback", None)) is not None]
    bases = (Adapter, *loaded)
    if bases == LightningControlCallback.__bases__:
        return False
    with contextlib.suppress(TypeError):  # somebody's subclass that cannot be ordered: it has a Callback already
        LightningControlCallback.__bases__ = bases
    return bases == LightningControlCallback.__bases__


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A hook that sleeps."""


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    log.warning("an abort was applied: trainer.save_checkpoint() saves nothing until the run is over")


def _put_sigterm_back(trainer: Any) -> None:
    """The handler that was there before Lightning's, which raises at the end of the batch, amid the end we ask for."""
    connector = getattr(trainer, "_signal_connector", None)
    before = getattr(connector, "_original_handlers", {}).get(signal.SIGTERM)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _max_steps(trainer: Any, module: Any) -> int | None:
    """Where training ends, if it is known; the data are loaded, so asking costs nothing."""
    try:
        # Who optimizes by hand may make any number of steps a batch.
        steps = trainer.estimated_stepping_batches if module.automatic_optimization else trainer.max_steps
        return int(steps) if 0 < steps < math.inf else None
    except Exception:  # border: some schedules cannot be estimated, and say so by an error
        return None


def _metrics(trainer: Any) -> Mapping[str, Any]:
    """What was logged last. The property of that name computes it again, and reads the device for the progress bar."""
    held = getattr(getattr(trainer, "_logger_connector", None), "_callback_metrics", None)
    return held if isinstance(held, dict) else trainer.callback_metrics


def _saves(trainer: Any) -> bool:
    """Whether this trainer saves checkpoints of its own, as by a save_strategy that is not "no"."""
    if trainer.fast_dev_run:
        return False
    return any(getattr(one, "save_top_k", 1) or getattr(one, "save_last", None) for one in trainer.checkpoint_callbacks)


def _write(trainer: Any) -> tuple[str, str | None]:
    """Save on all ranks together; the path, and what went wrong, if anything did on any of them."""
    path, trouble, strategy = "", None, trainer.strategy
    try:
        path = strategy.broadcast(_free_path(trainer) if trainer.is_global_zero else "")
        trainer.save_checkpoint(path, weights_only=False)
    except Exception as err:  # border: a disk that is full, somebody's on_save_checkpoint
        trouble = f"{type(err).__name__}: {err}"
        log.debug("saving failed", exc_info=True)
        strategy.barrier("Trainer.save_checkpoint")  # where the others wait
    if not strategy.reduce_boolean_decision(trouble is None):
        trouble = trouble or "another rank could not save its part"
    return path, trouble


def _free_path(trainer: Any) -> str:
    """A path that is not in use; asked of rank 0, which must not fail while the others wait for it."""
    try:
        folder = _folder(trainer)
    except Exception:  # border: somebody else's logger
        folder = os.path.join(trainer.default_root_dir, "checkpoints")
    stem = os.path.join(folder, f"control-step={trainer.global_step}")
    names = (f"{stem}-v{version}.ckpt" if version else f"{stem}.ckpt" for version in itertools.count())
    path = next(path for path in names if not os.path.lexists(path))
    return path if _is_remote(path) else os.path.abspath(path)


def _folder(trainer: Any) -> str:
    """Where ModelCheckpoint saves, or would save."""
    for one in trainer.checkpoint_callbacks:
        if getattr(one, "dirpath", None):
            return str(one.dirpath)
    for logger in trainer.loggers[:1]:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version, "checkpoints")
    return os.path.join(trainer.default_root_dir, "checkpoints")


def _is_remote(path: str) -> bool:
    return "://" in path


def _is_there(path: str) -> bool:
    """Whether it is on disk; another file system is taken at the word of the call that wrote to it."""
    return _is_remote(path) or os.path.exists(path)


def _saves_in_background(trainer: Any) -> bool:
    """Whether the trainer's saves go on after they return, as by AsyncCheckpointIO; they appear when complete."""
    writer = getattr(trainer.strategy, "checkpoint_io", None)
    while writer is not None:
        if any("Async" in kind.__name__ for kind in type(writer).__mro__):
            return True
        writer = getattr(writer, "checkpoint_io", None)  # one that wraps another
    return False


_join_family()
