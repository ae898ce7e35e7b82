"""Control by file, the job's half: take requests out of ``requests/``, dispatch them, and write ``status.json``.

Runs on one thread that may wait for the file system; only ``dispatch`` and ``FileReply.send`` are the server thread's.

The path of a request file: seen ─▶ renamed to a hidden name ─▶ read, removed ─▶ dispatched like a line ─▶ its reply
written. If the rename fails, because the client took the request back, it is not carried out; after a crash behind the
rename it is lost. So no request is carried out twice.

The work of a tick is bounded in number and time, and none of it raises: a full disk or a deleted directory is one
warning, until it is over.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Container
from contextlib import AbstractContextManager, suppress
from itertools import islice
from typing import Any, Final

from ..deadline import Deadline
from ..errors import ControlError, InvalidRequest, ParseError, TooManyCommands
from ..jobs import private_files, spool
from ..jobs.record import is_job_id
from ..jobs.spool import REPLIES, REQUESTS, STATUS, SUFFIX
from ..wire import jsonrpc
from ..wire.limits import MAX_LINE
from . import limits
from .dispatcher import Peer, ReplySink

log = logging.getLogger("forgather_control")

#: No listing of requests/ counts: list it at the next tick.
_LIST_AGAIN: Final[tuple[Any, Any]] = (None, None)


class FileRequestServer:
    """The request files, reply files and ``status.json`` of one job.

    Args:
        path: of the job's directory, which exists.
        dispatch: answers a line; see ``Dispatcher.dispatch``.
        status: returns the content of ``status.json``.
        version: returns a value that differs when ``status`` has changed; cheap, compared by ``==``.
        methods: the names of the methods; an empty file with such a name is a request.
        schedule: runs a call on the thread of the files.
    """

    def __init__(
        self,
        path: str,
        dispatch: Callable[[ReplySink, bytes], None],
        status: Callable[[], Any],
        version: Callable[[], object],
        methods: Container[str],
        schedule: Callable[[Callable[[], None]], object] = lambda call: call(),
    ) -> None:
        self._path, self._dispatch, self._methods, self._schedule = path, dispatch, methods, schedule
        self._status, self._version = status, version
        self._started_at = time.monotonic()
        self._taken = f".taken-{os.urandom(8).hex()}"  # the name of a request that is being taken
        self._stamps = _LIST_AGAIN  # of requests/, at the last two listings
        self._open: list[FileReply] = []
        self._replies = ReplyFiles(lambda: self._opened(REPLIES), self._warn)
        self._status_due = self._status_stale = 0.0  # monotonic: not before, not after
        self._warned = self._failed = False
        self.renew()

    # Each tick...

    def renew(self) -> None:
        """Make the spool directories, after the job's directory was made or restored."""
        self._status_version: object = None  # of the content of status.json
        self._directory: spool.DirectoryId = (0, 0)
        try:
            self._directory = spool.directory_id(self._path)
            for name in (REQUESTS, REPLIES):
                with self._opened(name):
                    pass
        except OSError as err:
            self._warn(err)

    def _opened(self, name: str) -> AbstractContextManager[int]:
        return spool.opened(self._path, name, self._directory, make=True)

    def tick(self) -> None:
        """Answer request files and write ``status.json``. It never raises, whatever the file system does."""
        self._failed = False
        self._try(self._take_some, self._replies.write, self._write_status)
        self._warned &= self._failed

    def take_last(self) -> None:
        """Answer the request files that are left when the job ends."""
        self._try(self._take_some)

    def _try(self, *works: Callable[[], None]) -> None:
        for work in works:
            try:
                work()
            except OSError as err:
                self._warn(err)

    def _warn(self, err: OSError) -> None:
        if not self._warned:
            where = f"{err.filename}: " if isinstance(err.filename, str) else ""
            text = "Control by file does not work (%s%s). The job tries again every %g s."
            log.warning(text, where, err.strerror or err, limits.TICK_PERIOD)
        self._failed, self._warned, self._stamps = True, True, _LIST_AGAIN

    # Requests...

    def _take_some(self) -> None:
        deadline, cpu_until = Deadline(limits.FILES_TIMEOUT), time.thread_time() + limits.FILES_CPU_SLICE
        with self._opened(REQUESTS) as requests:
            names = self._list(requests) if self._is_changed(requests) else []
            now = self._file_system_time() if names else 0.0
            taken = 0
            for name in names:
                if taken == limits.MAX_FILES_TAKEN or deadline.passed() or time.thread_time() >= cpu_until:
                    self._stamps = _LIST_AGAIN
                    return
                try:
                    taken += self._take(requests, name, now)
                except OSError as err:  # of this file; the others are still answered
                    self._warn(err)

    def _is_changed(self, requests: int) -> bool:
        """Return whether the directory is not as at the last two listings.

        Two, because a file added right after a listing may have left the same time of change.
        """
        facts = os.fstat(requests)
        stamp = facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_mode
        before, self._stamps = self._stamps, (self._stamps[1], stamp)
        return before != (stamp, stamp)

    def _list(self, requests: int) -> list[str]:
        """Return the names of request files, oldest first."""
        if os.fstat(requests).st_mode & 0o077:
            os.fchmod(requests, 0o700)
        aged = []
        with os.scandir(requests) as entries:
            # Files with other names do not count, so that thousands of them cannot hide the requests.
            found = (entry for entry in islice(entries, limits.MAX_NAMES_READ) if self._is_request(entry.name))
            for entry in islice(found, limits.MAX_FILES_SEEN):
                with suppress(FileNotFoundError):  # its client has taken it back
                    facts = entry.stat(follow_symlinks=False)
                    if spool.is_spool_file(facts, requests):
                        aged.append((facts.st_mtime_ns, entry.name))
        return [name for _, name in sorted(aged)]

    def _is_request(self, name: str) -> bool:
        """Return whether a file with this name is a request. As a job id has no leading dot, hidden files are none."""
        return is_job_id(name) and (name.endswith(SUFFIX) or name in self._methods)

    def _file_system_time(self) -> float:
        """Return the time of the file system's clock, which may be another host's."""
        with self._opened(REPLIES) as replies:
            os.utime(replies)
            return os.fstat(replies).st_mtime

    def _take(self, requests: int, name: str, now: float) -> bool:
        """Take and dispatch a request; return False if its client has taken it back."""
        try:
            os.rename(name, self._taken, src_dir_fd=requests, dst_dir_fd=requests)
            found = spool.read(requests, self._taken, MAX_LINE + 2)
        except FileNotFoundError:
            return False
        spool.remove(requests, self._taken)  # if this raises, the request is not carried out
        if found is not None:
            data, facts = found
            self._answer(name, data, facts.st_uid, now - facts.st_mtime)
        return True

    def _answer(self, name: str, data: bytes, owner: int, age: float) -> None:
        is_json = name.endswith(SUFFIX)
        reply = FileReply(name if is_json else name + SUFFIX, is_json, owner, self._post)
        self._replies.remove(reply.name)  # to an earlier request with this name
        self._open = [other for other in self._open if not other.answered]
        error = self._refusal(name, data, age)
        if error is not None:
            reply.send(jsonrpc.response(None, error))
            return
        self._dispatch(reply, data.removesuffix(b"\n") if is_json else jsonrpc.request(name, {}, name))
        self._open.append(reply)

    def _post(self, reply: FileReply, data: bytes) -> None:
        self._schedule(lambda: self._replies.post(reply, data))

    def _refusal(self, name: str, data: bytes, age: float) -> ControlError | None:
        """Return why a request is not carried out, or ``None``."""
        # Both ages are differences on one clock, so the clock of another host or a jump misleads them only briefly.
        if age > time.monotonic() - self._started_at + 2.0:  # a file system may round its times
            return InvalidRequest("this request is older than the job; nothing was done, ask again", age_seconds=age)
        if age > limits.REQUEST_FILE_TIMEOUT:
            text = f"this request lay for {age:.0f} s before the job read it; nothing was done, ask again"
            return InvalidRequest(text, age_seconds=age, limit=limits.REQUEST_FILE_TIMEOUT)
        if not name.endswith(SUFFIX):
            text = f"{name} is not empty: write a request with parameters to NAME{SUFFIX}; nothing was done"
            return InvalidRequest(text) if data.strip() else None
        if not data.rstrip().endswith((b"}", b"]")) and len(data) <= MAX_LINE:
            return ParseError(f"{name} is not complete JSON: write it under another name, then rename it to {name}")
        if len(self._open) >= limits.MAX_FILES_WAITING:
            text = f"{limits.MAX_FILES_WAITING} requests by file are waiting already; try again later"
            return TooManyCommands(text, limit=limits.MAX_FILES_WAITING)
        return None

    def _write_status(self) -> None:
        begin, version = time.monotonic(), self._version()
        if begin < self._status_due or (version == self._status_version and begin < self._status_stale):
            return
        try:
            data = jsonrpc.encode(self._status())
            with spool.opened(self._path, ".", self._directory) as directory:
                private_files.write(directory, STATUS, data)
            self._status_version = version
        finally:
            end = time.monotonic()
            self._status_due = end + max(limits.STATUS_PERIOD, (end - begin) / limits.STATUS_SHARE)
            self._status_stale = end + limits.STATUS_REFRESH

    # The end...

    def end(self) -> bool:
        """Warn no more; return whether a client may still wait for a reply or leave a request."""
        self._warned = True
        try:
            with spool.opened(self._path, REQUESTS, self._directory) as requests:
                waiting = any(map(self._is_request, os.listdir(requests)))
        except OSError:
            return False
        return waiting or not all(reply.answered for reply in self._open) or self._replies.are_awaited()

    def linger(self, seconds: float) -> None:
        """Give clients at most so many seconds to read the last replies."""
        deadline = Deadline(seconds)
        while not deadline.passed() and self._replies.are_awaited():
            time.sleep(0.01)  # nothing signals that a file was removed


class FileReply(ReplySink):
    """Sink for the one reply to a request file.

    Args:
        name: of the reply file.
        awaited: whether a program may wait for it; a person who touched an empty file reads it at some time, or never.
        owner: the user id of the request file's owner.
        post: writes the reply file.
    """

    def __init__(self, name: str, awaited: bool, owner: int, post: Callable[[FileReply, bytes], None]) -> None:
        super().__init__(Peer("file", owner))
        self.name, self.awaited, self._post = name, awaited, post
        self.answered = False
        #: What is not written yet; the bytes of the file; and when it was written, in ``time.monotonic()`` seconds.
        self.data, self.size, self.written_at = b"", 0, math.inf

    def send(self, data: bytes) -> None:
        """Write the reply; a notification has none."""
        self.answered = True
        if data:
            self._post(self, data)


class ReplyFiles:
    """The files in ``replies/``, bounded in number, bytes and age, and written as soon as the file system lets.

    Args:
        opened: opens ``replies/``; raises OSError.
        warn: called with an error that delays a reply.
    """

    def __init__(self, opened: Callable[[], AbstractContextManager[int]], warn: Callable[[OSError], None]) -> None:
        self._opened, self._warn = opened, warn
        self._replies: dict[str, FileReply] = {}  # by name, oldest first

    def post(self, reply: FileReply, data: bytes) -> None:
        """Write a reply now, or when it is possible. Never raises."""
        if len(data) > limits.MAX_REPLY_FILE:
            text = f"it was carried out, but the reply is longer than {limits.MAX_REPLY_FILE} bytes; ask for less"
            data = jsonrpc.response(None, InvalidRequest(text, limit=limits.MAX_REPLY_FILE))
        reply.data, reply.size = data, len(data)
        self._replies[reply.name] = reply
        try:
            self.write()
        except OSError as err:  # a full disk, for example: each tick tries again
            self._warn(err)
            if self._are_too_many():
                del self._replies[reply.name]

    def write(self) -> None:
        """Write what is not written yet, and remove what no client has read in time; raise OSError at a failure."""
        limit = time.monotonic() - limits.REPLY_FILE_TIMEOUT
        old = [name for name, reply in self._replies.items() if reply.written_at < limit]
        if not old and not any(reply.data for reply in self._replies.values()):
            return
        with self._opened() as replies:
            if self._are_too_many():
                left = set(os.listdir(replies))  # the clients have removed most of them
                self._replies = {name: reply for name, reply in self._replies.items() if reply.data or name in left}
            while old or self._are_too_many():
                name = old.pop() if old else next(iter(self._replies))
                spool.remove(replies, name)
                self._replies.pop(name, None)
            for reply in self._replies.values():
                if reply.data:
                    private_files.write(replies, reply.name, reply.data)
                    reply.data, reply.written_at = b"", time.monotonic()

    def _are_too_many(self) -> bool:
        size = sum(reply.size for reply in self._replies.values())
        return len(self._replies) > limits.MAX_REPLY_FILES or size > limits.MAX_REPLY_FILES_BYTES

    def remove(self, name: str) -> None:
        """Remove a reply, written or not; raise OSError if that is not possible."""
        self._replies.pop(name, None)
        with self._opened() as replies:
            spool.remove(replies, name)

    def are_awaited(self) -> bool:
        """Return whether a program may still be about to read a reply."""
        limit = time.monotonic() - 2.0  # by then a program has read it, or has ended
        young = {reply.name for reply in list(self._replies.values()) if reply.awaited and reply.written_at > limit}
        if not young:
            return False
        try:
            with self._opened() as replies:
                return not young.isdisjoint(os.listdir(replies))
        except OSError:
            return False
