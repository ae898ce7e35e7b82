"""The settings of Lightning's real Trainer."""

from __future__ import annotations

import math
from typing import Any

import pytest

from forgather_control import connect, get_job_status

from ..support.harness import needs_lightning, needs_torch, needs_version
from .test_lightning import (  # noqa: F401
    JOB,
    STEPS,
    At,
    BareOptimizer,
    Callback,
    Endless,
    Tiny,
    TwoOptimizers,
    Watcher,
    fit,
    hang_up,
    make,
    ours,
    quiet,
    same,
    warnings,
    weights,
)

try:
    import torch
    from lightning.pytorch.callbacks import StochasticWeightAveraging
    from torch.optim import lr_scheduler as made
except ImportError:  # every test here is skipped then
    pass

pytestmark = [needs_torch, needs_lightning, pytest.mark.filterwarnings("ignore")]


def change(step: int, **changes: Any) -> At:
    """Change settings at a step."""
    return At(step, "change_settings", changes=changes)


def effective(at: At) -> dict[str, Any]:
    """What is in force after a change; the test fails if it failed."""
    record = at.record()
    assert record["state"] == "finished", record
    return {name: value["effective"] for name, value in record["result"].items()}


def refusal(at: At) -> str:
    """Why it was not made."""
    record = at.record()
    assert record["state"] == "failed", record
    return str(record["error"]["message"])


class Scheduled(Tiny):
    """With two parameter groups and a schedule; makes more of a model than one bias."""

    def __init__(self, interval: str = "step", scheduler: Any = None) -> None:
        super().__init__(dropout=0.0)
        self.interval = interval
        self.scheduler = scheduler or (lambda optimizer: made.CosineAnnealingLR(optimizer, 20, eta_min=1e-3))

    def configure_optimizers(self) -> Any:
        groups = [{"params": [self.line.weight], "lr": 0.1, "weight_decay": 0.2}, {"params": [self.line.bias]}]
        optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
        return [optimizer], [{"scheduler": self.scheduler(optimizer), "interval": self.interval}]


def multiply(trainer: Any, factor: float) -> None:
    """Do by code of the script's what a client asks for."""
    (config,), (optimizer,) = trainer.lr_scheduler_configs, trainer.optimizers
    for group in optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    config.scheduler.base_lrs = [rate * factor for rate in config.scheduler.base_lrs]
    config.scheduler.eta_min *= factor


def at_step(step: int, call: Any) -> Watcher:
    """Call a function at the end of a step."""
    return Watcher(on_train_batch_end=lambda trainer: call(trainer) if trainer.global_step == step else None)


def test_what_there_is(tmp_path):
    """Every setting, with its value and a sentence."""
    seen: list[Any] = []

    def look(trainer: Any) -> None:
        with connect(JOB) as client:
            seen.append(client.call("list_settings"))

    fit(make(tmp_path, at_step(2, look), ours()), Scheduled(), validate=True)
    (listed,) = seen
    assert {each["name"]: each["value"] for each in listed} == {
        "learning_rate": 0.1,
        "weight_decay": 0.2,
        "max_grad_norm": 0.0,
        "logging_steps": 50,
        "eval_steps": 5,
        "max_steps": STEPS,
    }
    assert all(each["doc"].endswith(".") for each in listed)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_learning_rate_as_if_built_in(tmp_path, interval):
    """The weights are those of a script that does it by itself, also where the scheduler steps per epoch."""
    at = change(4, learning_rate="x0.25")
    one = fit(make(tmp_path / "one", at, ours()), Scheduled(interval))
    other = fit(make(tmp_path / "other", at_step(4, lambda trainer: multiply(trainer, 0.25))), Scheduled(interval))
    assert same(weights(one), weights(other)) and effective(at)["learning_rate"] < 0.026
    plain = fit(make(tmp_path / "plain"), Scheduled(interval))
    assert not same(weights(one), weights(plain))


@needs_version("lightning", "2.5", "a fit() that is resumed within an epoch repeats a batch")
def test_learning_rate_survives_a_resume(tmp_path):
    """Resumed from a checkpoint after the change, training goes on with it, to the same weights."""
    at, save = change(3, learning_rate="x0.5"), At(6, "save_checkpoint")
    one = fit(make(tmp_path / "one", at, save, ours()), Scheduled())
    path, rates = save.record()["result"]["path"], []
    look = at_step(7, lambda trainer: rates.append(trainer.optimizers[0].param_groups[1]["lr"]))
    other = fit(make(tmp_path / "other", look, ours()), Scheduled(), ckpt_path=path)
    assert same(weights(one), weights(other)) and effective(at)
    assert rates == pytest.approx([5e-4 + (0.01 - 5e-4) * (1 + math.cos(math.pi * 7 / 20)) / 2])


def test_a_resumed_run_names_earlier_changes(tmp_path, caplog):
    """In one line, with what is in force now; so does one that is resumed from that."""
    at, save = change(3, max_grad_norm=2, learning_rate="x0.5"), At(6, "save_checkpoint")
    trainer = make(tmp_path / "one", at, save, ours())
    fit(trainer)
    path, line = (
        save.record()["result"]["path"],
        (
            "Training is resumed from a checkpoint after changes of its settings: "
            "learning_rate was set to 0.05, and is 0.05 now; max_grad_norm was set to 2.0, and is 0.0 now."
        ),
    )
    assert warnings(caplog) == [] and torch.load(path)["forgather_control"]
    save = At(8, "save_checkpoint")
    fit(make(tmp_path / "other", save, ours()), ckpt_path=path)
    assert warnings(caplog) == [line]
    fit(make(tmp_path / "third", ours()), ckpt_path=save.record()["result"]["path"])
    assert warnings(caplog) == [line] * 2
    fit(make(tmp_path / "fourth", save, ours()))
    assert len(warnings(caplog)) == 2 and "forgather_control" not in torch.load(make_plain(tmp_path))


def make_plain(out: Any) -> Any:
    """The path of a checkpoint of a run without changes."""
    save = At(2, "save_checkpoint")
    fit(make(out / "plain", save, ours()))
    return save.record()["result"]["path"]


def test_several_optimizers(tmp_path):
    """All are multiplied by the factor of the first."""
    at, seen = change(4, learning_rate=0.05), []
    rates = at_step(8, lambda trainer: seen.extend(each.param_groups[0]["lr"] for each in trainer.optimizers))
    fit(make(tmp_path, at, rates, ours()), TwoOptimizers())
    assert effective(at) == {"learning_rate": 0.05} and seen == [0.05, 0.005]


def test_weight_averaging(tmp_path):
    """Its rates for later are multiplied, too, and those that it has in force by then."""
    early, late, seen = change(2, learning_rate="x0.5"), change(7, learning_rate="x0.5"), {}
    averaging = StochasticWeightAveraging(swa_lrs=0.04, swa_epoch_start=1, annealing_epochs=1)
    look = Watcher(
        on_train_batch_end=lambda trainer: seen.update({trainer.global_step: trainer.optimizers[0].param_groups[0]})
    )
    trainer = make(tmp_path, early, late, ours(), look, averaging, max_epochs=4)
    fit(trainer)
    assert effective(early) and late.record()["result"]["learning_rate"]["old"] == pytest.approx(0.04 / 2)
    assert seen[15]["lr"] == pytest.approx(0.04 / 4) == seen[15]["swa_lr"]


def test_a_scheduler_that_would_overwrite_it(tmp_path):
    """Is named; as is one that the trainer does not know, in a module that steps it by itself."""

    class Absolute(made.LRScheduler):
        def get_lr(self) -> list[float]:
            return [0.1 / (self.last_epoch + 1)] * len(self.base_lrs)

    at = change(4, learning_rate=0.05)
    fit(make(tmp_path, at, ours()), Scheduled(scheduler=Absolute))
    assert "the scheduler Absolute would overwrite it" in refusal(at)

    class Hidden(Tiny):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            self.mine = made.StepLR(optimizer, 3)
            return optimizer

    at = change(4, learning_rate=0.05)
    fit(make(tmp_path, at, ours()), Hidden())
    assert "a scheduler that is not known to this job steps the rates of SGD" in refusal(at)


def test_max_grad_norm(tmp_path):
    """Gradients are clipped to it from the next step on; 0 clips none."""
    ats, seen = [change(2, max_grad_norm=1e-3), change(4, max_grad_norm=0)], {}

    class Norms(Tiny):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            if self.line.weight.grad is not None:
                squares = sum(float(weight.grad.pow(2).sum()) for weight in self.parameters())
                seen.setdefault(self.global_step, math.sqrt(squares))

    fit(make(tmp_path, *ats, ours()), Norms(dropout=0.0))
    assert [effective(at)["max_grad_norm"] for at in ats] == [1e-3, 0.0]
    small = [step for step, norm in seen.items() if norm <= 1.01e-3]
    assert len(small) == 2 and max(seen.values()) > 0.1


class ClipsItself(Tiny):
    """Decides by itself."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")


@pytest.mark.parametrize(
    ("model", "options", "changes", "words"),
    [
        (Tiny, {}, {"max_steps": 4}, "step 4 is finished already; stop ends training now"),
        (Tiny, {}, {"max_steps": 11}, "training ends with max_epochs=2, at step 10"),
        (Tiny, {"gradient_clip_val": 1, "gradient_clip_algorithm": "value"}, {"max_grad_norm": 2}, "clipped by value"),
        (ClipsItself, {}, {"max_grad_norm": 2}, "the module clips gradients by itself (configure_gradient_clipping)"),
        (TwoOptimizers, {}, {"max_grad_norm": 2}, "automatic_optimization is False"),
        (TwoOptimizers, {"max_steps": 8}, {"max_steps": 9}, "it is not known how many steps max_epochs=2 are"),
        (Tiny, {}, {"eval_steps": 6}, "batches are counted within an epoch, which has 5"),
        (Tiny, {"barebones": True}, {"logging_steps": 2}, "the trainer is barebones, and logs nothing"),
    ],
)
def test_refused(tmp_path, model, options, changes, words):
    """In words, and nothing breaks."""
    at = change(4, **changes)
    if "barebones" in options:
        options = dict.fromkeys(
            ("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False
        )
        options["barebones"] = True
    trainer = make(tmp_path, at, ours(), **options)
    fit(trainer, model(), validate=True)
    assert words in refusal(at) and trainer.global_step >= options.get("max_steps", STEPS)


def test_where_steps_are_not_counted(tmp_path):
    """The end could never be reached."""
    at = change(0, max_steps=6)
    fit(make(tmp_path, at, ours()), BareOptimizer())
    assert "does not count the steps of these optimizers (global_step)" in refusal(at)


def test_a_fused_optimizer_with_mixed_precision(tmp_path):
    """Lightning would raise into training."""

    class Fused(Tiny):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1, fused=True)

    at = change(4, max_grad_norm=1)
    trainer = make(tmp_path, at, ours(), precision="bf16-mixed")
    fit(trainer, Fused())
    assert "a fused optimizer cannot be clipped with mixed precision" in refusal(at) and trainer.global_step == STEPS


def test_periods(tmp_path):
    """Logs and validations follow the new ones, in steps where gradients are accumulated."""
    at = change(3, logging_steps=2, eval_steps=2)
    trainer = make(tmp_path, at, ours(), log_every_n_steps=1, max_epochs=1, accumulate_grad_batches=2)
    model = fit(trainer, Tiny(), validate=True, batches=20)
    assert effective(at) == {"logging_steps": 2, "eval_steps": 2} and trainer.log_every_n_steps == 2
    assert model.evaluated == [4, 6, 8, 10]


def test_periods_across_epochs(tmp_path):
    """Where batches are counted across epochs, a period may be longer than one."""
    at = change(3, eval_steps=7)
    model = fit(make(tmp_path, at, ours(), check_val_every_n_epoch=None, val_check_interval=2), Tiny(), validate=True)
    assert effective(at) == {"eval_steps": 7} and model.evaluated == [2, 7]


@pytest.mark.parametrize(
    ("options", "end", "wanted"),
    [({}, 10, 7), ({"max_steps": 7}, 7, 10), ({"max_epochs": -1, "max_steps": 6}, 6, 13), ({"max_steps": 8}, 8, 6)],
)
def test_max_steps(tmp_path, options, end, wanted):
    """Earlier or later, as far as the trainer goes; progress follows, and the schedule is named."""
    at, seen = change(4, max_steps=wanted), {}

    def look(trainer: Any) -> None:
        found = get_job_status(JOB)
        seen[trainer.global_step] = (found["max_steps"], found["progress"])

    trainer = make(tmp_path, at, ours(), Watcher(on_train_batch_start=look), **options)
    fit(trainer, Scheduled())
    assert trainer.global_step == wanted
    assert seen[3] == (end, 3 / end) and seen[4] == (wanted, 4 / wanted)
    (result,) = at.record()["result"].values()
    assert (result["old"], result["new"], result["effective"]) == (end, wanted, wanted)
    assert result["note"] == "the schedule of the learning rate keeps its shape: CosineAnnealingLR has T_max=20"


def test_max_steps_of_a_run_without_an_end(tmp_path):
    """It gets one."""
    at = change(4, max_steps=6)
    trainer = make(tmp_path, at, ours(), max_epochs=-1)
    trainer.fit(Tiny(), torch.utils.data.DataLoader(Endless(), batch_size=2))
    assert at.record()["result"]["max_steps"]["old"] == -1 and trainer.global_step == 6


def test_a_trainer_whose_callback_is_gone_is_not_kept(tmp_path):
    """Settings hold no trainer."""
    import gc
    import weakref

    class Mark(Callback):
        pass

    mark = Mark()
    fit(make(tmp_path, mark, ours()), Scheduled())
    gone = weakref.ref(mark)
    del mark
    gc.collect()
    assert gone() is None
