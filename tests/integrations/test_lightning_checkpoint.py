"""Where Lightning's trainer saves on request, and when such a checkpoint is complete; on stand-ins of the trainer.

The saves themselves are tested in ``test_lightning``, in the real one.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forgather_control.integrations import lightning_checkpoint
from forgather_control.integrations.lightning_checkpoint import exists, saves_by_itself, saves_in_background, write


class Strategy(SimpleNamespace):
    """A strategy of one rank; ``others`` is whether all other ranks could save."""

    def __init__(self, others: bool = True, **more: Any) -> None:
        super().__init__(others=others, calls=[], **more)

    def broadcast(self, value: Any) -> Any:
        return value

    def barrier(self, name: str) -> None:
        self.calls.append(name)

    def reduce_boolean_decision(self, decision: bool) -> bool:
        return decision and self.others


def trainer(root: Path, **more: Any) -> Any:
    """What is read of a trainer."""
    made = SimpleNamespace(
        default_root_dir=str(root), global_step=7, is_global_zero=True, checkpoint_callbacks=[], loggers=[],
        strategy=Strategy(), fast_dev_run=False,
    )  # fmt: skip
    made.save_checkpoint = lambda path, weights_only: (Path(path).parent.mkdir(exist_ok=True), Path(path).touch())
    vars(made).update(more)
    return made


def test_a_name_that_is_taken_gets_a_version(tmp_path):
    """Nothing is overwritten; a link that leads nowhere is taken, too."""
    one = trainer(tmp_path)
    assert write(one) == (str(tmp_path / "checkpoints" / "control-step=7.ckpt"), None)
    (tmp_path / "checkpoints" / "control-step=7-v1.ckpt").symlink_to("/nowhere")
    assert write(one)[0].endswith("control-step=7-v2.ckpt")


@pytest.mark.parametrize(
    ("more", "folder"),
    [
        ({"checkpoint_callbacks": [SimpleNamespace(dirpath=None), SimpleNamespace(dirpath="/models")]}, "/models"),
        ({"loggers": [SimpleNamespace(save_dir="/logs", name="run", version=3)]}, "/logs/run/version_3/checkpoints"),
        ({"loggers": [SimpleNamespace(save_dir=None, name="run", version="x")]}, "ROOT/run/x/checkpoints"),
        ({"loggers": [SimpleNamespace()]}, "ROOT/checkpoints"),
        ({"default_root_dir": "s3://bucket/run"}, "s3://bucket/run/checkpoints"),
    ],
)
def test_the_folder(tmp_path, more, folder):
    """ModelCheckpoint's directory, else the logger's; a logger that raises costs nothing but its folder."""
    one = trainer(tmp_path, **more, save_checkpoint=lambda path, weights_only: None)
    assert write(one) == (f"{folder.replace('ROOT', str(tmp_path))}/control-step=7.ckpt", None)


def test_a_rank_that_cannot_save_meets_the_others(tmp_path):
    """It goes to the barrier in which they wait, and says why; and it hears of their trouble."""

    def fail(path: str, weights_only: bool) -> None:
        raise OSError(28, "No space left on device")

    one = trainer(tmp_path, save_checkpoint=fail)
    assert "No space left" in write(one)[1] and one.strategy.calls == ["Trainer.save_checkpoint"]
    other = trainer(tmp_path, strategy=Strategy(others=False))
    assert write(other)[1] == "another rank could not save its part" and other.strategy.calls == []


def test_what_is_there(tmp_path):
    """A file is looked for; a remote path counts at once."""
    assert exists("gs://bucket/x.ckpt") and not exists(str(tmp_path / "x.ckpt"))
    (tmp_path / "x.ckpt").touch()
    assert exists(str(tmp_path / "x.ckpt")) and lightning_checkpoint.exists(str(tmp_path))


def test_a_save_in_the_background():
    """An asynchronous writer is found below a plugin that wraps it."""

    class AsyncCheckpointIO:
        checkpoint_io = None

    class Special(AsyncCheckpointIO):
        pass

    for writer, wanted in ((Special(), True), (SimpleNamespace(checkpoint_io=Special()), True), (object(), False)):
        assert saves_in_background(SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=writer))) is wanted
    assert not saves_in_background(SimpleNamespace(strategy=object()))


@pytest.mark.parametrize(
    ("kinds", "wanted"),
    [
        ([], False),
        ([{"save_top_k": 0}], False),
        ([{"save_top_k": 0, "save_last": True}], True),
        ([{"save_top_k": 1}], True),
        ([{}], True),
    ],
)
def test_whether_the_trainer_saves_by_itself(tmp_path, kinds, wanted):
    """A ModelCheckpoint that keeps something, and not in a quick test of the script."""
    one = trainer(tmp_path, checkpoint_callbacks=[SimpleNamespace(**kind) for kind in kinds])
    assert saves_by_itself(one) is wanted
    one.fast_dev_run = True
    assert not saves_by_itself(one)
