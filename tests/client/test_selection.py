"""Words that mean several jobs: ids, names of launchers, patterns, all."""

from __future__ import annotations

import json

import pytest

from forgather_control.client import selection, ssh
from forgather_control.errors import AmbiguousJob, InternalError, JobNotAnswering, JobsDirUnusable, NoSuchJob
from forgather_control.jobs import registry

from ..support.harness import job_process, running_loop
from .test_target import _launched


def names(*words, **options):
    """The ids that words mean; they must not be wrong."""
    found = selection.select(words, **options)
    assert found.problems == {}
    return [target.job_id for target in found.targets]


def put(jobs_dir, name: str, **changes) -> None:
    """A record as a job of another host, or of another time, left it."""
    (jobs_dir / name).mkdir(parents=True)
    known = {"job_id": name, "host": "elsewhere", "port": None, "pid": 1, "started_at": 1.0}
    (jobs_dir / name / "endpoint.json").write_text(json.dumps({**known, **changes}))


def test_ids_and_patterns(jobs_dir):
    """Each job once, in the order of the words; those of a pattern in the order of their ids."""
    for name in ("run2", "run1", "run10", "other"):
        put(jobs_dir, name)
    assert names("run2", "run1") == ["run2", "run1"]
    assert names("run*") == ["run1", "run10", "run2"]
    assert names("run2", "run?", "run[12]", "o*") == ["run2", "run1", "other"]
    assert names("run[!1]") == ["run2"] and names() == []


def test_words_that_mean_no_job(jobs_dir):
    """Each has its error, and the other words mean their jobs all the same."""
    for name in ("run1", "broken"):
        put(jobs_dir, name)
    (jobs_dir / "broken" / "endpoint.json").write_text("{")
    found = selection.select(["run2", "run1", "zzz*", "", "../run1", "broken"])
    assert [target.job_id for target in found.targets] == ["run1"]
    assert {word: type(err) for word, err in found.problems.items()} == dict.fromkeys(
        ("run2", "zzz*", "", "../run1", "broken"), NoSuchJob
    )
    assert "did you mean run1?" in str(found.problems["run2"])
    assert "No job matches 'zzz*'" in str(found.problems["zzz*"])
    assert all(err.data["job"] == word for word, err in found.problems.items())


def test_a_record_that_cannot_be_read_is_told(jobs_dir):
    """A pattern and ``every`` leave it out, and say why."""
    put(jobs_dir, "run1")
    put(jobs_dir, "run2")
    (jobs_dir / "run2" / "endpoint.json").write_text("{")
    for found in (selection.select(["run*"]), selection.select([], every=True)):
        assert "run2" in found.left_out and "run2" not in [target.name for target in found.targets]
    assert selection.select(["run1"]).left_out == selection.select(["*1"]).left_out == {}


def test_every_live_job(jobs_dir, monkeypatch):
    """Jobs that run here, answering or not; neither dead ones nor those of other hosts, which are named."""
    put(jobs_dir, "far")
    with running_loop("here"), job_process("dead") as dead:
        dead.kill()
        found = selection.select([], every=True)
        assert [target.job_id for target in found.targets] == ["here"]
        assert found.left_out == {"far": "it is on elsewhere and does not answer here"}
        monkeypatch.setattr(registry, "answering", lambda records, seconds: records)
        assert names(every=True) == ["far", "here"]  # it answers, for example from another container
        assert names("*") == ["dead", "far", "here"]


def test_a_slurm_array_means_all_its_tasks(monkeypatch):
    """In the order of the tasks; a task and another launcher's name mean one job."""
    array = {"SLURM_ARRAY_JOB_ID": "1200", "TORCHELASTIC_RUN_ID": "exp[1]"}
    _launched(monkeypatch, SLURM_JOB_ID="1201", SLURM_ARRAY_TASK_ID="10", **array)
    with running_loop("alpha"):
        _launched(monkeypatch, SLURM_JOB_ID="1205", SLURM_ARRAY_TASK_ID="9", **array)
        with running_loop("beta"):
            assert names("1200") == names(1200) == ["beta", "alpha"]
            assert names("1200_10", "1205") == ["alpha", "beta"]
            problem = selection.select(["exp[1]"]).problems["exp[1]"]  # the run id of two SLURM jobs
            assert isinstance(problem, AmbiguousJob) and problem.data["candidates"] == ["beta", "alpha"]
        assert names("exp[1]") == ["alpha"]


def test_a_jobs_directory_that_cannot_be_read(jobs_dir):
    """It is no fault of a word."""
    jobs_dir.write_text("")
    for ask in (lambda: selection.select(["x*"]), lambda: selection.select([], every=True)):
        with pytest.raises(JobsDirUnusable):
            ask()


ROWS = [
    {"job_id": name, "host": "elsewhere", "port": None, "pid": 1, "started_at": 1.0, "state": state}
    for name, state in (("run2", "live"), ("run1", "silent"), ("run3", "dead"), ("run4", "foreign"))
]


@pytest.fixture
def far(monkeypatch):
    """A host that is reached over ssh, and how often it was asked for its jobs."""
    asked: list[str] = []

    def list_jobs(host, timeout):
        asked.append(host)
        return json.loads(json.dumps(ROWS)), []

    monkeypatch.setattr(ssh, "list_jobs", list_jobs)
    return asked


def test_over_ssh(far):
    """Ids are looked up there, one by one; patterns and ``every`` in one list of its jobs."""
    found = selection.select(["run1", "exp"], ssh="gpu7")
    assert [(target.name, target.ssh, target.record) for target in found.targets] == [
        ("run1", "gpu7", None),
        ("exp", "gpu7", None),
    ]
    assert far == []
    assert names("run[12]", "*3", "run1", ssh="gpu7") == ["run1", "run2", "run3"] and far == ["gpu7"]
    found = selection.select([], every=True, ssh="gpu7")
    assert [target.name for target in found.targets] == ["run1", "run2"]
    assert found.left_out == {"run4": "it is on elsewhere, another host than gpu7"}
    assert "No job '12' in gpu7" in str(selection.select(["12"], ssh="gpu7").problems["12"])


def test_a_host_that_cannot_be_reached(monkeypatch):
    """It is the problem of the words that need its list."""

    def fail(host, timeout):
        raise JobNotAnswering("gpu7 cannot be reached over ssh")

    monkeypatch.setattr(ssh, "list_jobs", fail)
    found = selection.select(["run1", "x*"], ssh="gpu7")
    assert [target.name for target in found.targets] == ["run1"] and [*found.problems] == ["x*"]
    with pytest.raises(JobNotAnswering):
        selection.select([], every=True, ssh="gpu7")


def test_no_list_over_ssh(monkeypatch):
    """What the other side sends is checked."""
    monkeypatch.setattr(ssh, "list_jobs", lambda host, timeout: (None, []))
    with pytest.raises(InternalError):
        selection.select([], every=True, ssh="gpu7")
    with pytest.raises(InternalError):
        selection.select(["x*"], ssh="gpu7")
