"""JSON-RPC 2.0: the specification's own examples, what parsers read differently, hostile lines, and round trips."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgather_control.errors import (
    ControlError,
    InternalError,
    InvalidParams,
    InvalidRequest,
    MethodNotFound,
    ParseError,
)
from forgather_control.server.connection import Connection
from forgather_control.server.dispatcher import Dispatcher
from forgather_control.wire import jsonrpc
from forgather_control.wire.jsonrpc import MAX_BATCH, MAX_DEPTH, MAX_LINE, Message, NoId, Refusal, Request, encode

from ..support.harness import SOON, strict

PING = b'{"jsonrpc":"2.0","method":"ping","id":1}'


# The specification's examples (section 7)...


def answer(request, sink):
    """The server that the specification's examples imagine."""
    if request.method == "subtract":
        params = request.params
        return params[0] - params[1] if isinstance(params, list) else params["minuend"] - params["subtrahend"]
    if request.method == "sum":
        return sum(request.params)
    if request.method == "get_data":
        return ["hello", 5]
    if request.method in ("update", "foobar_notification", "notify_hello", "notify_sum"):
        raise InvalidParams("a notification gets no answer, whatever it does")
    if request.method == "fail":
        raise ZeroDivisionError("secret")
    raise MethodNotFound("no such method")


def talk(line):
    """The reply line to one line, through a real socket; empty where there is none."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.settimeout(SOON)
        connection = Connection(ours, MAX_LINE)
        Dispatcher(answer).dispatch(connection, line)
        assert connection.open == connection.unsent == 0 and not connection.broken
        ours.shutdown(socket.SHUT_WR)
        with theirs.makefile("rb") as file:
            return file.read()


def without_message(reply):
    """A reply without the words of its errors, which the specification leaves to the server."""
    for item in reply if isinstance(reply, list) else [reply]:
        if "error" in item:
            assert isinstance(item["error"].pop("message"), str)
            item["error"].pop("data", None)
    return reply


def error(code, id=None):
    return {"jsonrpc": "2.0", "error": {"code": code}, "id": id}


def success(result, id):
    return {"jsonrpc": "2.0", "result": result, "id": id}


SPECIFICATION = {
    "positional": ('{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}', success(19, 1)),
    "positional-turned": ('{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}', success(-19, 2)),
    "named": (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}',
        success(19, 3),
    ),
    "named-turned": (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}',
        success(19, 4),
    ),
    "notification": ('{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', None),
    "notification-of-nothing": ('{"jsonrpc": "2.0", "method": "foobar"}', None),
    "no-method": ('{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', error(-32601, "1")),
    "invalid-json": ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', error(-32700)),
    "invalid-request": ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', error(-32600)),
    "batch-invalid-json": (
        '[ {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"}, {"jsonrpc": "2.0", "method" ]',
        error(-32700),
    ),
    "empty-array": ("[]", error(-32600)),
    "batch-of-one-invalid": ("[1]", [error(-32600)]),
    "batch-invalid": ("[1,2,3]", [error(-32600)] * 3),
    "batch": (
        """[ {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
        {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
        {"foo": "boo"},
        {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
        {"jsonrpc": "2.0", "method": "get_data", "id": "9"} ]""",
        [success(7, "1"), success(19, "2"), error(-32600), error(-32601, "5"), success(["hello", 5], "9")],
    ),
    "batch-of-notifications": (
        """[ {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]} ]""",
        None,
    ),
}


@pytest.mark.parametrize("example", SPECIFICATION)
def test_example_of_the_specification(example):
    """Each example of section 7 gets the reply that stands there."""
    line, wanted = SPECIFICATION[example]
    found = talk(line.replace("\n", " ").encode())
    assert (without_message(strict(found)) if found else None) == wanted


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"jsonrpc": "1.0"}, -32600), ({"jsonrpc": 2.0}, -32600), ({"jsonrpc": None}, -32600),
        ({"jsonrpc": ["2.0"]}, -32600),
        ({"method": None}, -32600), ({"method": 1}, -32600), ({"method": ["ping"]}, -32600), ({"method": {}}, -32600),
        ({"params": None}, -32600), ({"params": "bar"}, -32600), ({"params": 5}, -32600), ({"params": True}, -32600),
        ({"parms": {}}, -32600), ({"": 1}, -32600), ({"result": 1}, -32600), ({"\x1b\u2028": 1}, -32600),
        ({"method": "fail"}, -32603),
    ],
    ids=ascii,
)  # fmt: skip
@pytest.mark.parametrize("id", ["a", "", 0, -1, 1.5, None])
def test_refusal_carries_the_id(fault, code, id):
    """Whatever else is wrong with a request, a valid id comes back, and no word of our insides."""
    found = talk(json.dumps({"jsonrpc": "2.0", "method": "get_data", "id": id, **fault}).encode())
    assert b"secret" not in found and b"Traceback" not in found
    assert without_message(strict(found)) == error(code, id)


@pytest.mark.parametrize("id", ["true", "false", "[]", "[1]", "{}", '{"a":1}'])
def test_id_of_another_kind(id):
    """An id that can be none (a boolean is no number) is answered with null."""
    line = f'{{"jsonrpc":"2.0","method":"get_data","id":{id}}}'.encode()
    assert without_message(strict(talk(line))) == error(-32600)


@pytest.mark.parametrize("value", ["null", "1", "-0.0", '"ping"', "true", "{}"])
def test_json_that_is_no_request(value):
    """Any other JSON is one invalid request."""
    assert without_message(strict(talk(value.encode()))) == error(-32600)


def test_null_is_an_id():
    """A null id is answered; only a missing one makes a notification."""
    assert strict(talk(b'{"jsonrpc":"2.0","method":"get_data","id":null}')) == success(["hello", 5], None)
    assert talk(b'{"jsonrpc":"2.0","method":"get_data"}') == b""
    assert jsonrpc.parse_message(b'{"jsonrpc":"2.0","method":"m"}').items[0].id is NoId.NOTIFICATION


# What parsers read differently...


def parse(line):
    return jsonrpc.parse_message(line)


def with_value(text, where):
    """A request line that holds the JSON text in its id, its parameters or its method."""
    members = {"jsonrpc": '"2.0"', "method": '"ping"', "id": "1", "params": "[]"}
    members[where] = f"[{text}]" if where == "params" else text
    return ("{" + ",".join(f'"{name}":{member}' for name, member in members.items()) + "}").encode()


@pytest.mark.parametrize("where", ["id", "params"])
@pytest.mark.parametrize(
    "number",
    ["NaN", "Infinity", "-Infinity", "01", "+1", "1.", ".5", "0x10", "1_000", "1e", "--1", "\u0661"],
)
def test_number_that_is_none(number, where):
    """What is no JSON number is a parse error, though Python reads some of it."""
    with pytest.raises(ParseError):
        parse(with_value(number, where))


@pytest.mark.parametrize("where", ["id", "params"])
@pytest.mark.parametrize("number", ["1e999", "-1e999", "1e309", "9" * 5000, "-" + "9" * 5000, "9" * 4000, "9" * 310])
def test_number_beyond_a_double(number, where):
    """It is JSON, but others would read another number: an invalid request that says why."""
    with pytest.raises(InvalidRequest, match="beyond the range of a double"):
        parse(with_value(number, where))


@pytest.mark.parametrize(
    "number", [0, -1, 2**53 + 1, 2**64, 10**40, -(10**40) + 1, 10**308, 1.0, -2.0, 1.5e308, 5e-324, -0.5]
)
def test_number_comes_back(number):
    """Every number that fits a double comes back in the reply's id, digit by digit, and 1.0 not as 1."""
    line = with_value(json.dumps(number), "id").replace(b"ping", b"foo.get")
    found = strict(talk(line))["id"]
    assert (found, type(found)) == (number, type(number))


@pytest.mark.parametrize("where", ["id", "params", "method"])
@pytest.mark.parametrize("half", [r'"\ud800"', r'"\uDFFF"', r'"a\ud83db"', r'"\ude00\ud83d"', r'"\\\ud800"'])
def test_half_a_surrogate_pair(half, where):
    """Half a pair cannot be UTF-8; it is refused where it stands, not when it is sent back."""
    with pytest.raises(InvalidRequest, match="half a surrogate pair"):
        parse(with_value(half, where))


@pytest.mark.parametrize("line", [rb'{"jsonrpc":"2.0","method":"m","\ud800":1}', rb'[{"a":[{"\udc00":1}]}]'])
def test_half_a_pair_in_a_name(line):
    """Names of members are strings, too."""
    with pytest.raises(InvalidRequest, match="half a surrogate pair"):
        parse(line)


@pytest.mark.parametrize("where", ["id", "method"])
@pytest.mark.parametrize("text", [r'"\ud83d\ude00"', '"\U0001f600"', r'"\\ud800"', '"\u2028\u2029\x85"', r'"\u0000"'])
def test_odd_text_comes_through(text, where):
    """Whole pairs, escaped backslashes, line separators of Unicode and NUL are text like any other."""
    item = parse(with_value(text, where)).items[0]
    assert getattr(item, where) == json.loads(text)


@pytest.mark.parametrize(
    "line",
    [
        b'{"jsonrpc":"2.0","id":1,"method":"status","method":"abort"}',
        b'{"jsonrpc":"2.0","id":1,"method":"abort","m\\u0065thod":"status"}',
        b'{"jsonrpc":"2.0","id":1,"method":"abort","params":{"wait":"applied","wait":"accepted"}}',
        b'[{"jsonrpc":"2.0","method":"abort","id":1,"id":2}]',
    ],
)
def test_name_that_stands_twice(line):
    """A name twice in one object has no meaning that all parsers share: an invalid request that says why."""
    with pytest.raises(InvalidRequest, match=r"the name '\w+' stands twice in one object"):
        parse(line)
    assert without_message(strict(talk(line))) == error(-32600)


@pytest.mark.parametrize(
    "line",
    [
        PING.decode().encode("utf-16"), PING.decode().encode("utf-16-le"), PING.decode().encode("utf-32"),
        b"\xef\xbb\xbf" + PING, PING[:12] + b"\xff" + PING[12:], PING.replace(b"ping", b"\xc0\xaf"),
        PING.replace(b"ping", b"\xed\xa0\x80"), PING.replace(b"ping", b"p\0ng"), PING.replace(b"ping", b"p\ning"),
        PING.replace(b"ping", b"p\ting"), PING + b"\0", b"\0" + PING, PING + PING, PING + b",",
        PING.replace(b'"', b"'"),
        b"", b" ", b"\r", b"{]", b"{\xff", b"{\x01", b"[", b"]", b"{", b"}", b'"', b'"\\', b"\\", b"nul", b"[1,]",
        b'{"a":1,}', b"// x", b"/**/1", b"\xc2\xa0" + PING, "\u2028".encode() + PING,
        b"POST / HTTP/1.1", b"Host: 127.0.0.1:8900", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"[" * 2000, b'{"a":' * 2000,
    ],
    ids=lambda line: ascii(line[:24]),
)  # fmt: skip
def test_line_that_is_no_json(line):
    """Other encodings, marks, control characters, scraps and other protocols are one error each."""
    with pytest.raises((ParseError, InvalidRequest)) as caught:
        parse(line)
    assert caught.value.message.isascii() and len(caught.value.message) < 300
    assert without_message(strict(talk(line)))["id"] is None


@pytest.mark.parametrize("space", [b"\r", b" ", b"\t", b"\r\r \t"])
def test_space_around_a_line(space):
    """CR LF ends a line as LF does, and JSON's own white space does no harm."""
    assert parse(space + PING + space) == parse(PING) == Message((Request("ping", {}, 1),), is_batch=False)


# Limits...


@pytest.mark.parametrize("length", [MAX_LINE - 1, MAX_LINE, MAX_LINE + 1])
@pytest.mark.parametrize("fill", [b" ", b"x"])
def test_longest_line(length, fill):
    """A line of exactly the limit is read, one byte more is not, whatever it is made of."""
    line = PING.ljust(length) if fill == b" " else PING.replace(b"ping", b"x" * (length - len(PING) + 4))
    assert len(line) == length
    if length <= MAX_LINE:
        assert isinstance(parse(line).items[0], Request)
    else:
        with pytest.raises(InvalidRequest) as caught:
            parse(line)
        assert caught.value.data == {"limit": MAX_LINE}


@pytest.mark.parametrize("depth", [MAX_DEPTH - 1, MAX_DEPTH, MAX_DEPTH + 1, 2000, 10_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('[{"a":', "}]")])
def test_deepest_nesting(depth, opening, closing):
    """Nesting of exactly the limit is read, one more is not; 2,000 would overflow Python's parser."""
    each = opening.count("[") + opening.count("{")
    pairs, odd = divmod(depth - 2, each)  # the request and its params are two
    deep = "[" * odd + opening * pairs + "1" + closing * pairs + "]" * odd
    line = with_value(f'[],{deep},[{{}}],"[[[["', "params")  # brackets beside it, so that they must be told apart
    if depth <= MAX_DEPTH:
        assert isinstance(parse(line).items[0], Request)
    else:
        with pytest.raises(InvalidRequest):
            parse(line)


@pytest.mark.parametrize(
    "text", ["[" * 5000, "[{" * 1000 + r"\"[" * 1000, r"\\", "]" * 100 + "[" * 100, '\\"' * 99 + "{" * 99]
)
def test_brackets_in_a_string_are_no_nesting(text):
    """Only brackets outside strings count, whatever is escaped."""
    assert parse(with_value(f'"{text}"' if "\\" in text else json.dumps(text), "params")).items[0].method == "ping"


def test_wide_is_not_deep():
    """Thousands of brackets side by side are no nesting."""
    assert isinstance(parse(with_value(",".join(["[]", "{}"] * 5000), "params")).items[0], Request)


@pytest.mark.parametrize("size", [1, MAX_BATCH - 1, MAX_BATCH, MAX_BATCH + 1, 32_000])
def test_largest_batch(size):
    """A batch of exactly the limit is answered, one more request is refused as a whole."""
    line = b"[" + b",".join([b"1"] * size) + b"]"
    if size <= MAX_BATCH:
        message = parse(line)
        assert message.is_batch and len(message.items) == size
        assert all(isinstance(item, Refusal) for item in message.items)
    else:
        with pytest.raises(InvalidRequest) as caught:
            parse(line)
        assert caught.value.data == {"limit": MAX_BATCH}


HOSTILE = {
    "escaped-quotes": "[]" * 40 + '"' + '\\"' * 32_600,
    "open-strings": '[{"' * 21_000,
    "quotes": "[]" * 40 + '"' * 65_000,
    "backslashes": "[]" * 40 + '"' + "\\" * 65_000,
    "escapes-at-the-end": "[]" * 40 + '"\\' * 32_000,
    "strings": "[" * 33 + '"",' * 21_000,
    "zeros": "[" + "0," * 32_000 + "0]",
    "long-fraction": "0." + "1" * 65_000,
    "long-exponent": "1e-" + "9" * 65_000,
    "integers": "[" + ",".join(["9" * 308] * 210) + "]",
    "small-fractions": "[" + ",".join(["0." + "0" * 400 + "1"] * 160) + "]",
    "names": "{" + ",".join(f'"{n}":1' for n in range(7_000)) + "}",
    "surrogates": '["' + "\\ud83d" * 10_900 + '"]',
    "spaces": " " * 65_000 + "{",
    "openings": "[{" * 32_000,
    "closings": "]" * 65_000,
    "batch-of-lists": "[" + "[]," * 21_000 + "[]]",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_line_takes_no_time(name):
    """The costliest line of 64 KiB is read or refused in a blink: no step of it is quadratic."""
    line = HOSTILE[name].encode()
    assert 40_000 < len(line) <= MAX_LINE
    before = time.thread_time()
    try:
        parse(line)
    except ControlError:
        pass
    assert time.thread_time() - before < 1.0  # quadratic takes minutes


# Writing...


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"), ([1.5, math.nan], [1.5, "NaN"]),
        ({"loss": (math.inf, 1)}, {"loss": ["Infinity", 1]}), ({math.nan: 1}, {"nan": 1}),
        ({1: math.nan}, {"1": "NaN"}),
        ("\ud800", "\ufffd"), ({"\udfff": ["a\ud800b"]}, {"\ufffd": ["a\ufffdb"]}),
        ("\U0001f600\ud83d", "\U0001f600\ufffd"),
        ({"\ud800": math.nan}, {"\ufffd": "NaN"}), (r"\ud800", r"\ud800"), ("a\nb\r\u2028\0", "a\nb\r\u2028\0"),
        (5e-324, 5e-324), (1.7976931348623157e308, 1.7976931348623157e308), (2**64, 2**64), ({}, {}), (None, None),
    ],
    ids=ascii,
)  # fmt: skip
def test_encode_is_strict(value, wanted):
    """Whatever floats and broken strings there are, other parsers read one line of plain JSON."""
    assert strict(encode(value)) == wanted


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(string.printable), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
broken_values = st.recursive(
    st.none() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner) | st.dictionaries(st.text(st.characters()), inner),
    max_leaves=12,
)


@settings(max_examples=200)
@given(json_values)
def test_values_round_trip(value):
    """What is JSON comes out as it went in: encode, strict parser, our own."""
    line = encode(value)
    assert strict(line) == jsonrpc.parse_json(line) == value


@settings(max_examples=200)
@given(broken_values)
def test_broken_values_become_json(value):
    """What is no JSON becomes JSON that our own strict parser takes."""
    line = encode(value)
    assert strict(line) == jsonrpc.parse_json(line)


@settings(max_examples=100)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(json_values, max_size=3) | st.dictionaries(st.text(string.ascii_letters), json_values, max_size=3),
    st.none() | st.integers(-(2**60), 2**60) | st.text(string.printable) | st.floats(-1e9, 1e9),
)
def test_requests_round_trip(method, params, id):
    """What a client writes, the server reads; what the server answers, the client reads."""
    line = jsonrpc.request(method, params, id)
    strict(line)
    assert jsonrpc.parse_message(line[:-1]) == Message((Request(method, params, id),), is_batch=False)
    reply = jsonrpc.parse_reply(jsonrpc.replies([jsonrpc.response(id, params)], is_batch=False))
    assert (reply.id, reply.result, reply.error) == (id, params, None)


def test_replies_of_a_batch():
    """One reply is a list in a batch and an object outside; none at all is no line (section 6)."""
    one, two = success(None, 1), {**error(0, "b"), "error": jsonrpc.error_object(InvalidParams("no"))}
    lines = [jsonrpc.response(1, None), jsonrpc.response("b", InvalidParams("no"))]
    assert strict(jsonrpc.replies(lines[:1], is_batch=True)) == [one]
    assert strict(jsonrpc.replies(lines, is_batch=True)) == [one, two]
    assert strict(jsonrpc.replies(lines[:1], is_batch=False)) == one
    assert jsonrpc.replies([], is_batch=True) == jsonrpc.replies([], is_batch=False) == b""


@given(json_values, st.none() | st.integers(-(2**60), 2**60) | st.text(string.printable))
def test_what_is_encoded_already_is_sent_as_it_is(value, id):
    """The same bytes as if it were encoded for this answer."""
    assert jsonrpc.response(id, jsonrpc.encoded(value)) == jsonrpc.response(id, value)
    assert strict(jsonrpc.response(id, value)) == success(value, id)
    assert encode(jsonrpc.encoded(value)) == encode(value)


def test_error_object():
    """An error has data only where there are facts."""
    assert jsonrpc.error_object(ParseError("m")) == {"code": -32700, "message": "m"}
    assert jsonrpc.error_object(ParseError("m", byte=3)) == {"code": -32700, "message": "m", "data": {"byte": 3}}


# Reading a reply...


@pytest.mark.parametrize(
    "line",
    [b"", b"\n", b"HTTP/1.1 400 Bad Request\r\n", b"[]", b"null", b"1", b"{}", b'{"jsonrpc":"2.0","id":1}', b"\xff\xfe",
     b'{"id":1,"result":1}', b'{"jsonrpc":"1.0","id":1,"result":1}', b"[" * 100_000, b"9" * 5000,
     b'{"jsonrpc":"2.0","id":1,"result":1,"error":{"code":1,"message":""}}', b'[{"jsonrpc":"2.0","id":1,"result":1}]'],
    ids=lambda line: ascii(line[:24]),
)  # fmt: skip
def test_line_that_is_no_reply(line):
    """A peer that answers like this is no job of ours, and the client raises one error."""
    with pytest.raises(InternalError):
        jsonrpc.parse_reply(line)


def test_deepest_reply():
    """What is nested deeper than ours ever is never reaches the code that walks through it."""
    deepest = jsonrpc.MAX_REPLY_DEPTH - 1
    line = encode(success("@", 1)).replace(b'"@"', b"[" * deepest + b"NaN" + b"]" * deepest)
    assert encode(jsonrpc.parse_reply(line).result).count(b"[") == deepest
    with pytest.raises(InternalError):
        jsonrpc.parse_reply(line.replace(b"NaN", b"[NaN]"))


def test_notification_between_replies():
    """An event differs from a response by its method and its missing id; it is no reply."""
    line = b'{"jsonrpc":"2.0","method":"event","params":{"seq":1}}\n'
    assert jsonrpc.parse_incoming(line) == jsonrpc.Notification("event", {"seq": 1})
    assert jsonrpc.parse_incoming(encode(success(1, 7))) == jsonrpc.Reply(7, 1, None)
    with pytest.raises(InternalError):
        jsonrpc.parse_reply(line)
    with pytest.raises(InternalError):
        jsonrpc.parse_incoming(line.replace(b'"method"', b'"id":1,"method"'))


@pytest.mark.parametrize("result", [None, False, 0, "", [], {}, {"error": 1}])
def test_empty_results_are_results(result):
    """A success is recognised by its member, not by its value."""
    reply = jsonrpc.parse_reply(encode(success(result, 1)))
    assert (reply.result, reply.error) == (result, None)


@pytest.mark.parametrize("fault", [None, 0, False, "", "broken", [], {}, {"code": None}, {"message": 5, "data": [1]}])
def test_odd_errors_are_errors(fault):
    """An error without code or message is still a failure, never a success."""
    reply = jsonrpc.parse_reply(encode({"jsonrpc": "2.0", "id": 1, "error": fault}))
    assert type(reply.error) is ControlError and reply.result is None


# Fuzz...

SEEDS = [
    PING,
    *(line.replace("\n", " ").encode() for line, _ in SPECIFICATION.values()),
    with_value(r'"\ud83d\ude00"', "params"), with_value('{"wait":"finished","timeout":1e3}', "params"),
    with_value('"' + "[]" * 40 + '"', "params"), b"[" * 31 + b"]" * 31, with_value("-0.5e-7", "id"),
]  # fmt: skip
SCRAPS = [b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b"\\u", b"\\ud800", b"NaN", b"1e999", b"-", b"\0", b"\xff",
          b"\xe2\x80\xa8",
          b'"id":', b'"method":', b"null", b"true", b"9" * 400, b"[[[[[[[[", b"\r", b"\xef\xbb\xbf"]  # fmt: skip


def mutated(rng):
    """A seed line after a few cuts, swaps, repetitions and scraps; now and then pure noise."""
    if rng.random() < 0.05:
        return rng.randbytes(rng.randrange(60))
    line = bytearray(rng.choice(SEEDS))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(line) + 1)
        to = min(len(line), at + rng.randrange(12))
        kind = rng.randrange(5)
        if kind == 0:
            del line[at:to]
        elif kind == 1:
            line[at:at] = rng.choice(SCRAPS)
        elif kind == 2:
            line[at:to] = rng.randbytes(to - at)
        elif kind == 3:
            line[at:at] = line[at:to] * rng.randrange(1, 5)
        else:
            other = rng.choice(SEEDS)
            line[at:] = other[rng.randrange(len(other)) :]
    return bytes(line)


def test_fuzz():
    """20,000 broken lines: each is a message or one of two errors, and its reply passes a strict parser."""
    seed = int(os.environ.get("FUZZ_SEED", "20"))
    rng, seen = random.Random(seed), {Message: 0, ParseError: 0, InvalidRequest: 0}
    for number in range(20_000):
        line = mutated(rng)
        try:
            found = parse(line)
            for item in found.items:
                id = item.id if isinstance(item, Refusal) else None if item.id is NoId.NOTIFICATION else item.id
                strict(jsonrpc.response(id, getattr(item, "params", None)))
        except (ParseError, InvalidRequest) as err:
            found = err
            strict(jsonrpc.response(None, err))
        except Exception as err:
            raise AssertionError(f"seed {seed}, line {number}: {line!r}") from err
        seen[type(found)] += 1
    assert all(count > 100 for count in seen.values()), seen
