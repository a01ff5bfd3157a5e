"""Compare a function with its lowered form on simulated ranks, in one process."""

from __future__ import annotations

import copy
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
from lightning_autosp.attention.select import AttentionMethod, AttentionOptions
from lightning_autosp.check import RankStep, Simulation
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.report import Report, StepReport
from lightning_autosp.compiler.simulate import run_ranks
from lightning_autosp.compiler.specialise import LoweredStep

MAX_RANKS = 8


def mesh_of(num_ranks: int) -> DeviceMesh:
    """Return a mesh with process groups that do nothing; they stay for the test."""
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
    attention: AttentionMethod = "ulysses",
) -> Lowered:
    """Run `function(*inputs)` lowered on every simulated rank; the first output is differentiated."""
    torch._dynamo.reset()
    simulation = Simulation(module, num_ranks, sharded=sharded, attention=AttentionOptions(attention))
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


def run_step(
    module: nn.Module, batches: Sequence[Any], kind: str = "training_step", num_ranks: int = 2
) -> tuple[list[list[Any]], list[nn.Module], Report]:
    """Run a module's step on every batch as the strategy does, cut in pieces where Python cuts it, on simulated ranks.

    Returns:
        Every rank's results, its module after the last backward, and the first rank's report.
    """
    torch._dynamo.reset()
    modules = [copy.deepcopy(module) for _ in range(num_ranks)]
    reports: list[Report] = []
    grad_enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # a thread has its own

    def work(rank: int) -> list[Any]:
        step = RankStep(modules[rank], kind, Group("simulated", num_ranks, rank))
        if rank == 0:
            reports.append(step.report)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad_enabled):
            return [_differentiated(step(copy.deepcopy(batch), index)) for index, batch in enumerate(batches)]

    return run_ranks(num_ranks, work), modules, reports[0]


def _differentiated(result: Any) -> Any:
    loss = result["loss"] if isinstance(result, dict) else result
    if isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    return pytree.tree_map_only(Tensor, Tensor.detach, result)


def assert_step_exact(module: nn.Module, batches: Sequence[Any], kind: str = "training_step", num_ranks: int = 2) -> Report:
    """Assert that results, gradients over all batches, buffers and what is kept or logged are as on one device, on every rank."""
    one = copy.deepcopy(module)
    want = [_differentiated(getattr(one, kind)(copy.deepcopy(batch), index)) for index, batch in enumerate(batches)]
    results, modules, report = run_step(module, batches, kind, num_ranks)
    for rank, (got, own) in enumerate(zip(results, modules, strict=True)):
        for name, left, right in [("result", got, want), ("attributes", _state(own), _state(one))]:
            for index, (x, y) in enumerate(zip(pytree.tree_leaves(left), pytree.tree_leaves(right), strict=True)):
                assert type(x) is type(y), f"rank {rank}, {name} {index}: {type(x)}"
                if isinstance(y, Tensor):
                    assert_close(x, y, 1e-10, f"rank {rank}, {name} {index}")
                else:
                    assert x == y
    return report


def _state(module: nn.Module) -> list[Any]:
    """Return gradients, buffers and what steps leave in attributes."""
    gradients = [(name, parameter.grad) for name, parameter in module.named_parameters()]
    return [gradients, list(module.named_buffers()), *(getattr(module, name, None) for name in ("seen", "logged"))]


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
