"""JSON Schemas of parameters and results, and the check of a parameter against its schema.

A schema is a plain dictionary (JSON Schema, draft 7). ``check`` understands the keywords that parameters use:
``type enum minimum maximum minLength maxLength items`` and the format ``printable``.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, Final

from .limits import MAX_COMMAND_ID

Json = Any
Schema = dict[str, Json]

_TYPES: Final[dict[str, tuple[type, ...]]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_NOUNS: Final = {
    "string": "a string",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


# Checking a parameter...


def check(schema: Schema, value: Json) -> Json:
    """Return ``value`` as the method uses it: "number" gives a float, "integer" an int (JSON has only one kind).

    Raises:
        ValueError: the value does not fit; the message says what was expected.
    """
    if not _fits(schema, value):
        raise ValueError(expected(schema))
    types = _types(schema)
    if "number" in types and type(value) is int:
        return float(value)
    return int(value) if "integer" in types and type(value) is float else value


def expected(schema: Schema) -> str:
    """Say in words which values the schema allows."""
    if "enum" in schema:
        words = ['"' + word + '"' if isinstance(word, str) else _json_word(word) for word in schema["enum"]]
        return " or ".join(words)
    return ", or ".join(_noun(kind, schema) for kind in _types(schema))


def _noun(kind: str, schema: Schema) -> str:
    noun = _NOUNS[kind]
    if kind == "string" and "maxLength" in schema:
        text = "printable characters" if schema.get("format") == "printable" else "characters"
        return f"{noun} of {schema.get('minLength', 0)} to {schema['maxLength']} {text}"
    if kind not in ("number", "integer"):
        return noun
    unit = f" of {schema['unit']}" if "unit" in schema else ""
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is None and high is None:
        return noun + unit
    return f"{noun}{unit} from {low:g}" + (f" to {high:g}" if high is not None else "")


def _json_word(value: Json) -> str:
    return {True: "true", False: "false", None: "null"}[value]


def _types(schema: Schema) -> list[str]:
    kinds = schema.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]


def _fits(schema: Schema, value: Json) -> bool:
    if "enum" in schema:
        return any(type(value) is type(word) and value == word for word in schema["enum"])
    kinds = _types(schema)
    if isinstance(value, bool) or not kinds:
        return "boolean" in kinds or not kinds
    if "integer" in kinds and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not any(isinstance(value, _TYPES[kind]) for kind in kinds if kind != "boolean"):
        return False
    if isinstance(value, str):
        length_fits = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        return length_fits and (schema.get("format") != "printable" or value.isprintable())
    if isinstance(value, (int, float)):
        # False for NaN, too, which compares with nothing.
        return bool(schema.get("minimum", float("-inf")) <= value <= schema.get("maximum", float("inf")))
    return not isinstance(value, list) or all(
        _fits(schema.get("items", {"type": list(_TYPES)}), item) for item in value
    )


# Schemas of parameters...


def nullable(schema: Schema) -> Schema:
    """Return the schema that also allows null."""
    return {**schema, "type": [*_types(schema), "null"]}


def words(*values: str) -> Schema:
    """Return the schema of a string that is one of ``values``."""
    return {"type": "string", "enum": list(values)}


COMMAND_ID: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": MAX_COMMAND_ID, "format": "printable"}


# Schemas of results...


@cache
def results() -> dict[str, Schema]:
    """Return the schemas of all results by title: those of ``results.json``, with its references resolved.

    NaN and the infinities travel as strings, so a number that may be one of them is "number" or "string".
    """
    from importlib.resources import files  # not needed at the start of the command line

    found: dict[str, Schema] = json.loads((files(__package__) / "results.json").read_text("utf-8"))
    return {name: _resolved(schema, found) for name, schema in found.items()}


def _resolved(value: Json, named: dict[str, Schema]) -> Json:
    if isinstance(value, dict):
        if "$ref" in value:
            return _resolved(named[value["$ref"]], named)
        return {name: _resolved(item, named) for name, item in value.items()}
    return value
