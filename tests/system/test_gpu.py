"""Promises about devices, on a real GPU: ``tox -e gpu``, or ``pytest -m gpu`` where torch finds one."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from forgather_control import ControlError, connect, save_checkpoint

from ..support.harness import SOON, Process, until

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180)]

#: A job that reads the names of its tests' situations from standard input, one per line, and prints what it saw.
LOOP = """
import sys, time
import torch
from torch.profiler import ProfilerActivity, profile
from forgather_control import TrainingJob

x = torch.ones(1024, device="cuda")
torch.cuda.synchronize()
said = iter(sys.stdin.readline, "")

def steps(job, first, count, value=lambda step: x.sum() * step):
    for step in range(first, first + count):
        job.log(loss=value(step))
        job.step(step)

with TrainingJob("job", max_steps=10_000) as job:
    steps(job, 1, 3)
    torch.cuda.synchronize()
    print("ready", flush=True)
    {body}
print("ended", flush=True)
"""


def gpu_job(body: str) -> Process:
    """Start the loop with ``body`` as its training; returns when it has taken its first steps."""
    process = Process(LOOP.replace("{body}", body.strip().replace("\n", "\n    ")))
    assert process.line() == "ready", "".join(process.errors)
    return process


def loss_of(client, wanted=lambda loss: True):
    """Return the loss that ``status`` reports once it is known and as wanted."""

    def known():
        status = client.call("status")
        loss = status["metrics"].get("loss")
        return None if "loss" in status.get("pending_metrics", ()) or not wanted(loss) else loss

    return until(known)


def test_nothing_is_copied_from_the_device_unasked():
    """Two hundred steps that log a tensor copy nothing to the host; one ``status`` does."""
    body = """
for situation in said:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        steps(job, 10, 200)
        if situation == "asked\\n":
            print("logged", flush=True)
            next(said)
    print(sum("DtoH" in event.key for event in seen.key_averages()), flush=True)
"""
    with gpu_job(body) as process, connect("job") as client:
        process.say("unasked")
        assert process.line() == "0"
        process.say("asked")
        assert process.line() == "logged"
        assert loss_of(client) == 1024 * 209
        process.say("")
        assert int(process.line()) > 0


def test_a_device_that_hangs_delays_no_answer():
    """While a kernel runs for seconds, all methods answer, a save is applied, and the metric is pending."""
    body = """
torch.cuda._sleep(int(2e10))  # about ten seconds, on the stream of the training
steps(job, 10, 1)
hanging = torch.cuda.Event()
hanging.record()
print("hangs", flush=True)
step = 10
for _ in said:
    step += 1
    job.step(step)
    if job.should_save:
        job.saved("/")
    print(hanging.query(), flush=True)
"""
    with gpu_job(body) as process, connect("job") as client:
        assert process.line() == "hangs"
        status = client.call("status")
        assert status["pending_metrics"] == ["loss"]
        for method in ("ping", "ranks", "stacks", "status", "list_commands"):
            client.call(method)
        command_id = client.call("save_checkpoint")["command_id"]
        process.say("step")
        assert process.line() == "False", "the device was done before the last answer: this test showed nothing"
        assert client.call("get_command", command_id=command_id)["state"] in ("applied", "finished")
        assert loss_of(client) == 1024 * 10


def test_a_value_of_another_stream_is_read_when_it_is_computed():
    """``status`` never shows what was in the memory before the stream computed the value."""
    body = """
stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
for number in said:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(int(1e9))
        steps(job, 10 + int(number), 1, lambda step: torch.full((), float(number), device="cuda"))
    print("logged", flush=True)
"""
    with gpu_job(body) as process, connect("job") as client:
        for number in range(1, 6):
            process.say(str(number))
            assert process.line() == "logged"
            status = client.call("status")
            while "loss" in status.get("pending_metrics", ()):
                status = client.call("status")
            assert status["metrics"]["loss"] <= number, status
            assert loss_of(client, lambda loss, number=number: loss >= number) == number


@pytest.mark.parametrize("stream", ["None", "torch.cuda.Stream()"])
def test_status_does_not_break_the_capture_of_a_graph(stream):
    """Clients that keep asking do not make a capture fail, on its own stream or on that of the values."""
    body = f"""
stream = {stream}
for _ in said:
    static = torch.zeros(1024, device="cuda")
    for attempt in range(40):
        with torch.cuda.stream(stream):
            steps(job, 10 + attempt, 1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(200):
                static.add_(1)
            job.log(captured=static.sum())
            time.sleep(0.02)
    graph.replay()
    torch.cuda.synchronize()
    print("captured", int(static[0]), flush=True)
"""
    with gpu_job(body) as process, connect("job") as client:
        process.say("capture")
        captured = threading.Event()

        def keep_asking():
            while not captured.is_set():
                try:
                    client.call("status")
                except ControlError:
                    return

        asker = threading.Thread(target=keep_asking)
        asker.start()
        try:
            assert process.line() == "captured 200", "".join(process.errors[-5:])
        finally:
            captured.set()
            asker.join(SOON)
        status = client.call("status")
        assert status["metrics"]["captured"] == "tensor of a graph that is captured"
        assert loss_of(client) == 1024 * 49


def test_memory_of_the_device():
    """``status`` and ``ranks`` name the device and its memory."""
    with gpu_job("for _ in said: pass"), connect("job") as client:
        status = until(lambda: client.call("status"))
        assert status["device"].startswith("cuda:0 "), status
        assert 0 < status["device_memory_bytes"] <= status["device_memory_reserved_bytes"]
        (rank,) = client.call("ranks")
        assert rank["device"] == status["device"]


TRAINER = """
import sys, torch
from transformers import Trainer, TrainingArguments
from forgather_control import TrainerControlCallback

class Data(torch.utils.data.Dataset):
    def __len__(self): return 512
    def __getitem__(self, i):
        x = torch.randn(16, generator=torch.Generator().manual_seed(i))
        return {"x": x, "labels": x.sum()}

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(16, 256), torch.nn.Dropout(0.3), torch.nn.Linear(256, 1))
    def forward(self, x, labels):
        return {"loss": (self.layers(x).squeeze(-1) - labels).square().mean()}

args = TrainingArguments(output_dir=sys.argv[1], max_steps=600, per_device_train_batch_size=16, logging_steps=10,
    seed=1, save_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True,
    full_determinism=True)
torch.manual_seed(0)
model = Model()
callbacks = [TrainerControlCallback("job")] if sys.argv[2] == "controlled" else []
trainer = Trainer(model, args, train_dataset=Data(), eval_dataset=Data(), callbacks=callbacks)
if callbacks:
    print("ready", flush=True)
trainer.train()
import hashlib
digest = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters()))
print(model.layers[0].weight.device, trainer.state.global_step, digest.hexdigest(), flush=True)
"""


def test_saves_and_evaluations_leave_the_same_weights(tmp_path):
    """A run with dropout on the GPU ends with the same weights, with saves and evaluations or without control."""
    alone = subprocess.run(
        [sys.executable, "-c", TRAINER, str(tmp_path / "alone"), "alone"],
        capture_output=True,
        text=True,
        timeout=4 * SOON,
        check=True,
    ).stdout.split()[-3:]
    saves = 0
    with Process(TRAINER, str(tmp_path / "controlled"), "controlled") as process:
        assert process.line() == "ready"
        until(lambda: (tmp_path / "controlled").exists() or process.popen.poll() is not None)
        while process.popen.poll() is None and saves < 5:
            try:
                record = save_checkpoint("job", evaluate=True, wait="finished", timeout=SOON)
            except ControlError:  # not started yet, or ended meanwhile
                time.sleep(0.05)
                continue
            assert record.state == "finished", record
            saves += 1
        line = process.line()
        while line and "cuda" not in line:
            line = process.line()
        assert line.split() == alone
    assert saves > 0
