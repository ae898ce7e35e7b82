"""Settings: declared, refused or changed exactly, read back, and restored where one rank could not."""

from __future__ import annotations

import json
import sys
import threading

import pytest

from forgather_control import TrainingJob, connect
from forgather_control.errors import CommandRefused, InvalidParams
from forgather_control.training.setting import Setting, declared
from forgather_control.training.settings import Settings

from ..support.harness import SOON, until


class Values:
    """Settings "speed" (0.5 to 10), "size" (a whole number), "name" and "flag", kept in a dictionary."""

    def __init__(self):
        self.now = {"speed": 1.0, "size": 4, "name": "a", "flag": True}
        self.on_step, self.reads = [], 0
        self.settings = Settings(self.on_step, self.read, lambda: 0)
        limits = {"speed": {"minimum": 0.5, "maximum": 10}}
        self.settings.add(
            Setting(
                name,
                lambda name=name: self.now[name],
                lambda value, name=name: self.put(name, value),
                **limits.get(name, {}),
            )
            for name in self.now
        )

    def read(self):
        """Note that values were read."""
        self.reads += 1

    def put(self, name, value):
        """Set one."""
        self.now[name] = value

    def step(self):
        """End a step, as the controller does."""
        for call in [*self.on_step]:
            call(1)


class Odd:
    """A value that cannot be printed."""

    def __repr__(self):
        raise RuntimeError("no text")


@pytest.fixture
def values():
    """Some settings."""
    return Values()


def test_types_are_those_of_the_values(values):
    """As the words of JSON Schema, with limits and values."""
    found = {each["name"]: each for each in values.settings.snapshot}
    assert {name: each["type"] for name, each in found.items()} == {
        "speed": "number", "size": "integer", "name": "string", "flag": "boolean",
    }  # fmt: skip
    assert found["speed"] == {"name": "speed", "value": 1.0, "type": "number", "minimum": 0.5, "maximum": 10, "doc": ""}


def test_a_change_is_read_back_after_the_next_step(values):
    """The effective value is the one that is in force then, whoever set it."""
    change = values.settings.change({"speed": 2, "size": "x0.5"})
    change.settle(None)
    assert values.now == {"speed": 2.0, "size": 2, "name": "a", "flag": True} and not change.done()
    values.now["speed"] = 1.9
    values.step()
    assert change.result(0) == {
        "speed": {"old": 1.0, "new": 2.0, "effective": 1.9}, "size": {"old": 4, "new": 2, "effective": 2},
    }  # fmt: skip
    assert values.on_step == [] and values.reads == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"speed": 11}, "speed must be a number from 0.5 to 10"),
        ({"speed": "fast"}, "speed must be a number"),
        ({"speed": True}, "speed must be a number"),
        ({"speed": None}, "speed must be a number"),
        ({"size": 1.5}, "size must be a whole number"),
        ({"flag": 1}, "flag must be true or false"),
        ({"name": 5}, """name must be a string (to the command line one that looks like a number, true or false"""),
        ({"sped": 1}, "did you mean speed?"),
        ({"": 1}, "this run has flag, name, size, speed"),
        ({}, "no change is given"),
        ({"name": "b", "speed": 0}, "speed must be"),
    ],
)
def test_what_is_impossible_is_refused_before_any_rank_hears_of_it(values, changes, words):
    """In words; and where a rank is asked all the same, nothing changes."""
    assert words in values.settings.cannot(changes)
    before = dict(values.now)
    if changes:
        with pytest.raises(CommandRefused, match=r"\w"):
            values.settings.change(changes)
    assert values.now == before


@pytest.mark.parametrize(("changes", "words"), [({"speed": "x20"}, "x20 of 1.0"), ({"size": "x0.3"}, "x0.3 of 4")])
def test_a_factor_is_checked_with_the_value_in_force(values, changes, words):
    """It can only be known on the training thread."""
    assert values.settings.cannot(changes) is None
    with pytest.raises(CommandRefused, match=words):
        values.settings.change(changes)


def test_a_setter_that_raises_changes_nothing(values):
    """Those before it are restored, and the half that it did, too."""

    def half(value):
        values.now["name"] = value
        if value != "a":
            raise ValueError("no way")

    values.settings.add([Setting("half", lambda: values.now["name"], half)])
    with pytest.raises(CommandRefused, match="no way"):
        values.settings.change({"speed": 3, "half": "z"})
    assert values.now == {"speed": 1.0, "size": 4, "name": "a", "flag": True}


def test_what_another_rank_refused_is_restored(values):
    """By the function that the setter returned, else by the setter."""
    undone = []
    values.settings.add([Setting("exact", lambda: 1.0, lambda value: lambda: undone.append(value))])
    change = values.settings.change({"exact": 2, "speed": 3})
    change.settle("rank 1 could not do it")
    assert undone == [2.0] and values.now["speed"] == 1.0
    assert str(change.exception(0)) == "nothing was changed: rank 1 could not do it" and values.on_step == []


def test_a_value_that_cannot_be_restored_is_named():
    """The error is honest."""
    now = [1]

    def once(value):
        if now[0] != 1:
            raise OSError("stuck")
        now[0] = value

    settings = Settings([], lambda: None, lambda: 0)
    settings.add([Setting("once", lambda: now[0], once)])
    change = settings.change({"once": 2})
    change.settle("rank 1 could not do it")
    error = change.exception(0)
    assert error.data == {"restored": False}
    assert str(error) == "rank 1 could not do it; once could not be restored, and may still be 2: OSError: stuck"


def test_a_getter_that_raises_costs_its_value_only(values):
    """It shows as null, and cannot be changed."""
    values.settings.add([Setting("odd", lambda: 1 / 0, lambda value: None, type=float)])
    assert values.settings.snapshot[-1]["value"] is None
    with pytest.raises(CommandRefused, match="odd cannot be changed: its value cannot be read"):
        values.settings.change({"odd": 1})


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (None, [1], r"its value is no number, but '\[1\]'"),
        (float, "many", "its value is no number, but 'many'"),
        (str, 5, "its value is no string, but 5"),
        (bool, None, "its value cannot be read"),
        (int, Odd(), "its value is no integer, but 'Odd'"),
    ],
    ids=["list", "text", "number", "nothing", "odd"],
)
def test_a_value_that_could_not_be_restored_is_not_changed(values, kind, value, words):
    """A setter gets values of its setting's type only."""
    given = []
    values.settings.add([Setting("odd", lambda: value, given.append, type=kind)])
    wanted = {str: "a", bool: True}.get(kind, 2)
    with pytest.raises(CommandRefused, match=f"odd cannot be changed: {words}"):
        values.settings.change({"speed": 2, "odd": wanted})
    assert given == [] and values.now["speed"] == 1.0


@pytest.mark.parametrize(
    "value", [10**5000, "x" * 10**6, Odd(), {1: Odd()}, object], ids=["huge", "long", "odd", "odd inside", "class"]
)
def test_any_value_can_be_listed(values, value):
    """As short JSON."""
    values.settings.add([Setting("odd", lambda: value, lambda value: None)])
    assert len(json.dumps(values.settings.snapshot)) < 2000


def test_a_text_as_long_as_a_client_can_set_is_shown_whole(values):
    """So what is effective is what was put in force."""
    text = "x" * 60_000
    change = values.settings.change({"name": text})
    change.settle(None)
    values.step()
    assert change.result(0)["name"] == {"old": "a", "new": text, "effective": text}


def test_an_exit_in_the_scripts_functions_ends_no_training(values):
    """Whichever of them calls sys.exit, what was changed before is restored."""
    values.settings.add([Setting("set", lambda: 1.0, sys.exit), Setting("get", sys.exit, lambda value: None)])
    with pytest.raises(CommandRefused, match=r"set cannot be 2.0: the setter of set called sys.exit\(2.0\)"):
        values.settings.change({"speed": 2, "set": 2})
    with pytest.raises(CommandRefused, match="get cannot be changed: its value cannot be read"):
        values.settings.change({"get": 2})
    assert values.now["speed"] == 1.0


def test_what_a_setter_returns_for_chaining_restores_nothing(values):
    """As a module of torch, which can be called, too."""

    class Module:
        def __call__(self):
            raise AssertionError("called")

    now = [1.0]

    def put(value):
        now[0] = value
        return Module()

    values.settings.add([Setting("rate", lambda: now[0], put)])
    values.settings.change({"rate": 2}).settle("rank 1 could not do it")
    assert now == [1.0]


def test_a_note_that_cannot_be_made_is_left_out(values):
    """The change is finished all the same."""
    values.settings.add([Setting("odd", lambda: 1.0, lambda value: None, note=lambda: 1 / 0)])
    change = values.settings.change({"odd": 2})
    change.settle(None)
    values.step()
    assert change.result(0) == {"odd": {"old": 1.0, "new": 2.0, "effective": 1.0}}


def test_a_snapshot_is_taken_when_it_is_asked_for(values):
    """After the next step, on the training thread."""
    number = values.settings.want_snapshot()
    values.now["speed"] = 5.0
    assert values.settings.snapshots == number
    values.step()
    values.step()
    assert values.settings.snapshots == number + 1 and values.settings.snapshot[0]["value"] == 5.0
    assert values.reads == 1 and values.on_step == []


def test_a_note_is_part_of_the_result(values):
    """It says what a caller should know."""
    values.settings.add([Setting("end", lambda: 1, lambda value: None, note=lambda: "the schedule keeps its shape")])
    change = values.settings.change({"end": 2})
    change.settle(None)
    values.step()
    assert change.result(0)["end"]["note"] == "the schedule keeps its shape"


def test_declared_by_name_or_in_a_list(values):
    """Both are taken, and a name once."""
    rules = {"get": lambda: 1, "set": lambda value: None}
    (one,), (two,) = declared({"x": rules}), declared([{"name": "x", **rules}])
    assert (one.name, one.get) == (two.name, two.get)
    with pytest.raises(InvalidParams, match="speed is declared twice"):
        values.settings.add(declared({"speed": rules}))


def test_a_change_in_the_step_where_training_ends(jobs_dir):
    """It is read back at once, as there is no next step."""
    now, answers = {"speed": 1.0}, []

    def change():
        with connect("last") as client:
            answers.append(client.call("change_settings", changes={"speed": 2}, wait="finished", timeout=SOON))

    thread = threading.Thread(target=change)
    with TrainingJob("last", save_on_stop=False) as job:
        job.setting("speed", get=lambda: now["speed"], set=lambda value: now.update(speed=value))
        thread.start()
        until(lambda: job._controller.pending)
        job.step(1)
    thread.join(SOON)
    assert answers[0]["result"] == {"speed": {"old": 1.0, "new": 2.0, "effective": 2.0}}
