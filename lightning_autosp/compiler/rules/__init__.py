"""Rules: how an operator runs on shards, one file a family.

A rule is `rule(facts, node) -> Sharding | None`; `None` means the operator is computed in full from full inputs. `find` asks the
family rule registered for the operator, and PyTorch itself (`generic`) for every operator without one.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from lightning_autosp.attention.flash import is_kept
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.regions import Region, RowRegion
from lightning_autosp.compiler.rule import Facts, Rule, Sharding
from lightning_autosp.compiler.rules import (
    attention,
    experts,
    factories,
    functions,
    indexing,
    lookups,
    loss,
    matrices,
    positions,
    random,
    reductions,
    rows,
    scans,
    statistics,
    views,
    windows,
    writes,
)
from lightning_autosp.compiler.rules.generic import generic

__all__ = ["emit_region", "find"]

_families: dict[Any, Rule] = {
    **views.RULES,
    **factories.RULES,
    **functions.RULES,
    **indexing.RULES,
    **lookups.RULES,
    **reductions.RULES,
    **loss.RULES,
    **matrices.RULES,
    **attention.RULES,
    **random.RULES,
    **positions.RULES,
    **scans.RULES,
    **statistics.RULES,
    **windows.RULES,
    **writes.RULES,
}


def find(facts: Facts, node: fx.Node) -> Sharding | None:
    """Return how to compute `node` from shards, or `None` if that is not known."""
    if isinstance(node.target, RowRegion):
        return rows.rows(facts, node)
    rule = _families.get(node.target, generic)
    if isinstance(node.target, Region):
        rule = attention.region
    elif is_kept(node.target):
        rule = attention.flash
    if experts.takes_routed(facts, node):
        return experts.routed(facts, node, rule)
    return experts.route(facts, node) or rule(facts, node)


def emit_region(em: Emitter, node: fx.Node) -> fx.Node:
    """Compute a region from whole inputs."""
    return rows.emit_rows(em, node) if isinstance(node.target, RowRegion) else attention.emit_region(em, node)
