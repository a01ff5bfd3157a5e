"""Reductions over the sequence: reduce the part, then join the parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lightning_autosp import collectives
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound
from lightning_autosp.compiler.rules.generic import ask_pytorch
from lightning_autosp.compiler.rules.partial import finish_partial

__all__ = ["RULES"]

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
}
