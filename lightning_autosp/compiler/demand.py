"""Which form of every value is needed, decided backwards from the outputs.

A value's form is `None` (whole: every rank holds all of it) or a `Layout` (part: this rank's positions). Each consumer asks
for the form it needs; an operator that is asked only for parts and can compute them from parts asks its inputs for parts in
turn.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from lightning_autosp.attention.flash import is_kept
from lightning_autosp.compiler import rules
from lightning_autosp.compiler.capture import Captured, is_size
from lightning_autosp.compiler.layout import Layout, Span, span_of
from lightning_autosp.compiler.plan import Form, Plan
from lightning_autosp.compiler.regions import Region
from lightning_autosp.compiler.rule import GIVEN_TO_ALL, Facts, Sharding, tensor_inputs
from lightning_autosp.compiler.rules.experts import leaking_sorts
from lightning_autosp.compiler.rules.factories import part
from lightning_autosp.compiler.rules.random import can_broadcast, emit_whole, is_random

__all__ = ["make_plan"]

_EFFECTS = {
    torch._C._set_grad_enabled,
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch.ops.aten._assert_async.msg,
}
"""Calls that switch a mode on or off, or fail, and give nothing: kept where they are, on every rank."""


def is_effect(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in _EFFECTS


def is_item(node: fx.Node) -> bool:
    """Whether the node picks one of several outputs of an operator."""
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node)


def make_plan(
    captured: Captured,
    symbols: Iterable[sympy.Symbol],
    mesh: DeviceMesh,
    too_short: Iterable[Span] = (),
    arriving: Mapping[fx.Node, Layout] | None = None,
    *,
    keep_parts: bool = False,
) -> Plan:
    """Decide how to run a captured step on the ranks of a sequence group.

    Args:
        captured: The normalised step.
        symbols: The sequence symbols to shard; with none, everything is computed in full.
        mesh: The one-dimensional mesh of the sequence group.
        too_short: Spans that leave some rank without a position, so that they are never cut.
        arriving: Inputs of which every rank is given its part, with their layouts.
        keep_parts: Whether outputs that are computed as parts are returned as parts; else whole.
    """
    options = frozenset(too_short), arriving, keep_parts
    plan = _make_plan(captured, symbols, mesh, *options, chunks=True)
    if _has_chunks(plan):  # a recurrence over chunks rather wants all of them, and a part of the heads
        plan = min(plan, _make_plan(captured, symbols, mesh, *options, chunks=False), key=_num_whole)
    return plan


def _has_chunks(plan: Plan) -> bool:
    """Whether a sequence is cut into whole chunks, or slices take it apart."""
    taken: dict[fx.Node, sympy.Expr] = defaultdict(lambda: sympy.S.Zero)
    for node, sharding in plan.shardings.items():
        for source, layout in sharding.needs.items():
            if layout.inner != 1 and layout != plan.facts.layout(source):
                return True
            if node.target is torch.ops.aten.slice.Tensor and sharding.kind != "local":
                taken[source] += plan.facts.shape(node)[layout.dim] / layout.size
    return any(sympy.cancel(share) == 1 for share in taken.values())


def _num_whole(plan: Plan) -> tuple[int, int]:
    """Return how many values of the model are gathered, or in full though of a sequence, and how many every rank has whole."""
    reported = count = 0
    for node, forms in plan.demands.items():
        if node.op == "call_function" and node in plan.facts.trained:
            sharding = plan.shardings.get(node)
            gathered = sharding is not None and isinstance(sharding.output, Layout) and None in forms
            whole = sharding is None or gathered
            reported += gathered or (whole and plan.facts.has_sequence(node))
            count += whole or (sharding is not None and sharding.note == GIVEN_TO_ALL)
    return reported, count


def _make_plan(captured: Captured, symbols: Iterable[sympy.Symbol], mesh: DeviceMesh, *options: Any, chunks: bool) -> Plan:
    plan = _plan(captured, symbols, mesh, *options, shard_random=True, chunks=chunks)
    random = [node for node in plan.demands if is_random(node)]
    plan.rank_streams = any(node in plan.shardings for node in random)
    whole = {node for node in random if node not in plan.shardings}
    if plan.rank_streams and not all(can_broadcast(node) for node in whole):
        # A random operator that has to be whole and cannot be broadcast needs one stream for all ranks, and so do then the others.
        plan = _plan(captured, symbols, mesh, *options, shard_random=False, chunks=chunks)
        whole = {node for node in plan.demands if is_random(node)}
    if plan.facts.symbols:  # the first rank draws for all
        plan.whole = dict.fromkeys((node for node in whole if can_broadcast(node)), emit_whole)
    regions = [node for node in plan.demands if isinstance(node.target, Region) and node not in plan.shardings]
    plan.whole |= dict.fromkeys(regions, rules.emit_region)
    return plan


def _plan(
    captured: Captured,
    symbols: Iterable[sympy.Symbol],
    mesh: DeviceMesh,
    too_short: frozenset[Span],
    arriving: Mapping[fx.Node, Layout] | None,
    keep_parts: bool,
    *,
    shard_random: bool,
    chunks: bool,
    whole_sorts: frozenset[fx.Node] = frozenset(),
) -> Plan:
    facts = Facts(captured, symbols, mesh, too_short, arriving, whole_sorts, find=rules.find, chunks=chunks)
    possible: dict[fx.Node, Sharding] = {}
    for node in captured.graph.nodes:
        if not is_size(node) and any(source in facts.trained for source in node.all_input_nodes):
            facts.trained.add(node)
        if not facts.symbols:
            continue
        sharding = None
        if node.op == "call_function" and not is_effect(node):
            sharding = _item_sharding(node, possible) if is_item(node) else _propose(facts, node)
        if sharding is not None and not shard_random and is_random(node):
            sharding = None
        if sharding is not None:
            possible[node] = sharding
            facts.layouts[node] = sharding.output
            if any(layout.routed for layout in _outputs(sharding)):
                facts.trained.add(node)  # data too: sorted on every rank, it has no whole form
        else:
            facts.layouts[node] = facts.arriving.get(node) or _layout_of_whole(facts, node)
    plan = _demand(facts, possible, keep_parts=keep_parts)
    leaks = leaking_sorts(plan)
    if not leaks:
        return plan
    options = too_short, arriving, keep_parts
    whole_sorts |= leaks
    return _plan(captured, symbols, mesh, *options, shard_random=shard_random, chunks=chunks, whole_sorts=whole_sorts)


def _propose(facts: Facts, node: fx.Node) -> Sharding | None:
    """Return how to compute a node from parts: as its inputs are, or from parts they can be exchanged for."""
    sharding = _ask(facts, node)
    if sharding is not None or node not in facts.trained:
        return sharding
    for assumption in _assumptions(facts, node):
        with facts.assuming(assumption):
            sharding = _ask(facts, node)
        if sharding is not None:
            return sharding
    return None


def _assumptions(facts: Facts, node: fx.Node) -> Iterator[dict[fx.Node, Layout | None]]:
    """Yield other layouts of a node's inputs, the cheapest exchange first."""
    inputs = [source for source in tensor_inputs(node) if facts.has_sequence(source)]
    now = {source: facts.layout(source) for source in inputs}
    if all(layout is None for layout in now.values()) or any(layout is not None and layout.routed for layout in now.values()):
        return
    seen = [now]

    def new(assumption: dict[fx.Node, Layout | None]) -> Iterator[dict[fx.Node, Layout | None]]:
        if assumption not in seen:
            seen.append(assumption)
            yield assumption

    home = {source: facts.shape_layout(facts.shape(source)) for source in inputs}
    largest_first = sorted(inputs, key=lambda source: -len(facts.sequence_dims(source)))
    for source in largest_first:
        layout = now[source]
        if layout is not None:
            alike = {other: _alike(facts, other, source, layout) for other in inputs}
            if all(alike.values()):
                yield from new(alike)
    yield from new(home)
    main = largest_first[0]
    ranks = facts.mesh.size()
    others = [Layout(dim, span_of(size)) for dim, size in enumerate(facts.shape(main)) if size.is_Integer and size >= ranks]
    # Samples last: a part of the samples would stay one through all that follows, and a batch may have few.
    for layout in sorted(others, key=lambda layout: (layout.dim == 0, int(layout.size) % ranks != 0, layout.dim)):
        alike = {other: _alike(facts, other, main, layout) for other in inputs}
        if all(alike.values()):
            yield from new(alike)
    if len(inputs) > 1:
        for source in largest_first:
            yield from new({other: home[other] if other is source else None for other in inputs})


def _alike(facts: Facts, node: fx.Node, like: fx.Node, layout: Layout) -> Layout | None:
    """Return the layout of `node` that cuts the dimension which lines up with that of `like`, from the first or the last."""
    if node is like:
        return layout
    shape, ndim = facts.shape(node), len(facts.shape(like))
    for dim in dict.fromkeys((layout.dim, len(shape) - ndim + layout.dim)):
        if 0 <= dim < len(shape) and shape[dim] == layout.size:
            return layout.at(dim)
    return None


def _cut_like(facts: Facts, node: fx.Node, wanted: Layout) -> Sharding | None:
    """Return how to compute this part of data that would otherwise be computed whole."""
    inputs = [source for source in tensor_inputs(node) if facts.has_sequence(source)]
    shape = facts.shape(node)
    if not 0 < len(inputs) <= 3:
        return part(facts, node, wanted)
    choices = []
    for source in inputs:
        own = facts.shape(source)
        dims = [dim for dim, size in enumerate(own) if size == wanted.size]
        dims.sort(key=lambda dim: len(own) - dim != len(shape) - wanted.dim)
        choices.append([wanted.at(dim) for dim in dims] + [None])
    for layouts in itertools.product(*choices):
        with facts.assuming(dict(zip(inputs, layouts, strict=True))):
            sharding = _ask(facts, node)
        if sharding is not None and sharding.output == wanted and sharding.kind == "local":
            return sharding
    return None


def _ask(facts: Facts, node: fx.Node) -> Sharding | None:
    kinds = (torch._ops.OpOverload, torch._ops.HigherOrderOperator, Region)
    known = isinstance(node.target, kinds) or is_kept(node.target)
    if not known or not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
        return None
    inputs = node.all_input_nodes
    if not facts.has_sequence(node) and not any(facts.has_sequence(one) or facts.layout(one) is not None for one in inputs):
        return None
    sharding = rules.find(facts, node)
    if sharding is None:
        return None
    spans = {layout.span for layout in (*_outputs(sharding), *sharding.needs.values())}
    return None if spans & facts.too_short else sharding


def _outputs(sharding: Sharding) -> list[Layout]:
    outputs = sharding.output if isinstance(sharding.output, tuple) else (sharding.output,)
    return [layout for layout in outputs if layout is not None]


def _item_sharding(node: fx.Node, possible: dict[fx.Node, Sharding]) -> Sharding | None:
    parent = possible.get(node.args[0])  # type: ignore[arg-type]
    if parent is None or not isinstance(parent.output, tuple):
        return None
    return Sharding({}, parent.output[node.args[1]])  # type: ignore[index]


def _layout_of_whole(facts: Facts, node: fx.Node) -> Layout | None:
    """Return the layout in which parts can be cut from a whole value."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    dims, shape = facts.sequence_dims(node), facts.shape(node)
    if len(dims) == 1:
        for source in tensor_inputs(node):
            own = facts.layout(source)
            if own is not None and not own.routed and own.along_sequence and own.size == shape[dims[0]]:
                return own.at(dims[0])
    return facts.shape_layout(shape)


def _demand(facts: Facts, possible: dict[fx.Node, Sharding], *, keep_parts: bool) -> Plan:
    demands: dict[fx.Node, dict[Form, list[fx.Node]]] = defaultdict(dict)
    shardings: dict[fx.Node, Sharding] = {}
    returned: dict[fx.Node, Form] = {}

    def ask(node: fx.Node, form: Form, consumer: fx.Node) -> None:
        demands[node].setdefault(form, []).append(consumer)

    for node in reversed(facts.captured.graph.nodes):
        if node.op == "output":
            outputs, updates = node.args[0]  # type: ignore[misc]
            for value in pytree.tree_leaves(outputs):
                if isinstance(value, fx.Node) and not is_size(value):
                    stays = keep_parts and value in facts.trained and (value in possible or value in facts.arriving)
                    layout = facts.layout(value) if stays else None
                    returned[value] = None if layout is None or layout.routed else layout
                    ask(value, returned[value], node)
            for value in updates:
                if not is_size(value):
                    ask(value, None, node)
            continue
        if is_effect(node):
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
        forms = set(demands[node])
        if node not in facts.trained and len(forms) == 1 and isinstance(node.meta.get("val"), torch.Tensor):
            (form,) = forms
            if form is not None and (sharding is None or sharding.output != form) and facts.symbols and node.op == "call_function":
                sharding = _cut_like(facts, node, form)
        if sharding is not None and _worthwhile(facts, node, sharding, forms):
            shardings[node] = sharding
        chosen = shardings.get(node)
        needs, unused = (chosen.needs, chosen.unused) if chosen else ({}, ())
        for source in node.all_input_nodes:
            if source not in unused and not is_size(source):
                ask(source, needs.get(source), node)
        for source, form in (chosen.also if chosen else {}).items():
            ask(source, form, node)
    return Plan(facts, shardings, dict(demands), returned, rank_streams=False, whole={})


def _worthwhile(facts: Facts, node: fx.Node, sharding: Sharding, forms: set[Form]) -> bool:
    """Whether to compute from parts. Data that met no parameter is cheaper whole when anybody wants it whole."""
    if node in facts.trained:
        return True
    if isinstance(sharding.output, tuple) or sharding.output is None or sharding.kind == "exchange":
        return False
    return forms == {sharding.output}
