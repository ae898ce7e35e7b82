"""What launched a job: variables are read where they are valid, and a restart is distinguished from another run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

import forgather_control
from forgather_control import errors
from forgather_control.client import api
from forgather_control.client.target import find
from forgather_control.jobs.record import read_record
from forgather_control.processes import launcher
from forgather_control.processes.launcher import Launch

from ..support.harness import SOON, needs_torch, running_loop, until

#: As SLURM and torchrun set it: task 4 of the array 120, which is job 124, requeued twice.
WORLD = {
    "SLURM_JOB_ID": "124",
    "SLURM_ARRAY_JOB_ID": "120",
    "SLURM_ARRAY_TASK_ID": "4",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_CLUSTER_NAME": "alps",
    "SLURM_JOB_NODELIST": "node[001-512,600]",
    "TORCHELASTIC_RUN_ID": "my run",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_MAX_RESTARTS": "3",
}
ALL = Launch(124, 120, 4, 2, "alps", "node[001-512,600]", "my run", 1, 3)


@pytest.fixture
def environment(monkeypatch):
    """Sets these variables of the launchers, and removes the others."""

    def put(**variables):
        for variable in WORLD:
            monkeypatch.delenv(variable, raising=False)
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)

    put()
    return put


# What the environment says...


def test_all_variables_are_read(environment):
    """Each variable has its member; without any of them there is no launcher."""
    assert launcher.of_this_process() is None
    environment(**WORLD)
    assert launcher.of_this_process() == ALL


def test_a_first_launch_counts_from_zero(environment):
    """SLURM sets no restart count before the first restart; torchrun's unnamed run has no name."""
    environment(SLURM_JOB_ID="7", TORCHELASTIC_RUN_ID="none", TORCHELASTIC_RESTART_COUNT="0")
    assert launcher.of_this_process() == Launch(slurm_job_id=7, slurm_restart_count=0, restart_count=0)
    environment(TORCHELASTIC_RUN_ID="none")
    assert launcher.of_this_process() is None


@pytest.mark.parametrize(
    "value",
    ["", " ", "-1", "+1", "1_0", "1.0", "1e3", "0x10", "٣", "four", "1\n", "1" * 11, "9" * 5000, "\x1b[2J", "\udcff"],
    ids=lambda value: ascii(value)[:20],
)
@pytest.mark.parametrize("name", [name for name, field in launcher._FIELDS.items() if int in field.types])
def test_what_is_not_a_number_is_left_out(environment, name, value):
    """Nonsense in one variable costs that variable, and raises nothing."""
    environment(**{**WORLD, launcher._VARIABLES[name]: value})
    expected = ALL._replace(**{name: None})
    if name == "slurm_job_id":  # without it the rest of SLURM's has no meaning
        expected = Launch(run_id="my run", restart_count=1, max_restarts=3)
    assert launcher.of_this_process() == expected


@pytest.mark.parametrize("value", ["", "a\nb", "\x1b[2J", "a\x7f", "\udcff", "x" * 5000], ids=lambda v: ascii(v)[:20])
@pytest.mark.parametrize("name", [name for name, field in launcher._FIELDS.items() if str in field.types])
def test_text_that_does_not_print_is_left_out(environment, name, value):
    """So is very long text: it would appear in every list."""
    environment(**{**WORLD, launcher._VARIABLES[name]: value})
    assert launcher.of_this_process() == ALL._replace(**{name: None})


def test_the_longest_are_kept(environment):
    """The limits are the last values that pass."""
    environment(SLURM_JOB_ID="9999999999", TORCHELASTIC_RUN_ID="x" * 256, SLURM_JOB_NODELIST="n" * 4096)
    found = launcher.of_this_process()
    assert (found.slurm_job_id, len(found.run_id), len(found.slurm_nodes)) == (9999999999, 256, 4096)
    assert Launch.from_json(json.loads(json.dumps(found.to_json()))) == found


# Records...


def test_it_survives_a_record():
    """What is unknown is not written; what a later version adds is not read."""
    assert Launch.from_json(json.loads(json.dumps(ALL.to_json()))) == ALL
    assert Launch(run_id="r").to_json() == {"run_id": "r"}
    assert Launch.from_json({"run_id": "r", "kubernetes": {"pod": 1}, "slurm_job_id": None}) == Launch(run_id="r")


@pytest.mark.parametrize(
    "value",
    [
        *(["x"], "x", 5, True),
        *({"slurm_job_id": bad} for bad in ("7", True, 7.0, -1, 10**10, [7])),
        *({"run_id": bad} for bad in (7, "", "a\n", "\ud800", "\x1b[2J", "x" * 257, ["r"], {"r": 1})),
        *({"slurm_nodes": bad} for bad in (["node"], "x" * 4097)),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_an_invalid_one_is_a_value_error(value):
    """Each says which member and what was expected, briefly and printably."""
    with pytest.raises(ValueError, match=r"^(\w+ of )?launch must be ") as caught:
        Launch.from_json(value)
    assert len(str(caught.value)) < 200 and str(caught.value).isprintable() and str(caught.value).isascii()


def test_names():
    """The SLURM job's own number, the task as squeue shows it, the whole array, torchrun's run."""
    assert ALL.names == {"124", "120", "120_4", "my run"}
    assert Launch(slurm_job_id=7, slurm_restart_count=0).names == {"7"}
    assert Launch(restart_count=1, slurm_array_task_id=4).names == set()


FIRST = Launch(slurm_job_id=7, slurm_restart_count=1, slurm_cluster="alps", run_id="r", restart_count=1)


@pytest.mark.parametrize(
    ("later", "follows"),
    [
        ({}, False),
        ({"restart_count": 2}, True),
        ({"restart_count": 0}, False),
        ({"restart_count": None}, False),
        ({"restart_count": 2, "run_id": "s"}, False),
        ({"restart_count": 2, "run_id": None}, False),
        ({"slurm_restart_count": 2, "restart_count": 0}, True),
        ({"slurm_restart_count": 2, "restart_count": 0, "run_id": "s"}, True),
        ({"slurm_restart_count": 2, "run_id": None, "restart_count": None}, True),
        ({"slurm_restart_count": 0, "restart_count": 9}, False),
        ({"slurm_restart_count": None, "restart_count": 9}, False),
        ({"slurm_restart_count": 2, "slurm_job_id": 8}, False),
        ({"slurm_restart_count": 2, "slurm_cluster": "other"}, False),
        ({"restart_count": 2, "slurm_job_id": 8}, False),
        ({"restart_count": 2, "slurm_job_id": None, "slurm_restart_count": None, "slurm_cluster": None}, False),
    ],
)
def test_which_run_restarts_another(later, follows):
    """One id, a higher count; SLURM's count before torchrun's; never the other way round as well."""
    second = FIRST._replace(**later)
    assert second.follows(FIRST) == follows
    assert not (follows and FIRST.follows(second))


def test_without_a_name_or_a_launcher_nothing_follows():
    """torchrun's unnamed runs are not one run, whatever they count."""
    assert not Launch(restart_count=1).follows(Launch(restart_count=0))
    assert Launch(run_id="r", restart_count=1).follows(Launch(run_id="r", restart_count=0))
    assert not Launch().follows(Launch())


# Jobs...


def test_a_job_publishes_its_launch(environment, jobs_dir):
    """It is in endpoint.json and in the list; without a launcher it is null in both."""
    environment(**WORLD)
    with running_loop("one"):
        assert read_record(str(jobs_dir), "one").launch == ALL
        (job,) = forgather_control.list_jobs()
        assert json.loads(json.dumps(job.to_json()))["launch"] == ALL.to_json() and job.launch == ALL
    environment()
    with running_loop("two"):
        assert json.loads((jobs_dir / "two" / "endpoint.json").read_text())["launch"] is None
        assert forgather_control.list_jobs()[0].to_json()["launch"] is None


#: A worker of torchrun; it does not need torch itself.
WORKER = """
import os, sys, time
from forgather_control import TrainingJob

with TrainingJob(job_id="job", max_steps=100_000) as job:
    for step in range(1, 100_001):
        time.sleep(float(sys.argv[1]) if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 0.01)
        job.step(step)
        if job.should_stop:
            break
"""


@needs_torch
def test_torchrun_restarts_a_job(environment, jobs_dir, tmp_path):
    """A worker is killed: a waiting client gets an error at once; the successor has the id and its restart count."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--max-restarts=1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--rdzv-id=the-run"]
    command += ["--monitor-interval=0.1", str(tmp_path / "worker.py"), str(SOON)]
    errors_seen: list[str] = []

    def wait() -> None:
        try:
            forgather_control.save_checkpoint("the-run", wait="finished", command_id="mine")
        except errors.JobDead as err:
            errors_seen.append(str(err))

    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as torchrun:
        try:
            first = until(lambda: read_record(str(jobs_dir), "job"), 3 * SOON)
            assert (first.launch.run_id, first.launch.restart_count, first.launch.max_restarts) == ("the-run", 0, 1)
            until(lambda: forgather_control.list_jobs()[0].state == "live")
            waiter = threading.Thread(target=wait)
            waiter.start()
            until(lambda: api.get_job_status("job")["commands"])
            with forgather_control.connect("job") as open_since:
                os.kill(first.pid, signal.SIGKILL)
                waiter.join(SOON)
                assert errors_seen and f"pid {first.pid} on {first.host}, ended before it answered" in errors_seen[0]
                second = until(lambda: (r := read_record(str(jobs_dir), "job")) and r.pid != first.pid and r, 3 * SOON)
                assert find("the-run") == second and second.launch.restart_count == 1
                with pytest.raises(errors.JobDead, match=rf"restarted as pid {second.pid} on .*, restart 1, "):
                    open_since.call("ping")
            forgather_control.graceful_stop("the-run", wait="finished", timeout=SOON)
            assert torchrun.wait(3 * SOON) == 0
        finally:
            torchrun.terminate()  # it ends its worker, which has a session of its own
            torchrun.wait(3 * SOON)


@pytest.mark.parametrize(
    ("launch", "name"),
    [
        (Launch(slurm_job_id=7, slurm_restart_count=3), "7"),
        (Launch(slurm_job_id=7, slurm_cluster="alps"), "alps_7"),
        (Launch(slurm_job_id=7, slurm_array_job_id=5, slurm_array_task_id=0), "5_0"),
        (Launch(run_id="my run", restart_count=2), "my run"),
        (Launch(slurm_job_id=7, run_id="r"), "7_r"),
        (Launch(restart_count=2), None),
        (Launch(), None),
    ],
)
def test_the_name_that_a_restart_keeps(launch, name):
    """No count and no node is in it."""
    assert launch.stable_name == name
