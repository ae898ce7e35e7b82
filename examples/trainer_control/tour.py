"""A tour in under a minute: start a real training run, and control it from another process.

It starts ``trainer_control_demo.py`` and runs the commands that a user would type. All files are in a temporary
directory, which is removed at the end.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
JOB = "tour"


def control(*words: str) -> str:
    """Print a command as a user types it, run it, and print and return its output."""
    print(f"\n$ forgather-control {shlex.join(words)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "forgather_control", *words], capture_output=True, text=True, timeout=60
    )
    print(done.stdout + done.stderr, end="", flush=True)
    if done.returncode != 0:
        raise SystemExit(f"the command failed with exit code {done.returncode}")
    return done.stdout


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start the demo, and wait until its job is published."""
    words = ["--job-id", JOB, *options]
    print(f"\n$ python examples/trainer_control/trainer_control_demo.py {shlex.join(words)} &", flush=True)
    demo = [sys.executable, str(HERE / "trainer_control_demo.py"), *words, "--output-dir", str(folder)]
    process = subprocess.Popen(demo)
    end = time.monotonic() + 40
    while not (Path(os.environ["FORGATHER_JOBS_DIR"]) / JOB / "endpoint.json").exists():
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit("the demo did not start")
        time.sleep(0.1)
    return process


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tour") as scratch:
        os.environ["FORGATHER_JOBS_DIR"] = str(Path(scratch) / "jobs")
        checkpoints = Path(scratch) / "checkpoints"
        job = start(checkpoints)
        try:
            control("list")
            control("save", JOB, "--timeout=40")
            control("status", JOB)
            control("run", JOB, "sample", "prompt=import ", "length=60")
            control("save-stop", JOB, "--timeout=40")
            job.wait(20)
            job = start(checkpoints, "--resume")
            control("stop", JOB, "--timeout=40")
            job.wait(20)
            control("list")
        finally:
            job.kill()
            job.wait()
    print("\nThis was a real training run. It was found, saved, stopped and resumed, and has left nothing behind.")


if __name__ == "__main__":
    main()
