"""The program of the first of several ranks, run on one device: real kernels and real memory, nothing is sent.

torch's `fake` process group answers collectives with values of the right shape: what is computed is meaningless, what it takes
is not.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_autosp.attention.select import AttentionMethod, AttentionOptions
from lightning_autosp.batches import batch_tensors
from lightning_autosp.compiler.backend import CompileBackend
from lightning_autosp.compiler.report import Report
from lightning_autosp.compiler.specialise import Compiler
from lightning_autosp.memory.devices import device_of
from lightning_autosp.memory.estimate import MemoryEstimate, States
from lightning_autosp.memory.meter import LiveBytes
from lightning_autosp.memory.partition import MemoryOptions
from lightning_autosp.mesh import SEQUENCE_AXIS, ParallelMesh
from lightning_autosp.parameters import ModuleParameters
from lightning_autosp.step import CompiledStep


@contextlib.contextmanager
def fake_ranks(world: int, device: str = "cpu") -> Iterator[ParallelMesh]:
    """Make this process the first of `world` ranks that share a sequence."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield ParallelMesh.create(device, 1, world)
    finally:
        dist.destroy_process_group()


@dataclass
class Measured:
    """One training step of one rank.

    Attributes:
        estimate: What was predicted.
        saved: Bytes alive between forward and backward, without parameters and inputs.
        peak: Most bytes alive at once, likewise.
        host: Most bytes of copies on the host at once, which `saved` and `peak` do not count.
        loss: What the step returned.
    """

    estimate: MemoryEstimate
    saved: int
    peak: int
    host: int
    loss: Tensor

    @property
    def predicted_peak(self) -> int:
        """The prediction of `peak`: the estimate's, without what is held whatever the step does."""
        categories = self.estimate.categories
        return self.estimate.peak - sum(categories[name] for name in ("parameters", "optimizer", "inputs", "overhead"))


@dataclass
class Prepared:
    """A module's training step as one rank runs it.

    Attributes:
        step: Called with a whole batch and its number; gives the loss.
        parameters: Of the module, of which this rank holds its part.
        meter: Counts what the step makes, but nothing under Inductor, or if it is not to.
        report: Of what was compiled.
    """

    step: CompiledStep
    parameters: ModuleParameters
    meter: LiveBytes
    report: Report


def prepare_step(
    module: LightningModule,
    batch: Any,
    mesh: ParallelMesh,
    memory: MemoryOptions,
    *,
    sequence_dim: int = 1,
    backend: CompileBackend = "aot_eager",
    attention: AttentionMethod = "auto",
    tile_local: int | None = None,
    counted: bool = True,
) -> Prepared:
    """Take a module over as the strategy does; parameters are sharded if there are several ranks."""
    torch._dynamo.reset()
    parameters = ModuleParameters(module, mesh.flat, mesh.all_ranks(), sharded=mesh.sequence_size > 1)
    known = [parameters.held(name) for name in parameters.names().values()]
    meter = LiveBytes([*known, *batch_tensors(batch), *module.buffers()])
    report = Report()
    compiler = Compiler(
        mesh=mesh.mesh[SEQUENCE_AXIS],
        group=mesh.sequence(),
        backend=backend,
        report=report,
        kind="",
        attention=AttentionOptions(attention),
        memory=memory,
        meter=meter if counted else None,
        tile_local=tile_local,
    )
    return Prepared(CompiledStep(module, "training_step", compiler, parameters, sequence_dim), parameters, meter, report)


def measure_step(
    module: LightningModule,
    batch: Any,
    mesh: ParallelMesh,
    policy: str,
    limit: int | None = None,
    sequence_dim: int = 1,
    host_limit: int | None = None,
    backend: CompileBackend = "aot_eager",
    attention: AttentionMethod = "auto",
    tile_local: int | None = None,
) -> Measured:
    """Run one training step of the first rank, forward and backward, and count.

    Args:
        module: Left with the gradients of its part.
        batch: Whole.
        mesh: Of the ranks.
        policy: A checkpoint policy.
        limit: Bytes that the step may take besides parameters, optimizer and inputs.
        sequence_dim: The dimension of batch tensors that is the sequence.
        host_limit: Bytes that the step may keep on the host; `None`: any, for "offload", else none.
        backend: With "inductor" nothing is counted.
        attention: A method.
        tile_local: As of `Compiler`.
    """
    inputs = sum(tensor.nbytes for tensor in batch_tensors(batch))
    memory = MemoryOptions(
        policy,  # type: ignore[arg-type]
        None if limit is None else limit + inputs,
        False,
        device_of(torch.device("cpu")).roofline,
        0,
        (None if policy == "offload" else 0) if host_limit is None else host_limit,
        States,
    )
    prepared = prepare_step(
        module, batch, mesh, memory, sequence_dim=sequence_dim, backend=backend, attention=attention, tile_local=tile_local
    )
    meter = prepared.meter
    gc.collect()
    loss = prepared.step(batch, 0)
    loss = loss["loss"] if isinstance(loss, dict) else loss
    saved = meter.live - loss.untyped_storage().nbytes()
    loss.backward()
    estimate = prepared.report.steps[-1].memory
    assert estimate is not None
    return Measured(estimate, saved, meter.peak, meter.host_peak, loss.detach())
