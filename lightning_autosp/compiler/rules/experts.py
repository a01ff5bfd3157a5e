"""Mixture of experts: rows are sorted by expert, computed, and brought back, on the rank they are on.

    perm = ids.sort().indices
    rows = grouped_mm(x[perm // k], weights, offsets)        row i is computed from row i by one expert
    out = zeros.index_add(0, perm // k, rows)                or rows[inverse of perm]

As no row's result depends on where the sort puts it, each rank sorts the rows it has. In between, values have a form of their own,
which no slice of the whole gives: rows in the rank's order (`Layout.order`) and positions counted in the rank's part
(`Layout.points`). Only the rules here take them. Whoever else wants such a value can only have it whole, which takes the sort in
full: then the order leaks, and the step is planned again without a rank's own sort (`leaking_sorts`). Offsets of the experts are
counted again from the rank's rows, wherever counts of the rows that were sorted can be proven to be what is given.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lightning_autosp.compiler.capture import is_size
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.plan import Plan
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound, tensor_inputs
from lightning_autosp.compiler.rules import factories, views
from lightning_autosp.compiler.rules.generic import ask_pytorch, generic, pointwise
from lightning_autosp.compiler.rules.partial import finish_partial

__all__ = ["invert", "leaking_sorts", "route", "routed", "takes_routed"]

aten = torch.ops.aten

_SORTS = {aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable}
_VIEWS = views.VIEWS | {aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.expand_as.default}
_COPIES = {aten._to_copy.default, aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default}
_PIECES = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.unbind.int}
_JOINED = {aten.cat.default, aten.concat.default, aten.concatenate.default, aten.stack.default}
_ORDER_FREE = {
    aten.einsum.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.mean.default,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.max.default,
    aten.min.default,
    aten.any.default,
    aten.any.dim,
    aten.all.default,
    aten.all.dim,
}
"""Reductions that may be over the rows too."""
_OF_FEATURES = {
    aten.slice.Tensor,
    aten.select.int,
    aten.softmax.int,
    aten.log_softmax.int,
    aten.logsumexp.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.linalg_vector_norm.default,
}
"""Local in the rows, as PyTorch sees them, if they are not of the rows."""
_CONSTANTS = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
}
_INDICES = {torch.int32, torch.int64}
_COUNTS = {torch.int32, torch.int64, torch.float32, torch.float64}
"""Types that hold the number of an expert, and of rows, exactly."""


def takes_routed(facts: Facts, node: fx.Node) -> bool:
    """Whether an input is in a rank's own order, or positions in its part."""
    return any(layout.routed for source in tensor_inputs(node) if (layout := facts.layout(source)) is not None)


def route(facts: Facts, node: fx.Node) -> Sharding | None:
    """The sort that gives rows their order, and what else is local only because nothing depends on the order."""
    rule = _ENTRIES.get(node.target)
    return None if rule is None else rule(facts, node)


def routed(facts: Facts, node: fx.Node, family: Rule) -> Sharding | None:
    """Rules for operators some input of which is in a rank's own order; `family` is the rule of other inputs."""
    if (rule := _ROUTED.get(node.target)) is not None:
        return rule(facts, node)
    if _is_grouped_mm(node):
        return grouped_mm(facts, node)
    if node.target is aten.slice.Tensor and facts.shape(node) == facts.shape(node.args[0]):  # type: ignore[arg-type]
        return row_by_row(facts, node, family)
    if any(layout.points for source in tensor_inputs(node) if (layout := facts.layout(source)) is not None):
        kept = node.target in _VIEWS | _COPIES and node.meta["val"].dtype in _INDICES
        return row_by_row(facts, node, family) if kept else None
    if node.target in _OF_FEATURES:
        return row_by_row(facts, node, ask_pytorch)
    if family in (generic, pointwise) or node.target in _VIEWS | _PIECES | _JOINED | _ORDER_FREE:
        return row_by_row(facts, node, family)
    return None


def leaking_sorts(plan: Plan) -> frozenset[fx.Node]:
    """Return the sorts that the ranks cannot do on their own: something wants what follows from their order in another form."""
    leaks: set[fx.Node] = set()
    for node, sharding in plan.shardings.items():
        layout = sharding.output
        if isinstance(layout, Layout) and layout.routed and set(plan.demands[node]) != {layout}:
            leaks |= {order for rows in (layout, layout.points) if rows is not None and (order := rows.order) is not None}
    return frozenset(leaks)


def row_by_row(facts: Facts, node: fx.Node, family: Rule) -> Sharding | None:
    """An operator that is local has every row depend on its own row only, and on all rows alike: their order is free."""
    sharding = family(facts, node)
    if sharding is None:
        return None
    routed = {source: layout for source in tensor_inputs(node) if (layout := facts.layout(source)) is not None and layout.routed}
    known = all(source in sharding.unused or sharding.needs.get(source) == layout for source, layout in routed.items())
    layouts = [*routed.values(), *(layout for layout in pytree.tree_leaves(sharding.output) if layout is not None)]
    return sharding if known and len({layout.rows for layout in layouts}) == 1 else None


def sort(facts: Facts, node: fx.Node) -> Sharding | None:
    """Each rank sorts its own rows."""
    key = node.args[0]
    assert isinstance(key, fx.Node)
    layout = facts.layout(key)
    if layout is None or node in facts.whole_sorts or len(facts.shape(key)) != 1 or key.meta["val"].is_floating_point():
        return None
    rows = replace(layout, order=node)
    perm = replace(rows, points=layout)
    return Sharding({key: layout}, perm if isinstance(node.meta["val"], Tensor) else (rows, perm), note="own rows")


def sort_again(facts: Facts, node: fx.Node) -> Sharding | None:
    """Sorting a permutation inverts it."""
    perm = node.args[0]
    assert isinstance(perm, fx.Node)
    layout = facts.layout(perm)
    if layout is None or not _is_permutation(layout) or len(facts.shape(perm)) != 1 or bound(node)["descending"]:
        return None
    inverse = _inverse(layout)
    if isinstance(node.meta["val"], Tensor):
        return Sharding({perm: layout}, inverse)
    # The sorted values would be positions in no order of any sort.
    return None if any(user.args[1] == 0 and user.users for user in node.users) else Sharding({perm: layout}, (inverse, inverse))


def _is_permutation(positions: Layout) -> bool:
    """Whether positions of rows are as many as the rows: they come from sorts alone, so each is there once."""
    points = positions.points
    return points is not None and replace(points, order=None) == replace(positions.rows, order=None)


def _inverse(perm: Layout) -> Layout:
    assert perm.points is not None
    return replace(perm.points, points=perm.rows)


def divide(facts: Facts, node: fx.Node) -> Sharding | None:
    """Row `r` of `k` rows a token is of token `r // k`, in any part of whole tokens, and is its `r % k`-th."""
    positions, divisor = node.args[0], node.args[1]
    layout = facts.layout(positions) if isinstance(positions, fx.Node) else None
    if layout is None or layout.points is None:
        return row_by_row(facts, node, generic)
    assert isinstance(positions, fx.Node)
    if not isinstance(divisor, int) or bound(node).get("rounding_mode", "") is None:
        return None
    if node.target is aten.remainder.Scalar:
        fits = layout.points.order is None and divisor > 0 and layout.points.inner % divisor == 0
        return Sharding({positions: layout}, replace(layout, points=None)) if fits else None
    return _divided(facts, positions, divisor)


def _divided(facts: Facts, positions: fx.Node, divisor: int, unused: tuple[fx.Node, ...] = ()) -> Sharding | None:
    """Positions of the tokens that rows are of, from positions of rows."""
    layout = facts.layout(positions)
    assert layout is not None
    assert layout.points is not None
    points = layout.points
    if points.order is not None or divisor < 1 or points.inner % divisor != 0:
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        return em.call(aten.floor_divide.default, (em.get(positions, layout), divisor))

    return Sharding({positions: layout}, replace(layout, points=replace(points, inner=points.inner / divisor)), emit, unused=unused)


def take(facts: Facts, node: fx.Node) -> Sharding | None:
    """`x[positions]` and `table[values]`: a row of the result for every row of the index."""
    given = bound(node)
    source = given["self"]
    listed = given["indices"] if "indices" in given else [None] * (given["dim"] % len(facts.shape(source))) + [given["index"]]
    indices = {dim: index for dim, index in enumerate(listed) if index is not None}
    first = min(indices)
    layouts = [layout for index in indices.values() if (layout := facts.layout(index)) is not None]
    if len(layouts) < len(indices):
        return None
    rows = layouts[0].rows
    if (
        list(indices) != list(range(first, first + len(indices)))
        or len({facts.shape(index) for index in indices.values()}) > 1
        or any(layout.rows != rows or layout.dim != layouts[0].dim for layout in layouts)
        or any(index.meta["val"].dtype not in _INDICES for index in indices.values())
    ):
        return None
    needs = dict(zip(indices.values(), layouts, strict=True))
    out = rows.at(first + layouts[0].dim)
    pointed = [(dim, points) for dim, layout in zip(indices, layouts, strict=True) if (points := layout.points) is not None]
    if not pointed:
        return None if facts.has_sequence(source) else Sharding(needs, out)
    if len(pointed) > 1:
        return None
    ((dim, points),) = pointed
    divisor = _row_numbers(facts, source)
    if divisor is not None and len(needs) == 1:  # positions themselves: counted in the rank's part, as the index is
        return _divided(facts, indices[dim], divisor, unused=(source,)) if facts.shape(source)[0] == points.size else None
    fitted = facts.fit(source, dim, points)
    return None if fitted is None or source in needs else Sharding({**needs, source: fitted}, out)


def take_numbered(facts: Facts, node: fx.Node) -> Sharding | None:
    """Every row `k` times, taken by numbers `0, 0, 1, 1, ...`."""
    given = bound(node)
    source = given["self"]
    listed = given["indices"] if "indices" in given else [None] * (given["dim"] % len(facts.shape(source))) + [given["index"]]
    *before, numbers = listed
    layout, times = facts.layout(source), _row_numbers(facts, numbers)
    if layout is None or times is None or any(before) or layout.dim != len(before):
        return None
    if facts.shape(numbers) != (sympy.expand(layout.size * times),):
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        return em.call(aten.repeat_interleave.self_int, (em.get(source, layout), times, layout.dim))

    return Sharding({source: layout}, replace(layout, inner=layout.inner * times), emit, unused=(numbers,))


def add_numbered(facts: Facts, node: fx.Node) -> Sharding | None:
    """Every `k` rows added to one, by numbers `0, 0, 1, 1, ...`."""
    given = bound(node)
    target, numbers, values = given["self"], given["index"], given["source"]
    layout, times = facts.layout(values), _row_numbers(facts, numbers)
    dim = given["dim"] % len(facts.shape(target))
    if layout is None or times is None or layout.dim != dim or layout.inner % times != 0:
        return None
    fitted = facts.fit(target, dim, replace(layout, inner=layout.inner / times))
    if fitted is None or target is values:
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        rows = em.local_shape(values, layout)[dim]
        local = em.call(row_numbers, (rows, times, n.meta["val"].device))
        return em.call(n.target, (em.get(target, fitted), dim, local, em.get(values, layout)), {"alpha": em.value(given["alpha"])})

    return Sharding({target: fitted, values: layout}, fitted, emit, unused=(numbers,))


def row_numbers(rows: int, times: int, device: torch.device) -> Tensor:
    """Return `0, 1, ...`, each `times` times, shape `(rows,)`."""
    return torch.arange(rows, device=device) // times


def take_along(facts: Facts, node: fx.Node) -> Sharding | None:
    """`x.gather(dim, positions)`, a position for every element."""
    given = bound(node)
    source, index = given["self"], given["index"]
    layout = facts.layout(index)
    if layout is None or layout.points is None:
        return row_by_row(facts, node, generic)
    dim = given["dim"] % len(facts.shape(source))
    fitted = facts.fit(source, dim, layout.points) if dim == layout.dim else None
    return None if fitted is None or source is index else Sharding({index: layout, source: fitted}, replace(layout, points=None))


_JOINS = {aten.index_add.default, aten.scatter_add.default, aten.scatter_reduce.two}


def put(facts: Facts, node: fx.Node) -> Sharding | None:
    """`x[positions] = rows`, `x.index_add(0, positions, rows)` and their like: every row goes to a row of the same rank."""
    given = bound(node)
    target = given["self"]
    listed = given["indices"] if "indices" in given else [None] * (given["dim"] % len(facts.shape(target))) + [given["index"]]
    values: Any = next(given[name] for name in ("values", "source", "src", "value") if name in given)
    *before, index = listed
    if any(other is not None for other in before):
        return None
    dim, layout = len(before), facts.layout(index)
    per_element = "indices" not in given and ("src" in given or "value" in given)
    if layout is None or layout.points is None:
        return row_by_row(facts, node, generic) if per_element else None
    joins = node.target in _JOINS or given.get("accumulate", False)
    if not (joins or _is_permutation(layout)) or (isinstance(values, fx.Node) and is_size(values)):
        return None
    if (layout.dim != dim) if per_element else (len(facts.shape(index)) != 1):
        return None
    if _row_numbers(facts, values) == 1 and facts.shape(values) == facts.shape(index) == facts.shape(target) and not joins:
        whole = node.meta["val"].dtype in _INDICES
        return _inverted(node, index, layout, unused=(target, values)) if whole else None
    needs = {index: layout, target: facts.fit(target, dim, layout.points)}
    if isinstance(values, fx.Node) and facts.shape(values):
        if len(facts.shape(values)) != len(facts.shape(target)) or values in needs:
            return None
        needs[values] = facts.fit(values, dim, layout.rows)
    if target is index or any(fitted is None for fitted in needs.values()):
        return None
    return Sharding({source: fitted for source, fitted in needs.items() if fitted is not None}, needs[target])


def _inverted(node: fx.Node, perm: fx.Node, layout: Layout, unused: tuple[fx.Node, ...]) -> Sharding:
    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        return em.call(invert, (em.get(perm, layout), n.meta["val"].dtype))

    return Sharding({perm: layout}, _inverse(layout), emit, unused=unused)


def invert(perm: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the inverse of a permutation, shape `(n,)`, as `dtype`."""
    places = torch.arange(perm.shape[0], device=perm.device, dtype=dtype)
    return torch.empty_like(places).scatter(0, perm, places)


def _row_numbers(facts: Facts, node: Any) -> int | None:
    """Return `k` if the value at `r` is `r // k`: the numbers of the rows, each `k` times."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor) or len(facts.shape(node)) != 1:
        return None
    if _counted_dim(facts, node) == 0:
        return 1
    source: Any = node.args[0] if node.args else None
    if node.target in _COPIES:
        return _row_numbers(facts, source)
    if node.target is aten.repeat_interleave.self_int and isinstance(node.args[1], int):
        inside = _row_numbers(facts, source)
        return None if inside is None else inside * node.args[1]
    if node.target in _VIEWS and _counted_dim(facts, source) == 0:
        times = sympy.prod(facts.shape(source)[1:])
        return int(times) if times.is_Integer else None
    return None


def _counted_dim(facts: Facts, node: Any) -> int | None:
    """Return the dimension of which every element is its place along it."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return None
    if node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        given = bound(node)
        from_zero = facts.expr(given["end"]) == facts.shape(node)[0] and facts.expr(given.get("start", 0)) == 0
        return 0 if from_zero and given.get("step", 1) == 1 and not node.meta["val"].is_floating_point() else None
    if node.target not in _VIEWS | _COPIES:
        return None
    source = node.args[0]
    dim = _counted_dim(facts, source)
    if dim is None:
        return None
    shape, whole = facts.shape(source), facts.shape(node)  # type: ignore[arg-type]
    if node.target in (aten.expand.default, aten.expand_as.default):
        return dim + len(whole) - len(shape)
    if node.target is aten.unsqueeze.default:
        return dim + (bound(node)["dim"] % len(whole) <= dim)
    kept = whole[:1] == shape[:1] and (len(shape) == 1 or whole == shape)
    return dim if kept and sympy.prod(whole[1:]) == sympy.prod(shape[1:]) else None


def like(facts: Facts, node: fx.Node) -> Sharding | None:
    """A constant of the same shape has no order."""
    template = node.args[0]
    assert isinstance(template, fx.Node)
    layout = facts.layout(template)
    return None if layout is None else Sharding({template: layout}, replace(layout, order=None, points=None))


def tally(facts: Facts, node: fx.Node) -> Sharding | None:
    """`histc` between given limits: every rank counts its own."""
    given = bound(node)
    source = given["self"]
    layout = facts.layout(source)
    limits = given["min"], given["max"]
    if layout is None or layout.points is not None or any(isinstance(limit, fx.Node) for limit in limits):
        return None
    if limits[0] >= limits[1]:  # the limits are those of the data
        return None
    return finish_partial(facts, node, {source: layout}, layout, "sum")


def search(facts: Facts, node: fx.Node) -> Sharding | None:
    """How many keys lie before each limit: every rank counts among its own, sorted."""
    given = bound(node)
    keys = given["sorted_sequence"]
    layout = facts.layout(keys)
    if layout is None or len(facts.shape(keys)) != 1 or _sorted_by(facts, keys) is None:
        return None
    if given["sorter"] is not None or facts.has_sequence(given["self"]):
        return None
    return finish_partial(facts, node, {keys: layout}, layout, "sum")


def grouped_mm(facts: Facts, node: fx.Node) -> Sharding | None:
    """Every row times the matrix of its expert; `offsets` say where each expert's rows end."""
    rows, weights, offsets, *rest = (bound(node)[argument.name] for argument in node.target._schema.arguments)  # type: ignore[union-attr]
    layout = facts.layout(rows)
    if layout is None or layout.order is None or layout.points is not None or layout.dim != 0 or offsets is None:
        return None
    if (
        len(facts.shape(rows)) != 2
        or len(facts.shape(weights)) != 3
        or facts.has_sequence(weights)
        or any(isinstance(one, fx.Node) for one in rest)
    ):
        return None
    steps, counts = _before_offsets(offsets)
    num_sums = sum(step.target is aten.cumsum.default for step in steps)
    if not _counts_keys(facts, counts, layout.order, num_sums):
        return None
    parts = {source: facts.layout(source) for source in tensor_inputs(counts)}
    needs = {source: own for source, own in parts.items() if own is not None}

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        ends = em.call(counts.target, *em.arguments(counts, needs))
        for step in reversed(steps):
            ends = em.call(step.target, (ends, *em.value(step.args[1:])), em.value(step.kwargs))
        given = {rows: em.get(rows, layout), offsets: ends, weights: em.get(weights, None)}
        args, kwargs = fx.map_arg((n.args, n.kwargs), given.__getitem__)
        return em.call(n.target, args, kwargs)

    return Sharding({rows: layout}, layout, emit, unused=(offsets,), also=parts)


def _is_grouped_mm(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.name in ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


def _before_offsets(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """Return the casts and cumulative sums that end in offsets, last first, and what they are of."""
    steps = []
    while (node.target in _COPIES or node.target is aten.cumsum.default) and node.meta["val"].dtype in _COUNTS:
        steps.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return steps, node


def _counts_keys(facts: Facts, node: fx.Node, order: fx.Node, num_sums: int) -> bool:
    """Whether the values, or with one cumulative sum the sums, say where in the keys' ascending order each group ends.

    As every key is counted in the group its value says, and groups come in the order of values, a row's group follows from its
    own key: the ends among a rank's own rows are the same counts of the rank's own keys.
    """
    if bound(order)["descending"]:
        return False
    if node.target is aten.searchsorted.Tensor:
        return num_sums == 0 and _sorted_by(facts, bound(node)["sorted_sequence"]) is order and search(facts, node) is not None
    if num_sums != 1:
        return False
    if node.target is aten.histc.default:
        counted: fx.Node | None = bound(node)["self"]
        if bound(node)["min"] > 0 or tally(facts, node) is None or not _is_index(_origin(facts, counted)):
            return False
    elif node.target is aten.sum.dim_IntList and _sums_all_but_last(node):
        counted = _members(facts, node.args[0])
    else:
        return False
    same = counted is not None and _origin(facts, counted) is _origin(facts, order.args[0])
    return same and _place(facts, node.args[0]) == _place(facts, order.args[0])


def _place(facts: Facts, node: Any) -> tuple[Any, ...] | None:
    """Return which elements a rank has, counted through all dimensions."""
    layout = facts.layout(node)
    if layout is None or layout.points is not None:
        return None
    return layout.span, sympy.prod(facts.shape(node)[: layout.dim]) * layout.outer


def _sums_all_but_last(node: fx.Node) -> bool:
    given = bound(node)
    ndim = given["self"].meta["val"].ndim
    return sorted(dim % ndim for dim in given["dim"] or ()) == list(range(ndim - 1)) and not given["keepdim"]


def _members(facts: Facts, node: Any) -> fx.Node | None:
    """Return the keys of which the sum over all but the last dimension counts how often each value occurs."""
    if node.meta["val"].dtype not in _COUNTS | {torch.bool}:
        return None
    if node.target in _COPIES and node.meta["val"].dtype in _COUNTS:
        return _members(facts, node.args[0])
    given = bound(node) if isinstance(node.target, torch._ops.OpOverload) else {}
    if node.target is aten.one_hot.default:
        return given["self"]
    if node.target is aten.sum.dim_IntList:
        ndim = given["self"].meta["val"].ndim
        dims = [dim % ndim for dim in given["dim"] or ()]
        return _members(facts, given["self"]) if dims and ndim - 1 not in dims and not given["keepdim"] else None
    if node.target in views.VIEWS:
        same = facts.shape(node)[-1:] == facts.shape(given["self"])[-1:]
        return _members(facts, given["self"]) if same else None
    if node.target is aten.eq.Tensor:
        column, limits = given["self"], given["other"]
        alone = column.target is aten.unsqueeze.default and column.args[1] in (-1, column.meta["val"].ndim - 1)
        if alone and _counted_dim(facts, limits) == 0 and len(facts.shape(limits)) == 1 and _is_index(_origin(facts, column)):
            return column
    if node.target is aten.scatter.value and given["value"] == 1 and _is_zeros(given["self"]):
        # Each value once in a row: `topk` picks no index twice.
        ndim, index = given["self"].meta["val"].ndim, given["index"]
        picked = index.target is operator.getitem and index.args[0].target is aten.topk.default
        along = bound(index.args[0])["dim"] % ndim == ndim - 1 if picked else False
        return index if along and given["dim"] % ndim == ndim - 1 else None
    return None


def _is_zeros(node: fx.Node) -> bool:
    return node.target in (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)


def _origin(facts: Facts, node: Any) -> fx.Node:
    """Return the indices that these are, in whatever shape, order or dtype that holds them exactly."""
    while True:
        if node.target in _VIEWS - {aten.expand.default, aten.expand_as.default} or (
            node.target in _COPIES and node.meta["val"].dtype in _COUNTS and node.args[0].meta["val"].dtype in _INDICES
        ):
            node = node.args[0]
        elif node.target is operator.getitem and node.args[0].target in _SORTS and node.args[1] == 0:
            node = node.args[0].args[0]
        elif _is_reordered(facts, node):
            node = node.args[0]
        else:
            return node


def _is_reordered(facts: Facts, node: fx.Node) -> bool:
    """Whether the node is `x[permutation]`."""
    if node.target is not aten.index.Tensor or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return False
    layout = facts.layout(node.args[1][0])  # type: ignore[index,arg-type]
    return layout is not None and _is_permutation(layout)


def _sorted_by(facts: Facts, node: Any) -> fx.Node | None:
    """Return the sort that gave these keys, ascending."""
    layout = facts.layout(node)
    order = layout.order if layout is not None and layout.points is None else None
    if order is None or bound(order)["descending"]:
        return None
    key: Any = order.args[0]
    same = _origin(facts, node) is _origin(facts, key) and node.meta["val"].dtype == key.meta["val"].dtype
    return order if same else None


def _is_index(node: Any) -> bool:
    """Whether no value is negative."""
    if node.target is operator.getitem:
        return node.args[1] == 1 and node.args[0].target in {*_SORTS, aten.topk.default, aten.max.dim, aten.min.dim}
    if node.target in _JOINED:
        return all(map(_is_index, node.args[0]))
    if node.target is aten.remainder.Scalar:
        return isinstance(node.args[1], int) and node.args[1] > 0
    return node.target in {*_SORTS, aten.argmax.default, aten.argmin.default, aten.multinomial.default, aten.randint.default}


_ENTRIES: dict[Any, Rule] = {
    **dict.fromkeys(_SORTS, sort),
    **dict.fromkeys([aten.index.Tensor, aten.index_select.default], take_numbered),
    aten.index_add.default: add_numbered,
    aten.histc.default: tally,
}
_ROUTED: dict[Any, Rule] = {
    **factories.RULES,
    **dict.fromkeys(_CONSTANTS, like),
    **dict.fromkeys(_SORTS, sort_again),
    **dict.fromkeys([aten.floor_divide.default, aten.div.Tensor_mode, aten.remainder.Scalar], divide),
    **dict.fromkeys([aten.index.Tensor, aten.index_select.default], take),
    aten.gather.default: take_along,
    **dict.fromkeys(
        [
            *_JOINS,
            aten.index_put.default,
            aten.index_copy.default,
            aten.scatter.src,
            aten.scatter.value,
        ],
        put,
    ),
    aten.histc.default: tally,
    aten.searchsorted.Tensor: search,
}
