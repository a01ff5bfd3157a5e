"""Compiling one rank's program: AOTAutograd, then Inductor or eager kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from lightning_autosp import _compat
from lightning_autosp.memory.meter import LiveBytes

__all__ = ["CompileBackend", "Partition", "compile_module", "resolve_backend"]

CompileBackend = Literal["inductor", "aot_eager"]
OnGraph = Callable[[fx.GraphModule], None]
Partition = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


def resolve_backend(backend: str, device: torch.device) -> CompileBackend:
    """Return what `"auto"` means on a device: Inductor on CUDA, `aot_eager` elsewhere."""
    if backend == "auto":
        return "inductor" if device.type == "cuda" else "aot_eager"
    return "inductor" if backend == "inductor" else "aot_eager"


def compile_module(
    module: fx.GraphModule,
    inputs: Sequence[Tensor],
    backend: CompileBackend,
    on_graph: OnGraph,
    partition: Partition | None = None,
    meter: LiveBytes | None = None,
) -> Callable[..., Any]:
    """Compile a lowered module, forward and backward.

    Args:
        module: The graph of one rank.
        inputs: The tensors it is about to be called with.
        backend: `"inductor"`, or `"aot_eager"` to run ATen operators one by one.
        on_graph: Called with the forward and, when it exists, the backward ATen graph.
        partition: Divides the joint graph into forward and backward; PyTorch's own if `None`.
        meter: Counts the bytes that `"aot_eager"` programs take.
    """
    if backend == "inductor":
        return _inductor(module, inputs, on_graph, partition)

    from torch._dynamo.backends.common import aot_autograd

    def eager(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        on_graph(gm)
        run = _compat.boxed(gm)
        if meter is None:
            return run

        def metered(inputs: list[Any]) -> Any:
            with meter:
                return run(inputs)

        metered._boxed_call = True  # type: ignore[attr-defined]
        return metered

    compiler = aot_autograd(
        fw_compiler=eager,
        bw_compiler=eager,
        partition_fn=partition or _compat.min_cut_partition,
        decompositions={torch.ops.aten.native_dropout.default: _dropout},
    )
    return compiler(module, list(inputs))


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Dropout as the CPU's kernel computes it, so that its mask alone need be kept: a byte for an element."""
    if x.device.type != "cpu" or not train or not 0 < p < 1:
        return NotImplemented
    mask = torch.bernoulli(torch.empty_like(x, dtype=torch.bool), 1 - p)
    return x * mask * (1 / (1 - p)), mask


def _inductor(
    module: fx.GraphModule, inputs: Sequence[Tensor], on_graph: OnGraph, partition: Partition | None
) -> Callable[..., Any]:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
        on_graph(gm)
        return compile_fx_inner(gm, example_inputs, **options)

    partitions = (
        contextlib.nullcontext() if partition is None else config.patch(custom_partitioner_fn=_compat.partitioner(partition))
    )
    # A joint graph found in AOTAutograd's cache is not divided again, and nothing would be known of it.
    fresh = torch._functorch.config.patch(enable_autograd_cache=False)
    with partitions, fresh:
        compiled: Any = compile_fx(module, list(inputs), inner_compile=inner)  # type: ignore[arg-type]
    return compiled
