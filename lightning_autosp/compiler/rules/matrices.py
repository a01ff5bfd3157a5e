"""Operators on the matrices in the last two dimensions: each matrix is on its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, tensor_inputs
from lightning_autosp.compiler.rules.generic import ask_pytorch, pointwise

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
}
