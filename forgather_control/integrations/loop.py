"""Control of your own training loop, without a framework: flags to read, and calls that report what was done.

All of it runs on the training thread.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from typing import Any

from .. import states
from ..errors import InvalidParams
from ..training.adapter import Adapter, guarded
from ..training.options import ControlOptions


class TrainingJob(Adapter):
    """Control of your own training loop::

        with TrainingJob(job_id="my_experiment", max_steps=1000) as job:
            for step in range(1, 1001):
                loss = train_step()
                if step % 10 == 0:
                    job.log(loss=loss)
                job.step(step)
                if job.should_save:
                    job.saved(save(step))
                if job.should_stop:
                    break
        if not job.aborted:
            save_final_model()

    No method raises into the loop, and all of them run on the training thread.

    Args:
        max_steps: the step at which the loop will end, if known, for progress and time left.
        start_step: the steps that are done already, in a loop that was resumed.

    All other arguments are :class:`~forgather_control.training.options.ControlOptions`, which documents and checks
    them.

    With several ranks every rank creates its own ``TrainingJob`` with the same arguments after
    ``init_process_group``, and calls ``step`` for every step. If only rank 0 saves, only rank 0 calls ``saved``;
    if every rank writes a shard, every rank calls it, and the checkpoint counts once all have.
    """

    def __init__(
        self,
        job_id: str | None = None,
        max_steps: int | None = None,
        *,
        start_step: int = 0,
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
        self._max_steps = None if max_steps is None else _whole("max_steps", max_steps)
        self._start_step = _whole("start_step", start_step)
        self._depth = 0  # of "with" statements around one another
        self._steps = 0
        # Whether the loop has read should_save since it was set, and should_evaluate; whether it ever read the latter.
        self._saw_save = self._saw_evaluate = self._can_evaluate = False
        self._evaluated_at: int | None = None

    def __enter__(self) -> TrainingJob:
        self._depth += 1
        if self._depth == 1:
            self._begin()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._end(error)

    @guarded
    def _begin(self) -> None:
        self._steps = 0
        self._open(self._start_step, self._max_steps)

    @guarded
    def _end(self, error: BaseException | None) -> None:
        self._close(None if error is None else f"training ended by {type(error).__name__}")

    @guarded
    def step(self, step: int, epoch: float | None = None) -> None:
        """Report a finished step, and apply commands. Every rank calls it after every optimizer step.

        Args:
            step: its number, counted from 1.
            epoch: how many passes over the data are finished, if known.
        """
        controller = self._controller
        if controller is None:
            return
        if self._saw_save or (self._requested.save and not controller.is_main):
            self._miss_save(controller)
        if self._saw_evaluate or (self._requested.evaluate and not controller.is_main):
            self._miss_evaluation(controller)
        self._steps += 1
        if self._steps > 1 and not self._can_evaluate and controller.is_main:  # often only rank 0 evaluates
            self._requested.no_evaluation = "this loop does not read job.should_evaluate"
        controller.phase = states.STATUS_TRAINING
        if type(step) is not int:  # for example a NumPy number, which JSON has not
            step = _whole("step", step)
        controller.step(step, epoch if epoch is None else float(epoch))

    @guarded
    def log(self, /, **metrics: Any) -> None:
        """Show values in ``status``. Any rank, at any time; a tensor is not read from its device here."""
        if self._controller is not None:
            self._controller.log(metrics)

    @property
    def should_save(self) -> bool:
        """Whether to save a checkpoint now. Call ``saved(path)`` when it is complete, before the next step."""
        wanted = self._requested.save and not self._requested.abort
        if wanted and self._controller is not None:
            self._saw_save = True
            self._controller.phase = states.STATUS_SAVING
        return wanted

    @property
    def should_evaluate(self) -> bool:
        """Whether to evaluate now. Call ``evaluated(metrics)`` with the result, before ``saved`` and the next step."""
        self._can_evaluate, self._requested.no_evaluation = True, None
        requested = self._requested
        wanted = requested.evaluate or (requested.save and requested.evaluate_first is True)
        wanted = wanted and not requested.abort
        if wanted and self._controller is not None:
            self._saw_evaluate = True
            self._controller.phase = states.STATUS_EVALUATING
        return wanted

    @guarded
    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Report a finished evaluation, requested or not.

        Args:
            metrics: numbers by name.
        """
        self._saw_evaluate = False
        if self._controller is not None:
            self._controller.phase = states.STATUS_TRAINING
            self._evaluated_at = self._controller.last_step
            self._report_evaluation(self._evaluated_at, metrics)

    @property
    def should_stop(self) -> bool:
        """Whether the loop should end now."""
        return self._requested.stop or self._requested.abort

    @guarded
    def saved(self, path: str | os.PathLike[str]) -> None:
        """Report a complete checkpoint, requested or not.

        Args:
            path: its file or directory. If it does not exist, the command that requested the checkpoint fails.
        """
        controller = self._controller
        self._requested.saved()
        self._saw_save = False
        if controller is None:
            return
        controller.phase = states.STATUS_TRAINING
        try:
            where = os.path.abspath(os.fsdecode(path))
            exists = os.path.exists(where)
        except (TypeError, ValueError):
            where, exists = repr(path)[:200], False
        if exists:
            controller.saved(controller.last_step, where, self._evaluated_at == controller.last_step)
        else:
            controller.save_failed(f"the loop reported a checkpoint at {where}, but there is none")

    def _miss_save(self, controller: Any) -> None:
        # Otherwise a loop that saves without a report would save at every step from here on.
        self._requested.saved()
        self._saw_save = False
        if not controller.is_main:  # often only rank 0 saves
            controller.nothing_to_save()
            return
        controller.save_failed("the loop saw should_save and did not call saved() before its next step")

    def _miss_evaluation(self, controller: Any) -> None:
        requested = self._requested
        if requested.evaluate and not controller.is_main:
            self._report_evaluation(controller.last_step, {})
        elif requested.evaluate:
            controller.evaluation_failed(
                "the loop saw should_evaluate and did not call evaluated() before its next step"
            )
        requested.evaluated()
        self._saw_evaluate = False


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as err:
        raise InvalidParams(f"{name} must be a whole number, not {ascii(value)[:80]}", parameter=name) from err
