"""What Lightning's loops and callbacks do under the strategy is what they do on one device."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jobs
import modules
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from pool import Pool
from test_refusals import refused
from torch import Tensor

pytestmark = pytest.mark.dist
LENGTH = 24


class Scheduled(modules.Shallow):
    """A learning rate that falls with every step, and validation of two sets."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        loss, _ = self.loss(batch)
        self.log("val_loss", loss, batch_size=batch["ids"].shape[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1 * self.lr)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Worse(Scheduled):
    """Validation gets worse with every epoch."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch)[0] * 0 + self.current_epoch)


class Writes(modules.HFLlama):
    """Writes some tokens while it is validated."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr, layers=1)
        self.written: list[list[int]] = []

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(input_ids=batch["ids"], labels=batch["labels"]).loss)
        tokens = self.model.generate(batch["ids"][:1, :5], max_new_tokens=4, do_sample=False)
        self.written.append(tokens.flatten().tolist())


class Order(Callback):
    """In which order hooks are called, with which batch numbers."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(("train", trainer.current_epoch, batch_idx, int(batch["ids"][0, 0])))

    def on_validation_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.seen.append(("validate", trainer.sanity_checking, batch_idx, dataloader_idx))


def run(world: int, module: str, callbacks: list[str], directory: str, **options: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "order": Order,
        "recorder": jobs.Recorder,
        "early": lambda: EarlyStopping("val_loss", patience=1),
        "swa": lambda: StochasticWeightAveraging(5e-3, swa_epoch_start=1, annealing_epochs=1),
        "ema": lambda: EMAWeightAveraging(decay=0.5),
        "finder": lambda: LearningRateFinder(num_training_steps=24, update_attr=True),
        "rate": LearningRateMonitor,
        "bar": RichProgressBar,
        "timer": lambda: Timer({"seconds": 0}),
    }
    built = {name: made[name]() for name in callbacks}
    own = {"logger": CSVLogger(directory)} if options.pop("logs", False) else {}
    sharding = options.pop("sharding", "auto")
    bars = {"enable_progress_bar": True} if "bar" in callbacks else {}
    strategy = None if world == 1 else {"parameter_sharding": sharding}
    settings = {"max_epochs": 2, "default_root_dir": directory, **options, **own, **bars}
    trainer = jobs.trainer_of(strategy, world, list(built.values()), **settings)
    trained: Any = globals()[module]()
    train, held_out = modules.loader(8, LENGTH), [modules.loader(3, LENGTH, 1), modules.loader(2, LENGTH, 2)]
    trainer.fit(trained, train, held_out if module == "Scheduled" else held_out[0])
    return {
        "order": getattr(built.get("order"), "seen", None),
        "curve": getattr(built.get("recorder"), "curve", None),
        "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "weights": {name: value.detach().numpy().copy() for name, value in trained.state_dict().items()},
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "lr": trained.lr,
        "written": getattr(trained, "written", None),
    }


def compare(pool: Pool, tmp_path: Path, module: str, callbacks: list[str], **options: Any) -> dict[str, Any]:
    (one,) = pool.run(run, 1, 1, module, callbacks, str(tmp_path / "one"), **options)
    for got in pool.run(run, 2, 2, module, callbacks, str(tmp_path / "two"), **options):
        for name in ("order", "epochs", "steps", "written"):
            assert got[name] == one[name], name
        assert got["lr"] == pytest.approx(one["lr"], rel=1e-6)
        assert got["logged"] == pytest.approx(one["logged"], rel=2e-6, abs=1e-6)
        for step, want in zip(got["curve"] or [], one["curve"] or [], strict=True):
            assert step == pytest.approx(want, rel=2e-6, abs=1e-6)
        for name, weight in one["weights"].items():
            assert np.allclose(got["weights"][name], weight, rtol=1e-4, atol=1e-5), name
    return one


LIMITS = {"limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 2, "val_check_interval": 2}


@pytest.mark.parametrize(
    "options", [LIMITS, {"overfit_batches": 1, "max_epochs": 3, "accumulate_grad_batches": 2}], ids=["limits", "overfit"]
)
def test_loops(pool: Pool, tmp_path: Path, options: dict[str, Any]) -> None:
    """Sanity check, limits, several sets, validation within an epoch, overfitting, schedulers, monitors, bars and profilers."""
    callbacks = ["order", "recorder", "rate", "bar"]
    one = compare(pool, tmp_path, "Scheduled", callbacks, logs=True, profiler="simple", **options)
    assert len(one["order"]) > 4
    rows = [(tmp_path / where / "lightning_logs/version_0/metrics.csv").read_text().splitlines() for where in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) > 2
    assert rows[0][0] == rows[1][0]


def test_early_stopping(pool: Pool, tmp_path: Path) -> None:
    assert compare(pool, tmp_path, "Worse", ["early"], max_epochs=6)["epochs"] < 4


@pytest.mark.parametrize("averaging", ["swa", "ema"])
def test_averaged_weights(pool: Pool, tmp_path: Path, averaging: str) -> None:
    one = compare(pool, tmp_path, "Scheduled", [averaging, "recorder"], max_epochs=3)
    plain = pool.run(run, 1, 1, "Scheduled", ["recorder"], str(tmp_path), max_epochs=3)[0]
    assert any(not np.allclose(one["weights"][name], weight) for name, weight in plain["weights"].items())


def test_averaged_weights_are_whole(pool: Pool, tmp_path: Path) -> None:
    message = refused(pool, functools.partial(run, sharding="full"), 2, "Scheduled", ["ema"], str(tmp_path))
    assert "EMAWeightAveraging keeps whole copies of parameters" in message
    assert "parameter_sharding='replicate' or 'auto'" in message


def test_learning_rate_finder(pool: Pool, tmp_path: Path) -> None:
    one = compare(pool, tmp_path, "Scheduled", ["finder"], max_epochs=6)
    assert one["lr"] != 1e-2


def test_time_limit(pool: Pool, tmp_path: Path) -> None:
    """All ranks stop at the same step."""
    assert compare(pool, tmp_path, "Scheduled", ["timer", "order"])["steps"] <= 1


def test_writes_tokens_while_it_is_validated(pool: Pool, tmp_path: Path) -> None:
    """A loop over steps of one token cuts the step; it gives what one device gives."""
    one = compare(pool, tmp_path, "Writes", [], max_epochs=1, limit_val_batches=2)
    assert len(one["written"]) == 2
    assert all(len(tokens) == 9 for tokens in one["written"])
