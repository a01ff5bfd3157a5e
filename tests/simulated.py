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
from lightning_autosp.collectives import Group, average_gradient, gather_parameter
from lightning_autosp.compiler.report import Report, StepReport
from lightning_autosp.compiler.simulate import run_ranks
from lightning_autosp.compiler.specialise import Compiler, LoweredStep

MAX_RANKS = 8


@functools.cache
def mesh_of(num_ranks: int) -> DeviceMesh:
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=MAX_RANKS)
    return DeviceMesh("cpu", list(range(num_ranks)))


class RankParameters:
    """Parameters of one simulated rank: replicated, or cut over dim 0."""

    def __init__(self, module: nn.Module, group: Group, *, sharded: bool) -> None:
        self.group, self.sharded = group, sharded
        self.whole = dict(module.named_parameters())
        self.leaves = {name: self._part(p).detach().clone().requires_grad_(p.requires_grad) for name, p in self.whole.items()}

    def _part(self, p: Tensor) -> Tensor:
        if not self.sharded or p.ndim == 0:
            return p
        chunk = -(-p.shape[0] // self.group.size)
        return p[self.group.rank * chunk : (self.group.rank + 1) * chunk]

    def enter(self, name: str) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        if not self.sharded or self.whole[name].ndim == 0:
            return average_gradient, (self.group,)
        return gather_parameter, (self.whole[name].shape[0], self.group)


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
    calls: list[tuple[LoweredStep, tuple[Any, ...]]] = []
    names = {id(p): n for n, p in module.named_parameters()}

    class Capturing(Compiler):
        def __call__(self, gm: Any, example_inputs: Any) -> Any:
            step = super().__call__(gm, example_inputs)
            eager = gm.forward

            def run(*args: Any) -> Any:
                calls.append((step, tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)))
                return eager(*args)

            return run

    class Names:
        def names(self) -> dict[int, str]:
            return names

    compiler = Capturing(mesh_of(num_ranks), Group("simulated", num_ranks, 0), "aot_eager", Report(), "step", Names())  # type: ignore[arg-type]
    length = max(t.shape[sequence_dim] for t in inputs if t.ndim > sequence_dim)
    for tensor in inputs:
        for dim in range(tensor.ndim):
            if dim == sequence_dim or (dim > 0 and tensor.shape[dim] == length):
                _compat.mark_dynamic(tensor, dim)
    torch.compile(function, backend=compiler, fullgraph=True)(*inputs)
    step, args = calls[0]
    sizes = step.sizes(args)
    step.emitter(sizes, compiler.group, None)  # plan once, outside the ranks' threads
    reports: list[StepReport] = []

    def work(rank: int) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        group = Group("simulated", num_ranks, rank)
        parameters = RankParameters(module, group, sharded=sharded)
        emitter = step.emitter(sizes, group, parameters)  # type: ignore[arg-type]
        program = emitter.emit()
        if rank == 0:
            reports.append(StepReport.of("step", emitter, program, step.captured.symbols))
        held = [
            parameters.leaves.get(step.captured.parameters.get(step.captured.placeholders[i], ""), args[i]) for i in program.inputs
        ]
        outputs = list(
            program.module(*(t.clone() if isinstance(t, Tensor) and t.is_leaf and not t.requires_grad else t for t in held))
        )
        if backward:
            outputs[0].backward()
        return outputs, {name: leaf.grad for name, leaf in parameters.leaves.items()}

    results = run_ranks(num_ranks, work)
    return Lowered([r[0] for r in results], [r[1] for r in results], reports[0], step)


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
