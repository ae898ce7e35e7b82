"""Rules of real runs: they fire once, at the right step, as ordinary commands."""

from __future__ import annotations

import pytest

from forgather_control import CommandRefused, InvalidParams, MethodNotFound, TrainingJob, connect
from forgather_control.training import limits
from forgather_control.training.rules import declared

JOB = "ruled"


class Loop:
    """A plain loop that the test steps, with a client."""

    def __init__(self, job):
        self.job, self.step = job, 0
        self.client = connect(JOB)

    def steps(self, count=1, **logs):
        """Train some steps, each with these values logged."""
        for _ in range(count):
            self.step += 1
            if logs:
                self.job.log(**logs)
            self.job.step(self.step)

    def add(self, when, do="save_checkpoint", **more):
        """Add a rule."""
        return self.client.call("add_rule", when=when, do=do, **more)

    def commands(self):
        """Which were given, and at which step."""
        return [(each["command"], each["applied_at_step"]) for each in self.client.call("list_commands")]

    def rules(self):
        """All that are listed."""
        return self.client.call("list_rules")


@pytest.fixture
def loop(jobs_dir):
    """A run that has not begun."""
    with TrainingJob(JOB, save_on_stop=False) as job:
        loop = Loop(job)
        yield loop
        loop.client.close()


def test_it_fires_once_and_stays_listed(loop):
    """As an ordinary command that names the rule."""
    loop.steps(loss=1.0)
    rule = loop.add("loss > 2 for 2")
    assert (rule["id"], rule["fired_at_step"], rule["command_id"]) == (1, None, None)
    loop.steps(2, loss=3.0)
    loop.steps(3, loss=3.0)
    (record,) = loop.client.call("list_commands")
    assert record["command"] == "save_checkpoint" and record["applied_at_step"] == 3
    assert record["requested_by"]["via"] == "rule" and record["requested_by"]["pid"] is not None
    assert record["reason"] == "rule 1: loss > 2 for 2"
    (listed,) = loop.rules()
    assert listed["fired_at_step"] == 2 and listed["command_id"] == record["command_id"]
    assert listed == loop.client.call("status")["rules"][0]


def test_it_fires_at_once_if_it_is_true(loop):
    """With the values that were logged last."""
    loop.steps(loss=3.0)
    assert loop.add("loss > 2")["fired_at_step"] == 1
    assert loop.add("step >= 1", "graceful_stop")["fired_at_step"] == 1
    loop.steps()
    assert loop.commands() == [("save_checkpoint", 2), ("graceful_stop", 2)]


@pytest.mark.parametrize(
    ("when", "fired"), [("step >= 4", 4), ("epoch >= 0.5", 5), ("hours >= 0", 0), ("step > 2 and loss < 1", 5)]
)
def test_steps_epochs_and_hours_are_looked_at_after_each_step(loop, when, fired):
    """Whether or not something is logged."""
    rule = loop.add(when)
    for step in range(1, 6):
        loop.job.step(step, epoch=step / 10)
    loop.step = 5
    loop.job.log(loss=0.5)
    loop.steps()
    assert loop.rules()[0]["fired_at_step"] == fired, rule


def test_idle_steps_know_nothing_of_rules_about_metrics(loop):
    """And none of those that have fired."""
    run = loop.job._controller
    loop.add("loss > 2")
    assert run.on_step == [] and run.rules.waiting
    loop.add("step >= 2")
    assert len(run.on_step) == 1
    loop.steps(3)
    assert run.on_step == []
    loop.steps(loss=3.0)
    assert not run.rules.waiting


def test_not_before(loop):
    """Values before it do not count; at that step the last ones do."""
    loop.add("loss > 2 for 2", not_before=3)
    loop.steps(2, loss=3.0)
    assert loop.rules()[0]["fired_at_step"] is None
    loop.steps()
    assert loop.rules()[0]["fired_at_step"] is None
    loop.steps(loss=3.0)
    assert (loop.rules()[0]["fired_at_step"], loop.rules()[0]["not_before"]) == (
        3,
        3,
    ) and loop.job._controller.on_step == []


def test_two_rules_at_one_log_act_in_order(loop):
    """First the save, then the stop."""
    loop.add("loss is nan", "save_checkpoint")
    loop.add("loss is nan", "abort", params={"reason": "it diverged"})
    loop.steps(loss=float("nan"))
    assert loop.job.aborted
    assert [each["reason"] for each in loop.client.call("list_commands")] == ["rule 1: loss is nan", "it diverged"]


def test_with_parameters(loop):
    """They are checked when the rule is added, as those of the command."""
    loop.job.setting("rate", get=lambda: 1.0, set=lambda value: None, maximum=2)
    assert loop.add("step >= 1", "change_settings", params={"changes": {"rate": "x0.1"}})["params"] == {
        "changes": {"rate": "x0.1"}
    }
    for do, params, error, words in [
        ("change_settings", {"changes": {"rate": 3}}, CommandRefused, "rate must be"),
        ("change_settings", {}, InvalidParams, "needs changes"),
        ("save_checkpoint", {"evaluate": 1}, InvalidParams, "evaluate must be"),
        ("save_checkpoint", {"wait": "applied"}, InvalidParams, "a rule takes no wait"),
        ("status", {}, InvalidParams, "status is none"),
        ("user.none", {}, MethodNotFound, "user.none"),
    ]:
        with pytest.raises(error, match=words):
            loop.add("step >= 1", do, params=params)
    assert len(loop.rules()) == 1


def test_what_it_waits_for_is_said(loop):
    """A metric that was never logged, or that only a device knows."""
    assert "loss was never logged so far; the rule ends with this job" in loop.add("loss > 1")["note"]
    loop.steps(loss=0.0, text="x")
    assert loop.rules()[0]["note"] == "the rule ends with this job"
    assert "text is no number of the host" in loop.add("text > 1")["note"]
    loop.job._requested.nan_filter = "the trainer leaves NaN out"
    assert "the trainer leaves NaN out" in loop.add("loss is nan")["note"]


def test_a_command_that_is_refused_when_it_fires(loop):
    """The rule says so, and training continues."""
    loop.add("step >= 1", "pause")
    loop.job._requested.no_pause = "it cannot"
    loop.steps(2)
    (rule,) = loop.rules()
    assert rule["fired_at_step"] == 1 and rule["command_id"] is None and "it cannot" in rule["note"]


def test_remove(loop):
    """By its number; an unknown one is named with those that there are."""
    loop.add("loss > 1")
    loop.add("step > 5")
    assert loop.client.call("remove_rule", id=2)["when"] == "step > 5"
    assert loop.job._controller.on_step == []
    with pytest.raises(InvalidParams, match="there is no rule 2; there is 1"):
        loop.client.call("remove_rule", id=2)


def test_there_are_only_so_many(loop):
    """One that is removed makes room."""
    for _ in range(limits.MAX_RULES):
        loop.add("loss > 1")
    with pytest.raises(CommandRefused, match="32 rules already"):
        loop.add("loss > 1")
    loop.client.call("remove_rule", id=7)
    assert loop.add("loss > 1")["id"] == limits.MAX_RULES + 1


def test_rules_of_the_script(jobs_dir, caplog):
    """They hold from the start; one that this run cannot carry out costs a warning."""
    rules = [{"when": "step >= 2", "do": "graceful_stop"}, {"when": "step >= 1", "do": "user.none"}]
    with TrainingJob(JOB, rules=rules, save_on_stop=False) as job:
        steps = 0
        while not job.should_stop:
            steps += 1
            job.step(steps)
    assert steps == 2 and "Ignored the rule 'step >= 1': no method 'user.none'" in caplog.text


def test_a_rule_of_the_script_gives_a_command_of_the_script(jobs_dir):
    """Which is registered after the rule."""
    said = []
    with TrainingJob(JOB, rules=[{"when": "step >= 2", "do": "user.say", "params": {"text": "x"}}]) as job:

        @job.command
        def say(text: str) -> None:
            """Say it."""
            said.append(text)

        for step in range(1, 5):
            job.step(step)
    assert said == ["x"]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({}, "needs when"),
        ({"when": "loss", "do": "abort"}, "needs one of"),
        ({"when": "loss > 1", "do": "ping"}, "ping is none"),
        ({"when": "loss > 1", "do": "save_checkpoint", "params": {"evaluate": 3}}, "evaluate must be"),
        ({"when": "loss > 1", "do": "abort", "until": 1}, "until"),
        ("loss > 1", "a rule is a mapping"),
    ],
)
def test_wrong_rules_of_a_script(rule, words):
    """They raise where they are written."""
    with pytest.raises(InvalidParams, match=words):
        declared([rule])
