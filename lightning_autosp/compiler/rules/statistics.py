"""Operators that normalise by a statistic of the whole sequence: each part gives its share, and only the shares are exchanged."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from lightning_autosp import collectives
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound
from lightning_autosp.compiler.rules.generic import ask_pytorch
from lightning_autosp.compiler.rules.reductions import moments_across, widened

__all__ = ["RULES", "group_norm_across", "softmax_across"]

aten = torch.ops.aten


def softmax(facts: Facts, node: fx.Node) -> Sharding | None:
    given = bound(node)
    source = given["self"]
    layout = facts.layout(source)
    if layout is None or given["dim"] % len(facts.shape(source)) != layout.dim:
        return ask_pytorch(facts, node)
    if len(facts.sequence_dims(node)) > 1:
        return None  # scores: softmax over whole rows is cheaper than over parts of them

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        log = n.target is aten.log_softmax.int
        return em.call(softmax_across, (em.get(source, layout), layout.dim, given["dtype"], em.group), {"log": log})

    return Sharding({source: layout}, layout, emit, kind="exchange")


class _SoftmaxAcross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, log: bool, group: Group) -> Tensor:
        wide = widened(x)
        shifted = wide - collectives.amax_across(wide, (dim,), True, group)
        total = collectives.all_reduce_sum(shifted.exp().sum(dim, keepdim=True), group)
        out = (shifted - total.log() if log else shifted.exp() / total).to(x.dtype)
        ctx.save_for_backward(out)
        ctx.dim, ctx.log, ctx.group = dim, log, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (out,) = ctx.saved_tensors
        wide, out = widened(grad), widened(out)
        share = wide if ctx.log else wide * out
        total = collectives.all_reduce_sum(share.sum(ctx.dim, keepdim=True), ctx.group)
        return (wide - out.exp() * total if ctx.log else share - out * total).to(grad.dtype), None, None, None


def softmax_across(x: Tensor, dim: int, dtype: torch.dtype | None, group: Group, *, log: bool) -> Tensor:
    """`torch.softmax` (or `log_softmax`) over a sharded `dim`; returns this rank's part."""
    return _SoftmaxAcross.apply(x if dtype is None else x.to(dtype), dim, log, group)


def group_norm(facts: Facts, node: fx.Node) -> Sharding | None:
    """Each group of channels is normalised over all positions."""
    given = bound(node)
    source = given["input"]
    layout = facts.layout(source)
    if layout is None or layout.dim == 1 or any(facts.has_sequence(x) for x in (given["weight"], given["bias"]) if x is not None):
        return None
    if layout.dim == 0:
        return Sharding({source: layout}, layout)

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        count = em.integer(sympy.prod(facts.shape(source)[1:])) // given["num_groups"]
        weights = [None if x is None else em.get(x, None) for x in (given["weight"], given["bias"])]
        return em.call(group_norm_across, (em.get(source, layout), given["num_groups"], *weights, given["eps"], count, em.group))

    return Sharding({source: layout}, layout, emit, kind="exchange")


def group_norm_across(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, count: int, group: Group
) -> Tensor:
    """`torch.group_norm` of a part.

    Args:
        x: This rank's part, shape `(N, C, ...)`.
        num_groups: Groups the channels are divided into.
        weight: A factor for each channel.
        bias: A term for each channel.
        eps: Added to the variance.
        count: Elements of a whole group.
        group: The sequence group.
    """
    groups = widened(x).unflatten(1, (num_groups, -1))
    mean, squares = moments_across(groups, tuple(range(2, groups.ndim)), count, group)
    out = ((groups - mean) * (squares / count + eps).rsqrt()).flatten(1, 2)
    channels = (-1, *[1] * (x.ndim - 2))
    if weight is not None:
        out = out * weight.view(channels)
    if bias is not None:
        out = out + bias.view(channels)
    return out.to(x.dtype)


RULES: dict[Any, Rule] = {
    aten.softmax.int: softmax,
    aten.log_softmax.int: softmax,
    aten.group_norm.default: group_norm,
}
