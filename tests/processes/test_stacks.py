"""The stacks of this process's threads: complete, ordered, bounded; no frame is kept and no file read."""

from __future__ import annotations

import gc
import linecache
import sys
import threading
import weakref
from contextlib import contextmanager

import pytest

from forgather_control.processes import stacks
from forgather_control.processes.stacks import MAX_TEXT, python_stacks

from ..support.harness import SOON, Process


@contextmanager
def thread(name, target=None):
    """Run a thread that waits in ``target``, until exit."""
    ready, stop = threading.Event(), threading.Event()

    def wait_here():
        ready.set()
        stop.wait()

    one = threading.Thread(target=target or wait_here, args=(wait_here,) if target else (), name=name)
    one.start()
    try:
        assert ready.wait(SOON)
        yield one
    finally:
        stop.set()
        one.join(SOON)


def blocks():
    """The text as a list of (first line, other lines)."""
    return [(block.splitlines()[0], block.splitlines()[1:]) for block in python_stacks().split("\n\n")]


def test_every_thread_has_its_name_and_its_calls_in_order():
    """The main thread first, then by age; the most recent call last, with file, line and function."""
    with thread("old one"), thread("wörker\x1b"):
        found = [block for block in blocks() if "(not started by Python)" not in block[0]]
        heads = [head for head, _ in found]
        assert "MainThread (most recent call last):" in heads[0]
        assert "old one" in heads[-2] and "wörker\x1b" in heads[-1]
        assert [line for line in found[-1][1] if "wait_here" in line and __file__[-30:] in line]
        order = [line.rpartition(" in ")[2].rpartition(".")[2] for line in found[-1][1] if line.startswith("  File")]
        assert order.index("run") < order.index("wait_here") < order.index("wait")


def test_a_chosen_thread_comes_first():
    """Where training runs in another thread than the main one, that thread matters most."""
    with thread("trains") as one:
        text = python_stacks(one.ident)
        assert "trains" in text.splitlines()[0]
        assert text.index("trains") < text.index("MainThread") and text.count(" trains ") == 1
        assert "MainThread" in python_stacks(-1).splitlines()[0], "an unknown one changes nothing"


def test_a_helper_sees_the_main_thread_while_it_hangs():
    """Called on another thread while the main thread waits without the interpreter lock."""
    source = """
    import sys, threading
    from forgather_control.processes.stacks import python_stacks

    def hang_in_a_collective():
        sys.stdin.read()

    def ask():
        text = ""
        while "hang_in_a_collective" not in text:
            text = python_stacks()
        print(text.splitlines()[0], flush=True)

    threading.Thread(target=ask).start()
    hang_in_a_collective()
    """
    with Process(source) as other:
        assert "MainThread" in other.line()


def test_no_frame_is_kept():
    """Objects in the frames of other threads are freed as soon as these drop them, without garbage collection."""

    class Tensor:
        pass

    held = []

    def hold(wait):
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        wait()

    gc.disable()
    try:
        with thread("holds", hold):
            python_stacks()
            assert held[0]() is not None
        assert held[0]() is None
    finally:
        gc.enable()


def test_no_file_is_touched():
    """The file system may be what hangs: no file is opened, listed or tested."""
    source = """
    import os, sys, threading
    from forgather_control.processes.stacks import python_stacks
    threading.Thread(target=os.read, args=(0, 1), daemon=True).start()
    seen = []
    sys.addaudithook(lambda event, args: seen.append(event))
    real = os.stat
    os.stat = lambda *args, **kwargs: seen.append("os.stat") or real(*args, **kwargs)
    python_stacks()
    print({event for event in seen if event == "open" or event.startswith("os.")}, "sys._current_frames" in seen)
    """
    with Process(source) as other:
        assert other.line() == "set() True", other.errors


def test_source_is_shown_where_it_is_known():
    """A line that an earlier traceback has read is shown; a stale or odd cache does no harm."""
    with thread("waits"):
        linecache.cache.pop(__file__, None)
        assert "stop.wait()" not in python_stacks()
        linecache.getlines(__file__)
        assert "    stop.wait()\n" in python_stacks()
        for odd in ((0, 0, [], __file__), (lambda: "lazy",)):
            linecache.cache[__file__] = odd
            assert "stop.wait()" not in python_stacks()
        linecache.cache.pop(__file__)


def test_a_deep_stack_is_cut_in_its_middle():
    """The outermost and the innermost calls stay, with the number of those left out."""

    def deep(wait, left=500):
        return wait() if left == 0 else deep(wait, left - 1)

    with thread("deep", deep):
        found = next(lines for head, lines in blocks() if " deep " in head)
        files = [line for line in found if line.startswith("  File")]
        assert len(files) == 100 and "wait" in files[-1] and "_bootstrap" in files[0]
        gap = next(line for line in found if "left out" in line)
        assert int(gap.split()[1]) > 400


def test_the_text_is_bounded():
    """Threads that do not fit are counted; the main thread is never among them."""
    names = [f"{number:03d}-" + "x" * 300 for number in range(250)]
    stop = threading.Event()
    many = [threading.Thread(target=stop.wait, name=name) for name in names]
    for one in many:
        one.start()
    try:
        text = python_stacks()
    finally:
        stop.set()
        for one in many:
            one.join(SOON)
    shown = [name for name in names if name[:160] in text]
    assert len(text) <= MAX_TEXT and 50 < len(shown) < 250 and names[0] not in text
    assert "MainThread" in text.splitlines()[0]
    assert int(text.splitlines()[-1].split()[1]) == len(sys._current_frames()) + 250 - text.count("Thread 0x")


@pytest.mark.parametrize("name", ["\ud800half", "caf\udce9.py", "x" * 10_000])
def test_names_that_cannot_be_encoded(name):
    """A path of odd bytes or of any length becomes text that can be encoded, with its end visible."""
    space = {"wait": None}
    exec(compile("def odd(wait):\n    wait()\n", name + "/end.py", "exec"), space)
    with thread("odd", space["odd"]):
        text = python_stacks()
    assert "end.py" in text and max(map(len, text.splitlines())) < 500
    text.encode("utf-8")


def test_threads_that_python_did_not_start_come_last():
    """A thread without a name is shown as well: it may be the one that blocks the others."""
    source = """
    import _thread, sys, threading
    from forgather_control.processes.stacks import python_stacks
    started = threading.Event()
    def raw():
        started.set()
        sys.stdin.read()
    _thread.start_new_thread(raw, ())
    started.wait()
    print(python_stacks().split("\\n\\n")[-1].splitlines()[0], flush=True)
    """
    with Process(source) as other:
        assert "not started by Python" in other.line()


def test_the_calling_thread_is_included():
    """No thread is left out, not even the calling one."""
    assert stacks.python_stacks.__name__ in python_stacks() and sys._getframe().f_code.co_name in python_stacks()


def _as_trainer(source):
    """Functions in a module that counts as a trainer's."""
    space = {"__name__": "transformers.trainer", "call": stacks.training_call}
    exec(source, space)
    return space


def test_a_trainers_call_is_executed_until_it_returns():
    """The innermost call counts; afterwards it is on no stack, though its frame is kept, as tracebacks do."""
    space = _as_trainer("def train(inner=None):\n    return inner() if inner else (call(), executed(call()), error())")
    space["executed"] = stacks.is_executed
    space["error"] = lambda: sys._getframe(1)
    call, executed, frame = space["train"](space["train"])
    assert executed and not stacks.is_executed(call) and call.frame == id(frame)
    assert stacks.training_call() is None, "no trainer calls this test"


def test_what_may_leave_the_stack_is_no_such_call():
    """A generator that calls the hook is suspended and goes on; so nothing is concluded from its absence."""
    space = _as_trainer("def loop():\n    yield call()\ndef train():\n    return next(loop())")
    assert space["train"]() is None


def test_greenlets_have_stacks_that_cannot_be_seen(monkeypatch):
    """With gevent a call may be executed though no thread's stack has it."""
    gone = stacks.Call(1, _as_trainer.__code__)
    assert not stacks.is_executed(gone)
    monkeypatch.setitem(sys.modules, "greenlet", object())
    assert stacks.is_executed(gone)
