"""Reductions over the sequence: reduce the part, then join the parts."""

from __future__ import annotations

import math
import operator
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from lightning_autosp import collectives
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound
from lightning_autosp.compiler.rules.generic import ask_pytorch
from lightning_autosp.compiler.rules.partial import finish_partial

__all__ = ["RULES", "moments_across", "widened"]

aten = torch.ops.aten


def _reduced_dims(dim: Any, ndim: int) -> tuple[int, ...]:
    """Return the dimensions an argument `dim` names; none means all."""
    dims = [dim] if isinstance(dim, int) else list(dim or ())
    return tuple(sorted(d % ndim for d in dims)) or tuple(range(ndim))


def _rule(join: Any) -> Rule:
    """Make a rule: over other dimensions the operator is local; over the sequence `join` says how."""

    def rule(facts: Facts, node: fx.Node) -> Sharding | None:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        layout = facts.layout(source)
        if layout is None:
            return None
        given = bound(node)
        dims = _reduced_dims(given.get("dim"), len(facts.shape(source)))
        if layout.dim not in dims:
            return ask_pytorch(facts, node)
        return join(facts, node, source, layout, dims, bool(given.get("keepdim", False)))

    return rule


def _linear(op: str) -> Any:
    return lambda facts, node, source, layout, dims, keepdim: finish_partial(facts, node, {source: layout}, layout, op)


def _extremum(minimum: bool) -> Any:
    def join(facts: Facts, node: fx.Node, source: fx.Node, layout: Any, dims: tuple[int, ...], keepdim: bool) -> Sharding:
        def emit(em: Emitter, n: fx.Node) -> fx.Node:
            args = (em.get(source, layout), dims, keepdim, em.group)
            return em.call(collectives.amax_across, args, {"minimum": minimum})

        return Sharding({source: layout}, None, emit, kind="reduction")

    return join


def _extremum_and_index(minimum: bool) -> Any:
    def join(facts: Facts, node: fx.Node, source: fx.Node, layout: Any, dims: tuple[int, ...], keepdim: bool) -> Sharding | None:
        if layout.merged:
            return None

        def emit(em: Emitter, n: fx.Node) -> fx.Node:
            args = (em.get(source, layout), dims[0], keepdim, em.bounds(layout)[em.group.rank][0], em.group)
            return em.call(max_with_index, args, {"minimum": minimum})

        return Sharding({source: layout}, (None, None), emit, kind="reduction")

    return join


def _index_of_extremum(minimum: bool) -> Any:
    def join(facts: Facts, node: fx.Node, source: fx.Node, layout: Any, dims: tuple[int, ...], keepdim: bool) -> Sharding | None:
        if layout.merged or len(dims) > 1 or facts.has_sequence(node):
            return None

        def emit(em: Emitter, n: fx.Node) -> fx.Node:
            args = (em.get(source, layout), dims[0], keepdim, em.bounds(layout)[em.group.rank][0], em.group)
            return em.call(operator.getitem, (em.call(max_with_index, args, {"minimum": minimum}), 1))

        return Sharding({source: layout}, None, emit, kind="reduction")

    return join


def _finished(across: Any, *names: str) -> Any:
    """Finish by `across(x, dims, keepdim, group)`, which is given those of the operator's arguments by name as well."""

    def join(facts: Facts, node: fx.Node, source: fx.Node, layout: Any, dims: tuple[int, ...], keepdim: bool) -> Sharding | None:
        if facts.has_sequence(node):
            return None

        def emit(em: Emitter, n: fx.Node) -> fx.Node:
            given = bound(n)
            args = (em.get(source, layout), dims, keepdim, em.group)
            return em.call(across, args, {name: given[name] for name in names})

        return Sharding({source: layout}, None, emit, kind="reduction")

    return join


def _norm(facts: Facts, node: fx.Node, source: fx.Node, layout: Any, dims: tuple[int, ...], keepdim: bool) -> Sharding | None:
    if not 1 <= bound(node)["ord"] < math.inf:
        return None  # no norm of norms
    return _finished(norm_across, "ord", "dtype")(facts, node, source, layout, dims, keepdim)  # type: ignore[no-any-return]


def _spread(root: bool) -> Any:
    """Finish a variance or, its root, a standard deviation."""

    def join(facts: Facts, node: fx.Node, source: fx.Node, layout: Any, dims: tuple[int, ...], keepdim: bool) -> Sharding | None:
        given = bound(node)
        correction = given.get("correction", int(given.get("unbiased", True)))
        if facts.has_sequence(node) or source.meta["val"].is_complex():
            return None

        def emit(em: Emitter, n: fx.Node) -> fx.Node:
            count = em.integer(sympy.prod([facts.shape(source)[dim] for dim in dims]))
            args = (em.get(source, layout), dims, keepdim, count, 1 if correction is None else correction, em.group)
            return em.call(variance_across, args, {"root": root})

        return Sharding({source: layout}, None, emit, kind="reduction")

    return join


def _truth(every: bool) -> Any:
    def join(facts: Facts, node: fx.Node, source: fx.Node, layout: Any, dims: tuple[int, ...], keepdim: bool) -> Sharding:
        def emit(em: Emitter, n: fx.Node) -> fx.Node:
            args = (em.get(source, layout), dims, keepdim, em.group)
            return em.call(truth_across, args, {"every": every})

        return Sharding({source: layout}, None, emit, kind="reduction")

    return join


def max_with_index(
    x: Tensor, dim: int, keepdim: bool, offset: int, group: Group, *, minimum: bool = False
) -> tuple[Tensor, Tensor]:
    """`torch.max(x, dim)` over a sharded `dim`: values, and indices counted over the whole sequence.

    Args:
        x: This rank's part.
        dim: The sharded dimension.
        keepdim: Whether to keep it, with size 1.
        offset: Global position of the part's first element.
        group: The sequence group.
        minimum: Whether to return the minimum instead.
    """
    pick = torch.min if minimum else torch.max
    value, index = pick(x, dim, keepdim=True)
    values = collectives.stack_across(value, group)
    indices = collectives.stack_across(index + offset, group)
    best, owner = pick(values, 0, keepdim=True)
    position = indices.gather(0, owner)
    best, position = best.squeeze(0), position.squeeze(0)
    return (best, position) if keepdim else (best.squeeze(dim), position.squeeze(dim))


def truth_across(x: Tensor, dims: tuple[int, ...], keepdim: bool, group: Group, *, every: bool) -> Tensor:
    """`torch.all` (`every`) or `torch.any` over dimensions one of which is sharded."""
    wanted = x.logical_not() if every else x
    for dim in sorted(dims, reverse=True):
        wanted = wanted.any(dim, keepdim=keepdim)
    found = collectives.all_reduce_sum(wanted.int(), group) > 0
    return found.logical_not() if every else found


def widened(x: Tensor) -> Tensor:
    """Return `x` in the type that PyTorch computes statistics of it in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def moments_across(x: Tensor, dims: tuple[int, ...], count: int, group: Group) -> tuple[Tensor, Tensor]:
    """Return the mean over `dims`, which are kept, and the sum of squared distances from it.

    Args:
        x: This rank's part.
        dims: What to reduce; one of them is sharded.
        count: Elements of the whole that are reduced to one.
        group: The sequence group.
    """
    mean = collectives.all_reduce_sum(x.sum(dims, keepdim=True), group) / count
    return mean, collectives.all_reduce_sum((x - mean).square().sum(dims, keepdim=True), group)


def variance_across(
    x: Tensor, dims: tuple[int, ...], keepdim: bool, count: int, correction: float, group: Group, *, root: bool
) -> Tensor:
    """`torch.var` (or, its `root`, `torch.std`) over dimensions one of which is sharded."""
    variance = moments_across(widened(x), dims, count, group)[1] / max(count - correction, 0)
    if root:
        # The root has no derivative where nothing varies; PyTorch takes 0.
        positive = variance != 0
        variance = torch.where(positive, torch.where(positive, variance, 1).sqrt(), variance)
    return (variance if keepdim else variance.squeeze(dims)).to(x.dtype)


def logsumexp_across(x: Tensor, dims: tuple[int, ...], keepdim: bool, group: Group) -> Tensor:
    """`torch.logsumexp` over dimensions one of which is sharded."""
    wide = widened(x)
    largest = collectives.amax_across(wide.detach(), dims, True, group)
    largest = torch.where(largest.isinf(), 0, largest)
    out = collectives.all_reduce_sum((wide - largest).exp().sum(dims, keepdim=True), group).log() + largest
    return (out if keepdim else out.squeeze(dims)).to(x.dtype)


def product_across(x: Tensor, dims: tuple[int, ...], keepdim: bool, group: Group, *, dtype: torch.dtype | None) -> Tensor:
    """`torch.prod` over one sharded dimension, or all."""
    local = x.prod(dims[0], keepdim, dtype=dtype) if len(dims) == 1 else x.prod(dtype=dtype)
    return collectives.stack_across(local, group).prod(0)


def norm_across(x: Tensor, dims: tuple[int, ...], keepdim: bool, group: Group, *, ord: float, dtype: torch.dtype | None) -> Tensor:
    """`torch.linalg.vector_norm` over dimensions one of which is sharded: the norm of the parts' norms."""
    local = torch.linalg.vector_norm(x, ord, dims, keepdim, dtype=dtype)
    return torch.linalg.vector_norm(collectives.stack_across(local, group), ord, 0)


RULES: dict[Any, Rule] = {
    aten.sum.default: _rule(_linear("sum")),
    aten.sum.dim_IntList: _rule(_linear("sum")),
    aten.mean.default: _rule(_linear("avg")),
    aten.mean.dim: _rule(_linear("avg")),
    aten.amax.default: _rule(_extremum(minimum=False)),
    aten.amin.default: _rule(_extremum(minimum=True)),
    aten.max.default: _rule(_extremum(minimum=False)),
    aten.min.default: _rule(_extremum(minimum=True)),
    aten.max.dim: _rule(_extremum_and_index(minimum=False)),
    aten.min.dim: _rule(_extremum_and_index(minimum=True)),
    aten.any.default: _rule(_truth(every=False)),
    aten.any.dim: _rule(_truth(every=False)),
    aten.any.dims: _rule(_truth(every=False)),
    aten.all.default: _rule(_truth(every=True)),
    aten.all.dim: _rule(_truth(every=True)),
    aten.all.dims: _rule(_truth(every=True)),
    aten.argmax.default: _rule(_index_of_extremum(minimum=False)),
    aten.argmin.default: _rule(_index_of_extremum(minimum=True)),
    aten.logsumexp.default: _rule(_finished(logsumexp_across)),
    aten.prod.default: _rule(_finished(product_across, "dtype")),
    aten.prod.dim_int: _rule(_finished(product_across, "dtype")),
    aten.linalg_vector_norm.default: _rule(_norm),
    aten.var.default: _rule(_spread(root=False)),
    aten.var.dim: _rule(_spread(root=False)),
    aten.var.correction: _rule(_spread(root=False)),
    aten.std.default: _rule(_spread(root=True)),
    aten.std.dim: _rule(_spread(root=True)),
    aten.std.correction: _rule(_spread(root=True)),
}
