"""A save does not change what training would have done: each trainer, with and without ten saves.

With early stopping, a learning rate that falls when evaluations do not improve, and dropout, which draws at random.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forgather_control

from ..support import forgather_loop
from ..support.harness import needs_lightning, needs_torch, needs_transformers

pytestmark = needs_torch

STEPS = 60
#: After which a save is sent; some where the trainer evaluates or saves by itself, too.
SAVED_AT = (3, 8, 10, 15, 20, 21, 30, 33, 47, 55)


def network() -> Any:
    """A small model with dropout, the same each time, and the random states that go with it."""
    import torch

    torch.manual_seed(0)
    random.seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))


def outcome(model: Any, optimizer: Any, step: int, **more: Any) -> dict[str, Any]:
    """What must be the same: weights, learning rate, random states, the last step."""
    import torch

    weights = [value.tolist() for value in model.state_dict().values()]
    return {
        "weights": weights, "rate": optimizer.param_groups[0]["lr"], "step": step,
        "torch": torch.get_rng_state().tolist(), "python": random.getstate(), **more,
    }  # fmt: skip


class Saves:
    """Sends a save at each of the steps."""

    def __init__(self, at: tuple[int, ...]) -> None:
        self.at, self.sent = at, list[str]()

    def __call__(self, step: int) -> None:
        if step in self.at:
            self.sent.append(forgather_control.save_checkpoint("job", command_id=f"at-{step}").command_id)

    def all_finished(self) -> None:
        """Each was applied, and wrote a checkpoint."""
        states = [forgather_control.get_command("job", command_id).state for command_id in self.sent]
        assert states == ["finished"] * len(self.at)


def loop(out: Path, saves: Saves) -> dict[str, Any]:
    """A plain loop, which evaluates every ten steps; stops early; steps a scheduler with what it evaluates."""
    import torch

    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    out.mkdir()
    with forgather_control.TrainingJob("job", max_steps=STEPS) as job:
        for step in range(1, STEPS + 1):
            saves(step)
            loss = model(torch.randn(4, 2)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                scheduler.step(1.0)
            job.step(step)
            if job.should_save:
                torch.save(model.state_dict(), out / f"{step}.pt")
                job.saved(out / f"{step}.pt")
        saves.all_finished()
    return outcome(model, optimizer, step)


def huggingface(out: Path, saves: Saves) -> dict[str, Any]:
    """transformers' Trainer, with early stopping that comes near its end."""
    import torch
    from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.evaluations = network(), 0

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            loss = (self.layers(x) - labels).square().mean()
            if not self.training:  # each evaluation is worse than the first
                self.evaluations += 1
                loss = loss * 0 + self.evaluations
            return {"loss": loss}

    class Sends(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saves(state.global_step + 1)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saves.all_finished()

    made = torch.Generator().manual_seed(1)
    rows = [{"x": torch.randn(2, generator=made), "labels": torch.randn(1, generator=made)} for _ in range(64)]
    args = TrainingArguments(
        str(out), max_steps=STEPS, per_device_train_batch_size=4, per_device_eval_batch_size=64, eval_strategy="steps",
        eval_steps=10, save_strategy="steps", save_steps=10, load_best_model_at_end=True, metric_for_best_model="loss",
        lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"patience": 1}, report_to=[], disable_tqdm=True,
        use_cpu=True, logging_steps=10,
    )  # fmt: skip
    model = Model()
    callbacks = [Sends(), forgather_control.TrainerControlCallback("job"), EarlyStoppingCallback(5)]
    trainer = Trainer(model, args, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
    trainer.train()
    state = trainer.state
    best = {"best": state.best_metric, "evaluations": model.evaluations}
    return outcome(model, trainer.optimizer, state.global_step, **best)


def lightning(out: Path, saves: Saves) -> dict[str, Any]:
    """Lightning's Trainer, with early stopping and a scheduler that both watch the validation."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.evaluations = network(), 0

        def training_step(self, batch: Any, index: int) -> Any:
            return self.layers(batch).square().mean()

        def validation_step(self, batch: Any, index: int) -> None:
            self.evaluations += not self.trainer.sanity_checking
            self.log("val_loss", torch.tensor(float(self.evaluations)))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), 0.01)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    class Sends(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            saves(trainer.global_step + 1)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            saves.all_finished()

    model = Model()
    stopping = EarlyStopping("val_loss", patience=5)
    keeping = ModelCheckpoint(str(out / "own"), monitor="val_loss", save_top_k=2)
    trainer = Trainer(
        max_epochs=STEPS // 10, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(out),
        callbacks=[Sends(), stopping, keeping, forgather_control.LightningControlCallback("job")],
    )  # fmt: skip
    trainer.fit(
        model,
        torch.utils.data.DataLoader(torch.ones(40, 2), batch_size=4),
        torch.utils.data.DataLoader(torch.ones(1, 2)),
    )
    more = {"best": float(keeping.best_model_score), "evaluations": model.evaluations, "waits": stopping.wait_count}
    return outcome(model, trainer.optimizers[0], trainer.global_step, **more)


class Trains:
    """A callback that does what Forgather's trainer does in a step, and sends the saves."""

    name = "Trains"

    def __init__(self, model: Any, optimizer: Any, saves: Saves) -> None:
        self.model, self.optimizer, self.saves, self.next = model, optimizer, saves, 0

    def on_step_begin(self, state: Any, **kwargs: Any) -> None:
        """Compute the gradients of the step that follows."""
        import torch

        if self.next != state.global_step + 1:  # at the end of the data it is called without a step
            self.next = state.global_step + 1
            self.saves(self.next)
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 2)).square().mean().backward()

    def on_train_end(self, **kwargs: Any) -> None:
        """Look at the records, while the job is there."""
        self.saves.all_finished()


def forgather(out: Path, saves: Saves) -> dict[str, Any]:
    """A stand-in for Forgather's trainer, with its best model, and a schedule of the learning rate."""
    import torch

    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    steps = forgather_loop.Strategy.STEPS
    args = forgather_loop.Args(
        str(out), max_steps=STEPS, save_strategy=steps, save_steps=10, eval_strategy=steps, eval_steps=10,
        load_best_model_at_end=True,
    )  # fmt: skip
    callbacks = [Trains(model, optimizer, saves), forgather_control.TrainerControlCallback("job")]
    trainer = forgather_loop.Loop(args, callbacks, tuple(10.0 - number for number in range(6)))
    trainer.optimizer = optimizer
    trainer.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.9)
    trainer.train()
    left = {"evaluations_left": len(trainer.losses), "best": trainer.state.best_metric}
    return outcome(model, optimizer, trainer.state.global_step, **left)


TRAINERS = [
    pytest.param(forgather, id="forgather"),
    pytest.param(loop, id="loop"),
    pytest.param(huggingface, id="huggingface", marks=needs_transformers),
    pytest.param(lightning, id="lightning", marks=needs_lightning),
]


@pytest.mark.once
@pytest.mark.parametrize("train", TRAINERS)
def test_ten_saves_change_nothing(tmp_path: Path, train: Callable[[Path, Saves], dict[str, Any]]) -> None:
    """Weights, learning rate, random states, last step, evaluations and best metric are those without saves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        alone = train(tmp_path / "alone", Saves(()))
        saved = train(tmp_path / "saved", Saves(SAVED_AT))
    assert alone["step"] == STEPS, "it ended early: no save could have changed that"
    assert saved == alone
