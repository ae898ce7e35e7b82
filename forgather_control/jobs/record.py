"""What a job publishes about itself: its id, the name of its directory, its ``endpoint.json``.

Nothing read here is trusted: a file may be half written, hostile, or of another host. A job id is checked before it
becomes a path, links are not followed, and a record that another user wrote or could write is ignored: in a shared
jobs directory that user could answer in the name of this user's jobs.
"""

import os
import re
import stat
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..errors import BadJobId, JobsDirUnusable
from ..processes import liveness
from ..schema import INTEGER, NULL, OBJECT, PID, TEXT, TIME, Field, load, nullable, parse_json, shown
from . import limits, private_files

if TYPE_CHECKING:
    from ..processes.launcher import Launch as Launch
else:  # few jobs have one, and importing it would cost every client
    Launch = Any

RECORD: Final = "endpoint.json"
SOCKET: Final = "control.sock"
_JOB_ID: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

#: Cached, because the path must stay the same when the process changes its working directory.
_absolute: Final[Callable[[str], str]] = cache(os.path.abspath)


def jobs_dir() -> str:
    """Return the jobs directory: $FORGATHER_JOBS_DIR, else under $XDG_CONFIG_HOME if that is absolute, else ~/.config.

    Raises:
        JobsDirUnusable: this user has no home directory.
    """
    if chosen := os.environ.get("FORGATHER_JOBS_DIR"):
        return _absolute(chosen)
    config = os.environ.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(config):
        home = os.path.expanduser("~")
        if not os.path.isabs(home):  # a uid without a name, as in containers
            raise JobsDirUnusable("there is no home directory for the jobs directory; set HOME or FORGATHER_JOBS_DIR")
        config = os.path.join(home, ".config")
    return os.path.join(config, "forgather", "jobs")


def make_jobs_dir(root: str) -> None:
    """Make the jobs directory if it does not exist; raise JobsDirUnusable if others could replace what is in it."""
    private_files.make_directories(root)
    facts, me = os.stat(root), os.geteuid()
    if not stat.S_ISDIR(facts.st_mode):
        raise JobsDirUnusable(f"the jobs directory {root} is no directory")
    for owner in (facts.st_uid, os.lstat(root).st_uid):  # the owner of a link can change where it points
        if owner not in (0, me) and me != 0:
            raise JobsDirUnusable(f"the jobs directory {root} belongs to another user (uid {owner})")
    # A group may write: with a umask of 002 it is the user's own, and records of other users are ignored.
    if private_files.may_replace(facts, stat.S_IWOTH):
        raise JobsDirUnusable(f"any user may rename what is in the jobs directory {root}; chmod o-w it")


def is_job_id(text: object) -> bool:
    """Return whether ``text`` can be a job id, and so the name of a directory."""
    return isinstance(text, str) and _JOB_ID.fullmatch(text) is not None


def check_job_id(text: object) -> str:
    """Return ``text`` itself; raise BadJobId if it cannot be a job id."""
    if not is_job_id(text):
        rule = "1 to 128 of A-Z a-z 0-9 . _ -, not starting with a dot or dash"
        raise BadJobId(f"{ascii(text)[:140]} is no job id: {rule}")
    return str(text)


class JobRecord(NamedTuple):
    """The content of ``endpoint.json``. Times are seconds since the epoch."""

    job_id: str
    host: str
    port: int | None  #: ``None`` without TCP; 0 in the file, because Forgather's own reader formats it as a number.
    pid: int
    started_at: float
    socket: str | None = None
    process_started_at: float | None = None
    boot_id: str | None = None
    world_size: int = 1
    protocol: int = 1
    version: str = ""
    user: str = ""
    machine: str | None = None  #: As in :class:`liveness.Identity`; so are the next two, and ``boot_id``.
    booted_at: float | None = None
    pid_namespace: int | None = None
    address: str | None = None  #: What the port is bound to.
    token: str | None = None  #: The secret that TCP clients send.
    tls_sha256: str | None = None  #: Of the certificate, if the port speaks TLS.
    launch: Launch | None = None  #: ``None`` if neither SLURM nor torchrun started the job.

    @property
    def owner(self) -> liveness.Identity:
        """The process that published the record."""
        where = (self.booted_at, self.boot_id, self.machine, self.pid_namespace)
        return liveness.Identity(self.host, self.pid, self.process_started_at, *where)

    def is_same_run(self, other: "JobRecord") -> bool:
        """Return whether two records are of one run; one process can have several, and can execute itself anew."""
        return (self.owner, self.started_at) == (other.owner, other.started_at)

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``endpoint.json`` holds."""
        return {**self._asdict(), "port": self.port or 0, "launch": self.launch and self.launch.to_json()}


def _launch(value: object) -> Launch:
    from ..processes.launcher import Launch

    return Launch.from_json(value)


#: The rules for the members of a record.
FIELDS: Final = {
    "job_id": Field(TEXT, convert=check_job_id),
    **dict.fromkeys(("host", "version", "user"), Field(TEXT)),
    **dict.fromkeys(("socket", "boot_id", "machine", "address", "token", "tls_sha256"), Field(TEXT + NULL)),
    **dict.fromkeys(("process_started_at", "booted_at"), nullable(TIME)),
    **dict.fromkeys(("world_size", "protocol"), Field(INTEGER)),
    "port": Field(INTEGER + NULL, 0, 65535, convert=lambda port: port or None),
    "pid": PID,
    "started_at": TIME,
    "pid_namespace": Field(INTEGER + NULL),
    "launch": Field(OBJECT + NULL, convert=_launch),
}


def parse_record(data: bytes, job_id: str) -> JobRecord:
    """Return the record in ``data``, from the directory of ``job_id``; raise ValueError naming what is not valid."""
    value = parse_json(data)
    if isinstance(value, dict) and value.get("job_id") != job_id:
        raise ValueError(f"it is the record of another job, {shown(value.get('job_id'))}")
    return load(JobRecord, FIELDS, value, "the record")


def read_record(root: str, job_id: str, directory: int | None = None) -> JobRecord | None:
    """Return the record of a job; ``None`` if there is none.

    Args:
        directory: a descriptor of the job's directory, if it is open already.

    Raises:
        ValueError: why the file is no record of this job.
        OSError: this process has no descriptors left, which says nothing about the job.
    """
    path = os.path.join(root, job_id) if directory is None else "."
    data = private_files.read_trusted(path, RECORD, limits.MAX_RECORD, directory)
    return None if data is None else parse_record(data, job_id)
