"""One rank fails: all end, with the same message about it, and the last checkpoint is whole."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import jobs
import modules
import pool
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_autosp import AutoSPStrategy, faults

pytestmark = pytest.mark.dist

TIMEOUT_S = 15
"""Of the process groups, where a rank hangs."""
AT = 2
"""The step in which the last rank fails; after two checkpoints."""


class Data(modules.Tokens):
    """The last rank's loader fails at its last batch but one."""

    def __init__(self, fault: str) -> None:
        super().__init__(16, 32)
        self.fault = fault

    def __getitem__(self, index: int) -> Any:
        if index == 2 * AT and _is_last():
            if self.fault == "loses its worker":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault == "cannot load in a worker":
                raise ValueError("no such sample")
        return super().__getitem__(index)


def _is_last() -> bool:
    return int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


class Faulty(modules.Base):
    def __init__(self, fault: str = "") -> None:
        super().__init__()
        self.fault = fault
        self.table, self.head = nn.Embedding(modules.VOCABULARY, 4), nn.Linear(4, modules.VOCABULARY)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == AT and _is_last():
            if self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.fault in ("raises in a hook", "raises, and would save"):
                raise ValueError("something of the user's")
            if self.fault == "hangs":
                time.sleep(600)  # the line that is named

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.fault == "raises in the step" and batch_idx == AT and _is_last():
            raise ValueError("something of the user's")
        return F.cross_entropy(self.head(self.table(batch["ids"])).flatten(0, 1), batch["labels"].flatten())


def fit(fault: str, strategy: dict[str, Any], directory: str) -> None:
    faults.GRACE = faults.MEET = 3.0
    rank, world = os.environ["RANK"], int(os.environ["WORLD_SIZE"])
    with Path(directory, f"{rank}.err").open("w") as file:
        os.dup2(file.fileno(), 2)
    saver = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    strategy = {"timeout": timedelta(seconds=TIMEOUT_S if fault == "hangs" else 100), "batch_source": "replicated", **strategy}
    options = {**jobs.QUIET, "enable_checkpointing": True, "max_epochs": 1}
    callbacks = [saver, *([OnExceptionCheckpoint(directory)] if fault == "raises, and would save" else [])]
    trainer = Trainer(**options, devices=world, strategy=AutoSPStrategy(**strategy), callbacks=callbacks)
    workers = {"num_workers": 1} if "worker" in fault else {}
    try:
        trainer.fit(Faulty(fault), DataLoader(Data(fault), batch_size=2, **workers))
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise


def check_checkpoint(directory: Path) -> None:
    """The last one that was begun."""
    path = max(directory.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    module = Faulty()
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["state_dict"])
    assert state["global_step"] in (AT - 1, AT)  # a batch that is loaded ahead fails a step earlier


@pytest.mark.parametrize(
    ("fault", "blamed"),
    [
        ("dies", "{rank} ended without a word: killed, or crashed"),
        ("hangs", f"{{rank}} did not come to a collective that others wait in. It is at {__file__}:"),
        ("raises in the step", "{rank} failed (train, step 2): RuntimeError: training_step goes another way on this rank than on"),
        ("raises in a hook", "{rank} failed (train, step 2): ValueError: something of the user's (at " + __file__),
        (
            "raises, and would save",
            "No checkpoint is saved, which takes all ranks. {rank} failed (train, step 2): ValueError: something of",
        ),
        ("loses its worker", "{rank} failed (train, step 1): RuntimeError: DataLoader worker (pid(s) "),
        ("cannot load in a worker", "ValueError: no such sample (at " + __file__),
    ],
)
def test_all_ranks_end_and_name_the_one(fault: str, blamed: str, tmp_path: Path) -> None:
    # Groups of two, in one case: their limits are others than the default group's.
    data = 2 if fault == "hangs" else 1
    outcomes = pool.ended(fit, 2 * data, fault, {"data_parallel_size": data}, str(tmp_path), timeout=120)
    said = [(tmp_path / f"{rank}.err").read_text() for rank in range(2 * data)]
    last = 2 * data - 1
    assert all(code not in (0, None) for code, _ in outcomes), (outcomes, said)
    for rank, text in enumerate(said):
        if rank != last:
            assert blamed.format(rank=f"Rank {last}") in text, (rank, text)
        elif fault != "dies":
            assert blamed.partition("): ")[2].partition(" (at")[0] in text, (rank, text)
        if fault == "raises in the step":
            assert 'raised exception ValueError("something of the user\'s")' in text
    check_checkpoint(tmp_path)


# Preemption.


class Preempted(Faulty):
    def __init__(self, directory: str) -> None:
        super().__init__()
        self.directory = directory

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == AT:
            Path(self.directory, f"{self.global_rank}.pid").write_text(str(os.getpid()))
        if batch_idx >= AT:
            time.sleep(0.02)


def fit_until_told(directory: str) -> None:
    saver = ModelCheckpoint(directory, filename="{step}", save_on_exception=True, every_n_train_steps=10**6)
    options = {**jobs.QUIET, "enable_checkpointing": True, "max_epochs": -1}
    strategy = AutoSPStrategy(timeout=timedelta(seconds=60))
    trainer = Trainer(**options, devices=2, strategy=strategy, callbacks=[saver])
    trainer.fit(Preempted(directory), modules.loader(800, 32))


@pytest.mark.parametrize("ranks", [(1,), (1, 0)])
def test_sigterm_saves_and_ends(ranks: tuple[int, ...], tmp_path: Path) -> None:
    """Whichever ranks are told, and wherever that interrupts them."""

    def tell() -> None:
        files = [tmp_path / f"{rank}.pid" for rank in ranks]
        while not all(file.exists() and file.read_text() for file in files):
            time.sleep(0.02)
        for file in files:
            time.sleep(0.03)
            os.kill(int(file.read_text()), signal.SIGTERM)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    outcomes = pool.ended(fit_until_told, 2, str(tmp_path), timeout=150)
    teller.join(timeout=10)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    (path,) = tmp_path.glob("*.ckpt")
    state = torch.load(path, weights_only=True)
    Faulty().load_state_dict(state["state_dict"])
    assert state["global_step"] > AT


# Losses that are no number.


class Uncertain(modules.Base):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch["frames"]).flatten(0, 1), batch["labels"].flatten())


def fit_not_finite(what: str) -> list[str]:
    frames, labels = torch.randn(2, 8, 4), torch.zeros(2, 8, dtype=torch.long)
    if what == "frames":
        frames[1, 6, 2] = torch.inf
    else:
        labels.fill_(-100)
    samples = [{"frames": frame, "labels": label} for frame, label in zip(frames, labels, strict=True)]
    trainer = Trainer(**jobs.QUIET, max_epochs=1, devices=2, strategy=AutoSPStrategy())
    trainer.fit(Uncertain(), DataLoader(samples, batch_size=2))
    return trainer.strategy.report.notes


@pytest.mark.parametrize(
    ("what", "where"),
    [
        (
            "frames",
            "the batch['frames'] has 1 value(s) that are not finite, the first at [1, 6, 2], position 6 of the sequence, "
            "in the part of sequence rank 1",
        ),
        ("labels", "every element of the batch['labels'] is -100, which losses ignore"),
    ],
)
def test_a_loss_that_is_no_number_is_reported(what: str, where: str, pool: Any) -> None:
    for rank, notes in enumerate(pool.run(fit_not_finite, 2, what)):
        (note,) = (note for note in notes if note.startswith("the loss is "))
        assert note == f"the loss is nan in step 0 on rank {rank} (sequence group 0): {where}"
