"""Limits and periods of the jobs directory, in one place; read as ``limits.NAME`` when they are used."""

from __future__ import annotations

from typing import Final

MAX_RECORD: Final = 64 * 1024  #: Longest ``endpoint.json`` in bytes; ours have a few hundred.
MAX_RANKS_FILE: Final = 4 << 20  #: Longest ``ranks.json`` in bytes; ten thousand ranks fit.

#: Most jobs whose answer is waited for at the same time; each takes a file descriptor.
MAX_ASKED_AT_ONCE: Final = 200
MAX_ANSWER: Final = 1 << 20  #: Longest answer in bytes.
BUSY_RETRY: Final = 0.02  #: Seconds until a job whose backlog is full is asked again: nothing signals that it has room.

MAX_EVENT_LOG: Final = 1 << 20  #: Longest event log in bytes; beyond it the older half is left out.
MAX_STATUS: Final = 1 << 20  #: Longest ``status.json`` in bytes that is read, or kept of an ended job.
MAX_ENDED: Final = 100  #: Ended jobs that are kept ...
ENDED_SECONDS: Final = 14 * 86400.0  #: ... and for how many seconds.

LOCK_TIMEOUT: Final = 5.0  #: Seconds to wait for the lock of the jobs directory; its holders need milliseconds.
ANSWER_TIMEOUT: Final = 1.0  #: Seconds that a job has to answer before its directory is removed as a dead one's.
REMOVE_ATTEMPTS: Final = 5  #: Attempts to empty a directory into which other processes still write.
