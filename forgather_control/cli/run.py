"""The verb ``run``: list the commands of a job's training script, or run one with the words of a command line.

Words become values by the schemas of ``rpc.discover``; only the job knows them.
"""

import argparse
import json
from collections.abc import Sequence
from typing import Any, Final

from .. import states
from ..client import target
from ..client.connection import Client
from ..errors import InternalError, MethodNotFound
from ..wire import schemas
from ..wire.methods import COMMON_NAMES, OWN
from . import command_output, output
from .exit_codes import DONE, REFUSED, USAGE
from .terminal import Refusal, complain, print_answer, print_json

_Method = dict[str, Any]
_WORDS: Final = {"true": True, "yes": True, "false": False, "no": False}


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    from ..wire.records import CommandRecord

    with Client(target.resolve(args.job, args.connect, args.token, args.ssh)) as job:
        methods = own(job.call("rpc.discover"))
        if args.name is None:
            print_answer(args.json, [*methods.values()], listing, methods, job.name)
            return DONE
        method = find(methods, args.name, job.name)
        wait = states.COMMAND_ACCEPTED if args.no_wait else states.COMMAND_FINISHED
        given = {**args.params, "wait": wait, **values(method, args.values)}
        record = job.call(method["name"], **given)
    trouble = CommandRecord.from_json(record).trouble
    if trouble is None:
        print_answer(args.json, record, outcome, job.name, record)
        return DONE
    if args.json:
        print_json(record)
    return complain(f"{job.name}: {trouble}", REFUSED)


def as_rule(job: Client, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Return the method and the parameters of a command that a rule gives."""
    method = find(own(job.call("rpc.discover")), args.name, job.name)
    return method["name"], {**args.params, **values(method, args.values)}


# The commands of a job...


def own(document: Any) -> dict[str, _Method]:
    """Return the script's commands by their names without ``user.``; InternalError: they cannot be read."""
    try:
        found = {method["name"]: method for method in document["methods"] if method["name"].startswith(OWN)}
        for method in found.values():
            method["params"] = [
                {**param, "schema": dict(param["schema"])}
                for param in method["params"]
                if param["name"] not in COMMON_NAMES
            ]
            for param in method["params"]:
                schemas.expected(param["schema"])
    except (AttributeError, LookupError, TypeError, ValueError) as err:
        raise InternalError("the other side describes its methods in a way that cannot be read") from err
    return {name.removeprefix(OWN): method for name, method in found.items()}


def find(methods: dict[str, _Method], name: str, job: str) -> _Method:
    """Return the command of a name, with or without ``user.``; MethodNotFound says what there is."""
    short = name.removeprefix(OWN)
    if short in methods:
        return methods[short]
    if not methods:
        raise MethodNotFound(f"{job} has no commands of its own; {_HOW}")
    hint = target.suggestion(short, methods, f"forgather-control run {job} lists them")
    raise MethodNotFound(f"{job} has no command {ascii(short)[:80]}, only {', '.join(methods)}; {hint}")


_HOW: Final = "its script registers them with @job.command, or with commands= of the callback"


def listing(methods: dict[str, _Method], job: str) -> str:
    """Show each command with its parameters."""
    if not methods:
        return output.safe(f"{job} has no commands of its own; {_HOW}")
    return "\n".join(line for name, method in methods.items() for line in _lines(name, method))


def _lines(name: str, method: _Method) -> list[str]:
    params = [(param["name"], _described(param)) for param in method["params"]]
    width = max((len(param) for param, _ in params), default=0)
    lines = [name, f"  {method.get('summary') or ''}", *(f"  {param:{width}}  {text}" for param, text in params)]
    return [output.safe(line).rstrip() for line in lines]


def _described(param: dict[str, Any]) -> str:
    schema, doc = param["schema"], param.get("description")
    text = schemas.expected(schema)
    if "default" in schema:
        text += f", {json.dumps(schema['default'])} unless given"
    return text + (f": {doc}" if doc else "")


# Words to values...


def values(method: _Method, words: Sequence[str]) -> dict[str, Any]:
    """Return the parameters that ``KEY=VALUE`` words mean; Refusal: a word is wrong."""
    known = {param["name"]: param["schema"] for param in method["params"]}
    found: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        if key in COMMON_NAMES:
            raise Refusal(f"{key} is no parameter of the command; the options are --wait, --timeout, --reason", USAGE)
        if key not in known:
            takes = f"it takes {', '.join(known) or 'no parameters'}"
            hint = target.suggestion(key, known, takes)
            raise Refusal(f"{method['name']} has no parameter {ascii(key)[:80]}; {hint}", USAGE)
        try:
            if "array" in _types(known[key]):
                found[key] = [*found.get(key, []), *_items(known[key], text)]
            elif key in found:
                raise Refusal(f"{key} is given twice", USAGE)
            else:
                found[key] = value(known[key], text)
        except ValueError as err:
            raise Refusal(f"{key} must be {err}, not {ascii(text)[:80]}", USAGE) from err
    return found


def _items(schema: dict[str, Any], text: str) -> list[Any]:
    """Return the items of a list: a JSON array, or words between commas."""
    items = schema.get("items", {})
    if not text.startswith("["):
        return [value(items, word) for word in text.split(",")] if text else []
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise ValueError('words between commas, or a JSON array such as ["a", "b"]') from err
    return [schemas.check(items, item) for item in found]


def value(schema: dict[str, Any], text: str) -> Any:
    """Return the value of a word: text stays text, others are read as their type; ValueError says what it must be."""
    kinds = _types(schema)
    for word in schema.get("enum", ()):
        if text == (word if isinstance(word, str) else json.dumps(word)):
            return word
    found: Any = text
    if "string" not in kinds:
        found = _WORDS.get(text.lower(), text) if "boolean" in kinds else _number(text, kinds)
        found = None if text == "null" and "null" in kinds else found
    return schemas.check(schema, found)


def _number(text: str, kinds: list[str]) -> Any:
    for read in (int, float) if "integer" in kinds else (float,):
        try:
            return read(text)
        except ValueError:
            continue
    return text


def _types(schema: dict[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]


# What it prints...


def outcome(job: str, record: dict[str, Any]) -> str:
    """Show the value of a command: text as it is, a list line by line, the rest as JSON; or what became of it."""
    value = (record.get("result") or {}).get("value")
    if record["state"] != states.COMMAND_FINISHED or value is None:
        return command_output.outcome(job, {**record, "result": None})
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return "\n".join(map(output.safe_lines, value))
    return output.safe_lines(value) if isinstance(value, str) else output.safe(json.dumps(value, ensure_ascii=False))
