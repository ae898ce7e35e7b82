"""Load named tuples from JSON objects that are not trusted: files of other processes, replies of other programs.

A table of :class:`Field` for each class says what its members may be. There are no annotations to read and no
``dataclasses`` to import, because every start of the command line pays for both: ``dataclasses`` costs half as much
as argparse, json and socket together. For the same reason the modules that it loads do not import ``annotations``
from ``__future__`` where they define a named tuple, which would compile each annotation.
"""

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, NamedTuple, TypeVar

T = TypeVar("T")

#: The types of a member as JSON has them; a boolean is no number. They add up: ``TEXT + NULL``.
TEXT: Final = (str,)
INTEGER: Final = (int,)
NUMBER: Final = (int, float)
OBJECT: Final = (dict,)
NULL: Final = (type(None),)

_WORDS: Final = {str: "a string", int: "an integer", float: "a number", dict: "an object"}


class Field(NamedTuple):
    """The rules for one member."""

    types: tuple[type, ...]  #: See ``TEXT`` and the others above.
    #: The range of a number. The default keeps out NaN, infinities and integers of 400 digits, which would be no
    #: numbers to the programs that read our output.
    minimum: float = -(1 << 63)
    maximum: float = 1 << 63
    longest: int | None = None  #: The most characters of a string.
    printable: bool = False  #: Such a string must have at least one character, and only printable ones.
    choices: Collection[Any] | None = None  #: The only values that are allowed.
    #: Turns the checked value into the one to keep, or raises ValueError; not called for null.
    convert: Callable[[Any], Any] | None = None

    def accepts(self, value: Any) -> bool:
        """Return whether a value follows the rules."""
        # Unpacked, because ``list`` checks 19 members of each of perhaps 10,000 jobs.
        types, minimum, maximum, longest, printable, choices, _ = self
        kind = type(value)
        if kind not in types or (choices is not None and value not in choices):
            return False
        if kind is str:
            fits = longest is None or len(value) <= longest
            return fits and (not printable or (value != "" and value.isprintable()))
        return kind not in NUMBER or minimum <= value <= maximum

    @property
    def expected(self) -> str:
        """The rules in words, for the error message."""
        if self.choices is not None:
            return "one of " + ", ".join(map(str, self.choices))
        text = " or ".join(word for kind, word in _WORDS.items() if kind in self.types)
        text = text.replace("an integer or a number", "a number")
        if int in self.types:
            text += f" from {self.minimum} to {self.maximum}"
        if self.longest is not None:
            text += f" of {int(self.printable)} to {self.longest} {'printable ' * self.printable}characters"
        return text + (" or null" if type(None) in self.types else "")


#: Seconds since the epoch, up to the year 10000, where calendars end.
TIME: Final = Field(NUMBER, -253402300800.0, 253402300800.0)
PID: Final = Field(INTEGER, 1, (1 << 31) - 1)


def nullable(field: Field) -> Field:
    """Return the same field with null allowed."""
    return field._replace(types=field.types + NULL)


def load(cls: Callable[..., T], fields: Mapping[str, Field], value: object, what: str) -> T:
    """Return the named tuple ``cls`` that a JSON object holds.

    Members without a field are ignored: a later version may have added them.

    Args:
        fields: by member name. A member that ``cls`` has no default for is required.
        value: from ``json``.
        what: names the object in error messages, for example "the job record".

    Raises:
        ValueError: naming the member, what was expected and what was found, printably and in a few words.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, not {shown(value)}")
    members = {}
    for name, field in fields.items():
        if name in value:
            item = value[name]
            if not field.accepts(item):
                raise ValueError(f"{name} of {what} must be {field.expected}, not {shown(item)}")
            members[name] = item if field.convert is None or item is None else field.convert(item)
    try:
        return cls(**members)
    except TypeError:
        for name in cls._fields:  # type: ignore[attr-defined]
            if name not in members and name not in cls._field_defaults:  # type: ignore[attr-defined]
                raise ValueError(f"{what} has no {name}") from None
        raise


def shown(value: object) -> str:
    """Return a value as an error message quotes it: in printable ASCII, at most 80 characters."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested too deeply; an integer of more digits than Python converts
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def parse_json(data: bytes) -> Any:
    """Return the JSON value that ``data`` holds.

    Raises:
        ValueError: it is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError as err:
        raise ValueError("it is nested too deeply") from err
