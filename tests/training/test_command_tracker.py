"""Applied commands: each ends as its row of the table declares, once all ranks have done their part."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial

import pytest

from forgather_control.errors import CommandFailed, CommandRefused, JobEnding
from forgather_control.training.command_queue import CommandQueue
from forgather_control.training.command_tracker import CommandTracker
from forgather_control.training.loop_actions import RequestedActions
from forgather_control.training.progress import RunState
from forgather_control.training.settings import Change
from forgather_control.wire.builtin import BUILTIN
from forgather_control.wire.methods import COMMON, Method, MethodTable
from forgather_control.wire.records import ScheduledCommand

from ..support.harness import MS, SOON


class Group:
    """A rank group that records what this rank sent, and lets the test act for the other rank."""

    size = 2

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.sent = []
        self.verdict = None
        self.callbacks = {}

    def applied(self, commands, step, outcomes):
        """As ``RankGroup``."""
        self.sent.append(("applied", [command.command_id for command in commands], step, outcomes))

    def settle(self):
        """As ``RankGroup``."""
        return self.verdict

    def report(self, command_id, outcome):
        """As ``RankGroup``."""
        self.sent.append(("report", command_id, outcome))

    def when_reported(self, command_id, callback):
        """As ``RankGroup``; the test decides when the others have reported."""
        self.callbacks[command_id] = callback

    def obstacle(self):
        """As ``RankGroup``."""

    def close(self, seconds, fault):
        """As ``RankGroup``."""

    def all_report(self, outcomes=None, fault=None):
        """All ranks have reported for everything."""
        mine = {command_id: outcome for kind, command_id, outcome in filter(lambda s: s[0] == "report", self.sent)}
        while self.callbacks:
            command_id, callback = self.callbacks.popitem()
            callback({0: mine.get(command_id, {}), **(outcomes or {})}, fault)


def method(name, *finishes_when, run=lambda loop: None, combine=None):
    """A command that a job could add."""
    return Method(name, "Do it.", COMMON, "CommandRecord", run, frozenset(finishes_when), (), None, combine)


class Rank:
    """One rank's tracker with what it needs."""

    def __init__(self, rank=0, fresh_seconds=0.0, *methods):
        self.queue = CommandQueue(lambda record: None)
        self.methods = MethodTable(BUILTIN)
        for each in methods:
            self.methods.add(each)
        self.state = RunState(0, None, lambda: None)
        self.group = Group(rank)
        self.loop = RequestedActions()
        self.tracker = CommandTracker(
            self.queue, self.methods, self.state, self.loop, lambda: self.group, fresh_seconds
        )

    def apply(self, *names, step=1, outcomes=None, fault=None):
        """Submit each command under its own name, apply them all at one step, and have all ranks acknowledge it."""
        for name in names:
            self.queue.submit(name, name, self.methods[name].own_params(self.methods[name].bind({})))
        commands = self.tracker.take()
        self.tracker.apply(commands, step)
        mine = self.group.sent[-1][3] if self.group.sent[-1][0] == "applied" else {}
        for kind, *facts in self.group.sent:
            if kind == "applied":
                mine = facts[2]
        self.tracker.all_applied(commands, step, {0: mine, **(outcomes or {})}, fault)

    def saved(self, step, path):
        """A checkpoint of this step is complete."""
        self.tracker.finish_save(self.tracker.begin_save(step), path, False)

    def record(self, name):
        """The record of the command that was submitted under its own name."""
        return self.queue.get(name)


# Finished when...


def test_a_save_is_finished_once_every_rank_has_written_its_part():
    """Rank 0's part alone is not enough; the result is that of rank 0."""
    rank = Rank()
    rank.apply("save_checkpoint", step=7)
    rank.saved(7, "/c-7")
    assert rank.record("save_checkpoint").state == "applied"
    assert rank.group.sent[-1] == ("report", "save_checkpoint", {})
    rank.group.all_report()
    record = rank.record("save_checkpoint")
    assert (record.state, record.applied_at_step) == ("finished", 7)
    assert record.result.keys() == {"step", "path", "seconds", "evaluated"} and record.result["path"] == "/c-7"


@pytest.mark.parametrize(
    ("outcomes", "fault", "message"),
    [
        ({1: {"error": {"code": 1, "message": "disk full"}}}, None, "rank 1: disk full"),
        ({}, "rank 1 left", "rank 1 left"),
    ],
)
def test_a_save_that_another_rank_could_not_finish_has_failed(outcomes, fault, message):
    """The record has the other rank's reason, and what rank 0 did save."""
    rank = Rank()
    rank.apply("save_checkpoint")
    rank.saved(1, "/c-1")
    rank.group.all_report(outcomes, fault)
    record = rank.record("save_checkpoint")
    assert (record.state, record.error["message"], record.result["path"]) == ("failed", message, "/c-1")


def test_an_evaluation_is_finished_with_its_metrics():
    """The result has the step, the metrics and the seconds."""
    rank = Rank(0, 0.0, method("user.evaluate", "evaluated"))
    rank.apply("user.evaluate", step=5)
    rank.tracker.evaluated(5, {"eval_loss": 0.5})
    rank.group.all_report()
    record = rank.record("user.evaluate")
    assert record.state == "finished" and record.result["seconds"] >= 0
    assert (record.result["step"], record.result["metrics"]) == (5, {"eval_loss": 0.5})


@pytest.mark.parametrize("command", ["graceful_stop", "save_and_stop", "abort"])
def test_a_stop_is_finished_when_training_has_ended(command):
    """It is not finished before; until then the job is stopping."""
    rank = Rank()
    rank.apply(command, step=3)
    if command == "save_and_stop":
        rank.saved(3, __file__)
    assert rank.state.ending and rank.record(command).state == "applied" and not rank.group.callbacks
    rank.tracker.end(3, None)
    rank.group.all_report()
    path = __file__ if command == "save_and_stop" else None
    record = rank.record(command)
    assert (record.state, record.result["path"], record.result["step"]) == ("finished", path, 3)


@pytest.mark.parametrize(("command", "state"), [("graceful_stop", "finished"), ("save_and_stop", "failed")])
def test_a_checkpoint_that_the_trainer_deletes_is_not_named(tmp_path, caplog, command, state):
    """What a stop saved has gone when training has ended: no path is named, and who asked for a save is told."""
    rank, path = Rank(), tmp_path / "c"
    path.touch()
    rank.apply(command, step=3)
    rank.saved(3, str(path))
    path.unlink()
    rank.tracker.end(3, None)
    rank.group.all_report()
    record = rank.record(command)
    assert (record.state, record.result["path"], record.result["step"]) == (state, None, 3)
    assert (record.error is None) == (state == "finished") and f"{path} was saved, and deleted before" in caplog.text


def test_a_command_may_be_finished_when_it_is_applied():
    """Its result is rank 0's value."""
    rank = Rank(0, 0.0, method("user.count", "applied", run=lambda loop: 5))
    rank.apply("user.count", outcomes={1: {"user.count": {"value": 6}}})
    record = rank.record("user.count")
    assert (record.state, record.result) == ("finished", {"value": 5})


def test_a_command_may_combine_the_values_of_all_ranks():
    """The declaration has the function that makes the result."""
    rank = Rank(0, 0.0, method("user.all", "applied", run=lambda loop: 1, combine=lambda values: {"values": values}))
    rank.apply("user.all", outcomes={1: {"user.all": {"value": 2}}})
    assert rank.record("user.all").result == {"values": {0: 1, 1: 2}}


# Failures...


@pytest.mark.parametrize("error", [ValueError("no\nway"), CommandRefused("no way"), ZeroDivisionError()], ids=repr)
def test_a_failing_effect_fails_its_command_and_no_other(error, caplog):
    """Control continues, and the commands beside it are carried out."""

    def fail(loop):
        raise error

    rank = Rank(0, 0.0, method("user.bad", "applied", run=fail))
    rank.apply("user.bad", "save_checkpoint")
    record = rank.record("user.bad")
    assert (record.state, record.result) == ("failed", None) and rank.loop.save
    assert str(error) in record.error["message"] and rank.record("save_checkpoint").state == "applied"


@pytest.mark.parametrize("value", [object(), {1: {2}}, b"x"], ids=["object", "set", "bytes"])
def test_a_value_that_is_not_json_fails_its_command(value):
    """It could reach neither rank 0 nor a client; control continues."""
    rank = Rank(0, 0.0, method("user.bad", "reported", run=lambda loop: value))
    rank.apply("user.bad", "save_checkpoint")
    record = rank.record("user.bad")
    assert record.state == "failed" and record.error["message"].startswith("user.bad returned a value that is not JSON")
    assert rank.loop.save and rank.record("save_checkpoint").state == "applied"


def test_an_effect_that_fails_on_another_rank_fails_the_command():
    """The record names the rank."""
    rank = Rank()
    failure = {"error": {"code": 1, "message": "ValueError: no"}}
    rank.apply("graceful_stop", outcomes={1: {"graceful_stop": failure}, 2: {"graceful_stop": failure}})
    record = rank.record("graceful_stop")
    assert (record.state, record.error["message"]) == ("failed", "rank 1, 2: ValueError: no")


def test_a_failing_effect_leaves_no_rank_waiting_for_its_report():
    """The rank whose effect failed reports that at once."""

    def fail(loop):
        raise ValueError("no")

    rank = Rank(1, 0.0, method("user.bad", "reported", run=fail))
    rank.tracker.apply([ScheduledCommand("id", "user.bad", {})], 1)
    assert rank.group.sent[-1][:2] == ("report", "id") and "no" in rank.group.sent[-1][2]["error"]["message"]


def test_a_command_that_not_all_ranks_applied_has_failed():
    """The record says so, though some ranks did apply it."""
    rank = Rank()
    rank.queue.submit("abort", "abort")
    rank.tracker.all_applied(rank.tracker.take(), 5, {}, "rank 1 did not acknowledge it")
    record = rank.record("abort")
    assert record.state == "failed" and "not all ranks applied the abort: rank 1" in record.error["message"]


@pytest.mark.parametrize("command", [m.name for m in BUILTIN.values() if m.rank_report not in (None, "reported")])
def test_training_that_raised_fails_what_waited_for_it(command):
    """Each unfinished command says what ended the run."""
    rank = Rank()
    rank.apply(command)
    rank.tracker.close("training ended by ValueError", None, 0.0)
    assert rank.record(command).state == "applied", "that all ranks applied it is recorded first"
    rank.group.all_report()
    rank.tracker.end(1, "training ended by ValueError")
    record = rank.record(command)
    assert record.state == "failed" and "ValueError" in record.error["message"]


def test_the_end_of_training_fails_an_open_save():
    """Without another reason the record says that training ended first."""
    rank = Rank()
    rank.apply("save_checkpoint")
    rank.tracker.close(None, None, 0.0)
    rank.group.all_report()
    assert rank.record("save_checkpoint").error["message"] == "training ended before the checkpoint was saved"


def test_an_abort_fails_the_saves_before_it():
    """No checkpoint is written after it, so the saves will not come."""
    rank = Rank()
    rank.apply("save_checkpoint", "abort")
    rank.group.all_report()
    assert rank.record("save_checkpoint").state == "failed"
    assert "abort" in rank.record("save_checkpoint").error["message"] and rank.record("abort").state == "applied"


@pytest.mark.parametrize("name", ["graceful_stop", "abort"])
def test_a_stop_waits_for_the_end_on_every_rank(name):
    """Each rank reports it when its training has ended, and why if not as it should; rank 0 waits for the others."""
    for reason, fault in ((None, None), ("training ended by ValueError", "rank 1: training ended by ValueError")):
        other, rank = Rank(rank=1), Rank()
        for each in (other, rank):
            each.apply(name)
        other.tracker.close(reason, None, SOON)
        outcome = other.group.sent[-1][2]
        rank.tracker.close(None, None, SOON)
        assert [each.group.sent[-1][:2] for each in (rank, other)] == [("report", name)] * 2
        rank.tracker.end(1, None)
        assert rank.record(name).state == "applied"
        rank.group.all_report({1: outcome})
        assert rank.record(name).state == ("finished" if fault is None else "failed")
        assert fault is None or rank.record(name).error["message"] == fault


def test_a_stop_whose_last_save_fails_has_failed():
    """The record says why; a save after that, which worked, replaces it."""
    for last, fault in ((False, "disk full"), (True, None)):
        rank = Rank()
        rank.apply("graceful_stop")
        rank.tracker.fail_save(rank.tracker.begin_save(1), "disk full")
        if last:
            rank.saved(1, __file__)
        rank.tracker.close(None, None, SOON)
        rank.tracker.end(1, None)
        rank.group.all_report()
        error = rank.record("graceful_stop").error
        assert error is None if fault is None else error["message"] == fault


def test_an_abort_waits_for_no_save_in_the_background():
    """What waits for one has failed, and the end of a run that also stops does not wait either."""
    rank = Rank()
    rank.apply("graceful_stop", "save_checkpoint")
    rank.tracker.begin_save(1)
    rank.apply("abort", step=2)
    rank.group.all_report()
    record = rank.record("save_checkpoint")
    assert record.state == "failed" and "unknown whether the checkpoint was completed" in record.error["message"]
    ending = threading.Thread(target=rank.tracker.close, args=(None, None, 10 * SOON), daemon=True)
    ending.start()
    ending.join(SOON)
    assert not ending.is_alive()


def test_a_forked_child_starts_anew():
    """Its tracker has no commands and another queue, even where a thread of the parent held the lock."""
    rank = Rank()
    rank.apply("save_checkpoint")
    held = threading.Thread(target=rank.tracker._lock.acquire)
    held.start()
    held.join(SOON)
    rank.tracker.abandon(queue := CommandQueue(lambda record: None))
    queue.submit("abort", "id")
    assert [command.command_id for command in rank.tracker.take()] == ["id"]
    assert not rank.tracker.begin_save(1).applied


def test_a_save_that_fails_takes_no_other_stop_with_it():
    """A save-and-stop failed; a stop beside it is finished when training ends."""
    rank = Rank()
    rank.apply("save_and_stop", "graceful_stop")
    rank.tracker.report("saved", "disk full")
    assert rank.group.sent[-1][2]["error"]["message"] == "disk full"
    rank.group.all_report()
    assert rank.record("save_and_stop").state == "failed"
    rank.tracker.end(1, None)
    assert list(rank.group.callbacks) == ["graceful_stop"]
    rank.group.all_report()
    assert rank.record("graceful_stop").state == "finished"


def test_an_interrupt_reaches_training_and_leaves_nobody_waiting():
    """What ran before it is applied, the rest has failed on this rank; then it is raised."""

    def interrupted(loop):
        raise KeyboardInterrupt

    rank = Rank(0, 0.0, method("user.bad", "applied", run=interrupted))
    rank.group.interrupted = lambda *told: rank.group.sent.append(("interrupted", *told[1:]))
    for name in ("graceful_stop", "user.bad", "save_checkpoint"):
        rank.queue.submit(name, name)
    with pytest.raises(KeyboardInterrupt):
        rank.tracker.apply(rank.tracker.take(), 4)
    word, step, outcomes = rank.group.sent[0]
    assert (word, step, set(outcomes)) == ("interrupted", 4, {"user.bad", "save_checkpoint"})
    assert outcomes["user.bad"]["error"]["message"] == "interrupted on this rank by KeyboardInterrupt"
    assert rank.loop.stop and not rank.loop.save and rank.state.ending
    assert rank.group.sent[1][:2] == ("report", "save_checkpoint")


# Another rank...


def test_another_rank_reports_and_keeps_no_records():
    """It runs the same effects and reports its part; the queue is rank 0's."""
    rank = Rank(rank=1)
    commands = [
        ScheduledCommand("id", "save_checkpoint", {"evaluate": False}),
        ScheduledCommand("other", "graceful_stop", {}),
    ]
    rank.tracker.apply(commands, 4)
    assert rank.loop.save and rank.loop.stop and rank.group.sent == [("applied", ["id", "other"], 4, {})]
    rank.saved(4, "/c-4")
    rank.tracker.report("saved")
    rank.tracker.report("saved", "late")
    rank.tracker.end(4, None)
    assert rank.group.sent[1:] == [("report", "id", {})]
    assert rank.group.callbacks == {} and rank.queue.records() == []


@pytest.mark.parametrize("fault", [None, "disk full"])
def test_another_rank_reports_its_own_save_in_the_background(fault):
    """Neither its next step nor the end of its training reports before the save has ended."""
    rank = Rank(rank=1)
    rank.tracker.apply([ScheduledCommand("id", "save_checkpoint", {"evaluate": False})], 4)
    save = rank.tracker.begin_save(4, 4)
    rank.tracker.report("saved")
    assert save.is_enough and [kind for kind, *_ in rank.group.sent] == ["applied"]
    ending = threading.Thread(target=rank.tracker.close, args=(None, None, SOON))
    ending.start()
    if fault is None:
        rank.tracker.finish_save(save, "/c-4", False)
    else:
        rank.tracker.fail_save(save, fault)
    ending.join(SOON)
    ((kind, name, outcome),) = rank.group.sent[1:]
    assert (kind, name) == ("report", "id") and outcome.get("error", {}).get("message") == fault


def test_another_rank_stops_without_a_save_though_it_knows_of_none():
    """Rank 0 alone has a checkpoint that is young enough."""
    rank = Rank(rank=1)
    rank.tracker.apply([ScheduledCommand("id", "save_and_stop", {"evaluate": "auto"}, skip_save=True)], 4)
    assert rank.loop.stop and not rank.loop.save and rank.group.sent[-1] == ("report", "id", {})


def test_a_rank_without_a_part_in_the_checkpoint_reports_at_once():
    """The others do not wait for it."""
    rank = Rank(rank=1)
    rank.tracker.apply([ScheduledCommand("id", "save_checkpoint", {"evaluate": "auto"})], 4)
    rank.tracker.report("saved")
    assert rank.group.sent[-1] == ("report", "id", {})


# Effects that report later, and those that are undone...


def later(rank, name="user.later"):
    """Apply a command whose effect returns a future; return that."""
    future = Future()
    rank.methods.frozen = False
    rank.methods.add(method(name, "reported", run=lambda loop: future))
    rank.apply(name)
    return future


def test_a_future_reports_its_value():
    """The command is applied at its step, and finished when the future is done, on any thread."""
    rank = Rank()
    future = later(rank)
    assert rank.record("user.later").state == "applied"
    thread = threading.Thread(target=future.set_result, args=([1],))
    thread.start()
    thread.join(SOON)
    rank.group.all_report()
    assert rank.record("user.later").result == {"value": [1]}


@pytest.mark.parametrize("value", [ValueError("no"), object(), CommandRefused("no")], ids=["error", "odd", "refused"])
def test_a_future_that_fails_fails_its_command(value):
    """Also with a value that is not JSON."""
    rank = Rank()
    future = later(rank)
    future.set_exception(value) if isinstance(value, Exception) else future.set_result(value)
    rank.group.all_report()
    record = rank.record("user.later")
    assert record.state == "failed" and ("no" in record.error["message"] or "JSON" in record.error["message"])


def test_the_end_of_training_waits_for_a_future_that_runs():
    """One that has not begun is not waited for."""
    rank = Rank()
    running, idle = later(rank), later(rank, "user.idle")
    running.set_running_or_notify_cancel()
    timer = threading.Timer(20 * MS, running.set_result, ["done"])
    timer.start()
    rank.tracker.close(None, None, SOON)
    rank.group.all_report()
    rank.tracker.end(1, None)
    assert rank.record("user.later").result == {"value": "done"}
    assert "before the result was reported" in rank.record("user.idle").error["message"] and not idle.done()


def test_a_future_that_hangs_is_given_up_at_the_end_of_training():
    """The error says after how long."""
    rank = Rank()
    later(rank).set_running_or_notify_cancel()
    rank.tracker.close(None, None, 10 * MS)
    rank.group.all_report()
    assert "its result was not there 0.0" in rank.record("user.later").error["message"]


@pytest.mark.parametrize("why", [None, "rank 1 could not do it"])
def test_an_atomic_command_is_settled_before_training_continues(why):
    """What was done is kept or undone, as all ranks decided."""
    rank, done = Rank(), []
    rank.group.verdict = why
    change = Change(lambda change: done.append("kept"))
    for name in ("first", "second"):
        change.undo.append(partial(done.append, name))
        change.values[name] = {"old": 1, "new": 2}
    rank.methods.add(method("user.atomic", "reported", run=lambda loop: change)._replace(is_atomic=True))
    rank.apply("user.atomic")
    assert done == (["kept"] if why is None else ["second", "first"])
    assert change.done() is (why is not None)
    if why is None:
        change.set_result({"speed": 1})
    rank.group.all_report()
    record = rank.record("user.atomic")
    assert record.state == ("finished" if why is None else "failed") and (why is None or why in record.error["message"])


def test_an_atomic_command_is_the_last_of_its_round():
    """The next round takes what is behind it."""
    rank = Rank()
    rank.methods.add(method("user.atomic", "reported")._replace(is_atomic=True))
    for name in ("abort", "user.atomic", "graceful_stop"):
        rank.queue.submit(name, name)
    assert [command.name for command in rank.tracker.take()] == ["abort", "user.atomic"]
    assert rank.queue.pending
    assert [command.name for command in rank.tracker.take()] == ["graceful_stop"] and not rank.queue.pending


def test_ranks_that_disagree_fail_the_command():
    """The error is that of the method's own comparison."""

    def differ(values):
        raise CommandFailed(f"the ranks disagree: {values}")

    rank = Rank()
    rank.methods.add(method("user.odd", "reported", run=lambda loop: Future(), combine=differ))
    rank.apply("user.odd")
    rank.tracker.report("reported")
    rank.group.all_report({1: {"value": 2}})
    assert rank.record("user.odd").error["message"] == "the ranks disagree: {0: None, 1: 2}"


# The queue...


def test_commands_are_taken_with_their_parameters():
    """What every rank gets is the name, the id and the own parameters."""
    rank = Rank()
    rank.queue.submit("save_checkpoint", "a", {"evaluate": False}, "because")
    assert rank.tracker.take() == [ScheduledCommand("a", "save_checkpoint", {"evaluate": False}, False)]


def test_commands_that_are_put_back_are_taken_again():
    """A round that was called off loses nothing."""
    rank = Rank()
    rank.queue.submit("abort", "abort")
    commands = rank.tracker.take()
    rank.queue.put_back(commands)
    assert rank.tracker.take() == commands == [ScheduledCommand("abort", "abort", {})]


def test_only_a_signals_save_and_stop_skips_its_save():
    """It does so only while the last checkpoint is young enough."""
    rank = Rank(0, 1e6)
    rank.tracker.submit("save_and_stop")
    assert [command.skip_save for command in rank.tracker.take()] == [False], "there is no checkpoint yet"
    rank.saved(2, "/c-2")
    rank.tracker.submit("save_checkpoint")
    rank.queue.submit("abort")
    rank.queue.submit("save_and_stop", None, {"evaluate": "auto"}, None, {"via": "socket"})
    assert [command.skip_save for command in rank.tracker.take()] == [False, False, False]
    rank.tracker.submit("save_and_stop")
    assert [command.skip_save for command in rank.tracker.take()] == [True]


def test_a_stop_that_skips_its_save_names_the_last_checkpoint():
    """It ends as a stop does, and no rank waits for a save."""
    rank = Rank(0, 1e6)
    rank.saved(2, __file__)
    rank.tracker.submit("save_and_stop")
    (command,) = commands = rank.tracker.take()
    rank.tracker.apply(commands, 3)
    assert rank.loop.stop and rank.loop.skip_save and not rank.loop.save
    assert rank.group.sent[-1] == ("report", command.command_id, {})
    rank.tracker.end(3, None)
    rank.group.all_report()
    expected = {"step": 2, "path": __file__, "seconds": 0.0, "evaluated": False}
    assert rank.queue.get(command.command_id).result == expected


def test_an_older_checkpoint_does_not_replace_the_last_one():
    """Nor is one that took long young when it is complete: what it lacks is counted from its step."""
    rank = Rank(0, 1e6)
    save = rank.tracker.begin_save(1)
    rank.saved(2, "/c-2")
    rank.tracker.finish_save(save, "/c-1", False)
    assert rank.tracker._checkpoint[1]["path"] == "/c-2"
    save = rank.tracker.begin_save(3)
    save.since -= 2e6
    rank.tracker.finish_save(save, "/c-3", False)
    rank.tracker.submit("save_and_stop")
    assert [command.skip_save for command in rank.tracker.take()] == [False]


def test_a_signal_that_comes_too_late_is_one_warning(caplog):
    """The queue is closed: nothing is raised into the thread that decides."""
    rank = Rank()
    rank.queue.close(JobEnding("training ended"))
    rank.tracker.submit("abort")
    (warning,) = caplog.records
    assert "Ignored the signal for abort: training ended" in warning.getMessage()


def test_a_rank_that_ends_cleanly_owes_nothing_more():
    """Often only rank 0 saves; an exception on another rank fails the save all the same."""
    for reason, outcome in ((None, {}), ("training ended by ValueError", "error")):
        rank = Rank(rank=1)
        rank.tracker.apply([ScheduledCommand("id", "save_checkpoint", {"evaluate": "auto"})], 4)
        rank.tracker.close(reason, None, 0.0)
        assert rank.group.sent[-1][:2] == ("report", "id")
        assert rank.group.sent[-1][2] == outcome or outcome in rank.group.sent[-1][2]
