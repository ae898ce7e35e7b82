import torch

for name in ("nms", "qnms"):  # PyPI's torchvision is built for CUDA: beside a torch for CPUs, it lacks them
    torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from fastai.data.core import DataLoaders  # noqa: E402

pairs = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
loaders = DataLoaders(*(torch.utils.data.DataLoader(pairs, batch_size=4) for _ in range(2)))
model = torch.nn.Linear(8, 1)
