"""The status of a job in Python: a dictionary with attributes, whose types are those of the wire's schema."""

from __future__ import annotations

import json
import math

import pytest

from forgather_control import get_job_status
from forgather_control.errors import InternalError
from forgather_control.wire import schemas
from forgather_control.wire.job_status import JobStatus

from ..support.harness import running_loop

SCHEMA = schemas.results()["JobStatus"]
#: The words of JSON Schema for what each annotation allows.
TYPES = {
    "int": {"integer"},
    "float": {"number", "string"},
    "str": {"string"},
    "bool": {"boolean"},
    "NoneType": {"null"},
    "list": {"array"},
    "dict": {"object"},
}


def words(annotation):
    """The JSON types of an annotation."""
    parts = getattr(annotation, "__args__", [annotation]) if "|" in str(annotation) else [annotation]
    names = [getattr(getattr(part, "__origin__", part), "__name__", "str") for part in parts]
    return set().union(*(TYPES.get(name, {"string"}) for name in names))


def test_every_member_has_its_type():
    """No more and no fewer than the schema has."""
    assert list(JobStatus.__annotations__) == list(SCHEMA["properties"])
    for name, schema in SCHEMA["properties"].items():
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        assert set(kinds) <= words(JobStatus.__annotations__[name]), name


def test_a_real_one(jobs_dir):
    """It is the dictionary of the wire, with attributes."""
    with running_loop("run", max_steps=10**6):
        status = get_job_status("run")
    assert isinstance(status, JobStatus) and json.loads(json.dumps(status)) == status
    assert status.job_id == status["job_id"] == "run" and status.global_step >= 0 and status.max_steps == 10**6
    assert repr(status) == f"<JobStatus run: {status.status}, step {status.global_step} of 1000000>"
    assert f"<tr><th>pid</th><td>{status.pid}</td></tr>" in status._repr_html_()


def test_what_is_not_finite_and_what_is_missing():
    """A number is a number as an attribute; what was not sent is no attribute."""
    status = JobStatus({"epoch": "NaN", "eta_seconds": "Infinity", "job_id": "NaN", "metrics": {"loss": "NaN"}})
    assert math.isnan(status.epoch) and status.eta_seconds == math.inf and status.job_id == "NaN"
    assert status["epoch"] == "NaN" and status.metrics == {"loss": "NaN"} and not hasattr(status, "rules")
    with pytest.raises(AttributeError, match="the job sent no 'stop_saves' in its status"):
        _ = status.stop_saves


def test_a_table_escapes_what_a_job_sends():
    """In names and in values."""
    shown = JobStatus({"job_id": "<script>", "metrics": {"<b>": 1}, "rules": [], "commands": [{}, {}]})._repr_html_()
    assert "<script>" not in shown and "<b>" not in shown and "&lt;script&gt;" in shown
    assert "<th>commands</th><td>2</td>" in shown and "rules" not in shown


@pytest.mark.parametrize("value", [None, [], "x", 5])
def test_what_is_no_status(value):
    """It is the other side's error."""
    with pytest.raises(InternalError, match="the other side sent no status"):
        JobStatus.from_json(value)
