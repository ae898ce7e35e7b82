"""Each recipe of docs/stacks.md trains with the real stack, is found, saved and stopped.

Only in ``tox -e stacks``, ``tox -e transformers4`` and ``tox -e oldest``, which install the stacks.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from forgather_control import graceful_stop, list_jobs, save_checkpoint

from ..support.harness import ROOT, needs_version
from .recipes import END, Training, block, write

pytestmark = [pytest.mark.stacks, pytest.mark.timeout(400)]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1")
PLAIN = ("--mixed_precision=no", "--dynamo_backend=no")


class Recipe(NamedTuple):
    """A recipe: its job, the files of a whole checkpoint (none: it is a file), and how it is started."""

    job_id: str
    files: tuple[str, ...] = ()
    ranks: int = 1
    launcher: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


RECIPES = {
    "transformers": Recipe("llama", ("model.safetensors", "trainer_state.json")),
    "trl": Recipe("sft", ("adapter_model.safetensors", "trainer_state.json"), needs=("trl", "peft")),
    "sentence_transformers": Recipe("sentences", ("modules.json", "trainer_state.json")),
    "accelerate": Recipe(
        *("accelerated", ("random_states_0.pkl", "random_states_1.pkl", "model.safetensors"), 2),
        (*ACCELERATE, *PLAIN),
    ),
    "fsdp2": Recipe("sharded", (".metadata", "__0_0.distcp", "__1_0.distcp"), 2, TORCHRUN, needs=("torch",)),
    "fsdp2_async": Recipe("sharded", (".metadata", "__0_0.distcp", "__1_0.distcp"), 2, TORCHRUN, needs=("torch",)),
    "ray": Recipe("on_ray", ("model.pt",), 2),
    "submitit": Recipe("submitted"),
    "fabric": Recipe("fabric", ranks=2, needs=("lightning",)),
    "cli": Recipe("from_yaml", arguments=("fit", "--config=config.yaml"), needs=("lightning", "jsonargparse")),
    "keras": Recipe("keras"),
    "ignite": Recipe("ignite"),
    "fastai": Recipe("fastai"),
    "composer": Recipe("composer"),
}


#: What some need beside the packages.
MARKS = dict.fromkeys(("fsdp2", "fsdp2_async"), needs_version("torch", "2.7", "it shards no model over Gloo"))


def test_every_recipe_of_the_page_is_run():
    """Each block that is marked as a stack is one of the list, and the other way round."""
    marked = re.findall(r"^<!-- test: stack, (\w+) -->$", (ROOT / "docs" / "stacks.md").read_text(), re.MULTILINE)
    assert {*marked} == {*RECIPES}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in RECIPES])
def test_a_recipe_is_controlled(name, tmp_path):
    """Status has steps and total; a save is whole when it is finished; a stop ends every process cleanly."""
    recipe = RECIPES[name]
    for package in recipe.needs or (name,):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    program = write(name, tmp_path)
    if name == "cli":
        (tmp_path / "config.yaml").write_text(block(name, "yaml"))
    with Training(*recipe.launcher, str(program), *recipe.arguments, cwd=tmp_path) as training:
        status = training.status(recipe.job_id)
        assert (status["max_steps"], status["world_size"]) == (100_000, recipe.ranks)
        assert [(job.job_id, job.state) for job in list_jobs()] == [(recipe.job_id, "live")]
        saved = save_checkpoint(recipe.job_id, wait="finished", timeout=END)
        assert saved.result["step"] >= status["global_step"]
        is_whole(Path(saved.result["path"]), recipe.files)
        stopped = graceful_stop(recipe.job_id, wait="finished", timeout=END)
        assert training.end() == 0
    assert list_jobs() == []
    assert stopped.result["step"] > saved.result["step"]
    is_whole(Path(stopped.result["path"]), recipe.files)


def is_whole(path: Path, files: tuple[str, ...]) -> None:
    """Assert that a checkpoint is a file with something in it, or a folder with these files."""
    if not files:
        assert path.stat().st_size > 0
    else:
        assert {*files} <= {each.name for each in path.iterdir()}
    if "trainer_state.json" in files:
        assert json.loads((path / "trainer_state.json").read_text())["global_step"] == int(path.name.split("-")[1])
