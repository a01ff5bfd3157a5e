"""What an operator costs: floating-point operations, bytes it moves, bytes it sends, and workspace that no value shows."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lightning_autosp.attention.tiles import description, program_of, rehearse
from lightning_autosp.memory.meter import LiveBytes

__all__ = ["Cost", "Roofline", "attention_operators", "cost", "is_attention", "is_collective", "is_view", "workspace_bytes"]

aten = torch.ops.aten

_CPU_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
_CPU_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

attention_operators = {
    _CPU_FLASH,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._flash_attention_forward.default,
    aten._efficient_attention_forward.default,
}
"""Kernels that weigh rows of values; each returns its result and the log-sum-exp its backward needs."""


@dataclass(frozen=True)
class Cost:
    """Of one operator.

    Attributes:
        flops: Floating-point operations; a multiplication and an addition are two.
        moved: Bytes read and written.
        sent: Bytes a rank hands to a collective.
        repeated: Those of `flops` that an operator of backward does a second time, within itself: tiles are computed again.
    """

    flops: float = 0.0
    moved: float = 0.0
    sent: float = 0.0
    repeated: float = 0.0


@dataclass(frozen=True)
class Roofline:
    """A device as far as time is estimated: an operator takes as long as the slower of its arithmetic and its traffic.

    Attributes:
        flops: Floating-point operations a second that matrix products reach.
        memory: Bytes a second between device memory and kernels.
        link: Bytes a second a rank sends to the others.
        host: Bytes a second between device and host memory.
    """

    flops: float
    memory: float
    link: float
    host: float

    def seconds(self, one: Cost) -> float:
        return max(one.flops / self.flops, one.moved / self.memory) + one.sent / self.link


def is_attention(node: fx.Node) -> bool:
    """Whether the operator is attention's forward: a kernel, or rows computed in tiles."""
    if node.target in attention_operators:
        return True
    return node.target is torch.ops.autosp.tiles.default and program_of(node.args[1]).attends  # type: ignore[arg-type]


def is_collective(node: fx.Node) -> bool:
    """Whether running the operator takes all ranks."""
    return getattr(node.target, "namespace", "") in ("_c10d_functional", "c10d_functional", "_dtensor")


def is_view(node: fx.Node) -> bool:
    """Whether the operator makes no new value."""
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    return any(argument.alias_info is not None and not argument.alias_info.is_write for argument in schema.arguments)


def cost(node: fx.Node) -> Cost:
    """Return what running an operator costs; views and bookkeeping are free."""
    if node.op != "call_function" or is_view(node) or _name(node) == "wait_tensor":
        return Cost()
    if is_collective(node):
        return Cost(sent=float(sum(map(_bytes, _values(node.args)))))
    moved = float(sum(map(_bytes, _values((node.args, node.kwargs)))) + sum(map(_bytes, pytree.tree_leaves(node.meta.get("val")))))
    flops, repeated = _flops(node)
    return Cost(flops, moved, repeated=repeated)


def _flops(node: fx.Node) -> tuple[float, float]:
    """Return FLOPs, and those of them that are repeated."""
    given: Any = fx.map_arg((node.args, node.kwargs), lambda one: one.meta.get("val"))
    args, kwargs = given
    if node.target is _CPU_FLASH:
        return float(sdpa_flop_count(*(value.shape for value in args[:3]))), 0.0
    if node.target is _CPU_FLASH_BACKWARD:
        return float(sdpa_backward_flop_count(*(value.shape for value in args[:4]))), 0.0
    if getattr(node.target, "namespace", "") == "autosp":
        return _own(node, args)[:2]
    formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
    return (0.0 if formula is None else float(formula(*args, **kwargs, out_val=node.meta.get("val")))), 0.0


def workspace_bytes(node: fx.Node) -> int:
    """Return the bytes that an operator's kernel takes and gives back, as far as it is ours."""
    if getattr(node.target, "namespace", "") != "autosp":
        return 0
    args: Any = fx.map_arg(node.args, lambda one: one.meta.get("val"))
    return _own(node, args)[2]


def _own(node: fx.Node, args: Any) -> tuple[float, float, int]:
    """Return FLOPs, those that are repeated, and workspace of an operator that runs a program in tiles: two of them are tried."""
    *backward, inputs, handle = (args[0], args[2], args[3], args[1], args[4]) if _name(node) == "tiles_backward" else args
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    key = (description(handle), tuple((value.shape, value.stride(), value.dtype) for value in tensors), str(backward[1:]))
    if key not in _tried:
        fake_mode = next((value.fake_mode for value in tensors if isinstance(value, FakeTensor)), None) or FakeTensorMode()
        live, flops = LiveBytes(known=tensors), _Flops()
        with fake_mode, torch.no_grad(), live, flops:
            times = rehearse(handle, inputs, *backward)
        results = sum(map(_bytes, pytree.tree_leaves(node.meta.get("val"))))
        repeated = 0.0
        if backward:
            with fake_mode, torch.no_grad(), _Flops() as forward:
                repeated = rehearse(handle, inputs) * forward.total
        _tried[key] = flops.total * times, repeated, max(0, live.peak - results)
    return _tried[key]


_tried: dict[Any, tuple[float, float, int]] = {}
"""By what a program does: layers are alike."""


class _Flops(TorchDispatchMode):
    """Counts the FLOPs of operators that run under it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name.split("::")[-1]) if schema is not None else ""


def _values(tree: Any) -> list[Any]:
    return [leaf.meta.get("val") for leaf in pytree.arg_tree_leaves(tree) if isinstance(leaf, fx.Node)]


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
