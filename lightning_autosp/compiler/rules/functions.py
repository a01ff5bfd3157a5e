"""`torch.autograd.Function`s: PyTorch runs a function's own forward and backward, which the compiler does not rewrite.

One that computes every element from those at its place, both ways (an activation, rounding with a straight gradient), runs on parts
as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lightning_autosp import _compat
from lightning_autosp.compiler.locality import is_pointwise
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, tensor_inputs

__all__ = ["RULES"]

aten = torch.ops.aten
_KEEP_ELEMENTS = {aten.detach.default, aten.alias.default, aten.clone.default, aten._to_copy.default}


def function(facts: Facts, node: fx.Node) -> Sharding | None:
    """An `autograd.Function` of tensors of one shape."""
    inputs = tensor_inputs(node)
    found = facts.reference(inputs)
    if found is None:
        return None
    reference, layout = found
    if any(facts.shape(value) != facts.shape(reference) for value in inputs):
        return None
    needs = {value: fitted for value in inputs if (fitted := facts.fit(value, layout.dim, layout)) is not None}
    if len(needs) < len(inputs):
        return None
    bodies: Any = node.args[:2]
    if not all(_is_elementwise(facts, getattr(facts.captured.owner, body.target)) for body in bodies):
        return None
    return Sharding(needs, (layout,) * len(node.meta["val"]))


def _is_elementwise(facts: Facts, body: fx.GraphModule) -> bool:
    """Whether one of the function's two bodies, a graph of Python's calls, computes each element from those at its place."""
    values = [node.meta["example_value"] for node in body.graph.nodes if node.op == "placeholder"]
    with facts.captured.fake_mode:
        traced = _compat.make_fx(fx.Interpreter(body).run, tracing_mode="real")(*values)
    sizes = set()
    for node in traced.graph.nodes:
        if node.op == "call_function" and not (
            node.target in _KEEP_ELEMENTS or (is_pointwise(node.target) and not node.target._schema.is_mutable)
        ):
            return False
        tensors = (leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor))
        sizes |= {facts.captured.shape(tensor) for tensor in tensors}
    return len(sizes) == 1


RULES: dict[Any, Rule] = {torch.ops.higher_order.autograd_function_apply: function}
