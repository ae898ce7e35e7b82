"""Callback for Lightning 2's Trainer, created at its first use: only then must Lightning be loaded.

Its hooks run on the training thread of every rank. The trainer, known by its attributes only, calls for each batch::

    on_train_batch_start
    on_train_batch_end            commands are applied if the optimizer made a step; a requested checkpoint is saved at
                                  once, before ModelCheckpoint, which is always the last callback, saves by steps
    on_validation_start, _end     if a validation is due, or the trainer is to stop
    on_train_epoch_end            also when training stops; EarlyStopping decides, ModelCheckpoint saves
    on_train_end                  ModelCheckpoint may save its last checkpoint
    on_fit_end, teardown          the strategy has ended; what was saved in the background is on disk

A stop sets ``trainer.should_stop``: the trainer then validates once more if it has data for it, which other callbacks
expect. Only ``min_steps`` and ``min_epochs`` are set aside. Abort uses the same exit path, because no other leaves the
loops' counters consistent, with validation, the hooks at the end of an epoch and everything that saves disabled. What
is set for that in other objects is restored when the run ends.
"""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from .. import states
from ..training import background_saves
from ..training.adapter import Adapter, controlled, guarded
from ..training.controller import Controller
from ..training.setting import Setting
from . import lightning_trainer
from .lightning_settings import LightningSettings
from .lightning_trainer import disable, override
from .trainer_settings import CHANGED, tell_resumed

log = logging.getLogger("forgather_control")

#: Of what we keep in a checkpoint.
_KEY: Final = "forgather_control"


def _callback_class() -> Any:
    """Return the Callback of the Lightning that is loaded, else installed; without one, a class without instances."""
    problems = []
    for package in sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(f"{package}.callbacks.callback").Callback
        except ImportError as err:
            problems.append(str(err))

    class Missing:
        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            why = "; ".join(problems)
            raise ImportError(f"{cls.__name__} needs Lightning ({why}). Install lightning or pytorch-lightning.")

    return Missing


def __getattr__(name: str) -> Any:
    if name != "LightningControlCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # LightningCLI and Trainer check for the class of their own package.
    cls = globals()[name] = type(name, (LightningHooks, _callback_class()), {})
    return cls


class LightningHooks(Adapter):
    """Callback that makes a training run controllable: ``Trainer(..., callbacks=[LightningControlCallback()])``.

    The trainer itself saves the requested checkpoints, also with ``enable_checkpointing=False``, as
    ``control-step=N.ckpt`` in the directory of ``ModelCheckpoint``, or where that would save; if the name is taken,
    ``-v1`` is added. They hold all that ``trainer.fit(ckpt_path=...)`` needs, and are never deleted. A stop saves a
    last one if the trainer saves any by itself. If a save fails, training continues, or stops if that was requested.

    Commands are applied when a batch has ended an optimizer's step, as ``global_step`` tells; at the end of any batch
    where that does not move, as with manual optimization by bare optimizers, and then batches count as steps.

    All arguments are :class:`~forgather_control.training.options.ControlOptions`, which documents and checks them.
    After that no hook raises into the trainer. All hooks run on the training thread.
    """

    _earlier_changes: dict[str, Any] | None = None  # of settings, before the checkpoint to resume from
    _abort_flag: Any = None  # a tensor that copies in spawned processes share

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which controls nothing and has nothing to restore.

        With ddp_spawn, copies train in processes that share memory with this one.
        """
        if self._abort_flag is None:
            self._abort_flag = sys.modules["torch"].zeros(1).share_memory_()
        return {**super().__getstate__(), "_overrides": ExitStack(), "_exception_hooks": ExitStack()}

    @property
    def aborted(self) -> bool:
        """Whether this run was aborted, also where a process that Lightning spawned has trained."""
        return super().aborted or (self._abort_flag is not None and bool(self._abort_flag))

    def _reset(self) -> None:
        if self._abort_flag is not None:
            self._abort_flag.zero_()
        # What is set in other objects until the run ends, and what even if it ends by an exception.
        self._overrides, self._exception_hooks = ExitStack(), ExitStack()
        self._ending = False
        self._steps = 0  # in this run, of whatever size
        self._batches = 0  # since global_step moved
        self._uncounted = 0  # batches that counted as steps, though global_step did not move
        self._fresh = False  # whether there are new metrics to log
        self._shown: dict[str, Any] = {}  # those that were logged last

    @guarded
    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Restore what an aborted run that ended with an exception may have left behind."""
        self._restore()
        self._earlier_changes = None

    @guarded
    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Publish the job: the sanity check is finished, and the checkpoint to resume from is loaded."""
        if signal.SIGTERM in self._signals.commands and self._options.enabled:
            _put_sigterm_back(trainer)
        self._open(
            trainer.global_step,
            lightning_trainer.max_steps(trainer, module),
            trainer.log_every_n_steps or None,
            {"trainer": trainer, "model": module},
            trainer.default_root_dir,
            no_evaluation=lightning_trainer.no_evaluation(trainer),
            no_stop_save=None if lightning_trainer.saves_by_itself(trainer) else "this trainer saves no checkpoints",
            evaluation_counter=lightning_trainer.evaluation_counter(trainer),
        )
        if self._controller is not None:
            tell_resumed(self._earlier_changes, self._run)

    def _own_settings(self, run: Controller) -> Iterable[Setting]:
        return LightningSettings(self._objects["trainer"], self._objects["model"], run.state.progress).settings()

    @controlled
    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        """Note that evaluation and saving are finished; log the metrics of the last batch, which exist by then."""
        self._run.phase = states.STATUS_TRAINING
        if self._fresh:
            self._show(trainer)

    @controlled
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Apply the pending commands if this batch ended a step, and carry out what they request."""
        moved = trainer.global_step + self._uncounted != self._run.last_step
        self._batches = 0 if moved else self._batches + 1
        if not moved:
            # The gradients of this batch would be lost at a stop. But StochasticWeightAveraging ends with an epoch
            # without steps, and says so by accumulating over all of it.
            size = trainer.accumulate_grad_batches if module.automatic_optimization else 0
            if self._batches < size < trainer.num_training_batches:
                return
            self._uncounted += 1
        self._steps += 1
        every = trainer.log_every_n_steps
        self._fresh = self._fresh or bool(every and self._steps % every == 0)
        step = trainer.global_step + self._uncounted
        self._run.step(step, trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)
        if self._requested.any:
            self._carry_out(trainer, module)

    @controlled
    def on_validation_start(self, trainer: Any, module: Any) -> None:
        """Note that evaluation starts. During the sanity check there is no job yet."""
        self._run.phase = states.STATUS_EVALUATING

    @controlled
    def on_validation_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        """Note that a batch of the evaluation is done."""
        self._run.state.evaluate_batch(lambda: lightning_trainer.validation_batches(trainer))

    @controlled
    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Note that evaluation is finished, and log its metrics."""
        self._run.phase = states.STATUS_TRAINING
        self._show(trainer)

    #: Log the last metrics. The job stays until ModelCheckpoint has saved its last checkpoint.
    on_train_end = on_validation_end

    @guarded
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Note that the metrics of the epoch will follow."""
        self._fresh = True

    @controlled
    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        """Note that the trainer saves, and, in the checkpoint, what clients have changed."""
        self._run.phase = states.STATUS_SAVING
        if changed := {**(self._earlier_changes or {}), **self._run.settings.changed}:
            checkpoint[_KEY] = {CHANGED: changed}

    @guarded
    def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: Any) -> None:
        """Note what clients had changed before the checkpoint from which training is resumed."""
        found = checkpoint.get(_KEY)
        changed = found.get(CHANGED) if isinstance(found, dict) else None
        self._earlier_changes = changed if isinstance(changed, dict) else None

    @guarded
    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
        """End the job: training ends with an error or Ctrl-C. After an abort no checkpoint is saved even then."""
        self._overrides.close()
        self._close(f"training ended by {type(exception).__name__}")

    @guarded
    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """End the job: nothing is written any more."""
        self._restore()
        self._close()

    # Requested actions.

    def _carry_out(self, trainer: Any, module: Any) -> None:
        requested = self._requested
        if requested.stop or requested.abort:
            trainer.should_stop = True
            if not self._ending:
                self._end(trainer)
        if requested.abort:
            if self._abort_flag is not None:
                self._abort_flag.fill_(1)
            self._silence(trainer, module)
            return
        # "auto" does not evaluate before a save: Lightning has no load_best_model_at_end.
        first = requested.evaluate_first is True and requested.no_evaluation is None
        evaluated = (requested.evaluate or first) and self._evaluate(trainer)
        if requested.save:
            self._save(trainer, evaluated)

    def _end(self, trainer: Any) -> None:
        """Let the trainer stop at any step, with a last checkpoint if it saves any."""
        self._ending = True
        override(self._overrides, trainer.fit_loop, "min_epochs", 0)
        override(self._overrides, trainer.fit_loop.epoch_loop, "min_steps", None)
        if not self._requested.skip_save and lightning_trainer.saves_by_itself(trainer):
            self._requested.request_save()

    def _silence(self, trainer: Any, module: Any) -> None:
        """Disable, until the run ends, whatever saves or expects a validation."""
        override(self._overrides, trainer, "save_checkpoint", _refuse_to_save)
        override(self._overrides, trainer, "limit_val_batches", 0)
        disable(self._overrides, trainer.fit_loop.epoch_loop, "update_lr_schedulers")
        for each in (*trainer.callbacks, module):
            disable(self._overrides, each, "on_train_epoch_end")
        for each in trainer.checkpoint_callbacks:
            # They would also record what they did not write, and delete other checkpoints for it.
            disable(self._exception_hooks, each, "on_exception")
            disable(self._overrides, each, "on_")

    def _restore(self) -> None:
        self._overrides.close()
        self._exception_hooks.close()

    def _evaluate(self, trainer: Any) -> bool:
        """Validate now, and report it if a command asked for it; return whether that worked."""
        try:
            found = lightning_trainer.validate(trainer, self._requested.counted)
        except Exception as err:  # boundary: the user's validation_step
            log.warning("A requested validation failed: %s", err, exc_info=True)
            self._requested.evaluated()
            self._run.evaluation_failed(f"the validation failed: {type(err).__name__}: {err}")
            return False
        finally:
            self._run.phase = states.STATUS_TRAINING
        self._report_evaluation(self._run.last_step, found)
        return True

    def _save(self, trainer: Any, evaluated: bool) -> None:
        self._run.phase, step = states.STATUS_SAVING, self._run.last_step
        path, trouble = lightning_trainer.write(trainer)
        self._run.phase = states.STATUS_TRAINING
        self._requested.saved()
        if trouble is not None:
            self._miss(trouble)
        elif (future := lightning_trainer.background_save(trainer)) is not None:
            background_saves.follow(self._run, self._run.begin_save(step), path, evaluated, future)
        elif background_saves.exists(path) or not trainer.is_global_zero:
            self._run.saved(step, path, evaluated)
        else:
            self._miss(f"no file {path} was found after saving it")

    def _miss(self, reason: str) -> None:
        log.warning("A requested checkpoint was not saved: %s", reason)
        self._run.save_failed(reason)

    def _show(self, trainer: Any) -> None:
        """Log the metrics that are new; ``callback_metrics`` would compute them again, and may read the device.

        The trainer keeps those of the last validation beside those of each batch: a rule must count them once.
        """
        self._fresh = False
        held = getattr(trainer._logger_connector, "_callback_metrics", None)
        metrics = dict(trainer.callback_metrics if held is None else held)
        shown, self._shown = self._shown, metrics
        self._run.log({name: value for name, value in metrics.items() if shown.get(name) is not value})


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    log.warning("trainer.save_checkpoint() saves nothing: this run was aborted")


def _put_sigterm_back(trainer: Any) -> None:
    """Restore the handler from before Lightning's, which would raise at the end of the batch, while training stops."""
    connector = getattr(trainer, "_signal_connector", None)
    before = getattr(connector, "_original_handlers", {}).get(signal.SIGTERM)
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    class LightningControlCallback(LightningHooks, Callback):
        """As ``__getattr__`` makes it."""
