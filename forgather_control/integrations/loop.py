"""Control of your own training loop, without a framework: flags to read, and calls that report what was done.

All of it runs on the training thread.
"""

from __future__ import annotations

import functools
import logging
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload

from .. import states
from ..errors import InvalidParams
from ..schema import shown
from ..training import background_saves, own_commands
from ..training.adapter import Adapter, controlled, guarded
from ..training.setting import Setting
from .optimizer_settings import OptimizerSettings

log = logging.getLogger("forgather_control")

Function = TypeVar("Function", bound=Callable[..., Any])


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

    No method raises into the loop, and all of them run on the training thread. With several ranks every rank creates
    its own ``TrainingJob`` after ``init_process_group``, and calls ``step`` for every step. If only rank 0 saves, only
    rank 0 calls ``saved``; if every rank writes a shard, every rank calls it, and the checkpoint counts once all have.

    Args:
        max_steps: the step at which the loop will end, if known, for progress and time left.
        start_step: the steps that are done already, in a loop that was resumed.
        output_dir: where profiles are written, in a directory ``profiles``; ``None``: the working directory.
        save_on_stop: set ``should_save`` with ``should_stop``, so that a stop keeps the work; not after an abort.

    All others are :class:`~forgather_control.training.options.ControlOptions`, which documents and checks them.
    """

    def __init__(
        self,
        job_id: str | None = None,
        max_steps: int | None = None,
        *,
        start_step: int = 0,
        save_on_stop: bool = True,
        output_dir: str | os.PathLike[str] | None = None,
        port: int | str | None = None,
        host: str = "127.0.0.1",
        enabled: bool = True,
        poll_steps: int | None = None,
        signals: Mapping[Any, str] | None = None,
        fresh_seconds: float = 0.0,
        certfile: str | None = None,
        keyfile: str | None = None,
        close_timeout: float = 60.0,
        commands: Sequence[Callable[..., Any]] | None = None,
        settings: Sequence[Any] | Mapping[str, Mapping[str, Any]] | None = None,
        rules: Sequence[Mapping[str, Any]] | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__(
            *(job_id, port, host, enabled, poll_steps, signals, fresh_seconds, certfile, keyfile, close_timeout),
            *(commands, settings, rules, quiet),
        )
        self._max_steps = None if max_steps is None else _whole("max_steps", max_steps)
        self._start_step = _whole("start_step", start_step)
        self._save_on_stop, self._output_dir = save_on_stop, None if output_dir is None else _folder(output_dir)
        self._depth = 0  # of "with" statements around one another
        self._commands = own_commands.parse_all(commands or ())  # of all runs

    def _reset(self) -> None:
        self._run_commands: list[own_commands.OwnCommand] = []  # of this run
        self._steps = 0
        # Whether the loop has read should_save since it was set, and should_evaluate; whether it ever read the latter.
        self._saw_save = self._saw_evaluate = self._can_evaluate = False
        self._evaluated_at: int | None = None
        self._warned = False  # of a wrong argument

    def __enter__(self) -> TrainingJob:
        self._depth += 1
        if self._depth == 1:
            why = None if self._save_on_stop else "this loop has save_on_stop=False"
            self._open(self._start_step, self._max_steps, output_dir=self._output_dir, no_stop_save=why)
            if self._controller is not None and self._run.is_main and (self._max_steps or 0) < 0:
                log.warning("Ignored max_steps=%d, which is negative: progress is unknown.", self._max_steps)
        return self

    @overload
    def command(self, function: Function, /) -> Function: ...

    @overload
    def command(self, /, *, name: str) -> Callable[[Function], Function]: ...

    def command(self, function: Any = None, /, *, name: str | None = None) -> Any:
        """Let clients run a function, as ``user.NAME``. A decorator, to be used on every rank before the first step.

        The function runs on every rank at the end of one step; its value on rank 0 is the command's result. Its
        parameters are int, float, str, bool, Literal, lists of them, with ``| None`` or not; a first parameter called
        ``context`` gets what is known of the run. One that is registered inside the with statement belongs to that run.

        Raises:
            InvalidParams: the function cannot be a command; not after the first step, where nothing is raised.
        """
        if function is None:
            return functools.partial(self._register, name=name)
        return self._register(function, name)

    def _register(self, function: Any, name: str | None) -> Any:
        if self._depth and self._steps:
            log.warning("Ignored the command %s: commands are fixed at the first step.", ascii(function)[:80])
            return function
        known = [*self._commands, *self._run_commands]
        own = own_commands.unique(own_commands.parse(function, name), known)
        (self._run_commands if self._depth else self._commands).append(own)
        if self._controller is not None:
            self._add(own, self._controller)
        return function

    def _own_commands(self) -> list[own_commands.OwnCommand]:
        return self._commands

    @guarded
    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._close(None if error is None else f"training ended by {type(error).__name__}")

    @guarded
    def step(self, step: int, epoch: float | None = None) -> None:
        """Report a finished step (from 1) and the passes over the data, and apply commands. Every rank, every step."""
        self._steps += 1
        if not self._is_open():
            if self._steps == 1 and self._depth == 0 and self._options.enabled:
                log.warning(
                    "Control is off for this loop: it calls step() outside the job's with statement. Training "
                    "continues. Put the loop into: with TrainingJob(...) as job:"
                )
            return
        run, requested = self._run, self._requested
        # Otherwise a loop that saves without a report would save at every step from here on.
        if self._saw_save or (requested.save and not run.is_main):
            requested.saved()
            self._saw_save = False
            self._save_missed("the loop saw should_save and did not call saved() before its next step")
        if self._saw_evaluate or (requested.evaluate and not run.is_main):
            self._evaluation_missed()
        if self._steps > 1 and not self._can_evaluate and run.is_main:  # often only rank 0 evaluates
            requested.no_evaluation = "this loop does not read job.should_evaluate"
        run.phase = states.STATUS_TRAINING
        # A NumPy number, for example, cannot be written as JSON.
        stopping = requested.stop
        run.step(_whole("step", step), epoch if epoch is None else float(epoch))
        if requested.stop and not stopping and self._save_on_stop and not requested.skip_save:
            requested.save = True

    @guarded
    def setting(
        self,
        name: str,
        get: Callable[[], Any],
        set: Callable[[Any], Any],
        minimum: float | None = None,
        maximum: float | None = None,
        type: Any = None,
        doc: str = "",
    ) -> None:
        """Declare a value that clients can change, on every rank before its first step; see ``Setting``."""
        self._declare("setting", lambda: [Setting(name, get, set, minimum, maximum, type, doc)])

    @guarded
    def optimizer(self, optimizer: Any, scheduler: Any = None) -> None:
        """Let clients change ``learning_rate`` and ``weight_decay``. On every rank, before its first step.

        Args:
            optimizer: one of torch, or a sequence of them, whose rates are multiplied by the same factor.
            scheduler: what steps its rates, or a sequence; ``None`` if nothing does.
        """
        self._declare("optimizer", OptimizerSettings(lambda: optimizer, lambda: scheduler).settings)
        if self._is_open():
            self._objects.update(optimizer=optimizer, lr_scheduler=scheduler)

    def _declare(self, what: str, make: Callable[[], list[Setting]]) -> None:
        try:
            for setting in make():
                if self._is_open():
                    self._run.settings.add([setting])
                elif any(known.name == setting.name for known in self._declared):
                    raise InvalidParams(f"the setting {setting.name} is declared twice")
                else:
                    self._declared.append(setting)
        except InvalidParams as err:
            log.warning("Ignored the %s: %s", what, err)

    @controlled
    def log(self, /, **metrics: Any) -> None:
        """Show values in ``status``. Any rank, at any time; a tensor is not read from its device here."""
        self._run.log(metrics)

    @property
    def should_save(self) -> bool:
        """Whether to save a checkpoint now. Call ``saved(path)`` when it is complete, before the next step."""
        if self._controller is None or self._requested.abort or not self._requested.save:
            return False
        self._controller.phase = states.STATUS_SAVING
        self._saw_save = True
        return True

    @property
    def should_evaluate(self) -> bool:
        """Whether to evaluate now. Call ``evaluated(metrics)`` with the result, before ``saved`` and the next step."""
        self._can_evaluate, self._requested.no_evaluation = True, None
        wanted = self._requested.evaluate or (self._requested.save and self._requested.evaluate_first is True)
        if self._controller is None or self._requested.abort or not wanted:
            return False
        self._controller.phase = states.STATUS_EVALUATING
        self._saw_evaluate = True
        return True

    @property
    def should_stop(self) -> bool:
        """Whether the loop should end now."""
        return self._requested.stop or self._requested.abort

    @controlled
    def evaluated(self, metrics: Mapping[str, Any]) -> None:
        """Report a finished evaluation, requested or not, with its numbers by name."""
        self._run.phase = states.STATUS_TRAINING
        self._saw_evaluate = False
        self._evaluated_at = self._run.last_step
        self._report_evaluation(self._evaluated_at, metrics)

    @controlled
    def saved(self, path: str | os.PathLike[str], step: int | None = None, future: Any = None) -> None:
        """Report a checkpoint, requested or not, by its file or directory.

        It finishes the commands that were applied up to its step; if it does not exist, they fail. A save in the
        background delays neither training nor the next save.

        Args:
            step: the step whose state it contains; ``None``: the last one.
            future: of a save in the background, an object with ``add_done_callback``, such as ``dcp.async_save``
                returns. The checkpoint is complete when that is done; if it fails, so do the commands.
        """
        run, requested, fault = self._run, self._requested, None
        run.phase, at = states.STATUS_TRAINING, run.last_step
        try:
            at = at if step is None else _whole("step", step)
            if future is not None:
                background_saves.check(future)
        except InvalidParams as err:
            fault = f"saved() was called with a wrong argument: {err}"
            log.log(logging.DEBUG if self._warned else logging.WARNING, "%s", fault)
            self._warned = True
        save = run.begin_save(at, at)
        if save.is_enough:
            requested.saved()
            self._saw_save = False
        where, evaluated = _absolute(path), self._evaluated_at == at
        if fault is not None:
            run.fail_save(save, fault)
        elif future is None:
            background_saves.finish(run, save, where, evaluated)
        else:
            background_saves.follow(run, save, where, evaluated, future)

    def _evaluation_missed(self) -> None:
        if self._requested.evaluate and self._run.is_main:
            self._run.evaluation_failed(
                "the loop saw should_evaluate and did not call evaluated() before its next step"
            )
        elif self._requested.evaluate:
            self._report_evaluation(self._run.last_step, {})
        self._requested.evaluated()
        self._saw_evaluate = False


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError as err:
        raise InvalidParams(f"{name} must be a whole number, not {ascii(value)[:80]}", parameter=name) from err


def _folder(path: Any) -> str:
    try:
        return os.fsdecode(path)
    except TypeError as err:
        text = f"output_dir must be a path, not {shown(path)}"
        raise InvalidParams(text, parameter="output_dir") from err


def _absolute(path: Any) -> str:
    try:
        return os.path.abspath(os.fsdecode(path))
    except (TypeError, ValueError):
        return repr(path)[:200]  # which does not exist
