"""The check of a parameter against its JSON Schema, compared with an independent implementation."""

from __future__ import annotations

import json
import math

import jsonschema
import pytest

from forgather_control import states
from forgather_control.wire import schemas
from forgather_control.wire.builtin import BUILTIN

PARAMS = {(param.name, str(param.schema)): param for method in BUILTIN.values() for param in method.params}
TEXTS = ["", "a", "auto", "applied", "accepted", "x" * 128, "x" * 129, "x" * 1000, "x" * 1001]
NUMBERS = [0, 1, -1, 5, 1.5, -0.0, 1e9, 1e9 + 1, 600, 600.1, 10**30]
VALUES = [None, True, False, *NUMBERS, *TEXTS, [], ["phase"], ["phase", 3], ["no"], {}, {"a": 1}]


@pytest.mark.parametrize("param", PARAMS.values(), ids=lambda param: param.name)
@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(value)[:20])
def test_what_is_checked_is_what_the_schema_says(param, value):
    """What ``rpc.discover`` promises and what is checked are one rule."""
    allowed = jsonschema.Draft7Validator(param.schema).is_valid(value)
    # JSON Schema counts 1.0 as an integer and true as no number, as we do; only text that prints is our own rule.
    try:
        schemas.check(param.schema, value)
        passes = True
    except ValueError:
        passes = False
    assert passes == allowed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_that_json_lacks(value):
    """NaN and infinities fit no bounded number."""
    with pytest.raises(ValueError, match="a number of seconds from 0 to 600"):
        schemas.check({"type": "number", "minimum": 0, "maximum": 600, "unit": "seconds"}, value)


@pytest.mark.parametrize("value", ["a\nb", "\x1b[2J", "\0", "\ud800", "\u202e", "\u2028", "\x7f"], ids=ascii)
def test_text_that_does_not_print_is_refused(value):
    """An id ends up on terminals, so that control characters are refused."""
    with pytest.raises(ValueError, match="printable"):
        schemas.check(schemas.COMMAND_ID, value)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"enum": ["auto", True, False], "type": ["string", "boolean"]}, '"auto" or true or false'),
        ({"type": "integer"}, "a whole number"),
        ({"type": ["integer", "null"], "minimum": 1}, "a whole number from 1, or null"),
        ({"type": "array", "items": {"type": "string"}}, "a list whose items are each a string"),
        ({"type": "boolean"}, "true or false"),
        ({"type": "string"}, "a string"),
    ],
)
def test_the_expectation_in_words(schema, words):
    """A refusal names what was expected."""
    assert schemas.expected(schema) == words


def test_whole_numbers_become_floats_where_a_number_is_wanted():
    """An effect gets the type that its schema names."""
    assert type(schemas.check({"type": "number"}, 3)) is float
    assert type(schemas.check({"type": "integer"}, 3)) is int
    assert schemas.check({"type": ["number", "null"]}, None) is None
    assert [type(item) for item in schemas.check({"type": "array", "items": {"type": "number"}}, [3, 1.5])] == [
        float
    ] * 2
    assert [type(item) for item in schemas.check({"type": "array", "items": {"type": "integer"}}, [3.0])] == [int]


def test_the_words_of_results_are_those_of_the_code():
    """Each enumeration of results.json lists the words that states.py owns."""
    found = schemas.results()
    record = found["CommandRecord"]["properties"]
    for schema, words in (
        (record["state"], states.COMMAND_STATES),
        (record["requested_by"]["properties"]["via"], states.VIAS),
        (found["JobStatus"]["properties"]["status"], states.TRAINING_STATUSES),
        (found["ListedJobs"]["items"]["properties"]["state"], states.JOB_STATES),
        (found["ListedRanks"]["items"]["properties"]["state"], states.RANK_STATES),
        (found["ListedStacks"]["items"]["properties"]["state"], states.RANK_STATES),
    ):
        assert schema["enum"] == list(words)


def test_references_in_results_are_resolved():
    """A schema stands alone: a validator needs no other document."""
    found = schemas.results()
    assert "$ref" not in json.dumps(found)
    assert found["JobStatus"]["properties"]["commands"]["items"] == found["CommandRecord"]
    assert {method.returns for method in BUILTIN.values()} == set(found)
