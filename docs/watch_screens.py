"""Capture screens of ``watch`` from a real run as ``watch_*.svg``: ``python docs/watch_screens.py``.

The jobs are the examples with four kinds of trainers. Each screen is that of a terminal of tmux. Meanwhile one job is
killed, another one is killed and started again. Needs tmux and rich, and what the examples need.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).resolve().parent
EXAMPLES = DOCS.parent / "examples"
#: The program of each job.
JOBS = {
    "hf_trainer": ["hf_trainer.py"],
    "lightning_trainer": ["lightning_trainer.py"],
    "plain_loop": ["plain_loop.py"],
    "ddp_loop": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ddp_loop.py"],
}
#: Seconds that anything may take.
PATIENCE = 120.0
#: Without the fonts that rich's own format loads from another site, which a picture in a page may not.
FORMAT = re.sub(r"@font-face \{\{.*?\n    \}\}\n", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


class Terminal:
    """A terminal of tmux in which ``watch`` runs."""

    def __init__(self, words: str, columns: int, lines: int) -> None:
        self.words, self.columns = words, columns
        self._tmux = ["tmux", "-u", "-L", f"watch-screens-{os.getpid()}"]
        self._name = f"{words}-{columns}".replace(" ", "-")
        command = f"{shlex.quote(sys.executable)} -m forgather_control {words}; cat"
        size = ["-x", str(columns), "-y", str(lines)]
        subprocess.run([*self._tmux, "new-session", "-d", "-s", self._name, *size, command], check=True)

    def shown(self) -> str:
        """Return what is on it, with colours."""
        words = [*self._tmux, "capture-pane", "-p", "-e", "-t", self._name]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.rstrip("\n")

    def capture(self, name: str, when: Callable[[str], bool]) -> None:
        """Write the screen as SVG as soon as ``when`` holds for its text."""
        screen = Text()

        def holds() -> bool:
            nonlocal screen
            screen = Text.from_ansi(self.shown())
            return when(screen.plain)

        until(holds)
        console = Console(record=True, width=self.columns, file=io.StringIO(), force_terminal=True)
        console.print(screen, crop=False, no_wrap=True, end="\n\n")  # what the last line has below it is cut off
        title = f"forgather-control {self.words}"
        drawn = console.export_svg(title=title, code_format=FORMAT, unique_id=name, font_aspect_ratio=0.6)
        (DOCS / f"{name}.svg").write_text(drawn, encoding="utf-8")


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not so within {PATIENCE:g} s")
        time.sleep(0.1)


def train(name: str, folder: str) -> subprocess.Popen[bytes]:
    """Start a job in a process group of its own; it writes its files into a folder."""
    words = [str(EXAMPLES / word) if word.endswith(".py") else word for word in JOBS[name]]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    return subprocess.Popen(["nice", sys.executable, *words], cwd=folder, **quiet)


def end(jobs: Collection[subprocess.Popen[bytes]]) -> None:
    """End jobs; torchrun ends its ranks itself."""
    for job in jobs:
        job.terminate()
    for job in jobs:
        job.wait()


def kill(name: str) -> None:
    """Kill rank 0 of a job, as the kernel does where memory runs out."""
    os.kill(json.loads(control("status", name, "--json"))["pid"], signal.SIGKILL)


def control(*words: str) -> str:
    """Run a verb; return what it prints."""
    command = [sys.executable, "-m", "forgather_control", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def capture(folder: str, stack: ExitStack) -> None:
    """Run the jobs, and capture the screens."""
    jobs = {name: train(name, folder) for name in JOBS}
    stack.callback(lambda: end(jobs.values()))
    until(lambda: len(control("list", "-q").split()) == len(JOBS))
    stack.callback(subprocess.run, ["tmux", "-L", f"watch-screens-{os.getpid()}", "kill-server"])
    one, narrow = (Terminal("watch hf_trainer", columns, lines) for columns, lines in ((110, 30), (40, 20)))
    table = Terminal("watch --all", 110, 7)
    until(lambda: all(name in table.shown() for name in JOBS))
    control("when", "hf_trainer", "loss < 0.5", "save-stop")
    until(lambda: "loss" in one.shown() and far(one.shown()) >= 400)
    control("save", "hf_trainer", "--wait")
    one.capture("watch_job", lambda text: far(text) >= 600)
    narrow.capture("watch_narrow", lambda text: far(text) >= 600)
    kill("ddp_loop")
    kill("plain_loop")
    until(lambda: table.shown().count("dead") == 2)
    jobs["plain_loop"] = train("plain_loop", folder)
    table.capture("watch_jobs", lambda text: text.count("dead") == 1)


def far(text: str) -> int:
    """Return the step on a screen."""
    found = re.search(r"step (\d+) of", text)
    return int(found[1]) if found else 0


def main() -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.environ.update(FORGATHER_JOBS_DIR=os.path.join(folder, "jobs"), TMPDIR=folder, LC_ALL="C.UTF-8")
        os.environ.setdefault("PYTHONPATH", str(DOCS.parent))
        os.environ.pop("NO_COLOR", None)
        capture(folder, stack)


if __name__ == "__main__":
    main()
