"""The Python stacks of all threads of this process, as text. Any thread.

Where a thread hangs with the interpreter lock no Python code runs at all: see ``stack_dump``. Nothing here touches a
file system, not even for source lines: training may be hanging on the very disk that holds them, and this thread would
hang as well. A source line is shown where an earlier traceback has read it (``linecache``). No lock is held for long,
and no frame is kept: its locals would keep device memory.
"""

from __future__ import annotations

import linecache
import re
import sys
import threading
import traceback
from types import CodeType, FrameType
from typing import Final, NamedTuple

#: Longest text in characters, and most frames of one thread: outermost and innermost.
MAX_TEXT: Final = 64 * 1024
_OUTER, _INNER = 20, 80
#: Longest file name, function name or source line in characters; of a path the end is kept.
_MAX_WORD: Final = 160

_Frame = tuple[str, int | None, str]

#: The calls in which a trainer trains: module and function. When such a call has returned or raised, training is over.
TRAINING_CALLS: Final = {
    "transformers.trainer": "train",
    "lightning.pytorch.trainer.trainer": "fit",
    "pytorch_lightning.trainer.trainer": "fit",
}
#: Generators and coroutines (inspect.CO_GENERATOR ...), which leave the stack and come back.
_COME_BACK: Final = 0x20 | 0x80 | 0x200


class Call(NamedTuple):
    """A call that is executed: the number of its frame, as the frame itself would keep its locals, and its code."""

    frame: int
    code: CodeType


def training_call() -> Call | None:
    """Return the innermost call of a trainer on this thread; ``None`` if there is none, or it may leave the stack."""
    for frame, _ in traceback.walk_stack(sys._getframe()):
        if frame.f_code.co_flags & _COME_BACK:
            return None
        if TRAINING_CALLS.get(frame.f_globals.get("__name__", "")) == frame.f_code.co_name:
            return Call(id(frame), frame.f_code)
    return None


def is_executed(call: Call) -> bool:
    """Return whether a call is on the stack of any thread; True where greenlets have stacks that cannot be seen."""
    if "greenlet" in sys.modules:
        return True
    frames = sys._current_frames()
    try:
        walks = [traceback.walk_stack(frame) for frame in frames.values()]
        return any((id(frame), frame.f_code) == call for walk in walks for frame, _ in walk)
    finally:
        frames.clear()  # as in ``_snapshot``


def python_stacks(first: int | None = None) -> str:
    """Return each thread's stack, most recent call last, in at most ``MAX_TEXT`` characters.

    Args:
        first: the identifier of the thread to begin with, the training thread; then come the main thread and the
            others from the oldest to the youngest.
    """
    main = threading.main_thread().ident
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks = _snapshot()
    order = [*names, *stacks]  # threads that Python did not start have no name, and come last
    idents = dict.fromkeys(ident for ident in (first, main, *order) if ident in stacks)
    text = _fit([_block(ident, names.get(ident), stacks[ident]) for ident in idents if ident is not None])
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # a path may hold bytes that are not UTF-8


def without_internal(text: str) -> str:
    """Return stacks without the threads of this package, whose names begin with "forgather-"."""
    return re.sub(r"(?m)^Thread \S+ forgather-.*\n(?:  .*\n)*\n?", "", text)


def _snapshot() -> dict[int, list[_Frame]]:
    frames = sys._current_frames()
    try:
        return {ident: _walk(frame) for ident, frame in frames.items()}
    finally:
        frames.clear()  # this very frame is among them: a cycle, which would keep the locals of all others


def _walk(innermost: FrameType) -> list[_Frame]:
    """Return the frames as plain values, outermost first."""
    walk = ((frame.f_code, frame.f_lineno) for frame, _ in traceback.walk_stack(innermost))
    return [(code.co_filename, line, getattr(code, "co_qualname", code.co_name)) for code, line in walk][::-1]


def _block(ident: int, name: str | None, frames: list[_Frame]) -> str:
    head = f"Thread {ident:#x} {_cut(name) if name else '(not started by Python)'} (most recent call last):\n"
    if len(frames) <= _OUTER + _INNER:
        return head + "".join(map(_line, frames))
    gap = f"  ... {len(frames) - _OUTER - _INNER} frames left out\n"
    return head + "".join(map(_line, frames[:_OUTER])) + gap + "".join(map(_line, frames[-_INNER:]))


def _line(frame: _Frame) -> str:
    file, number, function = frame
    text = f'  File "{_cut(file, end=True)}", line {number}, in {_cut(function)}\n'
    lines = (linecache.cache.get(file) or (0, 0, ()))[2:3]
    if not lines or number is None or not 0 < number <= len(lines[0]):
        return text
    source = lines[0][number - 1].strip()
    return f"{text}    {_cut(source)}\n" if source else text


def _cut(text: str, end: bool = False) -> str:
    if len(text) <= _MAX_WORD:
        return text
    return f"...{text[-_MAX_WORD:]}" if end else f"{text[:_MAX_WORD]}..."


def _fit(blocks: list[str]) -> str:
    """Join the blocks that fit (the first always does), and say how many do not."""
    room = MAX_TEXT - 40
    for count, block in enumerate(blocks):
        room -= len(block) + 1
        if room < 0:
            return "\n".join(blocks[:count]) + f"\n... {len(blocks) - count} more threads left out\n"
    return "\n".join(blocks)
