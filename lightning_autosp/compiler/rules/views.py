"""Views that merge, split or repeat dimensions, and operators that return slices of one tensor."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound, tensor_inputs
from lightning_autosp.compiler.rules.positions import pieces as pieces_of_sequence

__all__ = ["RULES", "VIEWS", "through_view"]

aten = torch.ops.aten


def view(facts: Facts, node: fx.Node) -> Sharding | None:
    """Find the output dimension that holds the sequence by counting the elements before and behind it."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    layout = facts.layout(source)
    if layout is None:
        return None
    out = through_view(facts.shape(source), facts.shape(node), layout)
    if out is None:
        return _into_chunks(facts, node, source, layout) if facts.chunks and not layout.merged else None
    emit = functools.partial(_reshape, layout=layout, out=out)
    return Sharding({source: layout}, out, emit, unused=_templates(node))


def _into_chunks(facts: Facts, node: fx.Node, source: fx.Node, layout: Layout) -> Sharding | None:
    """`(B, s, D) -> (B, chunks, length, D)`: whole chunks are cut."""
    shape_in, shape_out = facts.shape(source), facts.shape(node)
    for dim, size in enumerate(shape_out):
        before = sympy.cancel(sympy.prod(shape_in[: layout.dim]) / sympy.prod(shape_out[:dim]))
        length = sympy.cancel(sympy.prod(shape_out[dim + 1 :]) / sympy.prod(shape_in[layout.dim + 1 :]))
        span = facts.span_of(size)
        if span is not None and before == 1 and length.is_Integer:
            need, out = Layout(layout.dim, span, inner=length), Layout(dim, span)
            emit = functools.partial(_reshape, layout=need, out=out)
            return Sharding({source: need}, out, emit, unused=_templates(node))
    return None


def through_view(shape_in: tuple[sympy.Expr, ...], shape_out: tuple[sympy.Expr, ...], layout: Layout) -> Layout | None:
    """Return where a view from one shape to another puts the positions a layout cuts; `None` if it tears them apart."""
    before = sympy.prod(shape_in[: layout.dim]) * layout.outer
    behind = sympy.prod(shape_in[layout.dim + 1 :]) * layout.inner
    for dim, size in enumerate(shape_out):
        outer = sympy.cancel(before / sympy.prod(shape_out[:dim]))
        inner = sympy.cancel(behind / sympy.prod(shape_out[dim + 1 :]))
        # A view keeps the number of elements: of the dimension's size `outer * length * inner` two factors tell the third.
        if _whole(outer) and not _whole(inner):
            inner = sympy.cancel(size / (outer * layout.span.length))
        elif _whole(inner) and not _whole(outer):
            outer = sympy.cancel(size / (layout.span.length * inner))
        if _whole(outer) and _whole(inner):
            return replace(layout, dim=dim, outer=outer, inner=inner)
    return None


def _reshape(em: Emitter, node: fx.Node, *, layout: Layout, out: Layout) -> fx.Node:
    return em.reshape(node.args[0], layout, out, node)


def _whole(expr: sympy.Expr) -> bool:
    """Whether a quotient of sizes is an integer for all sizes (its denominator cancelled)."""
    return sympy.denom(sympy.together(expr)) == 1


def expand(facts: Facts, node: fx.Node) -> Sharding | None:
    """`expand` to a shape with one sequence dimension: expand to the local shape instead."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape, own = facts.shape(node), facts.layout(source)
    out = facts.shape_layout(shape) if own is None else own.at(own.dim + len(shape) - len(facts.shape(source)))
    if out is None or out.size != shape[out.dim]:
        return None
    needs = {} if own is None else {source: own}

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        value = em.get(source, needs.get(source))
        return em.call(aten.expand.default, (value, em.local_shape(n, out)))

    return Sharding(needs, out, emit, unused=_templates(node))


def _templates(node: fx.Node) -> tuple[fx.Node, ...]:
    """Return the tensors of which an operator (`view_as`) takes the shape only."""
    return tuple(other for other in tensor_inputs(node) if other is not node.args[0])


def pieces(facts: Facts, node: fx.Node) -> Sharding | None:
    """`chunk`, `split`, `unbind` along another dimension: the same call on the part."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    layout = facts.layout(source)
    if layout is None:
        return None
    dim = bound(node)["dim"] % len(facts.shape(source))
    if dim == layout.dim:
        return None if node.target is aten.unbind.int else pieces_of_sequence(facts, node, layout)
    removed = node.target is aten.unbind.int and dim < layout.dim
    out = layout.at(layout.dim - removed)
    return Sharding({source: layout}, (out,) * len(node.meta["val"]))


VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
}
"""Operators that keep every element in its place and count them anew."""

RULES: dict[Any, Rule] = {
    **dict.fromkeys(VIEWS, view),
    aten.expand.default: expand,
    aten.expand_as.default: expand,
    aten.chunk.default: pieces,
    aten.split.Tensor: pieces,
    aten.split_with_sizes.default: pieces,
    aten.split.sizes: pieces,
    aten.tensor_split.sections: pieces,
    aten.tensor_split.indices: pieces,
    aten.unbind.int: pieces,
}
