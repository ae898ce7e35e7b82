"""The examples run as their docstrings say."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import forgather_control
from forgather_control.client import limits as client_limits
from forgather_control.client import target
from forgather_control.client.following import Follower
from forgather_control.server import limits

from ..support.harness import (
    MS,
    ROOT,
    SOON,
    cli,
    needs,
    needs_lightning,
    needs_mcp,
    needs_torch,
    needs_transformers,
    running_loop,
    strict,
    until,
)

pytestmark = pytest.mark.once

EXAMPLES = ROOT / "examples"
DEMO = EXAMPLES / "trainer_control" / "trainer_control_demo.py"


def start(script: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, str(script), *args], stdout=subprocess.PIPE, text=True)


def live(job_id: str) -> bool:
    return [job.state for job in forgather_control.list_jobs() if job.job_id == job_id] == ["live"]


@needs_torch
def test_the_tour_shows_each_command_and_what_it_said():
    """The tour runs to its end, and prints each command above its output."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / "trainer_control" / "tour.py"], capture_output=True, text=True, timeout=5 * SOON
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in (
        "$ forgather-control list",
        "live ",
        "saved at step",
        "\nimport ",
        "resumed from",
        "ended at step",
        "no jobs in",
    ):
        assert shown in done.stdout, done.stdout


@needs_torch
def test_the_demo_saves_resumes_and_aborts(tmp_path):
    """The demo saves, saves and stops, resumes at that step, and aborts without another checkpoint."""
    job = start(DEMO, "--job-id", "demo", "--output-dir", str(tmp_path))
    until(lambda: live("demo"), 2 * SOON)
    saved = forgather_control.save_checkpoint("demo", wait="finished", timeout=SOON)
    texts = [cli("run", "demo", "sample", "prompt=def ", "length=20", f"seed={seed}").stdout for seed in (1, 2)]
    assert all(text.startswith("def ") and len(text) > 20 for text in texts) and texts[0] != texts[1]
    stopped = forgather_control.save_and_stop("demo", wait="finished", timeout=SOON)
    assert f"ended at step {stopped.result['step']}" in job.communicate(timeout=SOON)[0]
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == sorted({Path(saved.result["path"]).name, Path(stopped.result["path"]).name})
    job = start(DEMO, "--job-id", "demo", "--output-dir", str(tmp_path), "--resume")
    until(lambda: live("demo"), 2 * SOON)
    assert forgather_control.get_job_status("demo")["global_step"] >= stopped.result["step"]
    aborted = forgather_control.abort("demo", wait="finished", timeout=SOON)
    said = job.communicate(timeout=SOON)[0]
    assert f"resumed from {stopped.result['path']}" in said and f"aborted at step {aborted.result['step']}" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


@needs_torch
def test_the_plain_loop_is_controlled(monkeypatch, tmp_path):
    """The plain loop saves on request, and saves a last checkpoint when it is stopped."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    job = start(EXAMPLES / "plain_loop.py")
    until(lambda: live("plain_loop"), 2 * SOON)
    record = forgather_control.save_checkpoint("plain_loop", wait="finished", timeout=SOON)
    assert Path(record.result["path"]).parent == tmp_path / "plain_loop"
    stopped = forgather_control.graceful_stop("plain_loop", wait="finished", timeout=SOON)
    assert Path(stopped.result["path"]).name == f"checkpoint-{stopped.result['step']}.pt"
    assert job.communicate(timeout=SOON)[0].startswith("ended at step")


@needs_torch
def test_the_loop_of_several_ranks_is_controlled(monkeypatch, tmp_path):
    """All ranks end at the same step after a SIGTERM to one of them, with a checkpoint of that step.

    Before that, ``watch`` sees that a rank hangs, though no event can tell it.
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(client_limits, "RANKS_PERIOD", 20 * MS)
    monkeypatch.setattr(client_limits, "RANKS_TIMEOUT", 500 * MS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = subprocess.Popen([*torchrun, EXAMPLES / "ddp_loop.py"], stdout=subprocess.PIPE, text=True)
    until(lambda: live("ddp_loop"), 3 * SOON)
    record = forgather_control.save_checkpoint("ddp_loop", wait="finished", timeout=SOON)
    assert Path(record.result["path"]).parent == tmp_path / "ddp_loop"
    watch = Follower(lambda: target.resolve("ddp_loop"), threading.Event(), asks_ranks=True).start()
    with forgather_control.connect("ddp_loop") as client:
        (other,) = (rank["pid"] for rank in client.call("ranks") if rank["rank"] == 1)
    os.kill(other, signal.SIGSTOP)
    until(lambda: [rank["state"] for rank in watch.ranks] == ["answering", "silent"])
    os.kill(other, signal.SIGCONT)
    until(lambda: [rank["state"] for rank in watch.ranks] == ["answering"] * 2)
    watch.stop()
    os.kill(other, signal.SIGTERM)
    said = job.communicate(timeout=2 * SOON)[0]
    (step,) = set(re.findall(r"rank \d ended at step (\d+)", said))
    assert said.count("ended at step") == 2 and (tmp_path / "ddp_loop" / f"checkpoint-{step}.pt").exists()


@needs_torch
@needs_transformers
def test_the_hugging_face_example_is_controlled(tmp_path):
    """The real Trainer saves on request although its save_strategy is "no"."""
    job = start(EXAMPLES / "hf_trainer.py", str(tmp_path))
    until(lambda: live("hf_trainer"), 4 * SOON)
    with forgather_control.connect("hf_trainer") as client:
        sampled = client.command("user.sample", prompt="x = ", length=8, wait="finished", timeout=SOON)
    assert sampled.result["value"].startswith("x = ") and len(sampled.result["value"].encode()) >= 12
    record = forgather_control.save_and_stop("hf_trainer", wait="finished", timeout=SOON)
    assert (Path(record.result["path"]) / "trainer_state.json").exists()
    assert f"ended at step {record.result['step']}" in job.communicate(timeout=2 * SOON)[0]


@needs_torch
@needs_lightning
def test_the_lightning_example_is_controlled(tmp_path):
    """The real Trainer saves on request although its own checkpoints are off."""
    job = start(EXAMPLES / "lightning_trainer.py", str(tmp_path))
    until(lambda: live("lightning_trainer"), 4 * SOON)
    record = forgather_control.save_and_stop("lightning_trainer", wait="finished", timeout=SOON)
    assert Path(record.result["path"]).parent == tmp_path / "checkpoints" and Path(record.result["path"]).is_file()
    assert f"ended at step {record.result['step']}" in job.communicate(timeout=2 * SOON)[0]


@needs_mcp
def test_the_assistant_reads_and_is_refused_and_saves():
    """It prints the exchange that docs/assistants.md shows, numbers and paths aside; the checkpoint is on disk."""
    done = subprocess.run([sys.executable, EXAMPLES / "assistant.py"], capture_output=True, text=True, timeout=5 * SOON)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (ROOT / "docs" / "assistants.md").read_text()
    shown = re.search(r"<!-- transcript -->\n```text\n(.*?)```", page, re.DOTALL)[1]
    assert lines_without_numbers(done.stdout) == lines_without_numbers(shown)
    assert done.stdout.endswith(" is on disk: True\n")


def lines_without_numbers(text: str) -> list[str]:
    return re.sub(r'/[^"]*|-?\d[\d.e-]*', "#", text).splitlines()


@needs_torch
def test_the_sweep_keeps_the_best_run():
    """The diverging and the slow run are aborted, the best one is stopped."""
    done = subprocess.run([sys.executable, EXAMPLES / "sweep.py"], capture_output=True, text=True, timeout=5 * SOON)
    assert done.returncode == 0, done.stderr
    assert (
        "sweep-10: aborted by its own rule" in done.stdout and "sweep-0.01: learning rate 0.01 -> 0.001" in done.stdout
    )
    assert re.search(r"paused by rule 2.*\nbest: sweep-0.01, graceful_stop finished at step \d+\n$", done.stdout)


def wire_lines() -> tuple[list[str], list[str]]:
    """Return the lines that set up the shell, and those that send a request."""
    blocks = re.findall(r"```sh\n(.*?)\n```", (EXAMPLES / "wire.md").read_text(), re.DOTALL)
    asks = [block for block in blocks if not block.startswith(("cd ", "PORT="))]
    return [block for block in blocks if block not in asks], asks


def test_all_lines_of_the_wire_page_are_run():
    """No line of the page is left out: two set up the shell, and run before each of the eleven requests."""
    prepare, asks = wire_lines()
    assert (len(prepare), len(asks)) == (2, 11)
    assert (EXAMPLES / "wire.md").read_text().count("```") == 2 * (2 + 11)


@needs("socat")
@needs("nc")
@needs("openssl")
@pytest.mark.parametrize("line", wire_lines()[1])
def test_the_lines_of_the_wire_page_work(line, jobs_dir, pem, monkeypatch):
    """Each line is answered with strict JSON and no error; a notification is carried out."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)  # request files are read at once
    tls = {"certfile": pem.cert, "keyfile": pem.key} if "CERT" in line else {}
    with running_loop("my_experiment", port=0, **tls) as run:
        script = "\n".join([*wire_lines()[0], line]).replace("~/.config/forgather/jobs", str(jobs_dir))
        done = subprocess.run(
            script, shell=True, capture_output=True, timeout=SOON, env={**os.environ, "CERT": pem.cert}
        )
        assert done.returncode == 0, done.stderr
        if '"method"' in line and '"id"' not in line:
            assert done.stdout == b""
            run.thread.join(SOON)
            assert run.job.should_stop
            return
        *first, last = done.stdout.splitlines(keepends=True)
        assert [strict(answer)["result"]["job_id"] for answer in first] == ["my_experiment"] * ("TOKEN" in line)
        reply = strict(last)
        for answer in reply if isinstance(reply, list) else [reply]:
            assert "result" in answer, answer
        if "finished" in line:
            assert Path(reply["result"]["result"]["path"]).is_dir()


@needs_torch
def test_the_demo_survives_its_terminal(tmp_path):
    """Ctrl-C ends the demo and leaves no job behind."""
    job = start(DEMO, "--job-id", "demo", "--output-dir", str(tmp_path))
    until(lambda: live("demo"), 2 * SOON)
    job.send_signal(signal.SIGINT)
    job.communicate(timeout=SOON)
    assert job.returncode != 0 and cli("list").stdout.startswith("no jobs")
