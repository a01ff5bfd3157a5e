"""Where the sequence is in a tensor, and which part of it each rank owns.

The base sequence has length `S` (a symbol while planning, an integer once specialised). Its positions are cut once into
`P` contiguous ranges. Every tensor that was derived from the sequence by dropping or adding positions at either end (`x[:, :-1]`,
`x[:, 1:]`, a prepended class token) keeps those cuts, so such ops move nothing between ranks; only the first and last rank hold
fewer or more positions. A tensor's part is described in base positions by a `Span`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import sympy
import torch

__all__ = ["Layout", "Span", "ShardTooShortError", "as_expr", "base_cuts", "layout_of_shape"]

ONE = sympy.Integer(1)


class ShardTooShortError(ValueError):
    """A tensor has too few positions for every rank to own one."""


@dataclass(frozen=True)
class Span:
    """The base positions `[begin, S + end)` of the sequence named by `symbol`.

    `begin` is negative when positions were prepended (a class token: -1) and positive when they were dropped (`x[:, 1:]`: 1).
    """

    symbol: sympy.Symbol
    begin: int = 0
    end: int = 0

    @property
    def length(self) -> sympy.Expr:
        return self.symbol + self.end - self.begin

    def bounds(self, base_length: int, num_ranks: int) -> list[tuple[int, int]]:
        """Return each rank's `(start, stop)`, in the tensor's own positions.

        Raises:
            ShardTooShortError: If a rank would own no position.
        """
        cuts = base_cuts(base_length, num_ranks)
        cuts[0], cuts[-1] = self.begin, base_length + self.end
        bounds = [(lo - self.begin, hi - self.begin) for lo, hi in zip(cuts, cuts[1:], strict=False)]
        if any(stop <= start for start, stop in bounds):
            raise ShardTooShortError(
                f"a tensor of {base_length + self.end - self.begin} positions leaves one of {num_ranks} ranks without any"
            )
        return bounds


@dataclass(frozen=True)
class Layout:
    """Dimension `dim` has size `outer * span.length * inner`, with the sequence between the two.

    `outer` and `inner` differ from 1 only where a view merged the sequence with its neighbours: `(B, s, D) -> (B*s, D)`
    has `outer == B`. A rank's local tensor has size `outer * local_length * inner` there.
    """

    dim: int
    span: Span
    outer: sympy.Expr = ONE
    inner: sympy.Expr = ONE

    @property
    def size(self) -> sympy.Expr:
        return sympy.expand(self.outer * self.span.length * self.inner)

    @property
    def merged(self) -> bool:
        return self.outer != 1 or self.inner != 1

    def at(self, dim: int) -> Layout:
        return replace(self, dim=dim)

    def over(self, span: Span) -> Layout:
        return replace(self, span=span)


def base_cuts(base_length: int, num_ranks: int) -> list[int]:
    """Return `num_ranks + 1` cut positions; the parts differ by one position at most, the longer ones first."""
    small, extra = divmod(base_length, num_ranks)
    cuts = [0]
    for rank in range(num_ranks):
        cuts.append(cuts[-1] + small + (rank < extra))
    return cuts


def as_expr(
    size: int | torch.SymInt | torch.SymFloat | torch.SymBool | sympy.Expr,
    replacements: Mapping[sympy.Symbol, sympy.Expr] | None = None,
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
    return sympy.expand(expr) if isinstance(expr, sympy.Expr) else expr


def affine_length(expr: sympy.Expr, symbols: Iterable[sympy.Symbol]) -> tuple[sympy.Symbol, int] | None:
    """Return `(symbol, c)` when `expr == symbol + c` for one of `symbols` and an integer `c`."""
    for symbol in symbols:
        rest = sympy.expand(expr - symbol)
        if rest.is_Integer:
            return symbol, int(rest)
    return None


def layout_of_shape(shape: Sequence[sympy.Expr], symbols: Iterable[sympy.Symbol]) -> Layout | None:
    """Return the layout that a tensor's shape alone proves: exactly one dimension is a sequence, and it is not merged."""
    symbols = tuple(symbols)
    found = [dim for dim, size in enumerate(shape) if size.free_symbols & set(symbols)]
    if len(found) != 1:
        return None
    length = affine_length(shape[found[0]], symbols)
    return Layout(found[0], Span(length[0], 0, length[1])) if length else None
