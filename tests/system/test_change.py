"""A running job is changed: settings, pauses and own commands of real ranks, at one step, and exactly."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest

from forgather_control import CommandRefused, connect

from ..support.harness import SOON, cli, needs_lightning, needs_torch, needs_transformers, until
from ..support.torchrun import START, Torchrun

pytestmark = needs_torch

#: Seconds after which a collective of the ranks fails where a pause is to outlast that, and elsewhere.
GROUP_TIMEOUT, LONG = 5.0, 600.0


class Ranks:
    """A plain loop on some ranks under torchrun, and a client of it."""

    def __init__(self, folder, size, timeout=LONG):
        self.folder, self.size = folder, size
        self.torchrun = Torchrun("-m", "tests.support.ranks_change", str(folder), str(timeout), ranks=size)

    def __enter__(self):
        self.torchrun.__enter__()
        until(lambda: cli("status", "changed").returncode == 0, START)
        self.client = connect("changed")
        self.torchrun.until(lambda: self.status()["global_step"] > 0)
        return self

    def __exit__(self, *error):
        self.client.close()
        self.torchrun.__exit__(*error)

    def status(self):
        """How far it is."""
        return self.client.call("status")

    def do(self, command, **params):
        """Give a command; its record, once it is finished."""
        return self.client.call(command, wait="finished", timeout=START, **params)

    def pause(self):
        """Hold all ranks; the step at which they hold."""
        step = self.do("pause")["applied_at_step"]
        until(lambda: self.status()["status"] == "paused")
        return step

    def end(self):
        """Stop it; what each rank says."""
        self.do("graceful_stop")
        assert self.torchrun.end(START) == 0
        return [json.loads((self.folder / f"rank-{rank}.json").read_text()) for rank in range(self.size)]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_pause_outlasts_the_time_out_of_the_process_group(tmp_path, jobs_dir, size):
    """All ranks hold at one step, commands work, and the weights are those of a run without a pause."""
    with Ranks(tmp_path, size, GROUP_TIMEOUT) as ranks:
        step = ranks.pause()
        assert ranks.do("change_settings", changes={"rate": "x0.5"})["applied_at_step"] == step
        assert ranks.do("user.add", a=1, b=2)["result"] == {"value": 3}
        assert ranks.do("save_checkpoint")["result"]["path"] == str(tmp_path / "checkpoint")
        until(lambda: ranks.status()["seconds_since_step"] > 1.5 * GROUP_TIMEOUT)
        assert ranks.status()["status"] == "paused" and ranks.status()["global_step"] <= step + 1
        states = {row["step"] for row in ranks.client.call("ranks")}
        assert len(states) == 1
        ranks.do("resume")
        ranks.torchrun.until(lambda: ranks.status()["global_step"] > step + 10)
        said = ranks.end()
    assert said == [said[0]] * size and said[0]["same"] and said[0]["changes"] == [step]


def test_two_ranks_are_changed_all_or_none(tmp_path, jobs_dir):
    """In one run, as it takes long to start: its weights are those of a run that had all changes built in."""
    with Ranks(tmp_path, 2) as ranks:
        changes = [read_back(ranks), ruled(ranks)]
        refused_by_one(ranks)
        disagreeing(ranks)
        profiled(ranks)
        changes += two_clients(ranks)
        said = ranks.end()
    assert said == [said[0]] * 2 and said[0]["same"] and said[0]["changes"] == changes
    assert said[0]["rates"] == [2.5e-4, 5e-4, 1e-3, 2e-3]  # of no step what one rank refused


def read_back(ranks):
    """A change is made at one step."""
    record = ranks.do("change_settings", changes={"rate": 2e-3}, reason="faster")
    assert record["result"] == {"rate": {"old": 1e-3, "new": 2e-3, "effective": 2e-3}}
    return record["applied_at_step"]


def ruled(ranks):
    """A rule's command is as any other."""
    assert cli("when", "changed", "step >= 1", "set", "rate=x0.5").returncode == 0
    until(lambda: {record["state"] for record in ranks.client.call("list_commands")} == {"finished"})
    record = ranks.client.call("list_commands")[-1]
    assert record["requested_by"]["via"] == "rule" and record["result"]["rate"]["effective"] == 1e-3
    return record["applied_at_step"]


def refused_by_one(ranks):
    """The setter of rank 1 raises: the error says why."""
    record = ranks.do("change_settings", changes={"rate": 0.5, "picky": 2})
    assert record["state"] == "failed" and record["error"]["message"] == (
        "rank 1: nothing was changed: picky cannot be 2.0: ValueError: rank 1 does not want it"
    )
    record = ranks.do("change_settings", changes={"stuck": 2})
    assert record["state"] == "failed" and record["error"]["message"] == (
        "rank 1 could not do it; stuck could not be restored, and may still be 2.0: OSError: no way back; "
        "rank 1: nothing was changed: stuck cannot be 2.0: ValueError: rank 1 does not want it"
    )
    with pytest.raises(CommandRefused, match=r"rate must be a number from 0"):
        ranks.do("change_settings", changes={"rate": -1})
    assert ranks.do("change_settings", changes={"picky": 0.5})["state"] == "finished"


def disagreeing(ranks):
    """The error names the values that are in force on each."""
    record = ranks.do("change_settings", changes={"rank": 3})
    assert record["error"]["message"] == "the ranks disagree: rank is 0.0 on rank 0, 1.0 on rank 1"


def profiled(ranks):
    """One trace for each rank, of the same steps."""
    record = ranks.do("profile", steps=3)
    step, result = record["applied_at_step"], record["result"]
    folder = ranks.folder / "profiles"
    assert result["paths"] == [str(folder / f"changed-step{step}-rank{rank}.json") for rank in (0, 1)]
    assert [os.stat(path).st_size for path in result["paths"]] == result["sizes"] and result["operations"]
    assert "SELF MS" in cli("profile", "changed", "--steps", "2", "--wait").stdout


def two_clients(ranks):
    """Changes of one setting at once are made one after the other, each with what the other left."""
    with connect("changed") as other:
        for client, name in ((ranks.client, "a"), (other, "b")):
            client.give("change_settings", changes={"rate": "x0.5"}, command_id=name)
        until(lambda: all(ranks.client.call("get_command", command_id=name)["state"] == "finished" for name in "ab"))
        records = [ranks.client.call("get_command", command_id=name) for name in "ab"]
    first, second = (record["result"]["rate"] for record in records)
    assert (first["old"], first["new"], second["old"], second["new"]) == (1e-3, 5e-4, 5e-4, 2.5e-4)
    return [record["applied_at_step"] for record in records]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_paused_job_that_loses_a_rank_ends_as_one_that_trains(tmp_path, jobs_dir, rank):
    """The launcher notices, and ends the others: nothing hangs."""
    with Ranks(tmp_path, 2) as ranks:
        ranks.pause()
        pids = [row["pid"] for row in ranks.client.call("ranks")]
        os.kill(pids[rank], signal.SIGKILL)
        assert ranks.torchrun.end(START) != 0


def test_a_paused_job_that_gets_sigterm_ends(tmp_path, jobs_dir):
    """As a job that trains."""
    with Ranks(tmp_path, 2) as ranks:
        ranks.pause()
        ranks.torchrun.popen.terminate()
        assert ranks.torchrun.end(START) != 0


def test_the_command_line_of_all_that(tmp_path, jobs_dir):
    """As a user types it."""
    with Ranks(tmp_path, 1) as ranks:
        assert "rate   0.001  number  0 " in cli("set").stdout
        assert "set at step" in cli("set", "rate=x2", "--wait").stdout
        assert cli("set", "changed", "rate=-1").returncode == 1
        wrong = cli("set", "changed", "rat=1")
        assert (wrong.returncode, "did you mean rate?" in wrong.stderr) == (1, True)
        assert "pause finished at step" in cli("pause", "--wait").stdout
        assert cli("run", "changed", "add", "a=2").stdout == "3\n"
        assert "changed  paused" in cli("status").stdout
        assert "resume finished" in cli("resume", "--timeout", str(SOON)).stdout
        ranks.end()


@needs_transformers
@needs_lightning
@pytest.mark.once
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [1, 2])
def test_the_learning_rate_of_ranks(tmp_path, jobs_dir, size):
    """In a plain loop and both trainers, the weights of each rank are those of a run with the same changes built in."""
    with Torchrun("-m", "tests.support.ranks_rates", str(tmp_path), ranks=size) as run:
        for name in ("plain", "hugging_face", "lightning"):
            run.until(lambda name=name: cli("status", name).returncode == 0)
            with connect(name) as client:
                run.until(lambda client=client: client.call("status")["global_step"] > 0)
                for value in ("x0.5", 0.07, "x2"):
                    record = client.command(
                        "change_settings", changes={"learning_rate": value}, wait="finished", timeout=START
                    )
                    change = record.result["learning_rate"]
                    assert 0.9 * change["new"] < change["effective"] < change["new"]  # the schedule has made a step
                client.call("graceful_stop", wait="applied")
            run.until(lambda name=name: len(re.findall(rf"^over {name} ", run.output, re.M)) == size)
        assert run.end(START) == 0
        output = run.output
    for name in ("plain", "hugging_face", "lightning"):
        said = sorted(re.findall(rf"^over {name} (\d) (.*)$", output, re.M))
        assert [rank for rank, _ in said] == ["0", "1"][:size] and len({rest for _, rest in said}) == 1
        assert said[0][1].endswith(" 3 True"), said
