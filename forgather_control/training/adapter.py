"""What all integrations share: a boundary around each hook, and one controller for each training run.

All of it runs on the training thread.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar, cast

from ..errors import ControlError
from . import metrics, own_commands, run_log
from .controller import Controller
from .loop_actions import RequestedActions
from .options import ControlOptions
from .profiler import Profiler
from .rule import declared as declared_rules
from .setting import Setting, declared
from .signals import Signals

log = logging.getLogger("forgather_control")

Hook = TypeVar("Hook", bound=Callable[..., Any])

FORKED: Final = (
    "Control is off in this process (pid %d): it was forked from pid %d, which started the run and keeps its control. "
    "Training continues. To control this process, fork first and start the run after it."
)


def guarded(method: Hook) -> Hook:
    """Catch what a hook raises: control is switched off with one log entry, and training continues."""

    @functools.wraps(method)
    def call(self: Adapter, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as err:  # boundary: nothing raises into the training loop
            return _switch_off(self, err)

    return cast(Hook, call)


def controlled(method: Hook) -> Hook:
    """Make a guarded hook that does nothing unless a run is open. In one wrapper, as some are called at each step."""

    @functools.wraps(method)
    def call(self: Adapter, /, *args: Any, **kwargs: Any) -> Any:
        try:
            run = self._controller
            if run is None or (run.closed and not self._is_open()):
                return None
            return method(self, *args, **kwargs)
        except Exception as err:  # boundary: as above
            return _switch_off(self, err)

    return cast(Hook, call)


def _switch_off(adapter: Adapter, err: Exception) -> None:
    if isinstance(err, ControlError):
        log.warning("Control is off for this run: %s. Training continues.", err)
        why = str(err)
    else:
        log.error("Control is off for this run because of an error in it. Training continues.", exc_info=err)
        why = "control failed in the job"
    try:
        adapter._close(why, "control failed there, and training continues")
    except Exception:  # boundary: the last one
        log.exception("The control server could not be closed.")


class Adapter:
    """Base of the integrations: opens and closes the controller of one training run after the other.

    All arguments are :class:`~forgather_control.training.options.ControlOptions`, which documents and checks them.
    """

    def __init__(
        self,
        job_id: str | None = None,
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
        options = ControlOptions(
            *(job_id, port, host, enabled, poll_steps, signals, fresh_seconds, certfile, keyfile, close_timeout),
            *(commands, settings, rules, quiet),
        )
        self._options, self._signals = options, Signals(signals or {})
        self._declared, self._rules = declared(settings or ()), declared_rules(rules or ())
        self._controller: Controller | None = None
        #: The trainer's objects by name ("model", "optimizer", ...), while a run is open.
        self._objects: dict[str, Any] = {}
        self._requested = RequestedActions()
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which controls nothing: a run has one controller, with threads and sockets."""
        copied = dataclasses.replace(self._requested, settings=None, profiler=None)
        return {**self.__dict__, "_controller": None, "_finalizer": None, "_objects": {}, "_requested": copied}

    @property
    def job_id(self) -> str | None:
        """The job's id while it runs, otherwise the one that the options name."""
        return self._options.job_id if self._controller is None else self._controller.job_id

    @property
    def aborted(self) -> bool:
        """Whether this run was aborted, so that a script can skip what it saves at its end."""
        return self._requested.abort

    def _reset(self) -> None:
        """Set what belongs to one run, before each run and at first."""

    def _is_open(self) -> bool:
        """Return whether a run is open; end one here whose control has ended on the server thread, or by a fork."""
        run = self._controller
        if run is not None and run.closed:
            if run.pid != os.getpid():
                log.warning(FORKED, os.getpid(), run.pid)
            self._close()
        return self._controller is not None

    @property
    def _run(self) -> Controller:
        """The controller of the open run, for ``controlled`` hooks."""
        assert self._controller is not None
        return self._controller

    @guarded
    def _open(
        self,
        step: int,
        max_steps: int | None,
        log_steps: int | None = None,
        objects: Mapping[str, Any] | None = None,
        output_dir: Any = None,
        **facts: Any,
    ) -> None:
        """Start a run. If it cannot be controlled, ``guarded`` logs one warning and lets it train.

        Args:
            objects: the trainer's, by name, for settings and the script's own commands.
            output_dir: where the trainer writes; profiles go there. ``None``: the working directory.
            facts: see ``RequestedActions``.
        """
        self._close("training was started again")
        self._reset()
        self._requested = RequestedActions(**facts)
        if not self._options.enabled:
            return
        self._objects = dict(objects or {})
        controller = Controller(self._options, self._requested, step, max_steps, log_steps)
        for own in self._own_commands():
            self._add(own, controller)
        self._add_settings(controller)
        folder = os.path.abspath(os.fspath(output_dir or "."))
        self._requested.profiler = Profiler(controller.on_step, controller.state, folder, lambda: controller.rank)
        controller.start()
        self._controller = controller
        if controller.is_main:
            controller.rules.declare(self._rules, controller.methods)
        try:
            self._signals.install(controller.request)
        except ControlError as err:
            log.warning("%s", err)
        # Also runs at the interpreter's exit, so that clients of a job that died of an exception are answered.
        self._finalizer: Any = weakref.finalize(self, controller.orphan, "training ended by an exception")
        if controller.is_main:
            run_log.start(controller.job_id, self._options.quiet)

    def _own_commands(self) -> list[own_commands.OwnCommand]:
        """Return the script's own commands that are known when a run starts."""
        return own_commands.parse_all(self._options.commands or ())

    def _add(self, own: own_commands.OwnCommand, run: Controller) -> None:
        """Add a command to a run. The server keeps it, so it must not keep this object: see the finalizer."""
        mine = weakref.ref(self)

        def context() -> own_commands.Context:
            found = mine()
            return own_commands.Context({**(found._objects if found else {}), "step": run.last_step})

        run.methods.add(own.method(context, lambda: run.is_main))

    def _add_settings(self, run: Controller) -> None:
        """Declare the settings of the script, and those of the trainer that they do not replace."""
        declared = {setting.name for setting in self._declared}
        try:
            own = [setting for setting in self._own_settings(run) if setting.name not in declared]
        except Exception as err:  # boundary: objects of a trainer that are unlike those we know
            log.warning(
                "The settings of this trainer cannot be changed: %s: %s", type(err).__name__, err, exc_info=True
            )
            own = []
        run.settings.add([*own, *self._declared])

    def _own_settings(self, run: Controller) -> Iterable[Setting]:
        """Return the settings of this trainer. On the training thread, before the run starts."""
        return ()

    def _report_evaluation(self, step: int, found: Mapping[str, Any]) -> None:
        """Report an evaluation with its metrics, which may be tensors: they are read only if a command waits for it."""
        wanted = self._requested.evaluate
        self._requested.evaluated()
        if wanted and self._controller is not None:
            self._controller.evaluated(step, metrics.plain(metrics.merge({}, metrics.hold(found))))

    def _save_missed(self, reason: str) -> None:
        """Report that this rank wrote no checkpoint, which often only rank 0 does."""
        if self._run.is_main:
            self._run.save_failed(reason)
        else:
            self._run.nothing_to_save()

    def _close(self, reason: str | None = None, fault: str | None = None) -> None:
        """End the run, if one is open; see ``Controller.close``."""
        self._signals.restore()
        controller, self._controller = self._controller, None
        self._objects = {}
        if controller is not None:
            self._finalizer.detach()
            controller.close(reason, fault)
