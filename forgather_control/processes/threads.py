"""Whether threads and sockets are the system's, or gevent or eventlet has replaced them, so that no server can run.

Their threads take turns on one thread of the system, so training and the server would wait for each other.
"""

from __future__ import annotations

import _thread
import select
import socket
from typing import Final

from ..errors import Unsupported

_LIBRARIES: Final = ("gevent", "eventlet")
_PROBE_TIMEOUT: Final = 5.0  #: Seconds that a new thread has to run.


def check() -> None:
    """Raise Unsupported unless new threads run beside this one, and sockets are Python's own. On any thread."""
    if why := fault():
        raise Unsupported(f"{why}; train in a process without it")
    found: list[int] = []
    ran = _thread.allocate_lock()
    ran.acquire()

    def probe() -> None:
        found.append(_thread.get_native_id())
        ran.release()

    try:
        _thread.start_new_thread(probe, ())
    except RuntimeError as err:  # a limit on processes (getrlimit(2), cgroups(7)), or a system without threads
        raise Unsupported(f"no thread can be started ({err})") from err
    if not ran.acquire(True, _PROBE_TIMEOUT) or found == [_thread.get_native_id()]:
        raise Unsupported("a new thread does not run beside the thread that starts it: something has replaced threads")


def fault() -> str | None:
    """Return which library has replaced threads, sockets or polling, if one has. On any thread; uses none of them."""
    for part in (_thread.start_new_thread, socket.socket, select.select):
        library = str(part.__module__).partition(".")[0]  # None for some built-in functions
        if library in _LIBRARIES:
            return f"{library} has replaced Python's threads or sockets"
    return None
