"""Conditions on the numbers of a run, such as ``eval_loss > 2.0 for 3 and step >= 100``: parsed, and watched.

Pure: a job watches them where it logs, a client where it reads. Grammar::

    condition = term {"and" term} | term {"or" term}
    term = NAME OP NUMBER ["for" N] | NAME "is" "nan" ["for" N]

NAME is ``step``, ``epoch``, ``hours`` (since the start of the run) or a metric: it begins with a letter or ``_``, and
may contain digits and ``/ . - @ : %``. OP is one of ``< <= > >= == !=``. ``for N`` asks for N values in a row.
"""

import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

from ..errors import InvalidParams
from .limits import MAX_CONDITION, MAX_TIMES

#: The numbers that every run has, as far as they are known: at each step.
STEP_NAMES: Final = ("step", "epoch", "hours")
#: Each operator with its mirror image, which takes the number first.
_OPS: Final[dict[str, Callable[[float, float], bool]]] = {
    "<=": operator.ge, ">=": operator.le, "==": operator.eq, "!=": operator.ne, "<": operator.gt, ">": operator.lt,
}  # fmt: skip
_NAN: Final = "is nan"
#: Of a name that stands alone.
IS_TRUE: Final = ""
_TOKEN: Final = r"<=|>=|==|!=|<|>|[^\s<>=!]+|[=!]+"
_NAME: Final = r"[^\W\d][\w/.@:%-]*"
_NUMBER: Final = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_COUNT: Final = f"how often in a row, from 1 to {MAX_TIMES}"
#: The numbers that travel as texts, because JSON has none for them.
_WORDS: Final = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def number(value: Any) -> float | None:
    """Return the number that a logged value is, also one of the words that stand for one on the wire; else ``None``."""
    if isinstance(value, str):
        return _WORDS.get(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if isinstance(value, float) else int(value)


class Term(NamedTuple):
    """One comparison."""

    name: str
    op: str  #: An operator, or "is nan".
    number: float | None
    times: int  #: How many values in a row must fulfil it.

    @property
    def test(self) -> Callable[[float], bool]:
        """The function that returns whether a number fulfils it."""
        if self.number is None:
            return bool if self.op == IS_TRUE else _is_nan
        return partial(_OPS[self.op], self.number)

    def next_value(self, value: float | None) -> float:
        """Return from which value on it may have another result than now, of values that grow."""
        if self.times > 1 or value is None or self.number is None:
            return -math.inf  # each value counts
        return math.inf if value > self.number else self.number

    def __str__(self) -> str:
        text = f"{self.name} {self.op}".rstrip() + ("" if self.number is None else f" {_digits(self.number)}")
        return text + (f" for {self.times}" if self.times > 1 else "")


def _is_nan(value: float) -> bool:
    return value != value  # math.isnan raises for an integer beyond a double


def _digits(value: float) -> str:
    return repr(value).removesuffix(".0")


class Condition(NamedTuple):
    """Terms that must all hold, or one of them."""

    terms: tuple[Term, ...]
    is_any: bool

    @property
    def names(self) -> frozenset[str]:
        """What it is about."""
        return frozenset(term.name for term in self.terms)

    def next_value(self, name: str, value: float | None) -> float:
        """Return from which value of a name on, of values that grow, it may have another result than now."""
        return min((term.next_value(value) for term in self.terms if term.name == name), default=math.inf)

    def __str__(self) -> str:
        return (" or " if self.is_any else " and ").join(map(str, self.terms))


def parse(text: str, words: frozenset[str] = frozenset()) -> Condition:
    """Return the condition that a text means.

    Args:
        words: names that may also stand alone: their value is then 1 where they hold.

    Raises:
        InvalidParams: it means none; the message says what was expected, and where.
    """
    if len(text) > MAX_CONDITION:
        raise InvalidParams(f"a condition has at most {MAX_CONDITION} characters, not {len(text)}", parameter="when")
    tokens = _Tokens(text, words)
    terms, joint = [tokens.term()], None
    while (word := tokens.next()) is not None:
        if joint is not None and word in ("and", "or") and word != joint:
            raise tokens.wrong(f"{joint} throughout, as and and or cannot be mixed", word)
        if word not in ("and", "or"):
            raise tokens.wrong("and, or, for, or the end" if joint is None else f"{joint}, for, or the end", word)
        joint = word
        terms.append(tokens.term())
    return Condition(tuple(terms), joint == "or")


class _Tokens:
    """The words of a text, one after the other."""

    def __init__(self, text: str, words: frozenset[str]) -> None:
        self._text, self._tokens, self._at = text, list(re.finditer(_TOKEN, text)), 0
        self._words = words

    def next(self) -> str | None:
        """Return the next word; ``None`` at the end."""
        self._at += 1
        return self._tokens[self._at - 1][0] if self._at <= len(self._tokens) else None

    def wrong(self, expected: str, found: str | None) -> InvalidParams:
        """Return the error that says what was expected instead of the last word."""
        at = len(self._text) if found is None else self._tokens[self._at - 1].start()
        where = "at the end" if found is None else f"not {_shown(found)} (character {at + 1})"
        text = f"the condition {_shown(self._text)} needs {expected}, {where}"
        return InvalidParams(text, parameter="when", expected=expected, position=at)

    def _take(self, pattern: str, expected: str) -> str:
        token = self.next()
        if token is None or not re.fullmatch(pattern, token):
            raise self.wrong(expected, token)
        return token

    def term(self) -> Term:
        """Read one comparison."""
        name = self._take(_NAME, "the name of a metric, step, epoch or hours")
        if name in self._words and self._peek() in (None, "and", "or", "for"):
            return Term(name, IS_TRUE, None, self._times())
        op, number = self.next(), None
        if op == "is":
            self._take("(?i:nan)", "nan")
            op = _NAN
        elif op in _OPS:
            number = self._number()
        else:
            raise self.wrong(f"one of {' '.join(_OPS)} or is nan", op)
        return Term(name, op, number, self._times())

    def _peek(self) -> str | None:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else None

    def _number(self) -> float:
        token = self._take(_NUMBER, "a number")
        if math.isinf(number := float(token)):
            raise self.wrong("a number up to 1.8e308", token)
        return number

    def _times(self) -> int:
        if self._peek() != "for":
            return 1
        self._at += 1
        token = self._take(r"[0-9]{1,7}", _COUNT)
        if not 1 <= int(token) <= MAX_TIMES:
            raise self.wrong(_COUNT, token)
        return int(token)


class Watch:
    """Counts how often in a row each term of a condition was fulfilled. Not thread-safe."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self._tests = [(index, term.name, term.test) for index, term in enumerate(condition.terms)]
        self._times = [term.times for term in condition.terms]
        self._counts = [0] * len(condition.terms)
        self._enough = any if condition.is_any else all
        #: The names that had no value so far.
        self.unseen = set(condition.names)

    def feed(self, values: Mapping[str, float]) -> bool:
        """Note new numbers, each of which counts once; return whether the condition holds now.

        A name without a number keeps its count. See ``number`` for what is one.
        """
        counts = self._counts
        for index, name, test in self._tests:
            value = values.get(name)
            if value is not None:
                counts[index] = counts[index] + 1 if test(value) else 0
        if self.unseen:
            self.unseen -= values.keys()
        return self._enough(map(operator.ge, counts, self._times))


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 80 else text[:77] + "...")
