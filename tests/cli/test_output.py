"""What users see: no text from a job or a file moves the cursor, and no number breaks the output."""

from __future__ import annotations

import math
import time
from typing import get_args

import pytest

from forgather_control import states
from forgather_control.cli import command_output, output
from forgather_control.wire import builtin

#: Text that a terminal would act on, or that would seem to stand elsewhere, and how it is shown.
TRICKS = {
    "clear": ("\x1b[2J", r"\x1b[2J"),
    "title": ("\x1b]0;root\x07", r"\x1b]0;root\x07"),
    "c1": ("\x9b31m", r"\x9b31m"),
    "newline": ("a\nlive  b", r"a\nlive  b"),
    "carriage": ("bad\rgood", r"bad\rgood"),
    "backspace": ("abort\b\b\b\b\bsave", r"abort\x08\x08\x08\x08\x08save"),
    "nul": ("a\0b", r"a\x00b"),
    "tab": ("a\tb", r"a\tb"),
    "delete": ("\x7f", r"\x7f"),
    "override": ("\u202etroba", r"\u202etroba"),
    "isolate": ("\u2066a\u2069", r"\u2066a\u2069"),
    "mark": ("\u200f\u061c", r"\u200f\u061c"),
    "nothing": ("a\u200bb\ufeff\xad", r"a\u200bb\ufeff\xad"),
    "separators": ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
    "spaces": ("a\u3000b\xa0", r"a\u3000b\xa0"),
    "half": ("\ud800", r"\ud800"),
    "private": ("\ue000\U000e0041", r"\ue000\U000e0041"),
}
STATUS = {
    "job_id": "job", "status": "training", "global_step": 500, "epoch": 1.25, "max_steps": 1000, "progress": 0.5,
    "steps_per_second": 2.0, "eta_seconds": 250.0, "seconds_since_step": 0.4, "metrics": {"loss": 0.123456789, "n": 3},
    "host": "node", "pid": 4242, "world_size": 1, "started_at": 0.0, "commands": [],
}  # fmt: skip
RECORD = {
    "command_id": "i", "command": "save_checkpoint", "state": "finished", "requested_at": 1.0, "applied_at_step": 7,
    "finished_at": 2.0, "result": {"step": 7, "path": "/c/checkpoint-7", "seconds": 1.5}, "error": None,
}  # fmt: skip
tricks = pytest.mark.parametrize(("text", "wanted"), TRICKS.values(), ids=TRICKS)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("The graceful_stop expired", "The stop expired"),
        (
            "save_and_stop is accepted after 3 s; get_command shows it",
            "save-stop is accepted after 3 s; forgather-control commands shows it",
        ),
        ("no method 'list_commands'", "no method 'commands'"),
        ("no checkpoint in /runs/save_checkpoint-1", "no checkpoint in /runs/save_checkpoint-1"),
        ("No job my-save_checkpoint", "No job my-save_checkpoint"),
    ],
)
def test_messages_name_verbs(text, shown):
    """The words of the wire are those of programs; what stands in a path or a job's id stays."""
    assert output.in_verbs(text) == shown


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    """One time zone, wherever the tests run."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def harmless(text, lines):
    """Assert that the text has so many lines and nothing but what prints."""
    assert text.count("\n") == lines - 1
    assert text.replace("\n", "").isprintable(), ascii(text)
    return text


# Text...


@tricks
def test_safe(text, wanted):
    """What could act or pretend is shown as an escape."""
    assert output.safe(text) == wanted


@pytest.mark.parametrize("text", ["", "plain", "a b", "żółw", "日本", "\U0001f600", "\\x1b", 5, None, 1.5, ["a\n"]])
def test_safe_leaves_the_rest(text):
    """Ordinary text of any language stays as it is."""
    assert output.safe(text) == str(text)


@tricks
def test_status_is_safe(text, wanted):
    """No text of a status gets to the terminal raw: ids, names and values of metrics, errors, paths, hosts."""
    record = {"command": text, "state": text, "error": {"code": 1, "message": text}}
    saved = {**RECORD, "result": {"path": text}}
    status = {
        **STATUS,
        "job_id": text,
        "status": text,
        "host": text,
        "metrics": {text: text},
        "commands": [record, saved],
    }
    shown = harmless(output.status_screen(status, unicode=True), 7)
    assert shown.count(wanted) == 9
    bare = output.status_screen({**status, "global_step": text, "max_steps": None}, unicode=False)
    assert harmless(bare, 7).count(wanted) == 10


@tricks
@pytest.mark.parametrize("state", ["finished", "failed", "applied"])
@pytest.mark.parametrize("command", ["save_checkpoint", "save_and_stop"])
def test_outcome_is_safe(text, wanted, state, command):
    """No path and no job's name gets to the terminal raw."""
    record = {**RECORD, "command": command, "state": state, "result": {"step": text, "path": text, "seconds": 1}}
    shown = harmless(command_output.outcome(text, record), 1)
    assert shown.count(wanted) == (3 if state == "finished" else 1)


# One job's status...


def test_status():
    """The usual status: bar, speed, metrics, the commands under way, the process."""
    commands = [
        {**RECORD, "state": "applied", "result": None},
        RECORD,
        {
            **RECORD,
            "command": "abort",
            "state": "failed",
            "applied_at_step": None,
            "error": {"code": 1, "message": "no"},
        },
    ]
    more = {
        "world_size": 8,
        "ranks_not_joined": [3, 7],
        "rss_bytes": 3 << 20,
        "cpu_percent": 99.6,
        "device_memory_bytes": 1 << 30,
    }
    process = "pid 4242 on node, 8 ranks (ranks 3, 7 never joined), 3 MiB, 100 % cpu, 1024 MiB on devices"
    assert output.status_screen({**STATUS, "commands": commands, **more}, unicode=False).splitlines() == [
        "job  training",
        "[################................]  50.0 %  step 500 of 1000",
        "epoch 1.25   2 steps/s   4m 10s left   last step 0.4 s ago",
        "loss 0.12346   n 3",
        "save applied at step 7",
        "save finished at step 7: /c/checkpoint-7",
        "abort failed: no",
        f"{process}, started 1970-01-01 00:00:00",
    ]


@pytest.mark.parametrize(
    ("evaluation", "shown"),
    [
        (None, "evaluating"),
        ({"seconds": 12.5, "batches": 0, "total_batches": None, "eta_seconds": None}, "evaluating for 12 s"),
        ({"seconds": 12.5}, "evaluating for 12 s"),
        ({"seconds": 6.0, "batches": 34, "total_batches": 100, "eta_seconds": 12.4}, "evaluating 34 %, 12 s left"),
        ({"seconds": 60.0, "batches": 9, "total_batches": 9, "eta_seconds": 0.0}, "evaluating 100 %, 1m 00s so far"),
    ],
)
def test_an_evaluation_has_a_time_of_its_own(evaluation, shown):
    """Beside the time left of training; how long it has taken where no one knows how long it will take."""
    status = {**STATUS, "status": "evaluating", "evaluation": evaluation}
    assert output.doing(status) == shown
    assert output.status_screen(status, unicode=True).startswith(f"job  {shown}\n")
    assert f": {shown}, step 500" in output.status_line("job", status)


def test_status_before_the_first_step():
    """A job before its first step shows neither a speed nor an end."""
    unknown = dict.fromkeys(["epoch", "max_steps", "progress", "steps_per_second", "eta_seconds", "seconds_since_step"])
    assert output.status_screen({**STATUS, **unknown, "global_step": 0, "metrics": {}}, unicode=True).splitlines() == [
        "job  training",
        "step 0",
        "no step yet",
        "pid 4242 on node, started 1970-01-01 00:00:00",
    ]


def test_status_of_another_version():
    """Members that an older job does not send are left out of the screen."""
    few = {name: STATUS[name] for name in ("job_id", "status", "global_step", "pid", "host", "started_at")}
    assert len(output.status_screen(few, unicode=False).splitlines()) == 4


@pytest.mark.parametrize(
    ("progress", "full"), [(0, 0), (0.0, 0), (0.03, 0), (0.5, 16), (0.999, 31), (1, 32), (1.0, 32)]
)
@pytest.mark.parametrize("unicode", [True, False])
def test_bar(progress, full, unicode):
    """The bar is full at the end and not before, in either alphabet, and always as long."""
    line = output.status_screen({**STATUS, "progress": progress}, unicode).splitlines()[1]
    bar = line[line.index("[") + 1 : line.index("]")]
    assert bar == ("█" if unicode else "#") * full + ("░" if unicode else ".") * (32 - full)
    assert unicode or line.isascii()


@pytest.mark.parametrize(
    ("speed", "wanted"),
    [(1.0, "1 steps/s"), (1234.5, "1.23e+03 steps/s"), (0.5, "2 s/step"), (1 / 3600, "3.6e+03 s/step"), (0, None),
     (None, None), (5e-324, "inf s/step")],
)  # fmt: skip
def test_speed(speed, wanted):
    """Slow steps are shown in seconds each, fast ones in steps a second."""
    line = output.status_screen({**STATUS, "steps_per_second": speed}, unicode=False).splitlines()[2]
    assert wanted in line if wanted else "step/s" not in line and "s/step" not in line


# A command's outcome...


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({}, "job: saved at step 7 in 1.5 s: /c/checkpoint-7"),
        ({"command": "save_and_stop"}, "job: ended at step 7, saved: /c/checkpoint-7"),
        (
            {"command": "abort", "result": {"step": 9, "path": None}},
            "job: ended at step 9, no checkpoint was saved for it",
        ),
        ({"state": "accepted", "applied_at_step": None, "result": None}, "job: save accepted"),
        ({"state": "applied", "result": None}, "job: save applied at step 7"),
        ({"state": "failed", "applied_at_step": None}, "job: save failed"),
        ({"result": {"step": 7, "path": "p", "seconds": None}}, "job: saved at step 7 in ?: p"),
    ],
)
def test_outcome(record, wanted):
    """One line says what became of the command, and where the checkpoint is."""
    assert command_output.outcome("job", {**RECORD, **record}) == wanted


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (
            {"command": "evaluate", "result": {"step": 9, "seconds": 2.0, "metrics": {"eval_loss": 0.25, "n": 3}}},
            "job: evaluated at step 9 in 2.0 s: eval_loss 0.25   n 3",
        ),
        ({"command": "user.sample", "result": {"value": [1, 2]}}, "job: user.sample finished at step 7: value [1, 2]"),
        ({"command": "newer", "result": None, "applied_at_step": None}, "job: newer finished"),
    ],
)
def test_outcome_of_other_commands(record, wanted):
    """The outcome is worded by what the command finishes with; an unknown command shows its result."""
    evaluate = builtin.BUILTIN["save_checkpoint"]._replace(name="evaluate", finishes_when=frozenset({"evaluated"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(builtin.BUILTIN, "evaluate", evaluate)
        assert command_output.outcome("job", {**RECORD, **record}) == wanted


def test_command_table():
    """A row for each command: its requester, and its reason, its failure or its checkpoint."""
    by = {"via": "socket", "uid": 1000, "user": "alice", "pid": 42, "program": "python3"}
    rows = [
        {**RECORD, "requested_by": by},
        {**RECORD, "state": "failed", "error": {"code": 1, "message": "no"}, "requested_by": {**by, "user": None}},
        {**RECORD, "state": "accepted", "result": None, "applied_at_step": None, "reason": "maintenance"},
    ]
    assert [line.split(maxsplit=4)[4:] for line in command_output.command_table(rows).splitlines()] == [
        ["REQUESTED            BY                            NOTE"],
        ["1970-01-01 00:00:01  alice, python3 42, socket     /c/checkpoint-7"],
        ["1970-01-01 00:00:01  uid 1000, python3 42, socket  no"],
        ["1970-01-01 00:00:01  -                             maintenance"],
    ]
    assert command_output.command_table([]) == "no commands"


@tricks
def test_commands_are_safe(text, wanted):
    """Nothing that a caller put into a command gets to the terminal raw."""
    by = dict.fromkeys(("via", "user", "pid", "program"), text)
    record = {**dict.fromkeys(RECORD, text), "result": None, "error": None, "reason": text, "requested_by": by}
    shown = harmless(command_output.command_table([record]), 2)
    assert shown.count(wanted) == 9
    assert harmless(output.values({text: text}), 1).count(wanted) == 2


def test_values():
    """A method without a screen of its own: a line for each member or item."""
    assert output.values({"a": 0.123456789, "b": None}) == "a: 0.12346\nb: None"
    assert output.values([{"a": 1, "b": "x"}, 7]) == "a 1   b x\n7"


# Ranks...

RANK = {
    "rank": 0, "host": "node", "pid": 4242, "state": "answering", "step": 120, "seconds_since_step": 0.4,
    "rss_bytes": 3 << 20, "device": "cuda:0 NVIDIA H200", "device_memory_bytes": 5 << 30,
}  # fmt: skip
BARE = {**dict.fromkeys(RANK), "rank": 1, "host": "node", "pid": 4243, "state": "silent"}


def test_rank_table():
    """Columns are aligned, unknown values are dashes, and the last lines name the ranks that need attention."""
    late = {**RANK, "rank": 2, "step": 117, "seconds_since_step": 65.0, "device": "cpu", "device_memory_bytes": None}
    others = [{**BARE, "rank": 3 + n, "state": state} for n, state in enumerate(("absent", "never joined", "unknown"))]
    assert output.rank_table([RANK, BARE, late, *others], colour=False).splitlines() == [
        "RANK  HOST  PID   STATE         STEP  BEHIND  LAST STEP   MEMORY  DEVICE",
        "0     node  4242  answering     120   -       0.4 s ago   3 MiB   cuda:0 NVIDIA H200, 5120 MiB",
        "1     node  4243  silent        -     -       -           -       -",
        "2     node  4242  answering     117   3       1m 05s ago  3 MiB   cpu",
        "3     node  4243  absent        -     -       -           -       -",
        "4     node  4243  never joined  -     -       -           -       -",
        "5     node  4243  unknown       -     -       -           -       -",
        "behind, by 3 at most: rank 2",
        "no answer in time: rank 1",
        "never joined, so commands cannot be carried out: rank 4",
        "cannot be asked: rank 5",
        "gone: rank 3",
    ]


def test_rank_table_where_all_is_well():
    """Nothing is remarked where nothing is remarkable; without ranks there is the head alone."""
    assert output.rank_table([RANK, {**RANK, "rank": 1}], colour=False).count("\n") == 2
    assert output.rank_table([], colour=True).split()[:2] == ["RANK", "HOST"]


def test_many_ranks_are_counted():
    """A thousand ranks behind make one line, not a thousand numbers."""
    rows = [{**RANK, "rank": rank, "step": 5 + (rank == 0)} for rank in range(1000)]
    last = output.rank_table(rows, colour=False).splitlines()[-1]
    assert last == "behind, by 1 at most: ranks 1, 2, 3, 4, 5, 6, 7, 8 and 991 more"


@pytest.mark.parametrize("state", states.RANK_STATES)
def test_rank_colour_changes_no_width(state):
    """Colour is put around the state's cell; an unknown state has none."""
    rows = [RANK, {**BARE, "state": state}, {**BARE, "rank": 2, "state": "\x1b[31m"}]
    coloured = output.rank_table(rows, colour=True)
    assert coloured.count("\x1b[") == 4
    for code in (*output._COLOURS.values(), "0"):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == output.rank_table(rows, colour=False)


@tricks
def test_ranks_are_safe(text, wanted):
    """Nothing that a rank says of itself gets to the terminal raw."""
    row = {**dict.fromkeys(RANK, text), "rank": 7}
    shown = harmless(output.rank_table([row], colour=False), 2)
    assert shown.count(wanted) == 5
    assert output.process_outcomes([{**row, "outcome": "killed"}]).count(wanted) == 2


@pytest.mark.parametrize("odd", [True, math.nan, "NaN", [], {}, -1, 10**30, None])
def test_rank_of_another_version(odd):
    """Whatever stands where a number should, the table is shown; members may be missing."""
    rows = [{**dict.fromkeys(RANK, odd), "rank": 0}, {"rank": 1}, RANK]
    assert output.rank_table(rows, colour=False).count("\n") >= 3


def test_stacks():
    """Each rank's stacks stand under its name, line by line; a rank without says so."""
    rows = [{**RANK, "stacks": "Thread 1:\n  File a\n"}, {**BARE, "stacks": None}]
    assert output.stacks_text(rows) == (
        "rank 0, pid 4242 on node, answering\nThread 1:\n  File a\n\nrank 1, pid 4243 on node, silent\n  no stacks"
    )


@tricks
def test_stacks_are_safe(text, wanted):
    """A line of source may hold anything; the newlines of the stacks stay, those of names do not."""
    row = {**RANK, "host": text, "state": text, "stacks": f"Thread\n  {text}\nend"}
    assert text == "a\nlive  b" or harmless(output.stacks_text([row]), 4).count(wanted) == 3
    assert output.safe_lines("a\n\tb\n") == "a\n\\tb\n"


@pytest.mark.parametrize("outcome", ["ended", "killed", "gone", "elsewhere", "refused", "stuck"])
def test_process_outcomes(outcome):
    """Every outcome that there is has words, which say what was done."""
    line = output.process_outcomes([{"rank": 3, "host": "node", "pid": 5, "outcome": outcome}])
    assert line.startswith("rank 3, pid 5 on node: ") and len(line) > 30
    assert set(output._KILL_OUTCOMES) == set(get_args(states.KillOutcome))


# Pieces...


@pytest.mark.parametrize(
    ("value", "wanted"),
    [(0.1 + 0.2, "0.3"), (1e-9, "1e-09"), (123456.789, "1.2346e+05"), (5, "5"), (10**30, str(10**30)), ("NaN", "NaN"),
     (math.nan, "nan"), (math.inf, "inf"), (None, "None"), (True, "True"), ("a\x1b", r"a\x1b"), ([1], "[1]"),
     (-0.0, "-0")],
)  # fmt: skip
def test_number(value, wanted):
    """Metrics in at most five digits, whatever they are."""
    assert output.number(value) == wanted


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [(0, "0.0 s"), (0.04, "0.0 s"), (9.94, "9.9 s"), (10, "10 s"), (59.99, "59 s"), (60, "1m 00s"), (3599, "59m 59s"),
     (3600, "1h 00m"), (86_399, "23h 59m"), (86_400, "1d 00h"), (1e9, "11574d 01h"), (-3, "-3.0 s"), (None, "?"),
     (math.nan, "?"), (math.inf, "?"), (-math.inf, "?"), ("NaN", "?"), ("Infinity", "?"), ([], "?")],
)  # fmt: skip
def test_duration(seconds, wanted):
    """Seconds as people say them; what is no number of seconds is a question mark."""
    assert output.duration(seconds) == wanted


@pytest.mark.parametrize("epoch", [math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, None, "NaN", "now", [], {}])
def test_moment_that_is_none(epoch):
    """A file may claim any time: none of them is taken for now, or for a reason to stop."""
    assert output.moment(epoch) == "?"


def test_moment():
    """A time of this host's zone, to the second."""
    assert output.moment(1.9) == "1970-01-01 00:00:01"


def test_settings():
    """A line for each; the value that is in force, and what it may be."""
    setting = {"name": "rate", "value": 1.0, "type": "number", "minimum": None, "maximum": 2.0, "doc": "How fast."}
    assert [line.split() for line in command_output.settings_table([setting]).splitlines()] == [
        ["NAME", "VALUE", "TYPE", "MINIMUM", "MAXIMUM", "WHAT"],
        ["rate", "1", "number", "-", "2.0", "How", "fast."],
    ]
    assert "rate  1 at step 5  number" in command_output.settings_table([{**setting, "read_at_step": 5}])
    assert command_output.settings_table([]) == "no settings"


def test_a_change_of_settings():
    """What was, what is, what came of it."""
    record = {"command": "change_settings", "state": "finished", "applied_at_step": 7, "result": {}}
    record["result"]["rate"] = {"old": 1.0, "new": 0.5, "effective": 0.49, "note": "cosine keeps its shape"}
    record["result"]["size"] = {"old": 1, "new": 2, "effective": 2.0000000001}
    assert command_output.outcome("job", record) == (
        "job: set at step 7: rate 1 -> 0.5, 0.49 after the next step (cosine keeps its shape); size 1 -> 2"
    )


# Rules...

RULE = {"id": 3, "when": "loss > 2", "do": "save_and_stop", "params": {"evaluate": "auto", "reason": None},
        "not_before": None, "fired_at_step": None, "command_id": None, "note": "it ends with this job"}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "3: when loss > 2, save-stop evaluate=auto"),
        ({"not_before": 5, "params": {}, "fired_at_step": 9},
         "3: when loss > 2, save-stop, not before step 5, fired at step 9"),
        ({"do": "graceful_stop", "params": {}}, "3: when loss > 2, stop"),
        ({"do": "change_settings", "params": {"changes": {"rate": "x0.5", "size": 2}, "reason": "slow"}},
         "3: when loss > 2, set reason=slow rate=x0.5 size=2"),
        ({"do": "user.sample", "params": {"words": ["a", "ü"], "n": 2, "greedy": True, "seed": None}},
         '3: when loss > 2, user.sample words=["a", "ü"] n=2 greedy=true'),
    ],
)  # fmt: skip
def test_a_rule_is_a_line(changes, wanted):
    """What it waits for, and what it does then."""
    assert output.rule_line({**RULE, **changes}) == wanted


def test_rules_and_their_notes():
    """Two lines for each, and those that wait in status."""
    fired = {**RULE, "id": 4, "fired_at_step": 7, "note": None}
    assert command_output.rules_text("added", [RULE, fired]).splitlines() == [
        "added",
        "3: when loss > 2, save-stop evaluate=auto",
        "   it ends with this job",
        "4: when loss > 2, save-stop evaluate=auto, fired at step 7",
    ]
    assert command_output.rules_text("", []) == "no rules"
    shown = output.status_screen({**STATUS, "rules": [RULE, fired]}, unicode=False)
    assert [line for line in shown.splitlines() if "rule" in line] == [f"rule {output.rule_line(RULE)}"]


@tricks
def test_rules_are_safe(text, wanted):
    """Nothing of a rule gets to the terminal raw."""
    rule = {**RULE, "when": text, "do": text, "params": {text: text, "n": [text]}, "note": text}
    assert harmless(command_output.rules_text(text, [rule]), 3).count(wanted) >= 5


def test_a_command_without_a_value():
    """Nothing is said of it."""
    record = {"command": "pause", "state": "finished", "applied_at_step": 7, "result": {"value": None}}
    assert command_output.outcome("job", record) == "job: pause finished at step 7"


def test_a_profile():
    """Its cost, a file for each rank, and the operations."""
    row = {"name": "aten::mm", "device": "cpu", "calls": 2, "self_ms": 0.5, "total_ms": 1.25}
    result = {"paths": ["/a", "/b"], "sizes": [1 << 19, 1 << 21], "steps": 3, "seconds_lost": 0.5, "operations": [row]}
    record = {"command": "profile", "state": "finished", "applied_at_step": 7, "result": {**result, "note": "short"}}
    assert command_output.outcome("job", record).splitlines() == [
        "job: profiled 3 steps, which cost training 0.5 s; short",
        "rank 0: /a, 0.5 MiB",
        "rank 1: /b, 2.0 MiB",
        "OPERATION  DEVICE  CALLS  SELF MS  TOTAL MS",
        "aten::mm   cpu     2      0.500    1.250",
    ]
