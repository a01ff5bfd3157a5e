"""Rules: how an operator runs on shards, one file a family.

A rule is `rule(facts, node) -> Sharding | None`; `None` means the operator is computed in full from full inputs. `find` asks the
family rule registered for the operator, and PyTorch itself (`generic`) for every operator without one. Rules for operators of
other packages come by `register` (public in `lightning_autosp.rules`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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

__all__ = ["emit_region", "find", "register"]

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
_own = frozenset(_families)


def register(*operators: torch._ops.OpOverload) -> Callable[[Rule], Rule]:
    """Make a function the rule of operators that have none here, before a step is compiled that calls them. A later rule counts.

    Every process has to register the same rules: they decide which collectives run.

    Args:
        operators: Overloads, as `torch.ops.my_package.my_operator.default`.

    Returns:
        A decorator that gives the function back.

    Raises:
        TypeError: For what is no overload.
        ValueError: For an operator that the package has a rule for.
    """
    for one in operators:
        if not isinstance(one, torch._ops.OpOverload):
            example = f" Name one of its overloads: {one}.default." if isinstance(one, torch._ops.OpOverloadPacket) else ""
            raise TypeError(f"register({one!r}): a rule is for an operator's overload, this is a {type(one).__name__}.{example}")
        if one in _own:
            raise ValueError(f"register({one}): the package has a rule for it. Put an operator of your own around it (custom_op).")

    def decorator(rule: Rule) -> Rule:
        _families.update(dict.fromkeys(operators, rule))
        return rule

    return decorator


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
