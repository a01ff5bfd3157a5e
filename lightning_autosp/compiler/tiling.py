"""Which inputs of a region to cut for a part of its result, and the program that computes a range of rows.

Cuts are found backwards, one axis at a time, by the same rules that find what is local to a rank: to compute rows of a result from
rows of its inputs is the same claim, whether the rows are a rank's or a tile's.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from lightning_autosp import _compat
from lightning_autosp.attention import tiles
from lightning_autosp.attention.masks import Table, column_bounds
from lightning_autosp.attention.tiles import Cut, Lookup, Result, Rows, Segments, TileProgram
from lightning_autosp.compiler.capture import Captured, is_size
from lightning_autosp.compiler.layout import Layout, span_of
from lightning_autosp.compiler.locality import is_pointwise
from lightning_autosp.compiler.plan import Form
from lightning_autosp.compiler.regions import Region, RowRegion
from lightning_autosp.compiler.rule import Facts, Rule, tensor_inputs
from lightning_autosp.compiler.rules import factories, views
from lightning_autosp.compiler.rules.generic import broadcast_needs
from lightning_autosp.compiler.rules.random import is_random
from lightning_autosp.compiler.written_out import SDPA

__all__ = [
    "Key",
    "attention_rows",
    "can_be_tiled",
    "complete",
    "inputs_cut",
    "needs_of",
    "row_layout",
    "seed",
    "trace",
    "write_tile",
]

aten = torch.ops.aten
Key = tuple[fx.Node, tuple[Form, ...]]
"""A node and how its value is cut, along one axis after the other."""

_SIZED = {aten.expand.default, aten.expand_as.default} | views.VIEWS | factories.RULES.keys()
"""Operators that are given a shape: that of the part, then."""


def row_layout(facts: Facts, region: Region) -> Layout:
    """Return the cut of a region's value into rows."""
    (dim,) = complete(facts).sequence_dims(region.exit)
    return Layout(dim, span_of(facts.shape(region.exit)[dim]))


def complete(facts: Facts) -> Facts:
    """Return the facts that regions were found by: also a sequence that is not cut has rows, and one rank has tiles."""
    captured = facts.captured
    if facts.symbols == captured.symbols and facts.mesh.size() > 1:
        return facts
    # On a mesh of one rank PyTorch calls every operator local.
    return Facts(captured, captured.symbols, _compat.mesh_without_group(2), find=facts.find)


def attention_rows(facts: Facts, region: Region) -> tuple[Form, Form, Form]:
    """Return the cuts of a `scaled_dot_product_attention`: rows, heads, columns.

    Columns are no dimension of its value: their layout has the number behind the last.
    """
    given = region.exit.args
    query, key = (facts.shape(node) for node in given[:2])  # type: ignore[arg-type]
    ndim = len(query)
    heads = Layout(ndim - 3, span_of(query[-3])) if ndim > 2 else None
    return Layout(ndim - 2, span_of(query[-2])), heads, Layout(ndim, span_of(key[-2]))


def can_be_tiled(captured: Captured, find: Rule, region: Region) -> bool:
    """Whether a range of rows of a region's value can be computed from rows of its inputs, or whole ones.

    Args:
        captured: The graph it is taken from.
        find: What gives the rule of an operator.
        region: The region.
    """
    facts = Facts(captured, captured.symbols, _compat.mesh_without_group(2), find=find)
    if region.exit.target is SDPA:
        return trace(facts, region, attention_rows(facts, region)) is not None
    return trace(facts, region, (row_layout(facts, region), None, None)) is not None


def trace(facts: Facts, region: Region, *wanted: tuple[Form, ...]) -> dict[Key, dict[fx.Node, tuple[Form, ...]]] | None:
    """Find how every value of a region is cut if its results are.

    Args:
        facts: What is known of the graph.
        region: The region.
        wanted: How each result is cut, axis by axis. Axes are independent of each other. Of three, the first and the last are rows
            and columns of tiles, which views must not merge with other dimensions; a single one they may.

    Returns:
        For every value that is computed or read, how its inputs are cut, in the order they can be computed; `None` if a part of the
        results needs more than parts.
    """
    found: dict[Key, dict[fx.Node, tuple[Form, ...]]] = {}
    pending = list(zip(region.exits, wanted, strict=True))
    while pending:
        key = pending.pop()
        node, forms = key
        if key in found:
            continue
        found[key] = {}
        if node.op == "placeholder":
            continue
        axes = [inputs_cut(facts, node, form) for form in forms]
        for source in tensor_inputs(_operator(node)):
            cut: list[Form] = []
            for axis in axes:
                if axis is None:
                    return None
                cut.append(axis.get(source))
            found[key][source] = tuple(cut)
        if any(axis is None for axis in axes):
            return None
        rows_and_columns = (form for cut in found[key].values() for form in (*cut[:1], *cut[2:]))
        if any(form is not None and form.merged for form in rows_and_columns) and len(forms) > 1:
            return None  # a range of rows is no range of what they are merged with
        pending += found[key].items()
    order = {node: index for index, node in enumerate(region.body.nodes)}
    return dict(sorted(found.items(), key=lambda pair: order[pair[0][0]]))


def _operator(node: fx.Node) -> fx.Node:
    """Return what computes a value: for one of several results, the operator that gives them."""
    source = node.args[0] if node.target is operator.getitem else node
    assert isinstance(source, fx.Node)
    return source


def inputs_cut(facts: Facts, node: fx.Node, wanted: Form) -> dict[fx.Node, Layout] | None:
    """Return which inputs to cut, and how, so that the operator gives that part of its result; `None` if it does not."""
    if wanted is None:
        return {}
    item = node.args[1] if node.target is operator.getitem else None
    node = _operator(node)
    target = node.target
    if target is SDPA:
        return _attention_inputs(facts, node, wanted)
    if target in factories.RULES:
        return {}
    if target in (aten.expand.default, aten.expand_as.default):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        shape = facts.shape(source)
        dim = wanted.dim - (len(facts.shape(node)) - len(shape))
        return {} if dim < 0 or shape[dim] == 1 else {source: wanted.at(dim)}
    if target in views.VIEWS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        back = views.through_view(facts.shape(node), facts.shape(source), wanted)
        return None if back is None else {source: back}
    if target is aten.gather.default and int(node.args[1]) % len(facts.shape(node)) == wanted.dim:  # type: ignore[arg-type]
        return {node.args[2]: wanted}  # type: ignore[dict-item]
    if _takes_all(facts, node):
        return {node.all_input_nodes[0]: wanted}
    sources = tensor_inputs(node)
    if _looks_up_elements(facts, node):
        sources = list(dict.fromkeys(node.args[1]))  # type: ignore[arg-type]
    if is_pointwise(target) or _looks_up_elements(facts, node):
        return broadcast_needs(facts, sources, wanted, len(facts.shape(node)) - wanted.dim)
    choices = [_ways(facts, source, wanted) for source in sources]
    for layouts in itertools.product(*choices):
        with facts.assuming(dict(zip(sources, layouts, strict=True))):
            sharding = facts.find(facts, node)
        if sharding is None or sharding.kind != "local":
            continue
        if sharding.emit is not None and not (target is aten.cat.default and _cat_dim(facts, node) != wanted.dim):
            continue  # it depends on the rank
        output = sharding.output[item] if isinstance(sharding.output, tuple) else sharding.output  # type: ignore[index]
        if output == wanted:
            return dict(sharding.needs)
    return None


def _ways(facts: Facts, source: fx.Node, wanted: Layout) -> list[Form]:
    """Return the cuts an input may have, those of dimensions as far from the last as the result's first."""
    shape = facts.shape(source)
    dims = [dim for dim, size in enumerate(shape) if size == wanted.size]
    return [wanted.at(dim) for dim in sorted(dims, key=lambda dim: dim != wanted.dim)] + [None]


def _cat_dim(facts: Facts, node: fx.Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return int(dim) % len(facts.shape(node))  # type: ignore[arg-type]


def _looks_up_elements(facts: Facts, node: fx.Node) -> bool:
    """Whether the operator is `table[i, j]` with an index for every dimension: of the table, no pairs, all is needed."""
    if node.target is not aten.index.Tensor:
        return False
    table: Any = node.args[0]
    indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    complete = len(indices) == len(facts.shape(table)) and None not in indices and table not in indices
    return complete and len(facts.sequence_dims(table)) < 2 and all(index.meta["val"].dtype is not torch.bool for index in indices)


def _takes_all(facts: Facts, node: fx.Node) -> bool:
    """Whether the operator is a slice of everything."""
    if node.target is not aten.slice.Tensor:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return facts.shape(source) == facts.shape(node)


def _attention_inputs(facts: Facts, node: fx.Node, wanted: Layout) -> dict[fx.Node, Layout]:
    query, key, value, mask = (node.args[i] for i in range(4))
    ndim = len(facts.shape(query))  # type: ignore[arg-type]
    back = wanted.dim - ndim  # -2: rows, -3: heads, 0: columns
    needs: dict[fx.Node, Layout] = {}
    if back == -2:
        needs[query] = wanted  # type: ignore[index]
    elif back == 0:
        needs |= {key: wanted.at(ndim - 2), value: wanted.at(ndim - 2)}  # type: ignore[dict-item]
    # Heads of queries, keys and values are the caller's matter: there may be fewer of the latter.
    if isinstance(mask, fx.Node):
        shape = facts.shape(mask)
        dim = len(shape) + (-1 if back == 0 else back)
        if dim >= 0 and shape[dim] != 1:
            needs[mask] = wanted.at(dim)
    return needs


def needs_of(
    facts: Facts, node: fx.Node, *wanted: Layout, operands: Mapping[fx.Node, Layout] | None = None
) -> dict[fx.Node, Layout] | None:
    """Return which inputs of the node of a region are needed as parts for parts of its results; `None` if parts do not do.

    Args:
        facts: What is known of the graph.
        node: The node.
        wanted: The parts of its results.
        operands: Those of the queries, keys and values of a `scaled_dot_product_attention`.
    """
    region = node.target
    assert isinstance(region, Region)
    traced = trace(facts, region, *((layout,) for layout in wanted))
    if traced is None:
        return None
    inputs = dict(zip(region.placeholders, node.args, strict=False))
    needs: dict[fx.Node, Form] = dict(operands or {})
    for (reader, _), read in traced.items():
        for source, (form,) in read.items():
            if source.op != "placeholder" or source not in inputs:
                continue
            given = inputs[source]
            assert isinstance(given, fx.Node)
            if operands and reader is region.exit and given in operands and form is None:
                continue
            if needs.setdefault(given, form) != form:
                return None  # wanted in two forms
    return {source: form for source, form in needs.items() if form is not None}


def write_tile(
    em: Any,
    region: Region,
    wanted: Sequence[tuple[Form, ...]],
    shapes: Sequence[list[int]],
    num_rows: int,
    own_heads: int = 0,
    most_heads: int = 0,
    tile_rows: int | None = None,
    first: tuple[int, int] = (0, 0),
    num_columns: tuple[int, int] | None = None,
) -> tuple[TileProgram, list[tuple[int, int | None]]]:
    """Write the program that computes a range of rows of a region's results.

    Args:
        em: The emitter; knows sizes.
        region: The region.
        wanted: How each result is cut: rows and, if there are three axes, heads (`None`: not) and columns (`None`: a tile has all).
        shapes: Of the results on this rank.
        num_rows: The most rows a rank has.
        own_heads: Heads on this rank.
        most_heads: The most a rank has.
        tile_rows: Rows of one range; `None`: as many as `TILE_ELEMENTS` lets.
        first: The row and the column of the mask that rows and columns begin with.
        num_columns: How many columns there are, and the most a rank has; `None`: all.

    Returns:
        The program, and for each of its inputs which of the region's it is and the dimension of its heads, if they are cut.
    """
    facts = complete(em.facts)
    traced = trace(facts, region, *wanted)
    assert traced is not None
    columns = wanted[0][2] if len(wanted[0]) > 2 else None
    graph = fx.Graph()
    numbers = {"rows": graph.placeholder("num_rows"), "columns": graph.placeholder("num_columns")}
    placeholders = region.placeholders
    inputs: list[tuple[int, int | None]] = []
    cuts: list[Cut] = []
    env: dict[Key, Any] = {}
    if num_columns is None:
        num_columns = (0, 0) if columns is None else (em.integer(columns.size),) * 2
    per_row = 1  # elements of the largest value

    def rows_of(layout: Layout) -> Rows:
        return Rows(layout.dim, em.integer(layout.outer), em.integer(layout.inner))

    def axes(cut: tuple[Form, ...]) -> tuple[Form, Form, Form]:
        rows, heads, columns = (*cut, None, None)[:3]
        return rows, heads, columns

    def tile_shape(node: fx.Node, cut: tuple[Form, ...], rows: Any, columns: Any, heads: int) -> list[Any]:
        sizes: list[Any] = [em.integer(size) for size in facts.shape(node)]
        by_rows, by_heads, by_columns = axes(cut)
        if by_heads is not None:
            sizes[by_heads.dim] = em.integer(by_heads.outer) * heads * em.integer(by_heads.inner)
        if by_rows is not None:
            around = em.integer(by_rows.outer * by_rows.inner)
            sizes[by_rows.dim] = rows if around == 1 else rows * around
        if by_columns is not None and by_columns.dim < len(sizes):
            sizes[by_columns.dim] = columns
        return sizes

    def sized(node: fx.Node, cut: tuple[Form, ...]) -> list[Any]:
        around = em.integer(cut[0].outer * cut[0].inner) if cut[0] is not None else 1
        rows = numbers["rows"] if around == 1 else graph.call_function(operator.mul, (numbers["rows"], around))
        sizes = tile_shape(node, cut, 1, numbers["columns"], own_heads)
        if cut[0] is not None:
            sizes[cut[0].dim] = rows
        return sizes

    for key, needs in traced.items():
        node, cut = key
        if node.op == "placeholder":
            by_rows, by_heads, by_columns = axes(cut)
            env[key] = graph.placeholder(f"input_{len(inputs)}")
            inputs.append((placeholders.index(node), None if by_heads is None else by_heads.dim))
            cuts.append(Cut(None if by_rows is None else rows_of(by_rows), None if by_columns is None else by_columns.dim))
            continue

        def one(source: fx.Node, needs: Mapping[fx.Node, tuple[Form, ...]] = needs) -> Any:
            return em.number(source) if is_size(source) else env[source, needs[source]]

        made = _operator(node)
        args, kwargs = fx.map_arg((made.args, made.kwargs), one)
        value: Any
        if made.target in _SIZED:
            sizes = sized(node, cut)
            if made.target in factories.RULES:
                index = [argument.name for argument in made.target._schema.arguments].index("size")  # type: ignore[union-attr]
                value = graph.call_function(made.target, (*args[:index], sizes, *args[index + 1 :]), kwargs)  # type: ignore[arg-type]
            else:
                expands = made.target in (aten.expand.default, aten.expand_as.default)
                value = graph.call_function(aten.expand.default if expands else aten.reshape.default, (args[0], sizes))
        elif _takes_all(facts, made):
            value = args[0]
        else:
            value = graph.call_function(made.target, args, kwargs)  # type: ignore[arg-type]
        if node is not made:
            value = graph.call_function(operator.getitem, (value, node.args[1]))
        env[key] = value
        by_rows, _, by_columns = axes(cut)
        if by_rows is not None:
            per_row = max(per_row, int(torch.Size(tile_shape(node, cut, 1, num_columns[1], most_heads)).numel()))
    by_segments: list[Segments] = []
    if columns is not None and region.segments:
        pairs = tuple(em.integer(size) for size in facts.shape(region.mask))

        def lookup(table: Table) -> Lookup:
            place = (placeholders.index(table.node), None)
            if place not in inputs:
                graph.placeholder(f"input_{len(inputs)}")
                inputs.append(place)
                cuts.append(Cut())
            forms = [(*form.coefficients, form.constant) for form in table.indices]
            return Lookup(inputs.index(place), tuple(tuple(map(em.integer, numbers)) for numbers in forms))

        by_segments = [Segments(lookup(rows), lookup(columns), pairs) for rows, columns in region.segments]
    graph.output(tuple(env[key] for key in zip(region.exits, wanted, strict=True)))
    if tile_rows is None:
        tile_rows = max(1, tiles.TILE_ELEMENTS // per_row)
        tile_rows -= tile_rows % 64 if tile_rows > 64 else 0
    proof, differentiable = region.proof, _differentiable(region)
    results = [
        Result(tuple(shape), node.meta["val"].dtype, rows_of(forms[0]), node in differentiable)  # type: ignore[arg-type]
        for node, forms, shape in zip(region.exits, wanted, shapes, strict=True)
    ]
    rows, around = results[0].rows, results[0].rows.outer * results[0].rows.inner
    program = TileProgram(
        module=fx.GraphModule({}, graph),
        cuts=tuple(cuts),
        results=tuple(results),
        num_rows=results[0].shape[rows.dim] // around,
        num_columns=num_columns[0],
        tile_rows=tile_rows,
        largest=per_row * min(tile_rows, num_rows),
        inlined=num_rows <= tile_rows,
        columns=column_bounds(proof, em.sizes) if proof is not None and columns is not None else None,
        segments=tuple(by_segments),
        first=first,
        attends=not isinstance(region, RowRegion),
        random=any(is_random(node) for node, _ in traced),
        autocast=_autocast(region.exits[0].meta["val"].device.type),
    )
    return program, inputs


def seed(em: Any, program: TileProgram) -> tuple[fx.Node, ...]:
    """Emit the first argument of `run_tiles` for a program that draws random numbers."""
    return (em.call(aten.randint.default, (2**62, []), {"dtype": torch.int64}),) if program.random else ()


def _differentiable(region: Region) -> set[fx.Node]:
    """Return the values of a region from which a gradient goes on to an input."""
    found: set[fx.Node] = set()
    for node in region.body.nodes:
        leaves = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
        reached = node.op == "placeholder" or any(source in found for source in node.all_input_nodes)
        if reached and node.target is not aten.detach.default and any(leaf.is_floating_point() for leaf in leaves):
            found.add(node)
    return found


def _autocast(device: str) -> tuple[str, torch.dtype, bool]:
    """Return the autocast that is in force: a program runs after it was left."""
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
