"""A small trainer that keeps to the rules of Forgather's: what its callbacks see and when, and what its flags do.

The rules that matter here: one control object (with slots) for the trainer's whole life, unless a hook returns another;
flags are cleared only when they are acted on; hooks are called only where they exist; a schedule counts steps since
the last save and reads no flag, and its period is read once, into a counter that is a local variable of the loop; the
end is an attribute of the trainer, and the data begin anew until then; a last save follows the loop unless training was
aborted; the best model is loaded at the end even then, if there is one.
"""

from __future__ import annotations

import enum
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Strategy(str, enum.Enum):
    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


@dataclass
class Args:
    output_dir: str
    save_strategy: Strategy = Strategy.STEPS
    save_steps: int = 4
    eval_strategy: Strategy = Strategy.NO
    eval_steps: int = 2
    load_best_model_at_end: bool = False
    max_steps: int = 10
    logging_steps: int = 3
    logging_strategy: Strategy = Strategy.STEPS
    max_grad_norm: float | None = None


@dataclass(slots=True)
class Control:
    should_training_stop: bool = False
    should_epoch_stop: bool = False
    should_save: bool = False
    should_evaluate: bool = False
    should_log: bool = False
    should_abort_without_save: bool = False


@dataclass
class State:
    max_steps: int
    epoch_train_steps: int
    global_step: int = 0
    epoch: float = 0.0
    best_metric: float | None = None
    best_model_checkpoint: str | None = None
    log_history: list[dict[str, Any]] = field(default_factory=list)


class Every:
    """Due when so many steps were counted since the last time."""

    def __init__(self, strategy: Strategy, steps: int, epoch: int) -> None:
        self.period = {Strategy.NO: None, Strategy.STEPS: max(1, steps), Strategy.EPOCH: epoch}[strategy]
        self.count = 0

    def due(self) -> bool:
        self.count += 1
        return self.period is not None and self.count >= self.period


class Loop:
    """Trains one number. Its evaluations answer ``losses`` in turn, the last again and again."""

    #: Whether the trainer uses a control object that a hook returns instead of its own.
    uses_returned_control = True
    #: A component of the checkpoints that cannot be saved.
    unsaved: str | None = None

    #: What its hooks receive; the scheduler makes a step with each of the trainer's.
    optimizer: Any = None
    lr_scheduler: Any = None

    def __init__(self, args: Args, callbacks: list[Any], losses: tuple[float, ...], epoch_steps: int = 5) -> None:
        self.args, self.callbacks, self.epoch_steps, self.losses = args, callbacks, epoch_steps, list(losses)
        self.control = Control()
        self.state = State(args.max_steps, epoch_steps)
        self.stopped_by: str | None = None
        self.weight = 0
        self.loaded: list[str] = []  # the best models that were loaded
        self.warnings: list[str] = []

    def dispatch(self, event: str, **more: Any) -> None:
        data = None if self.args.eval_strategy == Strategy.NO else []
        for callback in self.callbacks:
            handler = getattr(callback, event, None)
            if handler is None:
                continue
            before = self.control.should_training_stop or self.control.should_abort_without_save
            more |= {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler, "eval_dataloader": data}
            returned = handler(args=self.args, state=self.state, control=self.control, **more)
            if returned is not None and self.uses_returned_control:
                self.control = returned
            if not before and (self.control.should_training_stop or self.control.should_abort_without_save):
                self.stopped_by = callback.name

    def train(self) -> None:
        self.state = State(self.args.max_steps, self.epoch_steps)
        self.stopped_by = None
        args = self.args
        self.max_steps = args.max_steps
        periodic_save = Every(args.save_strategy, args.save_steps, self.epoch_steps)
        periodic_eval = Every(args.eval_strategy, args.eval_steps, self.epoch_steps)
        periodic_log = Every(args.logging_strategy, args.logging_steps, self.epoch_steps)
        counters = periodic_log, periodic_eval, periodic_save
        self.dispatch("on_train_begin")
        while not self.epoch(*counters):
            pass
        if not self.control.should_abort_without_save:
            self.finish(*counters)
        if self.args.load_best_model_at_end:
            self.load_best_model()
        self.log({"train_runtime": 1.0})
        self.dispatch("on_train_end")

    def epoch(self, *counters: Every) -> bool:
        """One pass over the data; whether it was the last."""
        self.control.should_epoch_stop = False
        self.dispatch("on_epoch_begin")
        batches = iter(range(self.epoch_steps))
        while True:
            self.dispatch("on_step_begin")
            if next(batches, None) is None:
                self.dispatch("on_step_end")  # without a step
                break
            self.weight += 1
            if self.lr_scheduler is not None:
                self.optimizer.step()
                self.lr_scheduler.step()
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / self.epoch_steps
            self.dispatch("on_step_end")
            self.log_evaluate_save(*counters)
            stop = self.control.should_training_stop or self.control.should_abort_without_save
            if stop or self.state.global_step >= self.max_steps:
                self.control.should_epoch_stop = True
                break
        self.dispatch("on_epoch_end")
        return self.control.should_epoch_stop

    def finish(self, periodic_log: Every, periodic_eval: Every, periodic_save: Every) -> None:
        if periodic_save.count != 0 and self.args.save_strategy != Strategy.NO:
            self.control.should_evaluate |= self.args.load_best_model_at_end
            self.control.should_save = True
        self.log_evaluate_save(periodic_log, periodic_eval, periodic_save)

    def log_evaluate_save(self, periodic_log: Every, periodic_eval: Every, periodic_save: Every) -> None:
        if periodic_log.due() or self.control.should_log:
            periodic_log.count, self.control.should_log = 0, False
            self.log({"loss": 1.0 / self.state.global_step})
        metrics = None
        evaluate = periodic_eval.due() or self.control.should_evaluate
        save = periodic_save.due() or self.control.should_save
        if evaluate:
            periodic_eval.count, self.control.should_evaluate = 0, False
            metrics = self.evaluate()
        if save:
            periodic_save.count, self.control.should_save = 0, False
            self.save(metrics)

    def log(self, logs: dict[str, Any]) -> None:
        self.state.log_history.append(logs)
        self.dispatch("on_log", logs=logs)

    def evaluate(self) -> dict[str, float]:
        assert self.args.eval_strategy != Strategy.NO, "there is nothing to evaluate on"
        self.dispatch("on_prediction_step")
        loss = self.losses.pop(0) if len(self.losses) > 1 else self.losses[0]
        self.dispatch("on_evaluate", metrics={"eval_loss": loss})
        return {"eval_loss": loss}

    def save(self, metrics: dict[str, float] | None) -> None:
        path = Path(self.args.output_dir) / "checkpoints" / f"checkpoint-{self.state.global_step}"
        path.mkdir(parents=True, exist_ok=True)
        (path / "weight.json").write_text(json.dumps(self.weight))
        if self.unsaved is not None:  # an optional component: only the log says so
            log = logging.getLogger("forgather.ml.trainer.checkpoint_coordinator")
            log.warning(f"Failed to save optional component '{self.unsaved}': no space left on device")
        best = self.state.best_metric
        if metrics is not None and (best is None or metrics["eval_loss"] < best):
            self.state.best_metric, self.state.best_model_checkpoint = metrics["eval_loss"], str(path)
        self.dispatch("on_save")

    def load_best_model(self) -> None:
        if self.state.best_model_checkpoint is None:
            self.warnings.append("no best model to load")
            return
        self.loaded.append(self.state.best_model_checkpoint)
        self.weight = json.loads((Path(self.state.best_model_checkpoint) / "weight.json").read_text())
