"""Emitting the graph one rank runs, forwards in the original order.

Everything is an integer here: the symbols have been replaced by one batch's sizes. Each value is emitted in every form that
is asked for, right where it is computed, so that conversions stand in the same `no_grad` region as the value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lightning_autosp import collectives
from lightning_autosp.attention.select import AttentionOptions, Choice
from lightning_autosp.attention.tiles import TileProgram
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.capture import is_size
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.plan import Form, Plan
from lightning_autosp.exchange import Cut, Range, exchange, fetch, rearrange

aten = torch.ops.aten

__all__ = ["Emitter", "Program", "gather_layout", "slice_layout"]


@dataclass
class Program:
    """The lowered graph of one rank for one set of sizes."""

    module: fx.GraphModule
    inputs: list[int]
    """Indices of the captured graph's inputs that the module takes."""
    rank_streams: bool
    gathers: list[tuple[fx.Node, list[fx.Node]]] = field(default_factory=list)
    """Values that were made whole by a collective, with who asked."""


def slice_layout(x: Tensor, dim: int, outer: int, inner: int, start: int, stop: int) -> Tensor:
    """Cut positions `[start, stop)` from a dimension of size `outer * length * inner`; the result is contiguous."""
    if outer == inner == 1:
        return x.narrow(dim, start, stop - start).contiguous()
    split = x.unflatten(dim, (outer, -1, inner)).narrow(dim + 1, start, stop - start)
    return split.contiguous().flatten(dim, dim + 2)


def gather_layout(x: Tensor, dim: int, outer: int, inner: int, lengths: tuple[int, ...], group: Group) -> Tensor:
    """Undo `slice_layout` over all ranks; the result is contiguous."""
    if outer == inner == 1:
        return collectives.all_gather_sequence(x, dim, lengths, group).contiguous()
    split = x.unflatten(dim, (outer, -1, inner))
    return collectives.all_gather_sequence(split, dim + 1, lengths, group).contiguous().flatten(dim, dim + 2)


def fetch_layout(
    x: Tensor, dim: int, outer: int, bounds: Sequence[tuple[int, int]], wanted: Sequence[Sequence[Range]], group: Group
) -> Tensor:
    """`exchange.fetch` along a dimension of size `outer * length`; the result is contiguous."""
    if outer == 1:
        return fetch(x, dim, bounds, wanted, group).contiguous()
    return fetch(x.unflatten(dim, (outer, -1)), dim + 1, bounds, wanted, group).contiguous().flatten(dim, dim + 1)


def exchange_dims(x: Tensor, have: Cut, want: Cut, group: Group) -> Tensor:
    """Give up a part of one dimension for a part of another; the result is contiguous.

    Args:
        x: This rank's part along `have`.
        have: `(dim, outer, inner, bounds)`: how `x` is cut, `bounds` every rank's `(start, stop)`.
        want: How the result is cut.
        group: The sequence group.
    """
    first, second = sorted((have, want))
    # The later dimension first, so that the number of the earlier one stays.
    split = x
    for dim, outer, inner, bounds in (second, first):
        whole = bounds[-1][1] if (dim, outer, inner, bounds) == want else bounds[group.rank][1] - bounds[group.rank][0]
        split = split.unflatten(dim, (outer, whole, inner))
    place = {first: first[0] + 1, second: second[0] + 3}
    out = exchange(split, place[have], have[3], place[want], want[3], group)
    return out.flatten(second[0] + 2, second[0] + 4).flatten(first[0], first[0] + 2).contiguous()


class Emitter:
    """Builds one `Program`. Rules use its methods to read inputs and add calls."""

    def __init__(
        self,
        plan: Plan,
        sizes: Mapping[sympy.Symbol, int],
        group: Group,
        enter_parameter: Callable[[str], tuple[Any, tuple[Any, ...]]] | None = None,
        attention: AttentionOptions | None = None,
    ) -> None:
        """Prepare to emit.

        Args:
            plan: What to emit.
            sizes: The value of every symbol.
            group: The sequence group, with this rank's place in it.
            enter_parameter: `name -> (function, further arguments)`: how a graph input becomes the parameter it stands for.
            attention: How methods of attention are chosen.
        """
        self.plan, self.group = plan, group
        self.sizes = {symbol: sympy.Integer(size) for symbol, size in sizes.items()}
        self.facts = plan.facts
        self.enter_parameter = enter_parameter
        self.attention = attention or AttentionOptions()
        self.attention_choices: dict[fx.Node, Choice] = {}
        """By which method calls of attention run."""
        self.tile_programs: dict[fx.Node, TileProgram] = {}
        """How regions of rows run."""
        self._graph = fx.Graph()
        self._env: dict[tuple[fx.Node, Form], Any] = {}
        self._meta: dict[str, Any] = {}
        self._gathers: list[tuple[fx.Node, list[fx.Node]]] = []

    # What rules use.

    def get(self, node: Any, form: Form) -> fx.Node:
        """Return a value that was asked for, in that form."""
        return self._env[(node, form)]

    def value(self, value: Any) -> Any:
        """Return an argument whole: a node's value, or the constant it is."""
        return self._map(value, {})

    def arguments(self, node: fx.Node, needs: Mapping[fx.Node, Layout]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the node's arguments, the tensors in the forms of `needs` and sizes as integers."""
        return self._map(node.args, needs), self._map(node.kwargs, needs)

    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        node = self._graph.call_function(target, args, kwargs or {})
        node.meta.update(self._meta)
        return node

    def integer(self, expr: sympy.Expr) -> int:
        return int(expr.xreplace(self.sizes))

    def number(self, node: fx.Node) -> int | float | bool:
        """Return the value of a node that holds a number that follows from the sizes."""
        expr = self.facts.expr(node).xreplace(self.sizes)
        return int(expr) if isinstance(node.meta["val"], torch.SymInt) else _number(expr)

    def size(self, layout: Layout) -> int:
        """Return the global number of positions."""
        return self.integer(layout.span.length)

    def bounds(self, layout: Layout) -> tuple[tuple[int, int], ...]:
        """Return every rank's `(start, stop)` positions."""
        return tuple(layout.span.bounds(self.integer(layout.span.base), self.group.size))

    def cuts(self, layout: Layout) -> tuple[tuple[int, int], ...]:
        """Return every rank's `(start, stop)` in a dimension that later dimensions may have been merged into."""
        inner = self.integer(layout.inner)
        return tuple((start * inner, stop * inner) for start, stop in self.bounds(layout))

    def lengths(self, layout: Layout) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.bounds(layout))

    def local_length(self, layout: Layout) -> int:
        """Return this rank's number of positions."""
        return self.lengths(layout)[self.group.rank]

    def local_shape(self, node: fx.Node, layout: Layout) -> list[int]:
        """Return the shape of this rank's part of a node's value."""
        shape = [self.integer(size) for size in self.facts.shape(node)]
        shape[layout.dim] = self.integer(layout.outer) * self.local_length(layout) * self.integer(layout.inner)
        return shape

    def reshape(self, source: Any, layout: Layout, out: Layout, node: fx.Node) -> fx.Node:
        """View this rank's part in the shape that `node` gives the whole."""
        return self.call(torch.ops.aten.reshape.default, (self.get(source, layout), self.local_shape(node, out)))

    def gather(self, value: fx.Node, layout: Layout) -> fx.Node:
        """Return the whole of what every rank has a part of."""
        dims = layout.dim, self.integer(layout.outer), self.integer(layout.inner)
        return self.call(gather_layout, (value, *dims, self.lengths(layout), self.group))

    def computed(self) -> Iterator[tuple[fx.Node, fx.Node, Form]]:
        """Yield every emitted value of an operator of the captured graph, that operator, and the value's form."""
        for (node, form), value in self._env.items():
            if isinstance(value, fx.Node) and node.op == "call_function":
                yield value, node, form

    # The walk.

    def emit(self) -> Program:
        captured = self.plan.captured
        module = fx.GraphModule({}, fx.Graph())
        inputs = self._emit_placeholders()
        entries = self._parameter_entries()
        for node in captured.graph.nodes:
            for parameter in entries.get(node, ()):
                self._emit_parameter(parameter)
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                setattr(module, node.target, getattr(captured.owner, node.target))
            if node in self.plan.demands:
                self._emit_node(node)
        results: Any = captured.graph.output_node().args[0]
        outputs, updates = results
        values = self._map(outputs, self.plan.returned)
        for placeholder, update in zip(captured.mutated, updates, strict=True):
            self.call(torch.ops.aten.copy_.default, (self._raw[placeholder], self.get(update, None)))
        self._graph.output(tuple(pytree.tree_leaves(values, is_leaf=lambda leaf: leaf is None)))
        self._graph.lint()
        module.graph = self._graph
        return Program(module, inputs, self.plan.rank_streams, self._gathers)

    def _emit_placeholders(self) -> list[int]:
        inputs = []
        self._raw: dict[fx.Node, fx.Node] = {}
        for index, node in enumerate(self.plan.captured.placeholders):
            used = node in self.plan.demands or node in self.plan.captured.mutated
            if isinstance(node.meta["val"], Tensor) and used:
                inputs.append(index)
                self._raw[node] = self._graph.placeholder(node.name)
        for node, raw in self._raw.items():
            if node not in self.plan.captured.parameters or self.enter_parameter is None:
                self._provide(node, self.facts.arriving.get(node), raw)
        return inputs

    def _parameter_entries(self) -> dict[fx.Node, list[fx.Node]]:
        """Return where each parameter enters: before its first use, but outside `no_grad`, which would cut its gradient."""
        if self.enter_parameter is None:
            return {}
        pending = {node for node in self.plan.captured.parameters if node in self._raw}
        entries: dict[fx.Node, list[fx.Node]] = {}
        region: fx.Node | None = None
        for node in self.plan.captured.graph.nodes:
            if node.target is torch._C._set_grad_enabled:
                region = None if node.args[0] else region or node
            for source in node.all_input_nodes:
                if source in pending:
                    pending.discard(source)
                    entries.setdefault(region or node, []).append(source)
        return entries

    def _emit_parameter(self, node: fx.Node) -> None:
        assert self.enter_parameter is not None
        self._meta = {}
        target, args = self.enter_parameter(self.plan.captured.parameters[node])
        self._provide(node, None, self.call(target, (self._raw[node], *args)))

    def _emit_node(self, node: fx.Node) -> None:
        self._meta = {key: node.meta[key] for key in ("stack_trace", "recompute", "nn_module_stack") if key in node.meta}
        sharding = self.plan.shardings.get(node)
        if node.op == "get_attr":
            self._provide(node, None, self._graph.get_attr(node.target))  # type: ignore[arg-type]
        elif node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            picked = self.call(operator.getitem, (self.get(node.args[0], None), node.args[1]))
            self._provide(node, sharding.output if sharding else None, picked)  # type: ignore[arg-type]
        elif node in self.plan.whole:
            self._provide(node, None, self.plan.whole[node](self, node))
        elif sharding is None:
            args, kwargs = self.arguments(node, {})
            # A value may have another memory layout than when it was traced: attention's result in tiles does.
            target = aten.reshape.default if node.target is aten.view.default else node.target
            self._provide(node, None, self.call(target, args, kwargs))
        else:
            if sharding.emit is not None:
                value = sharding.emit(self, node)
            else:
                value = self.call(node.target, *self.arguments(node, sharding.needs))
            form = None if isinstance(sharding.output, tuple) else sharding.output
            self._provide(node, form, value)

    def _provide(self, node: fx.Node, form: Form, value: Any) -> None:
        """Record a value in the form it was computed in and convert it to the others that are asked for."""
        self._env[(node, form)] = value
        others = [other for other in self.plan.demands.get(node, {}) if other != form]
        if not others:
            return
        assert not any(x is not None and x.routed for x in (form, *others)), f"{node} has only the form {form}, not {others}"
        if form is not None:
            for other in others:
                if other is not None:
                    self._env[(node, other)] = self._exchange(value, form, other)
            if None in others:
                self._env[(node, None)] = self.gather(value, form)
                self._gathers.append((node, self.plan.demands[node][None]))
            return
        for other in others:
            if other is not None:
                start, stop = self.bounds(other)[self.group.rank]
                dims = (other.dim, self.integer(other.outer), self.integer(other.inner))
                self._env[(node, other)] = self.call(slice_layout, (value, *dims, start, stop))

    def _exchange(self, value: fx.Node, have: Layout, want: Layout) -> fx.Node:
        """Turn one part into another without making the whole."""
        if have.dim == want.dim and self.integer(have.outer) == self.integer(want.outer):
            if self.cuts(have) == self.cuts(want):
                return value
            wanted = tuple(((start, stop, 1),) for start, stop in self.cuts(want))
            return self.call(fetch_layout, (value, have.dim, self.integer(have.outer), self.cuts(have), wanted, self.group))
        cuts = [(x.dim, self.integer(x.outer), self.integer(x.inner), self.bounds(x)) for x in (have, want)]
        return self.call(exchange_dims if have.dim != want.dim else rearrange, (value, *cuts, self.group))

    def _map(self, value: Any, needs: Mapping[fx.Node, Form]) -> Any:
        def one(node: fx.Node) -> Any:
            return self.number(node) if is_size(node) else self.get(node, needs.get(node))

        return fx.map_arg(value, one)


def _number(expr: Any) -> float | bool:
    return bool(expr) if expr in (sympy.true, sympy.false) else float(expr)
