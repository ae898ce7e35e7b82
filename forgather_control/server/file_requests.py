"""Control by file, the job's half: requests taken out of ``requests/``, answered in ``replies/``; and ``status.json``.

Floor 3, training side: imports commands, errors, exchange, jsonrpc and letters. Runs on the server thread, at each
of its ticks and whenever a reply is there; ``end`` and ``linger`` run on the training thread when training ends.

The way of a request: a file is looked at ─▶ renamed out of sight ─▶ read, removed ─▶ asked, as a line is
─▶ its reply written and renamed in. Whoever loses the rename (its writer took it back) does not run it, and a
crash after it loses the request: it is never carried out twice.

All work of a tick is bounded in number and time, and none of it raises: a full disk or a deleted directory
is one warning, until it is over.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from itertools import islice
from typing import Any, Final, NamedTuple

from ..errors import ControlError, InvalidRequest, ParseError, TooManyCommands
from ..jobs import private_files, spool
from ..jobs.record import is_job_id
from ..jobs.spool import REPLIES, REQUESTS, STATUS, SUFFIX
from ..wire import builtin, jsonrpc
from ..wire.limits import MAX_LINE
from . import limits
from .dispatcher import Peer, ReplySink, Subscription

log = logging.getLogger("forgather_control")

#: What a request is called while it is taken, before a few letters of who takes it: hidden, and nobody else's.
_TAKEN: Final = ".taken-"


class FileReply:
    """Stands where a connection would: it takes the one reply of one request.

    Args:
        name: of the reply.
        post: writes it.
    """

    #: Nobody hangs up on a file.
    broken = False
    peer = Peer("file")

    def __init__(self, name: str, post: Callable[[str, bytes], None]) -> None:
        self.name, self._post = name, post
        #: Whether it still waits for the reply.
        self.open = 0

    def send(self, data: bytes) -> None:
        """Leave the reply; a notification has none."""
        if data:
            self._post(self.name, data)

    def stop_reading(self) -> None:
        """Do nothing: a request file is one line."""

    def start_subscription(self, subscription: Subscription) -> None:
        """Raise InvalidRequest: a file takes one reply."""
        raise InvalidRequest("A request file cannot subscribe to events. Connect to the job's socket instead.")

    def end_subscription(self) -> bool:
        """Return ``False``: there is no subscription."""
        return False


class _Kept(NamedTuple):
    """A reply that was written: when (monotonic), how long it is, whether a program may wait for it."""

    at: float
    size: int
    awaited: bool


class FileRequestServer:
    """The letters of one job, and its ``status.json``.

    Args:
        path: the job's directory, which exists.
        ask: has a line answered by an asker; see ``Dispatcher.dispatch``.
        status: what ``status`` answers.
        mark: differs when ``status`` has something new to tell; cheap, and compared by ``==``.
    """

    def __init__(
        self,
        path: str,
        ask: Callable[[ReplySink, bytes], None],
        status: Callable[[], Any],
        mark: Callable[[], object],
    ) -> None:
        self._path, self._ask, self._status, self._mark = path, ask, status, mark
        self._born = time.monotonic()
        self._taken = _TAKEN + os.urandom(8).hex()
        self._home: spool.DirectoryId = (0, 0)
        self._stamps: tuple[object, object] = (None, None)  # of requests/, at the last two looks
        self._again = False  # something is left there for the next tick
        self._growing: dict[str, tuple[int, int]] = {}  # not JSON yet: size and time when last seen
        self._open: list[FileReply] = []
        self._unsent: dict[str, bytes] = {}  # replies that could not be written yet, oldest first
        self._kept: dict[str, _Kept] = {}  # those that were, oldest first
        self._touched: set[str] = set()  # replies to empty files: a person reads them some day, or does not
        self._told: object = None  # the mark of what status.json says
        # In monotonic seconds: not before, not before while nobody reads it, not after.
        self._status_due, self._status_unread_due, self._status_stale = 0.0, 0.0, 0.0
        self._warned = self._failed = self._ending = False
        self.renew()

    # Each tick...

    def renew(self) -> None:
        """The directory was made, or made anew: have the boxes in it."""
        self._stamps, self._told = (None, None), None
        try:
            before, self._home = self._home, spool.directory_id(self._path)
            if self._home != before:
                self._kept.clear()
            for box in (REQUESTS, REPLIES):
                with spool.opened(self._path, box, self._home, make=True):
                    pass
        except OSError as err:
            self._warn(err)

    def tick(self) -> None:
        """Take what lies there, and tell what is new. Whatever the file system does, it never raises."""
        self._failed = False
        for work in (self._take_some, self._write_unsent, self._drop_old, self._tell_status):
            self._try(work)
        if not self._failed:
            self._warned = False

    def look(self) -> None:
        """Answer what lies there still: the job is ending."""
        self._try(self._take_some)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as err:
            self._warn(err)

    def _warn(self, err: OSError) -> None:
        self._failed = self._again = True
        if not (self._warned or self._ending):
            where = f"{err.filename}: " if isinstance(err.filename, str) else ""
            log.warning("control by file does not work at present: %s%s", where, err.strerror or err)
        self._warned = True

    # Requests...

    def _take_some(self) -> None:
        if self._is_quiet():
            return
        until, worked = time.monotonic() + limits.FILES_TIMEOUT, time.thread_time() + limits.FILES_CPU_SLICE
        with spool.opened(self._path, REQUESTS, self._home, make=True) as box:
            found = self._look_into(box)
            if not found:
                return
            now = self._now()
            taken = 0
            for name in found:
                if taken == limits.MAX_FILES_TAKEN or time.monotonic() >= until or time.thread_time() >= worked:
                    self._again = True
                    return
                try:
                    taken += self._take(box, name, now) if self._is_ready(box, name) else 0
                except OSError as err:  # this one's; the others have their turn all the same
                    self._warn(err)

    def _is_quiet(self) -> bool:
        """Whether nothing was added since the last two looks, told by as few calls as it takes.

        Two, as what is added right after a look may have the same time of change.
        """
        if self._again or self._stamps[0] != self._stamps[1]:
            return False
        try:
            with private_files.opened(os.path.join(self._path, REQUESTS)) as box:
                return _stamp(os.fstat(box)) == self._stamps[0]
        except OSError:
            return False  # gone, and made anew; or what it is, is found out

    def _look_into(self, box: int) -> list[str]:
        """The requests that lie there, oldest first."""
        facts = os.fstat(box)
        if facts.st_mode & 0o077:
            os.fchmod(box, 0o700)  # others may not even look
        self._stamps, self._again = (self._stamps[1], _stamp(facts)), False
        with os.scandir(box) as entries:
            # What is left lying there half written, a thousand times over, must not hide what is asked.
            asked = (entry for entry in islice(entries, limits.MAX_NAMES_READ) if _is_request(entry.name))
            found = [_aged(entry, box) for entry in islice(asked, limits.MAX_FILES_SEEN)]
        names = [name for _, name in sorted(item for item in found if item is not None)]
        self._growing = {name: self._growing[name] for name in names if name in self._growing}
        return names

    def _now(self) -> float:
        """What time the file system has: its clock may be another host's."""
        with spool.opened(self._path, REPLIES, self._home, make=True) as box:
            os.utime(box)
            return os.fstat(box).st_mtime

    def _is_ready(self, box: int, name: str) -> bool:
        """Whether it is all there: JSON to its end, or left alone since the last tick."""
        if not name.endswith(SUFFIX):
            return True
        try:
            found = spool.read(box, name, MAX_LINE + 2)
        except FileNotFoundError:
            return False
        if found is None or _is_json(found[0]):
            return found is not None
        seen = (found[1].st_size, found[1].st_mtime_ns)
        if self._growing.get(name) == seen:
            return True
        self._growing[name] = seen
        self._again = True
        return False

    def _take(self, box: int, name: str, now: float) -> int:
        """How many requests that was: one, unless it is gone."""
        try:
            os.rename(name, self._taken, src_dir_fd=box, dst_dir_fd=box)
            found = spool.read(box, self._taken, MAX_LINE + 2)
        except FileNotFoundError:  # its writer took it back
            return 0
        finally:
            self._growing.pop(name, None)
        spool.remove(box, self._taken)  # should that fail, it raises, and nothing is carried out
        if found is not None:
            data, facts = found
            self._answer(name, data, now - facts.st_mtime)
        return 1

    def _answer(self, name: str, data: bytes, age: float) -> None:
        letter = FileReply(name.removesuffix(SUFFIX) + SUFFIX, self._post)
        self._forget(letter.name)
        (self._touched.discard if name.endswith(SUFFIX) else self._touched.add)(letter.name)
        self._open = [other for other in self._open if other.open]
        error = self._objection(name, data, age)
        if error is not None:
            letter.send(jsonrpc.response(None, error))
            return
        line = data.removesuffix(b"\n") if name.endswith(SUFFIX) else jsonrpc.request(name, {}, name)
        self._ask(letter, line)
        if letter.open:
            self._open.append(letter)

    def _objection(self, name: str, data: bytes, age: float) -> ControlError | None:
        """Why a request is not carried out, whatever it says."""
        # Both ages are distances on one clock, so neither another host's clock nor a jump misleads them for long.
        if age > time.monotonic() - self._born + limits.FILE_TIME_ROUNDING:
            return InvalidRequest("this request is older than the job; nothing was done, ask again", age_seconds=age)
        if age > limits.REQUEST_FILE_TIMEOUT:
            text = f"this request lay for {age:.0f} s before the job saw it; nothing was done, ask again"
            return InvalidRequest(text, age_seconds=age, limit=limits.REQUEST_FILE_TIMEOUT)
        if not name.endswith(SUFFIX) and data.strip():
            return InvalidRequest(f"{name} is not empty: a request with parameters belongs into a file NAME{SUFFIX}")
        if len(self._open) >= limits.MAX_FILES_WAITING:
            return TooManyCommands(
                f"{limits.MAX_FILES_WAITING} requests by file are waiting already", limit=limits.MAX_FILES_WAITING
            )
        return None

    # Replies...

    def _post(self, name: str, data: bytes) -> None:
        if len(data) > limits.MAX_REPLY_FILE:
            text = (
                f"it was carried out, but the reply is longer than {limits.MAX_REPLY_FILE} bytes; ask for less at once"
            )
            data = jsonrpc.response(None, InvalidRequest(text, limit=limits.MAX_REPLY_FILE))
        self._unsent.pop(name, None)
        self._unsent[name] = data
        try:
            self._write_unsent()
        except OSError as err:  # a full disk: tried again at each tick
            self._warn(err)
            while (
                len(self._unsent) > limits.MAX_REPLY_FILES
                or sum(map(len, self._unsent.values())) > limits.MAX_REPLY_FILES_BYTES
            ):
                del self._unsent[next(iter(self._unsent))]

    def _write_unsent(self) -> None:
        if not self._unsent:
            return
        with spool.opened(self._path, REPLIES, self._home, make=True) as box:
            for name, data in list(self._unsent.items()):
                self._make_room(box, len(data))
                private_files.write(box, name, data)
                del self._unsent[name]
                self._kept[name] = _Kept(time.monotonic(), len(data), name not in self._touched)

    def _make_room(self, box: int, size: int) -> None:
        if not self._is_full(size):
            return
        lying = set(os.listdir(box))  # most were taken by those who waited for them
        self._kept = {name: kept for name, kept in self._kept.items() if name in lying}
        while self._kept and self._is_full(size):
            self._remove(box, next(iter(self._kept)))

    def _is_full(self, size: int) -> bool:
        return (
            len(self._kept) >= limits.MAX_REPLY_FILES
            or sum(kept.size for kept in self._kept.values()) + size > limits.MAX_REPLY_FILES_BYTES
        )

    def _drop_old(self) -> None:
        limit = time.monotonic() - limits.REPLY_FILE_TIMEOUT
        if not any(kept.at < limit for kept in islice(self._kept.values(), 1)):
            return
        with spool.opened(self._path, REPLIES, self._home, make=True) as box:
            for name in [name for name, kept in self._kept.items() if kept.at < limit]:
                self._remove(box, name)

    def _forget(self, name: str) -> None:
        """A new request of a name: what answered the last one is no answer to it."""
        self._unsent.pop(name, None)
        with spool.opened(self._path, REPLIES, self._home, make=True) as box:
            self._remove(box, name)

    def _remove(self, box: int, name: str) -> None:
        self._kept.pop(name, None)
        self._touched.discard(name)
        spool.remove(box, name)

    # Status...

    def _tell_status(self) -> None:
        begin, worked = time.monotonic(), time.thread_time()
        if begin < self._status_due or (begin < self._status_unread_due and not self._is_read()):
            return
        mark = self._mark()
        if mark == self._told and begin < self._status_stale:
            return
        try:
            data = jsonrpc.encode(self._status())
            with spool.opened(self._path, ".", self._home) as home:
                private_files.write(home, STATUS, data)
            self._told = mark
        finally:
            end, worked = time.monotonic(), time.thread_time() - worked
            self._status_due, self._status_unread_due = (
                end + (end - begin) / limits.STATUS_SHARE,
                end + worked / limits.STATUS_CPU_SHARE,
            )
            self._status_stale = end + limits.STATUS_REFRESH

    def _is_read(self) -> bool:
        """Whether somebody has read it since it was written, where the file system notes that (relatime, mount(8))."""
        try:
            facts = os.stat(os.path.join(self._path, STATUS), follow_symlinks=False)
        except OSError:
            return True  # deleted: it is missed
        return facts.st_atime_ns > facts.st_mtime_ns

    # The end, on the training thread...

    def end(self) -> bool:
        """Training ends: no more warnings from here on. Whether somebody may still wait for a reply, or ask."""
        self._ending = True
        try:
            with spool.opened(self._path, REQUESTS, self._home) as box:
                waiting = any(_is_request(name) for name in os.listdir(box))
        except OSError:
            return False
        return waiting or any(letter.open for letter in self._open) or bool(self._untaken())

    def linger(self, seconds: float) -> None:
        """Leave the readers of the last replies at most so many seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._untaken():
            time.sleep(limits.REPLY_POLL_PERIOD)  # nothing wakes whoever waits for a file to go

    def _untaken(self) -> list[str]:
        limit = time.monotonic() - limits.YOUNG_REPLY
        young = [name for name, kept in list(self._kept.items()) if kept.awaited and kept.at > limit]
        return [name for name in young if os.path.lexists(os.path.join(self._path, REPLIES, name))]


def _stamp(facts: os.stat_result) -> object:
    return facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_mode


def _is_request(name: str) -> bool:
    return is_job_id(name) and (name.endswith(SUFFIX) or name in builtin.BUILTIN)


def _aged(entry: os.DirEntry[str], box: int) -> tuple[int, str] | None:
    """When it was written, and its name; ``None`` for what is no letter, or has just gone."""
    try:
        facts = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
    return (facts.st_mtime_ns, entry.name) if spool.is_spool_file(facts, box) else None


def _is_json(data: bytes) -> bool:
    """Whether it can be answered now: a JSON text to its end, or too much."""
    try:
        jsonrpc.parse_message(data.removesuffix(b"\n"))
    except ParseError:
        return False
    except ControlError:
        return True
    return True
