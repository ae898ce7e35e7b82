"""The event log: numbered, bounded, and exact about what a slow subscriber lost."""

from __future__ import annotations

import json
import threading

import pytest

from forgather_control import states
from forgather_control.training import limits
from forgather_control.training.events import EventLog

from ..support.harness import strict

FAR = 1 << 20


@pytest.fixture
def clock(monkeypatch):
    """The log's clock, which the test moves."""
    from types import SimpleNamespace

    from forgather_control.training import events

    now = SimpleNamespace(at=100.0)
    monkeypatch.setattr(events, "time", SimpleNamespace(monotonic=lambda: now.at, time=lambda: 1.5))
    return now


def read(subscriber, size=FAR):
    """The parameters of the notifications that are pulled."""
    lines = subscriber.pull(size).splitlines(keepends=True)
    found = [strict(line) for line in lines]
    assert all(note.keys() == {"jsonrpc", "method", "params"} and note["method"] == "event" for note in found)
    return [note["params"] for note in found]


def test_events_are_numbered_and_have_their_facts(clock):
    """Each has seq, time and kind, and what happened."""
    log = EventLog()
    subscriber = log.subscribe(None, None)
    log.publish("phase", phase="saving")
    log.publish("checkpoint", step=3, path="/c")
    assert read(subscriber) == [
        {"seq": 1, "time": 1.5, "kind": "phase", "phase": "saving"},
        {"seq": 2, "time": 1.5, "kind": "checkpoint", "step": 3, "path": "/c"},
    ]
    assert read(subscriber) == []


@pytest.mark.parametrize(("since", "expected"), [(None, [5]), (0, [1, 2, 3, 4, 5]), (3, [4, 5]), (4, [5]), (99, [5])])
def test_replay_from_a_number(since, expected):
    """A subscriber gets the kept events after ``since``, or only new ones, also with a number of another run."""
    log = EventLog()
    for number in range(4):
        log.publish("phase", phase=str(number))
    subscriber = log.subscribe(since, None)
    assert log.next_seq == 5
    log.publish("phase", phase="last")
    assert [event["seq"] for event in read(subscriber)] == expected


def test_only_the_kinds_that_were_asked_for():
    """Other kinds are skipped, and are not called lost."""
    log = EventLog()
    subscriber = log.subscribe(0, ["checkpoint"])
    for step in range(3):
        log.publish("phase", phase="saving")
        log.publish("checkpoint", step=step)
    found = read(subscriber)
    assert [event["step"] for event in found] == [0, 1, 2] and not any("lost" in event for event in found)


def test_a_slow_subscriber_learns_how_many_it_lost():
    """The oldest events go; the next one that is sent has their number, once."""
    log = EventLog()
    subscriber = log.subscribe(0, None)
    for number in range(limits.MAX_EVENTS + 7):
        log.publish("phase", phase=str(number))
    found = read(subscriber)
    assert found[0]["lost"] == 7 and found[0]["seq"] == 8
    assert len(found) == limits.MAX_EVENTS and not any("lost" in event for event in found[1:])


def test_a_late_subscriber_learns_how_many_it_lost():
    """So is a client that comes back with the number of its last event."""
    log = EventLog()
    for number in range(limits.MAX_EVENTS + 7):
        log.publish("phase", phase=str(number))
    assert [read(log.subscribe(since, None))[0].get("lost") for since in (0, 3, 7, 8)] == [7, 4, None, None]


def test_pull_is_bounded_and_loses_nothing():
    """Events come in pieces of about the size that was asked for, each line whole."""
    log = EventLog()
    subscriber = log.subscribe(0, None)
    for number in range(100):
        log.publish("phase", phase=str(number))
    seen = []
    while found := read(subscriber, 200):
        assert len(found) <= 4
        seen += [event["seq"] for event in found]
    assert seen == list(range(1, 101))


def test_progress_is_sampled_only_for_subscribers(clock):
    """At most five times a second, only when it has changed, and only while a client asks for it."""
    value = [0]

    def sample():
        value[0] += 0
        return {"progress": (value[0], {"step": value[0]}), "metrics": (0, {"metrics": {}})}

    log = EventLog(sample=sample)
    rare = log.subscribe(None, ["phase"])
    assert rare.next_at() is None and read(rare) == []
    subscriber = log.subscribe(None, ["progress"])
    steps = []
    for step in range(1, 101):
        value[0] = step
        clock.at += 0.01
        steps += [event["step"] for event in read(subscriber)]
    assert 5 <= len(steps) <= 6, steps
    clock.at += 10
    assert [event["step"] for event in read(subscriber)] == [100] and read(subscriber) == []
    clock.at += 10
    assert read(subscriber) == [], "nothing has changed"
    assert subscriber.next_at() == clock.at + limits.EVENT_SAMPLE_PERIOD


def test_samples_do_not_push_rare_events_out(clock):
    """Thousands of progress events leave the start of the run readable, in order."""
    value = [0]
    log = EventLog(sample=lambda: {"progress": (value[0], {"step": value[0]})})
    log.publish("started", pid=1)
    subscriber = log.subscribe(None, None)
    for _ in range(5000):
        value[0] += 1
        clock.at += 1
        read(subscriber)
    log.publish("ended", step=5000)
    found = read(log.subscribe(0, None))
    assert (found[0]["kind"], found[-1]["kind"]) == ("started", "ended")
    assert [event["seq"] for event in found] == sorted(event["seq"] for event in found)
    assert len(found) == limits.MAX_SAMPLE_EVENTS + 2 and sum(event.get("lost", 0) for event in found) == 4950


def test_each_event_wakes_the_server():
    """The server is woken after the event can be read."""
    seen = []
    log = EventLog(lambda: seen.append(log.next_seq))
    log.publish("phase", phase="saving")
    assert seen == [2]


def test_many_threads_publish_and_nothing_is_lost_or_doubled():
    """Numbers are unique and in order, whatever thread an event comes from."""
    log = EventLog()
    subscriber = log.subscribe(0, None)

    def publish():
        for _ in range(100):
            log.publish("command", command_id=threading.current_thread().name)

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    seen = []
    while any(thread.is_alive() for thread in threads):
        seen += read(subscriber)
    seen += read(subscriber)
    assert [event["seq"] for event in seen] == list(range(1, 801))


def test_odd_facts_travel_as_json():
    """NaN and broken strings are sent as the wire sends them everywhere."""
    log = EventLog()
    subscriber = log.subscribe(0, None)
    log.publish("checkpoint", step=1, path="\udcff", value=float("nan"))
    (line,) = subscriber.pull(FAR).splitlines()
    assert json.loads(line)["params"]["value"] == "NaN"


def test_every_kind_can_be_published():
    """The kinds are those of the contract."""
    assert set(states.EVENT_KINDS) == {
        "started", "progress", "phase", "command", "checkpoint", "metrics", "rank", "ended"
    }  # fmt: skip
