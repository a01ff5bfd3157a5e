"""Attention as one node: what is computed of every pair of positions, from queries, keys and mask up to the result.

A captured step computes masks and, where attention is written out, scores: values with two sequence dimensions, of order `S x S`. A
`Region` takes all of them that lead to one result out of the graph and stands there as one node. Its `body` says how it is
computed; `tiling.py` cuts that to rows, so that no rank ever holds such a value whole.

    softmax(q @ k.T + mask) @ v                   becomes   scaled_dot_product_attention(q, k, v, mask)
    scaled_dot_product_attention(q, k, v, mask)   becomes   the same with the kernel's own flag, if the mask proves to be one
                                                  or        region(q, k, v, what the mask is computed from)
    softcap(q @ k.T) ... @ v                      becomes   region(q, k, v, ...)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lightning_autosp.attention.masks import MaskProof, Table, prove_mask, segments
from lightning_autosp.compiler.capture import Captured, is_size
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.locality import CONTRACTIONS
from lightning_autosp.compiler.rule import bound
from lightning_autosp.compiler.written_out import PRODUCTS, SDPA, SOFTMAX, insert, join_written_out

__all__ = ["MaskRegion", "Mode", "Region", "RowRegion", "join_attention", "modes"]

aten = torch.ops.aten
Mode = tuple[bool, tuple[fx.Node, ...]]
"""Whether gradients are recorded, and what entered the autocast regions in force."""

_REDUCTIONS = {
    aten.max.dim,
    aten.amax.default,
    aten.min.dim,
    aten.amin.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.logsumexp.default,
}
"""Values of rows that are read off the scores and go back into them: their maximum, say."""


@dataclass(frozen=True, eq=False, repr=False)
class Region:
    """The target of a node that stands for several.

    Attributes:
        body: Computes the value; its placeholders are the inputs, tensors first, in the order of the node's arguments, then sizes.
        proof: Of the mask, where the last node is `scaled_dot_product_attention`.
        segments: Numbers of rows and of columns, looked up in placeholders: where they differ, nothing is attended.
    """

    body: fx.Graph
    proof: MaskProof | None = None
    segments: tuple[tuple[Table, Table], ...] = ()

    def __call__(self, *inputs: Any) -> Any:
        raise NotImplementedError("a region is emitted, not called")

    def __repr__(self) -> str:
        return f"attention ending in {self.exit.target}"

    @property
    def __name__(self) -> str:
        return "attention_region"

    @property
    def exits(self) -> list[fx.Node]:
        """The nodes that compute the values."""
        return list(self.body.output_node().args[0])  # type: ignore[arg-type]

    @property
    def exit(self) -> fx.Node:
        """The node that computes the value, of which there is one."""
        (node,) = self.exits
        return node

    @property
    def mask(self) -> fx.Node:
        """The node that computes the mask, where the value is that of `scaled_dot_product_attention`."""
        mask = self.exit.args[3]
        assert isinstance(mask, fx.Node)
        return mask

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.body.nodes if node.op == "placeholder"]

    def any(self, holds: Callable[[fx.Node], bool]) -> bool:
        return any(holds(node) for node in self.body.nodes if node.op == "call_function")


@dataclass(frozen=True, eq=False, repr=False)
class MaskRegion(Region):
    """Of a region of `scaled_dot_product_attention` what computes the mask."""

    @property
    def exits(self) -> list[fx.Node]:
        (attention,) = super().exits
        return [attention.args[3]]  # type: ignore[list-item]

    @property
    def mask(self) -> fx.Node:
        return self.exit


@dataclass(frozen=True, eq=False, repr=False)
class RowRegion(Region):
    """A region with several results, each computed row by row (`rowwise.py`).

    Attributes:
        rows: How each result is cut into rows.
        tile_rows: Positions of one tile, if that is given.
    """

    rows: tuple[Layout, ...] = ()
    tile_rows: int | None = None

    def __repr__(self) -> str:
        return f"rows of {', '.join(str(node.target) for node in self.exits)}"

    @property
    def __name__(self) -> str:
        return "row_region"


def join_attention(captured: Captured, can_be_tiled: Callable[[Region], bool]) -> None:
    """Rewrite a captured graph so that nothing of order `S x S` is computed outside of regions, as far as is understood.

    Args:
        captured: The graph; changed in place.
        can_be_tiled: Whether the rows of a region's value can be computed range after range.
    """
    _drop_dead(captured)
    for node in list(captured.graph.nodes):
        if node.target in (aten.tril.default, aten.triu.default) and _is_square(captured, node):
            _compare_positions(captured, node)
        elif node.target is aten.baddbmm.default and _is_square(captured, node):
            _add_apart(captured, node)
        elif node.target is aten.repeat.default and _is_square(captured, node):
            _expand(captured, node)
    for node in list(captured.graph.nodes):
        if node.target in PRODUCTS and not _is_square(captured, node) and _is_square(captured, node.args[0]):
            join_written_out(captured, node)
    for node in list(captured.graph.nodes):
        if node.target is SDPA:
            _use_flags(captured, node)
        mask = bound(node)["attn_mask"] if node.target is SDPA else None
        if mask is not None:
            proof = prove_mask(mask, captured)
            if _is_square(captured, mask):
                _replace(captured, node, _cone(captured, node, [mask]), can_be_tiled, proof)
        elif node.target in CONTRACTIONS and not _is_square(captured, node):
            squares = [source for source in node.all_input_nodes if _is_square(captured, source)]
            if squares and len(_sequence_dims(captured, node)) == 1:
                _replace(captured, node, _cone(captured, node, squares), can_be_tiled)
    _drop_dead(captured)


def _drop_dead(captured: Captured) -> None:
    """Erase what nothing reads, and checks of what a tensor is: they would count as readers."""
    for node in reversed(list(captured.graph.nodes)):
        computes = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        checks = node.target is aten._assert_tensor_metadata.default
        if computes and not node.users and (checks or not node.is_impure(impure_random=False)):
            captured.graph.erase_node(node)


def _sequence_dims(captured: Captured, node: fx.Node) -> list[int]:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return []
    return [dim for dim, size in enumerate(captured.shape(value)) if size.free_symbols & captured.symbols]


def _is_square(captured: Captured, node: fx.Node) -> bool:
    """Whether the node holds a number for every pair of positions."""
    return len(_sequence_dims(captured, node)) >= 2


# One region.


def _cone(captured: Captured, exit_node: fx.Node, squares: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nodes that compute values of pairs for `exit_node`, and what they read off each other."""

    def belongs(node: fx.Node) -> bool:
        return isinstance(node.target, torch._ops.OpOverload) and _is_square(captured, node)

    cone = {exit_node}
    pending = list(squares)
    while pending:
        node = pending.pop()
        if node in cone or not belongs(node):
            continue
        cone.add(node)
        pending += node.all_input_nodes
        # Values of rows that come from scores (their maximum) and go back into them.
        for source in node.all_input_nodes:
            path = _read_off(captured, source)
            cone.update(path)
            pending += [value for one in path for value in one.all_input_nodes if _is_square(captured, value)]
    return cone


def _read_off(captured: Captured, node: fx.Node) -> list[fx.Node]:
    """Return the nodes from a reduction of pairs to this value of positions; none if it is nothing of the kind."""
    if _is_square(captured, node) or node.op != "call_function":
        return []
    if node.target in _REDUCTIONS:
        return [node] if any(_is_square(captured, source) for source in node.all_input_nodes) else []
    if node.target is operator.getitem or torch.Tag.pointwise in getattr(node.target, "tags", ()):
        paths = [_read_off(captured, source) for source in node.all_input_nodes]
        return [node, *(one for path in paths for one in path)] if any(paths) else []
    return []


def _is_costly(node: fx.Node) -> bool:
    """Whether the node must not be computed twice: costly, or different every time."""
    return node.target in CONTRACTIONS | SOFTMAX or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _replace(
    captured: Captured,
    exit_node: fx.Node,
    cone: set[fx.Node],
    can_be_tiled: Callable[[Region], bool],
    proof: MaskProof | None = None,
) -> None:
    """Put one node in the place of a cone's last, unless its values are used elsewhere or its rows cannot be told apart."""
    for node in cone - {exit_node}:
        if _is_costly(node) and not all(user in cone for user in node.users):
            return
    ordered = [node for node in captured.graph.nodes if node in cone]
    mode = modes(captured)
    computed = [node for node in ordered if _is_costly(node) or node is exit_node]
    if len({mode[node] for node in computed}) > 1 or mode[exit_node][1]:
        return  # scores and result in different modes, or in an autocast region, which would have to stand within the node
    inputs = dict.fromkeys(source for node in ordered for source in node.all_input_nodes if source not in cone)
    known = [pair for pair in segments(proof) if not {table.node for table in pair} & cone] if proof else []
    inputs |= dict.fromkeys(table.node for pair in known for table in pair)
    tensors = [source for source in inputs if not is_size(source)]
    if not all(isinstance(source.meta.get("val"), torch.Tensor) for source in tensors):
        return
    body, copies = begin_body(inputs)
    for node in ordered:
        copies[node] = body.node_copy(node, copies.__getitem__)
    body.output((copies[exit_node],))
    own = [tuple(Table(copies[table.node], table.indices) for table in pair) for pair in known]
    region = Region(body, proof, tuple(own))  # type: ignore[arg-type]
    if not can_be_tiled(region):
        return
    with captured.graph.inserting_before(exit_node):
        joined = captured.graph.call_function(region, tuple(tensors))  # type: ignore[arg-type]
    joined.meta = dict(exit_node.meta)
    exit_node.replace_all_uses_with(joined)
    for node in reversed(ordered):
        if not node.users:
            captured.graph.erase_node(node)


def begin_body(sources: Iterable[fx.Node]) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Return the graph of a region's body with a placeholder for each input, tensors first, and which stands for which."""
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for source in sorted(sources, key=is_size):
        copies[source] = body.placeholder(source.name)
        copies[source].meta = dict(source.meta)
    return body, copies


def modes(captured: Captured) -> dict[fx.Node, Mode]:
    """Return the mode that every node stands in."""
    grad = True
    autocasts: tuple[fx.Node, ...] = ()
    found: dict[fx.Node, Mode] = {}
    for node in captured.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            grad = bool(node.args[0])
        elif node.target is torch.amp.autocast_mode._enter_autocast:
            autocasts = (*autocasts, node)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            autocasts = autocasts[:-1]
        found[node] = grad, autocasts
    return found


# Rewrites.


def _compare_positions(captured: Captured, node: fx.Node) -> None:
    """Write a triangle as a comparison of row and column: every element then depends on its own place alone."""
    given = bound(node)
    source = given["self"]
    device = source.meta["val"].device
    rows, columns = source.meta["val"].shape[-2:]
    with captured.graph.inserting_before(node):
        sizes = [
            insert(captured, aten.sym_size.int, source, dim, like=node) if isinstance(size, torch.SymInt) else size
            for dim, size in ((source.meta["val"].ndim - 2, rows), (source.meta["val"].ndim - 1, columns))
        ]
        row, column = (insert(captured, aten.arange.default, size, device=device, like=node) for size in sizes)
        row = insert(captured, aten.unsqueeze.default, row, 1, like=node)
        limit = insert(captured, aten.add.Tensor, row, given["diagonal"], like=node)
        lower = node.target is aten.tril.default
        kept = insert(captured, aten.le.Tensor if lower else aten.ge.Tensor, column, limit, like=node)
        zeros = insert(captured, aten.zeros_like.default, source, like=node)
        new = insert(captured, aten.where.self, kept, source, zeros, like=node)
    node.replace_all_uses_with(new)
    captured.graph.erase_node(node)


def _add_apart(captured: Captured, node: fx.Node) -> None:
    """Write a product with a sum as a product and a sum."""
    given = bound(node)
    with captured.graph.inserting_before(node):
        terms = [given["self"], insert(captured, aten.bmm.default, given["batch1"], given["batch2"], like=node)]
        for place, factor in enumerate((given["beta"], given["alpha"])):
            if factor != 1:
                terms[place] = insert(captured, aten.mul.Tensor, terms[place], factor, like=node)
        new = insert(captured, aten.add.Tensor, *terms, like=node)
    node.replace_all_uses_with(new)
    captured.graph.erase_node(node)


def _expand(captured: Captured, node: fx.Node) -> None:
    """Write a repetition of single rows, columns or heads as an expansion: rows of it are known to be made of that."""
    given = bound(node)
    source, repeats = given["self"], list(given["repeats"])
    shape = captured.shape(source.meta["val"])
    sizes = [1] * (len(repeats) - len(shape)) + list(shape)
    if any(size not in (1, result) for size, result in zip(sizes, captured.shape(node.meta["val"]), strict=True)):
        return
    expanded = [times if size == 1 else -1 for size, times in zip(sizes, repeats, strict=True)]
    with captured.graph.inserting_before(node):
        new = insert(captured, aten.expand.default, source, expanded, like=node)
        new = insert(captured, aten.clone.default, new, like=node)
    node.replace_all_uses_with(new)
    captured.graph.erase_node(node)


def _use_flags(captured: Captured, node: fx.Node) -> None:
    """Drop a mask that proves to be one of the kernel's flags, or to mask nothing."""
    given = bound(node)
    if given["attn_mask"] is None:
        return
    proof = prove_mask(given["attn_mask"], captured)
    rows, columns = captured.shape(given["query"].meta["val"])[-2], captured.shape(given["key"].meta["val"])[-2]
    if proof.kind == "full" or (proof.kind == "causal" and rows == columns):
        flag = proof.kind == "causal"
        options = {"scale": given["scale"], "enable_gqa": given["enable_gqa"]}
        node.args = (given["query"], given["key"], given["value"], None, given["dropout_p"], flag)
        node.kwargs = options
        node.meta["mask"] = proof.text + (", dropped for the kernel's own flag" if flag else ", dropped")
