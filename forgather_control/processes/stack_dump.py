"""The stacks of a process that may run no Python any more: its own end, and that of who asks from outside.

Floor 1: imports errors, clock and process. ``StackDumper`` lives in the job, with a thread of its own that
sleeps until it is asked; ``dump_of`` runs in any process of the same user on the same host.

A process writes its stacks into a memfd, a file in memory that others open as ``/proc/PID/fd/N``. Two
ways lead there:

1. Whoever asks writes a byte to a pipe. The *witness*, a thread that sleeps in ``read`` without the
   interpreter lock, wakes and writes the stacks. That harms nobody, but needs the lock.
2. Where a thread keeps the lock in C code, ``faulthandler`` writes them in a signal handler, which
   needs no lock. While Python runs that is deadly, since the handler reads frames that change
   under it: a busy process (3.10 to 3.13, tried) dies of a segmentation fault after ten to a
   thousand such signals. So the signal is sent only on proof that no Python runs: the witness was
   called, it is awake and tries for the lock (every 5 ms, which its context switches show), and
   for three seconds it did not get it; with 100 busy threads on two overloaded cores it gets it
   within 1.3. What is left is a thread that lets go of the lock in the very millisecond of the writing.

The signal goes to the witness, and to no other thread: a call in C may not bear to be interrupted
(sleep(3) ends early, poll(2) fails), the witness does. A process that no longer catches the signal would
die of it: so that is looked at right before, in /proc, and whoever asks holds a lock on the file
meanwhile, without which ``close`` does not let go.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from .. import states
from ..deadline import Deadline
from ..errors import FindError, JobDead, JobNotAnswering
from .liveness import Identity, judge
from .terminate import Grip

#: What the file is called, in /proc.
NAME: Final = "forgather-stacks"
#: The first signal that is tried: glibc keeps the first two, and others who want one begin at the next.
_FIRST_SIGNAL: Final = 42
#: The file begins with the ``_Facts``, padded to this many bytes; what is written comes behind them.
_HEADER: Final = 128
#: What the witness puts before its text: the length, in bytes.
_MARK: Final = b"=== stacks, %d bytes\n"
_MARKED: Final = re.compile(rb"=== stacks, (\d{1,8}) bytes\n")
#: Most bytes that are read of a file, and most characters that are made of them.
_MAX_DUMP: Final = 4 << 20
_MAX_TEXT: Final = 64 * 1024
#: Seconds of silence, and vain tries for the lock, after which the witness has proved its point.
_SILENCE: Final = 3.0
_TRIES: Final = 10
#: Seconds between two looks: /proc wakes nobody.
_LOOK: Final = 0.005
#: Seconds that a process whose threads and files are gone may still be there.
_DYING: Final = 0.5
#: Seconds that ``close`` waits for somebody who is just asking, and for the witness.
_POLITE: Final = 0.5


class _Facts(NamedTuple):
    """What stands at the beginning of the file: numbers, all of them."""

    signum: int
    pipe: int
    inode: int
    witness: int


# In the process itself...


class StackDumper:
    """Has this process's stacks written for whoever asks from outside.

    A fork does not matter: the child has neither the witness nor the name of being asked.

    Args:
        say: gives the Python stacks of all threads; runs on the witness, on demand only.
    """

    def __init__(self, say: Callable[[], str]) -> None:
        #: The number of the file, which is all that an outsider needs beside the process; ``None`` while there is none.
        self.fd: int | None = None
        self._say = say
        self._signum: int | None = None
        self._pipe: tuple[int, int] | None = None
        self._closing = False
        self._witness = threading.Thread(target=self._testify, name="forgather-stacks", daemon=True)

    def start(self) -> bool:
        """Begin, on any thread, once; whether this system can do it. It leaves nothing behind if not."""
        import faulthandler
        import fcntl

        signum = _free_signal()
        if signum is None or not hasattr(os, "memfd_create"):
            return False
        try:
            self._pipe = os.pipe()
            self.fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
            fcntl.fcntl(self.fd, fcntl.F_SETFL, os.O_APPEND)  # who asks cuts the file down to its header
            self._witness.start()
            faulthandler.register(signum, file=self.fd, all_threads=True, chain=False)
            self._signum = signum
            self._publish(_Facts(signum, self._pipe[1], os.fstat(self._pipe[1]).st_ino, self._witness.native_id or 0))
        except (OSError, RuntimeError):  # out of files, out of threads: training has use for the last of them
            self._let_go()
            return False
        return True

    def close(self) -> None:
        """End. If somebody is asking at this very moment, all stays until the process ends. May be called twice."""
        if self.fd is not None and _locked(self.fd, Deadline(_POLITE)):
            self._let_go()

    def _publish(self, facts: _Facts) -> None:
        assert self.fd is not None
        os.write(self.fd, json.dumps(facts).encode().ljust(_HEADER))

    def _let_go(self) -> None:
        import faulthandler
        import fcntl

        if self._witness.is_alive() and self._pipe is not None:
            self._closing = True
            os.write(self._pipe[1], b".")
            # It also takes what was sent to it and has not arrived, and would kill once nobody catches it.
            self._witness.join(_POLITE)
            if self._witness.is_alive():
                return
        if self._signum is not None:
            faulthandler.unregister(self._signum)
        if self.fd is not None:
            fcntl.flock(self.fd, fcntl.LOCK_UN)  # a child shares it, and would keep it
        for file in (self.fd, *(self._pipe or ())):
            if file is not None:
                os.close(file)
        self.fd = self._signum = self._pipe = None

    def _testify(self) -> None:
        assert self.fd is not None and self._pipe is not None
        while True:
            os.read(self._pipe[0], 4096)
            if self._closing:
                return
            try:
                text = self._say().encode("utf-8", "backslashreplace")
            except Exception as err:  # border: whoever asks hears of it, and nobody else has to
                text = f"no stacks: {err!r}\n".encode("utf-8", "backslashreplace")
            os.write(self.fd, _MARK % len(text) + text)


def _free_signal() -> int | None:
    """A real-time signal that nobody in this process catches, ignores, blocks or waits for."""
    import signal

    if not hasattr(signal, "SIGRTMAX"):
        return None
    try:
        masks = [_mask("/proc/self/status", name) for name in ("SigCgt", "SigIgn", "SigBlk")]
    except OSError:
        return None
    blocked_here = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for signum in range(max(_FIRST_SIGNAL, signal.SIGRTMIN), signal.SIGRTMAX + 1):
        if not any(mask >> signum - 1 & 1 for mask in masks) and signum not in blocked_here:
            return signum
    return None


# From outside...


def dump_of(identity: Identity, fd: int, deadline: Deadline) -> str:
    """The stacks of all threads of a process: by Python if it can, else by ``faulthandler``.

    Args:
        fd: the ``fd`` of its recorder.
        deadline: with less than 5 seconds no time is left for the second way.

    Raises:
        JobDead: it is gone.
        JobNotAnswering: it did neither in time, and in which state it is.
        FindError: it lives on another host or belongs to another user, or records nothing.
    """
    try:
        with Grip(identity) as grip, _opened(grip, fd) as file:
            if not _locked(file, deadline):
                raise JobNotAnswering(f"somebody else is asking pid {identity.pid} for its stacks")
            facts = _facts(file)
            os.ftruncate(file, _HEADER)
            _call_witness(identity.pid, facts)
            return _testimony(grip, file, facts, deadline) or _forced(grip, file, facts, deadline)
    except FindError:
        raise
    except (OSError, ValueError) as err:
        raise _explained(identity, err) from err


def _explained(identity: Identity, err: Exception) -> FindError:
    deadline = Deadline(_DYING if isinstance(err, (FileNotFoundError, ProcessLookupError)) else 0.0)
    while (verdict := judge(identity)) == states.PROCESS_RUNNING and not deadline.passed():
        time.sleep(_LOOK)
    if verdict == states.PROCESS_RUNNING:
        why = "it records none" if isinstance(err, FileNotFoundError) else err
        return FindError(f"the stacks of pid {identity.pid} cannot be read ({why})")
    if verdict == states.PROCESS_GONE:
        return JobDead(f"pid {identity.pid} is gone")
    return FindError(f"pid {identity.pid} runs on another host ({identity.host})")


@contextlib.contextmanager
def _opened(grip: Grip, fd: int) -> Iterator[int]:
    path = f"/proc/{grip.identity.pid}/fd/{fd:d}"
    _check_name(path)  # before, since opening may do something, and after, since it may be another by then
    file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_name(f"/proc/self/fd/{file}")
        if grip.has_ended():
            raise ProcessLookupError
        yield file
    finally:
        os.close(file)


def _check_name(path: str) -> None:
    if os.readlink(path) != f"/memfd:{NAME} (deleted)":
        raise ValueError("it records none")


def _facts(file: int) -> _Facts:
    value = json.loads(os.pread(file, _HEADER, 0))
    if not isinstance(value, list) or len(value) != len(_Facts._fields) or not all(type(fact) is int for fact in value):
        raise ValueError("its record is broken")
    facts = _Facts(*value)
    if facts.signum not in range(_FIRST_SIGNAL, 65):
        raise ValueError("its record is broken")
    return facts


def _call_witness(pid: int, facts: _Facts) -> None:
    path = f"/proc/{pid}/fd/{facts.pipe}"
    found = os.stat(path)
    if not stat.S_ISFIFO(found.st_mode) or found.st_ino != facts.inode:
        raise ValueError("its pipe is another's by now")
    pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.write(pipe, b"?")
    except BlockingIOError:  # it was called often enough
        pass
    finally:
        os.close(pipe)


def _testimony(grip: Grip, file: int, facts: _Facts, deadline: Deadline) -> str | None:
    """What the witness wrote; ``None`` once it has proved that it cannot.

    Raises:
        JobNotAnswering: neither.
    """
    witness = f"/proc/{grip.identity.pid}/task/{facts.witness}/status"
    begun, switches = time.monotonic(), int(_field(witness, "voluntary_ctxt_switches"))
    while (text := _written(file)) is None:
        tries = int(_field(witness, "voluntary_ctxt_switches")) - switches
        if tries >= _TRIES and time.monotonic() - begun >= _SILENCE:
            return None
        _pause(grip, deadline)
    return text


def _forced(grip: Grip, file: int, facts: _Facts, deadline: Deadline) -> str:
    """What ``faulthandler`` wrote."""
    witness = f"/proc/{grip.identity.pid}/task/{facts.witness}/status"
    if not _mask(witness, "SigCgt") >> facts.signum - 1 & 1:
        raise ValueError("it no longer catches the signal")
    _send_to_thread(grip, facts.witness, facts.signum)
    # Until its handler is done a thread blocks the signal: once something is written, that tells the end.
    while os.fstat(file).st_size <= _HEADER or _mask(witness, "SigBlk") >> facts.signum - 1 & 1:
        _pause(grip, deadline)
    data = os.pread(file, _MAX_DUMP, _HEADER)
    return _main_first(_without_testimony(data).decode("ascii", "backslashreplace"))


def _send_to_thread(grip: Grip, thread: int, signum: int) -> None:
    import signal

    try:
        pidfd = os.pidfd_open(thread, os.O_EXCL)  # PIDFD_THREAD, since Linux 6.9 (pidfd_open(2))
    except (AttributeError, OSError):
        pidfd = None
    try:
        if grip.has_ended():
            raise ProcessLookupError
        if pidfd is not None:
            signal.pidfd_send_signal(pidfd, signum)
        else:
            _tgkill(grip.identity.pid, thread, signum)
    finally:
        if pidfd is not None:
            os.close(pidfd)


def _tgkill(pid: int, thread: int, signum: int) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "tgkill"):  # glibc has it since 2.30
        raise OSError("this system cannot send a signal to one thread")
    if libc.tgkill(pid, thread, signum) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _pause(grip: Grip, deadline: Deadline) -> None:
    if grip.has_ended():
        raise ProcessLookupError
    if deadline.passed():
        pid = grip.identity.pid
        raise JobNotAnswering(f"pid {pid} does not write its stacks in time: {_in_words(_state(pid))}")
    time.sleep(_LOOK)


def _written(file: int) -> str | None:
    """The witness's text, once it is whole."""
    data = os.pread(file, _MAX_DUMP, _HEADER)
    found = _MARKED.search(data)
    if found is None or len(data) - found.end() < int(found[1]):
        return None
    return _bounded(data[found.end() : found.end() + int(found[1])].decode("utf-8", "replace"))


def _without_testimony(data: bytes) -> bytes:
    """What the handler wrote, where the lock was let go of in the end, and the witness wrote as well."""
    late = _MARKED.search(data)
    return data if late is None else data[: late.start()] + data[late.end() + int(late[1]) :]


def _main_first(text: str) -> str:
    """faulthandler begins with the youngest thread: what matters most would be cut off."""
    blocks = text.strip("\n").split("\n\n")
    return _bounded("\n\n".join(reversed(blocks)) + "\n")


def _bounded(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}\n... the rest is left out\n"


# /proc...


def _locked(file: int, deadline: Deadline) -> bool:
    import fcntl

    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if deadline.passed():
                return False
            time.sleep(_LOOK)


def _field(path: str, name: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return line.partition(":")[2].strip()
    raise ValueError(f"{path} has no {name}")


def _mask(path: str, name: str) -> int:
    return int(_field(path, name), 16)


def _state(pid: int) -> str:
    """The state of the main thread, one letter (proc(5))."""
    return _field(f"/proc/{pid}/status", "State")[:1]


def _in_words(state: str) -> str:
    words = {
        "D": "its main thread waits in the kernel, for a disk, a network file system or a device",
        "T": "it is stopped (SIGSTOP)",
        "t": "a debugger holds it",
        "R": "its main thread runs",
        "S": "its main thread sleeps",
    }
    return words.get(state, f"its state is {ascii(state)}")
