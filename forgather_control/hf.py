"""Hugging Face's Trainer and Forgather's: their hooks to the controller, wishes to their control flags.

Floor 6, training side: imports adapter; neither transformers nor torch, whose objects it knows by
their attributes. Runs on the training thread. How a trainer goes through one step::

    on_step_begin                 should_save and should_evaluate are cleared (Hugging Face)
    on_substep_end                of accumulated gradients; no step, nothing is applied
    on_step_end                   commands are applied here; after DefaultFlowCallback's schedule
    _maybe_log_save_evaluate      log ▶ evaluate ▶ save, each if its flag is (still) set
        on_log, on_evaluate, on_save
    on_epoch_end                  also when training stops; then _maybe_log_save_evaluate again

Two things may take ``should_save`` back between ``on_step_end`` and the save: a callback behind
ours, and ``save_strategy="best"``, which overwrites it after each evaluation. So a save stays wished
for until ``on_save``, and is asked for again at the next chance, then without an evaluation.
"""

from __future__ import annotations

import glob
import os
from typing import Any

from .adapter import Adapter, hook


class TrainerControlCallback(Adapter):
    """Makes a training run controllable from outside: ``Trainer(..., callbacks=[TrainerControlCallback()])``.

    Works as a callback of ``transformers.Trainer`` and of Forgather's trainers, in a Forgather template::

        trainer_control: !singleton:forgather_control:TrainerControlCallback

    It never raises into the trainer and never stops it on its own account. All its hooks run on the
    training thread.

    Args:
        job_id: by which the job is found: 1 to 128 of ``A-Z a-z 0-9 . _ -``, not starting with a
            dot or dash. ``None`` makes ``job_{timestamp}_{hostname}_{pid}``.
        enabled: ``False`` turns everything off.

    Raises:
        BadJobId: ``job_id`` cannot be one.
    """

    #: Forgather names the callback that stopped its training.
    name = "TrainerControlCallback"

    def __init__(self, job_id: str | None = None, enabled: bool = True) -> None:
        super().__init__(job_id, enabled)
        self._begin()

    def _begin(self) -> None:
        self._stopping = False
        self._asked_to_save = False
        self._owed_evaluation = False
        self._saved_at: int | None = None
        self._best: str | None = None

    # The hooks...

    @hook
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publish the job."""
        if self._stopping or self._wishes.abort:  # Forgather's control is made once, and its flags stay
            control.should_training_stop = False
            _set_abort(control, False)
        self._begin()
        self._open(state.global_step, state.max_steps)

    @hook
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins, so evaluation and saving are over."""
        if self._controller is not None:
            self._controller.phase = "training"

    @hook
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Apply what is pending; carry out what is wished."""
        controller = self._controller
        if controller is None:
            return
        controller.step(state.global_step, self._wishes, state.epoch)
        if self._wishes.any or self._owed_evaluation:
            self._steer(args, state, control)
        if control.should_evaluate or control.should_save:
            controller.phase = "evaluating" if control.should_evaluate else "saving"

    @hook
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last chance of a run to save; with ``save_strategy="epoch"`` also a second one too many."""
        if self._controller is None or not self._wishes.any:
            return
        self._steer(args, state, control)
        if self._stopping and self._saved_at == state.global_step:
            control.should_save = False

    @hook
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep what is logged; a rank that logs alone does no harm, as nothing is asked of the others."""
        if self._controller is not None and logs:
            self._controller.log(logs)
        if self._wishes.abort:
            self._abort(state, control)

    @hook
    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation goes on."""
        if self._controller is not None:
            self._controller.phase = "evaluating"

    @hook
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation is over; saving may follow."""
        if self._controller is None:
            return
        if self._wishes.abort:
            self._abort(state, control)
        elif self._wishes.save:
            control.should_save = True
        self._controller.phase = "saving" if control.should_save else "training"

    @hook
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is complete, whoever wanted it."""
        if self._controller is None:
            return
        self._controller.phase = "training"
        self._wishes.save = self._asked_to_save = False
        self._saved_at = state.global_step
        path = checkpoint_path(args.output_dir, state.global_step)
        if path is None:
            self._controller.save_failed(f"no directory checkpoint-{state.global_step} was found in {args.output_dir}")
        else:
            self._controller.saved(state.global_step, path)

    @hook
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the job away."""
        if self._best is not None:
            state.best_model_checkpoint = self._best
        self._close()

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """A hook that must exist, because Hugging Face calls it without looking."""

    on_init_end = on_epoch_begin = on_pre_optimizer_step = on_optimizer_step = _nothing
    on_substep_end = on_predict = on_push_begin = _nothing

    # What is wished, as flags of the trainer's control object...

    def _steer(self, args: Any, state: Any, control: Any) -> None:
        wishes = self._wishes
        if wishes.abort:
            self._stopping = True
            self._abort(state, control)
            control.should_log = True  # on_log then clears what callbacks behind this one have set
            return
        if wishes.stop:
            control.should_training_stop = True
            if not self._stopping and _word(args.save_strategy) != "no":
                wishes.save = wishes.evaluate = True
            self._stopping = True
        if wishes.save:
            self._save(args, control)
        elif self._owed_evaluation and not self._stopping:
            self._owed_evaluation = False
            control.should_evaluate = True

    def _save(self, args: Any, control: Any) -> None:
        control.should_save = True
        if self._asked_to_save:  # it was taken back once: now nothing may come between
            self._owed_evaluation = self._owed_evaluation or control.should_evaluate
            control.should_evaluate = False
        elif self._wishes.evaluate and args.load_best_model_at_end:
            control.should_evaluate = True
        self._wishes.evaluate = False
        self._asked_to_save = True

    def _abort(self, state: Any, control: Any) -> None:
        control.should_training_stop = True
        control.should_save = control.should_evaluate = False
        _set_abort(control, True)
        # Without a best checkpoint none is loaded at the end, nor any other deleted in its favour.
        best = getattr(state, "best_model_checkpoint", None)
        if best is not None:
            self._best, state.best_model_checkpoint = best, None


def checkpoint_path(output_dir: str, step: int) -> str | None:
    """The directory of the checkpoint that was saved at ``step``, absolute; ``None`` if there is none.

    Hugging Face saves in ``output_dir`` itself, in a hyper-parameter search one level below;
    Forgather in ``output_dir/checkpoints``. Of several the newest is the one.
    """
    name = f"checkpoint-{step}"
    found = [os.path.join(output_dir, name), *glob.glob(os.path.join(glob.escape(output_dir), "*", name))]
    found = [path for path in found if os.path.isdir(path)]
    return os.path.abspath(max(found, key=os.path.getmtime)) if found else None


def _set_abort(control: Any, value: bool) -> None:
    if hasattr(control, "should_abort_without_save"):  # Forgather's
        control.should_abort_without_save = value


def _word(strategy: Any) -> str:
    """``"steps"``, whether the strategy is a string or an enum of strings."""
    return str(getattr(strategy, "value", strategy)).lower()
