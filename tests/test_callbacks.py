"""Throughput counts every sequence once, and what the model does, not what saving memory adds."""

from __future__ import annotations

from typing import Any

import jobs
import modules
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ThroughputMonitor as LightningThroughputMonitor
from lightning.pytorch.loggers import Logger
from pool import Pool

from lightning_autosp import ThroughputMonitor

BATCH, LENGTH = 2, 65
SHAPES = [(1, 1, "none", True), (3, 1, "full", True), (2, 2, "auto", False)]


class Kept(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    name, version = "kept", 0  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(dict(metrics))


def throughput(
    strategy: dict[str, Any] | None, world_size: int, *, ours: bool, tile_elements: int | None = None
) -> dict[str, float]:
    """Train some steps; return what was logged last of throughput, and the rates of time and of batches it has to agree with."""
    from lightning_autosp.attention import tiles

    tiles.TILE_ELEMENTS = tile_elements or tiles.TILE_ELEMENTS
    kept, lengths = Kept(), {"batch_size_fn": lambda batch: len(batch["ids"]), "length_fn": lambda batch: batch["ids"].numel()}
    monitor = ThroughputMonitor(window_size=4) if ours else LightningThroughputMonitor(**lengths, window_size=4)
    options = {**jobs.QUIET, "logger": kept, "log_every_n_steps": 1, "max_steps": 6}
    trainer = Trainer(**options, devices=world_size, strategy=jobs.strategy_of(strategy), callbacks=[monitor])
    trainer.fit(modules.GPT(), modules.loader(24, LENGTH, BATCH))
    rows = [row for row in kept.rows if "train/device/batches_per_sec" in row]
    assert rows or not trainer.is_global_zero
    return {name.removeprefix("train/"): value for name, value in (rows or [{}])[-1].items()}


def model_flops(samples: int, positions: int) -> int:
    """Of products and attention of `modules.GPT`, forward and backward, from its sizes."""
    width, tokens = modules.WIDTH, samples * positions
    products = 2 * tokens * (2 * 12 * width * width + width * modules.VOCABULARY)
    scores = 2 * samples * positions * positions * width
    # PyTorch's count of attention: two products forward; five backward, of which one computes the scores again.
    return 3 * products + 2 * (2 + 5) * scores


@pytest.mark.parametrize(("ranks", "groups", "policy", "ours"), SHAPES)
def test_counted_once(pool: Pool, ranks: int, groups: int, policy: str, ours: bool) -> None:
    """Rates of all ranks are those of a device times their number; operations are the model's, computed from its sizes."""
    options = {"sequence_parallel_size": ranks, "data_parallel_size": groups, "checkpoint_policy": policy}
    tile = {"tile_elements": 2048} if policy == "full" else {}
    found = pool.run(throughput, ranks * groups, options, ranks * groups, ours=ours, **tile)[0]
    steps = found["device/batches_per_sec"] * ranks
    if ranks * groups > 1:
        assert found["batches_per_sec"] == pytest.approx(steps * groups)
        assert found["samples_per_sec"] == pytest.approx(steps * groups * BATCH)
        assert found["items_per_sec"] == pytest.approx(steps * groups * BATCH * LENGTH)
    assert found["device/items_per_sec"] == pytest.approx(steps * BATCH * LENGTH / ranks)
    if ours:
        assert found["memory/predicted_bytes"] > 0
        assert found["device/flops_per_sec"] / found["device/batches_per_sec"] == pytest.approx(model_flops(BATCH, LENGTH - 1))


def test_other_strategies_are_refused() -> None:
    trainer = Trainer(**jobs.QUIET, devices=1, max_steps=1, callbacks=[ThroughputMonitor()])
    with pytest.raises(TypeError, match="SingleDeviceStrategy"):
        trainer.fit(modules.GPT(), modules.loader(2, 16))


def test_batches_without_a_sequence() -> None:
    monitor = ThroughputMonitor()
    with pytest.raises(ValueError, match="batch_size_fn and length_fn"):
        monitor.batch_size_fn({"ids": torch.zeros(3)})
