import lightning
import torch


class Model(lightning.LightningModule):
    def __init__(self, rate: float = 0.01) -> None:
        super().__init__()
        self.rate = rate
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch, number):
        return self.layer(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(64, 8), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)
