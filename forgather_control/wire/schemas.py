"""JSON Schemas of parameters and results, and the check of a parameter against its schema.

A schema is a plain dictionary (JSON Schema, draft 7). ``check`` understands the keywords that parameters use:
``type enum minimum maximum minLength maxLength items`` and the format ``printable``.
"""

from __future__ import annotations

from typing import Any, Final

from .. import states
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


# Building a schema...


def nullable(schema: Schema) -> Schema:
    """Return the schema that also allows null."""
    if "enum" in schema or "type" not in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return {**schema, "type": [*_types(schema), "null"]}


def record(title: str, required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    """Return the schema of an object; other members than the named ones are allowed, as later versions add some."""
    return {
        "title": title,
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
    }


def array(items: Schema, title: str) -> Schema:
    """Return the schema of a list."""
    return {"title": title, "type": "array", "items": items}


TEXT: Final[Schema] = {"type": "string"}
WHOLE: Final[Schema] = {"type": "integer"}
#: NaN and the infinities travel as strings.
NUMBER: Final[Schema] = {"type": ["number", "string"]}
BOOLEAN: Final[Schema] = {"type": "boolean"}


def words(*values: str) -> Schema:
    """Return the schema of a string that is one of ``values``."""
    return {"type": "string", "enum": list(values)}


COMMAND_ID: Final[Schema] = {"type": "string", "minLength": 1, "maxLength": MAX_COMMAND_ID, "format": "printable"}

# Results...

PING: Final = record(
    "Ping", {"job_id": nullable(TEXT), "pid": WHOLE, "protocol": WHOLE, "version": TEXT, "time": {"type": "number"}}
)

REQUESTED_BY: Final = record(
    "RequestedBy",
    {
        "via": words(*states.VIAS),
        "uid": nullable(WHOLE),
        "user": nullable(TEXT),
        "pid": nullable(WHOLE),
        "program": nullable(TEXT),
    },
)

COMMAND_RECORD: Final = record(
    "CommandRecord",
    {
        "command_id": COMMAND_ID,
        "command": TEXT,
        "params": {"title": "CommandParams", "type": "object"},
        "reason": nullable(TEXT),
        "state": words(*states.COMMAND_STATES),
        "requested_at": {"type": "number"},
        "requested_by": nullable(REQUESTED_BY),
        "applied_at_step": nullable(WHOLE),
        "finished_at": nullable({"type": "number"}),
        "result": nullable({"title": "CommandResult", "type": "object"}),
        "error": nullable(record("CommandFailure", {"code": WHOLE, "message": TEXT})),
    },
)

STATUS: Final = record(
    "Status",
    {
        "job_id": nullable(TEXT),
        "status": words(*states.TRAINING_STATUSES),
        "global_step": WHOLE,
        "epoch": nullable(NUMBER),
        "max_steps": nullable(WHOLE),
        "progress": nullable(NUMBER),
        "steps_per_second": nullable(NUMBER),
        "eta_seconds": nullable(NUMBER),
        "seconds_since_step": nullable(NUMBER),
        "metrics": {"title": "Metrics", "type": "object"},
        "world_size": WHOLE,
        "started_at": {"type": "number"},
        "commands": array(COMMAND_RECORD, "CommandRecords"),
    },
    {
        "host": TEXT,
        "pid": WHOLE,
        "rss_bytes": WHOLE,
        "cpu_percent": NUMBER,
        "device": TEXT,
        "device_memory_bytes": WHOLE,
    },
)

LISTED_JOBS: Final = array(
    record(
        "ListedJob",
        {
            "job_id": TEXT,
            "host": TEXT,
            "port": nullable(WHOLE),
            "pid": WHOLE,
            "started_at": {"type": "number"},
            "world_size": WHOLE,
            "user": TEXT,
            "version": TEXT,
            "state": words(*states.JOB_STATES),
        },
    ),
    "ListedJobs",
)

_RANK: Final[dict[str, Schema]] = {
    "rank": WHOLE,
    "host": nullable(TEXT),
    "pid": nullable(WHOLE),
    "state": words(*states.RANK_STATES),
}
RANKS: Final = array(
    record(
        "Rank",
        {
            **_RANK,
            "step": nullable(WHOLE),
            "seconds_since_step": nullable(NUMBER),
            "rss_bytes": nullable(WHOLE),
            "device": nullable(TEXT),
            "device_memory_bytes": nullable(WHOLE),
        },
    ),
    "Ranks",
)
STACKS: Final = array(record("RankStacks", {**_RANK, "stacks": nullable(TEXT)}), "Stacks")
#: The facts of an error; which ones depends on the error.
ERROR_DATA: Final[Schema] = {"title": "ErrorData", "type": "object"}
EVENT_KIND: Final = words(*states.EVENT_KINDS)
SUBSCRIBED: Final = record("Subscribed", {"next": WHOLE})
UNSUBSCRIBED: Final = record("Unsubscribed", {"subscribed": BOOLEAN})
