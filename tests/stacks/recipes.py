"""The recipes of docs/stacks.md as programs: a block of that page behind the model and the data that it needs."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from forgather_control import ControlError, get_job_status

from ..support.harness import ROOT, SOON, until
from ..support.torchrun import Program

#: Seconds for the imports of the largest stacks, in several processes on two cores that others use, too.
START = 9 * SOON
#: Seconds for a checkpoint, and for an orderly end.
END = 3 * SOON

#: Nothing is downloaded, no device is used, and nothing is reported to anybody.
QUIET = {
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "KERAS_BACKEND": "torch",
}


def block(name: str, language: str = "python") -> str:
    """Return the block of docs/stacks.md that is marked ``test: stack, NAME``."""
    page = (ROOT / "docs" / "stacks.md").read_text()
    (found,) = re.findall(rf"^<!-- test: stack, {name} -->\n```{language}\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)
    return str(found)


def write(name: str, folder: Path) -> Path:
    """Write the program of a recipe into a folder, and return its path."""
    before = Path(__file__).parent / "before" / f"{name}.py"
    path = folder / "train.py"
    path.write_text(before.read_text() + "\n\n" + block(name) + "\n")
    return path


class Training(Program):
    """A Python program that trains, and all processes that it starts."""

    def __init__(self, *words: str, cwd: Path, env: dict[str, str] | None = None) -> None:
        env = {**QUIET, "PYTHONPATH": str(ROOT), **(env or {})}
        super().__init__([sys.executable, *words], cwd, env, own_session=True)

    def stop(self) -> None:
        with suppress(ProcessLookupError):  # its whole session: launchers leave workers behind
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait(SOON)

    def status(self, job_id: str, step: int = 3) -> dict[str, Any]:
        """Return the first status of a job that has done so many steps; fail if the program ends before it."""

        def look() -> dict[str, Any] | None:
            assert self.popen.poll() is None, f"the program has ended with {self.popen.returncode}"
            try:
                status = get_job_status(job_id)
            except ControlError:
                return None
            return status if status["global_step"] >= step else None

        return dict(until(look, START))

    def end(self, seconds: float = END) -> int:
        return super().end(seconds)
