"""Who launched this process, and for which time: what SLURM and torchrun say in its environment.

Floor 0: imports nothing of ours. Runs on any thread, in the client and in the job.

SLURM's variables are those of sbatch(1), "OUTPUT ENVIRONMENT VARIABLES". ``SLURM_RESTART_COUNT`` is
set only once a job has been restarted or requeued, which keeps its id; each task of an array has an
id of its own and is called ARRAY_TASK by squeue(1). torchrun's are set in
``torch/distributed/elastic/agent/server/local_elastic_agent.py`` (``_start_workers``) and described
in ``torch/distributed/run.py``, where an unnamed run is called "none".

The environment is the user's: what is not as these pages say is left out, one variable at a time.
"""

from __future__ import annotations

import os
import re
from typing import Any, Final, NamedTuple

#: Numbers are ids and counts of at most ten digits.
_MOST: Final = 10**10
#: Longest text; a list of nodes is bracketed (``node[001-512]``), an id is short.
_LONGEST: Final = {"run_id": 256, "slurm_cluster": 256, "slurm_nodes": 4096}

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


class Launch(NamedTuple):
    """What the launchers of one process say of it. ``None`` where they say nothing (credible).

    Attributes:
        slurm_restart_count: how often SLURM has begun the job anew; 0 the first time.
        run_id: what torchrun calls the run (``--rdzv-id``); ``None`` for its default, "none".
        restart_count: how often torchrun has begun the workers anew; 0 the first time.
    """

    slurm_job_id: int | None = None
    slurm_array_job_id: int | None = None
    slurm_array_task_id: int | None = None
    slurm_restart_count: int | None = None
    slurm_cluster: str | None = None
    slurm_nodes: str | None = None
    run_id: str | None = None
    restart_count: int | None = None
    max_restarts: int | None = None

    @property
    def names(self) -> frozenset[str]:
        """What a person may call it: the SLURM job (of an array: ``123_4``, too, or all of ``123``), torchrun's run."""
        found = {str(number) for number in (self.slurm_job_id, self.slurm_array_job_id) if number is not None}
        if self.slurm_array_job_id is not None and self.slurm_array_task_id is not None:
            found.add(f"{self.slurm_array_job_id}_{self.slurm_array_task_id}")
        return frozenset(found if self.run_id is None else {*found, self.run_id})

    def follows(self, earlier: Launch) -> bool:
        """Whether a launcher has begun ``earlier`` anew as this one, having ended it before.

        The same id and a higher count are the proof. SLURM's word stands above torchrun's, which
        counts from 0 again in a requeued job; and what runs in two SLURM jobs is not one run,
        though somebody may have given both one ``--rdzv-id``.
        """
        if (self.slurm_cluster, self.slurm_job_id) != (earlier.slurm_cluster, earlier.slurm_job_id):
            return False
        if self.slurm_job_id is not None and self.slurm_restart_count != earlier.slurm_restart_count:
            return _more(self.slurm_restart_count, earlier.slurm_restart_count)
        same_run = self.run_id is not None and self.run_id == earlier.run_id
        return same_run and _more(self.restart_count, earlier.restart_count)

    def to_json(self) -> dict[str, Any]:
        """The object that ``endpoint.json`` holds: what is known."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    @classmethod
    def from_json(cls, value: object) -> Launch:
        """What :meth:`to_json` gave; members that a later version adds are left out.

        Raises:
            ValueError: which member is not what it should be.
        """
        if not isinstance(value, dict):
            raise ValueError(f"launch must be an object or null, not {ascii(value)[:80]}")
        for name in cls._fields:
            if value.get(name) is not None and not _is_good(name, value[name]):
                what = "printable text" if name in _LONGEST else "a whole number"
                raise ValueError(f"launch.{name} must be {what}, not {ascii(value[name])[:80]}")
        return cls(**{name: value[name] for name in cls._fields if name in value})


def _more(one: int | None, other: int | None) -> bool:
    return one is not None and other is not None and one > other


def of_this_process() -> Launch | None:
    """What the environment says; ``None`` if neither SLURM nor torchrun launched this process."""
    found: dict[str, Any] = {}
    for name, variable in _VARIABLES.items():
        text = os.environ.get(variable)
        if text is not None and _is_good(name, value := text if name in _LONGEST else _number(text)):
            found[name] = value
    if found.get("run_id") == "none":
        del found["run_id"]
    if "slurm_job_id" not in found:
        found = {name: value for name, value in found.items() if not name.startswith("slurm_")}
    elif "SLURM_RESTART_COUNT" not in os.environ:
        found["slurm_restart_count"] = 0
    return Launch(**found) if found else None


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,10}", text) else None


def _is_good(name: str, value: object) -> bool:
    if name in _LONGEST:
        return isinstance(value, str) and 0 < len(value) <= _LONGEST[name] and value.isprintable()
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST
