"""Operators on the matrices in the last two dimensions: each matrix is on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, tensor_inputs
from lightning_autosp.compiler.rules.generic import ask_pytorch, pointwise
from lightning_autosp.compiler.rules.partial import finish_partial

__all__ = ["RULES"]

aten = torch.ops.aten


def matrices(facts: Facts, node: fx.Node) -> Sharding | None:
    """Dimensions before the matrices are broadcast as those of pointwise operators are."""
    sharding = pointwise(facts, node)
    if sharding is None or not isinstance(sharding.output, Layout) or sharding.output.dim >= len(facts.shape(node)) - 2:
        return None
    return sharding


def product(facts: Facts, node: fx.Node) -> Sharding | None:
    """PyTorch knows no product of a part of the heads with a matrix that all heads share (multi-query attention)."""
    of_matrices = all(len(facts.shape(factor)) >= 2 for factor in tensor_inputs(node))
    return (matrices(facts, node) if of_matrices else None) or ask_pytorch(facts, node)


def einsum(facts: Facts, node: fx.Node) -> Sharding | None:
    """The equation says what becomes of a dimension: it stays, in every operand that has it, or is summed over."""
    equation: Any = node.args[0]
    operands: Any = node.args[1]
    *named, result = equation.replace(" ", "").replace("->", ",").split(",")
    if "->" not in equation or "." in equation or any(len(set(letters)) < len(letters) for letters in named):
        return ask_pytorch(facts, node)
    found = facts.reference(operands)
    if found is None:
        return None
    reference, layout = found
    letter = named[operands.index(reference)][layout.dim]
    forms: dict[fx.Node, Layout | None] = {}
    for operand, letters in zip(operands, named, strict=True):
        dim = letters.find(letter)
        alone = dim < 0 or facts.shape(operand)[dim] == 1
        form = None if alone else facts.fit(operand, dim, layout)
        # One that is cut along something else would be wanted whole: parts of another dimension may do.
        if (facts.layout(operand) is not None if alone else form is None) or forms.setdefault(operand, form) != form:
            return None
    needs = {operand: form for operand, form in forms.items() if form is not None}
    if letter in result:
        return Sharding(needs, layout.at(result.index(letter)))
    return finish_partial(facts, node, needs, layout, "sum")


RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        [
            aten.linalg_solve_triangular.default,
            aten.linalg_solve.default,
            aten.linalg_inv.default,
            aten.linalg_cholesky.default,
            aten.linalg_matrix_exp.default,
        ],
        matrices,
    ),
    aten.matmul.default: product,
    aten.einsum.default: einsum,
}
