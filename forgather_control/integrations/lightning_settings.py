"""The settings of Lightning's Trainer, known by its attributes only.

All of it runs on the training thread. ``save_steps`` is missing: ModelCheckpoint's period is part of the name under
which its state is saved, so that a checkpoint from after a change would not be its own any more.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

from ..errors import InvalidParams
from ..training.progress import Progress
from ..training.setting import Setting
from . import lightning_trainer
from .optimizer_settings import OptimizerSettings
from .trainer_settings import END_DOC, NORM_DOC, assign, assign_end, note_of_end

_LOG_DOC: Final = "Steps between two logs (log_every_n_steps)."
_EVAL_DOC: Final = "Steps between two validations (val_check_interval, which counts batches)."


class LightningSettings:
    """The settings of one run. It keeps neither the trainer nor the callback alive.

    Args:
        progress: is told where training ends.
    """

    def __init__(self, trainer: Any, module: Any, progress: Progress) -> None:
        self._trainer, self._module, self._progress = weakref.proxy(trainer), weakref.proxy(module), progress

    def settings(self) -> Iterator[Setting]:
        """Yield the settings that this trainer has."""
        try:
            yield from OptimizerSettings(lambda: self._trainer.optimizers, self._schedulers, self._averages).settings()
        except InvalidParams:  # a module without optimizers
            pass
        yield Setting("max_grad_norm", self._norm, self._set_norm, 0, None, float, NORM_DOC, self._cannot_clip)
        yield Setting(
            *("logging_steps", lambda: self._trainer.log_every_n_steps, self._set_log, 1, None, int, _LOG_DOC),
            check=self._cannot_log,
        )
        if self._trainer.enable_validation:
            check = self._cannot_validate
            yield Setting("eval_steps", self._eval_steps, self._set_eval, 1, None, int, _EVAL_DOC, check)
        yield Setting(
            *("max_steps", self._end, self._set_end, 1, None, int, f"{END_DOC[:-1]}; -1 if that is not known."),
            *(self._cannot_end, self._note_of_end),
        )

    def _schedulers(self) -> list[Any]:
        return [config.scheduler for config in self._trainer.lr_scheduler_configs]

    def _averages(self) -> list[Any]:
        """Return the callbacks that keep rates for later: StochasticWeightAveraging."""
        return [each for each in self._trainer.callbacks if hasattr(each, "_swa_lrs")]

    # max_grad_norm...

    def _norm(self) -> float:
        return float(self._trainer.gradient_clip_val or 0.0)

    def _set_norm(self, norm: float) -> Callable[[], None]:
        return assign((self._trainer, "gradient_clip_val", norm))

    def _cannot_clip(self, norm: float) -> str | None:
        trainer, plugin = self._trainer, self._trainer.precision_plugin
        if not self._module.automatic_optimization:
            return "the module optimizes by itself (automatic_optimization is False)"
        if _definer(self._module.__class__, "configure_gradient_clipping") != "LightningModule":
            return "the module clips gradients by itself (configure_gradient_clipping)"
        if "value" in str(trainer.gradient_clip_algorithm).lower():
            return 'gradients are clipped by value (gradient_clip_algorithm="value")'
        if "DeepSpeed" in type(trainer.strategy).__name__:
            return "DeepSpeed clips gradients, as its own configuration says"
        if self._norm():  # it has been clipping so far
            return None
        if _definer(type(plugin), "clip_grad_by_norm") != "Precision":
            return f"{type(plugin).__name__} cannot clip gradients by norm"
        # With a fused optimizer the gradients are still scaled when they would be clipped, and Lightning would raise.
        fused = any(getattr(each, "_step_supports_amp_scaling", False) for each in trainer.optimizers)
        if fused and _definer(type(plugin), "clip_gradients") != "Precision":
            return "gradients of a fused optimizer cannot be clipped with mixed precision"
        return None

    # logging_steps, eval_steps...

    def _set_log(self, steps: int) -> Callable[[], None]:
        return assign((self._trainer, "log_every_n_steps", steps))

    def _cannot_log(self, steps: int) -> str | None:
        return "the trainer is barebones, and logs nothing" if getattr(self._trainer, "barebones", False) else None

    def _batches(self) -> int:
        """Return how many batches a step has."""
        return int(self._trainer.accumulate_grad_batches) if self._module.automatic_optimization else 1

    def _eval_steps(self) -> int | None:
        batches = self._trainer.val_check_batch
        return None if batches is None or batches == math.inf else math.ceil(batches / self._batches())

    def _set_eval(self, steps: int) -> Callable[[], None]:
        batches = steps * self._batches()
        # The second is computed anew from the first where the data are loaded anew.
        return assign((self._trainer, "val_check_interval", batches), (self._trainer, "val_check_batch", batches))

    def _cannot_validate(self, steps: int) -> str | None:
        trainer = self._trainer
        if getattr(trainer, "_val_check_time_interval", None) is not None:
            return "validations are due by time (val_check_interval)"
        if trainer.check_val_every_n_epoch is not None and steps * self._batches() > trainer.num_training_batches:
            size = trainer.num_training_batches
            return f"batches are counted within an epoch, which has {size} (check_val_every_n_epoch is not None)"
        return None

    # max_steps...

    def _end(self) -> int:
        return lightning_trainer.max_steps(self._trainer, self._module) or -1

    def _set_end(self, steps: int) -> Callable[[], None]:
        place = self._trainer.fit_loop.epoch_loop, "max_steps", steps
        return assign_end(self._progress, self._end(), steps, place)

    def _cannot_end(self, steps: int) -> str | None:
        trainer, done = self._trainer, self._progress.step
        if trainer.global_step != done:
            return "the trainer does not count the steps of these optimizers (global_step)"
        if steps <= done:
            return f"step {done} is finished already; stop ends training now"
        now, epochs = self._end(), trainer.max_epochs
        if epochs == -1 or now == -1 or steps <= now:
            return None
        last = lightning_trainer.last_step(trainer, self._module)
        if last is None:
            return f"it is not known how many steps max_epochs={epochs} are; training can end before step {now}"
        return f"training ends with max_epochs={epochs}, at step {last}" if steps > last else None

    def _note_of_end(self) -> str | None:
        return note_of_end(self._schedulers())


def _definer(kind: type, name: str) -> str:
    """Return the name of the class that defines a method."""
    return next((base.__name__ for base in kind.__mro__ if name in vars(base)), "")
