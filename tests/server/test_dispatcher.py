"""From a line to its reply, over a real socket pair: at once, later, in batches, with errors, and given up."""

from __future__ import annotations

import json
import logging
import socket
import time

import pytest

from forgather_control.errors import JobDead, NotCancellable
from forgather_control.server import limits
from forgather_control.server.connection import Connection
from forgather_control.server.dispatcher import PENDING, Deferred, Dispatcher
from forgather_control.wire import limits as wire_limits

from ..support.harness import SOON, strict


def _circle():
    circle = []
    circle.append(circle)
    return circle


class Talk:
    """A dispatcher with one client. The methods: echo, later KEY, fail, crash, odd."""

    def __init__(self):
        self.given, self.asked, self.polls = {}, [], 0
        self.crash: BaseException = RuntimeError("secret traceback")
        self.dispatcher = Dispatcher(self.answer)
        ours, self.client = socket.socketpair()
        self.client.settimeout(SOON)
        self.connection, self.file = Connection(ours, wire_limits.MAX_LINE), self.client.makefile("rb")

    def answer(self, request, sink):
        self.asked.append(request.method)
        if request.method == "later":
            return Deferred(lambda: self.poll(request.params[0]), *request.params[1:])
        return {
            "echo": lambda: request.params,
            "fail": lambda: self._raise(NotCancellable("no", state="applied")),
            "crash": lambda: self._raise(self.crash),
            "odd": lambda: {"value": object()},
            "circle": _circle,
        }[request.method]()

    def _raise(self, error):
        raise error

    def poll(self, key):
        self.polls += 1
        value = self.given.get(key, PENDING)
        return self._raise(value) if isinstance(value, BaseException) else value

    def ask(self, *items, batch=False):
        """Send requests ``(id, method, params)``; an id of ``...`` makes a notification."""
        calls = []
        for id_, method, *params in items:
            call = {"jsonrpc": "2.0", "method": method, "params": params, "id": id_}
            if id_ is ...:
                del call["id"]
            calls.append(call)
        self.dispatcher.dispatch(self.connection, json.dumps(calls if batch else calls[0]).encode())

    def reply(self):
        return strict(self.file.readline())

    def is_quiet(self):
        """Whether nothing has been sent that was not read."""
        self.client.setblocking(False)
        try:
            return not self.client.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        finally:
            self.client.settimeout(SOON)

    def close(self):
        for each in (self.file, self.client, self.connection.sock):
            each.close()


@pytest.fixture
def talk():
    """One client and its dispatcher."""
    talk = Talk()
    yield talk
    talk.close()


def _outcomes(replies):
    return {reply["id"]: reply["error"]["code"] if "error" in reply else reply["result"] for reply in replies}


def test_an_answer_at_once_goes_out_at_once(talk):
    """The reply carries the id as it came: a number, text, null or a fraction."""
    for id_ in (1, "a", None, 1.5, "", 0, -1):
        talk.ask((id_, "echo", "x"))
        assert talk.reply() == {"jsonrpc": "2.0", "id": id_, "result": ["x"]}
        assert talk.connection.open == 0 and talk.connection.is_idle


def test_a_notification_is_done_and_not_answered(talk):
    """Nothing goes out for it, whether it succeeds, fails, crashes or would have to wait."""
    for method in ("echo", "fail", "crash", "odd", "later"):
        talk.ask((..., method, "x"))
    assert talk.asked == ["echo", "fail", "crash", "odd", "later"]
    talk.given["x"] = 1
    assert talk.dispatcher.poll(True) == [] and talk.polls == 0 and talk.is_quiet()
    assert talk.connection.is_idle


def test_later_is_answered_when_it_is_there(talk):
    """Each waiting request is answered once, in the order in which the values come, not the requests."""
    talk.ask((1, "later", "one"))
    talk.ask((2, "later", "two"))
    talk.ask((3, "echo"))
    assert talk.reply()["id"] == 3 and talk.connection.open == 2 and not talk.connection.is_idle
    assert talk.dispatcher.poll(True) == [] and talk.is_quiet()
    talk.given["two"] = "second"
    assert talk.dispatcher.poll(True) == [talk.connection]
    assert talk.reply() == {"jsonrpc": "2.0", "id": 2, "result": "second"}
    talk.given["one"] = None
    talk.dispatcher.poll(True)
    assert talk.reply() == {"jsonrpc": "2.0", "id": 1, "result": None}
    assert talk.dispatcher.poll(True) == [] and talk.is_quiet() and talk.connection.is_idle


def test_the_waiting_are_asked_when_woken_or_due(talk):
    """Without a wake only those whose deadline came are asked; the deadlines are there to be waited for."""
    far = time.monotonic() + 1000
    talk.ask((1, "later", "never"))
    talk.ask((2, "later", "far", far))
    talk.ask((3, "later", "due", time.monotonic()))
    assert sorted(talk.dispatcher.deadlines())[1:] == [far]
    talk.dispatcher.poll(False)
    assert talk.polls == 1
    talk.given.update(never=1, far=2, due=3)
    talk.dispatcher.poll(False)
    assert talk.polls == 2 and talk.reply()["id"] == 3 and talk.is_quiet()
    talk.dispatcher.poll(True)
    assert [talk.reply()["id"], talk.reply()["id"]] == [1, 2] and list(talk.dispatcher.deadlines()) == []


def test_a_batch_is_answered_in_one_line_when_its_last_is(talk):
    """At once, later, an error and a crash in one batch: one reply, in order, and nothing for a notification."""
    later, at_once = [(1, "later", "slow"), (5, "later", "slower")], [(2, "echo", "x"), (..., "echo"), (3, "fail")]
    talk.ask(later[0], *at_once, (4, "crash"), later[1], batch=True)
    assert talk.is_quiet() and talk.connection.open == 1
    talk.given["slower"] = "b"
    talk.dispatcher.poll(True)
    assert talk.is_quiet()
    talk.given["slow"] = "a"
    talk.dispatcher.poll(True)
    replies = talk.reply()
    assert [reply["id"] for reply in replies] == [1, 2, 3, 4, 5] and talk.connection.is_idle
    assert _outcomes(replies) == {1: "a", 2: ["x"], 3: NotCancellable.code, 4: -32603, 5: "b"}


def test_a_batch_with_what_is_no_request(talk):
    """Each element that is no request has its own error, the others are done; notifications alone bring nothing."""
    talk.dispatcher.dispatch(talk.connection, b'[1, {"jsonrpc":"2.0","id":7,"method":"echo"}, {"id":8}, "x"]')
    replies = talk.reply()
    assert [(reply["id"], reply.get("error", {}).get("code")) for reply in replies] == [
        (None, -32600), (7, None), (8, -32600), (None, -32600),
    ]  # fmt: skip
    talk.ask((..., "echo"), (..., "fail"), batch=True)
    assert talk.is_quiet() and talk.connection.is_idle
    talk.ask((1, "echo"), batch=True)
    assert isinstance(talk.reply(), list), "a batch of one is a batch"
    for line, code in ((b"[]", -32600), (b"[1,", -32700), (json.dumps([0] * 101).encode(), -32600)):
        talk.dispatcher.dispatch(talk.connection, line)
        assert talk.reply()["error"]["code"] == code


def test_an_error_travels_with_its_facts(talk):
    """An error of ours keeps code, message and data, at once or later."""
    expected = {"code": NotCancellable.code, "message": "no", "data": {"state": "applied"}}
    talk.ask((1, "fail"))
    assert talk.reply()["error"] == expected
    talk.given["x"] = NotCancellable("no", state="applied")
    talk.ask((2, "later", "x"))
    talk.dispatcher.poll(True)
    assert talk.reply()["error"] == expected


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("crash", [RuntimeError, SystemExit])
def test_a_crash_is_answered_and_logged_and_not_told(talk, caplog, later, crash):
    """Whatever a method raises, its caller gets -32603 without a word of the traceback, which the log has."""
    talk.crash = talk.given["x"] = crash("secret traceback")
    talk.ask((1, "later", "x") if later else (1, "crash"))
    with caplog.at_level(logging.ERROR):
        talk.dispatcher.poll(True)
    error = talk.reply()["error"]
    assert error["code"] == -32603 and "secret" not in json.dumps(error) and "secret traceback" in caplog.text


@pytest.mark.parametrize("value", [object(), {1: {2}}, {(1, 2): 3}, b"bytes", _circle()], ids=type)
def test_an_answer_that_is_no_json_is_an_internal_error(talk, value):
    """An answer that cannot be encoded is our fault, and still an answer: alone, later, or in a batch."""
    talk.given["x"] = value
    talk.ask((1, "later", "x"))
    talk.dispatcher.poll(True)
    assert _outcomes([talk.reply()]) == {1: -32603}
    talk.ask((1, "odd"))
    assert _outcomes([talk.reply()]) == {1: -32603}
    talk.ask((2, "circle"), (..., "odd"), (3, "later", "x"), batch=True)
    talk.dispatcher.poll(True)
    assert _outcomes(talk.reply()) == {2: -32603, 3: -32603}
    talk.ask((4, "echo", "still here"))
    assert talk.reply()["result"] == ["still here"] and talk.connection.is_idle


def test_nan_and_surrogates_travel_as_text(talk):
    """A loss of NaN and a broken string in an answer still make one line of strict JSON."""
    talk.given["x"] = {"loss": float("nan"), "name": "\ud800"}
    talk.ask((1, "later", "x"))
    talk.dispatcher.poll(True)
    assert talk.reply()["result"] == {"loss": "NaN", "name": "\ufffd"}


def test_only_so_many_may_wait(talk, monkeypatch):
    """Beyond the bound a request is refused with the number, in a batch, too; an answer makes room again."""
    monkeypatch.setattr(limits, "MAX_DEFERRED", 2)
    talk.ask((1, "later", "a"))
    talk.ask((2, "later", "b"), (3, "later", "c"), batch=True)
    talk.ask((4, "later", "d"))
    error = talk.reply()
    assert (error["id"], error["error"]["data"]) == (4, {"limit": 2})
    talk.ask((6, "echo"))
    assert talk.reply()["result"] == []  # what need not wait is answered
    talk.given["b"] = "b"
    talk.dispatcher.poll(True)
    assert _outcomes(talk.reply()) == {2: "b", 3: error["error"]["code"]}
    talk.ask((5, "later", "a"))
    assert talk.is_quiet() and talk.connection.open == 2


def test_a_caller_that_is_gone_is_not_waited_for(talk):
    """The waiting requests of a broken connection are forgotten unasked."""
    talk.ask((1, "later", "a", time.monotonic()))
    talk.connection.broken = True
    assert talk.dispatcher.poll(True) == [] and talk.polls == 0 and list(talk.dispatcher.deadlines()) == []
    talk.dispatcher.give_up()
    assert talk.is_quiet()


def test_given_up_everybody_hears_how_it_ended(talk):
    """At the end ready values are sent, the other requests are answered that the job is ending; then none waits."""
    talk.ask((1, "later", "ready"))
    talk.ask((2, "later", "never", 1e9), (3, "echo"), (4, "later", "ready"), (5, "later", "failed"), batch=True)
    talk.given.update(ready="just in time", failed=JobDead("gone"))
    talk.dispatcher.give_up()
    assert talk.reply()["result"] == "just in time"
    assert _outcomes(talk.reply()) == {2: -32006, 3: [], 4: "just in time", 5: JobDead.code}
    talk.dispatcher.give_up()
    assert talk.is_quiet() and talk.connection.is_idle and list(talk.dispatcher.deadlines()) == []


def test_a_line_beyond_the_limit_ends_the_listening(talk):
    """The error goes out, and nothing more is read: where the next line begins is not known."""
    talk.dispatcher.dispatch(talk.connection, b" " * wire_limits.MAX_LINE)
    assert talk.reply()["error"]["code"] == -32700 and not talk.connection.at_end
    talk.dispatcher.dispatch(talk.connection, b" " * (wire_limits.MAX_LINE + 1))
    assert talk.reply()["error"]["code"] == -32600 and talk.connection.at_end and talk.asked == []


def test_replies_to_who_does_not_read_are_kept(talk):
    """What the socket does not take waits in the connection, and comes out whole and in order."""
    text = "x" * 50_000
    for number in range(20):
        talk.ask((number, "echo", text))
    assert talk.connection.unsent > 100_000 and not talk.connection.is_idle
    received = bytearray()
    while not talk.connection.is_idle or not talk.is_quiet():
        received += talk.client.recv(30_000)
        talk.connection.flush()
    assert [strict(line + b"\n") for line in received.split(b"\n")[:-1]] == [
        {"jsonrpc": "2.0", "id": number, "result": [text]} for number in range(20)
    ]
