"""Real ranks under torchrun: random commands at random moments, and Hugging Face's Trainer on two ranks.

FORGATHER_RANKS_COMMANDS and FORGATHER_RANKS_SEED choose more of them, and others; ``tox -e ranks`` sends thousands.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import pytest

from forgather_control import ControlError, connect, get_job_status, graceful_stop, save_checkpoint
from forgather_control.client.target import find
from forgather_control.errors import CommandFailed, DeadlinePassed, JobDead, JobEnding, NoSuchJob, NotCancellable

from ..support.harness import SOON, cli, needs_torch, needs_transformers, until
from ..support.ranks_training import Plan, plan
from ..support.torchrun import Torchrun

pytestmark = needs_torch

#: Of all world sizes together.
COMMANDS = int(os.environ.get("FORGATHER_RANKS_COMMANDS", "200"))
SEED = int(os.environ.get("FORGATHER_RANKS_SEED", "20261123"))
SIZES = (1, 2, 4)
#: Commands a job: few are left of a job that the first one stops.
A_JOB = 12
JOBS = max(8, -(-COMMANDS // (A_JOB * len(SIZES))))

#: What a rank does when a command is sent, and how often that is chosen.
MOMENTS = {"before": 2, "training": 3, "evaluating": 3, "saving": 3, "last": 2, "closing": 1}
ENDS = ("graceful_stop", "save_and_stop", "abort")


# Clients...


class Shot(NamedTuple):
    """One client: when it sends what."""

    word: str
    rank: int
    step: int
    command: str
    wait: str
    timeout: float | None
    command_id: str | None
    cancels: bool


class Answer(NamedTuple):
    """What became of it, as the client was told."""

    shot: Shot
    #: What the rank did when it was sent.
    word: str
    record: dict[str, Any] | None
    error: ControlError | None
    #: What ``cancel_command`` answered.
    cancelled: dict[str, Any] | ControlError | None
    #: Whether the checkpoint was complete when the answer came; ``None`` if the answer names none.
    complete: bool | None


def shots_at(job: Plan, size: int) -> list[Shot]:
    """The commands of one job: saves, and at most steps some that end it."""
    dice = random.Random(f"shots {job}")
    found: list[Shot] = []
    moments = {word: weight for word, weight in MOMENTS.items() if word != "evaluating" or job.evaluate_every}
    restless = 0.0 if job.number < 3 or job.breaks[1] else dice.choice([0.0, 0.1, 0.4])  # how readily a client ends it
    first = list(moments) if job.number < 3 else []  # each moment has its turn
    while len(found) < A_JOB:
        word = first.pop() if first else dice.choices(list(moments), list(moments.values()))[0]
        step = dice.randrange(job.steps)
        together = dice.choice([1, 1, 1, 2, 3])
        rank = dice.randrange(size if word != "saving" or job.sharded else 1)
        for _ in range(together):
            ends = dice.random() < restless * (0.1 + step / job.steps) ** 3
            named = word == "before" or dice.random() < 0.7  # those before the first step are looked for
            found.append(
                Shot(
                    word=word,
                    rank=rank,
                    step=step,
                    command=dice.choice(ENDS) if ends else "save_checkpoint",
                    wait=dice.choice(["accepted", "applied", "finished"]),
                    timeout=dice.choice([None, None, 0, 0.003, 0.03]),
                    command_id=f"{job.number}-{len(found)}" if named else None,
                    cancels=dice.random() < 0.25,
                )
            )
    if dice.random() < 0.3:  # twice the same command
        found.append(dice.choice([shot for shot in found if shot.command_id]))
    return found


def complete(path: str, job: Plan, size: int) -> bool:
    """Whether every rank that writes has written."""
    return all((Path(path) / f"rank-{rank}.json").is_file() for rank in range(size if job.sharded else 1))


class Range:
    """The clients of one job, each in a thread, each connected before the first step."""

    def __init__(self, folder: Path, job: Plan, size: int) -> None:
        self.folder, self.job, self.size = folder, job, size
        self.shots = shots_at(job, size)
        self.go = [Event() for _ in self.shots]
        self.words = [""] * len(self.shots)

    def fire(self, index: int, client: Any) -> Answer:
        """On a thread: wait for the moment, send, take the answer."""
        shot = self.shots[index]
        params = {"wait": shot.wait, "timeout": shot.timeout, "command_id": shot.command_id}
        record = error = cancelled = whole = None
        assert self.go[index].wait(3 * SOON)
        with client:
            try:
                record = client.call(
                    shot.command, **{name: value for name, value in params.items() if value is not None}
                )
                if record["state"] == "finished" and record["result"]["path"]:
                    whole = complete(record["result"]["path"], self.job, self.size)
                if shot.cancels:
                    cancelled = self.cancel(client, record["command_id"])
            except ControlError as err:
                error = err
        return Answer(shot, self.words[index], record, error, cancelled, whole)

    @staticmethod
    def cancel(client: Any, command_id: str) -> dict[str, Any] | ControlError:
        """Take it back, or why not."""
        try:
            return client.call("cancel_command", command_id=command_id)
        except ControlError as err:
            return err

    def now(self) -> dict[int, tuple[int, int, str]]:
        """What each rank does: its job, its step, a word."""
        found = dict.fromkeys(range(self.size), (0, 0, ""))
        for rank in range(self.size):
            with contextlib.suppress(FileNotFoundError, ValueError):
                number, step, word = (self.folder / f"now-{rank}").read_text().split()
                found[rank] = (int(number), int(step), word)
        return found

    def release(self) -> None:
        """Let those go whose moment has come, or can no longer come."""
        now = self.now()
        for index, shot in enumerate(self.shots):
            number, step, word = now[shot.rank]
            over = number > self.job.number or word == "over"
            due = word == shot.word and (step >= shot.step or word in ("last", "closing"))
            if not self.go[index].is_set() and (over or due or (word == "closing" and shot.word != "closing")):
                self.words[index] = "over" if over else word
                self.go[index].set()

    def before(self) -> set[str]:
        """Send what comes before the first step."""
        early = [index for index, shot in enumerate(self.shots) if shot.word == "before"]
        for index in early:
            self.words[index] = "before"
            self.go[index].set()
        return {str(self.shots[index].command_id) for index in early}


def play(running: Torchrun, folder: Path, job: Plan, size: int) -> tuple[list[dict[str, Any]], list[Answer]]:
    """One job: what its ranks did, and what its clients were told."""
    clients = Range(folder, job, size)
    running.until(lambda: is_published(job.job_id))
    reports = [folder / f"{job.number}-{rank}.json" for rank in range(size)]
    with ThreadPoolExecutor(len(clients.shots)) as pool:
        try:
            answers: list[Future[Answer]] = [
                pool.submit(clients.fire, index, connect(job.job_id)) for index in range(len(clients.shots))
            ]
            with connect(job.job_id) as client:
                early = clients.before()
                running.until(lambda: early <= {known["command_id"] for known in client.call("list_commands")})
            (folder / f"go-{job.number}").touch()

            def over() -> bool:
                clients.release()
                return all(report.exists() for report in reports) and all(go.is_set() for go in clients.go)

            running.until(over, 4 * SOON)
            return [json.loads(report.read_text()) for report in reports], [one.result(SOON) for one in answers]
        finally:
            for go in clients.go:
                go.set()


def is_published(job_id: str) -> bool:
    """Whether a client can find it."""
    try:
        return find(job_id) is not None
    except ControlError:
        return False


# What must hold...


class Verdict:
    """Holds one job against what is promised."""

    def __init__(self, job: Plan, size: int, reports: list[dict[str, Any]], answers: list[Answer]) -> None:
        self.job, self.size, self.reports, self.answers = job, size, reports, answers
        self.report = reports[0]
        self.applied = {command_id: step for step, calls in self.report["applied"] for command_id, _ in calls}
        self.records = {record["command_id"]: record for record in self.report["records"]}
        self.ended = self.report["steps"]

    def all_ranks_did_the_same(self, undisturbed: dict[str, list[str]]) -> None:
        """The same commands at the same steps, with the same effects, to the same weights."""
        for name in ("applied", "flags", "steps", "aborted", "digest"):
            assert all(report[name] == self.report[name] for report in self.reports), name
        assert self.report["digest"] == undisturbed[str(self.job.sync)][self.ended]
        assert len(self.applied) == sum(len(calls) for _, calls in self.report["applied"]), "applied twice"
        assert self.report["flags"] == [[step, *effects(calls)] for step, calls in self.report["applied"]]
        stopped = any(stop for _, _, stop, _ in self.report["flags"])
        assert self.ended == (self.report["flags"][-1][0] if stopped else self.job.steps)

    def every_record_is_true(self, folder: Path, undisturbed: dict[str, list[str]]) -> None:
        """Each is in a final state, and that state is what happened."""
        assert self.applied.keys() <= self.records.keys()
        for command_id, record in self.records.items():
            state, command = record["state"], record["command"]
            assert state in ("finished", "failed", "cancelled"), record
            assert record["applied_at_step"] == self.applied.get(command_id), record
            if state == "cancelled":
                assert command_id not in self.applied and record["error"] is None, record
            elif state == "failed":
                self.failed_for_a_reason(record)
            elif command == "save_checkpoint":
                assert record["result"]["step"] == record["applied_at_step"], record
                self.is_on_disk(record, undisturbed)
            else:
                assert record["applied_at_step"] == self.ended == record["result"]["step"], record
                if command == "save_and_stop" or record["result"]["path"]:
                    assert command != "abort"
                    self.is_on_disk(record, undisturbed)
        if self.report["aborted"]:
            parts = (folder / self.job.job_id).glob("*/rank-*.json")
            assert all(step_of(part) < self.ended for part in parts), "saved after an abort"

    def it_trained_on_and_nothing_was_lost(self, undisturbed: dict[str, list[str]]) -> None:
        """Where the control of one rank failed: what a record states of all ranks is true of that one, too."""
        assert all(report["steps"] == self.job.steps for report in self.reports)
        assert all(report["digest"] == undisturbed[str(self.job.sync)][self.ended] for report in self.reports)
        lists = sorted((report["applied"] for report in self.reports), key=len)
        assert all(one == lists[-1][: len(one)] for one in lists)
        for record in self.records.values():
            step, call = record["applied_at_step"], [record["command_id"], record["command"]]
            assert record["state"] in ("finished", "failed", "cancelled"), record
            assert record["state"] != "failed" or record["error"]["message"], record
            assert step is None or all(call in dict(report["applied"])[step] for report in self.reports), record
            if record["state"] == "finished":
                self.is_on_disk(record, undisturbed)

    def failed_for_a_reason(self, record: dict[str, Any]) -> None:
        """A failure says why, and that is why."""
        why, step = record["error"]["message"], record["applied_at_step"]
        if step is None:
            assert "ended before the command could be applied" in why, record
        elif self.report["aborted"] and step == self.ended and record["command"] != "abort":
            assert "abort was applied" in why or "ended before the checkpoint was saved" in why, record
        else:
            assert "there is none" in why and self.job.loses >= 0 and step % 2, record
            assert record["command"] == "save_checkpoint" or step == self.ended

    def is_on_disk(self, record: dict[str, Any], undisturbed: dict[str, list[str]]) -> None:
        """Every writer's part, of the right step, with the weights that the training had then."""
        step, path = record["result"]["step"], Path(record["result"]["path"])
        assert complete(str(path), self.job, self.size) and path.is_absolute(), record
        for part in path.glob("rank-*.json"):
            assert json.loads(part.read_text()) == {"step": step, "digest": undisturbed[str(self.job.sync)][step]}

    def every_client_was_told(self) -> None:
        """Each has an answer, and it is the truth of its time."""
        for answer in self.answers:
            shot, record = answer.shot, answer.record
            if record is None:
                self.refused_for_a_reason(answer)
                continue
            final = self.records[record["command_id"]]
            # Another client's equal command is the same command, and may be further on.
            unfinished = {"accepted": ("accepted", "applied"), "applied": ("applied",), "finished": ()}[shot.wait]
            assert record == final or record["state"] in unfinished, (answer, final)
            assert record["applied_at_step"] in (None, final["applied_at_step"]), (answer, final)
            assert record["state"] != "applied" or record["applied_at_step"] is not None
            assert answer.complete is not False, answer
            if isinstance(answer.cancelled, dict):
                assert final["state"] == "cancelled" and final == answer.cancelled, answer
            elif answer.cancelled is not None:
                assert isinstance(answer.cancelled, NotCancellable | JobDead), answer

    def refused_for_a_reason(self, answer: Answer) -> None:
        """Without a record it is too early, or the job has ended."""
        shot, error = answer.shot, answer.error
        if isinstance(error, DeadlinePassed):
            assert shot.timeout is not None and error.data["command_id"] in self.records, answer
        else:
            assert isinstance(error, (JobEnding, JobDead, NoSuchJob)), answer
            # A command with a record was accepted, and every accepted command gets an answer.
            assert shot.command_id not in self.records or answer.word == "over", answer


def effects(calls: list[list[str]]) -> list[bool]:
    """What the loop sees of commands applied at one step: should_save, should_stop, aborted."""
    names = {command for _, command in calls}
    aborts = "abort" in names
    saves = bool(names & {"save_checkpoint", "save_and_stop", "graceful_stop"}) and not aborts
    return [saves, bool(names & {"graceful_stop", "save_and_stop", "abort"}), aborts]


def step_of(path: Path) -> int:
    """Of a rank's part of a checkpoint."""
    return int(json.loads(path.read_text())["step"])


@pytest.mark.timeout(120 + 10 * JOBS)
@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_apply_the_same_commands_at_the_same_steps(tmp_path, jobs_dir, size):
    """Commands of all kinds, at all moments, in jobs of all kinds: the same on every rank, and every record is true."""
    told: Counter[str] = Counter()
    moments: Counter[str] = Counter()
    with Torchrun("-m", "tests.support.ranks_training", str(tmp_path), str(SEED), str(JOBS), ranks=size) as running:
        weights = [tmp_path / f"undisturbed-{rank}.json" for rank in range(size)]
        running.until(lambda: all(path.exists() for path in weights))
        undisturbed = json.loads(weights[0].read_text())
        assert all(json.loads(path.read_text()) == undisturbed for path in weights)
        for number in range(1, JOBS + 1):
            job = plan(SEED, number, size)
            verdict = Verdict(job, size, *play(running, tmp_path, job, size))
            try:
                if job.breaks[1]:
                    verdict.it_trained_on_and_nothing_was_lost(undisturbed)
                else:
                    verdict.all_ranks_did_the_same(undisturbed)
                    verdict.every_record_is_true(tmp_path, undisturbed)
                verdict.every_client_was_told()
            except AssertionError:
                print(job, *(report["applied"] for report in verdict.reports), *verdict.report["records"], sep="\n")
                raise
            told.update(record["state"] for record in verdict.records.values())
            moments.update(answer.word for answer in verdict.answers if answer.record is not None)
        assert running.end() == 0
    print(f"{size} ranks, {JOBS} jobs: {dict(told)} at {dict(moments)}")
    assert [path for path in jobs_dir.iterdir() if path.is_dir() and path.name != ".ended"] == []
    # It covered all ends of a record, at all moments.
    assert told.keys() == {"finished", "failed", "cancelled"} and moments.keys() >= MOMENTS.keys()


# Ranks that go...

DOOMED = """
import os, pathlib, signal, sys, time
import torch.distributed as dist
from forgather_control import TrainingJob

dist.init_process_group("gloo")
with TrainingJob("doomed") as job:
    for step in range(1, 1_000_000):
        time.sleep(0.002)
        dist.barrier()
        job.step(step)
        if job.should_save:
            pathlib.Path(f"saving-{dist.get_rank()}").touch()
            while dist.get_rank() == 1:
                if pathlib.Path("doom").exists():
                    if sys.argv[1] == "raises":
                        raise RuntimeError("doom")
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.002)
            dist.barrier()
"""


@pytest.mark.parametrize("fate", ["raises", "is_killed"])
def test_no_client_waits_for_a_rank_that_is_gone(tmp_path, fate):
    """A client that waits for a checkpoint, or for a step that is never reached, gets an error."""
    (tmp_path / "doomed.py").write_text(DOOMED)
    script = str(tmp_path / "doomed.py")
    with Torchrun(script, fate, ranks=2, cwd=tmp_path) as running, ThreadPoolExecutor(2) as pool:
        running.until(lambda: is_published("doomed"))
        saves = pool.submit(save_checkpoint, "doomed", wait="finished")
        running.until(lambda: all((tmp_path / f"saving-{rank}").exists() for rank in range(2)))
        stops = pool.submit(graceful_stop, "doomed", wait="applied")
        with connect("doomed") as client:
            running.until(lambda: len(client.call("list_commands")) == 2)
        (tmp_path / "doom").touch()
        for waits in (saves, stops):
            assert isinstance(waits.exception(2 * SOON), (JobDead, CommandFailed))
        assert running.end(2 * SOON) != 0


# Hugging Face's Trainer...


class Trainer:
    """One job of ranks_hf, seen from another terminal."""

    def __init__(self, running: Torchrun, folder: Path, name: str) -> None:
        self.running, self.folder, self.name = running, folder, name
        running.until(lambda: is_published(name))
        running.until(lambda: self.status()["global_step"] > 12)

    def status(self) -> dict[str, Any]:
        """As it answers."""
        return get_job_status(self.name)

    def give(self, *words: str) -> dict[str, Any]:
        """A verb of the command line, and the record that it prints."""
        done = cli(words[0], self.name, "--timeout=60", "--json", *words[1:])
        assert done.returncode == 0, done.stderr
        record = json.loads(done.stdout)
        assert record["state"] == "finished", record
        return record

    def is_saved(self, record: dict[str, Any], step: int) -> None:
        """Assert that there is a whole checkpoint of that step."""
        path = Path(record["result"]["path"])
        assert record["result"]["step"] == step and path == self.folder / self.name / f"checkpoint-{step}"
        assert json.loads((path / "trainer_state.json").read_text())["global_step"] == step
        assert (path / "model.safetensors").is_file() and (path / "optimizer.pt").is_file()

    def end(self, step: int) -> dict[str, Any]:
        """What both ranks saw of it, which is the same, and ended at ``step``."""
        reports = [self.folder / f"{self.name}-{rank}.json" for rank in range(2)]
        self.running.until(lambda: all(report.exists() for report in reports))
        one, other = (json.loads(report.read_text()) for report in reports)
        assert one == other and one["steps"] == step
        return one


@pytest.mark.timeout(240)
@needs_transformers
def test_hugging_face_trains_on_two_ranks(tmp_path):
    """Every command does on both ranks what it says, whatever rhythm each of them logs in."""
    with Torchrun("-m", "tests.support.ranks_hf", str(tmp_path), ranks=2) as running:
        job = Trainer(running, tmp_path, "rank-0-logs")
        until(lambda: "of_rank_0" in job.status()["metrics"])
        saved = job.give("save")
        job.is_saved(saved, saved["applied_at_step"])
        stopped = job.give("stop")
        assert stopped["result"]["path"] is None
        assert job.end(stopped["applied_at_step"])["saves"] == [saved["applied_at_step"]]

        job = Trainer(running, tmp_path, "both-log")
        stopped = job.give("stop")
        job.is_saved(stopped, stopped["applied_at_step"])
        assert job.end(stopped["applied_at_step"])["saves"][-1] == stopped["applied_at_step"]

        job = Trainer(running, tmp_path, "best")
        saved = job.give("save")
        job.is_saved(saved, saved["applied_at_step"])
        stopped = job.give("save-stop")
        job.is_saved(stopped, stopped["applied_at_step"])
        report = job.end(stopped["applied_at_step"])
        assert {saved["applied_at_step"], stopped["applied_at_step"]} <= {*report["saves"]} & {*report["evaluations"]}

        job = Trainer(running, tmp_path, "no-strategy")
        stopped = job.give("save-stop")
        job.is_saved(stopped, stopped["applied_at_step"])
        assert job.end(stopped["applied_at_step"])["saves"] == [stopped["applied_at_step"]]

        job = Trainer(running, tmp_path, "aborted")
        aborted = job.give("abort", "--force")
        report = job.end(aborted["applied_at_step"])
        assert report["aborted"] and all(step < aborted["applied_at_step"] for step in report["saves"])
        assert running.end() == 0
        steps = {int(path.name.rpartition("-")[2]) for path in (tmp_path / "aborted").iterdir()}
        assert steps == set(report["saves"])
