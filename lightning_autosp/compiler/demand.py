"""Which form of every value is needed, decided backwards from the outputs.

A value's form is `None` (whole: every rank holds all of it) or a `Layout` (part: this rank's positions). Each consumer asks
for the form it needs; an operator that is asked only for parts and can compute them from parts asks its inputs for parts in
turn.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable

import sympy
import torch
from torch import fx
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from lightning_autosp.compiler import rules
from lightning_autosp.compiler.capture import Captured, is_size
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.plan import Form, Plan
from lightning_autosp.compiler.rule import Facts, Sharding, tensor_inputs
from lightning_autosp.compiler.rules.random import can_broadcast, emit_whole, is_random

__all__ = ["make_plan"]

_REGION_MARKS = {
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
}
"""Calls that switch a mode on or off: kept where they are."""


def is_region_mark(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _REGION_MARKS


def is_item(node: fx.Node) -> bool:
    """Whether the node picks one of several outputs of an operator."""
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node)


def make_plan(captured: Captured, symbols: Iterable[sympy.Symbol], mesh: DeviceMesh) -> Plan:
    """Decide how to run a captured step on the ranks of a sequence group.

    Args:
        captured: The normalised step.
        symbols: The sequence symbols to shard; with none, everything is computed in full.
        mesh: The one-dimensional mesh of the sequence group.
    """
    plan = _plan(captured, symbols, mesh, shard_random=True)
    random = [node for node in plan.demands if is_random(node)]
    plan.rank_streams = any(node in plan.shardings for node in random)
    whole = {node for node in random if node not in plan.shardings}
    if plan.rank_streams and not all(can_broadcast(node) for node in whole):
        # A random operator that has to be whole and cannot be broadcast needs one stream for all ranks, and so do then the others.
        plan = _plan(captured, symbols, mesh, shard_random=False)
        whole = {node for node in plan.demands if is_random(node)}
    if plan.facts.symbols:
        plan.broadcast = dict.fromkeys((node for node in whole if can_broadcast(node)), emit_whole)
    return plan


def _plan(captured: Captured, symbols: Iterable[sympy.Symbol], mesh: DeviceMesh, *, shard_random: bool) -> Plan:
    facts = Facts(captured, symbols, mesh)
    possible: dict[fx.Node, Sharding] = {}
    for node in captured.graph.nodes:
        if any(source in facts.trained for source in node.all_input_nodes):
            facts.trained.add(node)
        if not facts.symbols:
            continue
        sharding = None
        if node.op == "call_function" and not is_region_mark(node):
            sharding = _item_sharding(node, possible) if is_item(node) else _ask(facts, node)
        if sharding is not None and not shard_random and is_random(node):
            sharding = None
        if sharding is not None:
            possible[node] = sharding
            facts.layouts[node] = sharding.output
        else:
            facts.layouts[node] = _layout_of_whole(facts, node)
    return _demand(facts, possible)


def _ask(facts: Facts, node: fx.Node) -> Sharding | None:
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
        return None
    if not facts.has_sequence(node) and not any(facts.has_sequence(source) for source in node.all_input_nodes):
        return None
    return rules.find(facts, node)


def _item_sharding(node: fx.Node, possible: dict[fx.Node, Sharding]) -> Sharding | None:
    parent = possible.get(node.args[0])  # type: ignore[arg-type]
    if parent is None or not isinstance(parent.output, tuple):
        return None
    return Sharding({}, parent.output[node.args[1]])  # type: ignore[index]


def _layout_of_whole(facts: Facts, node: fx.Node) -> Layout | None:
    """Return the layout in which parts can be cut from a whole value."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    shape = facts.shape(node)
    found = facts.shape_layout(shape)
    dims = facts.sequence_dims(node)
    if found is None and len(dims) == 1:
        for source in tensor_inputs(node):
            own = facts.layout(source)
            if own is not None and own.size == shape[dims[0]]:
                return own.at(dims[0])
    return found


def _demand(facts: Facts, possible: dict[fx.Node, Sharding]) -> Plan:
    demands: dict[fx.Node, dict[Form, list[fx.Node]]] = defaultdict(dict)
    shardings: dict[fx.Node, Sharding] = {}

    def ask(node: fx.Node, form: Form, consumer: fx.Node) -> None:
        demands[node].setdefault(form, []).append(consumer)

    for node in reversed(facts.captured.graph.nodes):
        if node.op == "output":
            for value in pytree.tree_leaves(node.args):
                if isinstance(value, fx.Node) and not is_size(value):
                    ask(value, None, node)
            continue
        if is_region_mark(node):
            for source in node.all_input_nodes:
                ask(source, None, node)
            demands.setdefault(node, {})
            continue
        if node not in demands:
            continue
        if is_item(node):
            parent = node.args[0]
            assert isinstance(parent, fx.Node)
            if parent in possible and parent in facts.trained:
                shardings[node] = possible[node]
            ask(parent, None, node)
            continue
        sharding = possible.get(node)
        if sharding is not None and _worthwhile(facts, node, sharding, set(demands[node])):
            shardings[node] = sharding
        chosen = shardings.get(node)
        needs, unused = (chosen.needs, chosen.unused) if chosen else ({}, ())
        for source in node.all_input_nodes:
            if source not in unused and not is_size(source):
                ask(source, needs.get(source), node)
    return Plan(facts, shardings, dict(demands), rank_streams=False, broadcast={})


def _worthwhile(facts: Facts, node: fx.Node, sharding: Sharding, forms: set[Form]) -> bool:
    """Whether to compute from parts. Data that met no parameter is cheaper whole when anybody wants it whole."""
    if node in facts.trained:
        return True
    if isinstance(sharding.output, tuple) or sharding.output is None:
        return False
    return forms == {sharding.output}
