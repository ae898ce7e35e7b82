"""Printing: colours, closed and broken streams, questions without a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from forgather_control.cli import terminal
from forgather_control.errors import InternalError


@pytest.mark.parametrize("settings, coloured", [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colours_are_for_terminals_that_want_them(settings, coloured, monkeypatch):
    """NO_COLOR and dumb terminals get none (https://no-color.org)."""
    monkeypatch.setenv("TERM", "xterm")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert terminal.has_colour() is coloured


def test_text_fits_the_encoding(monkeypatch):
    """A character that the output cannot have is shown as an escape."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    terminal.print_text("\u2588 ok")
    assert out.buffer.getvalue() == b"\\u2588 ok\n"
    assert not terminal.has_unicode()


@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError, OverflowError, ValueError])
def test_an_answer_that_cannot_be_shown(error):
    """Whatever a hostile answer does to the code that shows it, it ends as one error."""

    def show(answer):
        raise error("odd")

    with pytest.raises(InternalError, match="--json prints it"):
        terminal.print_answer(False, [], show, [])


def test_an_answer_as_json_is_not_looked_into(capsys):
    """``--json`` prints what the wire said, whatever it is."""
    terminal.print_answer(True, [1, {"a": "\x1b"}], None)
    assert capsys.readouterr().out == '[1, {"a": "\\u001b"}]\n'


def test_without_a_terminal_there_is_no_question(monkeypatch):
    """Neither a pipe nor a closed stdin can say yes; the message names the way out."""
    for stdin in (io.StringIO("y\n"), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(terminal.Refusal) as caught:
            terminal.confirm("abort", "abort job?")
        assert caught.value.args == (
            "abort needs confirmation, but stdin is not a terminal. Use --force to skip the question",
            2,
        )


def test_complaints_go_to_stderr_or_nowhere(monkeypatch, capsys):
    """The code is returned, and a closed stderr is no error."""
    assert terminal.complain("a\x1b", 4) == 4
    assert capsys.readouterr().err == "a\\x1b\n"
    monkeypatch.setattr(sys, "stderr", None)
    assert terminal.complain("a") == 0
