"""How a tensor is cut into the parts that the ranks hold.

A part is a range of positions along one dimension, mostly the sequence: its positions are cut once into `P` contiguous ranges.
Every tensor that was derived from a sequence by dropping or adding positions at either end (`x[:, :-1]`, `x[:, 1:]`, a prepended
class token) keeps those cuts, so such operators move nothing between ranks; only the first and last rank hold fewer or more
positions. A tensor's part is described in positions of that base sequence by a `Span`. A sequence of any other length (every second
position, two sequences one behind the other) and a dimension that is no sequence (attention heads) are bases of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx

from lightning_autosp.cuts import even_cuts

__all__ = ["ONE", "Layout", "ShardTooShortError", "Span", "as_expr", "layout_of_shape", "span_of"]

ONE = sympy.Integer(1)


class ShardTooShortError(ValueError):
    """A tensor has too few positions for every rank to own one."""

    def __init__(self, span: Span, length: int, num_ranks: int) -> None:
        super().__init__(f"a tensor of {length} positions leaves one of {num_ranks} ranks without any")
        self.span = span


@dataclass(frozen=True)
class Span:
    """The positions `[begin, base + end)` of a sequence that has `base` positions.

    `begin` is negative when positions were prepended (a class token: -1) and positive when they were dropped (`x[:, 1:]`: 1).
    """

    base: sympy.Expr
    begin: int = 0
    end: int = 0

    @property
    def length(self) -> sympy.Expr:
        return self.base + self.end - self.begin

    def bounds(self, base_length: int, num_ranks: int) -> list[tuple[int, int]]:
        """Return each rank's `(start, stop)`, in the tensor's own positions.

        Raises:
            ShardTooShortError: If a rank would own no position.
        """
        cuts = even_cuts(base_length, num_ranks)
        cuts[0], cuts[-1] = self.begin, base_length + self.end
        bounds = [(lo - self.begin, hi - self.begin) for lo, hi in zip(cuts, cuts[1:], strict=False)]
        if any(stop <= start for start, stop in bounds):
            raise ShardTooShortError(self, base_length + self.end - self.begin, num_ranks)
        return bounds


@dataclass(frozen=True)
class Layout:
    """Dimension `dim` has size `outer * span.length * inner`, with the positions that are cut between the two.

    `outer` and `inner` differ from 1 only where a view merged the dimension with its neighbours: `(B, s, D) -> (B*s, D)`
    has `outer == B`. A rank's local tensor has size `outer * local_length * inner` there.

    With `order` or `points` the part is no slice of the whole, so neither is made of the other (`rules/experts.py`).
    """

    dim: int
    span: Span
    outer: sympy.Expr = ONE
    inner: sympy.Expr = ONE
    order: fx.Node | None = None
    """The sort that put the rows in order: on every rank the rank's own rows, by their own keys."""
    points: Layout | None = None
    """The rows that the values are positions of, counted in the rank's part; `None` if the values are those of one device."""

    @property
    def size(self) -> sympy.Expr:
        return _expand(self.outer * self.span.length * self.inner if self.merged else self.span.length)

    @property
    def merged(self) -> bool:
        return self.outer != 1 or self.inner != 1

    @property
    def routed(self) -> bool:
        """Whether a part is something else than a slice of the whole."""
        return self.order is not None or self.points is not None

    @property
    def rows(self) -> Layout:
        """Which rows the rank has and in which order, whatever tensor they are of."""
        return replace(self, dim=0, points=None)

    @property
    def along_sequence(self) -> bool:
        """Whether a sequence is cut, not some dimension of known size."""
        return bool(self.span.base.free_symbols)

    def at(self, dim: int) -> Layout:
        return replace(self, dim=dim)

    def over(self, span: Span) -> Layout:
        return replace(self, span=span)


def as_expr(
    size: int | torch.SymInt | torch.SymFloat | torch.SymBool | sympy.Expr,
    replacements: Mapping[sympy.Expr, sympy.Expr] | None = None,
) -> sympy.Expr:
    """Return a size or scalar as an expanded sympy expression in the canonical symbols."""
    expr = size.node.expr if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else sympy.sympify(size)
    if replacements:
        # Replacements may point at each other (labels -> ids -> a guarded equality), so apply them until nothing changes.
        for _ in range(8):
            new = expr.xreplace(dict(replacements))
            if new == expr:
                break
            expr = new
    return _expand(expr) if isinstance(expr, sympy.Expr) else expr


@functools.lru_cache(maxsize=4096, typed=True)
def _expand(expr: sympy.Expr) -> sympy.Expr:
    return sympy.expand(expr)


def span_of(size: sympy.Expr) -> Span:
    """Return the span of a dimension of this size when nothing else is known: `s - 1` keeps the cuts of `s`."""
    constant, rest = size.as_coeff_Add()
    return Span(rest, 0, int(constant)) if rest.free_symbols and constant.is_Integer else Span(size)


def layout_of_shape(shape: Sequence[sympy.Expr], symbols: Iterable[sympy.Symbol]) -> Layout | None:
    """Return the layout that cuts the first dimension whose size depends on one of the symbols."""
    known = frozenset(symbols)
    return next((Layout(dim, span_of(size)) for dim, size in enumerate(shape) if size.free_symbols & known), None)
