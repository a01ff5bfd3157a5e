"""The rule for operators without one: pointwise by PyTorch's own tag, anything else by asking DTensor."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.distributed.tensor import Partial, Shard
from torch.utils import _pytree as pytree

from lightning_autosp.compiler.capture import is_size
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.locality import CONTRACTIONS, Argument, is_pointwise, placements_of
from lightning_autosp.compiler.rule import Facts, Sharding, tensor_inputs
from lightning_autosp.compiler.rules.partial import finish_partial

__all__ = ["ask_pytorch", "broadcast_needs", "generic", "pointwise"]

aten = torch.ops.aten

_POSITIONS = 4
"""Positions a rank has when PyTorch is asked."""

_OTHER_SIZES = (12, 96, 1152)
"""What a symbol that is not cut stands for then, the first that leaves no size without a position (`s - 24`)."""

# Operators whose DTensor answer "average the partial results" is true of every position alike. A weighted mean (any loss that
# ignores targets) gets the same answer and is not, so it needs a rule of its own.
TRUE_MEANS = {aten.mean.default, aten.mean.dim}


def generic(facts: Facts, node: fx.Node) -> Sharding | None:
    if is_pointwise(node.target) and isinstance(node.meta.get("val"), torch.Tensor):
        return pointwise(facts, node)
    return ask_pytorch(facts, node)


def pointwise(facts: Facts, node: fx.Node) -> Sharding | None:
    """Every output element depends on the broadcast elements at its place."""
    inputs = tensor_inputs(node)
    shape = facts.shape(node)
    found = facts.reference(inputs)
    if found is None:
        return None
    reference, layout = found
    out = layout.at(layout.dim + len(shape) - len(facts.shape(reference)))
    if shape[out.dim] != layout.size:
        return None
    needs = broadcast_needs(facts, inputs, out, len(shape) - out.dim)
    return None if needs is None else Sharding(needs, out)


def broadcast_needs(facts: Facts, inputs: list[fx.Node], layout: Layout, from_last: int) -> dict[fx.Node, Layout] | None:
    """Return which inputs of a broadcast are needed as parts, or `None` if one cannot be cut to match.

    Args:
        facts: What is known of the graph.
        inputs: The operands; dimensions line up from the last.
        layout: The sequence of the result.
        from_last: Its dimension, counted from behind the last: 1 for the last one.
    """
    needs: dict[fx.Node, Layout] = {}
    for value in inputs:
        shape = facts.shape(value)
        dim = len(shape) - from_last
        if dim < 0 or shape[dim] == 1:
            continue
        fitted = facts.fit(value, dim, layout)
        if fitted is None:
            return None
        needs[value] = fitted
    return needs


def ask_pytorch(facts: Facts, node: fx.Node) -> Sharding | None:
    """Shard every sequence input, run the operator on DTensors, and read the answer off the output's placements."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    inputs = tensor_inputs(node)
    found = facts.reference(inputs)
    if found is None:
        return None
    reference, layout = found
    needs: dict[fx.Node, Layout] = {}
    for value in inputs:
        own = facts.layout(value)
        if own is not None:
            fitted = facts.fit(value, own.dim, layout)
            if fitted is None:
                return None
            needs[value] = fitted
        elif layout.along_sequence and facts.has_sequence(value) and node.target not in CONTRACTIONS:
            return None  # DTensor would cut it by itself
        elif not layout.along_sequence and layout.size in facts.shape(value):
            fitted = _batch_like(facts, node, value, reference, layout)
            if fitted is None:
                return None
            needs[value] = fitted
    if any(facts.expr(n).free_symbols & facts.symbols for n in node.all_input_nodes if is_size(n)):
        return None  # a size argument: it would have to be made local, which only a rule knows how to do
    placements = None
    for other in _OTHER_SIZES:
        stand_in = functools.partial(_argument, facts, needs, layout, other)
        try:
            args, kwargs = fx.map_arg((node.args, node.kwargs), stand_in)
        except (ZeroDivisionError, _NoPositionError):
            continue
        placements = placements_of(node.target, args, kwargs, facts.mesh)
        break
    if placements is None:
        return None
    values = pytree.tree_leaves(node.meta["val"])
    outputs: list[Layout | None] = []
    for value, placement in zip(values, placements, strict=True):
        if isinstance(placement, Shard):
            if facts.captured.shape(value)[placement.dim] != layout.size:
                return None
            outputs.append(layout.at(placement.dim))
        elif type(placement) is Partial and len(values) == 1:
            op = placement.reduce_op
            if op == "avg" and node.target not in TRUE_MEANS:
                return None
            return finish_partial(facts, node, needs, layout, op)
        else:
            return None
    # A whole output of sharded inputs would have taken communication: nothing else is believed.
    single = isinstance(node.meta["val"], torch.Tensor)
    return Sharding(needs, outputs[0] if single else tuple(outputs))


def _batch_like(facts: Facts, node: fx.Node, value: fx.Node, reference: fx.Node, layout: Layout) -> Layout | None:
    """Return how to cut a whole operand of a product of matrices like the other one, of whose batch a part is held."""
    from_last = len(facts.shape(reference)) - layout.dim
    dim = len(facts.shape(value)) - from_last
    batched = node.target in (aten.matmul.default, aten.bmm.default, aten.baddbmm.default) and from_last > 2
    return facts.fit(value, dim, layout) if batched and dim >= 0 else None


class _NoPositionError(ValueError):
    """Small numbers for the symbols leave a size without a position."""


def _argument(facts: Facts, needs: Mapping[fx.Node, Layout], reference: Layout, other: int, node: fx.Node) -> Any:
    value, layout = node.meta.get("val"), needs.get(node)
    if isinstance(value, torch.Tensor):
        ranks = facts.mesh.size()
        shape = [_representative(size, reference, ranks, other) for size in facts.shape(node)]
        if any(number < 1 and not size.is_Integer for number, size in zip(shape, facts.shape(node), strict=True)):
            raise _NoPositionError
        if layout is None:
            return Argument(tuple(shape), value.dtype)
        if not layout.along_sequence:  # cut into parts of more than one position, which nothing can be broadcast to
            around = _representative(layout.outer * layout.inner, reference, ranks, other)
            shape[layout.dim] = around * _POSITIONS * ranks
        return Argument(tuple(shape), value.dtype, layout.dim)
    if is_size(node):
        return int(_representative(facts.expr(node), reference, facts.mesh.size(), other))
    return value


def _representative(size: sympy.Expr, layout: Layout, num_ranks: int, other: int) -> int:
    """Replace symbols by small numbers: the sequence gets a length every rank has an equal part of, all else `other`."""
    length = _POSITIONS * num_ranks
    span = layout.span
    if size == layout.size and layout.along_sequence and not layout.merged:
        return length
    values = dict.fromkeys(span.base.free_symbols, length - span.end + span.begin)
    values.update({symbol: other for symbol in size.free_symbols if symbol not in values})
    return int(size.xreplace(values))
