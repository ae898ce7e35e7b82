"""The options of the command line: what each one reads, and how a method's parameter becomes an option."""

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from ..client import limits
from ..errors import ControlError
from ..version import VERSION
from ..wire import addresses, methods, schemas
from ..wire.builtin import BUILTIN

#: Begins the names under which argparse keeps a method's own parameters.
PARAM: Final = "param "
#: Characters of a token file that are read; our tokens have 43.
_MAX_TOKEN: Final = 4096


def _host(text: str) -> str:
    from ..client.ssh import check_host

    return _valid(check_host, text)


def _address(text: str) -> str:
    return _valid(addresses.parse, text)


def _port(text: str) -> str:
    return _address(text if "://" in text else f"tcp://{text}")


def _valid(check: Callable[[str], Any], text: str) -> str:
    try:
        check(text)
    except ControlError as err:
        raise argparse.ArgumentTypeError(str(err)) from err
    return text


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            token = file.readline(_MAX_TOKEN).strip()
    except (OSError, ValueError) as err:
        raise argparse.ArgumentTypeError(f"{path!r} cannot be read ({err})") from err
    if not token:
        raise argparse.ArgumentTypeError(f"{path!r} holds no token in its first line")
    return token


def _reader(param: methods.Param) -> Callable[[str], Any]:
    """Return the function that turns a word into a parameter's value."""
    kinds = param.schema.get("type", ())
    words = {_word(choice): choice for choice in param.schema.get("enum", ())}
    expected = " or ".join(words) or schemas.expected(param.schema).removesuffix(", or null")

    def value(text: str) -> Any:
        try:
            is_number = "number" in kinds or "integer" in kinds
            return schemas.check(param.schema, float(text) if is_number else words.get(text, text))
        except ValueError as err:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from err

    return value


def _word(choice: Any) -> str:
    """Return how a choice is typed: JSON's true and false are yes and no."""
    return ("yes" if choice else "no") if isinstance(choice, bool) else str(choice)


def _rules(doc: str, metavar: str = "", read: Callable[[str], Any] = str, **more: Any) -> dict[str, Any]:
    """Return what ``add_argument`` takes: for an option with a value that has a ``metavar``, else for a flag."""
    kind = {"metavar": metavar, "type": read} if metavar else {"action": "store_true"}
    return {"help": doc, **kind, **more}


def _interval(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.05 to 3600")
    return value


def _until(text: str) -> str:
    from ..client.waiting import parse

    _valid(parse, text)
    return text


def _allowed(text: str) -> str:
    from ..mcp.allowed import Allowed

    return _valid(Allowed.parse, text)


_seconds = _reader(methods.TIMEOUT)


def _at_a_time(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text[:9]) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of jobs from 1 to 1000")
    return int(text)


def _number(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a rule")
    return int(text)


#: The columns that ``list`` can be sorted by.
SORTABLE: Final = ("state", "job", "step", "progress", "speed", "left", "age", "host", "pid", "port")

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}


def _duration(text: str) -> float:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 30m, 1h or 2d")
    return float(found[1]) * _UNITS[found[2]]


#: The options that several verbs have, as ``add_argument`` takes them.
_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "--json": _rules("print what the wire said, one JSON text"),
    "--version": {"action": "version", "version": f"forgather-control {VERSION}"},
    "--force": _rules("do not ask"),
    "--all": _rules("all live jobs"),
    "--parallel": _rules(
        f"how many jobs are called at a time (default {limits.PARALLEL})", "N", _at_a_time, default=limits.PARALLEL
    ),
    "--connect": _rules("tcp://HOST:PORT, tls://HOST:PORT or unix:PATH", "ADDRESS", _address),
    # Never the token itself: every user of this host sees the arguments of every process.
    "--token-file": _rules(
        "holds the token to be shown there; else $FORGATHER_CONTROL_TOKEN, else the job's endpoint.json",
        "FILE", _first_line, dest="token",
    ),
    "--ssh": _rules("do it on that host, over ssh: an alias, or [USER@]HOST; no port is opened for it", "HOST", _host),
    "--remote": _rules("the jobs of another host, listed by the job at this port", "HOST:PORT", _port),
    "--wait": _rules("return when it is finished"),
    "--timeout": _rules("give up waiting after this time, with exit code 5 (implies --wait)", "SECONDS", _seconds),
    "--no-wait": _rules("return as soon as the job has accepted it, without its value"),
    "--kill-after": _rules(
        f"wait, then end its processes on this host: by SIGTERM, and by SIGKILL {limits.KILL_GRACE:g} s later",
        "SECONDS", _seconds,
    ),
    "--reason": _rules("why; kept in the command's record", "TEXT", _reader(methods.REASON), dest=PARAM + "reason"),
    "--remove": _rules("remove the rule of this number", "N", _number),
    "--until": _rules("a condition, or ended, dead or stalled (default ended)", "EXPR", _until, default="ended"),
    "--once": _rules("show it once"),
    "--interval": _rules("least time between two screens (default 0.5)", "SECONDS", _interval, default=0.5),
    "--ended": _rules("the last jobs that have ended: how, when, at which step, with which checkpoint"),
    "--sort": _rules("by a column, upwards: " + ", ".join(SORTABLE), "COLUMN", choices=SORTABLE),
    "--quiet": _rules("ids only"),
    "--follow": _rules("show what happens from now on, too, until the job ends"),
    "--since": _rules("not what is older, such as 90s, 30m, 1h or 2d", "TIME", _duration),
    "--allow": _rules(
        "what may act, such as save,stop,set:learning_rate,run:NAME (default nothing)", "VERB,...", _allowed, default=""
    ),
    "--job": _rules("serve this job alone", "JOB"),
    "--until-input-ends": _rules("do not wait for replies after it"),
}  # fmt: skip


#: The options that have a short name.
_SHORT: Final = {"--quiet": "-q"}


def with_values() -> set[str]:
    """Return the options that are followed by a value."""
    params = [param for method in BUILTIN.values() if method.verb is not None for param in own_params(method)]
    derived = {_option(param) for param in params if not _is_flag(param)}
    return derived | {name for name, rules in _OPTIONS.items() if "action" not in rules}


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the options, each with its value behind it, and the other words."""
    takes_value = with_values()
    given: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            others += rest
        elif not word.startswith("-") or word == "-":
            others.append(word)
        else:
            given.append(word)
            if word in takes_value:
                given += (value for value in [next(rest, None)] if value is not None)
    return given, others


def _option(param: methods.Param) -> str:
    return param.option or "--" + param.name.replace("_", "-")


def _is_flag(param: methods.Param) -> bool:
    return bool(param.schema.get("type") == "boolean")


def add(parser: argparse.ArgumentParser, *names: str, **changes: Any) -> None:
    for name in names:
        short = [_SHORT[name]] if name in _SHORT else []
        parser.add_argument(*short, name, **{**_OPTIONS[name], **changes})


def own_params(method: methods.Method) -> list[methods.Param]:
    """Return the parameters that are not common to all commands, which have options of their own."""
    return [param for param in method.params if not method.is_command or param.name not in methods.COMMON_NAMES]


def add_param(parser: argparse.ArgumentParser, param: methods.Param) -> None:
    """Add a parameter of a method: a word of its own if it is required, else an option."""
    doc, dest = plain(param.doc), PARAM + param.name
    if param.required:
        parser.add_argument(dest, metavar=param.name.rpartition("_")[2].upper(), type=_reader(param), help=doc)
    elif _is_flag(param):
        parser.add_argument(_option(param), dest=dest, action="store_const", const=True, help=doc)
    else:
        choices = "|".join(map(_word, param.schema.get("enum", ())))
        unit = str(param.schema.get("unit", param.name)).upper()
        if param.default is not None:
            doc += f" (default {_word(param.default)})"
        parser.add_argument(_option(param), dest=dest, metavar=choices or unit, type=_reader(param), help=doc)


def settings(words: Sequence[str]) -> dict[str, Any]:
    """Return the values that ``NAME=VALUE`` words mean: numbers and booleans where they look like one, else texts.

    Raises:
        ValueError: a word is wrong.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise ValueError(f"a setting is NAME=VALUE, not {ascii(word)[:140]}")
        if name in found:
            raise ValueError(f"{name} is given twice")
        found[name] = _value(text)
    return found


def _value(text: str) -> Any:
    if text in ("true", "yes", "false", "no"):
        return text in ("true", "yes")
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    quoted = len(text) > 1 and text[0] == text[-1] == '"'  # a text that looks like a number
    return text[1:-1] if quoted else text


def plain(doc: str) -> str:
    """Return a text that argparse prints as it is."""
    return doc.replace("%", "%%")
