"""An evaluation that a Hugging Face trainer makes on request, at a step at which none is scheduled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import random_state


class ExtraEvaluation:
    """Has the trainer evaluate without a trace in training. All of it runs on the training thread."""

    def __init__(self) -> None:
        # Set the random states of before the evaluation, and of after it.
        self._restore_random: Callable[[], None] | None = None
        self._evaluated_random: Callable[[], None] | None = None

    def request(self, control: Any) -> None:
        """Set the trainer's flag. Does nothing where an evaluation is scheduled: that leaves its traces."""
        if not control.should_evaluate:
            control.should_evaluate = True
            self._restore_random = random_state.capture()

    def evaluated(self) -> None:
        """Restore the random states, after each of the data sets that the trainer evaluates on."""
        if self._restore_random is not None:
            self._evaluated_random = random_state.capture()
            self._restore_random()

    def stand_in(self) -> None:
        """Leave the traces after all, because this evaluation replaces the one that is scheduled at this step."""
        if self._evaluated_random is not None:
            self._evaluated_random()

    def settle(self) -> None:
        """Forget the evaluation, because it is finished or did not happen."""
        self._restore_random = self._evaluated_random = None
