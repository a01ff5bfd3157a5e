"""What a rule says about one node, and the facts it can ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import sympy
import torch
from torch import fx
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from lightning_autosp.compiler.capture import Captured
from lightning_autosp.compiler.layout import Layout, Span, layout_of_shape, span_of

__all__ = ["GIVEN_TO_ALL", "Facts", "Rule", "Sharding", "bound", "tensor_inputs"]

Kind = Literal["local", "exchange", "reduction", "loss", "attention"]
"""`exchange`: local, but for positions or totals that ranks give each other first."""

GIVEN_TO_ALL = "positions given to all ranks"
"""What the report says of an operator that makes positions whole."""


@dataclass(frozen=True)
class Sharding:
    """How to compute one node from shards.

    Attributes:
        needs: Tensor inputs wanted as this rank's part, with the layout they are wanted in. All others are wanted in full.
        output: The layout of the result; `None` if every rank computes the whole; a tuple for several outputs.
        emit: `emit(emitter, node)` adds the nodes that compute it (`emit.Emitter`); `None` calls the operator itself on the parts.
        kind: What the report counts it as.
        note: What the report says of it.
        mask: For attention, what its mask was proven to be and what became of it.
        unused: Inputs the emitted form does without.
        also: Values wanted that are no inputs.
    """

    needs: Mapping[fx.Node, Layout]
    output: Layout | None | tuple[Layout | None, ...]
    emit: Callable[[Any, fx.Node], Any] | None = None
    kind: Kind = "local"
    note: str = ""
    mask: str = ""
    unused: tuple[fx.Node, ...] = ()
    also: Mapping[fx.Node, Layout | None] = field(default_factory=dict)


Rule = Callable[["Facts", fx.Node], "Sharding | None"]


def bound(node: fx.Node) -> dict[str, Any]:
    """Return an operator's arguments by their schema names, defaults filled in."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    values = {a.name: a.default_value for a in arguments if a.has_default_value()}
    values.update(zip((a.name for a in arguments), node.args, strict=False))
    values.update(node.kwargs)
    return values


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the input nodes that hold one tensor, in order, each once."""
    return [n for n in dict.fromkeys(node.all_input_nodes) if isinstance(n.meta.get("val"), torch.Tensor)]


class Facts:
    """What is known of a captured graph while rules are asked: symbolic shapes, layouts, what met a parameter."""

    def __init__(
        self,
        captured: Captured,
        symbols: Iterable[sympy.Symbol],
        mesh: DeviceMesh,
        too_short: frozenset[Span] = frozenset(),
        arriving: Mapping[fx.Node, Layout] | None = None,
        whole_sorts: frozenset[fx.Node] = frozenset(),
        *,
        find: Rule,
        chunks: bool = True,
    ) -> None:
        self.captured = captured
        self.find = find
        """What gives the rule of any operator (`rules.find`), for those that ask it of others."""
        self.symbols = frozenset(symbols)
        self.mesh = mesh
        self.too_short = too_short
        """Spans that leave some rank without a position."""
        self.arriving = dict(arriving or {})
        """Inputs of which every rank is given its part, with their layouts."""
        self.whole_sorts = whole_sorts
        """Sorts of rows whose order means something beyond the rows, so that ranks cannot sort their own."""
        self.chunks = chunks
        """Whether a sequence stays cut where views split it into chunks or slices take some of them."""
        self.layouts: dict[fx.Node, Layout | None | tuple[Layout | None, ...]] = {}
        self.trained: set[fx.Node] = {*captured.trainable, *self.arriving}
        """Nodes computed from something that requires grad; the others are data, cheap enough to hold in full."""
        self._shapes: dict[fx.Node, tuple[sympy.Expr, ...]] = {}
        self._has_sequence: dict[fx.Node, bool] = {}
        self._assumed: Mapping[fx.Node, Layout | None] = {}

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        """Return a tensor's global shape in canonical symbols."""
        if node not in self._shapes:
            self._shapes[node] = self.captured.shape(node.meta["val"])
        return self._shapes[node]

    def expr(self, value: Any) -> sympy.Expr:
        """Return a size argument (an integer, or the node of a SymInt) as an expression."""
        return self.captured.expr(value.meta["val"] if isinstance(value, fx.Node) else value)

    def layout(self, node: fx.Node) -> Layout | None:
        found = self._assumed[node] if node in self._assumed else self.layouts.get(node)
        return found if isinstance(found, Layout) else None

    @contextmanager
    def assuming(self, layouts: Mapping[fx.Node, Layout | None]) -> Iterator[None]:
        """Let rules see these layouts of a node's inputs; whatever they ask for, the emitter converts to."""
        self._assumed = layouts
        try:
            yield
        finally:
            self._assumed = {}

    def has_sequence(self, node: fx.Node) -> bool:
        """Whether any size of the value depends on a sequence symbol."""
        if node not in self._has_sequence:
            tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
            sizes = (size for tensor in tensors for size in self.captured.shape(tensor))
            self._has_sequence[node] = any(size.free_symbols & self.symbols for size in sizes)
        return self._has_sequence[node]

    def sequence_dims(self, node: fx.Node) -> list[int]:
        return [dim for dim, size in enumerate(self.shape(node)) if size.free_symbols & self.symbols]

    def shape_layout(self, shape: Iterable[sympy.Expr]) -> Layout | None:
        return layout_of_shape(tuple(shape), self.symbols)

    def span_of(self, size: sympy.Expr) -> Span | None:
        """Return the span of a dimension that is a sequence: from base position 0, or a base of its own if that is too short."""
        if not size.free_symbols & self.symbols:
            return None
        span = span_of(size)
        return Span(size) if span in self.too_short else span

    def resized(self, layout: Layout, size: sympy.Expr) -> Layout | None:
        """Return how to cut a result of `size` positions: like its source if that has as many; `None` if that is no sequence."""
        span = self.span_of(size)
        return layout if size == layout.size else None if span is None else Layout(layout.dim, span)

    def reference(self, nodes: Iterable[fx.Node]) -> tuple[fx.Node, Layout] | None:
        """Return the input whose layout decides: a trained one before data, one cut along a sequence before others."""
        candidates = [(node, layout) for node in nodes if (layout := self.layout(node)) is not None]
        return max(candidates, key=lambda pair: (pair[0] in self.trained, pair[1].along_sequence), default=None)

    def fit(self, node: fx.Node, dim: int, like: Layout) -> Layout | None:
        """Return the layout in which `node` can be sliced along `dim` to match `like`, or `None`."""
        if self.shape(node)[dim] != like.size:
            return None
        own, fitted = self.layout(node), like.at(dim)
        return fitted if own == fitted or not (like.routed or (own is not None and own.routed)) else None
