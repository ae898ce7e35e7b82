"""Loading named tuples from JSON objects: what is good is kept, what is not is one clear ValueError."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from forgather_control import schema
from forgather_control.schema import INTEGER, NULL, NUMBER, OBJECT, TEXT, Field, load, nullable

from .support.harness import ROOT


class Pet(NamedTuple):
    """What the tests load."""

    name: str
    legs: int
    weight: float | None = None
    kind: str = "cat"
    owner: str | None = None
    more: object = None


FIELDS = {
    "name": Field(TEXT, longest=5, printable=True),
    "legs": Field(INTEGER, 0, 8),
    "weight": Field(NUMBER + NULL, 0.0, 1e3),
    "kind": Field(TEXT, choices=("cat", "dog")),
    "owner": Field(TEXT + NULL, longest=3),
    "more": Field(OBJECT + NULL, convert=lambda value: sorted(value)),
}
GOOD = {"name": "Tom", "legs": 4}


def test_good_members_are_kept():
    """Every member that is there has its value, also at the limits; the others have their defaults."""
    assert load(Pet, FIELDS, GOOD, "the pet") == Pet("Tom", 4)
    most = {"name": "12345", "legs": 8, "weight": 1e3, "kind": "dog", "owner": "", "more": {"b": 1, "a": 2}}
    assert load(Pet, FIELDS, most, "the pet") == Pet("12345", 8, 1e3, "dog", "", ["a", "b"])
    assert load(Pet, FIELDS, {**GOOD, "weight": None, "owner": None, "more": None}, "the pet") == Pet("Tom", 4)
    assert load(Pet, FIELDS, {**GOOD, "weight": 5}, "the pet").weight == 5


def test_unknown_members_are_ignored():
    """A later version may add members, whatever they hold."""
    assert load(Pet, FIELDS, {**GOOD, "tail": [{}], "": None}, "the pet") == Pet("Tom", 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 5}, "name of the pet must be a string of 1 to 5 printable characters, not 5"),
        ({"name": ""}, "name of the pet must be a string of 1 to 5 printable characters, not ''"),
        ({"name": "123456"}, "name of the pet must be a string of 1 to 5 printable characters, not '123456'"),
        ({"name": "\x1b[2J"}, r"name of the pet must be a string of 1 to 5 printable characters, not '\x1b[2J'"),
        ({"legs": True}, "legs of the pet must be an integer from 0 to 8, not True"),
        ({"legs": 4.0}, "legs of the pet must be an integer from 0 to 8, not 4.0"),
        ({"legs": 9}, "legs of the pet must be an integer from 0 to 8, not 9"),
        ({"legs": None}, "legs of the pet must be an integer from 0 to 8, not None"),
        ({"weight": "1"}, "weight of the pet must be a number from 0.0 to 1000.0 or null, not '1'"),
        ({"weight": float("nan")}, "weight of the pet must be a number from 0.0 to 1000.0 or null, not nan"),
        ({"weight": -1}, "weight of the pet must be a number from 0.0 to 1000.0 or null, not -1"),
        ({"kind": "cow"}, "kind of the pet must be one of cat, dog, not 'cow'"),
        ({"kind": []}, "kind of the pet must be one of cat, dog, not []"),
        ({"owner": "1234"}, "owner of the pet must be a string of 0 to 3 characters or null, not '1234'"),
        ({"more": 1}, "more of the pet must be an object or null, not 1"),
    ],
)
def test_a_bad_member_is_named(changes, message):
    """The message says which member, what was expected and what was found."""
    with pytest.raises(ValueError) as caught:
        load(Pet, FIELDS, {**GOOD, **changes}, "the pet")
    assert str(caught.value) == message


def test_a_missing_member_is_named():
    """A member without a default is required."""
    with pytest.raises(ValueError, match=r"^the pet has no legs$"):
        load(Pet, FIELDS, {"name": "Tom"}, "the pet")


@pytest.mark.parametrize("value", [None, 5, "Tom", ["Tom", 4], b"{}"])
def test_only_an_object_is_loaded(value):
    """Any other JSON value is refused."""
    with pytest.raises(ValueError, match=r"^the pet must be an object, not "):
        load(Pet, FIELDS, value, "the pet")


def test_numbers_are_finite_by_default():
    """Without a range, NaN, infinities and integers that other programs cannot read are refused."""
    field = Field(NUMBER)
    assert [field.accepts(value) for value in (0, -1.5, 1 << 62)] == [True] * 3
    assert not any(field.accepts(value) for value in (float("nan"), float("inf"), -float("inf"), 10**400))


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        (schema.PID, (1, 2**31 - 1), (0, -1, 2**31, 1.0, None)),
        (schema.TIME, (0, 1.7e9, -5), (float("nan"), 1e300, 10**400, None)),
        (nullable(schema.PID), (None, 5), (0, "5")),
    ],
)
def test_common_fields(field, good, bad):
    """Process ids and times have the same rules everywhere."""
    assert all(field.accepts(value) for value in good) and not any(field.accepts(value) for value in bad)


def test_errors_are_short_and_printable():
    """Whatever the value, the message can be printed on a terminal."""
    nested = []
    for _ in range(100_000):
        nested = [nested]
    for value in ("\x1b" * 1000, ["x"] * 1000, 10**5000, nested):
        with pytest.raises(ValueError) as caught:
            load(Pet, FIELDS, {**GOOD, "legs": value}, "the pet")
        assert len(str(caught.value)) < 200 and str(caught.value).isprintable() and str(caught.value).isascii()
    while nested:  # freed level by level: the interpreter's own way recurses
        nested = nested.pop()


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000, b'{"a": ', b"1" * 5000])
def test_what_is_no_json_is_a_value_error(data):
    """Bytes that are not JSON never raise anything else."""
    with pytest.raises(ValueError):
        schema.parse_json(data)
    assert schema.parse_json(b'{"a": [1]}') == {"a": [1]}


def test_a_defect_of_the_table_is_no_value_error():
    """A field that the class does not have is the programmer's mistake, not the file's."""
    with pytest.raises(TypeError):
        load(Pet, {**FIELDS, "tail": Field(TEXT)}, {**GOOD, "tail": "long"}, "the pet")


def test_a_thousand_records_cost_little():
    """1,000 records of six members take less than 50 ms."""
    value = json.loads(json.dumps({**GOOD, "weight": 5.5, "kind": "dog", "owner": None}))
    begin = time.thread_time()
    for _ in range(1000):
        load(Pet, FIELDS, value, "the pet")
    assert time.thread_time() - begin < 0.05


def test_it_imports_only_what_every_client_imports():
    """Loading it adds no module of the standard library to those that the command line needs anyway."""
    code = (
        "import __future__, sys, argparse, json, socket, typing; before = {*sys.modules};"
        "import forgather_control.schema;"
        "print({name for name in {*sys.modules} - before if not name.startswith('forgather_control')})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
