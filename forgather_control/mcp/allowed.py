"""What an assistant may do: reading always, and acting as far as the words of ``--allow`` go."""

from __future__ import annotations

from typing import Final, NamedTuple

from ..client.target import suggestion
from ..errors import CommandRefused, InvalidParams
from ..wire.builtin import BUILTIN
from ..wire.jsonrpc import Json
from ..wire.methods import OWN, Method

#: The word for the commands of training scripts.
RUN: Final = "run"
#: The words that can be limited to names: ``set:learning_rate``.
_LIMITED: Final = ("set", RUN)

#: The tools that stand for no method, and read.
_LOCAL: Final = ("events", "wait")


def word_of(method: Method) -> str:
    """Return the name of a method's tool, which is also its word in ``--allow``: its verb, if it has one."""
    return method.verb or method.name


#: The methods that act, by word.
ACTING: Final = {word_of(method): method.name for method in BUILTIN.values() if not method.reads_only}


class Allowed(NamedTuple):
    """The words that were given."""

    #: For each word the settings or commands that it is limited to; ``None``: all of them.
    names: dict[str, frozenset[str] | None] = {}

    @classmethod
    def parse(cls, text: str) -> Allowed:
        """Return what a list such as ``save,stop,set:learning_rate`` allows; InvalidParams: a word is wrong."""
        names: dict[str, frozenset[str] | None] = {}
        for entry in filter(None, (each.strip() for each in text.split(","))):
            word, colon, name = entry.partition(":")
            _check(word, bool(colon), name)
            known = names.get(word, frozenset())
            names[word] = None if known is None or not colon else known | {name}
        return cls(names)

    def only(self, word: str) -> frozenset[str] | None:
        """Return the names that a word is limited to; ``None`` if it is not."""
        return self.names.get(word)

    def check(self, method: str, params: dict[str, Json]) -> None:
        """Raise CommandRefused unless this call is allowed; InvalidParams: it cannot be judged."""
        known = BUILTIN.get(method)
        if method in _LOCAL or (known is not None and known.reads_only):
            return
        word = word_of(known) if known is not None else RUN if method.startswith(OWN) else method
        if word not in self.names:
            raise refusal(word if word != RUN else f"{RUN}:{method.removeprefix(OWN)}")
        if method == "add_rule":  # it gives another command later
            self.check(str(params.get("do")), _object(params.get("params", {}), "params"))
        limited = self.names[word]
        if limited is not None:
            given = [method.removeprefix(OWN)] if word == RUN else _object(params.get("changes", {}), "changes")
            for name in given:
                if name not in limited:
                    raise refusal(f"{word}:{name}")


def _check(word: str, is_limited: bool, name: str) -> None:
    reading = {word_of(method) for method in BUILTIN.values() if method.reads_only} | {*_LOCAL}
    if word in reading:
        raise InvalidParams(f"{word} only reads, so it needs no --allow")
    if word not in ACTING and word != RUN:
        hint = suggestion(word, [*ACTING, RUN], f"choose from {', '.join([*ACTING, RUN])}")
        raise InvalidParams(f"--allow knows no verb {ascii(word)[:140]}; {hint}")
    if is_limited and (word not in _LIMITED or not name):
        raise InvalidParams(f"--allow takes a name behind the colon of {' and '.join(_LIMITED)}, not {ascii(word)}:")


def refusal(word: str) -> CommandRefused:
    """Return the error for a call that is not allowed; ``word`` is what ``--allow`` would have to name."""
    shown = ascii(word)[1:-1][:140]
    text = f"{shown} is not allowed: it acts on the job, and this server was started without --allow {shown}"
    return CommandRefused(f"{text}. Only the user can change that", needs=f"allow {shown}")


def _object(value: Json, name: str) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise InvalidParams(f"{name} must be an object")
    return value
