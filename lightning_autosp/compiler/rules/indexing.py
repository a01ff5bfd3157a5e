"""Slicing, picking, padding and concatenating along the sequence.

Dropping or adding positions at either end keeps every other position where it is: only the first or last rank acts. Anything else
is fetched (`positions.py`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import ONE, Layout
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound, tensor_inputs
from lightning_autosp.compiler.rules.positions import choose, join, pad_by_copies
from lightning_autosp.compiler.rules.windows import fetch_window

__all__ = ["RULES"]

aten = torch.ops.aten


def slice_(facts: Facts, node: fx.Node) -> Sharding | None:
    """Positions dropped at either end leave the others where they are; any other positions are fetched."""
    given = bound(node)
    source = given["self"]
    layout, dim = facts.layout(source), given["dim"] % len(facts.shape(source))
    if layout is None:
        return None
    if dim != layout.dim:
        return Sharding({source: layout}, layout)
    size = facts.shape(node)[dim]
    if size == layout.size:  # `x[:, None]` slices too
        return Sharding({source: layout}, layout, lambda em, n: em.get(source, layout))

    def positions(em: Emitter) -> list[range]:
        return [range(em.integer(layout.size))[em.value(given["start"]) : em.value(given["end"]) : em.value(given["step"])]]

    stay = _without_ends(facts, source, layout, given, size)
    return stay or (choose(facts, node, layout, size, positions) if facts.chunks or not layout.along_sequence else None)


def _without_ends(facts: Facts, source: fx.Node, layout: Layout, given: dict[str, Any], size: sympy.Expr) -> Sharding | None:
    start, span = facts.expr(given["start"] or 0), facts.span_of(size)
    if layout.merged or given["step"] != 1 or span is None or span.base != layout.span.base or not start.is_Integer or start < 0:
        return None
    begin = layout.span.begin + int(start)
    end = span.end - span.begin + begin
    out = layout.over(replace(layout.span, begin=begin, end=end))
    if end > layout.span.end or out.span in facts.too_short:
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        value = em.get(source, layout)
        first = int(start) if em.group.rank == 0 else 0
        if em.local_length(layout) == em.local_length(out):
            return value
        return em.call(aten.slice.Tensor, (value, layout.dim, first, first + em.local_length(out)))

    return Sharding({source: layout}, out, emit)


def select(facts: Facts, node: fx.Node) -> Sharding | None:
    """One position of the sequence (a class token, the last token): its owner gives it to all."""
    given = bound(node)
    source, index = given["self"], given["index"]
    layout, dim = facts.layout(source), given["dim"] % len(facts.shape(source))
    if layout is None:
        return None
    if dim != layout.dim:
        return Sharding({source: layout}, layout.at(layout.dim - (dim < layout.dim)))

    def positions(em: Emitter) -> list[range]:
        position = range(em.integer(layout.size))[em.value(index)]
        return [range(position, position + 1)]

    def then(em: Emitter, value: fx.Node) -> fx.Node:
        return em.call(aten.squeeze.dim, (value, layout.dim))

    return choose(facts, node, layout, ONE, positions, then)


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

    cuts = {piece: own for piece in pieces if (own := facts.layout(piece)) is not None}
    if (
        layout.outer != 1
        and len(cuts) == len(set(pieces))
        and all(own == replace(layout, outer=own.outer) for own in cuts.values())
    ):
        outer = sum((cuts[piece].outer for piece in pieces), start=sympy.Integer(0))
        return Sharding(cuts, replace(layout, outer=outer))
    others = [piece for piece in pieces if piece is not main]
    if layout.merged or pieces.count(main) != 1 or any(facts.shape(piece)[dim].free_symbols for piece in others):
        return join(facts, node, pieces, dim)
    place = pieces.index(main)
    added = [int(facts.shape(piece)[dim]) for piece in pieces if piece is not main]
    out = _grown(layout, sum(added[:place]), sum(added[place:]))
    if out.span in facts.too_short:
        return join(facts, node, pieces, dim)

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
    """Constant padding: a few positions at the ends of the sequence are the first and the last rank's; others move the cuts."""
    source: Any = node.args[0]
    amounts: Any = node.args[1]
    layout = facts.layout(source)
    if layout is None:
        return None
    if node.target is aten.pad.default and bound(node)["mode"] != "constant":
        return pad_by_copies(facts, node)
    slot = 2 * (len(facts.shape(source)) - 1 - layout.dim)
    before, behind = (amounts[slot], amounts[slot + 1]) if slot < len(amounts) else (0, 0)
    if not isinstance(before, int) or not isinstance(behind, int):
        return _pad_anew(facts, node, layout, slot)
    out = _grown(layout, before, behind)
    if (layout.merged and out != layout) or out.span in facts.too_short:
        return _pad_anew(facts, node, layout, slot)

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        local = em.value(amounts)
        if slot < len(amounts):
            local = list(local)
            local[slot] = before if em.group.rank == 0 else 0
            local[slot + 1] = behind if em.group.rank == em.group.size - 1 else 0
        args, kwargs = em.arguments(n, {source: layout})
        return em.call(n.target, (args[0], local, *args[2:]), kwargs)

    return Sharding({source: layout}, out, emit)


def _pad_anew(facts: Facts, node: fx.Node, layout: Layout, slot: int) -> Sharding | None:
    """Cut the padded sequence anew."""
    source: Any = node.args[0]
    given = bound(node)
    out = facts.resized(layout, facts.shape(node)[layout.dim])
    if out is None or layout.outer != 1:
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        amounts, fill = list(em.value(given["pad"])), em.value(given["value"]) or 0
        before = amounts[slot]
        value = fetch_window(em, source, layout, lambda start, stop: (start - before, stop - before), out, fill)
        amounts[slot : slot + 2] = 0, 0
        return em.call(aten.constant_pad_nd.default, (value, amounts, fill)) if any(amounts) else value

    return Sharding({source: layout}, out, emit, kind="exchange")


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
    **dict.fromkeys([aten.cat.default, aten.concat.default, aten.concatenate.default], cat),
    aten.stack.default: stack,
    aten.constant_pad_nd.default: pad,
    aten.pad.default: pad,
}
