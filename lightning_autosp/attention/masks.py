"""What an attention mask proves to be, from the operators that compute it.

The operators behind a mask are interpreted abstractly: every value is a function of its own indices, kept as an affine form
(`row + 3`), a boolean formula over comparisons of affine forms (`col <= row and row - col < 4096`), or a choice between two
constants (`0 where allowed, else -inf`). What comes out is proven for all lengths; nothing is evaluated at a size and nothing
is sampled. Truth values that are not understood (a padding mask that came with the batch) are `data`; of a mask that is
`column <= row and data` it is still proven that it attends to nothing right of the diagonal (`column_bounds`). Integers that
are not understood (the number of the document at every position) are a `Table`: of a mask that compares such numbers of row and
column (`segments`), the columns that a few rows attend to can be found from the numbers alone.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import sympy
import torch
from torch import fx

from lightning_autosp.compiler.capture import Captured

__all__ = ["MaskProof", "Table", "column_bounds", "prove_mask", "segments"]

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskProof:
    """What a mask is.

    Attributes:
        kind: `causal`, `full` (masks nothing), `structured` (proven, but no kernel has a flag for it), `unknown` (depends on data).
        text: The same in words.
        formula: Where it attends; `None` if nothing is known.
        lowest: What is added to scores that are not attended; minus infinity for a boolean mask.
        diagonal: Whether every row is proven to attend to the column of its own number.
    """

    kind: Literal["causal", "full", "structured", "unknown"]
    text: str
    formula: Formula | None = None
    lowest: float = float("-inf")
    diagonal: bool = False


@dataclass(frozen=True)
class Affine:
    """`sum(coefficients[d] * index_d) + constant`."""

    coefficients: tuple[sympy.Expr, ...]
    constant: sympy.Expr
    integral: bool = True

    @property
    def is_constant(self) -> bool:
        return all(c == 0 for c in self.coefficients)


@dataclass(frozen=True)
class Table:
    """`node[indices[0], indices[1], ...]`: elements of a tensor of integers that are not known further."""

    node: fx.Node
    indices: tuple[Affine, ...]


@dataclass(frozen=True)
class Formula:
    """A boolean function of the indices: `op` is `true`, `false`, `ge0` (of one affine form), `same` or `at_most` (of two tables),
    `and`, `or`, `not` or `data`.

    `data` stands for any function of indices and batch: two of them are not the same, and its negation is `data` too.
    """

    op: str
    parts: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Choice:
    """`yes` where the formula holds, else `no`."""

    formula: Formula
    yes: sympy.Expr
    no: sympy.Expr


Value = Affine | Table | Formula | Choice
TRUE, FALSE, DATA = Formula("true"), Formula("false"), Formula("data")
_OF_TABLES = ("same", "at_most")
"""Of two integers: they hold where both are the same."""


class _Unknown(Exception):
    """The operator is not understood."""


def prove_mask(mask: fx.Node, captured: Captured) -> MaskProof:
    """Prove what an attention mask is.

    Args:
        mask: The node of a mask of shape `(..., rows, columns)`, bool (true: attend) or float (added to the scores).
        captured: The graph it stands in.
    """
    try:
        value = _Interpreter(captured).value(mask)
        shape = captured.shape(mask.meta["val"])
        if isinstance(value, Affine) and value.is_constant and value.constant == 0 and value.integral is False:
            return MaskProof("full", "masks nothing", TRUE, diagonal=True)
        lowest = float("-inf")
        if isinstance(value, Choice):
            lowest = float(min(value.yes, value.no))
            value = _attended(value, mask.meta["val"].dtype)
        if not isinstance(value, Formula):
            return MaskProof("unknown", "not proven")
    except _Unknown as unknown:
        return MaskProof("unknown", f"not proven ({unknown})")
    simple = _simplify(value, shape)
    if simple == TRUE:
        return MaskProof("full", "proven to mask nothing", TRUE, lowest, diagonal=True)
    diagonal = shape[-2] == shape[-1] and _simplify(_on_diagonal(simple), shape) == TRUE
    atoms = set(simple.parts) if simple.op == "and" else {simple}
    names = sorted(_describe(atom, len(shape)) for atom in atoms if not _has_data(atom))
    if atoms == {_causal(len(shape))}:
        return MaskProof("causal", "proven causal", simple, lowest, diagonal)
    if not any(map(_has_data, atoms)):
        return MaskProof("structured", "proven " + " and ".join(names), simple, lowest, diagonal)
    known = f", proven {' and '.join(names)}" if names else ""
    compares = {atom for atom in atoms if _is_segments(atom)}
    others = any(_has_data(atom) for atom in atoms - compares)
    said = " within ".join(["of the batch's data"] * others + ["documents (segment ids)"] * bool(compares))
    return MaskProof("unknown", said + known, simple, lowest, diagonal)


def column_bounds(proof: MaskProof, sizes: Mapping[sympy.Symbol, int]) -> Callable[[int, int], tuple[int, int]] | None:
    """Return the function `(first row, behind the last) -> (first column, behind the last)` outside of which nothing is attended.

    Args:
        proof: Of a mask.
        sizes: The value of every symbol.

    Returns:
        `None` if every row may attend to all columns, as far as is proven.
    """
    limits: list[tuple[int, int, int]] = []
    for atom in _hiding(proof):
        if atom.op != "ge0":
            continue
        form = atom.parts[0]
        *others, row, column = (c.xreplace(dict(sizes)) for c in form.coefficients)
        numbers = (row, column, form.constant.xreplace(dict(sizes)))
        if column != 0 and all(c == 0 for c in others) and all(number.is_Integer for number in numbers):
            limits.append(tuple(int(number) for number in numbers))  # type: ignore[arg-type]
    if not limits:
        return None

    def bounds(start: int, stop: int) -> tuple[int, int]:
        low, high = 0, 2**62
        for row, column, constant in limits:  # row * i + column * j + constant >= 0
            most = constant + max(row * start, row * (stop - 1))
            if column < 0:
                high = min(high, most // -column + 1)
            else:
                low = max(low, -(most // column))
        return low, high

    return bounds


def segments(proof: MaskProof) -> list[tuple[Table, Table]]:
    """Return pairs of numbers, of the row and of the column: where the two differ, nothing is attended."""
    return [_segments(atom) for atom in _hiding(proof) if _is_segments(atom)]


def _hiding(proof: MaskProof) -> tuple[Formula, ...]:
    """Return formulas each of which hides columns where it does not hold, so that these may be left out."""
    # A row without anything it attends to weighs all columns alike if its scores are finite: none may be left out.
    if proof.formula is None or not (proof.diagonal or proof.lowest == float("-inf")):
        return ()
    return proof.formula.parts if proof.formula.op == "and" else (proof.formula,)


def _segments(formula: Formula) -> tuple[Table, Table]:
    """Return the tables of a comparison of rows with columns, the rows' first."""
    left, right = formula.parts
    return (right, left) if _reads(left, -1) or _reads(right, -2) else (left, right)


def _is_segments(formula: Formula) -> bool:
    if formula.op != "same":
        return False
    rows, columns = _segments(formula)
    return not _reads(rows, -1) and not _reads(columns, -2)


def _reads(table: Table, dim: int) -> bool:
    """Whether the elements depend on that index."""
    return any(form.coefficients[dim] != 0 for form in table.indices)


def _has_data(formula: Formula) -> bool:
    return formula.op in ("data", *_OF_TABLES) or any(isinstance(part, Formula) and _has_data(part) for part in formula.parts)


def _on_diagonal(formula: Formula) -> Formula:
    """Put the row for the column."""

    def change(form: Affine) -> Affine:
        *others, row, column = form.coefficients
        return Affine((*others, row + column, sympy.Integer(0)), form.constant, form.integral)

    found = _map_forms(formula, change)
    assert isinstance(found, Formula)
    return found


def _causal(ndim: int) -> Formula:
    zero, one = sympy.Integer(0), sympy.Integer(1)
    return Formula("ge0", (Affine((zero,) * (ndim - 2) + (one, -one), zero),))


def _describe(formula: Formula, ndim: int) -> str:
    if formula.op == "ge0":
        form = formula.parts[0]
        names = [f"i{d}" for d in range(ndim - 2)] + ["row", "column"]
        terms = [f"{c}*{n}" for c, n in zip(form.coefficients, names, strict=True) if c != 0]
        return f"{' + '.join(terms)} + {form.constant} >= 0".replace("+ -", "- ").replace("1*", "").replace(" + 0", "")
    if formula.op in ("true", "false", "data", *_OF_TABLES):
        return formula.op
    inner = [_describe(part, ndim) for part in formula.parts]
    return f"not ({inner[0]})" if formula.op == "not" else "(" + f" {formula.op} ".join(inner) + ")"


def _attended(choice: Choice, dtype: torch.dtype) -> Formula:
    """Return where an additive mask adds zero, given that elsewhere it adds minus infinity or the lowest number of a dtype.

    Next to a score that is attended, either leaves a weight of exactly zero.
    """
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min) if dtype.is_floating_point else float("-inf")

    def hides(number: sympy.Expr) -> bool:
        return float(number) <= lowest

    if choice.yes == 0 and hides(choice.no):
        return choice.formula
    if choice.no == 0 and hides(choice.yes):
        return _negate(choice.formula)
    raise _Unknown("an additive mask of other numbers than 0 and -inf")


# Formulas.


def _negate(formula: Formula) -> Formula:
    if formula.op == "data":
        return DATA
    if formula.op == "not":
        return formula.parts[0]
    if formula.op in _OF_TABLES:
        return Formula("not", (formula,))
    if formula.op in ("true", "false"):
        return FALSE if formula.op == "true" else TRUE
    if formula.op == "ge0":  # over the integers, not (f >= 0) is -f - 1 >= 0
        form = formula.parts[0]
        return Formula("ge0", (Affine(tuple(-c for c in form.coefficients), -form.constant - 1),))
    return Formula("or" if formula.op == "and" else "and", tuple(_negate(part) for part in formula.parts))


def _join(op: str, *parts: Formula) -> Formula:
    flat: list[Formula] = []
    for part in parts:
        flat.extend(part.parts if part.op == op else (part,))
    absorbing, neutral = (FALSE, TRUE) if op == "and" else (TRUE, FALSE)
    flat = [part for part in dict.fromkeys(flat) if part != neutral]
    if absorbing in flat:
        return absorbing
    return neutral if not flat else flat[0] if len(flat) == 1 else Formula(op, tuple(flat))


def _simplify(formula: Formula, shape: tuple[sympy.Expr, ...]) -> Formula:
    """Drop comparisons that hold, or fail, for every index within the shape."""
    if formula.op in ("and", "or"):
        return _join(formula.op, *(_simplify(part, shape) for part in formula.parts))
    if formula.op == "not":
        return _negate(_simplify(formula.parts[0], shape))
    if formula.op in _OF_TABLES:
        return TRUE if formula.parts[0] == formula.parts[1] else formula
    if formula.op == "ge0" and (reach := _reach(formula.parts[0], shape)):
        low, high = reach
        if _never_negative(low):
            return TRUE
        if _never_negative(-high - 1):
            return FALSE
    return formula


def _reach(form: Affine, shape: tuple[sympy.Expr, ...]) -> tuple[sympy.Expr, sympy.Expr] | None:
    """Return the least and the greatest value of a form for indices within the shape; `None` if a coefficient is no number."""
    low = high = form.constant
    for coefficient, size in zip(form.coefficients, shape, strict=True):
        if not coefficient.is_Integer:
            return None
        reach = coefficient * (size - 1)
        low, high = (low, high + reach) if coefficient > 0 else (low + reach, high)
    return low, high


def _never_negative(expr: sympy.Expr) -> bool:
    """Whether an expression affine in sizes is >= 0 for all sizes >= 1."""
    symbols = sorted(expr.free_symbols, key=str)
    shifted = sympy.expand(expr.subs({symbol: symbol + 1 for symbol in symbols}, simultaneous=True))
    terms = shifted.as_coefficients_dict()
    if any(not (term == 1 or term in symbols) for term in terms):
        return False
    return all(coefficient >= 0 for coefficient in terms.values())


def _map_forms(value: Value, change: Callable[[Affine], Affine]) -> Value:
    if isinstance(value, Affine):
        return change(value)
    if isinstance(value, Choice):
        formula = _map_forms(value.formula, change)
        assert isinstance(formula, Formula)
        return Choice(formula, value.yes, value.no)
    if isinstance(value, Table):
        return Table(value.node, tuple(map(change, value.indices)))
    return Formula(value.op, tuple(_map_forms(part, change) for part in value.parts))


class _Interpreter:
    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self._known: dict[fx.Node, Value] = {}

    def shape(self, node: fx.Node) -> tuple[sympy.Expr, ...]:
        return self.captured.shape(node.meta["val"])

    def value(self, node: Any) -> Value:
        """Return a node's or a number's abstract value; an affine form has one coefficient a dimension of the tensor."""
        if not isinstance(node, fx.Node):
            return self._number(node, 0)
        if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat)):
            return Affine((), self.captured.expr(node.meta["val"]), isinstance(node.meta["val"], torch.SymInt))
        if node not in self._known:
            self._known[node] = _map_forms(self._evaluated(node), _over(self.shape(node)))
        return self._known[node]

    def _evaluated(self, node: fx.Node) -> Value:
        try:
            return self._evaluate(node)
        except _Unknown:
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.is_complex():
                raise
            if value.dtype is torch.bool:
                return DATA
            places = (tuple(sympy.Integer(dim == own) for dim in range(value.ndim)) for own in range(value.ndim))
            return Table(node, tuple(Affine(place, sympy.Integer(0)) for place in places))

    def _number(self, number: Any, ndim: int) -> Value:
        if isinstance(number, bool):
            return TRUE if number else FALSE
        integral = isinstance(number, int)
        if not isinstance(number, (int, float)):
            raise _Unknown(f"a {type(number).__name__}")
        # sympy holds 0.0 and 0 for different numbers
        constant = sympy.Integer(int(number)) if integral or float(number).is_integer() else sympy.sympify(number)
        return Affine((sympy.Integer(0),) * ndim, constant, integral)

    def _evaluate(self, node: fx.Node) -> Value:
        if node.op == "get_attr":
            constant = getattr(self.captured.owner, str(node.target))
            if isinstance(constant, torch.Tensor) and constant.numel() == 1:
                return self._number(constant.item(), constant.ndim)
        rule = _OPERATORS.get(node.target) if node.op == "call_function" else None
        if rule is None:
            raise _Unknown(str(node.target) if node.op == "call_function" else "it depends on the batch")
        return rule(self, node)

    def aligned(self, node: fx.Node, *operands: Any) -> list[Value]:
        """Return operands broadcast to the node's shape."""
        ndim = len(self.shape(node))
        return [self._broadcast(operand, ndim) for operand in operands]

    def _broadcast(self, operand: Any, ndim: int) -> Value:
        return _map_forms(self.value(operand), lambda f: _lengthened(f, ndim))


def _over(shape: tuple[sympy.Expr, ...]) -> Callable[[Affine], Affine]:
    """Forget coefficients of dimensions of size 1, whose index is always 0: they may be expanded later."""
    zero = sympy.Integer(0)

    def change(form: Affine) -> Affine:
        kept = tuple(zero if size == 1 else c for c, size in zip(form.coefficients, shape, strict=True))
        return Affine(kept, form.constant, form.integral)

    return change


def _lengthened(form: Affine, ndim: int) -> Affine:
    missing = ndim - len(form.coefficients)
    return Affine((sympy.Integer(0),) * missing + form.coefficients, form.constant, form.integral)


def _constant(value: Value) -> sympy.Expr:
    if isinstance(value, Affine) and value.is_constant:
        return value.constant
    raise _Unknown("a computed number")


def _as_formula(value: Value) -> Formula:
    if isinstance(value, Formula):
        return value
    if isinstance(value, Affine) and value.is_constant:
        return FALSE if value.constant == 0 else TRUE
    if isinstance(value, Choice) and (value.yes, value.no) == (1, 0):
        return value.formula
    raise _Unknown("a number used as a truth value")


def _as_choice(value: Value) -> Choice:
    if isinstance(value, Choice):
        return value
    if isinstance(value, Formula):
        return Choice(value, sympy.Integer(1), sympy.Integer(0))
    return Choice(TRUE, _constant(value), _constant(value))


# Operators. Each takes the interpreter and the node.


def _add(sign: int) -> Any:
    def rule(run: _Interpreter, node: fx.Node) -> Value:
        left, right = run.aligned(node, node.args[0], node.args[1])
        if node.kwargs.get("alpha", 1) != 1:
            raise _Unknown("an addition with a factor")
        if isinstance(left, Affine) and isinstance(right, Affine):
            coefficients = tuple(a + sign * b for a, b in zip(left.coefficients, right.coefficients, strict=True))
            return Affine(coefficients, left.constant + sign * right.constant, left.integral and right.integral)
        if isinstance(right, Affine) and isinstance(left, (Choice, Formula)):
            choice, shift = _as_choice(left), sign * _constant(right)
            return Choice(choice.formula, choice.yes + shift, choice.no + shift)
        if isinstance(left, Affine) and sign < 0:  # 1 - mask
            choice, base = _as_choice(right), _constant(left)
            return Choice(choice.formula, base - choice.yes, base - choice.no)
        raise _Unknown("a sum of masks")

    return rule


def _mul(run: _Interpreter, node: fx.Node) -> Value:
    left, right = run.aligned(node, node.args[0], node.args[1])
    if isinstance(left, Formula) and isinstance(right, Formula):
        return _join("and", left, right)
    if isinstance(left, Affine) and left.is_constant:
        left, right = right, left
    if isinstance(right, Affine) and right.is_constant:
        factor = right.constant
        if isinstance(left, Affine):
            return Affine(tuple(c * factor for c in left.coefficients), left.constant * factor, left.integral and right.integral)
        choice = _as_choice(left)
        products = choice.yes * factor, choice.no * factor
        if sympy.nan in products:
            raise _Unknown("infinity times zero")
        return Choice(choice.formula, *products)
    first, second = _as_choice(left), _as_choice(right)
    if (second.yes, second.no) == (1, 0) and first.no == 0 and first.yes.is_finite:
        return Choice(_join("and", first.formula, second.formula), first.yes, sympy.Integer(0))
    raise _Unknown("a product of masks")


def _compare(make: Callable[[Any, Any], Formula]) -> Any:
    def rule(run: _Interpreter, node: fx.Node) -> Value:
        left, right = run.aligned(node, node.args[0], node.args[1])
        if isinstance(left, Affine) and isinstance(right, Affine):
            if not (left.integral and right.integral):
                raise _Unknown("a comparison of fractions")
            width = max(len(left.coefficients), len(right.coefficients))
            return make(_lengthened(left, width), _lengthened(right, width))
        if isinstance(left, Table) and isinstance(right, Table):
            return make(left, right)
        formula = _as_formula(left)
        if node.target in (aten.eq.Tensor, aten.eq.Scalar):
            other = _as_formula(right)
        elif node.target in (aten.ne.Tensor, aten.ne.Scalar):
            other = _negate(_as_formula(right))
        else:
            raise _Unknown("an ordering of truth values")
        return formula if other == TRUE else _negate(formula) if other == FALSE else _equal_truth(formula, other)

    return rule


def _equal_truth(left: Formula, right: Formula) -> Formula:
    if left == right and not _has_data(left):
        return TRUE
    raise _Unknown("a comparison of masks")


Numbers = TypeVar("Numbers", Affine, Table)


def _ge(left: Numbers, right: Numbers) -> Formula:
    return Formula("at_most", (right, left)) if isinstance(left, Table) else _minus(left, right)


def _eq(left: Numbers, right: Numbers) -> Formula:
    return Formula("same", (left, right)) if isinstance(left, Table) else _join("and", _ge(left, right), _ge(right, left))


def _minus(left: Affine, right: Affine) -> Formula:
    """`left - right >= 0`; decided at once when it is a number."""
    coefficients = tuple(a - b for a, b in zip(left.coefficients, right.coefficients, strict=True))
    form = Affine(coefficients, sympy.expand(left.constant - right.constant))
    if form.is_constant and form.constant.is_Integer:
        return TRUE if form.constant >= 0 else FALSE
    return Formula("ge0", (form,))


def _logic(op: str) -> Any:
    def rule(run: _Interpreter, node: fx.Node) -> Value:
        left, right = run.aligned(node, node.args[0], node.args[1])
        return _join(op, _as_formula(left), _as_formula(right))

    return rule


def _not(run: _Interpreter, node: fx.Node) -> Value:
    return _negate(_as_formula(run.value(node.args[0])))


def _where(run: _Interpreter, node: fx.Node) -> Value:
    condition, yes, no = run.aligned(node, *node.args[:3])
    formula = _as_formula(condition)
    if isinstance(yes, Formula) and isinstance(no, Formula):
        return _join("or", _join("and", formula, yes), _join("and", _negate(formula), no))
    other = _constant(no)
    if isinstance(yes, Choice) and yes.no == other:
        return Choice(_join("and", formula, yes.formula), yes.yes, other)
    return Choice(formula, _constant(yes), other)


def _masked_fill(run: _Interpreter, node: fx.Node) -> Value:
    base, mask, number = run.aligned(node, *node.args[:3])
    formula = _as_formula(mask)
    if isinstance(base, Formula):
        filled = _as_formula(number)
        return _join("or", _join("and", formula, filled), _join("and", _negate(formula), base))
    constant = _constant(number)
    choice = _as_choice(base)
    if choice.no == constant:
        return Choice(_join("and", choice.formula, _negate(formula)), choice.yes, choice.no)
    if choice.formula == TRUE:
        return Choice(_negate(formula), choice.yes, constant)
    raise _Unknown("a mask filled with a third number")


def _arange(run: _Interpreter, node: fx.Node) -> Value:
    numbers = [_constant(run.value(a)) for a in node.args]
    start = numbers[0] if len(numbers) > 1 else sympy.Integer(0)
    step = numbers[2] if len(numbers) > 2 else sympy.Integer(1)
    return Affine((step,), start, not node.meta["val"].is_floating_point())


def _filled(position: int | None, number: Any = None) -> Any:
    def rule(run: _Interpreter, node: fx.Node) -> Value:
        fill = run.value(node.args[position] if position is not None else number)
        ndim = len(run.shape(node))
        if node.meta["val"].dtype is torch.bool:
            return _as_formula(fill)
        if isinstance(fill, Formula):
            fill = run._number(int(fill == TRUE), 0)
        return Affine((sympy.Integer(0),) * ndim, _constant(fill), not node.meta["val"].is_floating_point())

    return rule


def _same(run: _Interpreter, node: fx.Node) -> Value:
    return run.value(node.args[0])


def _cast(run: _Interpreter, node: fx.Node) -> Value:
    value, dtype = run.value(node.args[0]), node.meta["val"].dtype
    if dtype is torch.bool:
        return _as_formula(value)
    if isinstance(value, Formula):
        return _as_choice(value)
    if isinstance(value, Affine):
        if value.integral or not dtype.is_floating_point:
            integral = value.integral and not dtype.is_floating_point
            if not value.integral:
                raise _Unknown("a rounded number")
            return Affine(value.coefficients, value.constant, integral)
        return value
    if isinstance(value, Table) and torch.promote_types(value.node.meta["val"].dtype, dtype) != dtype:
        raise _Unknown("numbers that may not fit")
    return value


def _reindexed(order: Callable[[_Interpreter, fx.Node, int], list[int | None]]) -> Any:
    """A view that moves, adds (`None`) or drops dimensions of size 1."""

    def rule(run: _Interpreter, node: fx.Node) -> Value:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        places = order(run, node, len(run.shape(source)))

        def change(form: Affine) -> Affine:
            kept = tuple(sympy.Integer(0) if p is None else form.coefficients[p] for p in places)
            return Affine(kept, form.constant, form.integral)

        return _map_forms(run.value(source), change)

    return rule


def _unsqueeze_order(run: _Interpreter, node: fx.Node, ndim: int) -> list[int | None]:
    places: list[int | None] = list(range(ndim))
    places.insert(int(node.args[1]) % (ndim + 1), None)  # type: ignore[arg-type]
    return places


def _transpose_order(run: _Interpreter, node: fx.Node, ndim: int) -> list[int | None]:
    places: list[int | None] = list(range(ndim))
    first, second = (int(a) % ndim for a in node.args[1:3]) if len(node.args) > 2 else (0, ndim - 1)  # type: ignore[arg-type]
    places[first], places[second] = places[second], places[first]
    return places


def _permute_order(run: _Interpreter, node: fx.Node, ndim: int) -> list[int | None]:
    return [int(d) % ndim for d in node.args[1]]  # type: ignore[union-attr, arg-type]


def _expand_order(run: _Interpreter, node: fx.Node, ndim: int) -> list[int | None]:
    return [None] * (len(run.shape(node)) - ndim) + list(range(ndim))


def _view_order(run: _Interpreter, node: fx.Node, ndim: int) -> list[int | None]:
    """A view or squeeze that only adds or drops dimensions of size 1."""
    old, new = run.shape(node.args[0]), run.shape(node)  # type: ignore[arg-type]
    kept = [d for d in range(ndim) if old[d] != 1]
    if [old[d] for d in kept] != [size for size in new if size != 1]:
        raise _Unknown("a view that merges or splits dimensions")
    rest = iter(kept)
    return [None if size == 1 else next(rest) for size in new]


def _slice(run: _Interpreter, node: fx.Node) -> Value:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = (int(node.args[1]) if len(node.args) > 1 else 0) % len(run.shape(source))  # type: ignore[arg-type]
    start = _constant(run.value(node.args[2])) if len(node.args) > 2 and node.args[2] is not None else sympy.Integer(0)
    step = node.args[4] if len(node.args) > 4 else 1
    if start.is_Integer and start < 0:
        start = run.shape(source)[dim] + start
    return _map_forms(run.value(source), lambda form: _moved(form, dim, start, step))


def _moved(form: Affine, dim: int, start: sympy.Expr, step: Any = 1) -> Affine:
    """Substitute `start + step * index` for an index."""
    coefficient = form.coefficients[dim]
    coefficients = form.coefficients[:dim] + (coefficient * step,) + form.coefficients[dim + 1 :]
    return Affine(coefficients, sympy.expand(form.constant + coefficient * start), form.integral)


def _select(run: _Interpreter, node: fx.Node) -> Value:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    dim = int(node.args[1]) % len(run.shape(source))  # type: ignore[arg-type]
    index = _constant(run.value(node.args[2]))
    if index.is_Integer and index < 0:
        index = run.shape(source)[dim] + index

    def change(form: Affine) -> Affine:
        moved = _moved(form, dim, index)
        return Affine(moved.coefficients[:dim] + moved.coefficients[dim + 1 :], moved.constant, moved.integral)

    return _map_forms(run.value(source), change)


def _cat(run: _Interpreter, node: fx.Node) -> Value:
    pieces = node.args[0]
    ndim = len(run.shape(node))
    dim = (int(node.args[1]) if len(node.args) > 1 else 0) % ndim  # type: ignore[arg-type]
    return _catenated(run, list(pieces), dim)  # type: ignore[arg-type]


def _catenated(run: _Interpreter, pieces: list[fx.Node], dim: int) -> Value:
    """One affine form for all pieces: the longest piece's, which every piece of one position has to agree with."""
    offset, placed = sympy.Integer(0), []
    for piece in pieces:
        size = run.shape(piece)[dim]
        placed.append((offset, size, run.value(piece)))
        offset = offset + size
    base_offset, _, base = next((p for p in placed if p[1].free_symbols), placed[0])
    whole = _map_forms(base, lambda form: _moved(form, dim, -base_offset))
    for start, size, value in placed:
        own = _map_forms(value, functools.partial(_moved, dim=dim, start=-start))
        if own == whole:
            continue
        if size == 1 and isinstance(whole, Affine) and isinstance(value, Affine):
            here = _moved(Affine(_without(whole, dim), whole.constant, whole.integral), dim, sympy.Integer(0))
            at_start = sympy.expand(here.constant + whole.coefficients[dim] * start)
            if _without(value, dim) == _without(whole, dim) and sympy.expand(value.constant) == at_start:
                continue
        raise _Unknown("a concatenation of different functions")
    return whole


def _without(form: Affine, dim: int) -> tuple[sympy.Expr, ...]:
    return form.coefficients[:dim] + (sympy.Integer(0),) + form.coefficients[dim + 1 :]


def _diff(run: _Interpreter, node: fx.Node) -> Value:
    given: dict[str, Any] = dict(zip(("self", "n", "dim", "prepend", "append"), node.args, strict=False)) | dict(node.kwargs)
    source = given["self"]
    ndim = len(run.shape(node))
    dim = int(given.get("dim", -1)) % ndim
    pieces = [p for p in (given.get("prepend"), source, given.get("append")) if p is not None]
    value = _catenated(run, pieces, dim)
    if given.get("n", 1) != 1 or not isinstance(value, Affine):
        raise _Unknown("a difference of a mask")
    return Affine((sympy.Integer(0),) * ndim, value.coefficients[dim], value.integral)


def _cumsum(run: _Interpreter, node: fx.Node) -> Value:
    value = run.value(node.args[0])
    ndim = len(run.shape(node))
    number = sympy.Integer(0 if value == FALSE else 1) if isinstance(value, Formula) else _constant(value)
    if value not in (TRUE, FALSE) and isinstance(value, Formula):
        raise _Unknown("a running sum of a mask")
    dim = int(node.args[1]) % ndim  # type: ignore[arg-type]
    coefficients = [sympy.Integer(0)] * ndim
    coefficients[dim] = number
    return Affine(tuple(coefficients), number, not node.meta["val"].is_floating_point())


def _index(run: _Interpreter, node: fx.Node) -> Value:
    """`table[i, j]` with an affine index for every dimension: substitute the indices."""
    table, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(table, fx.Node)
    ndim = len(run.shape(table))
    if len(indices) != ndim or any(index is None for index in indices):
        raise _Unknown("an index that keeps dimensions")
    forms = run.aligned(node, *indices)
    for form in forms:
        if not isinstance(form, Affine) or not (reach := _reach(form, run.shape(node))) or not _never_negative(reach[0]):
            raise _Unknown("an index that is not affine, or may count from the end")

    def change(form: Affine) -> Affine:
        total = Affine((sympy.Integer(0),) * len(run.shape(node)), form.constant, form.integral)
        for coefficient, index in zip(form.coefficients, forms, strict=True):
            assert isinstance(index, Affine)
            summed = tuple(a + coefficient * b for a, b in zip(total.coefficients, index.coefficients, strict=True))
            total = Affine(summed, total.constant + coefficient * index.constant, form.integral)
        return total

    return _map_forms(run.value(table), change)


def _item(run: _Interpreter, node: fx.Node) -> Value:
    raise _Unknown("one of several outputs")


_OPERATORS: dict[Any, Callable[[_Interpreter, fx.Node], Value]] = {
    operator.getitem: _item,
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.zeros.default: _filled(None, 0),
    aten.zeros_like.default: _filled(None, 0),
    aten.new_zeros.default: _filled(None, 0),
    aten.ones.default: _filled(None, 1),
    aten.ones_like.default: _filled(None, 1),
    aten.new_ones.default: _filled(None, 1),
    aten.full.default: _filled(1),
    aten.full_like.default: _filled(1),
    aten.new_full.default: _filled(2),
    aten.scalar_tensor.default: _filled(0),
    aten.add.Tensor: _add(1),
    aten.add.Scalar: _add(1),
    aten.sub.Tensor: _add(-1),
    aten.sub.Scalar: _add(-1),
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.__and__.Tensor: _logic("and"),
    aten.__or__.Tensor: _logic("or"),
    aten.bitwise_and.Tensor: _logic("and"),
    aten.bitwise_or.Tensor: _logic("or"),
    aten.logical_and.default: _logic("and"),
    aten.logical_or.default: _logic("or"),
    aten.logical_not.default: _not,
    aten.bitwise_not.default: _not,
    aten.where.self: _where,
    aten.where.ScalarSelf: _where,
    aten.where.ScalarOther: _where,
    aten.where.Scalar: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.masked_fill.Tensor: _masked_fill,
    aten.diff.default: _diff,
    aten.cumsum.default: _cumsum,
    aten.cat.default: _cat,
    aten.index.Tensor: _index,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.unsqueeze.default: _reindexed(_unsqueeze_order),
    aten.transpose.int: _reindexed(_transpose_order),
    aten.t.default: _reindexed(_transpose_order),
    aten.permute.default: _reindexed(_permute_order),
    aten.expand.default: _reindexed(_expand_order),
    aten.view.default: _reindexed(_view_order),
    aten.reshape.default: _reindexed(_view_order),
    aten.squeeze.default: _reindexed(_view_order),
    aten.squeeze.dim: _reindexed(_view_order),
    **dict.fromkeys(
        [aten.clone.default, aten.detach.default, aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default],
        _same,
    ),
    **dict.fromkeys([aten._to_copy.default, aten.to.dtype, aten.to.device, aten.type_as.default], _cast),
}
for _name, _make in {
    "ge": _ge,
    "gt": lambda a, b: _negate(_ge(b, a)),
    "le": lambda a, b: _ge(b, a),
    "lt": lambda a, b: _negate(_ge(a, b)),
    "eq": _eq,
    "ne": lambda a, b: _negate(_eq(a, b)),
}.items():
    for _overload in ("Tensor", "Scalar"):
        _OPERATORS[getattr(getattr(aten, _name), _overload)] = _compare(_make)
