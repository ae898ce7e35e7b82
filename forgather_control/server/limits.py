"""Limits and periods of the server, in one place; read as ``limits.NAME`` when they are used."""

from __future__ import annotations

from typing import Final

#: Seconds between two ticks: request files are read and ``status.json`` is written. Without requests, the thread's only
#: wake-ups.
TICK_PERIOD: Final = 3.0
#: Share of one core that the thread may use, and the processor seconds that it may save up for a burst: with
#: it, and the last slice, it uses at most 5 % in any six seconds.
CPU_SHARE: Final = 0.04
CPU_BURST: Final = 0.05
CPU_SLICE: Final = 0.005  #: Processor seconds of answering after which the thread looks at its budget again.
CLOSE_GRACE: Final = 0.5  #: Seconds that clients have to read their last replies when the server closes.

# Connections...

MAX_CONNECTIONS: Final = 4096  #: Beyond it the server closes the connection that is idle the longest.
RESERVED_FILES: Final = 256  #: File descriptors of the process that the server leaves to training.
MAX_UNSENT: Final = 256 * 1024  #: Bytes of unread replies beyond which the server stops reading from a client ...
STALL_TIMEOUT: Final = 30.0  #: ... and seconds without progress after which it closes the connection.
#: Bytes of unread events beyond which a subscriber gets no more; less than MAX_UNSENT, so that its requests are still
#: read. And bytes of events that it gets in one turn.
MAX_STREAM_UNSENT: Final = 64 * 1024
STREAM_CHUNK: Final = 16 * 1024
IDLE_TIMEOUT: Final = 3600.0  #: Seconds without traffic after which a TCP connection is closed: its host may be gone.

# Requests that wait for their reply...

MAX_DEFERRED: Final = 1024  #: Most requests that may wait at once, over all connections.
#: Bytes of replies after which the rest of a batch is refused: a hundred of the longest would take too much memory, and
#: too much of the interpreter's time beside training. And bytes that the replies to all unfinished batches may hold.
MAX_BATCH_REPLY: Final = 1 << 20
MAX_BATCHES_HELD: Final = 16 << 20

# TCP...

DEFAULT_PORT: Final = 8900  #: The first port that ``port="auto"`` tries ...
PORTS_TRIED: Final = 100  #: ... and how many it tries.
MAX_FIRST_LINE: Final = 1024  #: Longest first line in bytes, without its newline.
AUTH_TIMEOUT: Final = 10.0  #: Seconds in which a client must authenticate.
MAX_UNAUTHENTICATED: Final = 128  #: Most unauthenticated connections; beyond it the oldest is closed.
AUTH_FAILURE_DELAY: Final = 1.0  #: Seconds until a wrong token is answered.

# Request files...

#: Most request files that one tick takes; processor seconds after which it takes no more, a sixth of what the budget
#: adds in a tick; and seconds, for a slow file system.
MAX_FILES_TAKEN: Final = 64
FILES_CPU_SLICE: Final = 0.02
FILES_TIMEOUT: Final = 0.1
MAX_FILES_SEEN: Final = 1000  #: Most request files that one tick looks at ...
MAX_NAMES_READ: Final = 20_000  #: ... and most directory entries that it reads to find them.
MAX_FILES_WAITING: Final = 256  #: Most request files that may wait for their reply at once.
#: Most reply files, their bytes together, and seconds after which an unread one is removed.
MAX_REPLY_FILES: Final = 256
MAX_REPLY_FILES_BYTES: Final = 16 << 20
REPLY_FILE_TIMEOUT: Final = 3600.0
MAX_REPLY_FILE: Final = 1 << 20  #: Longest reply file in bytes.
REQUEST_FILE_TIMEOUT: Final = 300.0  #: Age from which a request file is refused: its writer may no longer want it.
#: Seconds after which ``status.json`` is written again without a change, so that its age shows that the job is alive.
STATUS_REFRESH: Final = 30.0
#: Least seconds between two versions of ``status.json``, so every second tick; and the share of the time that writing
#: it may take where the file system is slow.
STATUS_PERIOD: Final = 5.0
STATUS_SHARE: Final = 0.01
