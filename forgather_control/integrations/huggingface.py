"""Callback for Hugging Face's Trainer and Forgather's trainers: commands become flags of the trainer's control object.

It imports neither transformers nor torch, and runs on the training thread. A trainer calls for each step::

    on_step_begin                 the flags should_save and should_evaluate are cleared (Hugging Face)
    on_substep_end                after a batch of accumulated gradients; no commands are applied
    on_step_end                   commands are applied, after DefaultFlowCallback has set the scheduled flags
    _maybe_log_save_evaluate      log, evaluate, save, as far as the flags are (still) set
        on_log, on_evaluate, on_save
    on_epoch_end                  also when training stops; then _maybe_log_save_evaluate again

Two things may clear ``should_save`` between ``on_step_end`` and the save: a callback behind this one, and
``save_strategy="best"``, which overwrites it after each evaluation. So a requested save stays requested until
``on_save``, and the flag is set again at the next chance, then without an evaluation in between. The same two may set
the flag after an abort cleared it; so after an abort the hooks return a control object that ignores changes.

A trainer whose class has a ``_save_checkpoint`` of its own may save in the background: where a checkpoint lacks the
file that transformers writes last, the command is finished when that is there.

Forgather's trainer saves by a schedule that no flag can change. At a step where a save is due, commands are applied
after that save, in ``on_save``, and it counts as theirs. At the end of its data it calls ``on_step_end`` once more,
without a step, and saves nothing after it.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .. import states
from ..training import background_saves
from ..training.adapter import Adapter, controlled, guarded
from ..training.controller import Controller
from ..training.setting import Setting
from . import huggingface_trainer as facts
from .huggingface_settings import TrainerSettings
from .trainer_settings import tell_resumed

if TYPE_CHECKING:  # a type checker wants a list of TrainerCallback; the trainers themselves do not look
    from transformers import TrainerCallback
else:
    TrainerCallback = object


class TrainerControlCallback(Adapter, TrainerCallback):
    """Callback that makes a training run controllable: ``Trainer(..., callbacks=[TrainerControlCallback()])``.

    For ``transformers.Trainer`` and for Forgather's trainers, there in a template::

        trainer_control: !singleton:forgather_control:TrainerControlCallback

    All arguments are :class:`~forgather_control.training.options.ControlOptions`, which documents and checks them.
    After that no hook raises into the trainer. All hooks run on the training thread.
    """

    #: Forgather names the callback that stopped its training.
    name = "TrainerControlCallback"

    _faults: facts.SaveFaults | None = None  # of Forgather's saves

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which controls nothing and follows no saves."""
        return {**super().__getstate__(), "_faults": None}

    def _reset(self) -> None:
        self._stopping = self._asked_to_save = self._owed_evaluation = False
        self._known_changes: dict[str, Any] = {}  # that the state has, as checkpoints hold it
        self._late = False  # commands of this step are applied after its scheduled save
        self._period: int | None = None  # steps after which the trainer saves, whatever the flags
        # The steps of the last evaluation, of the last save, and of the last save on request.
        self._evaluated_at: int | None = None
        self._saved_at = 0
        self._forced_at: int | None = None
        self._own_code = False  # whether the trainer writes checkpoints by code of its own
        self._evaluation = facts.ExtraEvaluation()
        self._best: str | None = None  # of the state of an aborted run, which must load and delete nothing
        self._own_control: Any = None  # of the trainer, in an aborted run
        self._locked_control: Any = None  # which it gets instead

    @guarded
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Publish the job; return the trainer's own control object if an aborted run ended without giving it back."""
        if control is self._locked_control:
            control = self._own_control
        if self._stopping or self._requested.abort:  # Forgather never clears these flags
            control.should_training_stop = False
            if facts.is_forgather(control):
                control.should_abort_without_save = False
        trainer = facts.find_trainer(self)
        self._open(
            state.global_step,
            state.max_steps,
            facts.log_steps(args, state),
            {**kwargs, "args": args, "state": state, "control": control, "trainer": _weak(trainer)},
            getattr(args, "output_dir", None),
            no_evaluation=facts.no_evaluation(args, trainer, kwargs.get("eval_dataloader")),
            no_stop_save='save_strategy is "no"' if facts.word(args.save_strategy) == "no" else None,
            nan_filter=facts.nan_filter(args),
            evaluation_counter=facts.evaluation_counter(state, trainer, kwargs.get("lr_scheduler")),
        )
        self._own_code = facts.saves_by_own_code(trainer)
        self._saved_at = state.global_step  # where it was resumed from, if it was
        self._period = facts.save_period(args, state, control)
        if self._controller is not None:
            tell_resumed(facts.changed_settings(state), self._run)
            self._known_changes = self._run.settings.changed
        if self._controller is not None and facts.is_forgather(control):
            self._faults = facts.SaveFaults()
            self._faults.attach()
        return control

    def _own_settings(self, run: Controller) -> Iterable[Setting]:
        return TrainerSettings(self._objects, run.state.progress, self._saves_after).settings()

    def _saves_after(self, steps: int | None) -> None:
        self._period = steps

    def _close(self, reason: str | None = None, fault: str | None = None) -> None:
        if self._faults is not None:
            self._faults.detach()
            self._faults = None
        super()._close(reason, fault)

    @controlled
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that evaluation and saving are finished."""
        self._run.phase = states.STATUS_TRAINING
        self._finish_evaluation(state)
        self._evaluation.settle(state)
        if self._late:  # the scheduled save did not happen
            self._apply(state)

    @controlled
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Apply the pending commands and set the flags that they need."""
        run, step = self._run, state.global_step
        if step == run.last_step:
            return None
        self._late = self._period is not None and step - self._saved_at >= self._period
        finish = run.beat if self._late else run.step
        finish(step, state.epoch)
        if run.settings.changed is not self._known_changes:
            self._known_changes = run.settings.changed
            facts.note_changes(state, self._known_changes)
        self._steer(args, state, control)
        if control.should_evaluate or control.should_save or self._late:
            run.phase = states.STATUS_EVALUATING if control.should_evaluate else states.STATUS_SAVING
        return self._locked_control

    @controlled
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Set the flags again: the last chance of a run, and of its last step."""
        self._finish_evaluation(state)
        self._steer(args, state, control)
        if self._forced_at == state.global_step and not self._requested.save:
            self._not_twice(args, state, control)
        self._evaluation.settle(state)
        return self._locked_control

    @controlled
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep what is logged. Ranks may log alone: this involves no other rank."""
        if logs:
            self._run.log(logs)

    @controlled
    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the trainer evaluates, and has done one more batch."""
        self._run.phase = states.STATUS_EVALUATING
        self._run.state.evaluate_batch(lambda: facts.batches(kwargs.get("eval_dataloader")))

    @controlled
    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Note that evaluation is finished; set the flag of a requested save, which it may have cleared."""
        self._evaluated_at = state.global_step
        requested = self._requested
        hide_best = requested.evaluate and not (requested.counted or requested.save)
        self._evaluation.evaluated(args, state, metrics or {}, hide_best)
        if requested.save:
            control.should_save = True
        self._run.phase = states.STATUS_SAVING if control.should_save else states.STATUS_TRAINING

    @controlled
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a complete checkpoint, requested or scheduled."""
        self._run.phase = states.STATUS_TRAINING
        self._saved_at = state.global_step
        late, evaluated = self._late, self._evaluated_at == state.global_step
        fault = None if self._faults is None else self._faults.take()
        if late:
            self._apply(state)
        # A scheduled save without an evaluation does not count for a command that came with it and wants one.
        counts = evaluated or not late or self._requested.evaluate_first is not True
        if counts:
            self._requested.saved()
            self._asked_to_save = False
        if late and (self._requested.stop or self._requested.abort):
            self._end(args, state, control)
        if not counts:
            return
        path = facts.checkpoint_path(args.output_dir, state, control)
        look = functools.partial(facts.written, args.output_dir, copy.copy(state), control)
        if fault is not None:
            self._run.fail_save(self._run.begin_save(state.global_step), f"the checkpoint {path} is not whole: {fault}")
        elif self._own_code and self._run.is_main and look()[0] is None:
            save = self._run.begin_save(state.global_step)
            if save.applied:
                background_saves.watch(self._run, save, look, evaluated)
        elif path is None:  # on other ranks, for example, because there is no shared disk
            self._save_missed(f"no directory checkpoint-{state.global_step} was found in {args.output_dir}")
        else:
            self._run.saved(state.global_step, path, evaluated)

    @guarded
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """End the job and give the trainer its own control object back."""
        if self._best is not None:
            state.best_model_checkpoint = self._best
        self._finish_evaluation(state)
        self._evaluation.settle(state)
        self._close()
        return self._own_control

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """A hook that must exist, because Hugging Face calls every hook of every callback."""

    on_init_end = on_epoch_begin = on_pre_optimizer_step = on_optimizer_step = _nothing
    on_substep_end = on_predict = on_push_begin = _nothing

    # Requested actions as flags of the trainer's control object.

    def _apply(self, state: Any) -> None:
        self._late = False
        self._run.step(state.global_step, state.epoch)

    def _steer(self, args: Any, state: Any, control: Any) -> None:
        requested = self._requested
        if requested.stop or requested.abort:
            self._end(args, state, control)
        if requested.abort:
            return
        if requested.save:
            self._save(args, state, control)
        elif requested.evaluate:
            self._evaluation.request(control)
        elif self._owed_evaluation and not self._stopping:
            self._owed_evaluation = False
            control.should_evaluate = True

    def _end(self, args: Any, state: Any, control: Any) -> None:
        requested, is_first, self._stopping = self._requested, not self._stopping, True
        if requested.abort:
            self._abort(state, control)
            return
        control.should_training_stop = True
        saves = facts.word(args.save_strategy) != "no" and self._saved_at != state.global_step
        if is_first and saves and not requested.skip_save:
            requested.request_save()

    def _save(self, args: Any, state: Any, control: Any) -> None:
        control.should_save = True
        if self._asked_to_save:  # the flag was cleared once: now nothing may come between
            if control.should_evaluate and self._evaluated_at != state.global_step:
                self._owed_evaluation = True
            control.should_evaluate = False
        elif self._requested.evaluate or self._evaluates_first(args):
            self._evaluation.request(control)
        self._requested.evaluate_first = False
        self._asked_to_save = True
        self._forced_at = state.global_step

    def _evaluates_first(self, args: Any) -> bool:
        requested = self._requested
        if requested.evaluate_first != "auto":
            return requested.evaluate_first and requested.no_evaluation is None
        matters = getattr(args, "load_best_model_at_end", False) and requested.evaluation_counter is None
        return bool(matters and facts.word(getattr(args, "eval_strategy", "no")) != "no")

    def _finish_evaluation(self, state: Any) -> None:
        """Report the requested evaluation, if it happened at this step: by now on all data sets."""
        if self._requested.evaluate and self._evaluation.metrics:
            self._report_evaluation(state.global_step, self._evaluation.metrics)

    def _not_twice(self, args: Any, state: Any, control: Any) -> None:
        """Do not repeat at the end of an epoch what its last step has just done on request.

        A second evaluation would count against early stopping; a second save would be one too many after a stop.
        """
        saved = self._saved_at == state.global_step
        ends = self._stopping and saved
        if control.should_evaluate and self._evaluated_at == state.global_step:
            control.should_evaluate = False
            self._evaluation.stand_in()
        if ends and facts.word(args.save_strategy) == "best":
            control.should_evaluate = False
        if ends or (saved and not control.should_evaluate):
            control.should_save = False

    def _abort(self, state: Any, control: Any) -> None:
        control.should_training_stop = control.should_epoch_stop = True
        control.should_save = control.should_evaluate = control.should_log = False
        if facts.is_forgather(control):
            control.should_abort_without_save = True
        if self._locked_control is None:
            self._own_control, self._locked_control = control, facts.locked(control)
        # Without a best checkpoint none is loaded at the end, nor any other deleted in its favour.
        if getattr(state, "best_model_checkpoint", None) is not None:
            self._best, state.best_model_checkpoint = state.best_model_checkpoint, None


def _weak(trainer: Any) -> Any:
    """Return a proxy of the trainer, which holds its callbacks: it must not be kept by one."""
    try:
        return weakref.proxy(trainer)
    except TypeError:  # there is none
        return trainer
