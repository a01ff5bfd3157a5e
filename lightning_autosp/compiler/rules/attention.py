"""Attention over a sharded sequence: the operator, and regions of pairs of positions (`regions.py`).

Which method computes a call of the operator is chosen when its sizes are known (`attention/select.py`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from lightning_autosp._compat import sdpa_kernel
from lightning_autosp.attention.blocks import kernel_name
from lightning_autosp.attention.flash import HEADS, WHOLE, arguments, handle_of, ulysses_flash
from lightning_autosp.attention.gather_kv import gather_kv_attention, gather_kv_tiles
from lightning_autosp.attention.hybrid import hybrid_attention
from lightning_autosp.attention.masks import column_bounds
from lightning_autosp.attention.operators import BlockMask
from lightning_autosp.attention.ring import ring_attention
from lightning_autosp.attention.select import AttentionMethodError, Choice, Work, choose, halo
from lightning_autosp.attention.tiles import run_tiles
from lightning_autosp.attention.ulysses import head_shares, ulysses_attention, ulysses_tiles
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.capture import is_size
from lightning_autosp.compiler.emit import Emitter
from lightning_autosp.compiler.layout import Layout, span_of
from lightning_autosp.compiler.plan import Form
from lightning_autosp.compiler.regions import MaskRegion, Region
from lightning_autosp.compiler.rule import Facts, Rule, Sharding, bound, tensor_inputs
from lightning_autosp.compiler.rules.generic import broadcast_needs
from lightning_autosp.compiler.rules.views import VIEWS, through_view
from lightning_autosp.compiler.tiling import attention_rows, needs_of, row_layout, seed, write_tile
from lightning_autosp.compiler.written_out import SDPA
from lightning_autosp.lines import user_line

__all__ = ["RULES", "emit_region", "region"]

aten = torch.ops.aten


def attention(facts: Facts, node: fx.Node) -> Sharding | None:
    """`F.scaled_dot_product_attention` by any method: alone, or as the last of a region that computes its mask."""
    given = _given(node)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    layout = facts.layout(query)
    rows = len(facts.shape(query)) - 2
    if layout is not None and layout.dim < rows:
        return None if isinstance(node.target, Region) else _by_sample(facts, given, layout)
    if layout is None or layout.dim != rows or layout.merged or rows == 0:
        return None
    joined = isinstance(node.target, Region)
    if not joined:
        bases = [_heads_once(facts, one) for one in (key, value)]
        if bases[0] is not None and bases[1] is not None and facts.shape(bases[0])[:-1] == facts.shape(bases[1])[:-1]:
            key, value = bases
    if not (facts.has_sequence(key) or facts.has_sequence(value)):
        return _over_fixed_keys(facts, node, given, layout)
    key_layout = facts.layout(key)
    if key_layout is None or key_layout.dim != rows or key_layout.merged:
        return None
    if facts.shape(key)[:-3] != facts.shape(query)[:-3]:
        return None
    value_layout = facts.fit(value, rows, key_layout)
    if value_layout is None or facts.shape(value)[:-3] != facts.shape(query)[:-3]:
        return None
    needs = {query: layout, key: key_layout, value: value_layout}
    if len(needs) < 3 and key_layout != layout:
        return None  # one tensor in two roles with two layouts

    if joined and _mask_reads(node, {query, key, value}):
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        parts = tuple(em.get(x, needs[x]) for x in (query, key, value))
        lengths = (em.lengths(layout), em.lengths(key_layout), em.group)
        work = _work(em, n, given, (query, key, value), *lengths[:2])
        choice = choose(work, em.attention, user_line(n))
        em.attention_choices[n] = choice
        if joined and choice.chosen.method == "gather_kv":
            return _emit_row_tiles(em, n, parts, halo(work), lengths)
        if joined and choice.chosen.method == "ulysses":
            return _emit_tiles(em, n, parts, work.kv_heads, lengths)
        mask: Any = _emit_mask(em, n, lengths[1]) if joined else None
        if not joined and given["attn_mask"] is not None:
            mask = em.get(given["attn_mask"], None)
        options = (given["dropout_p"], given["is_causal"], em.value(given["scale"]))
        return _emit_call(em, choice, parts, mask, options, lengths)

    repeated = tuple(one for one in (given["key"], given["value"]) if one not in needs)
    once = {one: wanted for one, wanted in needs.items() if repeated and one in (key, value)}
    mask = node.meta.get("mask", "")
    return Sharding(needs, layout, emit, kind="attention", mask=mask, unused=repeated, also=once)


def _emit_call(
    em: Emitter, choice: Choice, parts: tuple[Any, ...], mask: Any, options: tuple[Any, ...], lengths: tuple[Any, ...]
) -> fx.Node:
    chosen, given = choice.chosen, (*parts, mask, *options, *lengths)
    if chosen.method == "ring":
        return em.call(ring_attention, given, {"in_zigzag": chosen.in_zigzag})
    if chosen.method == "hybrid":
        return em.call(hybrid_attention, (*given, chosen.inside, chosen.outside), {"in_zigzag": chosen.in_zigzag})
    if chosen.method == "gather_kv":
        return em.call(gather_kv_attention, given)
    return em.call(ulysses_attention, (*given, em.attention.head_chunks))


def _emit_mask(em: Emitter, node: fx.Node, key_lengths: tuple[int, ...]) -> BlockMask:
    """Write the program that computes a block of a region's mask."""
    target, facts = node.target, em.facts
    assert isinstance(target, Region)
    shape = [em.integer(size) for size in facts.shape(target.mask)]
    rows, _, columns = attention_rows(facts, target)
    assert rows is not None
    assert columns is not None
    wanted = (rows.at(len(shape) - 2), None, columns.at(len(shape) - 1))
    alone = MaskRegion(target.body, target.proof, target.segments)
    program, inputs = write_tile(em, alone, [wanted], [shape], shape[-2], num_columns=(shape[-1], max(key_lengths)))
    others: Any = tuple(em.get(node.args[index], None) for index, _ in inputs)
    return BlockMask(program.handle, others)


def _work(
    em: Emitter,
    node: fx.Node,
    given: dict[str, Any],
    inputs: tuple[fx.Node, fx.Node, fx.Node],
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
) -> Work:
    """Describe a call of the operator to those who choose a method for it."""
    query, key, value = ([em.integer(size) for size in em.facts.shape(x)] for x in inputs)
    target, mask, bounds, not_in_blocks = node.target, "", None, ""
    if isinstance(target, Region):
        mask = "of the batch's data" if target.proof is None else target.proof.text
        bounds = None if target.proof is None else column_bounds(target.proof, em.sizes)
        not_in_blocks = _not_in_blocks(em.facts, target)
    elif given["attn_mask"] is not None:
        mask = "kept whole"
        if given["attn_mask"].meta["val"].dtype is not torch.bool:
            not_in_blocks = "its mask is numbers that are added to scores, and blocks of keys want one of truth values"
    if mask and not not_in_blocks and len(query) > 4:
        not_in_blocks = f"it has a mask, and {len(query) - 3} dimensions of samples, and blocks of keys want one"
    one, in_tiles, dropout = inputs[0].meta["val"], isinstance(target, Region), float(given["dropout_p"])
    device, width, value_width = one.device.type, query[-1], value[-1]
    if device == "cpu":  # they are made alike
        width = value_width = max(width, value_width)
    widths, is_causal = (width, value_width), bool(given["is_causal"])
    kernel = sdpa_kernel(device, one.dtype, (query[-3], key[-3]), widths, bool(mask), dropout, is_causal)
    return Work(
        batch=math.prod(query[:-3]),
        heads=query[-3],
        kv_heads=key[-3],
        width=query[-1],
        value_width=value[-1],
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        is_causal=is_causal,
        element_size=one.element_size(),
        dropout=bool(dropout),
        mask=mask,
        bounds=bounds,
        not_in_blocks=not_in_blocks,
        in_graph=in_tiles or (bool(mask) and bool(not_in_blocks)),
        in_tiles=in_tiles,
        kernel=kernel,
        block_kernel=kernel_name(device, one.dtype, max(widths), bool(mask), bool(dropout)),
    )


def _not_in_blocks(facts: Facts, target: Region) -> str:
    """Return why the mask of a region cannot be given to kernels a block at a time; "" if it can."""
    query, key = (facts.shape(one) for one in target.exit.args[:2])  # type: ignore[arg-type]
    proof = target.proof
    if proof is None or proof.formula is None or facts.shape(target.mask)[-2:] != (query[-2], key[-2]):
        said = "of the batch's data" if proof is None else proof.text
        return f"its mask ({said}) is not proven to be truth values of pairs, as blocks of keys want them"
    if not (proof.diagonal or proof.lowest == float("-inf")):
        return (
            f"its mask ({proof.text}) adds {proof.lowest:.3g}, and queries that may attend to nothing then weigh all keys alike, "
            "which blocks of keys cannot"
        )
    return ""


def flash(facts: Facts, node: fx.Node) -> Sharding | None:
    """A function of flash-attn by Ulysses."""
    given = arguments(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    inputs = {name: value for name, value in given.items() if name in HEADS}
    others = {name: value for name, value in given.items() if name not in HEADS}
    if any(isinstance(value, fx.Node) and not is_size(value) and name not in WHOLE for name, value in others.items()):
        return None
    query, *keys = inputs.values()
    rows = 0 if any(name.startswith("cu_seqlens") for name in others) else 1
    layout = facts.layout(query)
    key_layout = facts.layout(keys[0]) if keys else layout
    if layout is None or key_layout is None or not isinstance(node.meta["val"], torch.Tensor):
        return None  # with weights
    needs = {query: layout}
    for key in keys:
        fitted = facts.fit(key, rows, key_layout)
        if fitted is None or needs.setdefault(key, fitted) != fitted:
            return None
    if any(one.dim != rows or one.merged for one in needs.values()):
        return None

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        _require(em, n, ("ulysses",), "it is a function of flash-attn, which attends to the whole sequence")
        parts = {name: em.get(value, needs[value]) for name, value in inputs.items()}
        whole = {name: em.value(value) for name, value in others.items()}
        lengths = (em.lengths(layout), em.lengths(key_layout), em.group)
        return em.call(ulysses_flash, (handle_of(n.target), parts, whole, *lengths))  # type: ignore[arg-type]

    return Sharding(needs, layout, emit, kind="attention", note=f"ulysses, {node.target.__name__}")  # type: ignore[union-attr]


def _heads_once(facts: Facts, node: fx.Node) -> fx.Node | None:
    """Return the tensor whose heads another holds several times in a row, as grouped queries want them, or `None`."""
    if node.target not in VIEWS:
        return None
    repeated, shape = _before_copies(facts, node.all_input_nodes[0]), facts.shape(node)
    if repeated.target is not aten.expand.default:
        return None
    once = _before_copies(facts, repeated.all_input_nodes[0])
    if once.target is not aten.unsqueeze.default:
        return None
    base: fx.Node = once.args[0]  # type: ignore[assignment]
    heads = len(shape) - 3
    single = (*facts.shape(base)[: heads + 1], sympy.S.One, *facts.shape(base)[heads + 1 :])
    times = facts.shape(repeated)[heads + 1] if len(facts.shape(repeated)) == len(single) else None
    if times is None or facts.shape(once) != single or facts.shape(repeated) != (*single[: heads + 1], times, *single[heads + 2 :]):
        return None
    return base if shape == (*single[:heads], single[heads] * times, *single[heads + 2 :]) else None


def _before_copies(facts: Facts, node: fx.Node) -> fx.Node:
    """Return what a value is a copy or a slice of everything of."""
    while node.target in (aten.clone.default, aten.contiguous.default, aten.slice.Tensor, aten.alias.default):
        source = node.all_input_nodes[0]
        if facts.shape(source) != facts.shape(node):
            break
        node = source
    return node


def _given(node: fx.Node) -> dict[str, Any]:
    """Return the operator's arguments; of a region, with the node's own inputs in the place of its placeholders."""
    if not isinstance(node.target, Region):
        return bound(node)
    inputs = dict(zip(node.target.placeholders, node.args, strict=False))
    return {name: inputs.get(value, value) for name, value in bound(node.target.exit).items()}


def _mask_reads(node: fx.Node, sources: set[fx.Node]) -> bool:
    """Whether a region's mask is computed from queries, keys or values themselves."""
    target = node.target
    assert isinstance(target, Region)
    own = {placeholder for placeholder, source in zip(target.placeholders, node.args, strict=False) if source in sources}
    return any(source in own for one in target.body.nodes if one is not target.exit for source in one.all_input_nodes)


def _emit_tiles(em: Emitter, node: fx.Node, parts: tuple[Any, ...], kv_heads: int, lengths: tuple[Any, ...]) -> fx.Node:
    target, facts = node.target, em.facts
    assert isinstance(target, Region)
    shape = [em.integer(size) for size in facts.shape(node)]
    shares = head_shares(shape[-3], kv_heads, em.group.size)
    own, most = shares[em.group.rank].num_queries, shares[0].num_queries
    shape[-3] = own
    program, inputs = write_tile(em, target, [attention_rows(facts, target)], [shape], shape[-2], own, most)
    roles = [target.placeholders.index(target.exit.args[i]) for i in range(3)]  # type: ignore[arg-type]
    others = list(dict.fromkeys(index for index, _ in inputs if index not in roles))
    places = tuple((roles.index(i) if i in roles else 3 + others.index(i), dim) for i, dim in inputs)
    values = tuple(em.get(node.args[index], None) for index in others)
    return em.call(ulysses_tiles, (*parts, values, places, program.handle, seed(em, program), *lengths))


def _emit_row_tiles(
    em: Emitter,
    node: fx.Node,
    parts: tuple[Any, ...],
    columns: tuple[tuple[int, int], ...] | None,
    lengths: tuple[tuple[int, ...], tuple[int, ...], Group],
) -> fx.Node:
    """Compute this rank's rows, from all keys or those that its rows attend to."""
    target, facts, rank = node.target, em.facts, em.group.rank
    assert isinstance(target, Region)
    of_rank = columns or ((0, sum(lengths[1])),) * em.group.size
    shape = [em.integer(size) for size in facts.shape(node)]
    shape[-2] = lengths[0][rank]
    program, inputs = write_tile(
        em,
        target,
        [attention_rows(facts, target)],
        [shape],
        max(lengths[0]),
        shape[-3],
        shape[-3],
        first=(sum(lengths[0][:rank]), of_rank[rank][0]),
        num_columns=(of_rank[rank][1] - of_rank[rank][0], max(behind - first for first, behind in of_rank)),
    )
    roles = [target.placeholders.index(target.exit.args[i]) for i in range(3)]  # type: ignore[arg-type]
    others = list(dict.fromkeys(index for index, _ in inputs if index not in roles))
    places = tuple(
        (
            roles.index(i) if i in roles else 3 + others.index(i),
            None if cut.rows is None else (cut.rows.dim, cut.rows.outer, cut.rows.inner),
            cut.columns,
        )
        for (i, _), cut in zip(inputs, program.cuts, strict=True)
    )
    values = tuple(em.get(node.args[index], None) for index in others)
    return em.call(gather_kv_tiles, (*parts, values, places, program.handle, seed(em, program), columns, *lengths))


def _require(em: Emitter, node: fx.Node, methods: tuple[str, ...], reason: str) -> None:
    """Refuse a method that was asked for, if it is not one of those that a form of attention is computed by."""
    if em.attention.method not in ("auto", *methods):
        raise AttentionMethodError(
            f"attention={em.attention.method!r} cannot compute the attention at {user_line(node)}: {reason}. Use 'auto'."
        )


def region(facts: Facts, node: fx.Node) -> Sharding | None:
    """A region: parts of its heads (any dimension of its value that is independent of the others), else of its rows."""
    target = node.target
    assert isinstance(target, Region)
    by_method = attention(facts, node) if target.exit.target is SDPA else None
    if by_method is not None:
        return by_method
    shape, ranks = facts.shape(node), facts.mesh.size()
    rows = row_layout(facts, target)
    heads = [Layout(dim, span_of(size)) for dim, size in enumerate(shape) if size.is_Integer and size >= ranks]
    heads += [layout for layout in _merged_heads(facts, target) if layout.size == shape[layout.dim] and layout.span.base >= ranks]
    # Samples last: a part of the samples would stay one through all that follows, and a batch may have few.
    heads.sort(key=lambda layout: (layout.dim == 0 and layout.outer == 1, int(layout.span.base) % ranks != 0, layout.dim))
    found = [_in_tiles(facts, node, wanted, said) for wanted, said in [*((one, "heads") for one in heads), (rows, "rows")]]
    return min((one for one in found if one is not None), key=lambda one: _num_gathered(facts, node, one), default=None)


def _in_tiles(facts: Facts, node: fx.Node, wanted: Layout, said: str) -> Sharding | None:
    """Return how to compute a part of a region's value, if that is made of parts."""
    by_heads, target = said == "heads", node.target
    assert isinstance(target, Region)
    operands = _operands(facts, node, wanted) if by_heads and target.exit.target is SDPA else {}
    needs = None if operands is None else needs_of(facts, node, wanted, operands=operands)
    if needs is None:
        return None
    shared = {one: layout for one, layout in _shared_by_heads(facts, node, wanted).items() if by_heads and one not in needs}

    def emit(em: Emitter, n: fx.Node) -> fx.Node:
        _require(em, n, ("ulysses",), f"it is written out, and computed on parts of {said}, in tiles")
        return _emit_alone(em, n, wanted, needs, shared)

    note = f"parts of {said}, in tiles" + (", one head of keys given to all ranks" if shared else "")
    return Sharding(needs | shared, wanted, emit, kind="attention", note=note)


def _num_gathered(facts: Facts, node: fx.Node, sharding: Sharding) -> int:
    """Return how many inputs that are sequences of the model are wanted whole."""
    whole = [one for one in tensor_inputs(node) if one in facts.trained and one not in sharding.needs]
    return sum(facts.has_sequence(one) for one in whole)


def _shared_by_heads(facts: Facts, node: fx.Node, wanted: Layout) -> dict[fx.Node, Layout]:
    """Return the inputs that are sequences of one head for all, with their parts."""
    from_last, found = len(facts.shape(node)) - wanted.dim, {}
    for source in tensor_inputs(node):
        layout, shape = facts.layout(source), facts.shape(source)
        one = len(shape) >= from_last and shape[len(shape) - from_last] == 1 and len(facts.sequence_dims(source)) == 1
        if one and layout is not None and layout.along_sequence and not layout.routed and source in facts.trained:
            found[source] = layout
    return found


def _operands(facts: Facts, node: fx.Node, wanted: Layout) -> dict[fx.Node, Layout] | None:
    """Return the parts of queries, keys and values for a part of the samples or heads."""
    given, from_last = _given(node), len(facts.shape(node)) - wanted.dim
    inputs = [given[name] for name in ("query", "key", "value")]
    parts = {one: facts.fit(one, len(facts.shape(one)) - from_last, wanted) for one in inputs if len(facts.shape(one)) >= from_last}
    known = {one: part for one, part in parts.items() if part is not None}
    return known if len(known) == len(set(inputs)) else None


def _merged_heads(facts: Facts, target: Region) -> list[Layout]:
    """Return where views within the region merge dimensions of known size with their neighbours: samples and heads, mostly."""
    found: dict[Layout, None] = {}  # ordered: all ranks have to choose alike
    for node in target.body.nodes:
        if node.target in VIEWS and len(facts.shape(node)) == len(facts.shape(target.exit)):
            shape_in = facts.shape(node.args[0])
            for dim, size in enumerate(shape_in):
                if size.is_Integer and (into := through_view(shape_in, facts.shape(node), Layout(dim, span_of(size)))):
                    found[into] = None
    return [layout for layout in found if layout.merged]


def emit_region(em: Emitter, node: fx.Node) -> fx.Node:
    """Compute a region from whole inputs."""
    return _emit_alone(em, node, None, {}, {})


def _emit_alone(
    em: Emitter, node: fx.Node, part: Form, needs: Mapping[fx.Node, Layout], shared: Mapping[fx.Node, Layout]
) -> fx.Node:
    target = node.target
    assert isinstance(target, Region)
    alone = (row_layout(em.facts, target), None, None) if target.exit.target is not SDPA else None
    rows, _, columns = alone or attention_rows(em.facts, target)
    assert rows is not None
    shape = [em.integer(size) for size in em.facts.shape(node)] if part is None else em.local_shape(node, part)
    num_rows, own, most = em.integer(rows.size), 0, 0
    if part == rows:
        num_rows, part = max(em.lengths(rows)), None
    elif part is not None:
        own, most = em.local_length(part), max(em.lengths(part))
    program, inputs = write_tile(em, target, [(rows, part, columns)], [shape], num_rows, own, most)
    gathered = {source: em.gather(em.get(source, layout), layout) for source, layout in shared.items()}
    given = [node.args[index] for index, _ in inputs]
    values = [gathered[x] if x in gathered else em.get(x, needs.get(x)) for x in given]  # type: ignore[arg-type, index]
    return em.call(operator.getitem, (em.call(run_tiles, (program.handle, *seed(em, program), *values)), 0))


def _by_sample(facts: Facts, given: dict[str, Any], layout: Layout) -> Sharding | None:
    """A part of the samples (the windows of an image) or heads: each attends on its own."""
    names = ("query", "key", "value", "attn_mask")
    query, key, value, *_ = inputs = [given[name] for name in names if given[name] is not None]
    batch = [facts.shape(x)[:-2] for x in (query, key, value)]
    if any(one != batch[0] for one in batch):
        return None
    needs = broadcast_needs(facts, inputs, layout, len(facts.shape(query)) - layout.dim)
    return None if needs is None else Sharding(needs, layout, kind="attention", note="each sample on its own")


def _over_fixed_keys(facts: Facts, node: fx.Node, given: dict[str, Any], layout: Layout) -> Sharding | None:
    """Keys without a sequence dimension (a fixed memory): every query is on its own."""
    query, mask = given["query"], given["attn_mask"]
    if given["is_causal"]:
        return None
    needs = {query: layout}
    if mask is not None and facts.has_sequence(mask):
        shape = facts.shape(mask)
        if len(shape) < 2 or facts.sequence_dims(mask) != [len(shape) - 2]:
            return None
        fitted = facts.fit(mask, len(shape) - 2, layout)
        if fitted is None:
            return None
        needs[mask] = fitted
    return Sharding(needs, layout, kind="attention", note="local queries over fixed keys")


RULES: dict[Any, Rule] = {SDPA: attention}
