"""Programs of several processes, torchrun above all: what they printed, and no worker left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .harness import MS, ROOT, SOON

if TYPE_CHECKING:
    from typing_extensions import Self

#: Several ranks share two cores here; threads of torch's own would only wait for one another. And torch asks for the
#: name of each address that connects: a slow name server would cost seconds.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RES_OPTIONS": "attempts:0"}
#: Seconds for importing torch in four processes on two cores that others use, too.
START = 6 * SOON


class Program:
    """A program and all processes that it starts, with what they print in one file: shown and ended on exit."""

    def __init__(self, words: Sequence[str], cwd: Path, env: Mapping[str, str], own_session: bool = False) -> None:
        self._output, path = tempfile.mkstemp()
        os.unlink(path)
        self.popen = subprocess.Popen(
            words,
            cwd=cwd,
            env={**os.environ, **ENVIRONMENT, **env},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=own_session,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        print(self.output[-20_000:])
        os.close(self._output)

    def stop(self) -> None:
        """End it and all that it has started."""
        raise NotImplementedError

    @property
    def output(self) -> str:
        """All that was printed so far, by every process."""
        return os.pread(self._output, os.fstat(self._output).st_size, 0).decode(errors="replace")

    def end(self, seconds: float = SOON) -> int:
        """Return the exit code, once the program ends by itself."""
        return self.popen.wait(seconds)


class Torchrun(Program):
    """``python -m torch.distributed.run OPTIONS WORDS``, and all its workers.

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
        super().__init__([*before, *torchrun, *words], cwd, {})

    def stop(self) -> None:
        self.popen.terminate()  # it ends its workers, which are in sessions of their own
        try:
            self.popen.wait(SOON)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait(SOON)

    def until(self, condition: Callable[[], Any], seconds: float = START) -> Any:
        """The first true value of ``condition``; fails at the deadline, or when torchrun has ended before it."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            code = self.popen.poll()
            assert code is None or condition(), f"torchrun has ended with {code}"
            assert time.monotonic() < end, f"still waiting for {condition} after {seconds} s"
            time.sleep(2 * MS)
        return value
