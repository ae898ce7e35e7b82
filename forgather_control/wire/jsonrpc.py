"""JSON-RPC 2.0, one JSON text a line: bytes in, bytes out. Owns no socket, thread or clock.

Pure functions; callable from any thread.

Follows https://www.jsonrpc.org/specification, with these decisions where it is silent:

* a line is UTF-8 and at most ``MAX_LINE`` bytes; nesting at most ``MAX_DEPTH``; a batch at most
  ``MAX_BATCH`` requests;
* JSON that programs read differently is an invalid request (-32600): duplicate names, numbers beyond a double, lone
  surrogates. What Python's parser takes though it is no JSON is a parse error (-32700): NaN, a byte order mark;
* a member that the specification does not name ("parms") is an invalid request, because a
  misspelt member must not turn into a command without its parameters;
* an id comes back as it was sent: 1.0 as 1.0, an integer of any size a double can have to its last digit;
* NaN and infinities are sent as the strings "NaN", "Infinity" and "-Infinity" (RFC 8259 has no
  numbers for them), and all that is sent is ASCII.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, NamedTuple

from ..errors import ControlError, InternalError, InvalidRequest, ParseError, from_wire
from .limits import MAX_BATCH, MAX_DEPTH, MAX_LINE, MAX_REPLY_DEPTH

Json = Any


class Encoded(bytes):
    """A value that is JSON text already, without a newline; it is sent as it is."""


class NoId(Enum):
    """The id of a notification, which gets no answer (section 4.1). Not ``None``: null is an id."""

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


# Read a request...


def parse_message(line: bytes) -> Message:
    """Return the requests of one line.

    Raises:
        ParseError: it is not UTF-8 or not JSON.
        InvalidRequest: it exceeds a limit, is JSON that programs read differently, or is an empty batch.
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
    return Message(tuple(map(_request, value)), is_batch=True)


def _request(value: Json) -> Request | Refusal:
    if not isinstance(value, dict):
        return Refusal(InvalidRequest("a request is a JSON object"), None)
    id_ = value.get("id", NoId.NOTIFICATION)
    if isinstance(id_, bool) or not isinstance(id_, (str, int, float, NoId, type(None))):
        fault, id_ = "id is a string, a number or null", None
    elif value.get("jsonrpc") != "2.0":
        fault = 'the member jsonrpc must be the string "2.0"'
    elif not isinstance(value.get("method"), str):
        fault = "the member method must be a string"
    elif not isinstance(value.get("params", {}), (dict, list)):
        fault = "params is an object (by name) or an array (by position)"
    elif unknown := sorted(value.keys() - {"jsonrpc", "id", "method", "params"}):
        fault = f"unknown member {ascii(unknown[0][:64])}"
    else:
        return Request(value["method"], value.get("params", {}), id_)
    return Refusal(InvalidRequest(fault), None if id_ is NoId.NOTIFICATION else id_)


def parse_json(line: bytes) -> Json:
    """Return the value of one JSON text, read as strictly as I-JSON (RFC 7493) wants it.

    Raises:
        ParseError: it is not UTF-8 or not JSON.
        InvalidRequest: it is nested deeper than ``MAX_DEPTH``, or JSON that programs read differently.
    """
    try:
        text = line.decode("utf-8")
        _check_depth(text, MAX_DEPTH)
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as err:
        raise ParseError(f"not UTF-8 at byte {err.start}") from err
    except UnicodeEncodeError as err:
        raise InvalidRequest("a string holds half a surrogate pair") from err
    except (ValueError, RecursionError) as err:
        raise ParseError(f"not JSON: {ascii(str(err))[1:-1]}") from err
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
        # {"method":"status","method":"abort"} aborts where the last one counts, and reads where the first does.
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise InvalidRequest(f"the name {ascii(name[:64])} stands twice in one object")
    return found


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise InvalidRequest("a number is beyond the range of a double")
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


# Write...


def request(method: str, params: dict[str, Json] | list[Json], id: Id) -> bytes:
    """Return one request line, newline included."""
    return encode({"jsonrpc": "2.0", "id": id, "method": method, "params": params})


def response(id: Id, value: Json | ControlError) -> bytes:
    """Return the response line of a value or an error."""
    kind = b"result"
    if isinstance(value, ControlError):
        kind, value = b"error", error_object(value)
    return b'{"jsonrpc":"2.0","id":%b,"%b":%b}\n' % (encoded(id), kind, encoded(value))


def error_object(error: ControlError) -> dict[str, Json]:
    """Return ``{"code", "message"}``, and ``"data"`` where the error has facts."""
    found: dict[str, Json] = {"code": error.code, "message": error.message}
    return {**found, "data": error.data} if error.data else found


def replies(responses: Sequence[bytes], is_batch: bool) -> bytes:
    """Return the reply line of a message, given its response lines; empty if there are none (section 6)."""
    if not responses:
        return b""
    return b"[" + b",".join(line[:-1] for line in responses) + b"]\n" if is_batch else responses[0]


def encode(value: Json) -> bytes:
    """Return one line of strict ASCII JSON with its newline, whatever floats or broken strings ``value`` holds."""
    return encoded(value) + b"\n"


def encoded(value: Json) -> Encoded:
    """Return the same without the newline, for a value that is sent more than once."""
    if isinstance(value, Encoded):
        return value
    try:
        text = _ENCODER.encode(value)
    except ValueError:  # NaN or an infinity
        text = _ENCODER.encode(_portable(value))
    if "\\ud" in text:
        text = _ENCODER.encode(_portable(json.loads(text)))
    return Encoded(text, "ascii")


def _portable(value: Json) -> Json:
    """Return the value without NaN, infinities and lone surrogates."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {_portable(str(name)): _portable(item) for name, item in value.items()}
    return [_portable(item) for item in value] if isinstance(value, (list, tuple)) else value


# Read a reply...


def parse_incoming(line: bytes) -> Reply | Notification:
    """Return the response or notification that a job sent, an error as its class; InternalError if it is neither."""
    try:
        text = line.decode("utf-8")
        _check_depth(text, MAX_REPLY_DEPTH)
        value = json.loads(text)
    except (ValueError, RecursionError, InvalidRequest) as err:
        raise InternalError("the other side sent a line that is no JSON, or nested too deeply") from err
    is_object = isinstance(value, dict) and value.get("jsonrpc") == "2.0"
    if is_object and isinstance(value.get("method"), str) and "id" not in value:
        return Notification(value["method"], value.get("params"))
    if not is_object or ("result" in value) == ("error" in value):
        raise InternalError("the other side sent a line that is no JSON-RPC 2.0 response")
    if "result" in value:
        return Reply(value.get("id"), value["result"], None)
    fault = value["error"]
    facts = fault if isinstance(fault, dict) else {"message": fault}
    return Reply(value.get("id"), None, from_wire(facts.get("code"), facts.get("message"), facts.get("data")))


def parse_reply(line: bytes) -> Reply:
    """Return the response that a job sent; InternalError if the line is none."""
    found = parse_incoming(line)
    if isinstance(found, Notification):
        raise InternalError("the other side sent a notification instead of a response")
    return found
