"""Tensors made from nothing but a shape: make the part of it this rank needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, tensor_inputs

__all__ = ["RULES", "factory", "part"]

aten = torch.ops.aten


def factory(facts: Facts, node: fx.Node) -> Sharding | None:
    """The same fill for the local shape. The shape is the argument named `size`."""
    # `x.new_zeros(...)` reads only dtype and device of `x`: its part will do.
    needs = {template: layout for template in tensor_inputs(node) if (layout := facts.layout(template)) is not None}
    out = facts.shape_layout(facts.shape(node))
    if out is None:
        return Sharding(needs, None) if needs else None
    for layout in needs.values():
        if layout.dim == out.dim and layout.size == out.size:  # cut as the template is, which it will meet
            out = replace(layout, order=None, points=None)
    return _filled(node, needs, out)


def part(facts: Facts, node: fx.Node, wanted: Layout) -> Sharding | None:
    """Return how to make this part of a tensor that could be cut in any way."""
    fits = node.target in RULES and not tensor_inputs(node) and facts.shape(node)[wanted.dim] == wanted.size
    return _filled(node, {}, wanted) if fits and not wanted.routed else None


def _filled(node: fx.Node, needs: dict[fx.Node, Layout], out: Layout) -> Sharding:
    index = [argument.name for argument in node.target._schema.arguments].index("size")  # type: ignore[union-attr]

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        args, kwargs = em.arguments(n, needs)
        return em.call(n.target, (*args[:index], em.local_shape(n, out), *args[index + 1 :]), kwargs)

    return Sharding(needs, out, emit)


RULES: dict[Any, Rule] = dict.fromkeys(
    [
        aten.zeros.default,
        aten.ones.default,
        aten.full.default,
        aten.empty.memory_format,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
    ],
    factory,
)
