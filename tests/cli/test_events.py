"""The verb ``events``: the log of live, dead and ended jobs, from a moment on, and followed until the end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

import forgather_control
from forgather_control.cli import parser
from forgather_control.jobs import event_log

from ..support.harness import ROOT, SOON, cli, job_process, running_loop, until


def told(*words):
    """The events that a call prints as JSON, and the call."""
    done = cli("events", *words, "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [line for line in lines if "kind" in line], done


def seqs(events):
    return [event["seq"] for event in events]


def test_a_live_job(jobs_dir):
    """All events so far, each once, in order, without those that are sampled."""
    with running_loop():
        forgather_control.save_checkpoint("job", wait="finished", reason="why")
        events, done = told("job")
        assert done.returncode == 0 and seqs(events) == [*range(1, len(events) + 1)]
        assert {"phase", "command", "checkpoint"} <= {event["kind"] for event in events} <= {*event_log.LOGGED}
        lines = cli("events").stdout.splitlines()
        assert len(lines) == len(events) and any("save accepted, by " in line for line in lines)


def test_a_live_job_over_its_socket_alone(jobs_dir):
    """Without its files the job tells what it remembers; sampled events do not count."""
    with running_loop(), forgather_control.connect("job") as other:
        watched = other.events()
        until(lambda: next(watched)["kind"] == "progress")
        forgather_control.save_checkpoint("job", wait="finished")
        whole, _ = told("job")
        events, done = told("--connect", f"unix:{jobs_dir}/job/control.sock")
        assert done.returncode == 0 and seqs(events) == seqs(whole)


def test_followed_to_the_end(jobs_dir):
    """From the file to what happens now, without a gap; the end of the job is the end of it."""
    with running_loop() as run:
        forgather_control.save_checkpoint("job", wait="finished")
        words = [sys.executable, "-m", "forgather_control", "events", "job", "--follow", "--json", "--since", "1h"]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        events = [json.loads(process.stdout.readline())]
        while events[-1]["kind"] != "checkpoint":
            events.append(json.loads(process.stdout.readline()))
        step = forgather_control.save_checkpoint("job", wait="finished").applied_at_step
        forgather_control.graceful_stop("job", wait="finished")
        events += map(json.loads, process.communicate(timeout=SOON)[0].splitlines())
        run.thread.join(SOON)
    assert process.returncode == 0 and seqs(events) == [*range(1, len(events) + 1)]
    assert events[-1]["kind"] == "ended"
    assert step in [event["step"] for event in events if event["kind"] == "checkpoint"]


def test_interrupted(jobs_dir):
    """Ctrl-C ends following, with the exit code of an interrupt and without a word."""
    with running_loop():
        call = "from forgather_control.__main__ import control; control()"
        hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also in the background
        words = [sys.executable, "-c", f"{hears}; {call}", "events", "job", "--follow"]
        process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.readline()
        forgather_control.save_checkpoint("job", wait="finished")
        until(lambda: "checkpoint" in process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SOON)[1] == "" and process.returncode == 130


def test_since(jobs_dir):
    """What is older is left out."""
    with running_loop():
        forgather_control.save_checkpoint("job", wait="finished")
        path = jobs_dir / "job" / "events.jsonl"
        until(lambda: "checkpoint" in path.read_text())
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines[:2]:
            line["time"] -= 3600
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert seqs(told("job", "--since", "30m")[0])[: len(lines) - 2] == seqs(lines)[2:]
        assert seqs(told("job", "--since", "2h")[0])[: len(lines)] == seqs(lines)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("1.5m", 90), ("1h", 3600), ("2d", 172_800), ("0", 0)]
)
def test_times(text, seconds):
    """In seconds, minutes, hours or days."""
    assert parser.parse(["events", "--since", text], "x").since == seconds


@pytest.mark.parametrize("text", ["", "h", "1 h", "-1h", "1w", "nan", "1e3", "now", "9" * 10])
def test_what_is_no_time(text):
    """An error of usage."""
    with pytest.raises(SystemExit):
        parser.parse(["events", f"--since={text}"], "x")


def test_a_killed_job(jobs_dir):
    """What it wrote, and that it is dead; after the clean-up the same, marked as ended."""
    with job_process() as victim:
        forgather_control.save_checkpoint("job", wait="finished")
        until(lambda: '"checkpoint","step"' in (jobs_dir / "job" / "events.jsonl").read_text())
        victim.kill()
    before, done = told("job")
    assert done.returncode == 4 and "is dead" in done.stderr and before[-1]["kind"] == "checkpoint"
    forgather_control.cleanup()
    after, done = told("job", "--follow")
    assert done.returncode == 0 and after == before and done.stderr.startswith("job has ended: died at ")


def test_an_ended_job(jobs_dir):
    """All of it, with the end, and one line on stderr that says so."""
    with forgather_control.TrainingJob("job") as job:
        job.step(1)
    events, done = told("job")
    assert done.returncode == 0 and done.stderr.startswith("job has ended: finished at ")
    assert events[-1]["kind"] == "ended" and seqs(events) == [*range(1, len(events) + 1)]
    assert told("nobody")[1].returncode == 3


def test_a_log_that_cannot_be_believed(jobs_dir):
    """It is not shown, and the job itself tells what it remembers."""
    with running_loop():
        path = jobs_dir / "job" / "events.jsonl"
        until(path.exists)
        path.chmod(0o622)
        events, done = told("job")
        assert done.returncode == 0 and events[0]["seq"] == 1 and "other users" in done.stderr
