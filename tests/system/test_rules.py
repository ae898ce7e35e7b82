"""Rules in real runs: both trainers, a plain loop on two ranks, and the command line."""

from __future__ import annotations

import json

import pytest

from forgather_control import connect

from ..integrations import test_huggingface as hf
from ..integrations import test_lightning as pl
from ..support.harness import cli, needs_lightning, needs_torch, needs_transformers, running_loop, until
from ..support.torchrun import START, Torchrun

pytestmark = [needs_torch, pytest.mark.filterwarnings("ignore")]

STOP = "graceful_stop"


class Last:
    """What the job answers just before it ends."""

    def __init__(self) -> None:
        self.rules: list[dict] = []
        self.commands: list[dict] = []

    def look(self, *args):
        with connect("job") as client:
            self.rules, self.commands = client.call("list_rules"), client.call("list_commands")

    def fired(self):
        """The steps at which rules fired, and at which their commands were applied."""
        return [rule["fired_at_step"] for rule in self.rules], [each["applied_at_step"] for each in self.commands]


# Hugging Face...


def train(folder, rules, model=None, **options):
    """Train with these rules; the step at which it ended, and what was answered last."""
    last = Last()
    callbacks = hf.Watcher(on_train_end=last.look), hf.ours(rules=rules)
    trainer = hf.make(folder, *callbacks, model=model, **options)
    trainer.train()
    return trainer.state.global_step, last


@needs_transformers
def test_evaluations_of_the_trainer(tmp_path):
    """Each counts once, whatever is logged between them; the command is applied after the next step."""
    rules = [{"when": "eval_loss > 1.5 for 2", "do": STOP}]
    step, last = train(tmp_path, rules, eval_strategy="steps", logging_steps=1)
    assert step == 7 and last.fired() == ([6], [7])
    assert last.commands[0]["requested_by"]["via"] == "rule"


@needs_transformers
@pytest.mark.parametrize(
    ("when", "fired", "applied"),
    [
        ("step >= 4", 4, 4),
        ("epoch >= 1", 5, 5),
        ("hours >= 0", 1, 1),
        ("loss < 1e9 and step >= 6", 6, 6),
        ("loss < 1e9", 3, 4),
        ("grad_norm > 0 for 2", 6, 7),
    ],
)
def test_steps_and_logs_of_the_trainer(tmp_path, when, fired, applied):
    """A rule about steps acts at its step, one about logs at the next; the trainer logs every third."""
    step, last = train(tmp_path, [{"when": when, "do": STOP}])
    assert step == applied and last.fired() == ([fired], [applied])


@needs_transformers
def test_nan_that_the_trainer_filters(tmp_path):
    """The rule says so; without the filter it fires at the first log, and nothing is saved after that."""
    rules = [{"when": "loss is nan", "do": "abort"}]
    for filters, expected in ((True, hf.STEPS), (False, 4)):
        model = hf.Tiny()
        model.train_loss = float("nan")
        step, last = train(tmp_path, rules, model, logging_nan_inf_filter=filters, save_strategy="steps")
        assert step == expected
        assert ("logging_nan_inf_filter" in (last.rules[0]["note"] or "")) == filters
    assert last.fired() == ([3], [4])


@needs_transformers
def test_weights_with_rules_are_those_without(tmp_path):
    """Rules that fire a save, and those that never do."""
    rules = [{"when": "step >= 3", "do": "save_checkpoint"}, {"when": "loss > 1e9 or epoch > 100", "do": "abort"}]
    trained = []
    for given in (rules, []):
        trainer = hf.make(tmp_path / str(len(given)), hf.ours(rules=given))
        trainer.train()
        trained.append(hf.weights(trainer.model))
    assert hf.same(*trained) and hf.checkpoints(tmp_path / "2") == {3} and hf.checkpoints(tmp_path / "0") == set()


# Lightning...


def fit(folder, rules, **options):
    """As ``train``."""
    last = Last()
    trainer = pl.make(folder, pl.Watcher(on_train_end=last.look), pl.ours(rules=rules), max_epochs=4, **options)
    pl.fit(trainer, validate=True)
    return trainer.global_step, last


@needs_lightning
@pytest.mark.parametrize(
    ("when", "fired", "applied"),
    [
        ("val_loss > 0 for 2", 10, 11),
        ("val_loss > 7", 10, 11),
        ("step >= 4", 4, 4),
        ("epoch >= 2", 10, 10),
        ("loss >= 0 for 3", 3, 4),
        ("loss is nan or val_loss == 11", 10, 11),
    ],
)
def test_validations_and_steps_of_lightning(tmp_path, when, fired, applied):
    """The trainer shows the last validation beside each batch; it counts once."""
    step, last = fit(tmp_path, [{"when": when, "do": STOP}], log_every_n_steps=1)
    assert step == applied and last.fired() == ([fired], [applied])


# Two ranks...

SCRIPT = """
import json, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from forgather_control import TrainingJob

dist.init_process_group("gloo")
rank, folder = dist.get_rank(), Path(sys.argv[1])
rules = [
    {"when": "step >= 1", "do": "user.note", "params": {"word": "first"}},
    {"when": "loss is nan", "do": "user.note", "params": {"word": "nan"}},
    {"when": "loss is nan for 2 and step >= 20", "do": "graceful_stop"},
    {"when": "loss is nan for 2 and step >= 20", "do": "save_checkpoint"},
]
notes, values = [], {"rate": 1.0}
with TrainingJob("ruled", rules=rules if rank == 0 else [], save_on_stop=False) as job:
    job.setting("rate", get=lambda: values["rate"], set=lambda value: values.update(rate=value))

    @job.command
    def note(context, word: str) -> int:
        notes.append([word, context.step])
        return rank

    step = saved = 0
    while not job.should_stop and step < 100_000:
        step += 1
        dist.all_reduce(torch.ones(1))
        # Rank 1 logs what no rule sees.
        job.log(loss=float("nan") if step >= 10 or rank else 1.0)
        time.sleep(0.002)
        job.step(step)
        if job.should_save:
            saved = step
            if rank == 0:
                (folder / "checkpoint").touch()
                job.saved(folder / "checkpoint")
            if rank == 0 and job.should_stop:
                (folder / "asked").touch()
Path(folder / f"rank-{rank}.part").write_text(json.dumps([notes, step, saved]))
Path(folder / f"rank-{rank}.part").rename(folder / f"rank-{rank}.json")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.once
@pytest.mark.timeout(180)
def test_two_ranks_follow_the_rules_of_rank_0(tmp_path, jobs_dir):
    """Also one of a command of the script that is true before the ranks have compared what each registered."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with Torchrun(str(script), str(tmp_path), ranks=2) as run:
        run.until(lambda: (tmp_path / "rank-0.json").exists() and (tmp_path / "rank-1.json").exists(), START)
        assert run.end(START) == 0
        assert "refused" not in run.output and "Ignored" not in run.output
    said = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    ((first, _), (second, at)), step, saved = said[0]
    assert [first, second] == ["first", "nan"] and at >= 10 and step == saved >= 20


# The command line...


def test_when_of_the_command_line(jobs_dir):
    """A rule is added, shown, fires, and is removed; what is wrong is said before the job is asked, or by it."""
    rate = [8.0]
    settings = {"rate": {"get": lambda: rate[0], "set": lambda value: rate.__setitem__(0, value)}}
    with running_loop("ruled", save_on_stop=False, settings=settings, commands=[double]) as run:
        assert cli("when").stdout == "no rules\n"
        added = cli("when", "ruled", "lss is nan", "abort", "--reason", "it diverged")
        assert added.returncode == 0 and "did you mean loss?" in added.stdout and "ends with this job" in added.stdout
        assert cli("when", "step > 1", "set", "rate=x0.5").returncode == 0
        until(lambda: rate == [4.0])
        assert cli("when", "--not-before", "2", "loss > 0", "run", "double", "n=4").returncode == 0
        until(lambda: len(run.job._controller._queue.records()) == 2)
        listed = cli("when", "ruled").stdout.splitlines()
        assert listed[0] == "1: when lss is nan, abort reason=it diverged" and "fired at step" in listed[2]
        assert any("double n=4" in line and "not before step 2" in line for line in listed)
        shown = cli("status").stdout
        assert "rule 1: when lss is nan, abort" in shown
        rules = json.loads(cli("when", "--json").stdout)
        assert [rule["do"] for rule in rules] == ["abort", "change_settings", "user.double"]
        assert "removed" in cli("when", "--remove", "1").stdout
        assert "rule" not in cli("status").stdout.replace("via rule", "").replace("ruled", "")
        for words, code, text in (
            (["loss >> 1", "stop"], 2, "needs a number, not '>' (character 7)"),
            (["loss > 1", "set", "rate"], 2, "NAME=VALUE"),
            (["loss > 1", "set"], 2, "set needs NAME=VALUE"),
            (["loss > 1", "set", "speed=3"], 1, "there is no setting"),
            (["loss > 1", "run", "triple"], 1, "no command"),
            (["loss > 1", "run", "double", "n=x"], 2, "n must be"),
            (["--remove", "77"], 1, "there is no rule 77; there is 2, 3"),
        ):
            done = cli("when", "ruled", *words)
            assert (done.returncode, text in done.stderr) == (code, True), (words, done.stderr)


def double(n: int) -> int:
    """Double it."""
    return 2 * n
