"""JSON-RPC 2.0, one JSON text a line: bytes in, bytes out. Owns no socket, thread or clock.

Floor 1: imports errors only. Pure functions; callable from any thread.

Follows https://www.jsonrpc.org/specification, with these decisions where it is silent:

* a line is UTF-8 and at most ``MAX_LINE`` bytes; nesting at most ``MAX_DEPTH``; a batch at most
  ``MAX_BATCH`` requests;
* what Python's parser would take and others would not is refused: NaN, numbers beyond a double,
  duplicate names, lone surrogates, a byte order mark;
* a member that the specification does not name ("parms") is an invalid request, because a
  misspelt member must not turn into a command without its parameters;
* NaN and infinities are sent as the strings "NaN", "Infinity" and "-Infinity" (RFC 8259 has no
  numbers for them), and all that is sent is ASCII.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

from ..errors import ControlError, InternalError, InvalidRequest, ParseError, from_wire
from .limits import MAX_BATCH, MAX_DEPTH, MAX_LINE, MAX_REPLY_DEPTH

Json = Any


class Encoded(bytes):
    """A value that is JSON text already, without a newline: it is sent as it is, however often it is asked for."""


class NoId(Enum):
    """The id of a notification, which nobody answers (section 4.1). Not ``None``: null is an id."""

    NOTIFICATION = "notification"


Id = str | int | float | None


class Request(NamedTuple):
    """One call as it came over the wire; ``params`` is a list (by position) or a dict (by name)."""

    method: str
    params: list[Json] | dict[str, Json]
    id: Id | NoId


class Refusal(NamedTuple):
    """An element that is no request: the error that answers it."""

    error: ControlError
    id: Id


class Message(NamedTuple):
    """One line: its elements in order, and whether they came as a batch."""

    items: tuple[Request | Refusal, ...]
    is_batch: bool


class Reply(NamedTuple):
    """One response object, read by a client; ``error`` is ``None`` on success."""

    id: Json
    result: Json
    error: ControlError | None


class Notification(NamedTuple):
    """One notification, read by a client; ``params`` is whatever the job sent."""

    method: str
    params: Json


# Reading a request...


def parse_message(line: bytes) -> Message:
    """The requests of one line.

    Raises:
        ParseError: not UTF-8, not JSON, or JSON that others read differently.
        InvalidRequest: longer, deeper or more than the limits, or an empty batch.
    """
    if len(line) > MAX_LINE:
        raise InvalidRequest(f"the line is longer than {MAX_LINE} bytes", limit=MAX_LINE)
    value = parse_json(line)
    if not isinstance(value, list):
        return Message((_request(value),), is_batch=False)
    if not value:
        raise InvalidRequest("a batch holds at least one request")
    if len(value) > MAX_BATCH:
        raise InvalidRequest(f"a batch holds at most {MAX_BATCH} requests, not {len(value)}", limit=MAX_BATCH)
    return Message(tuple(_request(item) for item in value), is_batch=True)


def _request(value: Json) -> Request | Refusal:
    if not isinstance(value, dict):
        return Refusal(InvalidRequest("a request is a JSON object"), None)
    id_ = value.get("id", NoId.NOTIFICATION)
    if not _is_id(id_):
        return Refusal(InvalidRequest("id is a string, a number or null"), None)
    fault = _fault(value)
    if fault:
        return Refusal(InvalidRequest(fault), None if id_ is NoId.NOTIFICATION else id_)
    return Request(value["method"], value.get("params", {}), id_)


def _fault(value: dict[str, Json]) -> str | None:
    if value.get("jsonrpc") != "2.0":
        return 'the member jsonrpc must be the string "2.0"'
    if not isinstance(value.get("method"), str):
        return "the member method must be a string"
    if not isinstance(value.get("params", {}), (dict, list)):
        return "params is an object (by name) or an array (by position)"
    unknown = sorted(value.keys() - {"jsonrpc", "id", "method", "params"})
    return f"unknown member {ascii(unknown[0][:64])}" if unknown else None


def _is_id(value: Json) -> bool:
    return value is None or (isinstance(value, (str, int, float, NoId)) and not isinstance(value, bool))


def parse_json(line: bytes) -> Json:
    """One JSON text, as strictly as RFC 8259 and I-JSON (RFC 7493) want it.

    Raises:
        ParseError: with the place of the fault where the parser knows it.
        InvalidRequest: nested deeper than ``MAX_DEPTH``.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as err:
        raise ParseError(f"not UTF-8 at byte {err.start}") from err
    _check_depth(text, MAX_DEPTH)
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as err:
        raise ParseError(f"not JSON: {ascii(str(err))[1:-1]}") from err
    if "\\u" in text:
        _check_surrogates(value)
    return value


def _check_depth(text: str, limit: int) -> None:
    if text.count("[") + text.count("{") <= limit:  # the ordinary line, at the cost of two C loops
        return
    depth = 0
    # The closing quote is optional so that an unfinished string is read once, not once from each of its quotes.
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token.group(), 0)
        if depth > limit:
            raise InvalidRequest(f"nested deeper than {limit}", limit=limit)


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) < len(pairs):
        # {"method":"status","method":"abort"} aborts where the last wins and asks where the first does.
        raise ValueError("a name stands twice in one object")
    return found


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("a number is beyond the range of a double")
    return number


def _whole(text: str) -> int:
    if len(text) > 300:
        _finite(text)  # 309 digits are no double either: others read infinity, and answer another id
    return int(text)


#: Made once: json.loads with hooks makes a new one at each call, and json.dumps with options an encoder.
_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
)
_ENCODER: Final = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def _check_surrogates(value: Json) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as err:
        raise ParseError("a string holds half a surrogate pair") from err


# Writing...


def request(method: str, params: dict[str, Json] | list[Json], id: Id) -> bytes:
    """One request line, newline included."""
    return encode({"jsonrpc": "2.0", "id": id, "method": method, "params": params})


def result(id: Id, value: Json) -> dict[str, Json]:
    """The response object of a success."""
    return {"jsonrpc": "2.0", "id": id, "result": value}


def failure(id: Id, error: ControlError) -> dict[str, Json]:
    """The response object of an error; this is the one border where an error becomes JSON."""
    return {"jsonrpc": "2.0", "id": id, "error": error_object(error)}


def error_object(error: ControlError) -> dict[str, Json]:
    """``{"code", "message"}`` and ``"data"`` where the error has facts."""
    found: dict[str, Json] = {"code": error.code, "message": error.message}
    return {**found, "data": error.data} if error.data else found


def encode(value: Json) -> bytes:
    """One line of strict ASCII JSON with its newline, whatever floats or broken strings ``value`` holds."""
    return (value if isinstance(value, Encoded) else encoded(value)) + b"\n"


def encoded(value: Json) -> Encoded:
    """The same without the newline, for a value that is sent more than once."""
    try:
        text = _ENCODER.encode(value)
    except ValueError:
        text = _ENCODER.encode(_without_nan(value))
    if "\\ud" in text:
        text = _ENCODER.encode(_without_surrogates(json.loads(text)))
    return Encoded(text, "ascii")


def _without_nan(value: Json) -> Json:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(name): _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


def _without_surrogates(value: Json) -> Json:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_without_surrogates(name): _without_surrogates(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    return value


# Reading a reply...


def parse_incoming(line: bytes) -> Reply | Notification:
    """Parse one line that a job sent: a response, or a notification of an event.

    Raises:
        InternalError: the line is neither.
    """
    try:
        text = line.decode("utf-8")
        _check_depth(text, MAX_REPLY_DEPTH)
        value = json.loads(text)
    except (ValueError, RecursionError, InvalidRequest) as err:
        raise InternalError("the other side sent a line that is no JSON, or nested too deeply") from err
    if not isinstance(value, dict) or value.get("jsonrpc") != "2.0":
        raise InternalError("the other side sent a line that is no JSON-RPC 2.0 response")
    if isinstance(value.get("method"), str) and "id" not in value:
        return Notification(value["method"], value.get("params"))
    if ("result" in value) == ("error" in value):
        raise InternalError("the other side sent a line that is no JSON-RPC 2.0 response")
    if "error" not in value:
        return Reply(value.get("id"), value["result"], None)
    fault = value["error"]
    facts = fault if isinstance(fault, dict) else {"message": fault}
    return Reply(value.get("id"), None, from_wire(facts.get("code"), facts.get("message"), facts.get("data")))


def parse_reply(line: bytes) -> Reply:
    """Parse one response line; its error is of the class that was raised on the other side.

    Raises:
        InternalError: the line is no JSON-RPC 2.0 response.
    """
    found = parse_incoming(line)
    if isinstance(found, Notification):
        raise InternalError("the other side sent a notification instead of a response")
    return found


def response(id: Id, value: Json | ControlError) -> bytes:
    """The response line of a value or an error."""
    if isinstance(value, ControlError):
        return encode(failure(id, value))
    if isinstance(value, Encoded):
        return b'{"jsonrpc":"2.0","id":%b,"result":%b}\n' % (encoded(id), value)
    return encode(result(id, value))


def replies(responses: Sequence[bytes], is_batch: bool) -> bytes:
    """The reply line of a message, out of its response lines; empty where nobody waits for one (section 6)."""
    if not responses:
        return b""
    return b"[" + b",".join(line[:-1] for line in responses) + b"]\n" if is_batch else responses[0]
