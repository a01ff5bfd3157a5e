"""Running sums, products and extrema along the sequence: scan the part, then add what the earlier parts come to.

Only the totals of the parts are exchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lightning_autosp import collectives
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound

__all__ = ["RULES", "go_on", "running_extremum"]

aten = torch.ops.aten


def scan(operation: str) -> Rule:
    """Make the rule for a scan; over other dimensions it is local."""

    def rule(facts: Facts, node: fx.Node) -> Sharding | None:
        source: Any = node.args[0]
        layout, dim = facts.layout(source), bound(node)["dim"] % max(len(facts.shape(source)), 1)
        if layout is None:
            return None
        extremum = operation in ("max", "min")
        output = (layout, layout) if extremum else layout
        if dim != layout.dim:
            return Sharding({source: layout}, output)
        if layout.outer != 1:
            return None

        def emit(em: Emitter, n: fx.Node) -> fx.Node:
            if extremum:
                first = em.cuts(layout)[em.group.rank][0]
                return em.call(running_extremum, (em.get(source, layout), dim, first, em.group), {"minimum": operation == "min"})
            local = em.call(n.target, *em.arguments(n, {source: layout}))
            return em.call(go_on, (local, dim, operation, em.group))

        return Sharding({source: layout}, output, emit, kind="exchange")

    return rule


def go_on(x: Tensor, dim: int, operation: str, group: Group) -> Tensor:
    """Continue the scans of the earlier parts.

    Args:
        x: The scan of this rank's part.
        dim: The dimension that was scanned.
        operation: `"sum"` or `"prod"`.
        group: The sequence group.
    """
    totals = collectives.stack_across(x.narrow(dim, x.shape[dim] - 1, 1), group)[: group.rank]
    # The first rank reduces nothing at all, so that it takes part in the exchange of gradients.
    if operation == "sum":
        return x + totals.sum(0, dtype=x.dtype)
    return x * totals.prod(0, dtype=x.dtype)


def running_extremum(x: Tensor, dim: int, offset: int, group: Group, *, minimum: bool) -> tuple[Tensor, Tensor]:
    """`torch.cummax` (or `cummin`) of a part: values, and indices counted over the whole sequence.

    Args:
        x: This rank's part.
        dim: The dimension to scan.
        offset: Global position of the part's first element.
        group: The sequence group.
        minimum: Whether to follow the minimum.
    """
    scan = torch.cummin if minimum else torch.cummax
    value, index = scan(x, dim)
    index = index + offset
    totals, places = (collectives.stack_across(t.narrow(dim, x.shape[dim] - 1, 1), group) for t in (value, index))
    earlier, owner = scan(totals[: max(group.rank, 1)], 0)
    before, place = earlier[-1], places.gather(0, owner[-1:])[0]
    # The later of two equal values counts, and so does any that is no number.
    stays = (value <= before if minimum else value >= before) | value.isnan()
    if group.rank == 0:
        stays = torch.ones_like(stays)
    return torch.where(stays, value, before), torch.where(stays, index, place)


RULES: dict[Any, Rule] = {
    aten.cumsum.default: scan("sum"),
    aten.cumprod.default: scan("prod"),
    aten.cummax.default: scan("max"),
    aten.cummin.default: scan("min"),
}
