"""Hugging Face's Trainer with one more callback: ``python examples/hf_trainer.py [OUTPUT_DIR]``.

A tiny GPT-2 learns the source code of the standard library, byte by byte. Nothing is downloaded. Needs ``pip install
transformers accelerate``. While it trains, see what it has learned::

    forgather-control run hf_trainer sample prompt="def "
"""

import sys
import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from forgather_control import TrainerControlCallback


class Library(torch.utils.data.Dataset):
    """Windows of 64 bytes of the standard library's source code."""

    def __init__(self) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(path.read_bytes() for path in files)[:500_000]
        self.windows = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: len(text) // 64 * 64].long().view(-1, 64)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


@torch.no_grad()
def sample(context, prompt: str = "def ", length: int = 40) -> str:
    """Continue a text with the model as it is now, with the likeliest bytes."""
    model = context.model
    tokens = torch.tensor([list(prompt.encode() or b"\n")])
    model.eval()
    try:
        for _ in range(length):
            tokens = torch.cat([tokens, model(tokens[:, -64:]).logits[:, -1:].argmax(-1)], dim=1)
    finally:
        model.train()
    return bytes(tokens[0].tolist()).decode(errors="replace")


def main() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    args = TrainingArguments(
        output_dir=sys.argv[1] if len(sys.argv) > 1 else "output_models/hf_trainer",
        max_steps=20_000,
        per_device_train_batch_size=16,
        logging_steps=10,
        save_steps=100_000,  # a stop saves, too
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = TrainerControlCallback(job_id="hf_trainer", commands=[sample])
    trainer = Trainer(model=model, args=args, train_dataset=Library(), callbacks=[callback])
    trainer.train()
    print("aborted" if callback.aborted else "ended", "at step", trainer.state.global_step)


if __name__ == "__main__":
    main()
