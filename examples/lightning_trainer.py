"""Lightning's Trainer with one more callback: ``python examples/lightning_trainer.py [OUTPUT_DIR]``.

A small network learns the sine function, on the CPU. Needs ``pip install lightning``.
"""

import sys

import lightning
import torch

from forgather_control import LightningControlCallback


class Sine(lightning.LightningModule):
    """Two layers that learn sin(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(1, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))

    def training_step(self, x: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(self.net(x), torch.sin(x))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def main() -> None:
    data = torch.utils.data.DataLoader(6 * torch.rand(16_000, 1) - 3, batch_size=16)
    callback = LightningControlCallback(job_id="lightning_trainer")
    trainer = lightning.Trainer(
        default_root_dir=sys.argv[1] if len(sys.argv) > 1 else "output_models/lightning_trainer",
        max_epochs=100,
        log_every_n_steps=10,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        logger=False,
        accelerator="cpu",
    )
    trainer.fit(Sine(), data)
    print("aborted" if callback.aborted else "ended", "at step", trainer.global_step)


if __name__ == "__main__":
    main()
