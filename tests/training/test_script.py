"""Calls of the script's functions: they return, raise, or end themselves, and training goes on unless it is meant."""

from __future__ import annotations

import asyncio
import functools
import signal

import pytest

from forgather_control.errors import CommandFailed
from forgather_control.training.script import call, plain


def test_it_returns_and_raises_what_the_function_does():
    """With its arguments."""
    assert call("it", divmod, 7, 2) == (3, 1) and call("it", dict, a=1) == {"a": 1}
    with pytest.raises(ZeroDivisionError):
        call("it", divmod, 7, 0)


def test_what_is_inside_decorators():
    """The function that has the annotations and the code."""

    def f():
        pass

    class Holder:
        def __call__(self):
            pass

        def method(self):
            pass

    assert plain(f) is plain(functools.wraps(f)(lambda: None)) is plain(functools.partial(functools.partial(f))) is f
    assert plain(Holder().method) is Holder.method and plain(Holder()) is Holder.__call__


@pytest.mark.parametrize("code", [None, 0, 3, "no \x1b[2J", pytest.param(object(), id="object")], ids=repr)
def test_an_exit_is_a_failure(code):
    """sys.exit ends no training; the message has its code, harmlessly."""

    def f():
        raise SystemExit(code)

    with pytest.raises(CommandFailed) as caught:
        call("it", f)
    assert str(caught.value).startswith("it called sys.exit(") and str(caught.value).isascii()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("clothes", [lambda f: f, functools.partial, lambda f: type("H", (), {"__call__": f})()])
def test_an_exit_in_a_signal_handler_is_not_its_own(clothes):
    """A SIGTERM that comes while the function runs ends training, as the script's own handler says."""
    raised = clothes(lambda *args: (_ for _ in ()).throw(SystemExit(9)))
    before = signal.signal(signal.SIGUSR1, raised)
    try:
        with pytest.raises(SystemExit) as caught:
            call("it", signal.raise_signal, signal.SIGUSR1)
        assert caught.value.code == 9
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_cancelled_event_loop_is_a_failure():
    """asyncio's error is no Exception, and ends no training either."""

    def f():
        raise asyncio.CancelledError

    with pytest.raises(CommandFailed, match=r"it raised CancelledError; training continues"):
        call("it", f)


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, type("GreenletExit", (BaseException,), {})])
def test_ctrl_c_goes_through(error):
    """It is meant for the training, and so is what others raise into its thread."""

    def f():
        raise error

    with pytest.raises(error):
        call("it", f)
