"""What an operator costs: floating-point operations, bytes it moves, bytes it sends, and workspace that no value shows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from lightning_autosp.attention import operators
from lightning_autosp.attention.tiles import description, program_of, rehearse
from lightning_autosp.memory.meter import LiveBytes

__all__ = ["Cost", "Roofline", "attention_operators", "cost", "is_attention", "is_collective", "is_view", "workspace_bytes"]

aten = torch.ops.aten

_wait = torch.ops._c10d_functional.wait_tensor
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
    if node.target in attention_operators or node.target is torch.ops.autosp.across_ranks.default:
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
    sent = _own(node, _given(node)).sent if node.target in operators.KERNELS else 0.0
    moved = float(sum(map(_bytes, _values((node.args, node.kwargs)))) + sum(map(_bytes, pytree.tree_leaves(node.meta.get("val")))))
    flops, repeated = _flops(node)
    return Cost(flops, moved, sent, repeated=repeated)


def _flops(node: fx.Node) -> tuple[float, float]:
    """Return FLOPs, and those of them that are repeated."""
    given: Any = fx.map_arg((node.args, node.kwargs), lambda one: one.meta.get("val"))
    args, kwargs = given
    if getattr(node.target, "namespace", "") == "autosp":
        taken = _own(node, args)
        return taken.flops, taken.repeated
    return _operator_flops(node.target, args, kwargs, node.meta.get("val")), 0.0


def _operator_flops(target: Any, args: Any, kwargs: Any, out: Any) -> float:
    if target is _CPU_FLASH:
        return float(sdpa_flop_count(*_whole_heads(args[:3])))
    if target is _CPU_FLASH_BACKWARD:
        return float(sdpa_backward_flop_count(args[0].shape, *_whole_heads(args[1:4])))
    formula = flop_registry.get(getattr(target, "overloadpacket", None))
    return float(formula(*args, **kwargs, out_val=out)) if formula is not None else 0.0


def _whole_heads(values: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Return shapes with as many heads of keys and values as of queries: formulas know no grouped ones."""
    batch, heads = values[0].shape[:2]
    return [(batch, heads, *value.shape[2:]) for value in values]


def workspace_bytes(node: fx.Node) -> int:
    """Return the bytes that an operator's kernel takes and gives back, as far as it is ours."""
    if getattr(node.target, "namespace", "") != "autosp":
        return 0
    return _own(node, _given(node)).workspace


def _given(node: fx.Node) -> Any:
    return fx.map_arg(node.args, lambda one: one.meta.get("val"))


class _Taken(NamedTuple):
    flops: float
    workspace: int
    repeated: float = 0.0
    sent: float = 0.0


def _own(node: fx.Node, args: Any) -> _Taken:
    """Return what one of this package's operators takes, which is tried on tensors without values."""
    return _across_ranks(node, args) if node.target in operators.KERNELS else _in_tiles(node, args)


def _across_ranks(node: fx.Node, args: Any) -> _Taken:
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    call = operators.call_of(args)
    mask = description(call.mask) if call.mask >= 0 else None
    sizes = [(value.shape, value.stride(), value.dtype, value.device) for value in tensors]
    key = str((node.target, sizes, call._replace(mask=0), mask))
    if key not in _tried:
        live, work = LiveBytes(known=tensors), _Work()
        with _fake_mode(tensors), torch.no_grad(), live, work:
            results = operators.KERNELS[node.target](*args)
        made = sum(map(_bytes, results))
        _tried[key] = _Taken(work.flops, max(0, live.peak - made), sent=work.sent)
    return _tried[key]


def _fake_mode(tensors: Sequence[Tensor]) -> FakeTensorMode:
    found: FakeTensorMode | None = next((value.fake_mode for value in tensors if isinstance(value, FakeTensor)), None)
    return found or FakeTensorMode()


def _in_tiles(node: fx.Node, args: Any) -> _Taken:
    """Try two tiles."""
    *backward, inputs, handle = (args[0], args[2], args[3], args[1], args[4]) if _name(node) == "tiles_backward" else args
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    key = (description(handle), tuple((value.shape, value.stride(), value.dtype) for value in tensors), str(backward[1:]))
    if key not in _tried:
        live, work = LiveBytes(known=tensors), _Work()
        with _fake_mode(tensors), torch.no_grad(), live, work:
            times = rehearse(handle, inputs, *backward)
        results = sum(map(_bytes, pytree.tree_leaves(node.meta.get("val"))))
        repeated = 0.0
        if backward:
            with _fake_mode(tensors), torch.no_grad(), _Work() as forward:
                repeated = rehearse(handle, inputs) * forward.flops
        _tried[key] = _Taken(work.flops * times, max(0, live.peak - results), repeated)
    return _tried[key]


_tried: dict[Any, _Taken] = {}
"""By what a program does: layers are alike."""


class _Work(TorchDispatchMode):
    """Counts the FLOPs of operators that run under it, and the bytes that are handed to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "overloadpacket", None) is _wait:
            return args[0]  # a fake one would be another tensor
        out = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") == "_c10d_functional":
            self.sent += _bytes(args[0])
        self.flops += _operator_flops(func, args, kwargs or {}, out)
        return out


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name.split("::")[-1]) if schema is not None else ""


def _values(tree: Any) -> list[Any]:
    return [leaf.meta.get("val") for leaf in pytree.arg_tree_leaves(tree) if isinstance(leaf, fx.Node)]


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
