"""What commands request of a training loop, as flags that an integration carries out."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Literal

from ..errors import CommandRefused
from .profiler import Profiler
from .settings import Change, Settings

#: When to evaluate before a save, the stronger request last.
_EVALUATE_FIRST: Final = (False, "auto", True)


@dataclass
class RequestedActions:
    """The ``TrainingLoop`` of commands, which documents its methods: it notes what they request of the next steps.

    The integration reads the flags on the training thread, and clears each when it is done.
    """

    no_evaluation: str | None = None  #: why this run cannot evaluate on request; ``None`` if it can
    evaluation_counter: str | None = None  #: what counts evaluations, so that an extra one would change training
    no_stop_save: str | None = None  #: why a stop saves nothing; ``None`` if it does
    nan_filter: str | None = None  #: why the trainer logs no NaN for its loss; ``None`` if it does
    stop: bool = False
    skip_save: bool = False  #: stop without a last checkpoint
    save: bool = False
    evaluate_first: bool | Literal["auto"] = False  #: evaluate before that save; "auto": the integration decides
    evaluate: bool = False
    counted: bool = False  #: the evaluation counts like a scheduled one
    abort: bool = False
    paused: bool = False
    resume_at: float | None = None  #: when a pause ends by itself, in ``time.monotonic()`` seconds
    no_pause: str | None = None  #: why training cannot be paused; ``None`` if it can
    settings: Settings | None = None  #: of a run that is controlled
    profiler: Profiler | None = None  #: as above

    @property
    def any(self) -> bool:
        """Whether a request is left to carry out."""
        return self.stop or self.save or self.evaluate or self.abort

    def request_stop(self) -> None:
        self.stop = True

    def request_save(self, evaluate: Any = "auto") -> None:
        """Of several saves at one step, the one with the strongest ``evaluate`` decides."""
        earlier = self.evaluate_first if self.save else False
        self.save, self.evaluate_first = True, max(earlier, evaluate, key=_EVALUATE_FIRST.index)

    def request_evaluate(self, counted: bool = False) -> None:
        """Raise CommandRefused if this run cannot: ``cannot`` has not checked the command of a signal."""
        why = self.cannot("evaluate", {"counted": counted})
        if why is not None:
            raise CommandRefused(why)
        self.evaluate, self.counted = True, self.counted or counted

    def request_end(self) -> None:
        self.stop = self.skip_save = True

    def request_abort(self) -> None:
        self.abort = True

    @property
    def holds(self) -> bool:
        """Whether training is paused, and has nothing to carry out that needs the loop."""
        return self.paused and not self.any

    def request_pause(self, seconds: float | None = None) -> None:
        """Raise CommandRefused if this run cannot: ``cannot`` has not checked the command of a signal."""
        if self.no_pause is not None:
            raise CommandRefused(self.no_pause)
        self.paused, self.resume_at = True, None if seconds is None else time.monotonic() + seconds

    def request_resume(self) -> None:
        self.paused, self.resume_at = False, None

    def request_profile(self, steps: int) -> Future[Any]:
        assert self.profiler is not None
        return self.profiler.start(steps)

    def close(self) -> None:
        """Give commands that report later their results, because training ends."""
        if self.settings is not None:
            self.settings.read_back()
        if self.profiler is not None:
            self.profiler.end(not self.abort)

    def change_settings(self, changes: dict[str, Any]) -> Change:
        assert self.settings is not None
        return self.settings.change(changes)

    def saved(self) -> None:
        """Clear the request of a save, because it is done or has failed."""
        self.save = self.evaluate_first = False

    def evaluated(self) -> None:
        """Clear the request of an evaluation, because it is done or has failed."""
        self.evaluate = self.counted = self.evaluate_first = False

    def cannot(self, need: str, params: dict[str, Any]) -> str | None:
        if need == "profile" and self.profiler is not None:
            return self.profiler.obstacle()
        if need == "pause":
            return self.no_pause
        if need == "settings" and self.settings is not None:
            return self.settings.cannot(params["changes"])
        evaluates = need == "evaluate" or (need == "save" and params.get("evaluate") is True)
        if evaluates and self.no_evaluation is not None:
            return self.no_evaluation
        if need == "evaluate" and self.evaluation_counter is not None and not params.get("counted"):
            return f"{self.evaluation_counter} counts evaluations; use counted to have it count one more"
        return None
