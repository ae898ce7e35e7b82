"""The settings of Hugging Face's Trainer and of Forgather's trainers.

All of it runs on the training thread. What the trainers read at each step can be changed where they read it: Hugging
Face's in ``state`` and ``args``, Forgather's also in the counters of its loop, which are local variables of it.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from ..errors import InvalidParams
from ..training.progress import Progress
from ..training.setting import Setting
from . import huggingface_trainer as facts
from .optimizer_settings import OptimizerSettings
from .trainer_settings import END_DOC, NORM_DOC, assign, assign_end, note_of_end

_PERIODS: Final = {
    "logging_steps": ("logging_strategy", "periodic_log", "Steps between two logs."),
    "eval_steps": ("eval_strategy", "periodic_eval", "Steps between two evaluations."),
    "save_steps": ("save_strategy", "periodic_save", "Steps between two checkpoints."),
}
_READ_ONCE: Final = "this trainer reads it only when training begins"


class TrainerSettings:
    """The settings of one run.

    Args:
        objects: what the trainer gives its callbacks, by name.
        progress: is told where training ends.
        saves_after: a method of the callback that is told after how many steps Forgather's trainer saves.

    Made in ``on_train_begin``, whose calling frames are searched. It keeps neither the trainer nor the callback alive:
    control of a run ends when its callback is gone.
    """

    def __init__(
        self, objects: Mapping[str, Any], progress: Progress, saves_after: Callable[[int | None], None]
    ) -> None:
        self._args, self._state, self._progress = objects["args"], objects["state"], progress
        self._optimizer, self._scheduler = objects.get("optimizer"), objects.get("lr_scheduler")
        self._trainer, self._saves_after = objects.get("trainer"), weakref.WeakMethod(saves_after)
        self._is_forgather = facts.is_forgather(objects["control"])
        self._counters: dict[str, Any] = {}  # of Forgather's loop
        self._last: float | None = None  # the step to which the loop can go, if that is known
        if self._is_forgather:
            names = [counter for _, counter, _ in _PERIODS.values()]
            if (found := facts.loop_locals("self", *names)) is not None:
                self._trainer, self._last = weakref.proxy(found.pop("self")), math.inf
                self._counters = found
        elif (found := facts.loop_locals("num_train_epochs", "num_update_steps_per_epoch")) is not None:
            epochs, steps = found.values()
            self._last = math.inf if epochs >= sys.maxsize else epochs * steps

    def settings(self) -> Iterator[Setting]:
        """Yield the settings that this trainer has."""
        try:
            yield from OptimizerSettings(lambda: self._optimizer, lambda: self._scheduler).settings()
        except InvalidParams:  # the trainer has no optimizer that we know
            pass
        if hasattr(self._args, "max_grad_norm"):
            yield Setting("max_grad_norm", self._norm, self._set_norm, 0, None, float, NORM_DOC, self._cannot_clip)
        for name, (_, _, doc) in _PERIODS.items():
            if hasattr(self._args, name):
                yield self._period(name, doc)
        end = self._state, "max_steps"
        yield Setting(
            *("max_steps", lambda: getattr(*end), self._set_end, 1, None, int, END_DOC),
            *(self._cannot_end, self._note_of_end),
        )

    # max_grad_norm...

    def _norm(self) -> float:
        return float(self._args.max_grad_norm or 0.0)

    def _set_norm(self, norm: float) -> Callable[[], None]:
        return assign((self._args, "max_grad_norm", norm))

    def _cannot_clip(self, norm: float) -> str | None:
        if getattr(self._trainer, "is_deepspeed_enabled", False):
            return "DeepSpeed clips gradients, as its own configuration says"
        if getattr(self._args, "fuse_optim_with_backward", False):
            return "gradients are used before there is a norm (fuse_optim_with_backward)"
        return None

    # logging_steps, eval_steps, save_steps...

    def _period(self, name: str, doc: str) -> Setting:
        strategy, counter, _ = _PERIODS[name]

        def get() -> int | None:
            steps = getattr(self._state, name, None) or getattr(self._args, name)
            return None if steps is None else int(steps)

        def put(steps: int) -> Callable[[], None]:
            places = [(self._args, name, steps)]
            if hasattr(self._state, name):
                places.append((self._state, name, steps))
            if counter in self._counters:
                places.append((self._counters[counter], "period", steps))
            before, undo = get(), assign(*places)
            self._tell(name, steps)

            def restore() -> None:
                undo()
                self._tell(name, before)

            return restore

        def check(steps: int) -> str | None:
            word = facts.word(getattr(self._args, strategy, "no"))
            if word != "steps":
                return f'{strategy} is "{word}"'
            if self._is_forgather and not self._counters:
                return _READ_ONCE
            return None

        check_all = None if name == "logging_steps" else self._loses_best
        return Setting(name, get, put, 1, None, int, doc, check, check_all=check_all)

    def _tell(self, name: str, steps: int | None) -> None:
        if name == "save_steps" and self._is_forgather and (tell := self._saves_after()) is not None:
            tell(steps)

    def _loses_best(self, values: Mapping[str, Any]) -> str | None:
        """Say why the best model could be one that was not saved."""
        args = self._args
        strategies = {facts.word(getattr(args, strategy, "no")) for strategy in ("eval_strategy", "save_strategy")}
        if not getattr(args, "load_best_model_at_end", False) or strategies != {"steps"}:
            return None
        new = {name: getattr(self._state, name, None) or getattr(args, name) for name in ("eval_steps", "save_steps")}
        new |= {name: steps for name, steps in values.items() if name in new}
        if new["save_steps"] % new["eval_steps"] == 0:
            return None
        return (
            "load_best_model_at_end needs save_steps to be a multiple of eval_steps, unlike "
            f"{new['save_steps']} and {new['eval_steps']}"
        )

    # max_steps...

    def _set_end(self, steps: int) -> Callable[[], None]:
        places: list[tuple[Any, str, Any]] = [(self._state, "max_steps", steps)]
        if (getattr(self._args, "max_steps", -1) or -1) > 0:
            places.append((self._args, "max_steps", steps))
        if self._is_forgather:
            places.append((self._trainer, "max_steps", steps))
        return assign_end(self._progress, self._state.max_steps, steps, *places)

    def _cannot_end(self, steps: int) -> str | None:
        if steps <= self._state.global_step:
            return f"step {self._state.global_step} is finished already; stop ends training now"
        if self._is_forgather and not self._counters:
            return _READ_ONCE
        if steps <= self._state.max_steps:
            return None
        if self._last is None:
            return f"it is not known how far this trainer could go; it can end before step {self._state.max_steps}"
        if steps > self._last:
            return f"the trainer's loop was started for as many epochs as have {self._last} steps, and ends there"
        return None

    def _note_of_end(self) -> str | None:
        return note_of_end([] if self._scheduler is None else [self._scheduler])
