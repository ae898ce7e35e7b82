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
for until ``on_save``, and is asked for again at the next chance, then without an evaluation. The same
two may set it after an abort has cleared it; so an abort seals the flags.

Forgather's trainer keeps its schedule to itself: at a step that is due it saves, whatever the flags
say. There commands are applied after that save, in ``on_save``, and it counts as theirs. At the end
of its data it calls ``on_step_end`` once more, without a step, and saves nothing after it.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Mapping
from typing import Any

from .. import states
from ..training.adapter import Adapter, guarded
from ..training.options import ControlOptions


class TrainerControlCallback(Adapter):
    """Callback that makes a training run controllable: ``Trainer(..., callbacks=[TrainerControlCallback()])``.

    For ``transformers.Trainer`` and for Forgather's trainers, there in a template::

        trainer_control: !singleton:forgather_control:TrainerControlCallback

    All arguments are :class:`~forgather_control.training.options.ControlOptions`, which documents and checks them.
    After that no hook raises into the trainer. All hooks run on the training thread.
    """

    #: Forgather names the callback that stopped its training.
    name = "TrainerControlCallback"

    def __init__(
        self,
        job_id: str | None = None,
        port: int | str | None = None,
        host: str = "127.0.0.1",
        enabled: bool = True,
        poll_steps: int | None = None,
        *,
        signals: Mapping[Any, str] | None = None,
        fresh_seconds: float = 0.0,
        certfile: str | None = None,
        keyfile: str | None = None,
    ) -> None:
        options = ControlOptions(job_id, port, host, enabled, poll_steps, signals, fresh_seconds, certfile, keyfile)
        super().__init__(options)
        self._begin()

    def _begin(self) -> None:
        self._stopping = False
        self._asked_to_save = False
        self._owed_evaluation = False
        self._late = False  # commands of this step are applied after its own save
        self._period: int | None = None  # steps after which the trainer saves, whatever its flags say
        # The steps of the last evaluation, of the last save, and of what was last done at our wish.
        self._evaluated_at: int | None = None
        self._saved_at = 0
        self._forced_at: int | None = None
        self._best: str | None = None

    # The hooks...

    @guarded
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Publish the job."""
        _unseal(control)  # still sealed where the last run was aborted, and then died of an exception
        if self._stopping or self._requested.abort:  # Forgather's control is made once, and its flags stay
            control.should_training_stop = False
            _set_abort(control, False)
        self._begin()
        self._saved_at = state.global_step  # where it was resumed from, if it was
        self._period = _period(args, state, control)
        self._open(state.global_step, state.max_steps, _log_steps(args, state))

    @guarded
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins, so evaluation and saving are over."""
        if self._controller is None:
            return
        self._controller.phase = states.STATUS_TRAINING
        if self._late:  # the save that was to come first did not come
            self._apply(state)

    @guarded
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Apply what is pending; carry out what is wished."""
        controller = self._controller
        if controller is None or state.global_step == controller.last_step:
            return
        self._late = self._period is not None and state.global_step - self._saved_at >= self._period
        if self._late:
            controller.beat(state.global_step, state.epoch)
        else:
            self._apply(state)
        if self._requested.any or self._owed_evaluation:
            self._steer(args, state, control)
        if control.should_evaluate or control.should_save or self._late:
            controller.phase = states.STATUS_EVALUATING if control.should_evaluate else states.STATUS_SAVING

    @guarded
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last chance of a run, and of its last step."""
        if self._controller is None:
            return
        if self._requested.any or self._owed_evaluation:
            self._steer(args, state, control)
        if self._forced_at == state.global_step:
            self._not_twice(args, state, control)

    @guarded
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep what is logged; a rank that logs alone does no harm, as nothing is asked of the others."""
        if self._controller is not None and logs:
            self._controller.log(logs)

    @guarded
    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation goes on."""
        if self._controller is not None:
            self._controller.phase = states.STATUS_EVALUATING

    @guarded
    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation is over; saving may follow."""
        if self._controller is None:
            return
        self._evaluated_at = state.global_step
        if self._requested.save:
            control.should_save = True
        self._controller.phase = states.STATUS_SAVING if control.should_save else states.STATUS_TRAINING

    @guarded
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint is complete, whoever wanted it."""
        if self._controller is None:
            return
        self._controller.phase = states.STATUS_TRAINING
        self._saved_at = state.global_step
        late = self._late
        if late:
            self._apply(state)
        self._requested.save = self._requested.evaluate = self._asked_to_save = False
        if late and self._requested.any:
            self._steer(args, state, control)
        path = checkpoint_path(args.output_dir, state.global_step, _place(state, control))
        if path is None and not self._controller.is_main:  # of another host, say, without the same disk
            self._controller.saves_nothing()
        elif path is None:
            self._controller.save_failed(f"no directory checkpoint-{state.global_step} was found in {args.output_dir}")
        else:
            self._controller.saved(state.global_step, path)

    @guarded
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the job away."""
        _unseal(control)
        if self._best is not None:
            state.best_model_checkpoint = self._best
        self._close()

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        """A hook that must exist, because Hugging Face calls it without looking."""

    on_init_end = on_epoch_begin = on_pre_optimizer_step = on_optimizer_step = _nothing
    on_substep_end = on_predict = on_push_begin = _nothing

    # What is wished, as flags of the trainer's control object...

    def _apply(self, state: Any) -> None:
        self._late = False
        if self._controller is not None:
            self._controller.step(state.global_step, self._requested, state.epoch)

    def _steer(self, args: Any, state: Any, control: Any) -> None:
        requested = self._requested
        if requested.abort:
            self._stopping = True
            self._abort(state, control)
            return
        if requested.stop:
            control.should_training_stop = True
            if (
                not self._stopping
                and not requested.skip_save
                and _word(args.save_strategy) != "no"
                and self._saved_at != state.global_step
            ):
                requested.save = requested.evaluate = True
            self._stopping = True
        if requested.save:
            self._save(args, state, control)
        elif self._owed_evaluation and not self._stopping:
            self._owed_evaluation = False
            control.should_evaluate = True

    def _save(self, args: Any, state: Any, control: Any) -> None:
        control.should_save = True
        if self._asked_to_save:  # it was taken back once: now nothing may come between
            if control.should_evaluate and self._evaluated_at != state.global_step:
                self._owed_evaluation = True
            control.should_evaluate = False
        elif self._requested.evaluate and _evaluates_for_best(args):
            control.should_evaluate = True
        self._requested.evaluate = False
        self._asked_to_save = True
        self._forced_at = state.global_step

    def _not_twice(self, args: Any, state: Any, control: Any) -> None:
        """The end of an epoch repeats what its last step has just done at our wish.

        A second evaluation without a step between would count against early stopping; a second save
        would be one too many at the step where training was stopped.
        """
        saved = self._saved_at == state.global_step
        ends = self._stopping and saved
        if self._evaluated_at == state.global_step or (ends and _word(args.save_strategy) == "best"):
            control.should_evaluate = False
        if ends or (saved and not control.should_evaluate):
            control.should_save = False

    def _abort(self, state: Any, control: Any) -> None:
        control.should_training_stop = control.should_epoch_stop = True
        control.should_save = control.should_evaluate = control.should_log = False
        _set_abort(control, True)
        _seal(control)
        # Without a best checkpoint none is loaded at the end, nor any other deleted in its favour.
        best = getattr(state, "best_model_checkpoint", None)
        if best is not None:
            self._best, state.best_model_checkpoint = best, None


def checkpoint_path(output_dir: str, step: int, place: str = "") -> str | None:
    """The directory of the checkpoint that was saved at ``step``, absolute; ``None`` if there is none.

    Args:
        place: where below ``output_dir`` this trainer saves, ``"*"`` for some directory in it. If it
            did not, the newest directory of that name is the one.
    """
    name = f"checkpoint-{step}"
    root = glob.escape(output_dir)
    for pattern in (place, "", "*"):
        found = [path for path in glob.glob(os.path.join(root, pattern, name)) if os.path.isdir(path)]
        if found:
            return os.path.abspath(max(found, key=os.path.getmtime))
    return None


def _place(state: Any, control: Any) -> str:
    """Where below the output directory this trainer puts its checkpoints."""
    if _is_forgather(control):
        return "checkpoints"
    return "*" if getattr(state, "is_hyper_param_search", False) else ""


def _log_steps(args: Any, state: Any) -> int | None:
    """At how many steps the trainer logs; it may be given as a part of all steps."""
    steps = getattr(args, "logging_steps", None)
    if not isinstance(steps, (int, float)) or steps <= 0:
        return None
    return max(1, int(steps * state.max_steps if steps < 1 else steps))


def _evaluates_for_best(args: Any) -> bool:
    """Whether a save is preceded by an evaluation; where there is no strategy, there may be no data either."""
    strategy = _word(getattr(args, "eval_strategy", "no"))
    return bool(getattr(args, "load_best_model_at_end", False)) and strategy != "no"


def _period(args: Any, state: Any, control: Any) -> int | None:
    """How many steps after its last save Forgather's trainer saves again, by a schedule that asks no flag."""
    if not _is_forgather(control):
        return None
    steps = {"steps": args.save_steps, "epoch": getattr(state, "epoch_train_steps", None)}
    period = steps.get(_word(args.save_strategy))
    return None if period is None else max(1, int(period))


def _is_forgather(control: Any) -> bool:
    return hasattr(control, "should_abort_without_save")


def _set_abort(control: Any, value: bool) -> None:
    if _is_forgather(control):
        control.should_abort_without_save = value


def _seal(control: Any) -> None:
    """From here on the flags stay as they are, whoever sets them: in vain is quieter than an error."""
    kind = type(control)
    if not hasattr(kind, "_unsealed"):
        members = {"__slots__": (), "__setattr__": lambda *ignored: None, "_unsealed": kind}
        with contextlib.suppress(TypeError):  # a kind that cannot be sealed: its flags are set all the same
            control.__class__ = type(kind.__name__, (kind,), members)


def _unseal(control: Any) -> None:
    kind = getattr(type(control), "_unsealed", None)
    if kind is not None:
        object.__setattr__(control, "__class__", kind)


def _word(strategy: Any) -> str:
    """``"steps"``, whether the strategy is a string or an enum of strings."""
    return str(getattr(strategy, "value", strategy)).lower()
