"""Tensors made from nothing but a shape: make the part of it this rank needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, tensor_inputs

__all__ = ["RULES", "factory"]

aten = torch.ops.aten


def factory(facts: Facts, node: fx.Node) -> Sharding | None:
    """The same fill for the local shape. The shape is the argument named `size`."""
    out = facts.shape_layout(facts.shape(node))
    if out is None or any(facts.has_sequence(n) for n in tensor_inputs(node) if node.target not in _TEMPLATE_ONLY):
        return None
    index = [argument.name for argument in node.target._schema.arguments].index("size")  # type: ignore[union-attr]

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        args = list(em.arguments(n, {})[0])
        args[index] = em.local_shape(n, out)
        return em.call(n.target, tuple(args), em.arguments(n, {})[1])

    return Sharding({}, out, emit)


_TEMPLATE_ONLY = {
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}
"""Operators that read only dtype and device of their tensor argument."""

RULES: dict[Any, Rule] = dict.fromkeys(
    [aten.zeros.default, aten.ones.default, aten.full.default, aten.empty.memory_format, *_TEMPLATE_ONLY], factory
)
