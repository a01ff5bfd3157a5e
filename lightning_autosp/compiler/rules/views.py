"""Views that merge, split or repeat dimensions, and operators that return slices of one tensor."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout, Span
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
        return None if layout.routed else _of_other_parts(facts, node, source, layout)
    return _viewed(node, source, layout, out)


def _of_other_parts(facts: Facts, node: fx.Node, source: fx.Node, layout: Layout) -> Sharding | None:
    """Make parts of a dimension of the result of other parts of the view's input.

    `(B, s, D) -> (B, chunks, length, D)` of whole chunks, `(B, s, D) -> (B, s, heads, width)` of a part of `D` of whole heads,
    `(B * s * heads, D) -> (B, heads, s, D)`, which tears every position apart, of what comes to be a head.
    """
    shape_in, shape_out, sequences = facts.shape(source), facts.shape(node), facts.sequence_dims(node)
    known = [Layout(dim, Span(size)) for dim, size in enumerate(shape_out) if size.is_Integer and size >= facts.mesh.size()]
    if layout.merged:  # what stands before a sequence is computed apart, more often than not, heads rather than samples
        candidates = [out for out in reversed(known) if out.dim < min(sequences, default=len(shape_out))]
    elif layout.along_sequence:
        spans = {dim: facts.span_of(shape_out[dim]) for dim in sequences if facts.chunks}
        candidates = [Layout(dim, span) for dim, span in spans.items() if span is not None]
    else:
        candidates = known
    for out in candidates:
        need = through_view(shape_out, shape_in, out)
        if need is not None and (layout.merged or (need.dim == layout.dim and need.outer == 1 and need.inner.is_Integer)):
            return _viewed(node, source, need, out)
    return None


def _viewed(node: fx.Node, source: fx.Node, layout: Layout, out: Layout) -> Sharding:
    return Sharding({source: layout}, out, functools.partial(_reshape, layout=layout, out=out), unused=_templates(node))


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
