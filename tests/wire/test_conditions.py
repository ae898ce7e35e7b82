"""Conditions: what can be said, what is refused in words, and when one holds."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgather_control.errors import InvalidParams
from forgather_control.wire import conditions
from forgather_control.wire.conditions import Condition, Term, Watch, parse


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
        ("a > 1 and b > 2 or c > 3", "joins by and or by or, not by both"),
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


@given(st.text(max_size=60))
def test_any_text_is_a_condition_or_refused(text):
    """Nothing else is raised, and a condition says what it means."""
    try:
        found = parse(text)
    except InvalidParams:
        return
    assert parse(str(found)) == found


TERMS = st.builds(
    Term,
    st.from_regex(r"[a-z_][a-z0-9_/.-]{0,8}", fullmatch=True),
    st.sampled_from(["<", "<=", ">", ">=", "==", "!="]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(1, conditions.MAX_TIMES),
)


@given(st.lists(TERMS, min_size=1, max_size=4), st.booleans())
def test_what_it_says_is_what_it_means(terms, is_any):
    """The text of a condition is parsed to the same condition."""
    condition = Condition(tuple(terms), is_any and len(terms) > 1)
    assert parse(str(condition)) == condition


def held(text, *values):
    """For each of some values whether the condition holds then."""
    watch = Watch(parse(text))
    return [watch.holds(each) for each in values]


def test_values_in_a_row():
    """One that does not fulfil it begins anew."""
    high, low = {"loss": 3.0}, {"loss": 1}
    assert held("loss > 2 for 2", high, low, high, high, high) == [False, False, False, True, True]


def test_a_name_without_a_value_keeps_its_count():
    """Logs of other names are no values of this one; texts and booleans are no numbers."""
    assert held("loss > 2 for 2", {"loss": 3}, {"other": 0}, {"loss": "x"}, {"loss": True}, {"loss": 4}) == [
        False, False, False, False, True,
    ]  # fmt: skip


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


def test_what_was_seen():
    """So that a rule can say what it waits for."""
    watch = Watch(parse("a > 0 and b > 0"))
    watch.holds({"a": 0, "c": 1})
    assert watch.seen == {"a"} and watch.condition.names == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "step"),
    [
        ("step >= 5", 5),
        ("step > 5 and loss > 1 and step == 7", 7),
        ("step < 5", -math.inf),
        ("step >= 5 or loss > 1", -math.inf),
        ("step >= 5 for 2", -math.inf),
        ("step >= 5 and epoch > 1 for 2", -math.inf),
        ("step >= 5 and loss > 1 for 2", 5),
        ("loss > 5", -math.inf),
    ],
)
def test_the_step_before_which_it_cannot_hold(text, step):
    """So that steps before it need no look."""
    assert parse(text).earliest == step
