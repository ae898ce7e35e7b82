"""Answers to requests: what each query returns, how commands are checked, and what is refused before any effect."""

from __future__ import annotations

import json
import os
import threading
import time
from types import SimpleNamespace

import jsonschema
import pytest

from forgather_control.client.api import connect
from forgather_control.training import job_queries, limits
from forgather_control.training.controller import Controller
from forgather_control.training.limits import PROCESS_STATS_AGE, STATUS_AGE
from forgather_control.training.loop_actions import RequestedActions
from forgather_control.training.options import ControlOptions
from forgather_control.training.setting import Setting
from forgather_control.wire import schemas
from forgather_control.wire.builtin import BUILTIN
from forgather_control.wire.methods import COMMON, Method

from ..support.harness import MS, SOON, Wire, running_loop, until


class Loop(RequestedActions):
    """A training loop that refuses what the test says."""

    def __init__(self):
        super().__init__()
        self.refuses = {}

    def cannot(self, need, params):
        """As ``builtin.TrainingLoop``."""
        return self.refuses.get(need)


@pytest.fixture
def job():
    """A published controller whose training thread is this one, with a command of its own."""
    controller = Controller(ControlOptions("job"), Loop(), step=0, max_steps=100)
    controller.methods.add(
        Method("user.ask", "Ask.", COMMON, "CommandRecord", lambda loop: 5, frozenset({"applied"}), ("ask",))
    )
    controller.start()
    yield controller
    controller.close()


@pytest.fixture
def wire(job, jobs_dir):
    with Wire(jobs_dir / "job" / "control.sock") as wire:
        yield wire


def give(wire: Wire, method: str, **params) -> dict:
    return wire.call(method, params)["result"]


# Commands...


def test_a_record_has_what_was_asked_by_whom_and_why(job, wire):
    """The caller is the peer of the socket, as the kernel tells it."""
    record = give(wire, "save_checkpoint", evaluate=False, reason="before maintenance")
    assert (record["params"], record["reason"]) == ({"evaluate": False}, "before maintenance")
    assert record["requested_by"].keys() == {"via", "uid", "user", "pid", "program"}
    assert (record["requested_by"]["via"], record["requested_by"]["uid"]) == ("socket", os.getuid())
    assert (record["requested_by"]["pid"], record["requested_by"]["program"][:6]) == (os.getpid(), "python")


def test_a_request_that_is_read_late_is_refused(job, wire):
    """After its expires_at nothing is queued; before it the command is accepted."""
    error = wire.call("abort", {"expires_at": time.time() - 5})["error"]
    assert error["code"] == -32009 and "nothing was done" in error["message"]
    assert give(wire, "list_commands") == []
    assert give(wire, "abort", expires_at=time.time() + 60)["state"] == "accepted"


def test_a_known_command_is_answered_though_it_has_expired(job, wire):
    """A client that asks again with the same id learns what became of it, not that nothing was done."""
    give(wire, "abort", command_id="id")
    assert give(wire, "abort", command_id="id", expires_at=1.0)["state"] == "accepted"


def test_what_the_loop_cannot_do_is_refused_before_it_is_queued(job, wire):
    """The reason is the loop's; nothing is queued, and other commands are accepted."""
    job._loop.refuses = {"ask": "this loop has no answer", "save": "this loop saves nothing"}
    for method, why in (("user.ask", "no answer"), ("save_checkpoint", "saves nothing"), ("save_and_stop", "nothing")):
        error = wire.call(method)["error"]
        assert error["code"] == -32008 and why in error["message"] and error["data"]["needs"]
    assert give(wire, "list_commands") == []
    assert give(wire, "graceful_stop")["state"] == "accepted"


def test_an_added_command_runs_and_its_value_is_the_result(job, wire):
    """It is described by rpc.discover, dispatched, applied, finished."""
    names = [method["name"] for method in give(wire, "rpc.discover")["methods"]]
    assert names == [*BUILTIN, "user.ask"]
    give(wire, "user.ask", command_id="id")
    job.step(1)
    assert give(wire, "get_command", command_id="id")["result"] == {"value": 5}


def test_a_command_that_ranks_do_not_share_is_refused(job, wire):
    """The reason names what differs; once all ranks share it, it is accepted."""
    job._queries.compare([{"user.ask": "1"}, {}])
    assert "rank 1 did not register it" in wire.call("user.ask")["error"]["message"]
    job._queries.compare([{"user.ask": "1"}, {"user.ask": "1"}])
    assert give(wire, "user.ask")["state"] == "accepted"


def test_own_commands_wait_for_the_comparison(job, wire, monkeypatch):
    """Of several ranks one may lack it, which shows at their first step; built-in commands are accepted before."""
    monkeypatch.setattr(job._group, "size", 2)
    error = wire.call("user.ask")["error"]
    assert (
        error["code"] == -32008 and "compare what each registered when their first step has ended" in error["message"]
    )
    assert give(wire, "save_checkpoint")["state"] == "accepted"
    job._queries.compare([{"user.ask": "1"}, {"user.ask": "1"}])
    assert give(wire, "user.ask")["state"] == "accepted"


def test_a_rule_waits_for_a_rank_that_has_not_ended_its_first_step(job, wire, monkeypatch):
    """Its command would be refused, and a rule fires once."""
    monkeypatch.setattr(job._group, "size", 2)
    job._queries.compare([{"user.ask": "1"}, {}])
    assert wire.call("user.ask")["error"]["code"] == -32008 and not job.rules.can_give("user.ask")
    job._queries.compare([{"user.ask": "1"}, {"user.ask": "1"}])
    assert job.rules.can_give("user.ask") and job.rules.can_give("save_checkpoint")
    job._queries.compare([{"user.ask": "1"}, {"user.ask": "2"}])
    assert job.rules.can_give("user.ask")  # which is refused, and the rule's note says why


def test_a_method_that_a_rank_did_not_register_is_unavailable(job):
    """The reason names the ranks; methods that all registered alike are available."""
    job._queries.compare(
        [{"user.a": "1", "user.b": "1"}, {"user.a": "1"}, {"user.a": "1", "user.b": "2", "user.c": "1"}]
    )
    found = {name: why for name, why in job._queries._unavailable.items() if why}
    assert found.keys() == {"user.b", "user.c"}
    assert "rank 1, 2 " in found["user.b"] and "rank 2 " in found["user.c"]


def test_ping_tells_the_time_of_the_jobs_clock(job, wire):
    """Clients compute expires_at from it."""
    assert abs(give(wire, "ping")["time"] - time.time()) < 60


# Answers fit their schemas...


@pytest.mark.parametrize(
    "method", [m for m in BUILTIN.values() if m.name != "authenticate"], ids=lambda method: method.name
)
def test_every_answer_validates(job, wire, method):
    """Each method's answer fits the result schema that rpc.discover publishes."""
    give(wire, "save_checkpoint", command_id="known")
    params = {"command_id": "known"} if method.name in ("get_command", "cancel_command") else {}
    if method.name == "change_settings":
        job.settings.add([Setting("speed", get=lambda: 1, set=lambda value: None)])
        params = {"changes": {"speed": 2}}
    if "rule" in method.name and method.name != "list_rules":
        params = {"when": "step > 1", "do": "abort"} if method.name == "add_rule" else {"id": 1}
        give(wire, "add_rule", when="loss > 1", do="abort")
    reply = wire.call(method.name, params)
    jsonschema.validate(reply["result"], schemas.results()[method.returns])


# Queries...


def test_list_jobs_on_the_wire_needs_no_other_job_to_answer(job, wire, jobs_dir):
    """It judges by processes, calls itself alone live, and shows no secrets."""
    (jobs_dir / "far").mkdir()
    record = {"job_id": "far", "host": "elsewhere", "port": 1, "pid": 1, "started_at": 1.0, "token": "secret"}
    (jobs_dir / "far" / "endpoint.json").write_text(json.dumps(record))
    with running_loop("other"):
        reply = wire.call("list_jobs")
    assert {found["job_id"]: found["state"] for found in reply["result"]} == {
        "job": "live", "other": "running", "far": "foreign"
    }  # fmt: skip
    assert "secret" not in json.dumps(reply)


def test_no_word_of_a_fault_goes_over_the_wire(job, wire, monkeypatch, caplog):
    """An exception in a query is an internal error with nothing of ours in it; the log has the traceback."""
    monkeypatch.setattr(job._queries.queue, "records", lambda: 1 / 0)
    error = wire.call("status")["error"]
    assert error["code"] == -32603 and "ZeroDivision" not in json.dumps(error)
    assert any(record.exc_info for record in caplog.records)
    wire.still_answers()


def test_a_name_that_is_another_process_now_is_not_called_live(job, wire, jobs_dir):
    """The record under our id has another pid: only its process is judged."""
    record = json.loads((jobs_dir / "job" / "endpoint.json").read_text())
    (jobs_dir / "job" / "endpoint.json").write_text(json.dumps({**record, "pid": 1, "process_started_at": None}))
    assert [found["state"] for found in wire.call("list_jobs")["result"]] == ["running"]


# The text of ``status``: up to date, and written once for each change...


class Facts:
    """Counts how often the answer is built and the figures are read."""

    def __init__(self, monkeypatch):
        self.at, self.step, self.built, self.asked = 1000.0, 0, 0, 0
        monkeypatch.setattr(job_queries, "time", SimpleNamespace(monotonic=lambda: self.at))
        self.queries = job_queries.JobQueries(SimpleNamespace(), *[None] * 6, SimpleNamespace(), None)
        monkeypatch.setattr(job_queries.usage, "process_stats", self.figures)
        monkeypatch.setattr(self.queries, "_build_status", self.tell)
        monkeypatch.setattr(self.queries, "mark", lambda: self.step)

    def tell(self):
        self.built += 1
        return {"step": self.step, "at": self.at}

    def figures(self):
        self.asked += 1
        return {"rss": self.asked, "device": None}

    def read(self):
        return json.loads(self.queries.host_status())


@pytest.fixture
def facts(monkeypatch):
    return Facts(monkeypatch)


def test_it_is_written_once_a_change(facts):
    """A thousand requests between two steps cost one writing; the next step shows at once."""
    texts = {facts.queries.host_status() for _ in range(1000)}
    assert len(texts) == 1 and facts.built == facts.asked == 1
    facts.step = 1
    assert facts.read()["step"] == 1
    assert facts.built == 2


def test_time_is_a_change(facts):
    """What depends on the time is never older than ``STATUS_AGE``, though nothing else changes."""
    begin = facts.read()["at"]
    facts.at += 0.9 * STATUS_AGE
    assert facts.read()["at"] == begin
    facts.at += 0.2 * STATUS_AGE
    assert facts.read()["at"] == facts.at


def test_figures_are_asked_for_seldom(facts):
    """However fast training steps, the system is asked seldom; figures that it does not know are null."""
    for _ in range(100):
        facts.step += 1
        assert facts.read().keys() == {"step", "at", "rss", "device"}
    assert facts.asked == 1
    facts.at += PROCESS_STATS_AGE
    assert facts.read()["rss"] == 2


def test_a_change_while_it_is_written_shows_next(facts):
    """The mark is read before the facts, so that a change in between is built again, not missed."""
    tell = facts.tell

    def changing():
        found = tell()
        facts.step = 7
        return found

    facts.queries._build_status = changing
    assert facts.read()["step"] == 0
    assert facts.read()["step"] == 7


def test_what_is_logged_shows_at_once(jobs_dir):
    """A real job: each change of its values is in the next answer, however soon that is asked."""
    with running_loop() as run, connect("job") as job:
        until(lambda: job.call("status")["global_step"] > 0)
        for value in range(50):
            run.job.log(mine=value)
            assert job.call("status")["metrics"]["mine"] == value


class Device:
    """A logged value on a device, which answers when the test lets it."""

    def __init__(self):
        self.answers, self.threads = threading.Event(), []

    def item(self):
        """As a tensor's: reads from the device."""
        self.threads.append(threading.current_thread().name)
        self.answers.wait(SOON)
        return 2.5


def test_a_device_is_read_only_when_a_client_asks_and_never_on_the_server_thread(jobs_dir):
    """Ticks and events do not touch it; status reads it on a thread of its own."""
    value = Device()
    value.answers.set()
    with running_loop() as run:
        run.job.log(mine=value, other=1)
        run.job._controller._server._file_requests.tick()
        until((jobs_dir / "job" / "status.json").exists)
        assert value.threads == []
        with connect("job") as job:
            assert job.call("status")["metrics"].items() >= {"mine": 2.5, "other": 1}.items()
            assert job.call("status")["metrics"]["mine"] == 2.5
    assert value.threads == ["forgather-devices"]


def test_a_device_that_answers_more_slowly_than_the_loop_logs_is_shown(job, wire):
    """Each answer has the value that its reading found, though a later one was logged meanwhile."""

    class Slow:
        def __init__(self, value):
            self.value = value

        def item(self):
            job.log({"mine": Slow(self.value + 1)})  # the next step is faster than the device
            return self.value

    job.log({"mine": Slow(1)})
    for value in (1, 2, 3):
        status = give(wire, "status")
        assert status["metrics"]["mine"] == value and "pending_metrics" not in status


def test_a_hanging_device_silences_nobody(jobs_dir):
    """While it hangs, status answers with what is known and names the rest; other requests are answered at once."""
    value = Device()
    with running_loop() as run, connect("job") as job, connect("job") as other:
        run.job.log(mine=value, other=1)
        answers = []
        thread = threading.Thread(target=lambda: answers.append(job.call("status")))
        thread.start()
        until(lambda: value.threads)
        assert other.call("ping")["pid"] == os.getpid() and other.call("ranks")[0]["state"] == "answering"
        thread.join(SOON)
        assert answers[0]["metrics"]["other"] == 1 and answers[0]["pending_metrics"] == ["mine"]
        assert other.call("status")["pending_metrics"] == ["mine"], "it is not read twice while it hangs"
        value.answers.set()
        until(lambda: other.call("status")["metrics"].get("mine") == 2.5)
    assert value.threads == ["forgather-devices"]


# Settings...


def test_settings_that_could_not_be_read_in_time_say_of_which_step_they_are(job, wire, monkeypatch):
    """As in a long step, or while training evaluates."""
    now = [1.0]
    job.settings.add([Setting("rate", lambda: now[0], lambda value: None)])
    monkeypatch.setattr(limits, "SETTINGS_TIMEOUT", 10 * MS)
    assert give(wire, "list_settings") == [LISTED]  # before the first step
    job.step(1)
    now[0] = 2.0
    job.step(2)
    assert give(wire, "list_settings") == [{**LISTED, "read_at_step": 1}]
    job.step(3)
    assert give(wire, "list_settings") == [{**LISTED, "value": 2.0}]


LISTED = {"name": "rate", "value": 1.0, "type": "number", "minimum": None, "maximum": None, "doc": ""}
