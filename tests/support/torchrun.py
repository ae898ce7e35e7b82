"""torchrun, as the tests start it: what it printed, and no worker left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .harness import MS, ROOT, SOON

#: Several ranks share two cores here; threads of torch's own would only wait for one another. And torch asks for the
#: name of each address that connects: a slow name server would cost seconds.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RES_OPTIONS": "attempts:0"}
#: Seconds for importing torch in four processes on two cores that others use, too.
START = 6 * SOON


class Torchrun:
    """``python -m torch.distributed.run OPTIONS WORDS``, and all its workers; ended on exit.

    What it printed is shown where a test fails.

    Args:
        before: words in front of it: ``ip netns exec NAME``, say.
    """

    def __init__(
        self,
        *words: str,
        ranks: int = 1,
        options: tuple[str, ...] = ("--standalone",),
        before: tuple[str, ...] = (),
        cwd: Path = ROOT,
    ) -> None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", *options, f"--nproc-per-node={ranks}"]
        self._output, path = tempfile.mkstemp()
        os.unlink(path)
        self.popen = subprocess.Popen(
            [*before, *torchrun, *words],
            cwd=cwd,
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *error: object) -> None:
        self.popen.terminate()  # it ends its workers, which are in sessions of their own
        try:
            self.popen.wait(SOON)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(SOON)
        print(self.output[-20_000:])
        os.close(self._output)

    @property
    def output(self) -> str:
        """All that was printed so far, by it and by every rank."""
        return os.pread(self._output, os.fstat(self._output).st_size, 0).decode(errors="replace")

    def until(self, condition: Callable[[], Any], seconds: float = START) -> Any:
        """The first true value of ``condition``; fails at the deadline, or when torchrun has ended before it."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            code = self.popen.poll()
            assert code is None or condition(), f"torchrun has ended with {code}"
            assert time.monotonic() < end, f"still waiting for {condition} after {seconds} s"
            time.sleep(2 * MS)
        return value

    def end(self, seconds: float = SOON) -> int:
        """Its exit code, once it ends by itself."""
        return self.popen.wait(seconds)
