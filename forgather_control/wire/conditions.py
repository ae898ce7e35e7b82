"""Conditions on the numbers of a run, such as ``eval_loss > 2.0 for 3 and step >= 100``: parsed, and watched.

Pure: a job watches them where it logs, a client where it reads. Grammar::

    condition = term {"and" term} | term {"or" term}
    term = NAME OP NUMBER ["for" N] | NAME "is" "nan" ["for" N]

NAME is ``step``, ``epoch``, ``hours`` (since the start of the run) or a metric; it may contain ``/ . -``. OP is one of
``< <= > >= == !=``. ``for N`` asks for N values in a row.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from ..errors import InvalidParams

#: The numbers that every run has, as far as they are known: at each step.
STEP_NAMES: Final = ("step", "epoch", "hours")
#: The longest text of a condition, and the largest N of "for N".
MAX_LENGTH: Final = 500
MAX_TIMES: Final = 1_000_000

_OPS: Final[dict[str, Callable[[float, float], bool]]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_NAN: Final = "is nan"
_TOKEN: Final = r"\s*(<=|>=|==|!=|<|>|[^\s<>=!]+|[=!]+)"
_NAME: Final = r"[^\W\d][\w/.-]*"
_NUMBER: Final = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"


class Term(NamedTuple):
    """One comparison."""

    name: str
    op: str  #: An operator, or "is nan".
    number: float | None
    times: int  #: How many values in a row must fulfil it.

    def holds(self, value: float) -> bool:
        """Return whether a value fulfils it."""
        return math.isnan(value) if self.number is None else _OPS[self.op](value, self.number)

    def __str__(self) -> str:
        text = f"{self.name} {self.op}" + ("" if self.number is None else f" {self.number:.17g}")
        return text + (f" for {self.times}" if self.times > 1 else "")


class Condition(NamedTuple):
    """Terms that must all hold, or one of them."""

    terms: tuple[Term, ...]
    is_any: bool

    @property
    def names(self) -> frozenset[str]:
        """What it is about."""
        return frozenset(term.name for term in self.terms)

    @property
    def earliest(self) -> float:
        """The step before which it cannot hold, whatever the values of earlier steps are."""
        counted = any(term.times > 1 for term in self.terms if term.name in STEP_NAMES)
        if self.is_any or counted:
            return -math.inf
        numbers = [term.number for term in self.terms if term.name == "step" and term.op in (">", ">=", "==")]
        return max((number for number in numbers if number is not None), default=-math.inf)

    def __str__(self) -> str:
        return (" or " if self.is_any else " and ").join(map(str, self.terms))


def parse(text: str) -> Condition:
    """Return the condition that a text means.

    Raises:
        InvalidParams: it means none; the message says what was expected, and where.
    """
    if len(text) > MAX_LENGTH:
        raise InvalidParams(f"a condition has at most {MAX_LENGTH} characters, not {len(text)}")
    tokens = _Tokens(text)
    terms, joints = [tokens.term()], set()
    while (joint := tokens.next()) is not None:
        if joint not in ("and", "or"):
            raise tokens.wrong("and, or, for, or the end", joint)
        joints.add(joint)
        terms.append(tokens.term())
    if len(joints) > 1:
        raise InvalidParams(f"a condition joins by and or by or, not by both: {_shown(text)}")
    return Condition(tuple(terms), "or" in joints)


class _Tokens:
    """The words of a text, one after the other."""

    def __init__(self, text: str) -> None:
        self._text, self._tokens, self._at = text, re.findall(_TOKEN, text), 0

    def next(self) -> str | None:
        if self._at == len(self._tokens):
            return None
        self._at += 1
        return str(self._tokens[self._at - 1])

    def wrong(self, expected: str, found: str | None) -> InvalidParams:
        where = "at the end" if found is None else f"not {_shown(found)}"
        return InvalidParams(f"the condition {_shown(self._text)} needs {expected}, {where}", parameter="when")

    def _take(self, pattern: str, expected: str) -> str:
        token = self.next()
        if token is None or not re.fullmatch(pattern, token):
            raise self.wrong(expected, token)
        return token

    def term(self) -> Term:
        name = self._take(_NAME, "the name of a metric, step, epoch or hours")
        op, number = self.next(), None
        if op == "is":
            self._take("(?i:nan)", "nan")
            op = _NAN
        elif op in _OPS:
            number = float(self._take(_NUMBER, "a number"))
        else:
            raise self.wrong(f"one of {' '.join(_OPS)} or is nan", op)
        return Term(name, op, number, self._times())

    def _times(self) -> int:
        if self._at == len(self._tokens) or self._tokens[self._at] != "for":
            return 1
        self._at += 1
        times = int(self._take(r"\d{1,7}", f"how often in a row, from 1 to {MAX_TIMES}"))
        if not 1 <= times <= MAX_TIMES:
            raise self.wrong(f"how often in a row, from 1 to {MAX_TIMES}", str(times))
        return times


class Watch:
    """Counts how often in a row each term of a condition was fulfilled. Not thread-safe."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self._counts = [0] * len(condition.terms)
        #: The names that had a value so far.
        self.seen: set[str] = set()

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Note new values, each of which counts once; return whether the condition holds now.

        A name without a value, or with one that is no number, keeps its count.
        """
        for index, term in enumerate(self.condition.terms):
            value = values.get(term.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.seen.add(term.name)
                self._counts[index] = self._counts[index] + 1 if term.holds(value) else 0
        held = (count >= term.times for count, term in zip(self._counts, self.condition.terms))
        return any(held) if self.condition.is_any else all(held)


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 80 else text[:77] + "...")
