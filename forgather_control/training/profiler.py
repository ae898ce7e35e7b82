"""A profile of the next steps by torch's profiler: started and stopped on the training thread, written behind it.

torch is used only where it is loaded already. A trace is written by a thread of its own, the table of operations by a
child process; see ``trace_table``.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CommandFailed, CommandRefused
from . import limits
from .progress import RunState

log = logging.getLogger("forgather_control")


@dataclass
class _Session:
    """One profile that is recorded on this rank."""

    trace: Any
    future: Future[Any]
    steps: int
    began_at_step: int
    began: float  # monotonic; later by as long as training was paused since
    speed: float | None  # in steps per second, before it
    lost: float = 0.0  # seconds that starting and stopping took
    done: int = 0
    note: str | None = None


class Profiler:
    """Profiles one rank of one run. All but ``obstacle`` runs on the training thread.

    Args:
        on_step: the functions that are called with each finished step; see ``Controller``.
        folder: the absolute path in which traces get a directory ``profiles``.
        rank: returns this rank; rank 0 makes the table.
    """

    def __init__(
        self, on_step: list[Callable[[int], None]], state: RunState, folder: str, rank: Callable[[], int]
    ) -> None:
        self._on_step, self._state, self._folder, self._rank = on_step, state, folder, rank
        self._session: _Session | None = None
        self._writing = False

    def obstacle(self) -> str | None:
        """Say why no profile can begin; ``None`` if one can. On any thread: reads only."""
        if not hasattr(sys.modules.get("torch"), "profiler"):
            return "this process has not loaded torch, which makes profiles"
        if self._session is not None or self._writing:
            return "another profile is under way"
        return None

    def start(self, steps: int) -> Future[Any]:
        """Begin to record the next steps; the future has the trace's path, size and cost.

        Raises:
            CommandRefused: another profile is under way, ours or the script's own.
        """
        torch = sys.modules.get("torch")
        if (why := self.obstacle()) is not None or torch is None:
            raise CommandRefused(why or "torch has gone")
        if torch.autograd._profiler_enabled():
            raise CommandRefused("a profiler of the training script is active")
        since = time.monotonic()
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CPU, *([kinds.CUDA] if torch.cuda.is_initialized() else [])]
        trace = torch.profiler.profile(activities=activities)
        trace.start()
        progress, now = self._state.progress, time.monotonic()
        self._session = _Session(trace, Future(), steps, progress.step, now, progress.speed, now - since)
        self._session.future.set_running_or_notify_cancel()  # the end of training waits for it
        self._on_step.append(self._step)
        return self._session.future

    def leave_out(self, since: float) -> None:
        """Leave the time since then out of what the steps took, because training was paused."""
        if self._session is not None:
            self._session.began += time.monotonic() - max(since, self._session.began)

    def end(self, keep: bool) -> None:
        """Stop a profile because training ends; write it, unless it is not to be kept."""
        if self._session is None:
            return
        why = f"training ended after {self._session.done} of {self._session.steps} steps"
        self._session.note = why
        if keep and self._session.done:
            self._stop()
            return
        session, self._session = self._session, None
        with suppress(Exception):  # boundary: torch's
            session.trace.stop()
        session.future.set_exception(CommandFailed(f"no profile was written: {why}"))

    def _step(self, step: int) -> None:
        session = self._session
        if session is None:
            return
        session.done += 1
        if time.monotonic() - session.began > limits.PROFILE_SECONDS and session.done < session.steps:
            session.note = f"stopped after {session.done} of {session.steps} steps, as they took too long"
        if session.done >= session.steps or session.note is not None:
            self._stop()

    def _stop(self) -> None:
        session, self._session = self._session, None
        assert session is not None
        if self._step in self._on_step:
            self._on_step.remove(self._step)
        since = time.monotonic()
        elapsed = since - session.began
        try:
            session.trace.stop()
        except Exception as err:  # boundary: torch's; the script may have stopped it
            log.warning("A profile failed: %s", err)
            session.future.set_exception(CommandFailed(f"the profiler failed: {type(err).__name__}: {err}"))
            return
        usual = session.done / session.speed if session.speed else elapsed
        session.lost += time.monotonic() - since + max(0.0, elapsed - usual)
        self._writing = True
        threading.Thread(target=self._write, args=(session,), name="forgather-profile", daemon=True).start()

    # On the writing thread...

    def _write(self, session: _Session) -> None:
        try:
            result = self._written(session)
        except Exception as err:  # boundary: a full disk, torch's exporter, a child process
            log.warning("A profile was not written: %s", err)
            session.future.set_exception(CommandFailed(f"the profile was not written: {err}"))
        else:
            session.future.set_result(result)
        finally:
            self._writing = False

    def _written(self, session: _Session) -> dict[str, Any]:
        import tempfile  # most jobs are never profiled, and start sooner without it

        name = f"{self._state.job_id or 'job'}-step{session.began_at_step}-rank{self._rank()}"
        path = _unused(Path(self._folder) / "profiles", name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # torch writes a file beside the one that it is given, and leaves that where the disk is full.
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as private:
            part = Path(private) / path.name
            session.trace.export_chrome_trace(str(part))
            _check_whole(part)
            os.chmod(part, 0o600)
            os.replace(part, path)
        result = {"path": str(path), "bytes": path.stat().st_size, "steps": session.done}
        result |= {"seconds_lost": round(session.lost, 6), "note": session.note}
        return result | {"operations": _operations(path) if self._rank() == 0 else []}


def _unused(folder: Path, name: str) -> Path:
    """Return a path that does not exist."""
    path, number = folder / f"{name}.json", 1
    while path.exists():
        path, number = folder / f"{name}-{number}.json", number + 1
    return path


def _check_whole(path: Path) -> None:
    """Raise OSError if the end of a trace is missing: torch does not say so where the disk is full."""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 16))
        if file.read().rstrip().endswith(b"}"):
            return
    raise OSError(f"torch wrote only a part of it to {path.parent.parent}; is the disk full?")


def _operations(path: Path) -> list[dict[str, Any]]:
    """Return the longest operations of a trace; none if they cannot be read."""
    import subprocess

    words = [sys.executable, str(Path(__file__).with_name("trace_table.py")), str(path)]
    try:
        done = subprocess.run(words, capture_output=True, timeout=limits.TABLE_TIMEOUT, check=True)
        found: list[dict[str, Any]] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as err:
        log.warning("The operations of %s cannot be listed: %s", path, err)
        return []
    return found
