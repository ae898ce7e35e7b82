"""What all adapters share: a border around each hook, one controller a training run, the wishes of commands.

Floor 5, training side: imports errors, offer, ranks, record, signals and controller. Runs on the training thread.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ..errors import ControlError
from .controller import Controller
from .options import ControlOptions
from .signals import Signals

log = logging.getLogger("forgather_control")

Hook = TypeVar("Hook", bound=Callable[..., Any])


def guarded(method: Hook) -> Hook:
    """The border between training and us: whatever goes wrong in the hook is one warning.

    The job is then no longer controllable, every waiting client is told so, and training goes on.
    """

    @functools.wraps(method)
    def call(self: Adapter, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception:  # border: see above
            log.exception("trainer control failed and is off; training goes on")
            self._give_up()
            return None

    return cast(Hook, call)


class RequestedActions:
    """The ``Loop`` that commands see: what they want of the next steps, as flags for an adapter to carry out."""

    def __init__(self) -> None:
        self.stop = False
        self.save = False
        self.evaluate = False
        self.abort = False
        self.skip_save = False  # stop without a last checkpoint

    @property
    def any(self) -> bool:
        """Whether a command has asked for anything that is not done."""
        return self.stop or self.save or self.abort

    def request_stop(self) -> None:
        """See ``builtin.TrainingLoop``."""
        self.stop = True

    def request_save(self, evaluate: Any = "auto") -> None:
        """See ``builtin.TrainingLoop``."""
        self.save, self.evaluate = True, evaluate is not False

    def request_evaluate(self) -> None:
        """See ``builtin.TrainingLoop``."""
        self.evaluate = True

    def cannot(self, need: str, params: dict[str, Any]) -> str | None:
        """See ``builtin.TrainingLoop``."""
        return "this training loop cannot evaluate on request" if need == "evaluate" else None

    def request_end(self) -> None:
        """See ``builtin.TrainingLoop``."""
        self.stop = self.skip_save = True

    def request_abort(self) -> None:
        """See ``builtin.TrainingLoop``."""
        self.abort = True


class Adapter:
    """Opens and closes the controller of one training run after the other.

    Args:
        options: what the user chose.
    """

    def __init__(self, options: ControlOptions) -> None:
        self._options = options
        self._signals = None if options.signals is None else Signals(options.signals)
        self._controller: Controller | None = None
        self._finalizer: Any = None
        self._requested = RequestedActions()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, pickled or deep, controls nothing: a run has one controller, with threads and sockets."""
        return {**self.__dict__, "_controller": None, "_finalizer": None}

    @property
    def job_id(self) -> str | None:
        """The id by which the job can be found, once it can; before that the one that was asked for."""
        return self._options.job_id if self._controller is None else self._controller.job_id

    @property
    def aborted(self) -> bool:
        """Whether an abort was applied in this run, so that a script can skip what it saves at its end."""
        return self._requested.abort

    def _open(self, step: int, max_steps: int | None, log_steps: int | None = None) -> None:
        """Begin a run. A job that cannot be controlled says so once, and trains."""
        self._close("training was started again")
        self._requested = RequestedActions()
        if not self._options.enabled:
            return
        controller = Controller(self._options, step, max_steps, log_steps)
        try:
            controller.start()
        except ControlError as err:
            log.warning("this job is not controllable: %s; training goes on", err)
            return
        self._controller = controller
        self._listen_to_signals(controller)
        # Also runs at the interpreter's exit: no client waits for a job that died of an exception.
        self._finalizer = weakref.finalize(self, controller.orphan, "training ended by an exception")
        if controller.is_main:
            log.info("this job can be controlled: forgather control status %s", controller.job_id)

    def _listen_to_signals(self, controller: Controller) -> None:
        try:
            if self._signals is not None:
                self._signals.install(controller.call)
        except ControlError as err:
            log.warning("%s", err)

    def _close(self, reason: str | None = None, fault: str | None = None) -> None:
        """End the run, if one is open; see ``Controller.close``."""
        if self._signals is not None:
            self._signals.restore()
        controller, self._controller = self._controller, None
        if controller is not None:
            self._finalizer.detach()
            self._finalizer = None
            controller.close(reason, fault)

    def _give_up(self) -> None:
        try:
            self._close("trainer control failed in the job", "control failed there, and training goes on")
        except Exception:  # border: the last one
            log.exception("trainer control could not be closed")
