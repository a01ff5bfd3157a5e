"""What tracing found true of sizes, as rewrites of the expressions that sizes are.

Code compares sizes (`range(s // 4)`, `x.view(B, -1, 4, D)`, `min(stop, s)`), and a captured graph is right only where the
comparisons come out as they did. So much is known of the lengths that a graph is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sympy

from lightning_autosp import _compat
from lightning_autosp.compiler.layout import as_expr

__all__ = ["equal_sizes"]


def equal_sizes(
    guards: Iterable[sympy.Expr],
    replacements: Mapping[sympy.Expr, sympy.Expr],
    of_module: set[sympy.Symbol],
    symbols: set[sympy.Symbol],
    sizes: Iterable[sympy.Expr],
) -> dict[sympy.Expr, sympy.Expr]:
    """Return what may be put in the place of expressions in sizes.

    Args:
        guards: What was found true.
        replacements: Which symbols are equal to others.
        of_module: Symbols of the module's own tensors.
        symbols: Those of sequences.
        sizes: The sizes there are.
    """
    guards = list(guards)
    equalities = [guard for guard in guards if isinstance(guard, sympy.Eq)]
    found = _sizes_of_module(equalities, replacements, of_module, symbols)
    found |= _extrema(guards, {**replacements, **found}, sizes)
    return found | _quotients(equalities, {**replacements, **found})


def _sizes_of_module(
    equalities: Iterable[sympy.Eq],
    replacements: Mapping[sympy.Expr, sympy.Expr],
    of_module: set[sympy.Symbol],
    symbols: set[sympy.Symbol],
) -> dict[sympy.Expr, sympy.Expr]:
    """Return the sizes of the module's tensors that have to be what the sequences make them: `(height // 16) * (width // 16)`."""
    equal: dict[sympy.Expr, sympy.Expr] = {}
    for equality in equalities:
        sides = [as_expr(side, replacements) for side in equality.args]
        for size, of_sequence in (sides, sides[::-1]):
            if size in of_module and of_sequence.free_symbols and of_sequence.free_symbols <= symbols:
                equal[size] = of_sequence
    return equal


def _quotients(equalities: Iterable[sympy.Eq], replacements: Mapping[sympy.Expr, sympy.Expr]) -> dict[sympy.Expr, sympy.Expr]:
    """Return the quotients and remainders that tracing found equal to something simpler.

    `x.view(B, -1, 4, D)` of `s` positions has `s // (s // 4)` for the 4, which looks like one more sequence; every second position
    from the first on are `(s + 1) // 2`, those from the second on `s // 2`; what is padded to the one chunk of 64 that it fills has
    `s + -s % 64` positions, where `-s % 64` is `64 - s`.
    """
    equal: dict[sympy.Expr, sympy.Expr] = {}
    for equality in equalities:
        left, right = (as_expr(side, {**replacements, **equal}) for side in equality.args)
        difference = sympy.expand(left - right)
        terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(difference)]
        quotients = [(quotient, factor) for factor, quotient in terms if isinstance(quotient, sympy.Function)]
        if quotients:
            quotient, factor = max(quotients, key=lambda one: (sympy.count_ops(one[0]), str(one[0])))
            simple = sympy.expand(quotient - difference / factor)
            integers = all(number.is_Integer for number in simple.atoms(sympy.Number))
            # What a sequence is only part of (rows of patches) stays one, even if the code fixes the whole to a number.
            if integers and not simple.has(quotient) and (simple.free_symbols or quotient in (left, right)):
                equal[quotient] = simple
    return equal


def _extrema(
    guards: Iterable[sympy.Expr], replacements: Mapping[sympy.Expr, sympy.Expr], sizes: Iterable[sympy.Expr]
) -> dict[sympy.Expr, sympy.Expr]:
    """Return what minima and maxima are in the lengths that a graph is for: `min(16, s)` is 16 where `(s + 7) // 8` is 4."""
    bounds = _bounds(guards, replacements)
    equal: dict[sympy.Expr, sympy.Expr] = {}
    for extremum in dict.fromkeys(one for size in sizes for one in sorted(size.atoms(_compat.Min, _compat.Max), key=str)):
        sign = -1 if isinstance(extremum, _compat.Min) else 1
        for one in extremum.args:
            others = [sympy.expand(sign * (one - other)) for other in extremum.args if other is not one]
            if all(_least(difference, bounds) >= 0 for difference in others):
                equal[extremum] = one
    return equal


def _bounds(
    guards: Iterable[sympy.Expr], replacements: Mapping[sympy.Expr, sympy.Expr]
) -> dict[sympy.Symbol, tuple[sympy.Expr, sympy.Expr]]:
    """Return between which numbers the symbols lie by what was found of affine functions of them, and of their quotients."""
    bounds: dict[sympy.Symbol, tuple[sympy.Expr, sympy.Expr]] = {}

    def at_least_zero(expr: Any) -> None:
        expr = as_expr(expr, replacements)
        if len(expr.free_symbols) != 1:
            return
        (symbol,) = expr.free_symbols
        factor = expr.coeff(symbol)
        constant = sympy.expand(expr - factor * symbol)
        if factor.is_Integer and factor != 0 and constant.is_Integer:
            low, high = bounds.get(symbol, (sympy.S.One, sympy.oo))
            limit = sympy.Rational(-constant, factor)
            bounds[symbol] = (sympy.Max(low, limit), high) if factor > 0 else (low, sympy.Min(high, limit))

    for guard in guards:
        if isinstance(guard, (sympy.Ge, sympy.Le)):
            at_least_zero(guard.gts - guard.lts)
        elif isinstance(guard, (sympy.Gt, sympy.Lt)):
            at_least_zero(guard.gts - guard.lts - 1)
        elif isinstance(guard, sympy.Eq):
            for quotient, number in (guard.args, guard.args[::-1]):
                if isinstance(quotient, _compat.FloorDiv) and number.is_Integer and quotient.args[1].is_Integer:
                    dividend, divisor = quotient.args
                    at_least_zero(dividend - number * divisor)
                    at_least_zero((number + 1) * divisor - 1 - dividend)
    return bounds


def _least(expr: sympy.Expr, bounds: Mapping[sympy.Symbol, tuple[sympy.Expr, sympy.Expr]]) -> sympy.Expr:
    """Return a number that an affine expression is never below."""
    least = sympy.S.Zero
    for term in sympy.Add.make_args(expr):
        factor, symbol = term.as_coeff_Mul()
        if symbol == 1:
            least += factor
        elif symbol.is_Symbol:
            low, high = bounds.get(symbol, (sympy.S.One, sympy.oo))
            least += factor * (low if factor > 0 else high)
        else:
            return -sympy.oo
    return least
