"""What launched this process, and how often it was restarted: what SLURM and torchrun set in its environment.

SLURM's variables are those of sbatch(1), "OUTPUT ENVIRONMENT VARIABLES". ``SLURM_RESTART_COUNT`` is set only once a
job has been restarted or requeued, which keeps its id; each task of an array has an id of its own and is called
ARRAY_TASK by squeue(1). torchrun's are set in ``torch/distributed/elastic/agent/server/local_elastic_agent.py``
(``_start_workers``) and described in ``torch/distributed/run.py``, where an unnamed run is called "none".

The environment is the user's: a variable whose value does not fit these pages is ignored.
"""

from __future__ import annotations

import os
import re
from typing import Any, Final, NamedTuple

from .. import schema
from ..schema import Field

_VARIABLES: Final = {
    "slurm_job_id": "SLURM_JOB_ID",
    "slurm_array_job_id": "SLURM_ARRAY_JOB_ID",
    "slurm_array_task_id": "SLURM_ARRAY_TASK_ID",
    "slurm_restart_count": "SLURM_RESTART_COUNT",
    "slurm_cluster": "SLURM_CLUSTER_NAME",
    "slurm_nodes": "SLURM_JOB_NODELIST",
    "run_id": "TORCHELASTIC_RUN_ID",
    "restart_count": "TORCHELASTIC_RESTART_COUNT",
    "max_restarts": "TORCHELASTIC_MAX_RESTARTS",
}
_TEXT: Final = Field(schema.TEXT + schema.NULL, longest=256, printable=True)
#: Numbers are ids and counts of at most ten digits; a list of nodes is in brackets (``node[001-512]``).
_FIELDS: Final = {
    **dict.fromkeys(_VARIABLES, Field(schema.INTEGER + schema.NULL, 0, 10**10 - 1)),
    "slurm_cluster": _TEXT,
    "slurm_nodes": _TEXT._replace(longest=4096),
    "run_id": _TEXT,
}


class Launch(NamedTuple):
    """What the launchers of a process set in its environment; ``None`` for what is not set, or not valid."""

    slurm_job_id: int | None = None
    slurm_array_job_id: int | None = None
    slurm_array_task_id: int | None = None
    slurm_restart_count: int | None = None  #: How often SLURM has restarted the job; 0 the first time.
    slurm_cluster: str | None = None
    slurm_nodes: str | None = None
    run_id: str | None = None  #: torchrun's name of the run (``--rdzv-id``); ``None`` for its default, "none".
    restart_count: int | None = None  #: How often torchrun has restarted the workers; 0 the first time.
    max_restarts: int | None = None

    @property
    def names(self) -> frozenset[str]:
        """What a user may call it: the SLURM job, its array (``123``) or its task (``123_4``), and torchrun's run."""
        found = {str(number) for number in (self.slurm_job_id, self.slurm_array_job_id) if number is not None}
        if self.slurm_array_job_id is not None and self.slurm_array_task_id is not None:
            found.add(f"{self.slurm_array_job_id}_{self.slurm_array_task_id}")
        return frozenset(found if self.run_id is None else {*found, self.run_id})

    @property
    def stable_name(self) -> str | None:
        """What stays the same when the launcher restarts it: cluster and SLURM job or task, and torchrun's run."""
        slurm = None if self.slurm_job_id is None else str(self.slurm_job_id)
        if self.slurm_array_job_id is not None and self.slurm_array_task_id is not None:
            slurm = f"{self.slurm_array_job_id}_{self.slurm_array_task_id}"
        parts = (None if slurm is None else self.slurm_cluster, slurm, self.run_id)
        return "_".join(part for part in parts if part is not None) or None

    def follows(self, earlier: Launch) -> bool:
        """Return whether a launcher ended ``earlier`` and restarted it as this one.

        The same id and a higher count are the proof. SLURM's count is compared before torchrun's, which starts from 0
        again in a requeued job; and what runs in two SLURM jobs is not one run, even if both have one ``--rdzv-id``.
        """
        if (self.slurm_cluster, self.slurm_job_id) != (earlier.slurm_cluster, earlier.slurm_job_id):
            return False
        one, other = self.slurm_restart_count, earlier.slurm_restart_count
        if self.slurm_job_id is None or one == other:
            if self.run_id is None or self.run_id != earlier.run_id:
                return False
            one, other = self.restart_count, earlier.restart_count
        return one is not None and other is not None and one > other

    def to_json(self) -> dict[str, Any]:
        """Return the object that ``endpoint.json`` holds: what is set."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @classmethod
    def from_json(cls, value: object) -> Launch:
        """Return what :meth:`to_json` wrote; raise ValueError naming the member that is not valid."""
        return schema.load(cls, _FIELDS, value, "launch")


def of_this_process() -> Launch | None:
    """Return what the environment says; ``None`` if neither SLURM nor torchrun launched this process."""
    found: dict[str, Any] = {}
    for name, variable in _VARIABLES.items():
        value: Any = os.environ.get(variable, "")
        if int in _FIELDS[name].types:
            value = int(value) if re.fullmatch("[0-9]{1,10}", value) else None
        if value is not None and _FIELDS[name].accepts(value):
            found[name] = value
    if found.get("run_id") == "none":
        del found["run_id"]
    if "slurm_job_id" not in found:
        found = {name: value for name, value in found.items() if not name.startswith("slurm_")}
    elif "SLURM_RESTART_COUNT" not in os.environ:
        found["slurm_restart_count"] = 0
    return Launch(**found) if found else None
