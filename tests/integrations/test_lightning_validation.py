"""Whether Lightning's trainer can validate on request, and what counts its validations; on stand-ins.

The validation itself is tested in ``test_lightning``, in the real trainer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from forgather_control.integrations.lightning_validation import evaluation_counter, no_evaluation


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


def trainer(*callbacks: Any, plateau: bool = False, checkpoints: tuple[Any, ...] = ()) -> Any:
    """What is read of a trainer."""
    return SimpleNamespace(
        callbacks=[*callbacks, *checkpoints], checkpoint_callbacks=list(checkpoints),
        lr_scheduler_configs=[SimpleNamespace(reduce_on_plateau=plateau)],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (trainer(), None),
        (trainer(Callback(), Stateful(), Watching()), None),
        (trainer(Callback(), EarlyStopping()), "EarlyStopping"),
        (trainer(Mine()), "Mine"),
        (trainer(Counting()), "Counting"),
        (trainer(checkpoints=(Counting(),)), None),
        (trainer(plateau=True), "ReduceLROnPlateau"),
    ],
)
def test_what_counts_validations(made, wanted):
    """Schedulers that step by metrics, EarlyStopping, and callbacks with a state that act on validations."""
    assert evaluation_counter(made) == wanted


def test_whether_it_can_validate():
    """As the trainer says."""
    assert no_evaluation(SimpleNamespace(enable_validation=True)) is None
    assert "validation" in str(no_evaluation(SimpleNamespace(enable_validation=False)))
