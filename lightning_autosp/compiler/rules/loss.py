"""Losses: the exact global value, whatever each shard holds.

A mean is a quotient of two sums over the whole sequence (weights of the counted tokens, not tokens per rank), so both are
summed over the ranks before the division; a shard whose tokens are all ignored adds zero to both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from lightning_autosp import collectives
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound, tensor_inputs
from lightning_autosp.compiler.rules.generic import broadcast_needs, pointwise
from lightning_autosp.compiler.rules.partial import finish_partial

__all__ = ["CLASSIFICATION", "ELEMENTWISE", "MEAN", "NONE", "RULES", "sharded_cross_entropy", "sharded_nll_loss"]

aten = torch.ops.aten
NONE, MEAN = 0, 1
_REDUCTION = ("none", "mean", "sum")


def classification(facts: Facts, node: fx.Node) -> Sharding | None:
    """`F.cross_entropy` and `F.nll_loss`, class indices or probabilities, any number of position dimensions."""
    given = bound(node)
    scores, target = given["self"], given["target"]
    layout = facts.layout(scores)
    ndim = len(facts.shape(scores))
    class_dim = 1 if ndim > 1 else 0
    if layout is None or layout.dim == class_dim:
        return None
    probabilities = target.meta["val"].is_floating_point()
    target_dim = layout.dim if probabilities or layout.dim < class_dim else layout.dim - 1
    target_layout = facts.fit(target, target_dim, layout)
    if target_layout is None:
        return None
    needs = {scores: layout, target: target_layout}
    smoothing = given.get("label_smoothing", 0.0)
    if given["reduction"] == NONE:
        return Sharding(needs, layout.at(layout.dim - (layout.dim > class_dim)))

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        local = [em.get(value, needs[value]) for value in (scores, target)]
        weight = em.value(given["weight"])
        if n.target is aten.cross_entropy_loss.default:
            args = (*local, weight, given["reduction"], given["ignore_index"], smoothing, em.group)
            return em.call(sharded_cross_entropy, args)
        args = (*local, weight, given["reduction"], given["ignore_index"], em.group)
        return em.call(sharded_nll_loss, args)

    return Sharding(needs, None, emit, kind="loss", note=f"reduction={_REDUCTION[given['reduction']]!r}")


def sharded_cross_entropy(
    scores: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
    group: Group,
) -> Tensor:
    """`F.cross_entropy` over positions that are split over the ranks of `group`.

    Args:
        scores: Unnormalised scores, shape `(N, C)`, `(N, C, d1, ...)` or `(C,)`: this rank's positions.
        target: Class indices, shape of `scores` without `C`, or probabilities, shape of `scores`.
        weight: Class weights, shape `(C,)`, or `None`.
        reduction: 1 mean, 2 sum, as ATen counts them.
        ignore_index: The index that does not count.
        label_smoothing: In `[0, 1]`.
        group: The sequence group.

    Returns:
        The one-device value: a scalar equal on all ranks.
    """
    total = F.cross_entropy(
        scores,
        target,
        weight,
        reduction="sum",
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    if target.is_floating_point():
        counted = total.new_full((), target.numel() / target.shape[1 if target.ndim > 1 else 0], dtype=torch.float64)
    else:
        counted = _counted(target, weight, ignore_index)
    return _finish(total, counted, reduction, group)


def sharded_nll_loss(
    log_probabilities: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, group: Group
) -> Tensor:
    """`F.nll_loss` over positions that are split over the ranks of `group`; arguments as `sharded_cross_entropy`."""
    total = F.nll_loss(log_probabilities, target, weight, reduction="sum", ignore_index=ignore_index)
    return _finish(total, _counted(target, weight, ignore_index), reduction, group)


def _counted(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    valid = target != ignore_index
    if weight is None:
        return valid.sum()
    return torch.where(valid, weight[torch.where(valid, target, 0)], 0).sum()


def _finish(total: Tensor, counted: Tensor, reduction: int, group: Group) -> Tensor:
    dtype = total.dtype
    wide = torch.promote_types(dtype, torch.float32)
    total = collectives.all_reduce_sum(total.to(wide), group)
    if reduction == MEAN:
        total = total / collectives.all_reduce_sum(counted.to(torch.float64), group).to(wide)
    return total.to(dtype)


def elementwise(facts: Facts, node: fx.Node) -> Sharding | None:
    """`F.mse_loss` and its like: the mean of as many terms as there are elements."""
    reduction = bound(node)["reduction"]
    inputs = tensor_inputs(node)
    found = facts.reference(inputs)
    if found is None:
        return None
    if reduction == NONE:
        return pointwise(facts, node)
    reference, layout = found
    needs = broadcast_needs(facts, inputs, layout, len(facts.shape(reference)) - layout.dim)
    if needs is None:
        return None
    finished = finish_partial(facts, node, needs, layout, "avg" if reduction == MEAN else "sum")
    return finished and replace(finished, kind="loss", note=f"reduction={_REDUCTION[reduction]!r}")


CLASSIFICATION = {
    aten.cross_entropy_loss.default,
    aten.nll_loss_nd.default,
    aten.nll_loss.default,
    aten.nll_loss2d.default,
}
ELEMENTWISE = {
    aten.mse_loss.default,
    aten.l1_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.kl_div.default,
    aten.soft_margin_loss.default,
    aten.poisson_nll_loss.default,
}

RULES: dict[Any, Rule] = {**dict.fromkeys(CLASSIFICATION, classification), **dict.fromkeys(ELEMENTWISE, elementwise)}
