"""The tree of errors: one code a class, whole after a trip over the wire."""

from __future__ import annotations

import copy
import pickle

import pytest

from forgather_control import errors
from forgather_control.errors import ControlError, from_wire
from forgather_control.wire import jsonrpc

from .support.harness import strict

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ControlError)]
SPECIFIED = {"ParseError": -32700, "InvalidRequest": -32600, "MethodNotFound": -32601, "InvalidParams": -32602,
             "InternalError": -32603}  # fmt: skip
FACTS = {"command_id": "x", "limit": 64, "candidates": ["a", "b"], "record": {"state": "failed", "error": None}}

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def test_codes_are_unique_and_in_range():
    """Each class has a code of its own, outside -31020 to -32099, which MCP reserves."""
    codes = {cls.code: cls.__name__ for cls in CLASSES}
    assert len(codes) == len(CLASSES)
    assert {name: getattr(errors, name).code for name in SPECIFIED} == SPECIFIED
    assert all(
        name in SPECIFIED or -32019 <= code <= -32000 or -31099 <= code <= -31000 for code, name in codes.items()
    )


@every_class
@pytest.mark.parametrize("facts", [{}, FACTS, {"code": 5, "data": None}], ids=["none", "some", "misleading"])
def test_every_class_survives_the_wire(cls, facts):
    """An error raised in the job is the same class with the same facts in the client."""
    line = jsonrpc.response(1, cls("why\nand how", **facts))
    strict(line)
    reply = jsonrpc.parse_reply(line)
    assert type(reply.error) is cls
    assert (reply.error.message, str(reply.error), reply.error.data) == ("why\nand how", "why\nand how", facts)


@every_class
@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_every_class_is_copied_whole(cls, clone):
    """Errors cross processes (multiprocessing, pytest-xdist) with their facts."""
    found = clone(cls("why", limit=3))
    assert (type(found), found.message, found.data) == (cls, "why", {"limit": 3})


@pytest.mark.parametrize("code", [-1, 0, True, None, "-32000", -32700.0, 10**30, [], {}, -32098])
@pytest.mark.parametrize("data", [None, {"limit": 1}, {"code": "theirs"}])
def test_unknown_code_is_kept(code, data):
    """A code of a newer job becomes a plain ControlError, whose data tells it whatever else it holds."""
    error = from_wire(code, "new", data)
    assert type(error) is ControlError
    assert error.data == {**(data or {}), "code": code}


@pytest.mark.parametrize("data", [[], [1], "text", 0, False])
def test_data_that_is_no_object_is_kept(data):
    """The specification allows any data; what is no object stands under one name."""
    assert from_wire(-32602, "m", data).data == {"data": data}


@pytest.mark.parametrize("message", [None, 5, ["x"], {}, "\ud800", "\x1b[2J"])
def test_any_message_is_text(message):
    """A message of the wrong kind is shown, not raised over."""
    assert from_wire(-32603, message, None).message == str(message)


def test_data_is_not_shared_with_the_reply():
    """Changing an error's facts does not change the object that they came in."""
    data = {"limit": 1}
    from_wire(-32005, "m", data).data["limit"] = 2
    assert data == {"limit": 1}


@pytest.mark.parametrize(
    ("name", "builtin"),
    [("InvalidParams", ValueError), ("CommandNotFound", LookupError), ("DeadlinePassed", TimeoutError),
     ("NoSuchJob", LookupError), ("AmbiguousJob", LookupError), ("JobDead", ConnectionError),
     ("JobNotAnswering", TimeoutError), ("BadJobId", ValueError)],
)  # fmt: skip
def test_ordinary_handlers_catch_it(name, builtin):
    """``except TimeoutError`` and its like catch what they should, through ``from_wire`` too."""
    with pytest.raises(builtin):
        raise from_wire(getattr(errors, name).code, "m", None)


def test_facts_do_not_shadow_the_message():
    """No record's member is named like a parameter of the constructor, so records travel as facts."""
    from forgather_control.wire.records import CommandRecord

    record = CommandRecord("id", "abort", "failed", 1.0, error={"code": -32006, "message": "ended"})
    assert errors.CommandFailed("m", **record.to_json()).data == record.to_json()
