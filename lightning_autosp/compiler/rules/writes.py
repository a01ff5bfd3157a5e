"""Positions that data name, overwritten or added to (`x[mask] = y`, `x.index_add(1, i, y)`): every rank writes those it holds.

What is written is wanted whole, be it a few positions or another sequence (the features of images, for the places of their
tokens). What is written into is never gathered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from lightning_autosp.collectives import Group, stack_across
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound
from lightning_autosp.compiler.rules.generic import ask_pytorch, broadcast_needs

__all__ = ["RULES", "put_masked_across"]

aten = torch.ops.aten

_EXPANSIONS = {aten.expand.default, aten.expand_as.default}
_COPIES = {aten._to_copy.default, aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default}
_REDUCTIONS = {"sum", "mean", "amax", "amin"}
"""Of `scatter_reduce`: those whose gradient does not divide by what is there."""


# Places of a mask


def masked_scatter(facts: Facts, node: fx.Node) -> Sharding | None:
    """`x.masked_scatter(mask, source)`: the source's elements, in order, for the mask's places."""
    given = bound(node)
    target, mask, source = given["self"], given["mask"], given["source"]
    layout, shape, compact = facts.layout(target), facts.shape(target), _unexpanded(given["mask"])
    if layout is None or source in (target, mask, compact):
        return None
    own = facts.shape(compact)
    parts = broadcast_needs(facts, [compact], layout, len(shape) - layout.dim)
    if parts is None:
        return None
    varying = [dim + len(shape) - len(own) for dim, size in enumerate(own) if size != 1]
    num_dims = max([layout.dim, *varying]) + 1

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        values = em.get(target, layout), em.get(compact, parts.get(compact)), em.get(source, None)
        return em.call(put_masked_across, (*values, _segments(em, target, layout), num_dims, False, em.group))

    needs = {target: layout}
    if compact is mask:
        return Sharding(needs | parts, layout, emit, kind="exchange")
    return Sharding(needs, layout, emit, kind="exchange", unused=(mask,), also={compact: parts.get(compact)})


def _unexpanded(mask: fx.Node) -> fx.Node:
    """Return the mask before it was expanded, which broadcasts to the same."""
    node, found = mask, mask
    while node.target in _COPIES | _EXPANSIONS and node.args[0].meta["val"].dtype is torch.bool:  # type: ignore[union-attr]
        expanded, node = node.target in _EXPANSIONS, node.args[0]  # type: ignore[assignment]
        found = node if expanded else found
    return found


def _put_rows(facts: Facts, target: fx.Node, mask: fx.Node, values: fx.Node) -> Sharding | None:
    """`x[mask] = y`: a row for every place, or one for all of them."""
    layout, shape, own = facts.layout(target), facts.shape(target), facts.shape(mask)
    part = None if layout is None or layout.dim >= len(own) else facts.fit(mask, layout.dim, layout)
    if layout is None or part is None or values in (target, mask):
        return None
    width, given = len(shape) - len(own), facts.shape(values)
    for_all = len(given) <= width or (len(given) == width + 1 and given[0] == 1)
    if not for_all and (given[1:] != shape[len(own) :] or given[0].free_symbols):
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        x, here, rows = em.get(target, layout), em.get(mask, part), em.get(values, None)
        for _ in range(width):
            here = em.call(aten.unsqueeze.default, (here, -1))
        if for_all:
            return em.call(aten.where.self, (here, rows, x))
        return em.call(put_masked_across, (x, here, rows, _segments(em, target, layout), len(own), True, em.group))

    return Sharding({target: layout, mask: part}, layout, emit, kind="local" if for_all else "exchange")


def _segments(em: Emitter, node: fx.Node, layout: Layout) -> int:
    """Return how many stretches of the whole a part is, as it lies in memory."""
    return math.prod(em.integer(size) for size in (*em.facts.shape(node)[: layout.dim], layout.outer))


def put_masked_across(x: Tensor, mask: Tensor, source: Tensor, segments: int, num_dims: int, exactly: bool, group: Group) -> Tensor:
    """`x.masked_scatter(mask, source)` of a tensor that is split along one dimension.

    Args:
        x: This rank's part.
        mask: Boolean, this rank's part, broadcastable to `x`; size 1 behind the first `num_dims` dimensions of `x`.
        source: The elements, whole.
        segments: How many stretches of the whole the part is, as it lies in memory.
        num_dims: How many dimensions of `x` the mask tells apart.
        exactly: Whether the source may have no more elements than there are places.
        group: The sequence group.

    Returns:
        This rank's part of the result.

    Raises:
        RuntimeError: On every rank, if the source does not have as many elements as it should.
    """
    width = math.prod(x.shape[num_dims:])
    rows = source.reshape(-1)
    rows = rows[: rows.numel() // width * width].view(-1, width)
    aligned = mask[(None,) * (x.ndim - mask.ndim)]
    here = aligned.reshape(aligned.shape[:num_dims]).expand(x.shape[:num_dims]).reshape(segments, -1)
    counts = stack_across(here.sum(1), group).T.flatten()
    fits = counts.sum() == rows.shape[0] if exactly else counts.sum() <= rows.shape[0]
    torch._assert_async(fits, f"a mask has not as many places as the {rows.shape[0]} rows that are written to them")
    before = (counts.cumsum(0) - counts).view(segments, group.size)[:, group.rank]
    if rows.shape[0] == 0:
        rows = torch.cat([rows, rows.new_zeros(1, width)])
    # Other places read rows that differ, so that their gradients, zeros, are not all added to one row, one after the other.
    others = torch.arange(here.shape[1], device=here.device) % rows.shape[0]
    taken = rows[torch.where(here, before[:, None] + here.cumsum(1) - 1, others)]
    return torch.where(here.reshape(*x.shape[:num_dims], *[1] * (x.ndim - num_dims)), taken.reshape(x.shape), x)


# Positions


def index_put(facts: Facts, node: fx.Node) -> Sharding | None:
    """`x[i, j] = y` and `x[i, j] += y`."""
    given = bound(node)
    target, values = given["self"], given["values"]
    named = {dim: index for dim, index in enumerate(given["indices"]) if index is not None}
    if any(index.meta["val"].dtype is torch.bool for index in named.values()):
        alone = len(given["indices"]) == 1 and not given["accumulate"]
        return _put_rows(facts, target, named[0], values) if alone else None
    layout = facts.layout(target)
    if layout is None:
        return ask_pytorch(facts, node)
    if layout.dim in named:
        return _put(facts, node, named, values, wraps=True)
    adjacent = list(named) == list(range(min(named), max(named) + 1))
    width = max(len(facts.shape(index)) for index in named.values())
    before = len([dim for dim in named if dim < layout.dim])
    moved = layout.dim - before + (width if before or not adjacent else 0)
    parts = broadcast_needs(facts, [values], layout, len(facts.shape(target)) - len(named) + width - moved)
    return None if parts is None else _beside(target, layout, list(named.values()), parts)


def put_along(facts: Facts, node: fx.Node) -> Sharding | None:
    """`x.index_add(dim, i, y)` and its like: positions of one dimension, all that is at them."""
    given = bound(node)
    target, index = given["self"], given["index"]
    values = given["source"] if "source" in given else given["value"]
    layout, dim = facts.layout(target), given["dim"] % max(len(facts.shape(target)), 1)
    if layout is None:
        return ask_pytorch(facts, node)
    if layout.dim == dim:
        return _put(facts, node, {dim: index}, values)
    if not isinstance(values, fx.Node) or not facts.shape(values):
        return _beside(target, layout, [index], {})
    part = facts.fit(values, layout.dim, layout)
    return None if part is None else _beside(target, layout, [index], {values: part})


def scatter(facts: Facts, node: fx.Node) -> Sharding | None:
    """`x.scatter(dim, i, y)` and its like: a position for every element."""
    given = bound(node)
    target, index = given["self"], given["index"]
    values = given["src"] if "src" in given else given["value"]
    layout, dim = facts.layout(target), given["dim"] % max(len(facts.shape(target)), 1)
    if given.get("reduce", "sum") not in _REDUCTIONS:
        return None
    if layout is None:
        return ask_pytorch(facts, node)
    if layout.dim == dim:
        return _put(facts, node, {dim: index}, values)
    parts = {one: facts.fit(one, layout.dim, layout) for one in (index, values) if isinstance(one, fx.Node)}
    known = {one: part for one, part in parts.items() if part is not None}
    return _beside(target, layout, [], known) if len(known) == len(parts) else None


def _beside(target: fx.Node, layout: Layout, whole: Sequence[fx.Node], parts: Mapping[fx.Node, Layout]) -> Sharding | None:
    """Make the sharding of a write to positions of dimensions that are not cut."""
    return None if target in (*whole, *parts) or set(whole) & set(parts) else Sharding({target: layout, **parts}, layout)


def _put(facts: Facts, node: fx.Node, indices: Mapping[int, fx.Node], values: Any, *, wraps: bool = False) -> Sharding | None:
    """Make the sharding of a write to positions of the dimension that is cut.

    Args:
        facts: What is known of the graph.
        node: The operator.
        indices: The positions, by the dimension of its first argument that they are of.
        values: What is written.
        wraps: Whether negative positions count from the end.
    """
    target: Any = node.args[0]
    layout = facts.layout(target)
    inputs = [target, *indices.values(), values]
    if layout is None or inputs.count(target) > 1 or values in indices.values():
        return None
    if isinstance(values, fx.Node) and values in facts.trained and facts.layout(values) is not None:
        return None  # parts of another dimension may meet without a gather
    index = indices[layout.dim]

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        cuts, outer = em.cuts(layout), em.integer(layout.outer)
        start, stop = cuts[em.group.rank]
        length = outer * (stop - start)
        replaced = {
            target: em.call(with_spare, (em.get(target, layout), layout.dim)),
            index: em.call(places_in_part, (em.get(index, None), start, stop, cuts[-1][1], outer, wraps)),
        }
        args, kwargs = fx.map_arg((n.args, n.kwargs), lambda one: replaced[one] if one in replaced else em.value(one))
        return em.call(aten.slice.Tensor, (em.call(n.target, args, kwargs), layout.dim, 0, length))

    return Sharding({target: layout}, layout, emit)


def with_spare(x: Tensor, dim: int) -> Tensor:
    """Append a position for what belongs to other ranks."""
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, 1))


def places_in_part(positions: Tensor, start: int, stop: int, size: int, outer: int, wraps: bool) -> Tensor:
    """Return positions of the whole as those of a part with one to spare at its end.

    Args:
        positions: In a dimension of `outer * size` positions.
        start: The first of each `size` that the part has.
        stop: Behind the last of them.
        size: What is cut.
        outer: How many times.
        wraps: Whether negative positions count from the end.

    Returns:
        Positions in the part; the spare one for those of other parts. A position that does not exist does not exist in any part
        either: every rank fails as one device does.
    """
    spare = outer * (stop - start)
    counted = torch.where(positions < 0, positions + outer * size, positions) if wraps else positions
    within = counted % size
    own = counted // size * (stop - start) + within - start
    exists = (counted >= 0) & (counted < outer * size)
    return torch.where(exists, torch.where((within >= start) & (within < stop), own, spare), spare + 1)


RULES: dict[Any, Rule] = {
    aten.masked_scatter.default: masked_scatter,
    aten.index_put.default: index_put,
    **dict.fromkeys([aten.index_add.default, aten.index_copy.default, aten.index_fill.int_Scalar], put_along),
    **dict.fromkeys(
        [aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two],
        scatter,
    ),
}
