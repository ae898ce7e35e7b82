"""A small language model that learns the source code of Python's standard library, and can be controlled.

Start it in one terminal, and control it from another::

    python examples/trainer_control/trainer_control_demo.py
    forgather-control list
    forgather-control status
    forgather-control save --wait
    forgather-control run sample prompt="def main("
    forgather-control stop --wait

Started again with ``--resume``, it continues from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import nn

from forgather_control import TrainingJob

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 64, 4, 2, 16


def library_text(limit: int = 2_000_000) -> torch.Tensor:
    """Return the source code of the standard library, at most ``limit`` bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"\n".join(path.read_bytes() for path in files)[:limit]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


class LanguageModel(nn.Module):
    """A byte-level transformer, which predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        hidden = self.bytes(tokens) + self.positions(torch.arange(length))
        return self.head(self.layers(hidden, mask=self.mask[:length, :length], is_causal=True))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, text: torch.Tensor) -> torch.Tensor:
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,))
    window = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
    logits = model(window[:, :-1])
    loss = nn.functional.cross_entropy(logits.reshape(-1, 256), window[:, 1:].reshape(-1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


@torch.no_grad()
def generate(model: nn.Module, prompt: str, length: int, temperature: float, seed: int) -> str:
    """Return a text that begins with ``prompt``; training goes on as it would have without it."""
    tokens = torch.tensor(list(prompt.encode() or b"\n"))
    dice = torch.Generator().manual_seed(seed)  # of its own: training's random numbers stay as they are
    model.eval()
    try:
        for _ in range(length):
            logits = model(tokens[-CONTEXT:].unsqueeze(0))[0, -1]
            chances = torch.softmax(logits / max(temperature, 1e-6), dim=0)
            tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=dice)])
    finally:
        model.train()
    return bytes(tokens.tolist()).decode(errors="replace")


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write ``folder/checkpoint-STEP``, which exists only once it is complete."""
    path = folder / f"checkpoint-{step}"
    unfinished = folder / f".checkpoint-{step}"
    unfinished.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, unfinished / "state.pt")
    shutil.rmtree(path, ignore_errors=True)
    return unfinished.rename(path)


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint, if there is one, and return its step."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    if not found:
        return 0
    state = torch.load(found[-1] / "state.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    print(f"resumed from {found[-1]}", flush=True)
    return int(state["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job-id", help="the name of the job for clients; made of time, host and pid if left out")
    parser.add_argument("--output-dir", type=Path, default=Path("output_models/trainer_control_demo"))
    parser.add_argument("--max-steps", type=int, default=20_000)
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)

    text, model = library_text(), LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    start = resume(options.output_dir, model, optimizer) if options.resume else 0
    step, saved_at = start, start
    with TrainingJob(options.job_id, options.max_steps, start_step=start) as job:
        job.optimizer(optimizer)

        @job.command
        def sample(prompt: str = "def ", length: int = 100, temperature: float = 0.7, seed: int = 0) -> str:
            """Continue a text with the model as it is now."""
            return generate(model, prompt, length, temperature, seed)

        for step in range(start + 1, options.max_steps + 1):
            loss = train_step(model, optimizer, text)
            if step % 10 == 0 or step == start + 1:
                job.log(loss=loss)
            job.step(step, epoch=step * BATCH * CONTEXT / len(text))
            if job.should_save:
                job.saved(save(options.output_dir, step, model, optimizer))
                saved_at = step
            if job.should_stop:
                break
        if not job.aborted and saved_at != step:
            job.saved(save(options.output_dir, step, model, optimizer))
    print(f"{'aborted' if job.aborted else 'ended'} at step {step}", flush=True)


if __name__ == "__main__":
    main()
