"""Rules of real runs: they fire once, at the right step, as ordinary commands."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from forgather_control import CommandRefused, InvalidParams, MethodNotFound, TooManyCommands, TrainingJob, connect
from forgather_control.server import limits as server_limits
from forgather_control.training import limits
from forgather_control.training.rules import SCRIPT
from forgather_control.wire.conditions import parse

from ..support.harness import SOON, running_loop, until

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
    assert [each["reason"] for each in loop.client.call("list_commands")] == [
        "rule 1: loss is nan",
        "rule 2: loss is nan: it diverged",
    ]


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
    assert "text is no number, so no rule can see it" in loop.add("text > 1")["note"]
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
    with pytest.raises(TooManyCommands, match="32 rules already; remove one of them first") as caught:
        loop.add("loss > 1")
    assert caught.value.data == {"limit": limits.MAX_RULES}
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


# What it sees...


def test_two_equal_commands_have_two_records(loop):
    """Each change is made, and each record names its rule."""
    rate = [8.0]
    loop.job.setting("rate", get=lambda: rate[0], set=lambda value: rate.__setitem__(0, value))
    for _ in range(2):
        loop.add("loss > 1", "change_settings", params={"changes": {"rate": "x0.5"}})
    loop.steps(loss=2.0)
    loop.steps(2)
    assert rate == [2.0]
    assert [each["state"] for each in loop.client.call("list_commands")] == ["finished"] * 2
    assert len({rule["command_id"] for rule in loop.rules()}) == 2


def test_a_command_of_a_client_is_not_taken_for_that_of_a_rule(loop):
    """Though both wait for the same step."""
    loop.client.call("save_checkpoint")
    assert loop.add("step >= 0")["fired_at_step"] == 0
    by = [each["requested_by"]["via"] for each in loop.client.call("list_commands")]
    assert by == ["socket", "rule"]


def test_a_stop_and_then_a_save(loop, tmp_path):
    """Both at one step: the checkpoint is saved before training ends."""
    loop.add("loss is nan", "graceful_stop")
    loop.add("loss is nan", "save_checkpoint")
    loop.steps(loss=float("nan"))
    assert loop.job.should_stop and loop.job.should_save
    loop.job.saved(tmp_path)
    stop, save = loop.client.call("list_commands")
    assert (stop["applied_at_step"], save["applied_at_step"]) == (1, 1)
    assert save["state"] == "finished" and save["result"]["path"] == str(tmp_path)
    assert save["reason"] == "rule 2: loss is nan"


def test_commands_of_one_log_reach_all_ranks_together(loop, monkeypatch):
    """Else a stop could be applied before the save that came with it, which would then be lost."""
    run, pending = loop.job._controller, []
    loop.add("loss is nan", "graceful_stop")
    loop.add("loss is nan", "pause")
    loop.add("loss is nan", "save_checkpoint")
    loop.job._requested.no_pause = "it cannot"
    told = lambda: pending.append([record.command for record in run._queue.records()])  # noqa: E731
    monkeypatch.setattr(run._group, "command_queued", told)
    loop.steps(loss=float("nan"))
    assert pending == [["graceful_stop", "save_checkpoint"]]
    ids = [rule["command_id"] for rule in loop.rules()]
    assert [record.command_id for record in run._queue.records()] == [ids[0], ids[2]] and ids[1] is None


@pytest.mark.parametrize(
    ("when", "value", "fires"),
    [
        ("loss is nan", float("nan"), True),
        ("loss is nan", 10**400, False),
        ("loss > 1", 10**400, True),
        ("loss > 1", float("inf"), True),
        ("loss > 1", float("nan"), False),
        ("loss != 1", float("nan"), True),
        ("loss < 1", float("-inf"), True),
        ("loss > 0", True, False),
        ("loss > 0", "2", False),
        ("loss is nan", "nan", False),
        ("loss > 0", None, False),
        ("loss > 0", [1.0], False),
        ("train/loss-a.b@5 > 0", 1, True),
    ],
)
def test_values_of_all_kinds(loop, when, value, fires):
    """Numbers count, whatever their size; what is none is left out."""
    loop.add(when)
    loop.steps(**{parse(when).terms[0].name: value})
    assert (loop.rules()[0]["fired_at_step"] is not None) == fires


def test_no_device_is_read(loop):
    """A number that only a device knows has no value for a rule, when it is added, fed or listed."""

    class Number:
        device = SimpleNamespace(type="far")
        is_cuda = False
        numel, detach, clone = (lambda self: 1), (lambda self: self), (lambda self: self)
        reads = 0

        def item(self):
            Number.reads += 1
            return 3.0

    loop.steps(loss=Number(), other=1.0)
    assert "log loss.item() instead" in loop.add("loss > 1 or other > 5")["note"]
    loop.job.log(loss=Number())
    loop.steps(other=2.0)
    assert loop.rules()[0]["fired_at_step"] is None and Number.reads == 0
    loop.steps(other=6.0)
    assert loop.rules()[0]["fired_at_step"] == 2


def test_logged_names_do_not_replace_those_of_a_step(loop):
    """Hugging Face logs "epoch"; a script may log "step" and "hours"."""
    loop.add("loss > 0 and step >= 3")
    loop.add("loss > 0 and epoch >= 1")
    loop.add("loss > 0 and hours > 5")
    loop.add("loss > 0 and step >= 2 for 3")
    loop.job.log(loss=1.0, step=100, epoch=7.0, hours=9)
    assert [rule["fired_at_step"] for rule in loop.rules()] == [None] * 4
    for step in (1, 2, 3, 4):
        loop.job.log(loss=1.0, step=100)
        loop.job.step(step, epoch=step / 4)
    assert [rule["fired_at_step"] for rule in loop.rules()] == [3, 4, None, 4]


def test_steps_that_begin_again(loop):
    """A loop may count anew: a rule is looked at again."""
    loop.job.step(100)
    loop.add("step < 5")
    loop.add("step >= 3 and step <= 10")
    for step in (101, 102, 1, 2, 3):
        loop.job.step(step)
    assert [rule["fired_at_step"] for rule in loop.rules()] == [1, 3]


def test_a_log_with_which_a_rule_begins_counts_once(loop):
    """Where it is added between the moment at which a value is known, and that at which rules are fed."""
    run = loop.job._controller
    held = run.state.log({"loss": 3.0})
    loop.add("loss > 2 for 2")
    run.rules.logged(held)
    assert loop.rules()[0]["fired_at_step"] is None
    loop.steps(loss=3.0)
    assert loop.rules()[0]["fired_at_step"] == 0


def test_a_signal_handler_may_log_while_rules_are_fed(loop):
    """The lock is held by the thread that it interrupts."""
    rules = loop.job._controller.rules
    loop.add("loss > 2")
    with rules._lock:
        loop.job.log(loss=3.0)
    assert loop.rules()[0]["fired_at_step"] == 0


def test_status_shows_each_change_at_once(loop):
    """Though its text is kept as long as nothing changes."""
    loop.client.call("status")
    loop.add("loss > 2")
    (rule,) = loop.client.call("status")["rules"]
    assert rule == loop.rules()[0]
    loop.job.log(loss=3.0)
    assert loop.client.call("status")["rules"][0]["fired_at_step"] == 0
    loop.client.call("remove_rule", id=1)
    assert "rules" not in loop.client.call("status")


def test_a_removed_rule_does_nothing(loop):
    """Once that is answered; one that has fired has given its command."""
    loop.add("loss > 2")
    loop.add("step >= 2")
    waiting, stepped = loop.job._controller.rules.waiting, loop.job._controller.on_step
    loop.client.call("remove_rule", id=1)
    loop.client.call("remove_rule", id=2)
    assert waiting and not stepped
    loop.steps(3, loss=3.0)
    assert loop.commands() == [] and loop.rules() == []


def test_rules_are_added_and_removed_while_training_logs(jobs_dir, monkeypatch):
    """From three clients: each rule fires once or was removed before, and none is lost."""
    monkeypatch.setattr(server_limits, "CPU_SHARE", 1.0)  # else the server would take its time
    with running_loop("busy", step_seconds=0, save_on_stop=False) as run:

        def act(client, found):
            for _ in range(60):
                rule = client.call("add_rule", when="loss > 0 and step >= 0 for 2", do="resume")
                removed = client.call("remove_rule", id=rule["id"])
                if removed["command_id"] is None and removed["fired_at_step"] is None:
                    rule = client.call("add_rule", when="loss < 0", do="abort")
                    assert client.call("remove_rule", id=rule["id"])["fired_at_step"] is None
                found.append(removed)

        found: list[dict] = []
        clients = [connect("busy") for _ in range(3)]
        threads = [threading.Thread(target=act, args=(client, found)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        rule = clients[0].call("add_rule", when="loss > 0 for 3", do="resume")
        until(lambda: clients[0].call("list_rules")[0]["command_id"])
        fired = {each["command_id"] for each in [*found, *clients[0].call("list_rules")]} - {None}
        given = {each["command_id"] for each in clients[0].call("list_commands")}
        assert len(found) == 180 and rule["id"] > 180 and (len(fired) > 200 or fired <= given)
        assert not run.job.aborted
        for client in clients:
            client.close()


# Of the script...


def test_settings_and_commands_that_come_after_the_rule(jobs_dir):
    """A rule that is true from the start waits for the first step, by which they are declared."""
    rate, said = [1.0], []
    rules = [
        {"when": "step >= 0", "do": "change_settings", "params": {"changes": {"rate": 2}}},
        {"when": "hours >= 0", "do": "user.say", "params": {"text": "x", "reason": "why not"}},
    ]
    with TrainingJob(JOB, rules=rules, save_on_stop=False) as job, connect(JOB) as client:
        listed = client.call("list_rules")
        assert [(rule["id"], rule["fired_at_step"], rule["not_before"]) for rule in listed] == [
            (1, None, None),
            (2, None, None),
        ]
        job.setting("rate", get=lambda: rate[0], set=lambda value: rate.__setitem__(0, value))

        @job.command
        def say(text: str, times: int = 2) -> None:
            """Say it."""
            said.append(text * times)

        job.step(1)
        job.step(2)  # what all ranks make or none is the last of its step
        assert rate == [2.0] and said == ["xx"]
        assert [rule["fired_at_step"] for rule in client.call("list_rules")] == [1, 1]
        record = client.call("list_commands")[1]
        assert record["requested_by"] == SCRIPT and record["reason"] == "rule 2: hours >= 0: why not"
        assert client.call("list_rules")[1]["params"] == {"text": "x", "times": 2, "reason": "why not"}


def test_a_value_logged_before_the_first_step_counts(jobs_dir):
    """For a rule of the script, as for one that is added then."""
    with TrainingJob(JOB, rules=[{"when": "loss > 1", "do": "graceful_stop"}], save_on_stop=False) as job:
        job.log(loss=2.0)
        job.step(1)
        assert job.should_stop


def test_rules_that_this_run_cannot_carry_out(jobs_dir, caplog):
    """They cost a warning each at the first step, and are not listed then; the others hold."""
    rules = [
        {"when": "loss > 1", "do": "change_settings", "params": {"changes": {"speed": 2}}},
        {"when": "loss > 1", "do": "user.none"},
        {"when": "loss > 1", "do": "user.say", "params": {"text": 5}},
        {"when": "loss > 1", "do": "graceful_stop"},
    ]
    with TrainingJob(JOB, rules=rules) as job, connect(JOB) as client:
        job.command(name="say")(say_nothing)
        assert len(client.call("list_rules")) == 4
        job.step(1)
        assert [rule["do"] for rule in client.call("list_rules")] == ["graceful_stop"]
        assert job._controller.on_step == []
    warnings = [record.getMessage() for record in caplog.records if "Ignored the rule" in record.getMessage()]
    assert len(warnings) == 3
    for words, warning in zip(("there is no setting", "user.none", "text must be"), warnings):
        assert words in warning


def say_nothing(text: str) -> None:
    """Take a text."""


def test_each_run_of_a_job_has_its_own(jobs_dir):
    """Rules end with a run; those of the script begin anew."""
    job = TrainingJob(JOB, rules=[{"when": "step >= 2", "do": "graceful_stop"}], save_on_stop=False)
    for _ in range(2):
        with job, connect(JOB) as client:
            client.call("add_rule", when="loss > 1", do="abort")
            assert [rule["id"] for rule in client.call("list_rules")] == [1, 2]
            job.step(1)
            assert not job.should_stop
            job.step(2)
            assert job.should_stop


def test_a_rule_waits_until_its_command_can_be_given(loop):
    """With several ranks those of the script are compared at the first step, so they cannot be given at once."""
    rules, allowed = loop.job._controller.rules, []
    rules.can_give = lambda do: bool(allowed)
    loop.add("loss > 1")
    loop.steps(loss=2.0)
    loop.steps(2, loss=0.0)
    (rule,) = loop.rules()
    assert rule["fired_at_step"] is None and "its condition was true" in rule["note"]
    allowed.append(True)
    loop.steps()
    assert loop.commands() == [("save_checkpoint", 4)] and loop.rules()[0]["fired_at_step"] == 4
    assert loop.job._controller.on_step == []


def test_a_full_queue(loop, monkeypatch):
    """The rule says that its command was refused, and training continues."""
    monkeypatch.setattr(limits, "MAX_PENDING", 0)
    loop.add("loss > 1")
    loop.steps(2, loss=2.0)
    (rule,) = loop.rules()
    assert rule["command_id"] is None and "0 save_checkpoint commands are unfinished already" in rule["note"]
