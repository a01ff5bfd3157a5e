"""Positions that data name (`x[torch.arange(B), last]`): looked up by the rank that holds them, and given to all.

Where a position is named for every position (`x.gather(1, order)`), the parts go round: each rank looks up its own in one part
after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lightning_autosp import collectives
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import GIVEN_TO_ALL, Facts, Rule, Sharding, bound
from lightning_autosp.compiler.rules.generic import ask_pytorch
from lightning_autosp.exchange import fetch

__all__ = ["RULES", "gather_across", "gather_in_turn", "index_across"]

aten = torch.ops.aten


def index(facts: Facts, node: fx.Node) -> Sharding | None:
    """`x[i, j]`."""
    given = bound(node)
    table, indices = given["self"], list(given["indices"])
    named = [dim for dim, one in enumerate(indices) if one is not None]
    if any(indices[dim].meta["val"].dtype is torch.bool for dim in named):
        return None
    if not facts.has_sequence(table):
        return _rows_of_a_table(facts, indices)
    layout = facts.layout(table)
    if layout is None or any(facts.has_sequence(indices[dim]) for dim in named):
        return None
    adjacent = named == list(range(named[0], named[-1] + 1))
    place = named[0] if adjacent else 0
    width = max(len(facts.shape(indices[dim])) for dim in named)
    if layout.dim in named:
        return _picked(facts, node, table, layout, indices, place, width)
    before = len([dim for dim in named if dim < layout.dim])
    moved = layout.dim - before + (width if before or not adjacent else 0)
    return Sharding({table: layout}, layout.at(moved))


def _rows_of_a_table(facts: Facts, indices: Sequence[fx.Node | None]) -> Sharding | None:
    """One row of a table for every position."""
    first = indices[0]
    layout = facts.layout(first) if first is not None and len(indices) == 1 else None
    return None if first is None or layout is None else Sharding({first: layout}, layout)


def _picked(
    facts: Facts, node: fx.Node, table: fx.Node, layout: Layout, indices: Sequence[fx.Node | None], place: int, width: int
) -> Sharding | None:
    if layout.outer != 1 or facts.has_sequence(node) or table.meta["val"].dtype is torch.bool:
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        start, size = em.cuts(layout)[em.group.rank][0], em.integer(layout.size)
        whole = [None if one is None else em.get(one, None) for one in indices]
        args = (em.get(table, layout), whole, layout.dim, start, size, place, width, em.group)
        return em.call(index_across, args)

    return Sharding({table: layout}, None, emit, kind="reduction", note=GIVEN_TO_ALL)


def _local(positions: Tensor, start: int, length: int, size: int) -> tuple[Tensor, Tensor]:
    """Return positions in a part, and which of them are in it; the others are 0 there.

    Args:
        positions: Of the whole.
        start: The part's first.
        length: How many the part has.
        size: How many there are.
    """
    owned = (positions >= start) & (positions < start + length)
    exists = (positions >= 0) & (positions < size)
    # A position that does not exist is none of the part's either: every rank fails as one device does.
    return torch.where(owned, positions - start, torch.where(exists, 0, length)), owned


def index_across(
    x: Tensor, indices: Sequence[Tensor | None], dim: int, start: int, size: int, place: int, width: int, group: Group
) -> Tensor:
    """`x[indices]` of a tensor that is split along an indexed `dim`; every rank gets all of it.

    Args:
        x: This rank's part.
        indices: An index for each of the first dimensions, `None` for all of it.
        dim: The dimension that is split.
        start: Position of the part's first element.
        size: Positions there are.
        place: The dimension of the result at which those of the indices begin.
        width: How many they are.
        group: The sequence group.
    """
    given = list(indices)
    positions = given[dim]
    assert positions is not None
    given[dim], owned = _local(torch.where(positions < 0, positions + size, positions), start, x.shape[dim], size)
    picked = x[tuple(slice(None) if one is None else one for one in given)]
    shape = (*picked.shape[place : place + width], *[1] * (picked.ndim - place - width))
    return collectives.all_reduce_sum(picked.masked_fill(~owned.expand(shape[:width]).reshape(shape), 0), group)


def select_by_index(facts: Facts, node: fx.Node) -> Sharding | None:
    given = bound(node)
    table, dim, positions = given["self"], given["dim"] % len(facts.shape(given["self"])), given["index"]
    layout = facts.layout(table)
    if layout is None or layout.dim != dim or facts.has_sequence(positions):
        return ask_pytorch(facts, node)
    return _picked(facts, node, table, layout, [None] * dim + [positions], dim, 1)


def gather(facts: Facts, node: fx.Node) -> Sharding | None:
    given = bound(node)
    table, dim, positions = given["self"], given["dim"] % len(facts.shape(given["self"])), given["index"]
    layout = facts.layout(table)
    if layout is None or layout.dim != dim:
        return ask_pytorch(facts, node)
    if facts.has_sequence(positions):
        return _in_turn(facts, table, layout, positions)
    if layout.outer != 1 or table.meta["val"].dtype is torch.bool:
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        start, size = em.cuts(layout)[em.group.rank][0], em.integer(layout.size)
        return em.call(gather_across, (em.get(table, layout), dim, em.get(positions, None), start, size, em.group))

    return Sharding({table: layout}, None, emit, kind="reduction", note=GIVEN_TO_ALL)


def _in_turn(facts: Facts, table: fx.Node, layout: Layout, positions: fx.Node) -> Sharding | None:
    """`torch.gather` along the sequence, of positions that are a sequence of that dimension too."""
    out = facts.resized(layout, facts.shape(positions)[layout.dim])
    part = None if out is None else facts.fit(positions, layout.dim, out)
    if out is None or part is None or layout.merged or layout.routed or positions is table or table not in facts.trained:
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        args = (em.get(table, layout), layout.dim, em.get(positions, part), em.bounds(layout), em.group)
        return em.call(gather_in_turn, args)

    return Sharding({table: layout, positions: part}, out, emit, kind="exchange")


def gather_in_turn(x: Tensor, dim: int, positions: Tensor, bounds: Sequence[tuple[int, int]], group: Group) -> Tensor:
    """`torch.gather` along a sharded `dim` for positions that are sharded along it as well.

    Args:
        x: This rank's part.
        dim: The dimension that is split.
        positions: Of the whole, this rank's part.
        bounds: Every rank's `(start, stop)` of `x`.
        group: The sequence group.
    """
    found: Tensor | None = None
    for turn in range(group.size):
        wanted = [bounds[(rank + turn) % group.size] for rank in range(group.size)]
        start, stop = wanted[group.rank]
        part = fetch(x, dim, bounds, [((*one, 1),) for one in wanted], group)
        local, owned = _local(positions, start, stop - start, bounds[-1][1])
        picked = part.gather(dim, local)
        found = picked if found is None else torch.where(owned, picked, found)
    assert found is not None
    return found


def gather_across(x: Tensor, dim: int, positions: Tensor, start: int, size: int, group: Group) -> Tensor:
    """`torch.gather` along a sharded `dim`; every rank gets all of it. Arguments as for `index_across`."""
    local, owned = _local(positions, start, x.shape[dim], size)
    return collectives.all_reduce_sum(x.gather(dim, local).masked_fill(~owned, 0), group)


RULES: dict[Any, Rule] = {
    aten.index.Tensor: index,
    aten.index_select.default: select_by_index,
    aten.gather.default: gather,
}
