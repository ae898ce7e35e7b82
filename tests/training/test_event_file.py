"""The event file of a live job: what is in it and when, and what damage, floods and full disks do to it."""

from __future__ import annotations

import errno
import json
import logging
import os

import pytest

import forgather_control
from forgather_control import states
from forgather_control.jobs import ended, event_log, limits, private_files
from forgather_control.server import limits as server_limits
from forgather_control.training import limits as training_limits
from forgather_control.training.event_file import EventFile
from forgather_control.training.events import EventLog
from forgather_control.wire.records import CommandRecord

from ..support.harness import MS, remove_folder, running_loop, until


def seqs(place):
    return [event["seq"] for event in event_log.read(str(place))]


@pytest.fixture
def log():
    return EventLog()


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "place"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def file(log, place):
    return EventFile(log, str(place))


def test_events_as_they_are_on_the_wire(jobs_dir):
    """Of the kinds that are written, with their facts, soon after they happened."""
    with running_loop() as run, forgather_control.connect("job") as client:
        forgather_control.save_checkpoint("job", wait="finished", reason="why")
        path = run.saves[-1]
        known = until(lambda: [e for e in event_log.read(str(jobs_dir / "job")) if e.get("path") == path] and
                      event_log.read(str(jobs_dir / "job")))  # fmt: skip
        events = client.events(since=0)
        sent = {}
        while len(sent) < known[-1]["seq"]:
            event = next(events)
            sent[event["seq"]] = event
    assert [event for event in sent.values() if event["kind"] in event_log.LOGGED][: len(known)] == known
    assert known[0]["kind"] == "started" and {event["kind"] for event in known} <= {*event_log.LOGGED}


@pytest.mark.parametrize("victim", ["events.jsonl", "."])
def test_what_is_deleted_comes_back(jobs_dir, monkeypatch, victim):
    """With all events that the job still has."""
    monkeypatch.setattr(server_limits, "TICK_PERIOD", 50 * MS)
    with running_loop():
        path = jobs_dir / "job" / "events.jsonl"
        until(lambda: path.exists() and 1 in seqs(path.parent))
        remove_folder(path.parent) if victim == "." else path.unlink()
        until(lambda: (jobs_dir / "job" / "endpoint.json").exists())
        forgather_control.save_checkpoint("job", wait="finished")
        until(lambda: path.exists() and seqs(path.parent)[:2] == [1, 2] and "checkpoint" in path.read_text())


def test_a_flood_is_written_by_the_tick(jobs_dir, monkeypatch):
    """A loop that evaluates at each step has at most some writes a second, and all events are written."""
    monkeypatch.setattr(server_limits, "TICK_PERIOD", 50 * MS)
    writes, write = [], EventFile.write

    def counted(file):
        writes.append(file)
        write(file)

    monkeypatch.setattr(EventFile, "write", counted)
    with running_loop() as run:
        events = run.job._controller.state.events
        for number in range(5000):
            events.publish("phase", phase=str(number))
        until(lambda: "4999" in (jobs_dir / "job" / "events.jsonl").read_text())
        assert len(writes) < training_limits.EVENT_WRITES + 200


def test_a_slow_writer_counts_what_was_lost(log, place, file, monkeypatch):
    """Events that left the ring before they were written."""
    log.publish("phase", phase="first")
    file.write()
    for number in range(training_limits.MAX_EVENTS + 5):
        log.publish("phase", phase=str(number))
    file.write()
    events = event_log.read(str(place))
    assert events[1]["lost"] == 5 and len(events) == training_limits.MAX_EVENTS + 1


def test_it_is_bounded(log, place, file, monkeypatch):
    """However many and long they are, the first one stays."""
    monkeypatch.setattr(limits, "MAX_EVENT_LOG", 10_000)
    for number in range(500):
        log.publish("phase", phase="x" * 100)
        if number % 7 == 0:
            file.write()
            assert (place / "events.jsonl").stat().st_size <= 10_000
    file.write()
    assert seqs(place)[0] == 1 and seqs(place)[-1] == 500


def test_a_full_disk_costs_one_warning_and_no_event(log, place, file, monkeypatch, caplog):
    """What could not be written comes with the next write."""
    log.publish("phase", phase="1")
    file.write()
    with monkeypatch.context() as full:

        def refuse(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(event_log, "append", refuse)
        for number in range(3):
            log.publish("phase", phase=str(number))
            file.write()
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "event log" in caplog.text
    file.write()
    assert seqs(place) == [1, 2, 3, 4]


def test_another_jobs_directory_is_left_alone(log, place, file):
    """A later job has made the directory of this path."""
    log.publish("phase", phase="1")
    file.write()
    place.rename(place.with_name("old"))
    place.mkdir(mode=0o700)
    log.publish("phase", phase="2")
    file.write()
    assert list(place.iterdir()) == [] and seqs(place.with_name("old")) == [1]


def command(name, step):
    return CommandRecord("id", name, states.COMMAND_APPLIED, 1.0, applied_at_step=step)


@pytest.mark.parametrize(
    ("records", "reason", "how"),
    [
        ([], None, "finished"),
        ([], "training ended by KeyError", "failed"),
        ([command("save_checkpoint", 3)], None, "finished"),
        ([command("graceful_stop", None)], None, "finished"),
        ([command("graceful_stop", 0)], None, "stopped"),
        ([command("save_and_stop", 3)], None, "stopped"),
        ([command("save_and_stop", 3)], "training ended by KeyError", "failed"),
        ([command("graceful_stop", 3), command("abort", 3)], None, "aborted"),
        ([command("abort", 3)], "training ended by SystemExit", "aborted"),
    ],
)
def test_how_a_run_has_ended(log, place, file, records, reason, how):
    """By the commands that were applied, and by the reason."""
    log.publish("checkpoint", step=3, path="/c-3")
    file.write()
    file.write_end(b'{"job_id": "job"}', records, reason)
    status = json.loads((place / "status.json").read_text())
    known = {"how": how, "reason": reason, "checkpoint": "/c-3", "checkpoint_step": 3}
    assert status["job_id"] == "job" and {**status["ended"], **known} == status["ended"]


def test_training_ends_though_nothing_can_be_written(jobs_dir, monkeypatch, caplog):
    """The directory goes, one warning stays."""
    caplog.set_level(logging.WARNING)

    def refuse(directory, name, data, sync=False):
        if name in ("events.jsonl", "status.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(directory, name, data, sync=sync)

    write = private_files.write
    monkeypatch.setattr(private_files, "write", refuse)
    with forgather_control.TrainingJob("job") as job:
        job.step(1)
    assert sorted(os.listdir(jobs_dir)) == [".lock"] and caplog.text.count("event log") == 1
    assert ended.scan(str(jobs_dir)) == []
