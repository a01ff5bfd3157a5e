"""What is computed of every position by itself, taken out of a graph to run in tiles: logits and their loss, the inside of an MLP.

A linear layer that makes many numbers of few (a vocabulary, the width of an MLP) is followed to where they are few again. All on
the way becomes one node, a `RowRegion`: no value of that width exists outside of it, and within it only of a tile.

    cross_entropy(linear(x, w), y)           becomes   sum(region(x, w, y)) / count(y)
    linear(gelu(linear(x, w)), v)            becomes   region(x, w, v)

What joins positions (the mean of a loss) stays outside, so that the ordinary rules make it exact across ranks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from lightning_autosp import _compat
from lightning_autosp.compiler.capture import Captured, is_size, memory_of
from lightning_autosp.compiler.layout import Layout, span_of
from lightning_autosp.compiler.locality import CONTRACTIONS
from lightning_autosp.compiler.regions import Mode, RowRegion, begin_body, modes
from lightning_autosp.compiler.rule import Facts, Rule, bound, tensor_inputs
from lightning_autosp.compiler.rules.loss import CLASSIFICATION, ELEMENTWISE, MEAN, NONE
from lightning_autosp.compiler.rules.random import is_random
from lightning_autosp.compiler.rules.views import VIEWS, through_view
from lightning_autosp.compiler.tiling import inputs_cut, trace
from lightning_autosp.compiler.written_out import SDPA, insert

__all__ = ["LocalRegion", "local_regions", "tile", "tile_losses"]

aten = torch.ops.aten
_PRODUCTS = CONTRACTIONS | {aten.linear.default, aten.addmm.default}
_LOG_PROBABILITIES = {aten.log_softmax.int, aten._log_softmax.default}
_TOTALS: dict[Any, Any] = {aten.sum.default: aten.sum.dim_IntList, aten.mean.default: aten.mean.dim}
_EXTREMA: dict[Any, Any] = {
    aten.max.default: aten.amax.default,
    aten.amax.default: aten.amax.default,
    aten.min.default: aten.amin.default,
    aten.amin.default: aten.amin.default,
}
_COPIES = {aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default}
_RESULT_SHARE = 4
"""A result of a loss's region has this many times fewer elements a row than the input the logits are made of."""


@dataclass
class LocalRegion:
    """What could run in tiles.

    Attributes:
        nodes: The operators, in order.
        layouts: How each value is cut into rows.
        transient: Bytes of the values that would exist only of a tile, in the captured graph's symbols.
        boundary: Bytes of the inputs that have rows, and of the results.
    """

    nodes: list[fx.Node]
    layouts: Mapping[fx.Node, Layout]
    transient: sympy.Expr
    boundary: sympy.Expr


def tile_losses(captured: Captured, find: Rule) -> None:
    """Rewrite a captured graph so that logits exist only within regions; `captured.kept` gets those that cannot.

    Args:
        captured: The graph; changed in place.
        find: What gives the rule of an operator.
    """
    facts = _facts(captured, find)
    sliced: dict[Any, fx.Node] = {}
    deferred: set[fx.Node] = set()
    pending = [node for node in captured.graph.nodes if node.target in _PRODUCTS]
    while pending:
        node = pending.pop(0)
        if not node.users:  # it went into the region of another
            continue
        growth = _Growth(facts, node, of_loss=True)
        if not growth.grow():
            continue
        if growth.readers:
            if growth.is_loss:
                captured.kept[node] = growth.readers[0]
        elif (entered := growth.autocast()) is not None:  # it would have to stand within the node
            captured.kept[node] = entered
        elif growth.slices:  # of positions: taken before the logits are made
            made = [one for slice_ in growth.slices for one in _slice_before(growth, slice_, sliced)]
            _drop(growth.inside)
            pending = [node, *made, *pending]
        elif growth.reads_wide() and node not in deferred:  # logits with other readers: of those, this may be a part
            deferred.add(node)
            pending.append(node)
        else:
            growth.split()
            region = growth.region()
            if not _put(facts, region, None):
                captured.kept[node] = region.nodes[-1]


def local_regions(captured: Captured, find: Rule, sizes: Mapping[sympy.Symbol, int] | None = None) -> list[LocalRegion]:
    """Return what can run in tiles, disjoint, the most transient bytes first.

    A region begins with the products that make its values wider than their input and ends where they are as narrow again. Left out
    are those whose inputs and results are as large as what is between them.

    Args:
        captured: The graph; not changed.
        find: What gives the rule of an operator.
        sizes: The value of every symbol, to compare by; symbols that are absent stand for long sequences.
    """
    facts = _facts(captured, find)
    found: list[tuple[int, LocalRegion]] = []
    taken: set[fx.Node] = set()

    def number(expr: sympy.Expr) -> int:
        return int(expr.xreplace({symbol: sympy.Integer((sizes or {}).get(symbol, 2**14)) for symbol in expr.free_symbols}))

    for node in captured.graph.nodes:
        if node.target not in _PRODUCTS or node in taken:
            continue
        growth = _Growth(facts, node, of_loss=False)
        if growth.grow() and not growth.readers:
            region = growth.with_inputs(growth.region())
            transient = number(region.transient)
            if taken.isdisjoint(region.nodes) and transient > number(region.boundary):
                taken.update(region.nodes)
                found.append((transient, region))
    return [region for _, region in sorted(found, key=lambda pair: -pair[0])]


def tile(captured: Captured, find: Rule, region: LocalRegion, tile_rows: int) -> bool:
    """Put one node, which runs in tiles, in the place of a region.

    Args:
        captured: The graph; changed in place.
        find: What gives the rule of an operator.
        region: One that `local_regions` found in this graph.
        tile_rows: Positions of a tile, of every sample.

    Returns:
        Whether that could be done; if not, the graph is as it was.
    """
    return _put(_facts(captured, find), region, tile_rows)


def _facts(captured: Captured, find: Rule) -> Facts:
    # On a mesh of one rank PyTorch calls every operator local.
    return Facts(captured, captured.symbols, _compat.mesh_without_group(2), find=find)


def _drop(nodes: Iterable[fx.Node]) -> None:
    for node in reversed(list(nodes)):
        if not node.users:
            node.graph.erase_node(node)


def _made_by(node: fx.Node) -> fx.Node:
    """Return the operator that computes a value: for one of several results, the one that gives them."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    return source


class _Growth:
    """The values that follow from a product row by row, up to where they are narrow again.

    Attributes:
        inside: Values computed from rows of the product, in order, with how they are cut.
        readers: Nodes that want a wide value otherwise.
        joins: Nodes that join positions, but can be split into rows and what joins them.
        slices: Nodes that drop positions.
        is_loss: Whether a loss function was met.
    """

    def __init__(self, facts: Facts, start: fx.Node, *, of_loss: bool) -> None:
        self.facts, self.captured, self.start, self.of_loss = facts, facts.captured, start, of_loss
        self.inside: dict[fx.Node, Layout] = {}
        self.readers: list[fx.Node] = []
        self.joins: list[fx.Node] = []
        self.slices: list[fx.Node] = []
        self.is_loss = False
        self._behind: set[fx.Node] = set()
        """What depends on values inside, but is not."""
        self._width = sympy.oo

    # Widths.

    def _per_row(self, node: fx.Node, layout: Layout) -> sympy.Expr:
        return sympy.cancel(sympy.prod(self.facts.shape(node)) / layout.span.length)

    def _times_input(self, node: fx.Node, layout: Layout) -> float:
        """Return how many times the elements of the product's input a value has; 0 if that depends on the sizes."""
        ratio = sympy.cancel(self._per_row(node, layout) / self._width)
        return float(ratio) if ratio.is_number else 0.0

    def _is_wide(self, node: fx.Node) -> bool:
        layout = self.inside.get(node)
        return layout is not None and self._times_input(node, layout) > 1

    # Growing.

    def grow(self) -> bool:
        """Follow the rows of the product; return whether it makes them wider, and it is not known that nothing comes of it."""
        if not self._begin():
            return False
        waiting = _readers(self.start)
        node = self.start
        while waiting:
            node = node.next
            waiting.pop(node, None)
            made = _made_by(node)
            sources = [source for source in made.all_input_nodes if source in self.inside]
            wide = any(map(self._is_wide, sources))
            self.is_loss |= wide and made.target in CLASSIFICATION | _LOG_PROBABILITIES
            blocked = any(source in self._behind for source in made.all_input_nodes)
            layout = self._follow(node, sources, wide) if sources and not blocked else None
            if layout is not None:
                self.inside[node] = layout
                waiting |= _readers(node)
                if self.of_loss and wide and not self._is_wide(node) and self._times_input(node, layout) * _RESULT_SHARE > 1:
                    return False
            elif _is_several(node):
                continue  # each of its results is asked for
            elif sources or blocked:
                self._behind.add(node)
                if wide and self.of_loss and not blocked and self._can_split(node, sources):
                    self.joins.append(node)
                elif wide:
                    self.readers.append(node)
                    if not self.of_loss or made.target in _PRODUCTS:
                        return False
        return True

    def _begin(self) -> bool:
        start, facts = self.start, self.facts
        if not isinstance(start.meta.get("val"), torch.Tensor) or len(facts.sequence_dims(start)) != 1:
            return False
        sources = [source for source in tensor_inputs(start) if facts.has_sequence(source)]
        layout = facts.shape_layout(facts.shape(start))
        if len(sources) != 1 or layout is None:
            return False
        ratio = sympy.cancel(sympy.prod(facts.shape(start)) / sympy.prod(facts.shape(sources[0])))
        cut = self.cut(start, layout) if ratio.is_number and ratio > 1 else None
        if cut is None:
            return False
        self._width = self._per_row(sources[0], cut[sources[0]])
        self.inside[start] = layout
        return True

    def _follow(self, node: fx.Node, sources: list[fx.Node], wide: bool) -> Layout | None:
        """Return how a value is cut that is computed from rows of values inside."""
        if not isinstance(node.meta.get("val"), torch.Tensor):
            return None
        if node.target in _PRODUCTS and (self.of_loss or not wide):
            return None  # a region ends where values are narrow; the next product begins another
        for layout in self._layouts(node, sources[0]):
            cut = self.cut(node, layout)
            if cut is not None and all(cut.get(source) == self.inside[source] for source in sources):
                return layout
        if self.of_loss and wide and self._drops_positions(node):
            self.slices.append(node)
            source = self.inside[sources[0]]
            return source.over(span_of(self.facts.shape(node)[source.dim]))
        return None

    def _layouts(self, node: fx.Node, source: fx.Node) -> list[Layout]:
        """Return how a value may be cut if an input is."""
        layout = self.inside[source]
        if node.target in VIEWS:
            through = through_view(self.facts.shape(source), self.facts.shape(node), layout)
            return [] if through is None else [through]
        dims = [dim for dim, size in enumerate(self.facts.shape(node)) if size == layout.size]
        return [layout.at(dim) for dim in sorted(dims, key=lambda dim: dim != layout.dim)]

    def cut(self, node: fx.Node, layout: Layout) -> dict[fx.Node, Layout] | None:
        """Return which inputs to cut for rows of a value; `None` if it needs other rows as well."""
        made = _made_by(node)
        if made.target is SDPA or not isinstance(made.target, torch._ops.OpOverload):
            return None
        cut = inputs_cut(self.facts, node, layout)
        if cut is None or any(self.facts.has_sequence(source) and source not in cut for source in tensor_inputs(made)):
            return None
        return cut

    def autocast(self) -> fx.Node | None:
        """Return what entered an autocast region of the step's own that something stands in."""
        mode = modes(self.captured)
        return next((mode[node][1][0] for node in (*self.inside, *self.joins) if mode[node][1]), None)

    # What becomes of nodes that join or drop positions.

    def _drops_positions(self, node: fx.Node) -> bool:
        if node.target is not aten.slice.Tensor:
            return False
        given = bound(node)
        layout = self.inside[given["self"]]
        along = given["dim"] % len(self.facts.shape(node)) == layout.dim
        return along and not layout.merged and layout.along_sequence and bool(self.facts.sequence_dims(node))

    def _can_split(self, node: fx.Node, sources: list[fx.Node]) -> bool:
        target, shape = node.target, self.facts.shape
        if target in CLASSIFICATION:
            scores = bound(node)["self"]
            return scores in self.inside and len(shape(scores)) > 1 and self.inside[scores].dim != 1
        if target in ELEMENTWISE:
            return len({shape(source) for source in tensor_inputs(node)}) == 1
        return target in _TOTALS or (target in _EXTREMA and (len(node.args) == 1 or not node.args[1]))

    def split(self) -> None:
        """Write the nodes that join positions as values of rows and what joins them."""
        for node in self.joins:
            with self.captured.graph.inserting_before(node):
                new = self._split(node)
                value = node.meta["val"]
                if new.meta["val"].dtype != value.dtype:
                    new = insert(self.captured, aten._to_copy.default, new, like=node, dtype=value.dtype)
            node.replace_all_uses_with(new)
            self.captured.graph.erase_node(node)
        self.joins = []

    def _split(self, node: fx.Node) -> fx.Node:
        given = bound(node)
        if node.target in CLASSIFICATION:
            return self._split_classification(node, given)
        source = next(source for source in tensor_inputs(node) if source in self.inside)
        layout = self.inside[source]
        if node.target in _EXTREMA:
            return self._split_extremum(node, source, layout)
        total = node.target
        if node.target in ELEMENTWISE:
            total = aten.mean.default if given["reduction"] == MEAN else aten.sum.default
            source = self._without_reduction(node, given, layout)
        dtype = given.get("dtype") or node.meta["val"].dtype
        if dtype.is_floating_point:
            dtype = torch.promote_types(dtype, torch.float32)
        rows = self._over_row(node, _TOTALS[total], source, layout, {"dtype": dtype})
        return insert(self.captured, total, rows, like=node, dtype=dtype)

    def _over_row(self, like: fx.Node, target: Any, source: fx.Node, layout: Layout, options: dict[str, Any]) -> fx.Node:
        """Reduce all dimensions but that of the rows."""
        dims = [dim for dim in range(len(self.facts.shape(source))) if dim != layout.dim]
        rows = insert(self.captured, target, source, dims, False, like=like, **options)
        self.inside[rows] = layout.at(0)
        return rows

    def _split_extremum(self, node: fx.Node, source: fx.Node, layout: Layout) -> fx.Node:
        """Elements that tie share the gradient, in whatever rows they are: each row counts its own."""

        def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return insert(self.captured, target, *args, like=node, **kwargs)

        pick = _EXTREMA[node.target]
        rows = self._over_row(node, pick, source, layout, {})
        dims = [dim for dim in range(len(self.facts.shape(source))) if dim != layout.dim]
        kept = add(pick, source, dims, True)
        self.inside[kept] = layout
        same = add(aten.eq.Tensor, source, kept)
        self.inside[same] = layout
        ties = self._over_row(node, aten.sum.dim_IntList, same, layout, {})
        value = add(aten.detach.default, add(pick, rows))
        ties = add(aten.mul.Tensor, ties, add(aten.eq.Tensor, rows, value))
        shared = add(aten.where.ScalarOther, add(aten.gt.Scalar, ties, 0), rows, 0)
        shared = add(aten.div.Tensor, add(aten.sum.default, add(aten.mul.Tensor, shared, ties)), add(aten.sum.default, ties))
        # The gradient of what is shared, the value as it is.
        return add(aten.add.Tensor, value, add(aten.sub.Tensor, shared, add(aten.detach.default, shared)))

    def _without_reduction(self, node: fx.Node, given: dict[str, Any], layout: Layout) -> fx.Node:
        schema = node.target._schema.arguments  # type: ignore[union-attr]
        given = {**given, "reduction": NONE}
        args = [given[one.name] for one in schema if not one.kwarg_only]
        options = {one.name: given[one.name] for one in schema if one.kwarg_only}
        rows = insert(self.captured, node.target, *args, like=node, **options)
        self.inside[rows] = layout
        return rows

    def _split_classification(self, node: fx.Node, given: dict[str, Any]) -> fx.Node:
        layout, target, weight = self.inside[given["self"]], given["target"], given["weight"]
        rows = self._without_reduction(node, given, layout.at(layout.dim - (layout.dim > 1)))
        dtype = torch.promote_types(rows.meta["val"].dtype, torch.float32)

        def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return insert(self.captured, target, *args, like=node, **kwargs)

        if target.meta["val"].is_floating_point():
            return add(aten.mean.default if given["reduction"] == MEAN else aten.sum.default, rows, dtype=dtype)
        total = add(aten.sum.default, rows, dtype=dtype)
        if given["reduction"] != MEAN:
            return total
        valid = add(aten.ne.Scalar, target, given["ignore_index"])
        if weight is None:
            return add(aten.div.Tensor, total, add(aten.sum.default, valid))
        weights = add(aten.index.Tensor, weight, [add(aten.where.ScalarOther, valid, target, 0)])
        return add(aten.div.Tensor, total, add(aten.sum.default, add(aten.where.ScalarOther, valid, weights, 0), dtype=dtype))

    # What is found.

    def _close(self) -> tuple[set[fx.Node], dict[fx.Node, set[Layout | None]]]:
        """Return the wide values, what reads them, and wide values that are made only for them; and how inputs are cut for them."""
        kept: set[fx.Node] = set()
        wanted: dict[fx.Node, set[Layout | None]] = {}

        def keep(node: fx.Node, layout: Layout) -> bool:
            cut = self.cut(node, layout) if node.op == "call_function" else None
            if cut is None:
                return False
            kept.update((node, _made_by(node)))
            self.inside[node] = layout
            for source in _made_by(node).all_input_nodes:
                wanted.setdefault(source, set()).add(cut.get(source))
            return True

        for node in reversed(self.captured.graph.nodes):
            layout = self.inside.get(node)
            if layout is not None:
                read = any(self._is_wide(source) for source in _made_by(node).all_input_nodes)
                if read or self._is_wide(node) or any(user in kept for user in node.users):
                    keep(node, layout)
            elif node in self.joins:
                kept.add(node)
                main = next(source for source in tensor_inputs(node) if source in self.inside)
                for source in tensor_inputs(node):
                    if self.facts.shape(source) == self.facts.shape(main):
                        wanted.setdefault(source, set()).add(self.inside[main])
            elif node in wanted and node.users.keys() <= kept and len(wanted[node]) == 1:
                (layout,) = wanted[node]
                if layout is not None and self._times_input(node, layout) > 1:
                    keep(node, layout)
        return kept, wanted

    def reads_wide(self) -> bool:
        """Whether wide values that others read as well are wanted."""
        kept, wanted = self._close()
        outside = ((node, layout) for node, layouts in wanted.items() if node not in kept for layout in layouts)
        return any(layout and node.op == "call_function" and self._times_input(node, layout) > 1 for node, layout in outside)

    def region(self) -> LocalRegion:
        """Return what was found."""
        return self._region(*self._close())

    def with_inputs(self, found: LocalRegion) -> LocalRegion:
        """Return the region with what its inputs are computed from row by row, if its boundary is no larger then: a norm, say."""
        modes_of = modes(self.captured)
        inside = set(found.nodes)
        wanted: dict[fx.Node, set[Layout | None]] = {}

        def want(node: fx.Node, layout: Layout) -> bool:
            cut = self.cut(node, layout) if node.op == "call_function" else None
            if cut is None:
                return False
            self.inside[node] = layout
            for source in _made_by(node).all_input_nodes:
                wanted.setdefault(source, set()).add(cut.get(source))
            return True

        for node in reversed(self.captured.graph.nodes):
            if node in found.layouts:
                want(node, found.layouts[node])
            elif node in wanted and node.users.keys() <= inside and len(wanted[node]) == 1:
                (layout,) = wanted[node]
                made = _made_by(node)
                alike = modes_of[node] == modes_of[self.start] and not is_random(made) and made.target not in _PRODUCTS
                if layout is not None and alike and (made is node or len(made.users) == 1) and want(node, layout):
                    inside |= {node, made}
        extended = self._region(inside, wanted)
        return extended if sympy.simplify(extended.boundary - found.boundary).is_nonpositive else found

    def _region(self, kept: set[fx.Node], wanted: Mapping[fx.Node, set[Layout | None]]) -> LocalRegion:
        nodes = [node for node in self.captured.graph.nodes if node in kept]
        layouts = {node: self.inside[node] for node in nodes if node in self.inside}
        results = [node for node in layouts if not node.users.keys() <= kept]
        inputs = [source for source, cuts in wanted.items() if source not in kept and cuts != {None}]
        own = {memory_of(node): node for node in reversed(layouts)}  # views are no values of their own
        own = {memory: node for memory, node in own.items() if memory not in set(map(memory_of, results))}
        sizes = [sum(map(self._bytes, chosen), sympy.Integer(0)) for chosen in (own.values(), (*inputs, *results))]
        return LocalRegion(nodes, layouts, *sizes)

    def _bytes(self, node: fx.Node) -> sympy.Expr:
        return sympy.prod(self.facts.shape(node)) * node.meta["val"].element_size()


def _readers(node: fx.Node) -> dict[fx.Node, None]:
    """Return who reads a value; for an operator with several results, who picks each."""
    return {reader: None for user in node.users for reader in (user.users if _is_several(user) else (user,))}


def _is_several(node: fx.Node) -> bool:
    """Whether the node is an operator with several results."""
    return isinstance(node.target, torch._ops.OpOverload) and isinstance(node.meta.get("val"), (tuple, list))


def _slice_before(growth: _Growth, node: fx.Node, made: dict[Any, fx.Node]) -> list[fx.Node]:
    """Drop positions of what logits are made of, in the place of a slice of them; return the products that are new.

    Args:
        growth: That of the product.
        node: The slice.
        made: Slices of values that were made so far.
    """
    captured, given = growth.captured, bound(node)
    new: list[fx.Node] = []
    mode = modes(captured)[node]

    def sliced(value: fx.Node, dim: int) -> fx.Node:
        key = (value, dim, given["start"], given["end"], given["step"], mode)
        if key not in made:
            if value in growth.inside and value not in growth.slices:
                cut = growth.cut(value, growth.inside[value])
                assert cut is not None
                copies = {source: sliced(source, layout.dim) for source, layout in cut.items()}
                args, kwargs = fx.map_arg((value.args, value.kwargs), lambda source: copies.get(source, source))
                made[key] = insert(captured, value.target, *args, like=value, **kwargs)
                if value.target in _PRODUCTS:
                    new.append(made[key])
            else:
                made[key] = insert(captured, aten.slice.Tensor, value, dim, *key[2:5], like=node)
        return made[key]

    with captured.graph.inserting_before(node):
        node.replace_all_uses_with(sliced(given["self"], growth.inside[given["self"]].dim))
    return new


def _put(facts: Facts, found: LocalRegion, tile_rows: int | None) -> bool:
    """Put one node in the place of many; return whether that can be."""
    captured = facts.captured
    nodes, inside = found.nodes, set(found.nodes)
    mode = modes(captured)
    grad = any(mode[node][0] for node in nodes)
    if any(mode[node][1] for node in nodes):
        return False
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    tensors = [source for source in sources if not is_size(source)]
    if not all(isinstance(source.meta.get("val"), torch.Tensor) for source in tensors):
        return False
    results = [node for node in nodes if node in found.layouts and not node.users.keys() <= inside]
    if not results:
        return False
    body, copies = begin_body(sources)
    for node in nodes:
        copies[node] = body.node_copy(node, copies.__getitem__)
        if grad and not mode[node][0] and isinstance(node.meta["val"], torch.Tensor):
            copies[node] = body.call_function(aten.detach.default, (copies[node],))
            copies[node].meta = dict(node.meta)
    body.output(tuple(copies[node] for node in results))
    region = RowRegion(body, rows=tuple(found.layouts[node] for node in results), tile_rows=tile_rows)
    if trace(facts, region, *((layout,) for layout in region.rows)) is None:
        return False
    place = _make_room(captured, inside, list(sources), mode, grad)
    if place is None:
        return False
    with captured.graph.inserting_before(place):
        joined = captured.graph.call_function(region, tuple(tensors))  # type: ignore[arg-type]
        joined.meta = {**nodes[0].meta, "val": tuple(node.meta["val"] for node in results)}
        for index, node in enumerate(results):
            picked = captured.graph.call_function(operator.getitem, (joined, index))
            picked.meta = dict(node.meta)
            node.replace_all_uses_with(picked, delete_user_cb=lambda user: user not in inside)
    _drop(nodes)
    return True


def _make_room(
    captured: Captured, inside: set[fx.Node], sources: list[fx.Node], mode: Mapping[fx.Node, Mode], grad: bool
) -> fx.Node | None:
    """Return the node before which a region can stand, its inputs made ready; `None` if there is none."""
    order = list(captured.graph.nodes)
    place = {node: index for index, node in enumerate(order)}
    here = min(place[user] for node in inside for user in node.users if user not in inside)
    while mode[order[here - 1]] != (grad, ()):
        here -= 1
    late: set[fx.Node] = set()
    pending = [source for source in sources if place[source] >= here]
    while pending:
        node = pending.pop()
        if node not in late:
            late.add(node)
            pending += [source for source in node.all_input_nodes if place[source] >= here]
    for node in late:
        if node in inside or node.op == "placeholder" or is_random(node) or mode[node] != (grad, ()) or node.is_impure():
            return None
    for node in sorted(late, key=place.__getitem__):
        order[here].prepend(node)
    return order[here]
