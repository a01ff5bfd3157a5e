"""Attention over several ranks as one operator: what is sent and computed in between is no matter of compilers.

A ring of 64 ranks takes 64 exchanges and as many kernels a layer, and which positions each of them gets differs from rank to rank.
In a graph it is one node, the same on all ranks: it takes this rank's parts and gives this rank's part and its log-sum-exp, which
backward needs. Nothing else is kept, keys and values of other ranks come again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_autosp.attention.blocks import Gradients, wide
from lightning_autosp.collectives import Group

__all__ = ["KERNELS", "Call", "Method", "across_ranks", "register"]


class Call(NamedTuple):
    """What a method is told beside tensors.

    Attributes:
        is_causal: Whether queries attend to keys up to their own position; ranks then hold queries in zigzag order.
        scale: Factor of the scores.
        lengths: Every rank's number of keys; if causal, the lengths of the `2 P` chunks of the sequence (`zigzag.chunk_lengths`).
        head_chunks: Into how many groups the heads of keys and values are divided, one after the other.
        group: The sequence group.
    """

    is_causal: bool
    scale: float
    lengths: tuple[int, ...]
    head_chunks: int
    group: Group


class Method(NamedTuple):
    """Forward gives the result, shape `(B, H, l, Dv)`, contiguous, and the log-sum-exp, shape `(B, H, l)`; backward gradients.

    Backward is given the gradient of the result, queries, keys, values, the result and the log-sum-exp.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Call], Gradients]


_METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Make a method known to `across_ranks`."""
    _METHODS[name] = method


def across_ranks(name: str, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
    """Attend to all ranks' keys by a registered method; exact in forward and backward.

    Args:
        name: Of the method.
        query: This rank's queries, shape `(B, H, l, D)`.
        key: This rank's keys, shape `(B, Hk, n, D)`, `H` a multiple of `Hk`.
        value: This rank's values, shape `(B, Hk, n, Dv)`.
        call: The rest.

    Returns:
        Shape `(B, H, l, Dv)`.
    """
    return _AcrossRanks.apply(name, query, key, value, call)  # type: ignore[no-any-return]


class _AcrossRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tensor:
        out, lse = torch.ops.autosp.across_ranks(query, key, value, name, *_flat(call))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.name, ctx.call = name, call
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.autosp.across_ranks_backward(grad, *ctx.saved_tensors, ctx.name, *_flat(ctx.call))
        return (None, *found, None)


def _flat(call: Call) -> tuple[bool, float, list[int], int, str, list[int]]:
    """Return what operators may be given."""
    is_causal, scale, lengths, head_chunks, group = call
    return is_causal, scale, list(lengths), head_chunks, group.name, [group.size, group.rank, group.whole, *group.members]


def _call(
    is_causal: bool, scale: float, lengths: Sequence[int], head_chunks: int, group_name: str, group_sizes: Sequence[int]
) -> Call:
    size, rank, whole, *members = group_sizes
    return Call(is_causal, scale, tuple(lengths), head_chunks, Group(group_name, size, rank, tuple(members), whole))


def _across_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    name: str,
    is_causal: bool,
    scale: float,
    lengths: Sequence[int],
    head_chunks: int,
    group_name: str,
    group_sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    call = _call(is_causal, scale, lengths, head_chunks, group_name, group_sizes)
    return _METHODS[name].forward(query, key, value, call)


_operator = torch.library.custom_op("autosp::across_ranks", _across_ranks, mutates_args=())


@_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    return query.new_empty((*rows, value.shape[3])), query.new_empty(rows, dtype=wide(query.dtype))


def _across_ranks_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    name: str,
    is_causal: bool,
    scale: float,
    lengths: Sequence[int],
    head_chunks: int,
    group_name: str,
    group_sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(is_causal, scale, lengths, head_chunks, group_name, group_sizes)
    return _METHODS[name].backward(grad, query, key, value, out, lse, call)


_backward_operator = torch.library.custom_op("autosp::across_ranks_backward", _across_ranks_backward, mutates_args=())


@_backward_operator.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.autosp.across_ranks.default: _across_ranks,
    torch.ops.autosp.across_ranks_backward.default: _across_ranks_backward,
}
"""What the operators do, for those who want to see inside."""
