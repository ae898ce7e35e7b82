"""Check that jobs answer what ``rpc.discover`` promises: every successful answer fits the schema of its result.

``Promised`` checks what a raw client receives, ``checked`` what the package's client receives; ``Kept`` collects what
jobs in this process answer to any client.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import fastjsonschema

from forgather_control.server.dispatcher import PENDING, Deferred, Subscription
from forgather_control.training.job_queries import JobQueries
from forgather_control.wire import jsonrpc, schemas
from forgather_control.wire.builtin import BUILTIN

#: Addresses of servers whose answers a test makes up; they are not checked.
MADE_UP: set[Any] = set()
#: So many answers to one method are kept for a check at the end of a test.
_KEPT = 100
#: So many items of a long list are checked, from each end.
_SAMPLE = 20


def problem(method: str, result: Any, schema: dict[str, Any] | None = None) -> str | None:
    """Say where a result does not fit the method's schema; ``None`` if it fits, or the method is not built in."""
    if schema is None:
        if method not in BUILTIN:
            return None
        schema = schemas.results()[BUILTIN[method].returns]
    if isinstance(result, list):
        result = [*result[:_SAMPLE], *result[_SAMPLE:][-_SAMPLE:]]
    try:
        _validator(schema)(result)
    except fastjsonschema.JsonSchemaValueException as err:
        return f"the answer to {method} breaks its schema at {err.name}: {err.message[:500]}"
    return None


#: The compiled schemas, by the identity of each: a job's answers are many, and each is checked.
_compiled: dict[int, tuple[dict[str, Any], Callable[[Any], Any]]] = {}


def _validator(schema: dict[str, Any]) -> Callable[[Any], Any]:
    if id(schema) not in _compiled:
        _compiled[id(schema)] = schema, fastjsonschema.compile(_closed(schema), use_default=False, use_formats=False)
    return _compiled[id(schema)][1]


def _closed(schema: Any) -> Any:
    """Return the schema without room for other members: a job of this version has none."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if "properties" in schema:
        closed.setdefault("additionalProperties", False)
    return closed


class Promised:
    """The requests of one connection, whose replies are checked; of a made-up server none are."""

    def __init__(self, sock: socket.socket, made_up: bool) -> None:
        self._checks = not made_up and sock.getpeername() not in MADE_UP
        self._rest = b""
        self._methods: dict[str, list[str]] = {}  # by id, in the order of the requests

    def sent(self, data: bytes) -> None:
        """Note the requests in ``data``; lines that are none are skipped."""
        if not self._checks:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                items = json.loads(line)
            except (ValueError, RecursionError):
                continue
            for item in items if isinstance(items, list) else [items]:
                if isinstance(item, dict) and "id" in item and isinstance(item.get("method"), str):
                    self._methods.setdefault(repr(item["id"]), []).append(item["method"])

    def check(self, message: Any) -> None:
        """Assert that the successful replies in a message fit; events are skipped."""
        for reply in message[:_SAMPLE] if isinstance(message, list) else [message]:
            if self._checks and isinstance(reply, dict) and "result" in reply:
                asked = self._methods.get(repr(reply["id"]), [])
                problems = {method: problem(method, reply["result"]) for method in asked}
                fits = [method for method in asked if problems[method] is None]
                assert fits or not asked, problems
                if fits:
                    asked.remove(fits[0])


def checked(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``Client.call_raw`` with a check of the result."""

    def checking(client: Any, method: str, params: Any) -> Any:
        result = call(client, method, params)
        trouble = problem(method, result)
        assert trouble is None, trouble
        return result

    return checking


class Kept:
    """The answers of this process's jobs during one test, to any client."""

    def __init__(self) -> None:
        self._answers: dict[str, list[tuple[Any, dict[str, Any]]]] = {}

    def wrap(self, answer: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``JobQueries.answer``, changed to keep its answers."""

        def noting(queries: JobQueries, request: Any, sink: Any) -> Any:
            result = answer(queries, request, sink)
            method = queries.methods.get(request.method)
            return result if method is None else self._note(request.method, schemas.results()[method.returns], result)

        return noting

    def _note(self, method: str, schema: dict[str, Any], result: Any) -> Any:
        if isinstance(result, Deferred):
            poll = result.poll
            return result._replace(poll=lambda: self._note(method, schema, poll()))
        kept = self._answers.setdefault(method, [])
        if result is not PENDING and len(kept) < _KEPT:
            kept.append((result.reply if isinstance(result, Subscription) else result, schema))
        return result

    def check(self) -> None:
        """Assert that all of them fit."""
        for method, answers in self._answers.items():
            for result, schema in answers:
                text = result if isinstance(result, jsonrpc.Encoded) else jsonrpc.encoded(result)
                trouble = problem(method, json.loads(text), schema)
                assert trouble is None, trouble
