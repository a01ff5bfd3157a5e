"""Random operators: independent on every rank where the value is a part, the same on all ranks where it is whole.

While a graph with sharded random operators runs, each rank draws from a stream of its own (`specialise.py`), so a sharded
dropout is already independent. A whole random value is drawn by the group's first rank and given to the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_autosp import collectives
from lightning_autosp.attention.flash import arguments, is_kept
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.regions import Region
from lightning_autosp.compiler.rule import Rule, bound
from lightning_autosp.compiler.rules.factories import factory
from lightning_autosp.compiler.rules.generic import pointwise

__all__ = ["RULES", "can_broadcast", "emit_whole", "is_random"]

aten = torch.ops.aten

_FACTORIES = {aten.rand.default, aten.randn.default, aten.randint.default, aten.randint.low}
_ELEMENTWISE = {
    aten.dropout.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.randint_like.default,
    aten.randint_like.low_dtype,
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.normal_functional.default,
}
_SOURCES = (_FACTORIES | _ELEMENTWISE | {aten.randperm.default, aten.multinomial.default}) - {aten.dropout.default}
"""Operators whose value no gradient flows through: their whole form can be broadcast as it is."""


def is_random(node: fx.Node) -> bool:
    """Whether the value differs from call to call (`dropout` in evaluation does not)."""
    target = node.target
    if isinstance(target, Region):
        return target.any(is_random)
    if target is aten.dropout.default:
        given = bound(node)
        return bool(given["train"] and given["p"] != 0)
    if target is aten.scaled_dot_product_attention.default:
        return bool(bound(node)["dropout_p"] != 0)
    if is_kept(target):
        return bool(arguments(target, node.args, node.kwargs).get("dropout_p", 0.0) != 0)  # type: ignore[arg-type]
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def can_broadcast(node: fx.Node) -> bool:
    """Whether `emit_whole` can make a whole value equal on all ranks."""
    return node.target in _SOURCES or node.target is aten.dropout.default


def emit_whole(em: Emitter, node: fx.Node) -> fx.Node:
    """Draw on the group's first rank, give to all; dropout draws its mask that way."""
    args, kwargs = em.arguments(node, {})
    if node.target in _SOURCES:
        return em.call(collectives.broadcast_first, (em.call(node.target, args, kwargs), em.group))
    ones = em.call(aten.ones_like.default, (args[0],))
    mask = em.call(collectives.broadcast_first, (em.call(node.target, (ones, *args[1:])), em.group))
    return em.call(aten.mul.Tensor, (args[0], mask))


RULES: dict[Any, Rule] = {
    **dict.fromkeys(_FACTORIES, factory),
    **dict.fromkeys(_ELEMENTWISE, pointwise),
}
