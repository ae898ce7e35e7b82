"""Map signals to commands, for example SIGTERM to ``save_and_stop``. Opt-in, and restored when training ends.

``install`` and the handlers run on the main thread, the only one in which Python runs signal handlers; ``restore`` may
run on any.

torchrun ends its workers with SIGTERM, and 30 s later with SIGKILL (torch/distributed/elastic/multiprocessing/api.py,
``_close``). SLURM sends SIGTERM to all steps at the time limit or on ``scancel``, and SIGKILL after KillWait, 30 s by
default; with ``sbatch --signal=USR1@60`` it sends SIGUSR1 a minute before the limit (sbatch(1)).

A Python handler runs between any two bytecodes of the main thread, whatever locks that holds. So the handlers here
take no lock: they do not log, and call only what is documented to be reentrant, such as ``queue.SimpleQueue.put``.
Then they call the handler that was installed before. The signal's default action does not run, because the user asked
for a command instead of termination; it does where control has failed, or only SIGKILL would end the process. A forked
child (a DataLoader's worker) gets the earlier handler back, or ``terminate`` could not end it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

from ..errors import InvalidParams, Unsupported
from ..wire import builtin

log = logging.getLogger("forgather_control")

#: Signals that no process can handle, and those that report its own faults: a Python handler would return to the
#: faulty instruction, endlessly (signal, "Execution of Python signal handlers").
_NEVER: Final = ("SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS")


class Signals:
    """Signal handlers that run commands; see ``parse`` for the argument."""

    def __init__(self, wanted: Mapping[str | signal.Signals, str]) -> None:
        self.commands = parse(wanted)
        self._handlers: list[_Handler] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, which has installed nothing."""
        return {**self.__dict__, "_handlers": []}

    def install(self, call: Callable[[str], object]) -> None:
        """Install the handlers: each signal calls ``call`` with the name of its command.

        Args:
            call: must be reentrant and take no lock, see the module. Its exceptions are dropped. Where it returns
                ``False``, no command can be run any more: the signal does what it does without these handlers.

        Raises:
            Unsupported: this is not the main thread; nothing is installed.
        """
        self.restore()
        if self.commands and threading.current_thread() is not threading.main_thread():
            name = ascii(threading.current_thread().name)[:80]
            raise Unsupported(f"Signals run no commands: training runs in thread {name}, not in the main thread")
        for number, command in self.commands.items():
            earlier = signal.getsignal(number)
            if earlier is None or (not callable(earlier) and _has_handler(number)):
                # It could be neither called nor restored: signal.signal knows only Python handlers.
                log.warning("%s does not run %s: a handler that is not Python's is installed", number.name, command)
                continue
            handler = _Handler(number, command, call, earlier)
            self._handlers.append(handler)
            _active.add(handler)
            try:
                signal.signal(number, handler)
            except (OSError, ValueError) as err:  # a subinterpreter has no signals either
                self.restore()
                raise Unsupported(f"Signals run no commands: {err}") from err

    def restore(self) -> None:
        """Restore the earlier handlers and stop calling ``call``.

        Where another handler was installed on top, it stays, and the one here only calls the handler below it. Off
        the main thread the handlers here stay, and restore the earlier ones when they are called next.
        """
        handlers, self._handlers = self._handlers, []
        for handler in handlers:
            if not handler.retire():
                name = handler.number.name
                log.warning("%s now has a handler that is not Python's; the earlier one was not restored", name)


@dataclass(eq=False)
class _Handler:
    """Handler of one signal, from one ``install`` to the end of the process."""

    number: signal.Signals
    command: str
    call: Callable[[str], object] | None  #: ``None`` once it is retired
    earlier: Any  #: the signal's handler before

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.call is not None and self._is_taken(self.call):
            # Python's own handler of SIGINT counts as the default action.
            if callable(self.earlier) and self.earlier is not signal.default_int_handler:
                self.earlier(number, frame)
            return
        # Handle the signal as if this handler had not been installed.
        was_current = signal.getsignal(number) is self
        self.retire()
        if callable(self.earlier):
            self.earlier(number, frame)
        elif was_current and self.earlier == signal.SIG_DFL:
            signal.raise_signal(number)

    def _is_taken(self, call: Callable[[str], object]) -> bool:
        try:
            return call(self.command) is not False
        except Exception:  # boundary: logging might wait for a lock that the interrupted training holds
            return True

    def retire(self) -> bool:
        """Stop running commands; restore the earlier handler if possible, else (a C handler came) return False."""
        self.call = None
        _active.discard(self)
        current: object = signal.getsignal(self.number)
        if current is self:
            with suppress(ValueError):  # not on the main thread: the next call restores it
                signal.signal(self.number, self.earlier)
        return current is not None


def parse(wanted: Any) -> dict[signal.Signals, str]:
    """Return the commands by signal; raise InvalidParams if a signal or a command cannot be used.

    Args:
        wanted: commands by signal, the signal by its name or as a member of ``signal.Signals``.
    """

    def demand(fits: bool, problem: str) -> None:
        if not fits:
            raise InvalidParams(problem, parameter="signals")

    demand(isinstance(wanted, Mapping), f"signals must map signals to commands, not {ascii(wanted)[:80]}")
    methods = (method for method in builtin.BUILTIN.values() if method.is_command)
    known = [method.name for method in methods if not any(param.required for param in method.params)]
    commands: dict[signal.Signals, str] = {}
    for given, command in wanted.items():
        number: Any = given if isinstance(given, signal.Signals) else signal.Signals.__members__.get(given)
        hint = "use a name such as SIGTERM or SIGUSR1"
        demand(number is not None, f"{ascii(given)[:80]} is not a signal of this system; {hint}")
        name = number.name
        demand(name not in _NEVER, f"{name} cannot run a command: no process survives it; use SIGTERM or SIGUSR1")
        demand(number not in commands, f"signals names {name} twice")
        hint = f"use one of {', '.join(known)}"
        demand(command in known, f"{ascii(command)[:80]} is not a command that a signal can run; {hint}")
        commands[number] = command
    return commands


def _has_handler(number: int) -> bool:
    """Return whether a handler unknown to Python is installed (by ``faulthandler.register``, by a C library)."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            caught = next(line for line in file if line.startswith("SigCgt:"))  # proc(5)
        return bool(int(caught.split()[1], 16) >> (number - 1) & 1)
    except (OSError, ValueError, IndexError, StopIteration):
        return False


# One fork handler for all, since a fork handler cannot be removed. The signals are blocked during a fork: Python drops
# those that arrive in the child before its own fork handlers have run, so that a SIGTERM to a new worker would be lost.
_active: set[_Handler] = set()
_forking = threading.local()  # the thread's signal mask before the fork


def _before_fork() -> None:
    ours = [handler.number for handler in list(_active)]  # a copy: the main thread may be about to change it
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ours) if ours else None


def _in_parent() -> None:
    if _forking.mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_child() -> None:
    for handler in list(_active):
        handler.retire()
    _in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
