"""JSON Schemas of parameters and results, and the check of a parameter against its schema.

A schema is a plain dictionary (JSON Schema, draft 7). ``check`` understands the keywords that parameters use:
``type enum minimum maximum minLength maxLength items`` and the format ``printable``.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Final

from .jsonrpc import Json
from .limits import MAX_COMMAND_ID

Schema = dict[str, Json]

COMMAND_ID: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": MAX_COMMAND_ID, "format": "printable"}

#: The classes and the words for each type; a boolean is no number.
_TYPES: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "string": ((str,), "a string"),
    "number": ((int, float), "a number"),
    "integer": ((int,), "a whole number"),
    "boolean": ((bool,), "true or false"),
    "array": ((list,), "a list"),
    "object": ((dict,), "an object"),
    "null": ((type(None),), "null"),
}


def check(schema: Schema, value: Json) -> Json:
    """Return ``value`` as the method uses it: "number" gives a float, "integer" an int (JSON has only one kind).

    Raises:
        ValueError: the value does not fit; the message says what was expected.
    """
    if not _fits(schema, value):
        raise ValueError(expected(schema))
    if isinstance(value, list) and "items" in schema:
        return [check(schema["items"], item) for item in value]
    if "number" in _types(schema) and type(value) is int:
        return float(value)
    return int(value) if "integer" in _types(schema) and type(value) is float else value


def expected(schema: Schema) -> str:
    """Say in words which values the schema allows."""
    if "enum" in schema:
        return " or ".join(map(json.dumps, schema["enum"]))
    return ", or ".join(_noun(kind, schema) for kind in _types(schema))


def _noun(kind: str, schema: Schema) -> str:
    noun = _TYPES[kind][1]
    if kind == "string" and "maxLength" in schema:
        text = "printable characters" if schema.get("format") == "printable" else "characters"
        return f"{noun} of {schema.get('minLength', 0)} to {schema['maxLength']} {text}"
    if kind in ("number", "integer"):
        noun += f" of {schema['unit']}" if "unit" in schema else ""
        noun += f" from {schema['minimum']:g}" if "minimum" in schema else ""
        noun += f" to {schema['maximum']:g}" if "maximum" in schema else ""
    return f"{noun} whose items are each {expected(schema['items'])}" if kind == "array" and "items" in schema else noun


def _types(schema: Schema) -> list[str]:
    kinds = schema.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]


def _fits(schema: Schema, value: Json) -> bool:
    if "enum" in schema:
        return any(type(value) is type(word) and value == word for word in schema["enum"])
    kinds = _types(schema)
    if "integer" in kinds and type(value) is float and value.is_integer():
        value = int(value)
    if kinds and not any(type(value) in _TYPES[kind][0] for kind in kinds):
        return False
    if isinstance(value, str):
        length_fits = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        return length_fits and (schema.get("format") != "printable" or value.isprintable())
    if type(value) in (int, float):
        # False for NaN, too, which compares with nothing.
        return bool(schema.get("minimum", float("-inf")) <= value <= schema.get("maximum", float("inf")))
    return not isinstance(value, list) or all(_fits(schema.get("items", {}), item) for item in value)


@cache
def results() -> dict[str, Schema]:
    """Return the schemas of all results by title: those of ``results.json``, with its references resolved.

    NaN and the infinities travel as strings, so a number that may be one of them is "number" or "string".
    """
    from importlib.resources import files  # not needed at the start of the command line

    found: dict[str, Schema] = json.loads((files(__package__) / "results.json").read_text("utf-8"))
    return {name: _resolved(schema, found) for name, schema in found.items()}


def _resolved(value: Json, named: dict[str, Schema]) -> Json:
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _resolved(named[value["$ref"]], named)
    return {name: _resolved(item, named) for name, item in value.items()}
