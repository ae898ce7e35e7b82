"""Checkpoints and validations that Lightning's trainer makes on request, on stand-ins of the trainer.

The saves and the validations themselves are tested in ``test_lightning``, in the real one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from forgather_control.errors import CommandFailed
from forgather_control.integrations.lightning_trainer import (
    background_save,
    disable,
    evaluation_counter,
    no_evaluation,
    override,
    saves_by_itself,
    write,
)

from ..support.harness import SOON


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


class AsyncCheckpointIO:
    """Saves on a thread of its own, as Lightning's plugin of this name."""

    checkpoint_io = None

    def __init__(self, error: Exception | None = None, **executor: Any) -> None:
        self._error = error
        vars(self).update(executor)


def background(writer: Any) -> Any:
    """What is known of a save by this writer."""
    return background_save(SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=writer)))


def test_a_save_in_the_background():
    """The future is done after what the writer does, with its error; the writer may be below a plugin that wraps it."""
    release = Event()
    for error in (None, OSError(28, "No space left on device")):
        release.clear()
        with ThreadPoolExecutor(1) as executor:
            executor.submit(release.wait, SOON)
            future = background(SimpleNamespace(checkpoint_io=AsyncCheckpointIO(error, _executor=executor)))
            assert not future.done()
            release.set()
            assert future.exception(SOON) is error


def test_what_is_no_save_in_the_background():
    """Other writers, and another rank's; of a writer that does not tell when it is done, nothing is known."""
    assert background(object()) is background(AsyncCheckpointIO(_executor=None)) is None
    assert background_save(SimpleNamespace(strategy=object())) is None
    with pytest.raises(CommandFailed, match="it is unknown"):
        background(AsyncCheckpointIO()).result(SOON)


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


# Validations...


class Callback:
    """Lightning's own, as far as it is looked at."""

    def on_validation_end(self) -> None: ...
    def on_validation_start(self) -> None: ...
    def on_validation_epoch_start(self) -> None: ...
    def on_validation_epoch_end(self) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}


class EarlyStopping(Callback):
    """Counts, and says so by its name."""

    def state_dict(self) -> dict[str, Any]:
        return {"wait_count": 0}


class Mine(EarlyStopping):
    """A user's own kind of it."""


class Stateful(Callback):
    """Has a state that validations do not change."""

    def state_dict(self) -> dict[str, Any]:
        return {"steps": 1}


class Counting(Stateful):
    """Has a state, and acts on validations."""

    def on_validation_end(self) -> None: ...


class Watching(Callback):
    """Acts on validations, without a state."""

    def on_validation_end(self) -> None: ...


def validating(*callbacks: Any, plateau: bool = False, checkpoints: tuple[Any, ...] = ()) -> Any:
    """What is read of a trainer."""
    return SimpleNamespace(
        callbacks=[*callbacks, *checkpoints], checkpoint_callbacks=list(checkpoints),
        lr_scheduler_configs=[SimpleNamespace(reduce_on_plateau=plateau)],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (validating(), None),
        (validating(Callback(), Stateful(), Watching()), None),
        (validating(Callback(), EarlyStopping()), "EarlyStopping"),
        (validating(Mine()), "Mine"),
        (validating(Counting()), "Counting"),
        (validating(checkpoints=(Counting(),)), None),
        (validating(plateau=True), "ReduceLROnPlateau"),
    ],
)
def test_what_counts_validations(made, wanted):
    """Schedulers that step by metrics, EarlyStopping, and callbacks with a state that act on validations."""
    assert evaluation_counter(made) == wanted


def test_whether_it_can_validate():
    """As the trainer says."""
    assert no_evaluation(SimpleNamespace(enable_validation=True)) is None
    assert "validation" in str(no_evaluation(SimpleNamespace(enable_validation=False)))


# Attributes set in other objects and set back...


class Owner:
    """Has an attribute of its class and one of its own."""

    of_class = 1

    def __init__(self) -> None:
        self.own = 2


def test_all_is_as_before():
    """The object's own attribute, the class's and a new one, each set twice."""
    owner, until = Owner(), ExitStack()
    for value in (10, 20):
        for name in ("own", "of_class", "new"):
            override(until, owner, name, value)
    assert vars(owner) == {"own": 20, "of_class": 20, "new": 20}
    until.close()
    assert vars(owner) == {"own": 2} and owner.of_class == 1
    owner.own = 3
    until.close()
    assert owner.own == 3


def test_one_name_can_stay():
    """What is disabled twice stays so until the outer one ends."""
    one, outer, inner = Callback(), ExitStack(), ExitStack()
    disable(outer, one, "state_dict")
    disable(inner, one, "state")
    disable(inner, one, "on_validation")
    assert one.state_dict() is None and len(vars(one)) == 5
    inner.close()
    assert one.state_dict() is None and len(vars(one)) == 1
    outer.close()
    assert one.state_dict() == {} and vars(one) == {}


def test_objects_that_cannot_be_set_are_left():
    """No attributes, or none that can be written: nothing happens, then or at the end."""
    until = ExitStack()
    for owner in (object(), 1, property()):
        override(until, owner, "new", 1)
    until.close()
