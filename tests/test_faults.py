"""One rank fails: all end, with the same message about it, and the last checkpoint is whole."""

from __future__ import annotations

import os
import signal
import subprocess
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


SCRIPT = """
import os, signal
from lightning.pytorch import Trainer
import lightning_autosp, modules

class Killed(modules.Shallow):
    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
Trainer(**options, accelerator="cpu", devices=2, strategy="autosp", max_epochs=1).fit(Killed(), modules.loader(8, 16))
"""


def test_a_script_says_why_before_its_processes_are_killed(tmp_path: Path) -> None:
    """Lightning's launcher would kill rank 0 within five seconds of rank 1's end, while it finds out which rank does not answer."""
    (tmp_path / "train.py").write_text(SCRIPT)
    known = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(known), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "train.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 1, ran.stderr[-3000:]
    assert "Rank 1 ended without a word: killed, or crashed." in ran.stderr


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


class Root(modules.Base):
    """Of token 7, a number is taken the root of that is negative."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(modules.VOCABULARY, 3), nn.Linear(3, 5)
        self.what, self.calls, self.drop = what, 0, nn.Dropout(0.1)
        with torch.no_grad():
            self.table.weight.fill_(1.0)
            self.table.weight[7, 2] = -1.0 if what == "nan" else 0.0

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.calls += 1
        rows = self.table(batch["ids"])
        hidden = rows.sqrt() if self.what == "nan" else rows.reciprocal()
        return self.head(hidden).square().mean() + self.drop(rows).mean()


def fit_root(what: str, strategy: dict[str, Any]) -> tuple[list[str], int, Tensor]:
    ids = torch.ones(4, 17, dtype=torch.long)
    ids[1, 12] = 7
    trainer = Trainer(**jobs.QUIET, max_epochs=1, max_steps=1, devices=2, strategy=AutoSPStrategy(**strategy))
    module = Root(what)
    trainer.fit(module, DataLoader([{"ids": one} for one in ids], batch_size=4 // strategy.get("data_parallel_size", 1)))
    notes = [note for note in trainer.strategy.report.notes if note.startswith("the loss is")]
    return notes, module.calls, torch.get_rng_state()


def line_of(text: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"{__file__}:{next(number for number, line in enumerate(lines, 1) if text in line)}"


@pytest.mark.parametrize(("what", "name", "operator"), [("nan", "NaN", "sqrt"), ("inf", "infinite value", "reciprocal")])
def test_where_in_a_step_a_loss_is_no_longer_a_number(what: str, name: str, operator: str, pool: Any) -> None:
    """Looked for in the step's program, run once more, of which nothing stays."""
    runs = pool.run(fit_root, 2, what, {})
    for rank, (notes, calls, state) in enumerate(runs):
        assert calls == 1
        assert torch.equal(state, runs[0][2])
        assert notes == [
            f"the loss is {what} in step 0 on rank {rank} (sequence group 0): the first {name} comes from aten.{operator}.default "
            f"at {line_of('rows.sqrt() if')}, element [1, 12, 2], on rank 1 (positions 9 to 16), position 12 of the sequence, "
            "where the batch['ids'] is 7"
        ]


def test_of_several_groups_that_which_has_it_says_so(pool: Any) -> None:
    runs = pool.run(fit_root, 2, "nan", {"data_parallel_size": 2})
    assert sorted(len(notes) for notes, *_ in runs) == [0, 1]
    (note,) = (note for notes, *_ in runs for note in notes)
    assert "comes from aten.sqrt.default at" in note
    assert ", 12, 2]" in note
