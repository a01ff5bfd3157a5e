"""Bad input: one clear error on every rank, before any collective could hang."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jobs
import modules
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pool import JobError, Pool
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from lightning_autosp import AutoSPStrategy
from lightning_autosp.mesh import resolve_sizes

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("sequence_parallel_size", 0),
        ("sequence_parallel_size", "all"),
        ("data_parallel_size", 1.5),
        ("data_parallel_size", True),
        ("parameter_sharding", "zero3"),
        ("attention", "flash"),
        ("sequence_dim", -1),
        ("sequence_dim", "1"),
        ("batch_source", "first"),
        ("compile_backend", "eager"),
        ("state_dict_type", "dcp"),
        ("start_method", "thread"),
    ],
)
def test_unknown_value(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}={value!r} is not known. Use "):
        AutoSPStrategy(**{option: value})


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


def test_world_size_on_every_rank(pool: Pool) -> None:
    assert "do not fit 2 process" in refused(pool, jobs.fit, "GPT", {"sequence_parallel_size": 3}, 2)


class Batches(torch.utils.data.Dataset[Any]):
    """One sample many times; `other` on every rank but the first."""

    def __init__(self, sample: Any, other: Any = None) -> None:
        import os

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


def test_batch_without_the_dimension(pool: Pool) -> None:
    message = refused(pool, fit_batches, Sum, torch.tensor(1))
    assert message.startswith(
        "train: rank 0: sequence_dim=1 but no tensor of the batch has such a dimension; the shapes are [(2,)]"
    )


def test_batch_shorter_than_the_group(pool: Pool) -> None:
    message = refused(pool, fit_batches, Sum, torch.ones(1, dtype=torch.long))
    assert "1 position(s), fewer than sequence_parallel_size=2" in message


def test_different_batches_in_a_group(pool: Pool) -> None:
    message = refused(pool, fit_batches, Sum, torch.ones(6, dtype=torch.long), torch.zeros(6, dtype=torch.long))
    assert "ranks of sequence group 0 loaded different batches" in message
    assert "data_parallel_rank" in message


class Verifying(Sum):
    """Looks at its second batch, which the strategy does not by itself."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.table(batch).mean()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 1:
            changed = batch + 1 if self.global_rank else batch
            self.trainer.strategy.verify_batch(changed)


def test_batches_compared_on_demand(pool: Pool) -> None:
    options = {"batch_size": 1}
    message = refused(pool, _verify, options)
    assert "loaded different batches" in message


def _verify(options: dict[str, Any]) -> None:
    trainer = Trainer(**jobs.QUIET, max_epochs=1, devices=2, strategy=AutoSPStrategy())
    trainer.fit(Verifying(), torch.utils.data.DataLoader(Batches(torch.ones(6, dtype=torch.long)), **options))


def test_different_shapes_in_a_group(pool: Pool) -> None:
    message = refused(pool, fit_batches, Sum, torch.ones(6, dtype=torch.long), torch.ones(7, dtype=torch.long))
    assert "loaded different batches" in message


def test_bad_batch_on_one_rank_reaches_all(pool: Pool) -> None:
    message = refused(pool, fit_batches, Sum, torch.ones(6, dtype=torch.long), torch.tensor(1))
    assert "rank 1: sequence_dim=1 but no tensor" in message


def test_loss_that_is_not_a_scalar(pool: Pool) -> None:
    assert "a loss of shape (2, 6)" in refused(pool, fit_batches, Vector, torch.ones(6, dtype=torch.long))


def test_loss_without_a_gradient(pool: Pool) -> None:
    assert "loss without a gradient" in refused(pool, fit_batches, Detached, torch.ones(6, dtype=torch.long))


@pytest.mark.parametrize("policy", ["none", "attention", "full"])
def test_policy_without_backward(pool: Pool, policy: str) -> None:
    """In training; a step that is only evaluated has none to apply a policy to."""
    message = refused(pool, fit_batches, Frozen, torch.ones(6, dtype=torch.long), None, {"checkpoint_policy": policy})
    assert f"no backward that checkpoint_policy={policy!r} could apply to" in message
    assert "leave some parameters trainable" in message


class Frozen(Sum):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


@pytest.mark.parametrize("policy", ["attention", "full"])
def test_policy_where_a_step_is_only_evaluated(pool: Pool, policy: str) -> None:
    runs = pool.run(jobs.evaluate, 2, "GPT", {"checkpoint_policy": policy}, 2)
    assert runs[0]["validated"] == runs[1]["validated"]


def test_manual_optimization(pool: Pool) -> None:
    assert "automatic_optimization=False is not supported" in refused(pool, fit_batches, Manual, torch.ones(6, dtype=torch.long))


def test_parameters_that_are_dtensors(pool: Pool) -> None:
    message = refused(pool, fit_batches, Tensors, torch.ones(6, dtype=torch.long))
    assert "'extra', ...) are DTensors already, others ('table.weight', ...) are plain" in message


def test_sync_batchnorm(pool: Pool) -> None:
    assert "sync_batchnorm=True is not supported" in refused(pool, _sync_batchnorm)


def _sync_batchnorm() -> None:
    fit_batches(Sum, torch.ones(6, dtype=torch.long), sync_batchnorm=True)


def test_batch_size_finder(pool: Pool) -> None:
    assert "BatchSizeFinder is not supported" in refused(pool, _find_batch_size)


class OwnData(Sum):
    batch_size = 2

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(Batches(torch.ones(6, dtype=torch.long)), batch_size=self.batch_size)


def _find_batch_size() -> None:
    from lightning.pytorch.callbacks import BatchSizeFinder

    trainer = Trainer(**jobs.QUIET, devices=2, strategy=AutoSPStrategy(), callbacks=[BatchSizeFinder()])
    trainer.fit(OwnData())


def test_memory_limit_below_what_is_held(pool: Pool) -> None:
    message = refused(pool, jobs.fit, "GPT", {"memory_limit": "10KiB"}, 2)
    assert "memory_limit is 10.0 KiB" in message
    assert "optimizer state alone are more: use more ranks" in message


def test_memory_limit_below_what_the_step_takes(pool: Pool) -> None:
    message = refused(pool, jobs.fit, "GPT", {"memory_limit": "300KiB", "checkpoint_policy": "none"}, 2)
    assert "checkpoint_policy='none', backward at " in message
    assert "of 64 positions would fit: use a shorter sequence" in message


def test_strict_names_the_line(pool: Pool) -> None:
    message = refused(pool, fit_batches, Unruled, torch.ones(6, dtype=torch.long), None, {"strict": True})
    assert "aten.logcumsumexp.default" in message
    assert "test_refusals.py:" in message


class Unruled(Sum):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.table(batch).mean((0, 2)).logcumsumexp(0).mean()


def test_strict_names_a_graph_break(pool: Pool) -> None:
    message = refused(pool, jobs.fit, "Broken", {"strict": True}, 2)
    assert "is not one graph. At " in message
    assert "modules.py:" in message


def test_compiled_module() -> None:
    trainer = Trainer(**jobs.QUIET, devices=1, strategy="autosp")
    with pytest.raises((MisconfigurationException, RuntimeError), match="already compiled|compiled model"):
        trainer.fit(torch.compile(modules.GPT()), modules.loader(2, 8))


def test_compiled_submodule() -> None:
    module = modules.GPT()
    module.norm = torch.compile(module.norm)
    trainer = Trainer(**jobs.QUIET, devices=1, strategy="autosp")
    with pytest.raises(MisconfigurationException, match="submodule 'norm' is already compiled"):
        trainer.fit(module, modules.loader(2, 8))


def test_wrapped_submodule() -> None:
    module = modules.GPT()
    wrapped = object.__new__(torch.nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    module.wrapped = wrapped
    trainer = Trainer(**jobs.QUIET, devices=1, strategy="autosp")
    with pytest.raises(MisconfigurationException, match="'wrapped' is already wrapped by DistributedDataParallel"):
        trainer.fit(module, modules.loader(2, 8))


@pytest.mark.parametrize("strategy", ["'autosp'", "lightning_autosp.AutoSPStrategy()"])
def test_pytorch_lightning_is_refused(strategy: str) -> None:
    code = f"import pytorch_lightning as pl, lightning_autosp; pl.Trainer(strategy={strategy}, accelerator='cpu')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "lightning.pytorch" in done.stderr.splitlines()[-1], done.stderr[-600:]
