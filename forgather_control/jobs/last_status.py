"""The last status that a job wrote, in ``status.json`` of its directory: what is known of one that does not answer.

Any thread, any process. Nothing read here is trusted.
"""

import os
import time
from typing import Any, NamedTuple

from ..schema import parse_json
from . import limits, private_files
from .spool import STATUS


class LastStatus(NamedTuple):
    """A status, and when it was written (seconds since the epoch, by the clock of the file system)."""

    status: dict[str, Any]
    written_at: float

    @property
    def age(self) -> float:
        """Seconds since it was written."""
        return max(0.0, time.time() - self.written_at)


def read(root: str, job_id: str) -> LastStatus | None:
    """Return the last status of a job; ``None`` if there is none that can be believed."""
    path = os.path.join(root, job_id)
    try:
        written_at = os.lstat(os.path.join(path, STATUS)).st_mtime
        data = private_files.read_trusted(path, STATUS, limits.MAX_STATUS)
        value = None if data is None else parse_json(data)
    except (OSError, ValueError):
        return None
    if not isinstance(value, dict) or value.get("job_id") != job_id:
        return None
    return LastStatus(value, written_at)
