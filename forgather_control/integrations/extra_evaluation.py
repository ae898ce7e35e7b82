"""An evaluation that a Hugging Face trainer makes on request, at a step at which none is scheduled."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from . import random_state
from .huggingface_trainer import word

#: What the trainer's state holds about its best evaluation.
_BEST: Final = ("best_metric", "best_global_step", "best_model_checkpoint")


class ExtraEvaluation:
    """Has the trainer evaluate without a trace in training. All of it runs on the training thread.

    Attributes:
        metrics: of the evaluations since ``settle``, scheduled ones, too.
    """

    def __init__(self) -> None:
        # Set the random states of before the evaluation, and of after it.
        self._restore_random: Callable[[], None] | None = None
        self._evaluated_random: Callable[[], None] | None = None
        self._best: dict[str, Any] | None = None
        self.metrics: dict[str, Any] = {}

    def request(self, control: Any) -> None:
        """Set the trainer's flag. Does nothing where an evaluation is scheduled: that leaves its traces."""
        if not control.should_evaluate:
            control.should_evaluate = True
            self._restore_random = random_state.capture()

    def evaluated(self, args: Any, state: Any, metrics: Mapping[str, Any], hide_best: bool) -> None:
        """Restore the random states, after each of the data sets that the trainer evaluates on.

        Args:
            hide_best: this evaluation must not become the best one, as no checkpoint is saved for it.
        """
        self.metrics.update(metrics)
        if self._restore_random is None:
            return
        self._evaluated_random = random_state.capture()
        self._restore_random()
        if hide_best and self._best is None:
            self._best = {name: getattr(state, name) for name in _BEST if hasattr(state, name)}
            if word(args.save_strategy) == "best":  # a new best metric would be saved
                state.best_metric = math.inf if args.greater_is_better else -math.inf

    def stand_in(self) -> None:
        """Leave the traces after all, because this evaluation replaces the one that is scheduled at this step."""
        if self._evaluated_random is not None:
            self._evaluated_random()

    def settle(self, state: Any) -> None:
        """Forget the evaluation, because it is finished or did not happen."""
        for name, value in (self._best or {}).items():
            setattr(state, name, value)
        self._restore_random = self._evaluated_random = self._best = None
        self.metrics = {}
