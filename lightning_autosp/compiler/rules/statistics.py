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

__all__ = ["RULES", "batch_norm_across", "group_norm_across", "softmax_across"]

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


def batch_norm(facts: Facts, node: fx.Node) -> Sharding | None:
    """Each channel is normalised over all samples and positions, in evaluation by what the module remembers."""
    given = bound(node)
    source, others = given["input"], [given.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    layout = facts.layout(source)
    if layout is None or layout.dim == 1 or any(facts.has_sequence(x) for x in others if x is not None):
        return None
    outputs = (layout, *[None] * (len(node.meta["val"]) - 1))
    if not given.get("training"):
        return Sharding({source: layout}, outputs)

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        count = em.integer(sympy.prod(facts.shape(source)) / facts.shape(source)[1])
        whole = [None if x is None else em.get(x, None) for x in others]
        return em.call(batch_norm_across, (em.get(source, layout), *whole, given["momentum"], given["eps"], count, em.group))

    return Sharding({source: layout}, outputs, emit, kind="exchange")


def batch_norm_across(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    count: int,
    group: Group,
) -> tuple[Tensor, ...]:
    """`aten._native_batch_norm_legit_functional` of a part, or without what a module remembers `aten._native_batch_norm_legit`.

    Args:
        x: This rank's part, shape `(N, C, ...)`.
        weight: A factor for each channel.
        bias: A term for each channel.
        running_mean: The mean so far.
        running_var: The variance so far.
        momentum: The weight of the new ones.
        eps: Added to the variance.
        count: Elements of a whole channel.
        group: The sequence group.

    Returns:
        The normalised part, the mean, the inverse of the deviation, and the new mean and variance if there were some.
    """
    wide = widened(x)
    mean, squares = moments_across(wide, (0, *range(2, x.ndim)), count, group)
    inverse = (squares / count + eps).rsqrt()
    out = (wide - mean) * inverse
    channels = mean.shape
    if weight is not None:
        out = out * weight.view(channels)
    if bias is not None:
        out = out + bias.view(channels)
    results = (out.to(x.dtype), mean.detach().flatten(), inverse.detach().flatten())
    if running_mean is None or running_var is None:
        return results
    variance = squares.detach().flatten() / (count - 1)
    return (
        *results,
        running_mean.lerp(results[1].to(running_mean.dtype), momentum),
        running_var.lerp(variance.to(running_var.dtype), momentum),
    )


RULES: dict[Any, Rule] = {
    aten.softmax.int: softmax,
    aten.log_softmax.int: softmax,
    aten.group_norm.default: group_norm,
    aten._native_batch_norm_legit_functional.default: batch_norm,
    aten._native_batch_norm_legit.no_stats: batch_norm,
    aten._native_batch_norm_legit_no_training.default: batch_norm,
}
