"""Options: what each reads, and how a method's parameter becomes one."""

from __future__ import annotations

import argparse

import pytest

from forgather_control.cli import options
from forgather_control.wire.methods import Param

SECONDS = {"type": ["number", "null"], "minimum": 0, "maximum": 10, "unit": "seconds", "default": None}


def read(param: Param, *words: str):
    """The value of a parameter as the command line reads it."""
    parser = argparse.ArgumentParser()
    options.add_param(parser, param)
    return vars(parser.parse_args(words))[options.PARAM + param.name]


@pytest.mark.parametrize(
    ("schema", "words", "value"),
    [
        ({"enum": ["auto", True, False], "default": "auto"}, ["--x-y", "auto"], "auto"),
        ({"enum": ["auto", True, False], "default": "auto"}, ["--x-y=yes"], True),
        ({"enum": ["auto", True, False], "default": "auto"}, ["--x-y=no"], False),
        ({"type": "boolean", "default": False}, ["--x-y"], True),
        ({"type": "boolean", "default": False}, [], None),
        (SECONDS, ["--x-y", "2.5"], 2.5),
        ({"type": "integer", "minimum": 1, "default": 1}, ["--x-y=3"], 3),
        ({"type": ["string", "null"], "maxLength": 5, "default": None}, ["--x-y", "a b"], "a b"),
        ({"type": "string"}, ["word"], "word"),
        ({"type": "integer"}, ["7"], 7),
    ],
)
def test_a_parameter_becomes_an_option_or_a_word(schema, words, value):
    """A required one is a word of its own; a boolean a flag; the rest options that check their value."""
    assert read(Param("x_y", schema, "What it is, 100 %."), *words) == value


@pytest.mark.parametrize(
    ("schema", "word", "said"),
    [
        ({"enum": ["auto", True, False], "default": "auto"}, "true", "'true' is not auto or yes or no"),
        (SECONDS, "soon", "'soon' is not a number of seconds from 0 to 10"),
        (SECONDS, "11", "'11' is not a number of seconds from 0 to 10"),
        (SECONDS, "nan", "'nan' is not a number"),
        ({"type": "integer", "default": 1}, "1.5", "'1.5' is not a whole number"),
        ({"type": "string", "maxLength": 2, "default": ""}, "abc", "'abc' is not a string of 0 to 2 characters"),
    ],
)
def test_a_wrong_value_says_what_was_expected(schema, word, said, capsys):
    """A usage error, before anything is sent."""
    with pytest.raises(SystemExit):
        read(Param("x", schema, "What."), f"--x={word}")
    assert said in capsys.readouterr().err


def test_options_with_a_value_are_known():
    """So that the word behind one is not taken for the verb or the job."""
    known = options.with_values()
    assert {"--connect", "--timeout", "--reason", "--evaluate", "--ssh"} <= known
    assert known.isdisjoint({"--json", "--wait", "--force", "--version"})


def test_a_token_file(tmp_path):
    """Its first line; one that is missing, empty or no text is a usage error, and an endless one is not read whole."""
    (tmp_path / "token").write_text("secret \nmore\n")
    assert options._first_line(str(tmp_path / "token")) == "secret"
    assert len(options._first_line("/dev/zero")) <= options._MAX_TOKEN
    (tmp_path / "binary").write_bytes(b"\xff\n")
    for path in (tmp_path / "none", tmp_path / "binary", "/dev/null", tmp_path):
        with pytest.raises(argparse.ArgumentTypeError):
            options._first_line(str(path))
