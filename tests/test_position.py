"""A run that goes on from the middle of an epoch takes each of its samples once, on any ranks, as if it had not stopped."""

from __future__ import annotations

import multiprocessing
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from pool import Pool
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_autosp.data.position import Epoch, PositionedLoader, put_back, reordered, set_aside

SAMPLES, LENGTH = 48, 8


class Numbered(Dataset[dict[str, Tensor]]):
    """Samples that say which they are, augmented by the main process's random numbers."""

    def __init__(self, num_samples: int = SAMPLES) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(LENGTH) * (index + 1)) % 11
        return {"ids": ids, "target": torch.randn(LENGTH), "index": torch.tensor([index])}


class Small(LightningModule):
    def __init__(self, total_steps: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Embedding(11, 4), nn.Dropout(0.25), nn.Linear(4, 1))
        self.total_steps = total_steps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = (self.layers(batch["ids"]).squeeze(-1) - batch["target"]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        if self.total_steps:  # makes the loaders before the checkpoint is read
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Seen(Callback):
    def __init__(self, stop: int | None) -> None:
        self.steps: list[tuple[int, float, list[int]]] = []
        self.stop = stop

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append((trainer.current_epoch, float(outputs["loss"]), batch["index"].flatten().tolist()))
        if self.stop == trainer.global_step:
            trainer.should_stop = True


def train(
    data: int,
    sequence: int,
    directory: str,
    *,
    batch_size: int = 2,
    shuffle: bool = True,
    stop: int | None = None,
    resume: bool = False,
    epochs: int = 2,
    sharded: bool = False,
    total_steps: bool = False,
    workers: int = 0,
    source: str = "auto",
    plain: bool = False,
) -> dict[str, Any]:
    """Train on this rank; return which samples each step of its group took, and the losses."""
    torch.manual_seed(5)
    seen = Seen(stop)
    state = {"state_dict_type": "sharded"} if sharded else {}
    options = {"data_parallel_size": data, "sequence_parallel_size": sequence, "batch_source": source, **state}
    saver = ModelCheckpoint(directory, filename="last", every_n_train_steps=1, save_top_k=1, enable_version_counter=False)
    trainer = Trainer(
        **{**jobs.QUIET, "enable_checkpointing": True, "max_epochs": epochs},
        devices=data * sequence,
        strategy=jobs.strategy_of(None if plain else options),
        callbacks=[seen, saver],
    )
    if workers:
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # or it may not have any
    loader = DataLoader(Numbered(), batch_size, shuffle=shuffle, num_workers=workers)
    trainer.fit(Small(total_steps), loader, ckpt_path=f"{directory}/last.ckpt" if resume else None)
    group = 0 if plain else trainer.strategy.data_parallel_rank  # type: ignore[attr-defined]
    return {"group": group, "steps": seen.steps, "global_step": trainer.global_step}


def taken(runs: list[dict[str, Any]], epoch: int = 0) -> Counter[int]:
    """How often each sample was taken in an epoch, by all groups."""
    groups = {run["group"]: run for run in runs}
    return Counter(index for run in groups.values() for at, _, indices in run["steps"] if at == epoch for index in indices)


def losses(runs: list[dict[str, Any]]) -> list[float]:
    return [loss for _, loss, _ in runs[0]["steps"]]


def trials() -> list[Any]:
    """Sizes before and after, the batch, and the step at which it stops, in which sizes all epochs have whole steps."""
    draw, sizes, found = random.Random(11), [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (4, 1)], []
    for _ in range(20):
        (data, sequence), (data2, sequence2) = draw.choice(sizes), draw.choice(sizes)
        batch, batch2 = draw.choice([1, 2]), draw.choice([1, 2])
        steps = SAMPLES // (data * batch)
        # Some steps of the new size have to end where one of the old one does, or a sample would be left over.
        stops = [step for step in range(1, steps) if step * data * batch % (data2 * batch2) == 0]
        found.append((data, sequence, batch, data2, sequence2, batch2, draw.choice(stops), draw.random() < 0.3))
    return found


@pytest.mark.parametrize("trial", trials(), ids=str)
def test_every_sample_once(pool: Pool, trial: Any, tmp_path: Path) -> None:
    data, sequence, batch, data2, sequence2, batch2, stop, sharded = trial
    common = {"epochs": 1, "sharded": sharded}
    first = pool.run(train, data * sequence, data, sequence, str(tmp_path), batch_size=batch, stop=stop, **common)
    assert len(first[0]["steps"]) == stop
    rest = pool.run(train, data2 * sequence2, data2, sequence2, str(tmp_path), batch_size=batch2, resume=True, **common)
    assert taken(first) + taken(rest) == Counter(range(SAMPLES))
    assert rest[0]["global_step"] == stop + (SAMPLES - stop * data * batch) // (data2 * batch2)


INTERRUPTED: list[tuple[int, int, dict[str, Any]]] = [
    (1, 7, {}),
    (1, 7, {"shuffle": False, "total_steps": True}),
    (1, 7, {"source": "exchange", "epochs": 1}),
    (1, 7, {"source": "broadcast"}),
    (2, 5, {}),
    (2, 5, {"workers": 1}),
]
"""Sequence groups, the step at which it stops, options."""


@pytest.mark.parametrize(("data", "stop", "options"), INTERRUPTED, ids=str)
def test_goes_on_as_if_nothing_had_been(pool: Pool, data: int, stop: int, options: dict[str, Any], tmp_path: Path) -> None:
    """The same samples and losses to six decimals, dropout and random augmentation included, in this epoch and the next."""
    whole = pool.run(train, 2, data, 2 // data, str(tmp_path), **options)
    first = pool.run(train, 2, data, 2 // data, str(tmp_path), stop=stop, **options)
    rest = pool.run(train, 2, data, 2 // data, str(tmp_path), resume=True, **options)
    assert len(first[0]["steps"]) == stop
    for one, before, after in zip(whole, first, rest, strict=True):
        for (_, got_loss, got), (_, want_loss, want) in zip(before["steps"] + after["steps"], one["steps"], strict=True):
            assert got == want
            # Workers draw random numbers of their own; ranks that load in turn draw those of a round when it begins.
            if not options.get("workers") and options.get("source") != "exchange":
                assert got_loss == pytest.approx(want_loss, abs=1e-6)


def test_killed(pool: Pool, tmp_path: Path) -> None:
    """All ranks are killed where no checkpoint is saved; the last one is whole."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_position\n"
        "step = test_position.Small.training_step\n"
        "def training_step(self, batch, batch_idx):\n"
        "    if self.global_step == 6:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, batch, batch_idx)\n"
        "test_position.Small.training_step = training_step\n"
        f"test_position.train(1, 2, {str(tmp_path / 'killed')!r})\n"
    )
    killed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    whole = pool.run(train, 2, 1, 2, str(tmp_path / "whole"))
    rest = pool.run(train, 2, 1, 2, str(tmp_path / "killed"), resume=True)
    assert losses(rest) == pytest.approx(losses(whole)[6:], abs=1e-6)
    assert [indices for _, _, indices in rest[0]["steps"]] == [indices for _, _, indices in whole[0]["steps"][6:]]


@pytest.mark.parametrize("resumed_by_us", [True, False])
def test_plain_lightning_shares_checkpoints(pool: Pool, resumed_by_us: bool, tmp_path: Path) -> None:
    """Lightning reads ours, and begins the data anew, as it does; what it saved has no position that we could go on with."""
    pool.run(train, 1, 1, 1, str(tmp_path), stop=5, plain=resumed_by_us)
    (rest,) = pool.run(train, 1, 1, 1, str(tmp_path), resume=True, plain=not resumed_by_us)
    assert len(rest["steps"]) == 2 * SAMPLES // 2 - 5
    assert rest["global_step"] == 2 * SAMPLES // 2


def positioned(loader: DataLoader[Any], groups: int = 1, limit: float = 1.0, told: list[int] | None = None) -> PositionedLoader:
    own, order = reordered(loader, groups)
    assert order is not None
    told = [] if told is None else told
    epoch = Epoch(lambda loader: int(len(loader) * limit), lambda: True, told.append, torch.device("cpu"))
    return PositionedLoader(loader, own, order, epoch)


SAMPLERS = {
    "sequential": lambda: SequentialSampler(range(12)),
    "random": lambda: RandomSampler(range(12)),
    "replacement": lambda: RandomSampler(range(9), replacement=True, num_samples=12),
    "generator": lambda: RandomSampler(range(12), generator=torch.Generator().manual_seed(3)),
    "subset": lambda: SubsetRandomSampler(range(0, 24, 2)),
    "weighted": lambda: WeightedRandomSampler([1.0] * 20, 12, generator=torch.Generator().manual_seed(4)),
    "distributed": lambda: DistributedSampler(range(12), 1, 0, seed=2),  # type: ignore[arg-type]
    "in order": lambda: DistributedSampler(range(12), 1, 0, shuffle=False),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name: str) -> None:
    """Every sampler's order is gone on with, and is what the sampler alone would have given."""

    def make() -> DataLoader[Any]:
        return DataLoader(range(24), 2, sampler=SAMPLERS[name]())  # type: ignore[arg-type]

    torch.manual_seed(1)
    alone = [batch.tolist() for batch in make()]
    torch.manual_seed(1)
    loader = positioned(make())
    batches = iter(loader)
    first = [next(batches).tolist() for _ in range(2)]
    state = loader.state_dict()
    torch.manual_seed(77)
    again = positioned(make())
    again.load_state_dict(state)
    assert first + [batch.tolist() for batch in again] == alone
    assert len(list(again)) == len(alone)  # the next epoch is whole


def test_end_of_an_epoch_has_no_position() -> None:
    """Also of one that is limited: the next begins with its first sample."""
    loader = positioned(DataLoader(range(12), 2), limit=0.5)  # type: ignore[arg-type]
    batches = iter(loader)
    for taken_before in range(3):
        assert (loader.state_dict()["autosp"] is None) == (taken_before == 0)
        next(batches)
    assert loader.state_dict()["autosp"] is None


def test_progress_is_told_in_steps_of_the_new_size() -> None:
    """Twenty samples, fourteen behind: one step of eight is left, and so many are told to be behind that it is the last."""
    loader = positioned(DataLoader(range(20), 2))  # type: ignore[arg-type]
    batches = iter(loader)
    for _ in range(7):
        next(batches)
    told: list[int] = []
    other = positioned(DataLoader(range(20), 8), told=told)  # type: ignore[arg-type]
    other.load_state_dict(loader.state_dict())
    assert told == [2]
    assert [batch.tolist() for batch in other] == [list(range(14, 20))]


def test_what_cannot_be_gone_on_with() -> None:
    loader = positioned(DataLoader(range(12), 2, sampler=SubsetRandomSampler(range(12))))  # type: ignore[arg-type]
    next(iter(loader))
    state = loader.state_dict()
    with pytest.raises(ValueError, match="12 samples, and there are 14"):
        positioned(DataLoader(range(14), 2)).load_state_dict(state)  # type: ignore[arg-type]
    other = positioned(DataLoader(range(12), 2))  # type: ignore[arg-type]
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="drawn \\(subset\\).*SequentialSampler"):
        list(other)
    several = positioned(DataLoader(range(12), 3))  # type: ignore[arg-type]
    several._epoch = several._epoch._replace(alone=lambda: False)
    with pytest.raises(ValueError, match="2 samples a step, and there are 3"):
        several.load_state_dict(state)


def test_loaders_that_stay_as_they_are() -> None:
    class Backwards(BatchSampler): ...

    dealt = DistributedSampler(range(8), 4, 0)  # type: ignore[arg-type]
    for loader in (
        DataLoader(range(8), batch_sampler=Backwards(SequentialSampler(range(8)), 2, False)),  # type: ignore[arg-type]
        DataLoader(range(8), sampler=[3, 1]),  # type: ignore[arg-type]
        DataLoader(range(8), sampler=dealt),  # type: ignore[arg-type]
        [1, 2],
    ):
        same, order = reordered(loader, 2)
        assert same is loader
        assert order is None


def test_positions_lie_where_plain_lightning_does_not_look() -> None:
    states = [{"theirs": 1}, {"autosp": None}, {"theirs": 2}, {"autosp": {"samples": 3}}]
    checkpoint = {"loops": {"fit_loop": {"state_dict": {"combined_loader": list(states)}}}}
    set_aside(checkpoint)
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"theirs": 1}, {"theirs": 2}]
    put_back(checkpoint)
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] == states
