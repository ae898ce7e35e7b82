"""Answers of another program that cannot be read: one error each, whatever they are, and never a traceback."""

from __future__ import annotations

import threading

import pytest

from forgather_control.cli import main
from forgather_control.client import target
from forgather_control.client.following import Follower
from forgather_control.client.reading import reading
from forgather_control.errors import CommandNotFound, DeadlinePassed, InternalError, InvalidParams

from ..support.harness import serving, until

#: What a hostile program may say of its status.
ANSWERS = [[], 5, "x", None, {}, {"status": [], "commands": [5], "metrics": [1], "seconds_since_step": "y"}]


@pytest.mark.parametrize("fault", [ZeroDivisionError(), AttributeError(), KeyError(), TypeError(), ValueError()])
def test_what_reading_raises_is_the_other_sides_error(fault):
    """Errors of our own, and those of the system, stay what they are."""
    with pytest.raises(InternalError, match="the other side sent an answer that cannot be read"), reading():
        raise fault
    for own in (InvalidParams("no"), CommandNotFound("no"), OSError(), KeyboardInterrupt()):
        with pytest.raises(type(own)), reading():
            raise own


@pytest.fixture
def hostile(jobs_dir):
    """Where a program listens that answers with one of them to ``status``, and with nonsense to the rest."""
    jobs_dir.mkdir(mode=0o700)
    said = {"status": None}

    def answer(request, sink):
        if request.method == "save_checkpoint":
            raise DeadlinePassed("late", state="accepted", command_id="x")
        known = {
            "ping": {"job_id": "run", "pid": 1, "protocol": 2, "version": "x", "time": 1.0},
            "subscribe": {"next": 1},
        }
        return said["status"] if request.method == "status" else known.get(request.method, [5])

    with serving(jobs_dir / "s", answer):
        yield f"unix:{jobs_dir / 's'}", said


@pytest.mark.once
@pytest.mark.parametrize("status", ANSWERS, ids=repr)
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("wait", "--until", "step > 5", "--timeout", "0.1"), 1),
        (("wait", "--until", "loss > 5", "--timeout", "0.1"), 1),
        (("save", "--timeout", "5"), 5),
        (("watch", "--once"), 1),
        (("status",), 1),
    ],
)
def test_every_verb_that_reads_a_status_ends_in_one_sentence(hostile, capsys, words, code, status):
    """With the exit code of a refusal, or of the deadline where that is what happened."""
    where, said = hostile
    said["status"] = status
    ended = main.main([*words, "--connect", where])
    shown = capsys.readouterr().err
    assert ended == code or (status == {} and ended == 5), shown
    assert len(shown.splitlines()) == 1 and "Traceback" not in shown


#: Every verb that asks a job something.
VERBS = [
    *("status", "commands", "ranks", "stacks", "events", "events --follow", "resume", "set", "when", "run"),
    *("cancel x", "when --remove 3", "when step>5 save", "run run sample", "run run sample a=1"),
    *("pause --for 3", "watch --once", "save --wait", "stop", "save-stop --wait", "abort --force", "evaluate --wait"),
    *("profile --wait", "set lr=3 --wait", "wait --until step>5", "wait --until loss>5", "wait --until stalled"),
    *("rpc run status", "rpc run rpc.discover"),
]
SLOW = ("save", "stop", "save-stop", "abort", "evaluate", "profile", "set lr", "wait")


@pytest.mark.once
@pytest.mark.parametrize(
    "answer",
    [
        *(*ANSWERS, True, [5], [[]], [{}], {"next": "x"}, {"settings": [1]}, {"command_id": "x"}),
        *([{"rank": "x", "threads": 5}], [{"command_id": 5, "state": [], "command": 7}], {"methods": [5]}),
        *({"methods": [{"name": 5}]}, {"methods": [{"name": "user.sample", "params": 5}]}),
    ],
    ids=repr,
)
def test_no_verb_ends_in_a_traceback(jobs_dir, capsys, answer):
    """Whatever a program answers to all that is asked, a verb ends by itself, with one of its exit codes."""
    jobs_dir.mkdir(mode=0o700)
    identity = {"job_id": "run", "pid": 1, "protocol": 2, "version": "x", "time": 1.0}
    with serving(jobs_dir / "s", lambda request, sink: identity if request.method == "ping" else answer):
        for verb in VERBS:
            words = verb.split() + (["--timeout", "0.2"] if verb.startswith(SLOW) else [])
            for more in ([], ["--json"]):
                if more and verb.startswith(("rpc", "wait", "watch")):
                    continue
                ended = main.main([*words, *more, "--connect", f"unix:{jobs_dir / 's'}"])
                assert ended in (0, 1, 4, 5) and "Traceback" not in capsys.readouterr().err, verb


@pytest.mark.parametrize("status", [[], 5, None], ids=repr)
def test_a_job_that_is_followed(hostile, status):
    """It is not live, and says why; it is not taken for dead, as its program answers."""
    where, said = hostile
    said["status"] = status
    follower = Follower(lambda: target.resolve(None, where), threading.Event()).start()
    try:
        until(lambda: follower.problem is not None)
        assert follower.state == "silent" and "cannot be read" in follower.problem
    finally:
        follower.stop()
        follower._thread.join()
