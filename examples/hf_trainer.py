"""Hugging Face's Trainer with one more callback: ``python examples/hf_trainer.py [OUTPUT_DIR]``.

A tiny GPT-2 learns the source code of the standard library, byte by byte. Nothing is downloaded. Needs ``pip install
transformers accelerate``.
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
    callback = TrainerControlCallback(job_id="hf_trainer")
    trainer = Trainer(model=model, args=args, train_dataset=Library(), callbacks=[callback])
    trainer.train()
    print("aborted" if callback.aborted else "ended", "at step", trainer.state.global_step)


if __name__ == "__main__":
    main()
