"""The verb ``wait``: its exit codes, as scripts test them."""

from __future__ import annotations

import json
import threading

import pytest

from forgather_control import cleanup, connect

from ..support.harness import SOON, cli, job_process, running_loop, until

pytestmark = pytest.mark.once


def test_it_holds(jobs_dir):
    """Exit code 0, and one line."""
    with running_loop():
        done = cli("wait", "job", "--until", "step >= 3")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("job: step >= 3 at step ")
        told = json.loads(cli("wait", "--until", "step >= 3", "--json").stdout)
        assert told["holds"] and told["state"] == "live" and told["job_id"] == "job"


def test_the_end_is_waited_for_without_a_condition(jobs_dir):
    """0 if the job ended as it should, 1 if it ended without the condition."""
    with running_loop():
        codes = []
        waits = [
            threading.Thread(target=lambda words=words: codes.append(cli("wait", "job", *words)))
            for words in ((), ("--until", "loss < 0"))
        ]
        for each in waits:
            each.start()
        with connect("job") as client:
            until(lambda: client.call("status")["global_step"] > 100)
            client.call("graceful_stop")
        for each in waits:
            each.join(SOON)
    assert sorted(done.returncode for done in codes) == [0, 1]
    assert [done.stderr.partition(" at step")[0] for done in codes if done.returncode] == ["job has ended"]


def test_a_job_that_died(jobs_dir):
    """4, unless that was waited for; 3 where there is none."""
    with job_process("job") as process:
        process.kill()
        done = cli("wait", "job")
        assert done.returncode == 4 and done.stderr.startswith("job died")
        assert cli("wait", "job", "--until", "stalled or dead").returncode == 0
    assert cli("wait", "nowhere").returncode == 3


def test_a_job_that_has_ended_before(jobs_dir):
    """As if the wait had begun in time, as far as its last status tells."""
    with running_loop(), connect("job") as client:
        until(lambda: client.call("status")["global_step"] > 3)
        client.call("graceful_stop", wait="finished")
    until(lambda: not (jobs_dir / "job").exists())
    assert cli("wait", "job").stdout.startswith("job: ended at step ")
    assert cli("wait", "job", "--until", "step >= 3").returncode == 0
    for condition in ("dead", "loss > 0"):
        done = cli("wait", "job", "--until", condition)
        assert done.returncode == 1 and done.stderr.endswith(f", and {condition} did not hold\n")
    with job_process("killed") as process:
        process.kill()
    cleanup()
    assert [cli("wait", "killed", *words).returncode for words in ((), ("--until", "dead"))] == [4, 0]


def test_the_deadline(jobs_dir):
    """5."""
    with running_loop():
        done = cli("wait", "job", "--until", "step < 0", "--timeout", "0.1")
        assert done.returncode == 5 and "the condition does not hold after 0.1 s" in done.stderr


@pytest.mark.parametrize("words", [["--until", "step >"], ["--until", "nonsense"], ["--wait"], ["--timeout", "-1"]])
def test_wrong_words(words):
    """2."""
    done = cli("wait", "job", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
