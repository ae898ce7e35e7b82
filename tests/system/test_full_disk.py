"""The disk of the checkpoints is full: a save fails and says why, and training does what the trainer does then."""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import forgather_control
from forgather_control import connect
from forgather_control.errors import ControlError

from ..support.harness import SOON, needs_lightning, needs_torch, needs_transformers

pytestmark = [needs_torch, pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")]

JOB = "full"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class Saves(threading.Thread):
    """Sends one save, and keeps its record or error; then stops the job."""

    def __init__(self) -> None:
        super().__init__()
        self.record: Any = None
        self.step = 0

    def run(self) -> None:
        try:
            with connect(JOB) as client:
                self.record = client.call("save_checkpoint", wait="finished", timeout=SOON)
                self.step = client.call("status")["global_step"]
                client.call("graceful_stop")
        except ControlError as err:
            self.record = self.record or err


def network() -> Any:
    """A model whose checkpoint is larger than the disk."""
    import torch

    return torch.nn.Sequential(torch.nn.Linear(2, 20_000), torch.nn.Linear(20_000, 1))


def test_a_plain_loop_that_handles_it_trains_on(disk, jobs_dir):
    """The record names what is missing."""
    import torch

    model, step, saves = network(), 0, Saves()
    with forgather_control.TrainingJob(JOB, save_on_stop=False) as job:
        saves.start()
        while not job.should_stop:
            step += 1
            job.step(step)
            if job.should_save:
                try:
                    torch.save(model.state_dict(), disk / "model.pt")
                except (OSError, RuntimeError):
                    (disk / "model.pt").unlink(missing_ok=True)
                job.saved(disk / "model.pt")
        saves.join(SOON)
    assert saves.record["state"] == "failed" and "there is none" in saves.record["error"]["message"]
    assert step > saves.record["applied_at_step"]


@needs_lightning
def test_lightning_trains_on(disk, jobs_dir):
    """Its callback catches what the save raises, and the record has it."""
    import torch
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def training_step(self, batch: Any, index: int) -> Any:
            return self.layers(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-6)

    saves = Saves()

    class Starts(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            saves.start()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=str(disk),
            callbacks=[forgather_control.LightningControlCallback(JOB), Starts()],
        )  # fmt: skip
        trainer.fit(Model(), torch.utils.data.DataLoader(torch.ones(40, 2), batch_size=4))
    saves.join(SOON)
    assert saves.record["state"] == "failed" and "space" in saves.record["error"]["message"], saves.record
    assert trainer.global_step > saves.record["applied_at_step"]
    assert not [path for path in disk.rglob("*") if path.is_file()]


@needs_transformers
def test_hugging_faces_trainer_raises_and_the_record_says_so(disk, jobs_dir):
    """As docs/limits.md says: its own save raises, which ends training with or without control."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            return {"loss": (self.layers(x) - labels).square().mean()}

    saves = Saves()

    class Starts(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saves.start()

    quiet: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    args = TrainingArguments(str(disk), max_steps=100_000, save_strategy="no", **quiet)
    rows = [{"x": torch.ones(2), "labels": torch.ones(1)}] * 8
    callbacks = [forgather_control.TrainerControlCallback(JOB), Starts()]
    trainer = Trainer(Model(), args, train_dataset=rows, callbacks=callbacks)
    with pytest.raises(Exception, match="No space left"):
        trainer.train()
    saves.join(SOON)
    assert saves.record["state"] == "failed" and "training ended by an exception" in saves.record["error"]["message"]
