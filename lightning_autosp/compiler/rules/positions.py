"""Operators that move, drop or repeat positions in a way that follows from lengths alone: shifts, reversals, steps, pieces.

The positions of the result are a list of ranges of the input's; every rank fetches its share of that list. Repeating positions
moves nothing: the repetitions are one more factor of the dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from lightning_autosp.collectives import Group
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import GIVEN_TO_ALL, Facts, Rule, Sharding, bound
from lightning_autosp.compiler.rules.generic import ask_pytorch
from lightning_autosp.exchange import Range, fetch

__all__ = ["RULES", "choose", "join", "pad_by_copies", "pieces"]

aten = torch.ops.aten

Share = tuple[tuple[Range, ...], ...]
"""For every rank, the ranges it wants."""


def shares(em: Emitter, ranges: Sequence[range], out: Layout | None) -> Share:
    """Return which of the listed positions each rank wants: those of its part of `out`, or all of them."""
    wanted = []
    for start, stop in em.cuts(out) if out is not None else [(0, sum(map(len, ranges)))] * em.group.size:
        share, passed = [], 0
        for positions in ranges:
            mine = positions[max(start - passed, 0) : max(stop - passed, 0)]
            if mine:
                share.append((mine.start, mine.stop, mine.step))
            passed += len(positions)
        wanted.append(tuple(share))
    return tuple(wanted)


def choose(
    facts: Facts,
    node: fx.Node,
    layout: Layout,
    size: sympy.Expr,
    positions: Callable[[Emitter], Sequence[range]],
    then: Callable[[Emitter, fx.Node], fx.Node] | None = None,
) -> Sharding | None:
    """Make the sharding of an operator that takes positions of its first argument, along the dimension that is cut.

    Args:
        facts: What is known of the graph.
        node: The operator.
        layout: The layout of its first argument.
        size: The number of positions taken; every rank gets all of them if it is fixed.
        positions: What they are, one range behind the other.
        then: What else the operator does.
    """
    source: Any = node.args[0]
    out = facts.resized(layout, size)
    if layout.outer != 1 or (out is None and facts.has_sequence(node)):
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        wanted = shares(em, positions(em), out)
        value = em.call(fetch, (em.get(source, layout), layout.dim, em.cuts(layout), wanted, em.group))
        return value if then is None else then(em, value)

    if out is None:
        return Sharding({source: layout}, None, emit, kind="reduction", note=GIVEN_TO_ALL)
    return Sharding({source: layout}, out, emit, kind="exchange")


def roll(facts: Facts, node: fx.Node) -> Sharding | None:
    given = bound(node)
    source = given["self"]
    layout, ndim = facts.layout(source), len(facts.shape(source))
    shifts = [(shift, dim % ndim) for shift, dim in zip(given["shifts"], given["dims"], strict=False)]
    if layout is None or not shifts:
        return None
    others = [pair for pair in shifts if pair[1] != layout.dim]
    if others == shifts:
        return Sharding({source: layout}, layout)

    def positions(em: Emitter) -> list[range]:
        size = em.integer(layout.size)
        first = -sum(em.value(shift) for shift, dim in shifts if dim == layout.dim) % size
        return [range(first, size), range(first)]

    def then(em: Emitter, value: fx.Node) -> fx.Node:
        return em.call(aten.roll.default, (value, [em.value(shift) for shift, _ in others], [dim for _, dim in others]))

    return choose(facts, node, layout, layout.size, positions, then if others else None)


def flip(facts: Facts, node: fx.Node) -> Sharding | None:
    source: Any = node.args[0]
    layout, ndim = facts.layout(source), len(facts.shape(source))
    dims = [dim % ndim for dim in bound(node)["dims"]]
    if layout is None:
        return None
    if layout.dim not in dims:
        return Sharding({source: layout}, layout)
    others = [dim for dim in dims if dim != layout.dim]

    def then(em: Emitter, value: fx.Node) -> fx.Node:
        return em.call(aten.flip.default, (value, others))

    return choose(facts, node, layout, layout.size, lambda em: [range(em.integer(layout.size))[::-1]], then if others else None)


def pad_by_copies(facts: Facts, node: fx.Node) -> Sharding | None:
    """`F.pad` that reflects, replicates or wraps: padding along the sequence is made of its own positions."""
    source: Any = node.args[0]
    given = bound(node)
    amounts, mode = list(given["pad"]), given["mode"]
    layout = facts.layout(source)
    if layout is None:
        return None
    slot = 2 * (len(facts.shape(source)) - 1 - layout.dim)
    if slot >= len(amounts):
        return Sharding({source: layout}, layout)
    before, behind = amounts[slot : slot + 2]
    amounts[slot : slot + 2] = 0, 0
    if not all(isinstance(amount, int) for amount in (before, behind)) or min(before, behind) < 0:
        return None

    def positions(em: Emitter) -> list[range]:
        size = em.integer(layout.size)
        if mode == "reflect":
            return [range(before, 0, -1), range(size), range(size - 2, size - 2 - behind, -1)]
        if mode == "circular":
            return [range(size - before, size), range(size), range(behind)]
        return [range(1)] * before + [range(size)] + [range(size - 1, size)] * behind

    def then(em: Emitter, value: fx.Node) -> fx.Node:
        return em.call(aten.pad.default, (value, em.value(amounts), mode))

    return choose(facts, node, layout, facts.shape(node)[layout.dim], positions, then if any(amounts) else None)


def pieces(facts: Facts, node: fx.Node, layout: Layout) -> Sharding | None:
    """`chunk` and `split` along the sequence: each piece is cut anew, or given to all ranks if its size is fixed."""
    source: Any = node.args[0]
    if layout.outer != 1:
        return None
    sizes = [facts.captured.shape(value)[layout.dim] for value in node.meta["val"]]
    outs = tuple(facts.resized(layout, size) for size in sizes)

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        stops = [0]
        for size in sizes:
            stops.append(stops[-1] + em.integer(size))
        ranges = [range(start, stop) for start, stop in zip(stops, stops[1:], strict=False)]
        wanted = tuple(shares(em, [positions], out) for positions, out in zip(ranges, outs, strict=True))
        return em.call(fetch_pieces, (em.get(source, layout), layout.dim, em.cuts(layout), wanted, em.group))

    return Sharding({source: layout}, outs, emit, kind="exchange")


def fetch_pieces(
    x: Tensor, dim: int, bounds: Sequence[tuple[int, int]], wanted: Sequence[Share], group: Group
) -> tuple[Tensor, ...]:
    """`exchange.fetch` for several results, in one exchange."""
    together = [tuple(positions for ranges in each for positions in ranges) for each in zip(*wanted, strict=True)]
    sizes = [sum(len(range(*positions)) for positions in piece[group.rank]) for piece in wanted]
    return fetch(x, dim, bounds, together, group).split(sizes, dim)


def join(facts: Facts, node: fx.Node, listed: Sequence[fx.Node], dim: int) -> Sharding | None:
    """Concatenate sequences: every rank fetches its share of each piece."""
    needs = {piece: layout for piece in listed if (layout := facts.layout(piece)) is not None}
    span = facts.span_of(facts.shape(node)[dim])
    if span is None or any(layout.dim != dim or layout.outer != 1 for layout in needs.values()):
        return None
    out = Layout(dim, span)

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        parts, passed, bounds = [], 0, em.cuts(out)
        for piece in listed:
            size, layout = em.integer(facts.shape(piece)[dim]), needs.get(piece)
            parts.append(_share(em, em.get(piece, layout), layout, dim, size, passed, bounds))
            passed += size
        return em.call(aten.cat.default, (parts, dim))

    return Sharding(needs, out, emit, kind="exchange")


def _share(
    em: Emitter, value: fx.Node, layout: Layout | None, dim: int, size: int, place: int, bounds: Sequence[tuple[int, int]]
) -> fx.Node:
    """Return those positions of a piece of a sequence that lie in this rank's part of that sequence.

    Args:
        em: The emitter.
        value: The piece.
        layout: How it is cut; `None` if every rank holds it.
        dim: The dimension of the positions.
        size: The number of its positions.
        place: Where it starts in the sequence.
        bounds: Every rank's part of the sequence.
    """
    inside = [(min(max(start - place, 0), size), min(max(stop - place, 0), size)) for start, stop in bounds]
    if layout is None:
        return em.call(aten.slice.Tensor, (value, dim, *inside[em.group.rank]))
    wanted = tuple(((start, stop, 1),) for start, stop in inside)
    return em.call(fetch, (value, dim, em.cuts(layout), wanted, em.group))


def overwrite(facts: Facts, node: fx.Node) -> Sharding | None:
    """`x[:, a:b] = y` and `x[:, i] = y`: each rank overwrites what lies in its part."""
    given = bound(node)
    source, new, dim = given["self"], given["src"], given["dim"] % len(facts.shape(given["self"]))
    layout, own = facts.layout(source), facts.layout(new)
    if layout is None or layout.dim != dim:
        return ask_pytorch(facts, node)
    single = "index" in given
    if layout.outer != 1 or given.get("step", 1) != 1 or (facts.has_sequence(new) and (single or own is None)):
        return None
    if own is not None and (own.dim != dim or own.outer != 1):
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        bounds, value = em.cuts(layout), em.get(new, own)
        if single:
            value = em.call(aten.unsqueeze.default, (value, dim))
        first = em.value(given["index" if single else "start"]) or 0
        place = range(em.integer(layout.size))[first:].start
        length = 1 if single else em.integer(facts.shape(new)[dim])
        # A rank that overwrites nothing does so too, for its gradients are zero then and not absent.
        value = _share(em, value, own, dim, length, place, bounds)
        start, stop = (min(max(position, place), place + length) for position in bounds[em.group.rank])
        low = bounds[em.group.rank][0]
        return em.call(aten.slice_scatter.default, (em.get(source, layout), value, dim, start - low, stop - low))

    needs = {source: layout} if own is None else {source: layout, new: own}
    return Sharding(needs, layout, emit, kind="local" if own is None else "exchange")


def repeat(facts: Facts, node: fx.Node) -> Sharding | None:
    """`x.repeat(...)`: repetitions of the whole sequence stand before its positions."""
    source: Any = node.args[0]
    layout, counts = facts.layout(source), list(bound(node)["repeats" if node.target is aten.repeat.default else "dims"])
    if layout is None:
        return None
    added = max(len(counts) - len(facts.shape(source)), 0)
    place = layout.dim + len(counts) - len(facts.shape(source))
    count = counts[place] if place >= 0 else 1
    out = replace(layout, dim=layout.dim + added, outer=layout.outer * facts.expr(count))
    return Sharding({source: layout}, out) if facts.shape(node)[out.dim] == out.size else None


def repeat_interleave(facts: Facts, node: fx.Node) -> Sharding | None:
    """Every position a number of times: the repetitions stand behind its place."""
    given = bound(node)
    source, dim = given["self"], given["dim"]
    layout = facts.layout(source)
    if layout is None or dim is None:
        return None
    here = dim % len(facts.shape(source)) == layout.dim
    out = replace(layout, inner=layout.inner * facts.expr(given["repeats"])) if here else layout

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        return em.call(n.target, (em.get(source, layout), em.value(given["repeats"]), dim))

    return Sharding({source: layout}, out, emit) if facts.shape(node)[out.dim] == out.size else None


def triangle(facts: Facts, node: fx.Node) -> Sharding | None:
    """`tril` and `triu` of rows or columns: the diagonal is elsewhere in every part."""
    source: Any = node.args[0]
    layout, rows = facts.layout(source), len(facts.shape(source)) - 2
    if layout is None or (layout.dim >= rows and layout.outer != 1):
        return None
    if layout.dim < rows:
        return Sharding({source: layout}, layout)

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        start = em.cuts(layout)[em.group.rank][0]
        diagonal = em.value(bound(n)["diagonal"]) + (start if layout.dim == rows else -start)
        return em.call(n.target, (em.get(source, layout), diagonal))

    return Sharding({source: layout}, layout, emit)


RULES: dict[Any, Rule] = {
    aten.roll.default: roll,
    aten.flip.default: flip,
    aten.slice_scatter.default: overwrite,
    aten.select_scatter.default: overwrite,
    aten.tril.default: triangle,
    aten.triu.default: triangle,
    aten.repeat.default: repeat,
    aten.tile.default: repeat,
    aten.repeat_interleave.self_int: repeat_interleave,
}
