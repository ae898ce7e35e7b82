"""Stacks of a process whose interpreter lock may be held: ``StackDumper`` in that process, ``dump_stacks`` in a client.

They are written into a memfd, a file in memory that other processes of the user open as ``/proc/PID/fd/N``, in one of
two ways:

1. The *Python dump*: the client writes a byte to a pipe. The *dump thread*, which blocks in ``read`` without the
   interpreter lock, wakes and writes the stacks. That is harmless, but needs the lock.
2. The *faulthandler dump*, where C code holds the lock: ``faulthandler`` writes the stacks in a signal handler. While
   Python code runs that is dangerous, since the handler reads frames that change under it: a busy process (3.10 to
   3.13, measured) dies of a segmentation fault after ten to a thousand such signals. So the signal is sent only on
   proof that no Python code runs: the dump thread was woken, it keeps trying to take the lock (every 5 ms, which its
   context switches show), and did not get it for three seconds; with 100 busy threads on two overloaded cores it
   gets it within 1.3. What remains is a thread that releases the lock in the very millisecond of the dump.

The signal goes to the dump thread alone, because C calls in other threads may not bear an interruption (sleep(3) ends
early, poll(2) fails). A process that no longer catches the signal would die of it, so the client checks that in /proc
right before. It holds a lock on the file meanwhile, without which ``close`` does not give the signal up.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from .. import states
from ..deadline import Deadline, lock_file
from ..descriptors import Kept
from ..errors import FindError, JobDead, JobNotAnswering
from . import proc
from .liveness import Identity, judge

NAME: Final = "forgather-stacks"  #: The name of the file, as /proc shows it.
#: The file begins with the ``_Header`` as JSON, padded to this many bytes; the dumps follow.
_HEADER_SIZE: Final = 128
_MARK: Final = b"=== stacks, %d bytes\n"  #: The dump thread writes this before its text.
_MAX_DUMP: Final = 4 << 20  #: Most bytes that are read from a file.
_MAX_TEXT: Final = 64 * 1024  #: Most characters of a dump.
#: Seconds, and failed attempts of the dump thread to take the lock, after which the lock counts as held.
_LOCK_HELD: Final = 3.0
_ATTEMPTS: Final = 10
_POLL_INTERVAL: Final = 0.005  #: Seconds between two checks of a file in /proc, which cannot be waited on.
_CLOSE_TIMEOUT: Final = 0.5  #: Seconds that ``close`` waits for a client that reads a dump, and for the dump thread.


class _Header(NamedTuple):
    """What a client needs to request a dump: numbers in the dumped process."""

    signum: int
    pipe: int
    pipe_inode: int
    thread: int


def is_possible() -> bool:
    """Return whether a :class:`StackDumper` can start on this system."""
    try:
        os.close(os.memfd_create(NAME))
    except (AttributeError, OSError):  # a sandbox may refuse it
        return False
    return proc.free_signal() is not None


class StackDumper:
    """Writes this process's stacks when a client requests them. After a fork the child does not take part.

    Args:
        python_stacks: returns the Python stacks of all threads; called on the dump thread.
    """

    def __init__(self, python_stacks: Callable[[], str]) -> None:
        #: The file's descriptor, all that a client needs besides the process; ``None`` while there is none.
        self.fd: int | None = None
        self._python_stacks = python_stacks
        self._signum: int | None = None
        self._files: list[Kept] = []  # the pipe's two ends, then the file
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="forgather-stacks", daemon=True)

    def start(self) -> bool:
        """Start, once, on any thread; return False, and leave nothing behind, where this system cannot do it."""
        import fcntl

        signum = proc.free_signal()
        if signum is None:
            return False
        try:
            self._files = list(map(Kept.of, os.pipe()))
            self.fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
            self._files.append(Kept.of(self.fd))
            fcntl.fcntl(self.fd, fcntl.F_SETFL, os.O_APPEND)  # clients truncate the file to its header
            self._thread.start()
            faulthandler.register(signum, file=self.fd, all_threads=True, chain=False)
            self._signum = signum
            pipe = self._files[1]
            header = _Header(signum, pipe.number, pipe.inode, self._thread.native_id or 0)
            os.write(self.fd, json.dumps(header).encode().ljust(_HEADER_SIZE))
        except (AttributeError, OSError, RuntimeError):  # no memfds; no descriptors or threads are left for training
            self._release()
            return False
        return True

    def close(self) -> None:
        """Stop; may be called twice. While a client is reading a dump, all stays until the process ends."""
        if self.fd is not None and (not self._files[-1].is_open() or lock_file(self.fd, Deadline(_CLOSE_TIMEOUT))):
            self._release()

    def _release(self) -> None:
        import fcntl

        if self._thread.is_alive():
            self._closing = True
            if self._files[1].is_open():
                os.write(self._files[1].number, b".")
            # A signal that was sent to the thread and is still pending ends with it: uncaught, it would kill.
            self._thread.join(_CLOSE_TIMEOUT)
            if self._thread.is_alive():
                return
        if self._signum is not None:
            faulthandler.unregister(self._signum)
        if self.fd is not None and self._files[-1].is_open():
            fcntl.flock(self.fd, fcntl.LOCK_UN)  # a forked child shares the lock, and would keep it
        for file in self._files:
            file.close()
        self.fd, self._signum, self._files = None, None, []

    def _serve(self) -> None:
        pipe, _, file = self._files
        # Other code may have closed them since the last read: the numbers are not used again then.
        while os.read(pipe.number, 4096) and not self._closing and pipe.is_open() and file.is_open():
            try:
                text = self._python_stacks()
            except Exception as err:  # boundary: the error is the client's answer
                text = f"no stacks: {err!r}\n"
            data = text.encode("utf-8", "backslashreplace")
            os.write(file.number, _MARK % len(data) + data)


def dump_stacks(identity: Identity, fd: int, deadline: Deadline) -> str:
    """Return the stacks of all threads of a process: a Python dump if possible, else a faulthandler dump.

    Args:
        fd: the ``fd`` of its :class:`StackDumper`.
        deadline: with less than 5 seconds left there is no time for a faulthandler dump.

    Raises:
        JobDead: the process is gone.
        JobNotAnswering: it wrote no dump in time; the message says in which state it is.
        FindError: it is on another host, belongs to another user, or has no stack dumper.
    """
    try:
        if proc.psutil() is None:
            raise ValueError("the files of its process cannot be seen from here")
        _check_running(identity)
        with _open(identity, fd) as file:
            if not lock_file(file, deadline):
                raise TimeoutError(f"another client is reading the stacks of pid {identity.pid}; try again")
            header = _read_header(file)
            os.ftruncate(file, _HEADER_SIZE)
            _wake_dump_thread(identity.pid, header)
            status = f"/proc/{identity.pid}/task/{header.thread}/status"
            text = _python_dump(identity, file, status, deadline)
            return text or _faulthandler_dump(identity, file, status, header, deadline)
    except (OSError, ValueError) as err:
        raise _find_error(identity, err) from err


def _find_error(identity: Identity, err: Exception) -> FindError:
    # A process whose threads and files are gone may still be listed for a moment.
    deadline = Deadline(0.5 if isinstance(err, (FileNotFoundError, ProcessLookupError)) else 0.0)
    while (state := judge(identity)) == states.PROCESS_RUNNING and not deadline.passed():
        time.sleep(_POLL_INTERVAL)
    if state == states.PROCESS_GONE:
        return JobDead(f"pid {identity.pid} is gone")
    if state == states.PROCESS_ELSEWHERE:
        return FindError(f"pid {identity.pid} is on another host ({identity.host}); run this command there")
    if isinstance(err, TimeoutError):
        return JobNotAnswering(str(err))
    why = "it has no stack dumper" if isinstance(err, FileNotFoundError) else err
    return FindError(f"the stacks of pid {identity.pid} cannot be read: {why}")


def _check_running(identity: Identity) -> None:
    if judge(identity) != states.PROCESS_RUNNING:
        raise ProcessLookupError


@contextlib.contextmanager
def _open(identity: Identity, fd: int) -> Iterator[int]:
    path = f"/proc/{identity.pid}/fd/{fd:d}"
    _check_name(path)  # before, since opening some files has effects, and after, since it may be another file by then
    file = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_name(f"/proc/self/fd/{file}")
        _check_running(identity)
        yield file
    finally:
        os.close(file)


def _check_name(path: str) -> None:
    if os.readlink(path) != f"/memfd:{NAME} (deleted)":
        raise ValueError("it has no stack dumper")


def _read_header(file: int) -> _Header:
    value = json.loads(os.pread(file, _HEADER_SIZE, 0))
    numbers = isinstance(value, list) and [type(item) for item in value] == [int] * len(_Header._fields)
    if not numbers or not proc.FIRST_SIGNAL <= value[0] < 65:
        raise ValueError("the header of its file is damaged")
    return _Header(*value)


def _wake_dump_thread(pid: int, header: _Header) -> None:
    path = f"/proc/{pid}/fd/{header.pipe}"
    found = os.stat(path)
    if not stat.S_ISFIFO(found.st_mode) or found.st_ino != header.pipe_inode:
        raise ValueError("its pipe is now another file")
    pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(pipe, "wb", buffering=0) as requests:
        requests.write(b"?")  # does nothing where the pipe is full: it holds enough requests


def _python_dump(identity: Identity, file: int, status: str, deadline: Deadline) -> str | None:
    """Wait for the dump thread's text; return ``None`` on proof that the interpreter lock is held."""
    start, switches = time.monotonic(), int(proc.field(status, "voluntary_ctxt_switches"))
    while (text := _split(os.pread(file, _MAX_DUMP, _HEADER_SIZE))[0]) is None:
        attempts = int(proc.field(status, "voluntary_ctxt_switches")) - switches
        if attempts >= _ATTEMPTS and time.monotonic() - start >= _LOCK_HELD:
            return None
        _pause(identity, deadline)
    return _bounded(text.decode("utf-8", "replace"))


def _faulthandler_dump(identity: Identity, file: int, status: str, header: _Header, deadline: Deadline) -> str:
    if not proc.is_in(status, "SigCgt", header.signum):
        raise ValueError("it no longer catches the signal for this")
    _check_running(identity)
    proc.send_to_thread(identity.pid, header.thread, header.signum)
    # A thread blocks the signal until its handler returns: once something is written, that shows the end.
    while os.fstat(file).st_size <= _HEADER_SIZE or proc.is_in(status, "SigBlk", header.signum):
        _pause(identity, deadline)
    _, data = _split(os.pread(file, _MAX_DUMP, _HEADER_SIZE))  # the dump thread writes as well if the lock was released
    return _main_thread_first(data.decode("ascii", "backslashreplace"))


def _pause(identity: Identity, deadline: Deadline) -> None:
    _check_running(identity)
    if deadline.passed():
        raise TimeoutError(f"pid {identity.pid} wrote no stacks in time: {proc.state(identity.pid)}")
    time.sleep(_POLL_INTERVAL)


def _split(data: bytes) -> tuple[bytes | None, bytes]:
    """Return the dump thread's text, once it is complete, and what the signal handler wrote before or after it."""
    found = re.search(_MARK.replace(b"%d", rb"(\d{1,8})"), data)
    if found is None:
        return None, data
    end = found.end() + int(found[1])
    return data[found.end() : end] if end <= len(data) else None, data[: found.start()] + data[end:]


def _main_thread_first(text: str) -> str:
    """Reverse a dump: faulthandler writes the main thread last, which matters most and must not be cut off."""
    return _bounded("\n\n".join(reversed(text.strip("\n").split("\n\n"))) + "\n")


def _bounded(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}\n... the rest is left out\n"
