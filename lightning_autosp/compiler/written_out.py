"""Attention that is written out, as the operator it is: `softmax(q @ k.T * scale + mask) @ v`.

Kernels for it hold no scores, know a causal flag, and sum in float32. Only what they compute the same way is rewritten: a row that
attends to nothing is not a number where it is written out with minus infinity, and zero in a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_autosp.attention.masks import prove_mask
from lightning_autosp.compiler.capture import Captured
from lightning_autosp.compiler.rule import bound

__all__ = ["PRODUCTS", "SDPA", "SOFTMAX", "insert", "join_written_out"]

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
PRODUCTS = {aten.matmul.default, aten.bmm.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
_CASTS = {aten._to_copy.default, aten.to.dtype, aten.clone.default, aten.contiguous.default, aten.alias.default}
_MULTIPLY = {aten.mul.Tensor, aten.mul.Scalar}
_DIVIDE = {aten.div.Tensor, aten.div.Scalar}
_CHOICES = {aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.ScalarOther, aten.where.self}


def insert(captured: Captured, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """Add an operator at the graph's insertion point, with its fake value and the source line of `like`."""
    node = captured.graph.call_function(target, args, kwargs)
    node.meta = {key: value for key, value in like.meta.items() if key not in ("val", "tensor_meta")}
    values, options = fx.map_arg((args, kwargs), lambda source: source.meta["val"])
    with captured.fake_mode:
        node.meta["val"] = target(*values, **options)
    return node


class _Chain:
    """Nodes from the weights of an attention back to its scores, each read by the one before it and by nothing else."""

    def __init__(self, start: fx.Node) -> None:
        self.nodes = [start]

    @property
    def end(self) -> fx.Node:
        return self.nodes[-1]

    def follow(self, source: Any) -> bool:
        if not isinstance(source, fx.Node):
            return False
        self.nodes.append(source)
        return True

    def skip_casts(self) -> None:
        while self.end.target in _CASTS and self.follow(self.end.args[0]):
            pass


def join_written_out(captured: Captured, node: fx.Node) -> None:
    """Put `scaled_dot_product_attention` in the place of a matrix product of weights and values, if that is what it is.

    Args:
        captured: The graph; changed in place.
        node: A product whose left side has a number for every pair of positions.
    """
    weights, value = node.args
    if not isinstance(weights, fx.Node) or not isinstance(value, fx.Node):
        return
    chain = _Chain(weights)
    chain.skip_casts()
    dropout = 0.0
    if chain.end.target is aten.dropout.default:
        given = bound(chain.end)
        dropout = given["p"] if given["train"] else 0.0
        chain.follow(given["input"])
        chain.skip_casts()
    if chain.end.target not in SOFTMAX or chain.end.args[1] not in (-1, weights.meta["val"].ndim - 1):
        return
    chain.follow(chain.end.args[0])
    chain.skip_casts()
    with captured.graph.inserting_before(node):
        mask = _take_mask(captured, chain)
    if chain.end.target in _CHOICES or chain.end.target is aten.add.Tensor:
        return  # a second mask, or one whose weights a kernel would compute differently
    scale = _take_scale(chain)
    if scale is None or chain.end.target not in PRODUCTS or not isinstance(dropout, (int, float)):
        return
    query, key = chain.end.args
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    leading, *others = (captured.shape(one.meta["val"])[:-2] for one in (query, key, value))
    shared = {(*leading[:-1], 1)}  # one head of keys and values for all queries
    if not leading or set(others) not in ({leading}, shared):
        return  # operands that are broadcast otherwise, or have no heads
    readers = {*chain.nodes, node}
    if any(user not in readers for one in chain.nodes for user in one.users):
        return  # the scores or the weights are wanted themselves
    with captured.graph.inserting_before(node):
        key = insert(captured, aten.transpose.int, key, -2, -1, like=chain.end)
        if mask is not None and mask.meta["val"].dtype not in (torch.bool, query.meta["val"].dtype):
            mask = insert(captured, aten._to_copy.default, mask, like=mask, dtype=query.meta["val"].dtype)
        options: dict[str, Any] = {"scale": scale, "enable_gqa": set(others) == shared}
        joined = captured.graph.call_function(SDPA, (query, key, value, mask, dropout, False), options)
    joined.meta = dict(node.meta)
    node.replace_all_uses_with(joined)
    captured.graph.erase_node(node)


def _take_mask(captured: Captured, chain: _Chain) -> fx.Node | None:
    """Go over a mask, if a kernel would weigh every row as it does, and return it."""
    end = chain.end
    if end.target is aten.add.Tensor and bound(end)["alpha"] == 1:
        for mask, scores in (end.args, end.args[::-1]):
            if isinstance(mask, fx.Node) and isinstance(scores, fx.Node):
                proof = prove_mask(mask, captured)
                # A row that attends to nothing is a mean of all values here; kernels lose it in the log-sum-exp, and its gradient.
                if proof.formula is not None and proof.diagonal:
                    chain.follow(scores)
                    chain.skip_casts()
                    return mask
    if end.target not in _CHOICES:
        return None
    if end.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores, hidden, fill = end.args
        assert isinstance(hidden, fx.Node)
        attended = insert(captured, aten.logical_not.default, hidden, like=end)
    else:
        attended, scores, fill = end.args  # type: ignore[assignment]
    number = _number(fill)
    hides = number is not None and number <= torch.finfo(torch.bfloat16).min
    if not hides or not prove_mask(attended, captured).diagonal:
        return None
    chain.follow(scores)
    chain.skip_casts()
    return attended


def _take_scale(chain: _Chain) -> float | None:
    """Go over factors and return their product; `None` if one is no number."""
    scale = 1.0
    while chain.end.target in _MULTIPLY | _DIVIDE:
        factor = _number(chain.end.args[1])
        if factor is None:
            return None
        scale = scale * factor if chain.end.target in _MULTIPLY else scale / factor
        chain.follow(chain.end.args[0])
        chain.skip_casts()
    return scale


def _number(value: Any) -> float | None:
    """Return a number or the only element of a constant tensor."""
    if isinstance(value, fx.Node) and value.target in (aten.full.default, aten.scalar_tensor.default):
        value = value.args[-1] if value.args[0] == [] or value.target is aten.scalar_tensor.default else None
    return float(value) if isinstance(value, (int, float)) else None
