"""What a job answers to ``status``, as programs of Python see it."""

from collections.abc import Mapping
from typing import Any, Final

from ..errors import InternalError
from ..notebook import html_table
from ..states import TrainingStatus

#: How the wire spells what JSON has no number for; float() reads all three.
_NOT_FINITE: Final = ("NaN", "Infinity", "-Infinity")


class JobStatus(dict[str, Any]):
    """The status of a job: a dictionary of the members that it sent, which are attributes, too.

    As attributes, numbers that are not finite are floats; in the dictionary they are strings, as on the wire. A member
    that the job did not send, such as an older one, raises AttributeError.
    """

    job_id: str | None
    status: TrainingStatus
    global_step: int
    epoch: float | None
    max_steps: int | None
    progress: float | None  #: From 0 to 1.
    steps_per_second: float | None
    eta_seconds: float | None
    seconds_since_step: float | None
    evaluation: dict[str, Any]  #: How far the present evaluation is.
    metrics: dict[str, Any]
    pending_metrics: list[str]  #: Logged on a device that has not told their values yet.
    world_size: int
    ranks_not_joined: list[int]
    started_at: float  #: In seconds since the epoch.
    stop_saves: bool
    commands: list[dict[str, Any]]
    rules: list[dict[str, Any]]
    running: list[dict[str, Any]]
    host: str
    pid: int
    rss_bytes: int | None
    cpu_percent: float
    device: str | None
    device_memory_bytes: int | None
    device_memory_reserved_bytes: int | None

    @classmethod
    def from_json(cls, value: object) -> "JobStatus":
        """Return the status that a reply holds; raise InternalError if it holds none."""
        if not isinstance(value, dict):
            raise InternalError("the other side sent no status")
        return cls(value)

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(f"the job sent no {name!r} in its status") from None
        return float(value) if value in _NOT_FINITE and "float" in str(type(self).__annotations__.get(name)) else value

    def __repr__(self) -> str:
        end = f" of {self.get('max_steps')}" if self.get("max_steps") is not None else ""
        return f"<JobStatus {self.get('job_id')}: {self.get('status')}, step {self.get('global_step')}{end}>"

    def _repr_html_(self) -> str:
        return html_table({name: _cell(value) for name, value in self.items() if value not in (None, [], {})})


def _cell(value: Any) -> Any:
    """Return what a table shows of a member that holds others."""
    if isinstance(value, list):
        return f"{len(value)}"
    return ", ".join(f"{name}={each}" for name, each in value.items()) if isinstance(value, Mapping) else value
