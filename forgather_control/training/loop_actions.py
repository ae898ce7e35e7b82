"""What commands request of a training loop, as flags that an integration carries out."""

from __future__ import annotations

from typing import Any, Final, Literal

from ..errors import CommandRefused

#: When to evaluate before a save, the stronger request last.
_EVALUATE_FIRST: Final = (False, "auto", True)


class RequestedActions:
    """The ``TrainingLoop`` of commands: it notes what they request of the next steps.

    The integration reads the flags on the training thread, and clears each when it is done.

    Attributes:
        stop: end training.
        skip_save: end it without a last checkpoint.
        save: save a checkpoint.
        evaluate_first: whether to evaluate before that save; "auto" leaves it to the integration.
        evaluate: evaluate, and report the metrics.
        counted: the evaluation counts like a scheduled one.
        abort: end training without saving anything.

    Args:
        no_evaluation: why this run cannot evaluate on request; ``None`` if it can.
        evaluation_counter: what counts evaluations in this run, so that an extra one would change training.
    """

    def __init__(self, no_evaluation: str | None = None, evaluation_counter: str | None = None) -> None:
        self.stop = False
        self.skip_save = False
        self.save = False
        self.evaluate_first: bool | Literal["auto"] = False
        self.evaluate = self.counted = False
        self.abort = False
        self.no_evaluation, self.evaluation_counter = no_evaluation, evaluation_counter

    @property
    def any(self) -> bool:
        """Whether a request is left to carry out."""
        return self.stop or self.save or self.evaluate or self.abort

    def request_stop(self) -> None:
        """See ``builtin.TrainingLoop``."""
        self.stop = True

    def request_save(self, evaluate: Any = "auto") -> None:
        """See ``builtin.TrainingLoop``. Of several saves at one step, one that evaluates decides."""
        earlier = self.evaluate_first if self.save else False
        self.save, self.evaluate_first = True, max(earlier, evaluate, key=_EVALUATE_FIRST.index)

    def request_evaluate(self, counted: bool = False) -> None:
        """See ``builtin.TrainingLoop``.

        Raises:
            CommandRefused: this run cannot; the command is a signal's, which is not checked before.
        """
        why = self.cannot("evaluate", {"counted": counted})
        if why is not None:
            raise CommandRefused(why)
        self.evaluate, self.counted = True, self.counted or counted

    def request_end(self) -> None:
        """See ``builtin.TrainingLoop``."""
        self.stop = self.skip_save = True

    def request_abort(self) -> None:
        """See ``builtin.TrainingLoop``."""
        self.abort = True

    def saved(self) -> None:
        """Clear the request of a save, because it is done or has failed."""
        self.save = self.evaluate_first = False

    def evaluated(self) -> None:
        """Clear the request of an evaluation, because it is done or has failed."""
        self.evaluate = self.counted = self.evaluate_first = False

    def cannot(self, need: str, params: dict[str, Any]) -> str | None:
        """See ``builtin.TrainingLoop``."""
        if need == "evaluate" or (need == "save" and params.get("evaluate") is True):
            if self.no_evaluation is not None:
                return self.no_evaluation
        if need == "evaluate" and self.evaluation_counter is not None and not params.get("counted"):
            return f"{self.evaluation_counter} counts evaluations; use counted to have it count one more"
        return None
