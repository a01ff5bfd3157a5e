"""Finishing a reduction whose local part every rank has computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from lightning_autosp import collectives
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import Facts, Sharding

__all__ = ["finish_partial"]


def finish_partial(facts: Facts, node: fx.Node, needs: Mapping[fx.Node, Layout], layout: Layout, op: str) -> Sharding | None:
    """Run the operator on the parts and join the results: every rank gets the whole, or its part of a result that has a sequence.

    Args:
        facts: What is known of the graph.
        node: The operator.
        needs: The sharded inputs.
        layout: The layout of the reduced input.
        op: `"sum"`; `"avg"`, a mean in which every position counts alike: weighted by each rank's share of the positions.
    """
    if op not in ("sum", "avg"):
        return None  # the gradient of other joins depends on which rank won: rules of their own

    out = facts.shape_layout(facts.shape(node))

    def emit(em: Emitter, node: fx.Node) -> fx.Node:
        args, kwargs = em.arguments(node, needs)
        local = em.call(node.target, args, kwargs)
        if op == "avg":
            local = em.call(torch.mul, (local, em.local_length(layout) / em.size(layout)))
        if out is not None:
            return em.call(collectives.reduce_scatter_sequence, (local, out.dim, em.lengths(out), em.group))
        return em.call(collectives.all_reduce_sum, (local, em.group))

    return Sharding(needs, out, emit, kind="reduction")
