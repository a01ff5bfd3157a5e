"""Compiling one rank's program: AOTAutograd, then Inductor or eager kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

__all__ = ["CompileBackend", "compile_module", "resolve_backend"]

CompileBackend = Literal["inductor", "aot_eager"]
OnGraph = Callable[[fx.GraphModule], None]


def resolve_backend(backend: str, device: torch.device) -> CompileBackend:
    """Return what `"auto"` means on a device: Inductor on CUDA, `aot_eager` elsewhere."""
    if backend == "auto":
        return "inductor" if device.type == "cuda" else "aot_eager"
    return "inductor" if backend == "inductor" else "aot_eager"


def compile_module(
    module: fx.GraphModule, inputs: Sequence[Tensor], backend: CompileBackend, on_graph: OnGraph
) -> Callable[..., Any]:
    """Compile a lowered module, forward and backward.

    Args:
        module: The graph of one rank.
        inputs: The tensors it is about to be called with.
        backend: `"inductor"`, or `"aot_eager"` to run ATen operators one by one.
        on_graph: Called with the forward and, when it exists, the backward ATen graph.
    """
    if backend == "inductor":
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def inner(gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
            on_graph(gm)
            return compile_fx_inner(gm, example_inputs, **options)

        compiled: Any = compile_fx(module, list(inputs), inner_compile=inner)  # type: ignore[arg-type]
        return compiled

    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    def eager(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        on_graph(gm)
        return make_boxed_func(gm.forward)

    compiler = aot_autograd(fw_compiler=eager, bw_compiler=eager, partition_fn=min_cut_rematerialization_partition)
    return compiler(module, list(inputs))
