"""Slicing, picking, padding and concatenating along the sequence.

Dropping or adding positions at either end keeps every other position where it is: only the first or last rank acts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lightning_autosp import collectives
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound, tensor_inputs
from lightning_autosp.compiler.rules.generic import ask_pytorch

__all__ = ["RULES"]

aten = torch.ops.aten


def slice_(facts: Facts, node: fx.Node) -> Sharding | None:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    layout = facts.layout(source)
    given = bound(node)
    dim = given["dim"] % len(facts.shape(source))
    if layout is None or dim != layout.dim:
        return ask_pytorch(facts, node)
    if given["step"] != 1 or layout.merged:
        return None
    size, start = facts.shape(node)[dim], _position(facts, given["start"] or 0, layout)
    if start is None:
        return None
    if not size.free_symbols:  # a few positions at a known end: every rank gets them
        return _take(facts, node, source, layout, start, int(size))
    span = facts.span_of(size)
    if span is None or span.base != layout.span.base or start < 0:
        return None
    begin = layout.span.begin + start
    end = span.end - span.begin + begin
    if end > layout.span.end:
        return None
    out = layout.over(replace(layout.span, begin=begin, end=end))

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        value = em.get(source, layout)
        first = start if em.group.rank == 0 else 0
        if em.local_length(layout) == em.local_length(out):
            return value
        return em.call(aten.slice.Tensor, (value, dim, first, first + em.local_length(out)))

    return Sharding({source: layout}, out, emit)


def select(facts: Facts, node: fx.Node) -> Sharding | None:
    """One position of the sequence (a class token, the last token): its owner gives it to all."""
    source, dim, index = node.args[0], node.args[1], node.args[2]
    assert isinstance(source, fx.Node)
    layout = facts.layout(source)
    if layout is None or dim % len(facts.shape(source)) != layout.dim:  # type: ignore[operator]
        return ask_pytorch(facts, node)
    position = _position(facts, index, layout)
    if layout.merged or position is None:
        return None
    return _take(facts, node, source, layout, position, None)


def _position(facts: Facts, index: Any, layout: Layout) -> int | None:
    """Return a constant position: counted from the first if >= 0, from behind the last if negative."""
    expr = facts.expr(index)
    from_end = expr - layout.span.length
    return int(expr) if expr.is_Integer else int(from_end) if from_end.is_Integer and from_end < 0 else None


def _take(facts: Facts, node: fx.Node, source: fx.Node, layout: Layout, start: int, length: int | None) -> Sharding | None:
    """Give positions `[start, start + length)` to every rank (`None`: one position, its dimension dropped)."""
    if facts.has_sequence(node):
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        first = start if start >= 0 else em.size(layout) + start
        return em.call(
            take_positions,
            (em.get(source, layout), layout.dim, first, 1 if length is None else length, em.bounds(layout), em.group),
            {"drop": length is None},
        )

    return Sharding({source: layout}, None, emit, kind="reduction", note="positions given to all ranks")


def take_positions(
    x: torch.Tensor,
    dim: int,
    start: int,
    length: int,
    bounds: tuple[tuple[int, int], ...],
    group: collectives.Group,
    *,
    drop: bool = False,
) -> torch.Tensor:
    """Return global positions `[start, start + length)` of a sharded tensor on every rank.

    Args:
        x: This rank's part, positions `bounds[group.rank]` along `dim`.
        dim: The sequence dimension.
        start: First position.
        length: Number of positions.
        bounds: Every rank's `(start, stop)`.
        group: The sequence group.
        drop: Whether to drop `dim` (then `length == 1`).
    """
    low, high = bounds[group.rank]
    first, last = max(low, start), min(high, start + length)
    if first < last:
        mine = x.narrow(dim, first - low, last - first)
        before, behind = first - start, start + length - last
    else:
        mine, before, behind = x.narrow(dim, 0, 0), length, 0
    mine = torch.nn.functional.pad(mine, [0, 0] * (x.ndim - 1 - dim) + [before, behind])
    dtype = mine.dtype
    whole = collectives.all_reduce_sum(mine.int() if dtype is torch.bool else mine, group).to(dtype)
    return whole.squeeze(dim) if drop else whole


def cat(facts: Facts, node: fx.Node) -> Sharding | None:
    """Concatenate along another dimension, or add positions before and behind the sequence."""
    listed: Any = node.args[0]
    pieces: list[fx.Node] = [piece for piece in listed if not _is_empty_vector(facts, piece)]
    shape = facts.shape(node)
    dim = bound(node)["dim"] % len(shape)
    found = facts.reference(pieces)
    if found is None:
        return None
    main, layout = found
    if dim != layout.dim:
        needs: dict[fx.Node, Layout] = {}
        for piece in pieces:
            fitted = facts.fit(piece, layout.dim, layout)
            if fitted is None:
                return None
            needs[piece] = fitted

        def emit(em: Emitter, n: fx.Node) -> fx.Node:
            return em.call(aten.cat.default, ([em.get(piece, needs[piece]) for piece in pieces], dim))

        return Sharding(needs, layout, emit)

    others = [piece for piece in pieces if piece is not main]
    if layout.merged or pieces.count(main) != 1 or any(facts.shape(piece)[dim].free_symbols for piece in others):
        return None
    place = pieces.index(main)
    added = [int(facts.shape(piece)[dim]) for piece in pieces if piece is not main]
    out = _grown(layout, sum(added[:place]), sum(added[place:]))

    def emit_ends(em: Emitter, n: fx.Node) -> fx.Node:
        # Ranks that own none of an added piece take zero positions of it: its gradient is then zero there, not absent, and every
        # rank takes part in the collectives of the backward pass.
        first, last = em.group.rank == 0, em.group.rank == em.group.size - 1
        parts = []
        for index, piece in enumerate(pieces):
            owned = piece is main or (first if index < place else last)
            whole = em.get(piece, layout if piece is main else None)
            parts.append(whole if owned else em.call(aten.slice.Tensor, (whole, dim, 0, 0)))
        return em.call(aten.cat.default, (parts, dim))

    return Sharding({main: layout}, out, emit_ends)


def _grown(layout: Layout, before: int, behind: int) -> Layout:
    span = layout.span
    return layout.over(replace(span, begin=span.begin - before, end=span.end + behind))


def _is_empty_vector(facts: Facts, node: fx.Node) -> bool:
    """`torch.cat` skips tensors of shape `(0,)`, which caches start from."""
    return facts.shape(node) == (0,)


def pad(facts: Facts, node: fx.Node) -> Sharding | None:
    """Constant padding: at the ends of the sequence only the first and the last rank pad."""
    source: Any = node.args[0]
    amounts: Any = node.args[1]
    layout = facts.layout(source)
    if layout is None or not all(isinstance(amount, int) for amount in amounts):
        return None
    if node.target is aten.pad.default and bound(node)["mode"] != "constant":
        return None
    slot = 2 * (len(facts.shape(source)) - 1 - layout.dim)
    before, behind = (amounts[slot], amounts[slot + 1]) if slot < len(amounts) else (0, 0)
    if layout.merged and (before or behind):
        return None
    out = _grown(layout, before, behind)

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        local = list(amounts)
        if slot < len(amounts):
            local[slot] = before if em.group.rank == 0 else 0
            local[slot + 1] = behind if em.group.rank == em.group.size - 1 else 0
        args, kwargs = em.arguments(n, {source: layout})
        return em.call(n.target, (args[0], local, *args[2:]), kwargs)

    return Sharding({source: layout}, out, emit)


def lookup(facts: Facts, node: fx.Node) -> Sharding | None:
    """`table[positions]`: one row of a table for every position."""
    table, indices = node.args[0], node.args[1]
    assert isinstance(table, fx.Node)
    assert isinstance(indices, (list, tuple))
    if facts.has_sequence(table) or len(indices) != 1 or not isinstance(indices[0], fx.Node):
        return None
    layout = facts.layout(indices[0])
    if layout is None or indices[0].meta["val"].dtype is torch.bool:
        return None
    return Sharding({indices[0]: layout}, layout)


def stack(facts: Facts, node: fx.Node) -> Sharding | None:
    """Stack equally sharded tensors along a new dimension."""
    pieces = tensor_inputs(node)
    found = facts.reference(pieces)
    if found is None:
        return None
    layout = found[1]
    fitted = {piece: facts.fit(piece, layout.dim, layout) for piece in pieces}
    if any(value is None for value in fitted.values()):
        return None
    dim = bound(node)["dim"] % len(facts.shape(node))
    out = layout.at(layout.dim + (dim <= layout.dim))
    return Sharding({piece: value for piece, value in fitted.items() if value is not None}, out)


RULES: dict[Any, Rule] = {
    aten.slice.Tensor: slice_,
    aten.select.int: select,
    aten.cat.default: cat,
    aten.stack.default: stack,
    aten.constant_pad_nd.default: pad,
    aten.pad.default: pad,
    aten.index.Tensor: lookup,
}
