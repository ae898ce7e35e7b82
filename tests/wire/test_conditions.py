"""Conditions: what can be said, what is refused in words, and when one holds."""

from __future__ import annotations

import math
import time
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forgather_control.errors import InvalidParams
from forgather_control.wire import limits
from forgather_control.wire.conditions import Condition, Term, Watch, number, parse

from ..support.harness import MS


@pytest.mark.parametrize(
    ("text", "terms", "is_any"),
    [
        ("loss > 2.0", [("loss", ">", 2.0, 1)], False),
        ("eval/loss<=1e-4 for 3", [("eval/loss", "<=", 1e-4, 3)], False),
        ("loss is nan", [("loss", "is nan", None, 1)], False),
        ("loss is NaN for 2 or step>=10", [("loss", "is nan", None, 2), ("step", ">=", 10.0, 1)], True),
        ("a.b-c == -1 and epoch != .5", [("a.b-c", "==", -1.0, 1), ("epoch", "!=", 0.5, 1)], False),
        ("  hours   <  +2. ", [("hours", "<", 2.0, 1)], False),
        ("forward > 1 and order > 2", [("forward", ">", 1.0, 1), ("order", ">", 2.0, 1)], False),
    ],
)
def test_what_can_be_said(text, terms, is_any):
    """Spaces around operators are free."""
    assert parse(text) == Condition(tuple(Term(*term) for term in terms), is_any)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "needs the name of a metric, step, epoch or hours, at the end"),
        ("loss", "needs one of <= >= == != < > or is nan, at the end"),
        ("loss > ", "needs a number, at the end"),
        ("loss > x", "needs a number, not 'x'"),
        ("loss > nan", "needs a number, not 'nan'"),
        ("loss > inf", "needs a number"),
        ("loss => 1", "needs one of"),
        ("loss = 1", "needs one of <= >= == != < > or is nan, not '='"),
        ("loss is not nan", "needs nan, not 'not'"),
        ("loss > 1 for", "needs how often in a row"),
        ("loss > 1 for 0", "needs how often in a row"),
        ("loss > 1 for 1.5", "needs how often in a row"),
        ("loss > 1 for 9999999", "needs how often in a row"),
        ("loss > 1 and", "needs the name"),
        ("loss > 1 xor step > 2", "needs and, or, for, or the end, not 'xor'"),
        ("a > 1 and b > 2 or c > 3", "needs and throughout, as and and or cannot be mixed, not 'or' (character 17)"),
        ("a > 1 or b > 2 and c > 3", "needs or throughout"),
        ("a > 1 or b > 2 xor c > 3", "needs or, for, or the end, not 'xor'"),
        ("loss > 1e999", "needs a number up to 1.8e308, not '1e999'"),
        ("loss > \u0663", "needs a number"),
        ("loss > 1 for \u0663", "needs how often in a row"),
        ("loss > -1.e5.3", "needs a number"),
        ("loss > 1\x00", "needs a number"),
        ("1 > 2", "needs the name"),
        ("(loss > 1)", "needs the name"),
        ("__import__('os')", "needs the name"),
        ("a > 1 " * 100, "at most 500 characters"),
    ],
)
def test_what_is_refused(text, words):
    """With what was expected, and where."""
    with pytest.raises(InvalidParams) as caught:
        parse(text)
    assert words in caught.value.message and len(caught.value.message) < 300
    assert caught.value.data["parameter"] == "when"


def test_where_it_is_wrong():
    """The first word that does not fit, counted from 1 in the message and from 0 in the data."""
    with pytest.raises(InvalidParams, match=r"needs a number, not 'x' \(character 21\)") as caught:
        parse("loss  > 1 and step >x")
    assert caught.value.data == {"parameter": "when", "expected": "a number", "position": 20}


#: Words of the language, and what may stand between them.
WORDS = st.sampled_from(
    [
        "loss",
        "step",
        "is",
        "nan",
        "for",
        "and",
        "or",
        "<",
        ">=",
        "==",
        "=",
        "1",
        "2.5",
        "-1e9",
        "3",
        "(",
        ")",
        "NaN",
        "\n",
    ]
)


@given(st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=12).map(" ".join), st.lists(WORDS).map("".join)))
@example("a" * 500 + ">1")
@example("a > " + "9" * 490)
@example("a > 1 " + "and a > 1 " * 45)
@example("a" * 10_000_000)
@example("a > 1 for " + "9" * 480)
def test_any_text_is_a_condition_or_refused(text):
    """Nothing else is raised, and a condition says what it means."""
    try:
        found = parse(text)
    except InvalidParams as err:
        assert len(err.message) < 400
        return
    assert parse(str(found)) == found and found.names


def test_the_longest_condition():
    """In characters, and one more; and how often in a row."""
    longest = "a > 1" + " " * (limits.MAX_CONDITION - 5)
    assert parse(longest) == parse("a > 1")
    with pytest.raises(InvalidParams, match="at most 500 characters, not 501"):
        parse(longest + " ")
    assert parse(f"a > 1 for {limits.MAX_TIMES}").terms[0].times == limits.MAX_TIMES
    with pytest.raises(InvalidParams, match="from 1 to 1000000"):
        parse(f"a > 1 for {limits.MAX_TIMES + 1}")


def test_hostile_texts_are_refused_quickly():
    """No pattern backtracks over a long text."""
    begin = time.perf_counter()
    for piece in ("a", "1", ".", "=", "1.", "e", " ", "a/", "-", "9e", "<=", "a > 1 and "):
        for text in (piece * 500, f"loss > {piece * 490}", f"a > 1 for {piece * 480}"):
            with suppress(InvalidParams):
                parse(text[: limits.MAX_CONDITION])
    assert time.perf_counter() - begin < 500 * MS


NAMES = st.from_regex(r"[a-z_][a-z0-9_/.@:%-]{0,8}", fullmatch=True) | st.sampled_from(["and", "for", "is", "nan"])
OPS = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
TIMES = st.integers(1, limits.MAX_TIMES)
TERMS = st.builds(Term, NAMES, OPS, st.floats(allow_nan=False, allow_infinity=False), TIMES) | st.builds(
    Term, NAMES, st.just("is nan"), st.none(), TIMES
)


@given(st.lists(TERMS, min_size=1, max_size=4), st.booleans())
def test_what_it_says_is_what_it_means(terms, is_any):
    """The text of a condition is parsed to the same condition."""
    condition = Condition(tuple(terms), is_any and len(terms) > 1)
    assert parse(str(condition)) == condition


def held(text, *values):
    """For each of some values whether the condition holds then."""
    watch = Watch(parse(text))
    return [watch.feed(each) for each in values]


def test_values_in_a_row():
    """One that does not fulfil it begins anew."""
    high, low = {"loss": 3.0}, {"loss": 1}
    assert held("loss > 2 for 2", high, low, high, high, high) == [False, False, False, True, True]


def test_a_name_without_a_value_keeps_its_count():
    """Logs of other names are no values of this one."""
    assert held("loss > 2 for 2", {"loss": 3}, {"other": 0}, {}, {"loss": 4}) == [False, False, False, True]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1, 1), (1.5, 1.5), (10**400, 10**400), (-math.inf, -math.inf), ("Infinity", math.inf), ("-Infinity", -math.inf)]
    + [(wrong, None) for wrong in (True, None, "1", "nan", "infinity", [], {}, b"1", object())],
)
def test_what_is_a_number(value, expected):
    """Also the words for those that JSON has not; booleans and other texts are none."""
    assert number(value) == expected


def test_numbers_lose_their_class():
    """A subclass of float, such as NumPy's, has its own comparisons; NaN is one number, too."""

    class Odd(float):
        def __gt__(self, other):
            raise AssertionError("compared")

    assert type(number(Odd(1))) is float and math.isnan(number("NaN"))


@pytest.mark.parametrize("op", ["<", "<=", ">", ">=", "==", "!="])
def test_operators(op):
    """Each as Python compares the value with the number."""
    for value in (-1.0, 0, 0.5, 1, math.inf, -math.inf, math.nan, 10**400):
        assert held(f"a {op} 0.5", {"a": value}) == [eval(f"value {op} 0.5", {"value": value})]
    assert held("a is nan", {"a": 10**400}, {"a": math.nan}) == [False, True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("loss is nan", True), ("loss > 1", False), ("loss < 1", False), ("loss == 1", False), ("loss != 1", True)],
)
def test_nan(text, expected):
    """As IEEE 754 compares it."""
    assert held(text, {"loss": math.nan}) == [expected]


def test_and_and_or():
    """Each term has its own count."""
    values = [{"a": 1}, {"b": 1}, {"a": 0}]
    assert held("a > 0 and b > 0", *values) == [False, True, False]
    assert held("a > 0 or b > 0", *values) == [True, True, True]


def test_what_was_never_seen():
    """So that a rule can say what it waits for."""
    watch = Watch(parse("a > 0 and b > 0"))
    watch.feed({"a": 0, "c": 1})
    assert watch.unseen == {"b"} and watch.condition.names == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("step >= 5", 3, 5),
        ("step >= 5", 5, 5),
        ("step >= 5", 6, math.inf),
        ("step > 5 and loss > 1 and step == 7", 3, 5),
        ("step > 5 or loss > 1 or step == 7", 6, 7),
        ("step >= 5 for 2", 9, -math.inf),
        ("step is nan", 9, -math.inf),
        ("step >= 5", None, -math.inf),
        ("step >= 5", math.nan, 5),
        ("loss > 5", 3, math.inf),
    ],
)
def test_from_which_value_on_it_may_change(text, value, expected):
    """So that steps before it need no look."""
    condition = parse(text)
    assert condition.next_value("step", value) == expected


ON_STEPS = st.builds(Term, st.just("step"), OPS, st.integers(0, 9).map(float), st.just(1))


@given(st.lists(ON_STEPS, min_size=1, max_size=4), st.booleans(), st.lists(st.integers(0, 12), min_size=1).map(sorted))
def test_nothing_changes_before_that_value(terms, is_any, steps):
    """Of steps that grow, those that are left out would not have changed the result."""
    condition = Condition(tuple(terms), is_any)
    every, few = Watch(condition), Watch(condition)
    result, looks_at = False, -math.inf
    for step in steps:
        if step >= looks_at:
            result, looks_at = few.feed({"step": step}), condition.next_value("step", step)
        assert every.feed({"step": step}) == result
