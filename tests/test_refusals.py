"""Bad input: one clear error on every rank, before any collective could hang."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import jobs
import modules
import pytest
import torch
from lightning.pytorch import Trainer
from pool import JobError, Pool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional as F

from lightning_autosp import AutoSPStrategy
from lightning_autosp.mesh import resolve_sizes

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("data", "sequence", "world", "expected"),
    [("auto", "auto", 8, (1, 8)), (2, "auto", 8, (2, 4)), ("auto", 2, 8, (4, 2)), (2, 4, 8, (2, 4)), ("auto", "auto", 1, (1, 1))],
)
def test_sizes(data: Any, sequence: Any, world: int, expected: tuple[int, int]) -> None:
    assert resolve_sizes(data, sequence, world) == expected


@pytest.mark.parametrize(("data", "sequence", "world"), [(3, "auto", 8), (2, 2, 8), ("auto", 3, 4), (16, "auto", 8)])
def test_sizes_that_do_not_fit(data: Any, sequence: Any, world: int) -> None:
    with pytest.raises(ValueError, match=f"data_parallel_size={data!r} and sequence_parallel_size={sequence!r} do not fit {world}"):
        resolve_sizes(data, sequence, world)


def refused(pool: Pool, function: Any, *args: Any) -> str:
    """Run on two ranks; return the message, which both ranks have to raise alike."""
    errors = pool.outcomes(function, 2, *args)
    assert all(isinstance(error, JobError) for error in errors), errors
    assert errors[0].kind == errors[1].kind
    assert errors[0].message == errors[1].message
    return errors[0].message


class Batches(torch.utils.data.Dataset[Any]):
    """One sample many times; `other` on every rank but the first."""

    def __init__(self, sample: Any, other: Any = None) -> None:
        self.sample = other if other is not None and os.environ["RANK"] != "0" else sample

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return self.sample


class Sum(modules.Base):
    """Embeds whatever tensors it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.table(batch.long()).mean()


class Vector(Sum):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.table(batch).mean(-1)


class Detached(Sum):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx).detach()}


class Manual(Sum):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Tensors(Sum):
    """One parameter is a DTensor already."""

    def configure_model(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2,))
        self.extra = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Replicate()], run_check=False))


def fit_batches(module: type[Sum], sample: Any, other: Any = None, strategy: dict[str, Any] | None = None, **options: Any) -> None:
    trainer = Trainer(**{**jobs.QUIET, **options}, max_epochs=1, devices=2, strategy=AutoSPStrategy(**(strategy or {})))
    trainer.fit(module(), torch.utils.data.DataLoader(Batches(sample, other), batch_size=2))


class Verifying(Sum):
    """Looks at its second batch, which the strategy does not by itself."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.table(batch).mean()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 1:
            changed = batch + 1 if self.global_rank else batch
            self.trainer.strategy.verify_batch(changed)


def _verify(options: dict[str, Any]) -> None:
    trainer = Trainer(**jobs.QUIET, max_epochs=1, devices=2, strategy=AutoSPStrategy())
    trainer.fit(Verifying(), torch.utils.data.DataLoader(Batches(torch.ones(6, dtype=torch.long)), **options))


class Frozen(Sum):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


@pytest.mark.parametrize("policy", ["attention", "full"])
def test_policy_where_a_step_is_only_evaluated(pool: Pool, policy: str) -> None:
    runs = pool.run(jobs.evaluate, 2, "Shallow", {"checkpoint_policy": policy}, 2)
    assert runs[0]["validated"] == runs[1]["validated"]


class OwnData(Sum):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Batches(torch.ones(6, dtype=torch.long)), batch_size=self.batch_size)


class Unruled(Sum):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.table(batch).mean((0, 2)).logcumsumexp(0).mean()


class Distant(Sum):
    """Attends less to what is far away: numbers are added to scores."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        x, place = self.table(batch).unsqueeze(1), torch.arange(batch.shape[1])
        return F.scaled_dot_product_attention(x, x, x, -(place[:, None] - place).abs().float()).mean()


@pytest.mark.parametrize("strategy", ["'autosp'", "lightning_autosp.AutoSPStrategy()"])
def test_pytorch_lightning_is_refused(strategy: str) -> None:
    code = f"import pytorch_lightning as pl, lightning_autosp; pl.Trainer(strategy={strategy}, accelerator='cpu')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "lightning.pytorch" in done.stderr.splitlines()[-1], done.stderr[-600:]


class NoLoss(Sum):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return None


class NamedLoss(Sum):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"nll": super().training_step(batch, batch_idx)}


class CompiledInside(Sum):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.compile(self.table)


class Wrapped(Sum):
    def __init__(self) -> None:
        super().__init__()
        self.inner = object.__new__(torch.nn.parallel.DistributedDataParallel)
        nn.Module.__init__(self.inner)


def CompiledWhole() -> Any:
    return torch.compile(Sum())


def fit_batches_with(options: dict[str, Any], module: Any = Sum) -> None:
    """Fit with these options of the Trainer."""
    fit_batches(module, LONG, **options)


def fit_other_lengths() -> None:
    rank = int(os.environ["RANK"])
    trainer = Trainer(**jobs.QUIET, max_epochs=1, devices=2, strategy=AutoSPStrategy(batch_source="replicated"))
    trainer.fit(Sum(), torch.utils.data.DataLoader(LONG.repeat(6 - 2 * rank, 1), batch_size=2))


def fit_other_kinds_of_loaders() -> None:
    sampler = [0, 1] if os.environ["RANK"] == "1" else None
    trainer = Trainer(**jobs.QUIET, max_epochs=1, devices=2, strategy=AutoSPStrategy())
    trainer.fit(Sum(), torch.utils.data.DataLoader(LONG.repeat(2, 1), batch_size=2, sampler=sampler))


def find_batch_size() -> None:
    from lightning.pytorch.callbacks import BatchSizeFinder

    trainer = Trainer(**jobs.QUIET, devices=2, strategy=AutoSPStrategy(), callbacks=[BatchSizeFinder()])
    trainer.fit(OwnData())


def verify() -> None:
    trainer = Trainer(**jobs.QUIET, max_epochs=1, devices=2, strategy=AutoSPStrategy())
    trainer.fit(Verifying(), torch.utils.data.DataLoader(Batches(LONG), batch_size=1))


LONG, SCALAR, SHORT = torch.ones(6, dtype=torch.long), torch.tensor(1), torch.ones(1, dtype=torch.long)
UNKNOWN = {
    "sequence_parallel_size": [0, "all"],
    "data_parallel_size": [1.5, True],
    "parameter_sharding": ["zero3"],
    "attention": ["flash"],
    "sequence_dim": [-1, "1", {"ids": -1}],
    "batch_source": ["first"],
    "compile_backend": ["eager"],
    "checkpoint_policy": ["some"],
    "memory_limit": ["lots", 0, 1.5],
    "host_memory_limit": ["-1GiB"],
    "state_dict_type": ["dcp"],
    "start_method": ["thread"],
}
"""Options, and values that they do not have."""

CASES: list[tuple[str, Any, tuple[Any, ...], list[str]]] = [
    *(
        (f"{option}={value!r}", fit_batches, (Sum, LONG, None, {option: value}), [f"{option}={value!r} is ", ". "])
        for option, values in UNKNOWN.items()
        for value in values
    ),
    ("sizes", fit_batches, (Sum, LONG, None, {"sequence_parallel_size": 3}), ["do not fit 2 process"]),
    ("no plan", fit_batches, (Sum, LONG, None, {"plan": "missing.json"}), ["plan='missing.json' cannot be read", "--save FILE"]),
    (
        "two decisions",
        fit_batches,
        (Sum, LONG, None, {"plan": "missing.json", "checkpoint_policy": "full"}),
        ["both say what is kept", "Leave one away"],
    ),
    # Batches.
    (
        "no dimension",
        fit_batches,
        (Sum, SCALAR),
        ["train: rank 0: sequence_dim=1 but no tensor of the batch has such a dimension; the shapes are [(2,)]"],
    ),
    ("other dimension", fit_batches, (Sum, LONG, None, {"sequence_dim": 2}), ["sequence_dim=2 but no tensor", "(2, 6)"]),
    ("no such key", fit_batches, (Sum, LONG, None, {"sequence_dim": {"ids": 1}}), ["has no 'ids'; its tensors are batch (2, 6)"]),
    ("no tensors", fit_batches, (Sum, "text"), ["no tensor of the batch has such a dimension; the shapes are none"]),
    ("too short", fit_batches, (Sum, SHORT), ["1 position(s), fewer than sequence_parallel_size=2"]),
    (
        "different contents",
        fit_batches,
        (Sum, LONG, 0 * LONG),
        ["ranks of sequence group 0 loaded different batches", "data_parallel_rank"],
    ),
    ("different shapes", fit_batches, (Sum, LONG, torch.ones(7, dtype=torch.long)), ["loaded different batches"]),
    ("different later", verify, (), ["loaded different batches"]),
    ("bad on one rank", fit_batches, (Sum, LONG, SCALAR), ["rank 1: sequence_dim=1 but no tensor"]),
    (
        "different lengths",
        fit_other_lengths,
        (),
        ["train ranks have different loaders: 3 batches on rank(s) 0; 2 batches on rank(s) 1"],
    ),
    (
        "different loaders",
        fit_other_kinds_of_loaders,
        (),
        ["'replicated', 1 batches on rank(s) 0; 'broadcast', 1 batches on rank(s) 1"],
    ),
    (
        "not sharded",
        fit_batches,
        (Sum, LONG, None, {"batch_source": "sharded"}),
        ["needs a dataset that reads slices", "is a Batches"],
    ),
    # Modules and losses.
    ("vector", fit_batches, (Vector, LONG), ["a loss of shape (2, 6); it has to be a scalar"]),
    ("detached", fit_batches, (Detached, LONG), ["loss without a gradient"]),
    ("no loss", fit_batches, (NoLoss, LONG), ["returning None in distributed training is not supported"]),
    ("no name", fit_batches, (NamedLoss, LONG), ["'loss' key"]),
    *(
        (
            f"nothing to train, {policy}",
            fit_batches,
            (Frozen, LONG, None, {"checkpoint_policy": policy}),
            [f"no backward that checkpoint_policy={policy!r} could apply to", "leave some parameters trainable"],
        )
        for policy in ("none", "attention", "full")
    ),
    ("manual optimization", fit_batches, (Manual, LONG), ["automatic_optimization=False is not supported"]),
    ("DTensors", fit_batches, (Tensors, LONG), ["'extra', ...) are DTensors already, others ('table.weight', ...) are plain"]),
    ("compiled", fit_batches, (CompiledWhole, LONG), ["compiled"]),
    ("compiled inside", fit_batches, (CompiledInside, LONG), ["submodule 'table' is already compiled"]),
    ("wrapped", fit_batches, (Wrapped, LONG), ["'inner' is already wrapped by DistributedDataParallel"]),
    # What the Trainer is asked.
    ("sync_batchnorm", fit_batches_with, ({"sync_batchnorm": True},), ["sync_batchnorm=True is not supported"]),
    ("batch size finder", find_batch_size, (), ["BatchSizeFinder is not supported"]),
    # Memory and strictness.
    (
        "less than what is held",
        jobs.fit,
        ("GPT", {"memory_limit": "10KiB"}, 2),
        ["memory_limit is 10.0 KiB", "optimizer state alone are more: use more ranks"],
    ),
    (
        "less than the step takes",
        jobs.fit,
        ("GPT", {"memory_limit": "300KiB", "checkpoint_policy": "none"}, 2),
        ["checkpoint_policy='none', backward at ", "of 64 positions would fit: use a shorter sequence"],
    ),
    ("in full", fit_batches, (Unruled, LONG, None, {"strict": True}), ["aten.logcumsumexp.default", "test_refusals.py:"]),
    (
        "method of attention",
        fit_batches,
        (Distant, LONG, None, {"attention": "ring"}),
        [
            "attention='ring' cannot compute the attention at ",
            "test_refusals.py:",
            "is not proven to be truth values of pairs",
            "Use 'auto', or one of 'ulysses', 'gather_kv'",
        ],
    ),
    ("in pieces", jobs.fit, ("Broken", {"strict": True}, 2), ["is not one graph. At ", "modules.py:"]),
]


def timed(function: Any, *args: Any) -> None:
    """Add the seconds that a rank worked before it raised."""
    start = time.process_time()
    try:
        function(*args)
    except Exception as error:
        error.args = (f"{time.process_time() - start} {error}",)
        raise


def test_there_are_thirty() -> None:
    assert len({name for name, *_ in CASES}) == len(CASES) >= 30


@pytest.mark.parametrize(("function", "args", "texts"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_refused(function: Any, args: tuple[Any, ...], texts: list[str], pool: Pool) -> None:
    """The same error on every rank, in less than half a minute of work (other tests run beside), and none hangs."""
    errors = pool.outcomes(timed, 2, function, *args)
    assert all(isinstance(error, JobError) for error in errors), errors
    found = [error.message.split(" ", 1) for error in errors]
    assert len({(error.kind, message) for error, (_, message) in zip(errors, found, strict=True)}) == 1, found
    for text in texts:
        assert text in found[0][1]
    assert all(float(seconds) < 25 for seconds, _ in found)
