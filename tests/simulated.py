"""Compare a function with its lowered form on simulated ranks, in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree

from lightning_autosp import _compat
from lightning_autosp.check import Simulation
from lightning_autosp.compiler.report import Report, StepReport
from lightning_autosp.compiler.specialise import LoweredStep

MAX_RANKS = 8


@functools.cache
def mesh_of(num_ranks: int) -> DeviceMesh:
    """Return a mesh with process groups that do nothing; they stay for the session."""
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=MAX_RANKS)
    return DeviceMesh("cpu", list(range(num_ranks)))


@dataclass
class Lowered:
    """What a run on simulated ranks gave."""

    outputs: list[list[Tensor]]
    gradients: list[dict[str, Tensor | None]]
    report: StepReport
    step: LoweredStep


def lower(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    module: nn.Module,
    *,
    num_ranks: int = 2,
    sequence_dim: int = 1,
    sharded: bool = False,
    backward: bool = True,
) -> Lowered:
    """Run `function(*inputs)` lowered on every simulated rank; the first output is differentiated."""
    torch._dynamo.reset()
    simulation = Simulation(module, num_ranks, sharded=sharded)
    length = max(t.shape[sequence_dim] for t in inputs if t.ndim > sequence_dim)
    for tensor in inputs:
        for dim in range(tensor.ndim):
            if dim == sequence_dim or (dim > 0 and tensor.shape[dim] == length):
                _compat.mark_dynamic(tensor, dim)
    torch.compile(function, backend=simulation.compiler(Report(), "step"), fullgraph=True)(*inputs)
    run = simulation.last
    assert run is not None
    if backward:
        simulation.backward([outputs[0] for outputs in run.outputs])
    return Lowered([list(outputs) for outputs in run.outputs], simulation.gradients(), run.report, run.step)


def assert_exact(
    function: Callable[..., Any],
    inputs: Sequence[Tensor],
    module: nn.Module,
    *,
    rtol: float = 1e-10,
    **options: Any,
) -> Lowered:
    """Assert that outputs and every parameter's gradient are those of one device, on every rank."""
    sharded = options.get("sharded", False)
    module.zero_grad()
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    expected = [t for t in pytree.tree_leaves(function(*inputs)) if isinstance(t, Tensor)]
    if options.get("backward", True):
        expected[0].backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    for name, buffer in module.named_buffers():
        buffer.copy_(state[name])
    lowered = lower(function, inputs, module, **options)
    for rank, outputs in enumerate(lowered.outputs):
        found = [t for t in outputs if isinstance(t, Tensor)]
        assert len(found) == len(expected)
        for index, (got, want) in enumerate(zip(found, expected, strict=True)):
            assert got.dtype == want.dtype
            assert_close(got, want, rtol, f"rank {rank}, output {index}")
    for name, want in gradients.items():
        parts = [grads[name] for grads in lowered.gradients]
        if want is None:
            assert all(p is None or not p.any() for p in parts), name
            continue
        wholes = [torch.cat(parts)] if sharded and want.ndim else parts  # type: ignore[arg-type]
        for got in wholes:
            assert got is not None, f"{name} has no gradient"
            assert_close(got, want, rtol, f"gradient of {name}")
    return lowered


def assert_close(got: Tensor, want: Tensor, rtol: float, what: str) -> None:
    """Assert equality up to `rtol` of the norm, NaNs in the same places."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.is_floating_point():
        assert torch.equal(got, want), what
        return
    got, want = got.detach().double(), want.detach().double()
    assert torch.equal(got.isfinite(), want.isfinite()), f"{what}: {got} against {want}"
    finite = want.isfinite()
    scale = want[finite].norm().item() if finite.any() else 0.0
    error = (got[finite] - want[finite]).norm().item()
    assert error <= rtol * max(scale, 1e-12), f"{what}: off by {error:.3g}, relative {error / max(scale, 1e-300):.3g}"
