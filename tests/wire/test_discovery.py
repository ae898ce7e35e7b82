"""``rpc.discover``: the methods as an OpenRPC document."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from forgather_control.wire import discovery
from forgather_control.wire.builtin import BUILTIN
from forgather_control.wire.jsonrpc import encode

from ..support.answers import problem
from ..support.harness import strict

DOCUMENT = strict(encode(discovery.document(BUILTIN)))
every_method = pytest.mark.parametrize("method", DOCUMENT["methods"], ids=lambda method: method["name"])


def test_the_document_is_the_table():
    """It lists every method by the required members of OpenRPC 1.2, within a bounded size."""
    assert DOCUMENT["openrpc"].startswith("1.") and DOCUMENT["info"].keys() >= {"title", "version"}
    assert [method["name"] for method in DOCUMENT["methods"]] == list(BUILTIN)
    assert "rpc.discover" not in json.dumps(DOCUMENT["methods"][0])
    assert len(json.dumps(DOCUMENT)) < 256 * 1024


@every_method
def test_each_method_is_described(method):
    """Parameters are those of the table, required ones first, and there is a summary."""
    row = BUILTIN[method["name"]]
    assert method["params"] == [
        {"name": p.name, "description": p.doc, "required": p.required, "schema": strict(encode(p.schema))}
        for p in row.params
    ]
    required = [param["required"] for param in method["params"]]
    assert required == sorted(required, reverse=True) and method["summary"]


@every_method
def test_each_result_and_error_has_a_schema(method):
    """Every result has a real JSON Schema with a title, and every error its code and a sentence."""
    schemas = [method["result"]["schema"], *(param["schema"] for param in method["params"])]
    for schema in schemas:
        jsonschema.Draft7Validator.check_schema(schema)
    assert method["result"]["schema"]["title"] and method["result"]["name"]
    assert method["errors"] and all(error["message"] and type(error["code"]) is int for error in method["errors"])


def test_no_title_is_the_name_of_a_method():
    """Generated clients call a method's type by its name in CamelCase, and a schema's by its title: each name once."""
    types = {re.sub(r"(?:^|_)(\w)", lambda found: found[1].upper(), name) for name in BUILTIN}
    titled: dict[str, str] = {}

    def walk(value):
        if isinstance(value, dict):
            if isinstance(title := value.get("title"), str) and "type" in value:
                assert title not in types and titled.setdefault(title, json.dumps(value)) == json.dumps(value)
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(DOCUMENT["methods"])
    assert "SaveCheckpoint" in types and "CommandRecord" in titled


def test_every_enumeration_has_its_type():
    """Generators of typed clients need the type beside the words."""

    def walk(value):
        if isinstance(value, dict):
            assert "enum" not in value or "type" in value, value
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(DOCUMENT["methods"])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"next": 1}, None),
        ({"next": "1"}, "data.next must be integer"),
        ({}, "data must contain ['next'] properties"),
        ({"next": 1, "more": 2}, "data must not contain {'more'} properties"),
    ],
)
def test_an_answer_that_breaks_its_schema_is_noticed(answer, words):
    """The check of all answers in the tests finds a wrong type, a missing member and one that is not described."""
    found = problem("subscribe", answer)
    assert found is None if words is None else words in found
