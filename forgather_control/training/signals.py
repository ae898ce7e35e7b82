"""Signals that give commands: SIGTERM is ``save_and_stop``, say. Installed and taken away again, for who asks for it.

Floor 2, training side: imports errors and commands. ``install`` and the handlers run on the main
thread, where alone Python has signals; ``restore`` on any.

Who sends them: torchrun ends its workers with SIGTERM, and 30 s later with SIGKILL
(``torch/distributed/elastic/multiprocessing/api.py``, ``_close``). SLURM sends SIGTERM to all steps
at the time limit or on ``scancel``, and SIGKILL after KillWait, 30 s by default; with
``sbatch --signal=USR1@60`` it sends SIGUSR1 a minute before the limit (sbatch(1)).

A Python handler runs between any two bytecodes of the main thread, whatever locks that holds. So
ours takes none: it does not log, and calls only what its user promises to be reentrant, such as
``queue.SimpleQueue.put``. Then it calls the handler that was there before. The default action is
not run: not to be ended is what one opts into. To a child that is forked (a DataLoader's worker)
none of this applies: it gets the earlier handler back, or ``terminate`` could not end it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Final

from ..errors import InvalidParams, Unsupported
from ..wire import builtin

log = logging.getLogger("forgather_control")

#: Signals that no process can handle, and those that report its own faults: a handler of Python's would
#: return to the faulty instruction, for ever (signal, "Execution of Python signal handlers").
_NEVER: Final = ("SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS")


class Signals:
    """Which signal gives which command.

    Args:
        wanted: commands by signal, the signal by its name or as a member of ``signal.Signals``.

    Raises:
        InvalidParams: when it is made: no such signal or command, or none that can be used so.
    """

    def __init__(self, wanted: Mapping[str | signal.Signals, str]) -> None:
        self.commands = parse(wanted)
        self._handlers: list[_Handler] = []

    def __getstate__(self) -> dict[str, Any]:
        """A copy, pickled or deep, has installed nothing."""
        return {**self.__dict__, "_handlers": []}

    def install(self, call: Callable[[str], object]) -> None:
        """From here on each signal calls ``call`` with its command's name.

        Args:
            call: must be reentrant and take no lock; see the module. What it raises is dropped.

        Raises:
            Unsupported: this is not the main thread; nothing is installed.
        """
        self.restore()
        if threading.current_thread() is not threading.main_thread():
            name = ascii(threading.current_thread().name)[:80]
            raise Unsupported(f"signals give no commands: training runs in thread {name}, only the main one has any")
        try:
            for number, command in self.commands.items():
                self._install(number, command, call)
        except (OSError, ValueError) as err:  # an interpreter within the interpreter has no signals either
            self.restore()
            raise Unsupported(f"signals give no commands: {err}") from err

    def _install(self, number: signal.Signals, command: str, call: Callable[[str], object]) -> None:
        earlier = signal.getsignal(number)
        if earlier is None or (not callable(earlier) and _has_handler(number)):
            # It could be neither called nor put back: signal.signal knows Python's own handlers only.
            log.warning("%s does not give %s: a handler that is not Python's has it", number.name, command)
            return
        handler = _Handler(number, command, call, earlier)
        self._handlers.append(handler)
        _active.add(handler)
        signal.signal(number, handler)

    def restore(self) -> None:
        """Put the earlier handlers back where ours are still the current ones; call ``call`` no more.

        Who installed a handler over ours keeps it, and ours then only calls the one below it. Off
        the main thread ours stay, and put the earlier ones back when they are called next.
        """
        handlers, self._handlers = self._handlers, []
        for handler in handlers:
            if not handler.retire():
                name = handler.number.name
                log.warning("%s has a handler now that is not Python's; it is left, not the one before ours", name)


class _Handler:
    """What Python calls for one signal, from one ``install`` to the end of the process.

    Args:
        earlier: what the signal had before.
    """

    def __init__(self, number: signal.Signals, command: str, call: Callable[[str], object], earlier: Any) -> None:
        self.number = number
        self._command, self._earlier = command, earlier
        self._call: Callable[[str], object] | None = call

    def __call__(self, number: int, frame: FrameType | None) -> None:
        call = self._call
        if call is None:
            self._pass_on(number, frame)
            return
        try:
            call(self._command)
        except Exception:  # border: training was interrupted here, and to log might wait for a lock it holds
            pass
        # What Python itself does on SIGINT is the default action, too.
        if callable(self._earlier) and self._earlier is not signal.default_int_handler:
            self._earlier(number, frame)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """As if we were not there."""
        was_current = signal.getsignal(number) is self
        self.retire()
        if callable(self._earlier):
            self._earlier(number, frame)
        elif was_current and self._earlier == signal.SIG_DFL:
            signal.raise_signal(number)

    def retire(self) -> bool:
        """Give no more commands, and step aside if that is possible; False where a handler not Python's has come."""
        self._call = None
        _active.discard(self)
        current: object = signal.getsignal(self.number)
        if current is self:
            try:
                signal.signal(self.number, self._earlier)
            except ValueError:
                pass  # not on the main thread: at its next call
        return current is not None


def parse(wanted: Mapping[str | signal.Signals, str]) -> dict[signal.Signals, str]:
    """Return the commands by signal.

    Raises:
        InvalidParams: a signal or a command does not exist or cannot be used here.
    """
    if not isinstance(wanted, Mapping):
        raise _invalid(f"signals must map signals to commands, not {ascii(wanted)[:80]}")
    commands: dict[signal.Signals, str] = {}
    for name, command in wanted.items():
        number = _signal(name)
        if number in commands:
            raise _invalid(f"signals names {number.name} twice")
        commands[number] = _command(command)
    return commands


def _signal(name: object) -> signal.Signals:
    found = name if isinstance(name, signal.Signals) else None
    if isinstance(name, str):
        found = signal.Signals.__members__.get(name)
    if found is None:
        raise _invalid(f"{ascii(name)[:80]} is no signal of this system; signals takes names such as SIGTERM, SIGUSR1")
    if found.name in _NEVER:
        raise _invalid(f"{found.name} cannot give a command: no process handles it and goes on; use SIGTERM, SIGUSR1")
    return found


def _command(name: object) -> str:
    known = [method.name for method in builtin.BUILTIN if method.is_command]
    if not isinstance(name, str) or name not in known:
        raise _invalid(f"{ascii(name)[:80]} is no command that a signal can give; expected one of {', '.join(known)}")
    return name


def _invalid(text: str) -> InvalidParams:
    return InvalidParams(text, parameter="signals")


def _has_handler(number: int) -> bool:
    """Whether the kernel has a handler, though Python knows of none (``faulthandler.register``, a library's)."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))  # proc(5)
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
    except (OSError, ValueError, IndexError, StopIteration):
        return False


# As in ``server``: one handler for all, since a fork handler cannot be taken back. While a child is
# made our signals are blocked: Python drops those that come before its own fork handlers are done,
# so that a SIGTERM to a new worker would be lost, and who waits for its end would wait for ever.
_active: set[_Handler] = set()


class _Masks(threading.local):
    old: set[int | signal.Signals] | None = None


_masks = _Masks()


def _before_fork() -> None:
    ours = [handler.number for handler in list(_active)]  # a copy: the main thread may be about to change it
    _masks.old = signal.pthread_sigmask(signal.SIG_BLOCK, ours) if ours else None


def _in_parent() -> None:
    if _masks.old is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.old)


def _in_child() -> None:
    for handler in list(_active):
        handler.retire()
    _in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
