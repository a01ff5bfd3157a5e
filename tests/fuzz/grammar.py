"""The grammar: operators over values whose shapes are known in terms of batch, lengths and constants.

A `Builder` runs every instruction it adds at several sizes of batch and sequences. A dimension's `Size` is the tuple of what it
came to: two dimensions are the same expression if their sizes are equal, and which of batch and sequence a size follows shows
in where it changes. No shape has to be inferred, and an instruction that fails is not added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from fuzz.program import INPUTS, VOCABULARY, Header, Instruction, Program, render, scope

__all__ = ["DRAWN", "Builder", "Gene", "build"]

T = TypeVar("T")
Size = tuple[int, ...]
Operator = Callable[["Builder"], "str | tuple[str, int]"]

MAX_ELEMENTS = 20_000
MAX_VALUE = 1e3
MAX_SINKS = 4


class InapplicableError(ValueError):
    """No value fits the operator."""


@dataclass(frozen=True)
class Gene:
    """An operator and the choices it is made with; choice 0 is the simplest, choices beyond the options wrap around."""

    operator: str
    choices: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the program, run at several sizes. It formats as its name."""

    name: str
    number: int
    """-1 for an input."""
    tensors: tuple[Tensor, ...]

    def __str__(self) -> str:
        return self.name

    @property
    def shape(self) -> tuple[Size, ...]:
        return tuple(zip(*(t.shape for t in self.tensors), strict=True))

    @property
    def ndim(self) -> int:
        return self.tensors[0].ndim

    @property
    def roles(self) -> str:
        """A letter for every dimension: `c`onstant, `b`atch, `s`equence, `m`erged batch and sequence."""
        return "".join(role(size) for size in self.shape)

    @property
    def is_float(self) -> bool:
        return self.tensors[0].is_floating_point()

    @property
    def is_bool(self) -> bool:
        return self.tensors[0].dtype is torch.bool

    def size(self, dim: int) -> int:
        return self.tensors[0].shape[dim]


SIZES = ((0, 0, 0), (0, 5, 0), (0, 11, 0), (0, 0, 5), (0, 0, 7), (1, 0, 0))
"""What is added to batch, length and other length for every run."""


def role(size: Size) -> str:
    follows_batch, follows_sequence = size[5] != size[0], len(set(size[:5])) > 1
    return {(False, False): "c", (True, False): "b", (False, True): "s", (True, True): "m"}[follows_batch, follows_sequence]


class Builder:
    """Adds instructions. Operators use its methods to choose values and options."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.instructions: list[Instruction] = []
        self.values: list[Value] = []
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.scopes = [{**scope(), "net": nn.Module()} for _ in SIZES]
        self.inputs = {name: self._input(name) for name in INPUTS}
        self._choices: list[int] = []
        self._operands: list[int] = []
        self._ordered = False

    def _input(self, name: str) -> Value:
        tensors = []
        for names, (more_batch, more, more_other) in zip(self.scopes, SIZES, strict=True):
            batch, length = self.header.batch + more_batch, self.header.length + more
            if name == "other":
                length = self.header.other_length + more_other
            sizes = (batch, length) if self.header.sequence_dim == 1 else (length, batch)
            generator = torch.Generator().manual_seed(self.header.seed)
            if name == "features":
                value = torch.randn(*sizes, 3, generator=generator, dtype=torch.float64)
            elif name == "bias":
                value = torch.randn(*sizes, length, generator=generator, dtype=torch.float64)
            else:
                value = torch.randint(0, VOCABULARY, sizes, generator=generator)
            names[name] = value
            tensors.append(value)
        return Value(name, -1, tuple(tensors))

    # What operators use.

    def pick(self, options: Sequence[T]) -> T:
        if not options:
            raise InapplicableError
        choice = self._choices.pop(0) if self._choices else 0
        return options[choice % len(options)]

    def value(self, fits: Callable[[Value], bool] = lambda v: v.is_float, *, inputs: bool = False) -> Value:
        """Pick a value, the latest first."""
        values = [v for v in reversed(self.values) if fits(v)]
        values += [v for v in self.inputs.values() if inputs and fits(v)]
        return self.use(self.pick(values))

    def pair(self, fits: Callable[[Value, Value], bool]) -> tuple[Value, Value]:
        """Pick two values of floating point that fit each other, the latest first."""
        values = [v for v in reversed(self.values) if v.is_float]
        x, y = self.pick([(x, y) for x in values for y in values if fits(x, y)])
        return self.use(x), self.use(y)

    def use(self, value: Value) -> Value:
        if value.number >= 0:
            self._operands.append(value.number)
        return value

    def input(self, name: str) -> Value:
        return self.inputs[name]

    def dim(self, value: Value, roles: str = "s") -> int:
        """Pick a dimension of one of the roles."""
        return self.pick([d for d, r in enumerate(value.roles) if r in roles])

    def written(self, value: Value, dim: int) -> int:
        """Pick how a dimension is written: from the first or from the last."""
        return self.pick([dim, dim - value.ndim])

    def parameter(self, *shape: int) -> str:
        """Return a parameter of that shape, shared with all others who ask for it."""
        name = "p" + "x".join(str(size) for size in shape)
        if name not in self.parameters:
            self.parameters[name] = shape
            weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(len(self.parameters))).double() * 0.5)
            for names in self.scopes:
                names["net"].register_parameter(name, weight)
        return f"net.{name}"

    def aligned(self, value: Value, to: Value) -> str | None:
        """Return `value` with dimensions inserted so that it broadcasts to `to`, or nothing if it does not."""
        left, index = list(value.shape), []
        for size in reversed(to.shape):
            if left and left[-1] in (size, (1,) * len(SIZES)):
                left.pop()
                index.append(":")
            else:
                index.append("None")
        if left:
            return None
        while index and index[-1] == "None":  # leading dimensions broadcast by themselves
            index.pop()
        return f"{value}[{', '.join(reversed(index))}]" if "None" in index else str(value)

    def sizes(self, text: str) -> Size:
        """Return what an expression of sizes comes to in every run."""
        return tuple(eval(text, names) for names in self.scopes)

    def ordered(self) -> None:
        """Say that the result depends on how elements compare."""
        self._ordered = True

    # Building.

    def add(self, gene: Gene) -> bool:
        """Add an instruction, if its operator fits any value and it runs."""
        self._choices, self._operands, self._ordered = list(gene.choices), [], False
        try:
            made = OPERATORS[gene.operator](self)
            code, num_results = made if isinstance(made, tuple) else (made, 1)
            return self._append(Instruction(gene.operator, tuple(self._operands), code, num_results, self._ordered))
        except InapplicableError:
            return False

    def _append(self, one: Instruction) -> bool:
        first = len(self.values)
        code = compile(render(one, first), "<instruction>", "exec")
        numbers = range(first, first + one.num_results)
        results: list[tuple[Tensor, ...]] = []
        try:
            for names in self.scopes:
                with torch.no_grad():
                    exec(code, names)
                results.append(tuple(names[f"v{number}"] for number in numbers))
        except Exception:  # noqa: BLE001 -- a program that does not run on one device is no program
            return False
        found = [Value(f"v{number}", number, tensors) for number, tensors in zip(numbers, zip(*results, strict=True), strict=True)]
        if not all(self._is_usable(value) for value in found):
            return False
        if one.ordered and not self._is_stable(one, found):
            return False
        self.values += found
        self.instructions.append(one)
        return True

    def _is_stable(self, one: Instruction, results: Sequence[Value]) -> bool:
        names = dict(self.scopes[0])
        exec(render(one, results[0].number, jitter=True), names)
        return all(value.is_float or torch.equal(names[value.name], value.tensors[0]) for value in results)

    def _is_usable(self, value: Value) -> bool:
        if not all(isinstance(t, Tensor) for t in value.tensors) or len({t.ndim for t in value.tensors}) > 1:
            return False
        if len({t.dtype for t in value.tensors}) > 1 or value.tensors[0].dtype in (torch.float32, torch.complex128):
            return False
        if any(t.numel() > MAX_ELEMENTS or t.numel() == 0 for t in value.tensors):
            return False
        if any(r != "c" and value.size(d) < 2 and r != "b" for d, r in enumerate(value.roles)):
            return False
        if value.is_bool or not value.is_float:
            return True
        return all(t.isfinite().all() and t.abs().max() < MAX_VALUE for t in value.tensors)

    def sinks(self) -> list[Value]:
        """Return the values nobody reads, the latest first."""
        read = {number for one in self.instructions for number in one.operands}
        return [v for v in reversed(self.values) if v.number not in read]


def build(header: Header, genes: Sequence[Gene], tail: tuple[int, ...]) -> Program:
    """Make a program of a list of genes; what does not fit is left out.

    Args:
        header: What to run it with.
        genes: Its operators, in order.
        tail: Choices for what is returned.
    """
    b = Builder(header)
    b.add(Gene("embedding", tail[:3]))
    for gene in genes:
        b.add(gene)
    sinks = b.sinks()
    returned = [v for v in sinks if not v.is_float][:2]
    floats = [v for v in sinks if v.is_float][:MAX_SINKS] or b.values[:1]
    choices = list(tail) + [0] * (2 * len(floats) + 1)
    terms = [b.values[-1].number for value in floats if b.add(Gene("term", (value.number, choices.pop(0))))]
    if not terms:  # all of them too large to compare
        assert b.add(Gene("term", (b.values[0].number, 0)))
        terms = [b.values[-1].number]
    b.add(Gene("total", tuple(terms)))
    loss = b.values[-1]
    returned += [value for value in floats if choices.pop(0) % 2]
    outputs = (loss.number, *(value.number for value in returned))
    return Program(tuple(b.instructions), outputs, tuple(b.parameters.items()), header).prune()


OPERATORS: dict[str, Operator] = {}


def operator(function: Operator) -> Operator:
    OPERATORS[function.__name__.rstrip("_")] = function
    return function


# What values operators want.


def is_sequence(v: Value) -> bool:
    return v.is_float and "s" in v.roles


def has_features(v: Value) -> bool:
    return v.is_float and v.roles[-1:] == "c" and 1 < v.size(-1) <= 12


def is_tokens(v: Value) -> bool:
    """Batch, sequence and features, the first two in any order."""
    return v.roles in ("bsc", "sbc") and has_features(v)


def index(dim: int, what: str) -> str:
    """Return an index that applies `what` to a dimension."""
    return "[" + ":, " * dim + what + "]"


def length(v: Value, dim: int) -> str:
    return f"{v}.shape[{dim}]"


def positions(v: Value, dim: int) -> str:
    """Return the positions along a dimension, shaped to broadcast."""
    trailing = v.ndim - 1 - dim
    return f"torch.arange({length(v, dim)})" + (f"[:{', None' * trailing}]" if trailing else "")


def transposed(dim: int, ndim: int, to: int = -1) -> str:
    """Return a call that swaps a dimension with another, or nothing if they are the same."""
    return "" if dim % ndim == to % ndim else f".transpose({dim}, {to})"


# Values.


@operator
def embedding(b: Builder) -> str:
    ids = b.pick([b.input("ids"), b.input("ids"), b.input("other")])
    table = b.parameter(VOCABULARY, b.header.width)
    code = f"F.embedding({ids}, {table})"
    if b.pick([True, True, False]):
        shape = length(ids, b.header.sequence_dim)
        code += f" + {b.parameter(64, b.header.width)}[:{shape}]" + ("[:, None]" if b.header.sequence_dim == 0 else "")
    return code


@operator
def features(b: Builder) -> str:
    return f"F.linear({b.input('features')}, {b.parameter(b.header.width, 3)})"


@operator
def one_hot(b: Builder) -> str:
    return f"F.one_hot({b.input('ids')}, {VOCABULARY}).double() @ {b.parameter(VOCABULARY, 4)}"


@operator
def tokens(b: Builder) -> str:
    """Integers computed from tokens; returned if nothing reads them."""
    ids = b.pick([b.input("ids"), b.input("labels"), b.input("other")])
    d = b.header.sequence_dim
    return b.pick(
        [
            f"{ids} + 0",
            f"{ids}{index(d, '1:')} * 2 % 5",
            f"{ids}.flip({d})",
            f"{ids}.sort({d}).values",
            f"{ids}.cumsum({d})",
            f"{ids}{index(d, '::2')}",
            f"F.one_hot({ids}, {VOCABULARY}).sum({d})",
            f"torch.arange({length(ids, d)}).flip(0)",
            f"{ids}.max()",
        ]
    )


@operator
def factory(b: Builder) -> str:
    v = b.value(lambda v: "s" in v.roles, inputs=True)
    n = length(v, b.dim(v))
    return b.pick(
        [
            f"torch.arange({n}).double() / 7",
            f"torch.ones({n}, {n}, dtype=torch.float64).tril() * {b.parameter(1)}",
            f"torch.full(({n},), 1 / {n}, dtype=torch.float64)",
            f"torch.linspace(0, 1, {n}, dtype=torch.float64)",
            f"torch.zeros({n}, 4, dtype=torch.float64) + {b.parameter(4)}",
            f"torch.eye({n}, dtype=torch.float64)",
            f"{b.parameter(64, 4)}[:{n}]",
            f"{b.parameter(1, 1, 4)}.expand(2, {n}, -1)",
        ]
    )


def new_mask(b: Builder) -> str:
    """Return a mask over batch and sequence, or over the sequence, from tokens or positions."""
    ids = b.pick([b.input("ids"), b.input("labels")])
    d = b.header.sequence_dim
    n = length(ids, d)
    return b.pick(
        [
            f"{ids} != 3",
            f"torch.arange({n}) % 3 == 0",
            f"torch.arange({n}) < {n} // 2",
            f"({ids} == 0).cumsum({d}) % 2 == 0",
            f"F.pad({ids}, {(1, 0) if d == 1 else (0, 0, 1, 0)})[{':-1' if d == 0 else ':, :-1'}] > 4",
            f"{ids}.flip({d}) > 5",
            f"{ids}.roll(1, {d}) != {ids}",
        ]
    )


@operator
def mask(b: Builder) -> str:
    n = length(b.input("ids"), b.header.sequence_dim)
    return b.pick([new_mask(b), f"torch.arange({n})[:, None] >= torch.arange({n})"])


def masked(b: Builder) -> tuple[Value, str]:
    """Return a value and a mask that broadcasts to it: one of the program's values, or a new one."""
    ids = b.input("ids")
    x = b.value(lambda v: v.is_float and v.ndim > 0 and (v.shape[:2] == ids.shape or (v.ndim < 3 and "s" in v.roles)))
    d = b.header.sequence_dim
    found = [v for v in reversed(b.values) if v.is_bool and b.aligned(v, x) is not None]
    if x.shape[:2] != ids.shape or (found and b.pick([True, False])):
        return x, str(b.aligned(b.use(b.pick(found)), x))
    trailing = f"[..., {', '.join(['None'] * (x.ndim - 2))}]" if x.ndim > 2 else ""
    new = new_mask(b)
    if new.startswith("torch.arange"):
        trailing = f"[:{', None' * (x.ndim - 1 - d)}]"
    return x, f"({new}){trailing}"


@operator
def compare(b: Builder) -> str:
    b.ordered()
    x = b.value(is_sequence)
    d = b.dim(x)
    return b.pick([f"{x} > 0.1", f"{x} < {x}.mean()", f"{x} > {x}.mean({d}, keepdim=True)", f"({x} > 0).any({d})"])


# Pointwise.


@operator
def unary(b: Builder) -> str:
    x = b.value()
    return b.pick(
        [
            f"{x}.tanh()",
            f"{x}.sin()",
            f"F.gelu({x})",
            f"{x}.sigmoid()",
            f"F.silu({x})",
            f"F.relu({x})",
            f"{x}.abs()",
            f"-{x}",
            f"{x}.clamp(-0.5, 0.5)",
            f"(1 + {x} ** 2).sqrt()",
            f"{x}.square().log1p()",
            f"{x}.tanh().exp()",
            f"1 / (2 + {x}.cos())",
            f"F.dropout({x}, 0.5, training=False)",
            f"{x}.detach() * {x}",
            f"{x}.contiguous()",
            f"F.softplus({x})",
            f"torch.atan2({x}, {x}.square() + 1)",
        ]
    )


@operator
def scalar(b: Builder) -> str:
    x = b.value()
    scale = b.parameter()
    options = [f"{x} * 1.5", f"{x} + 1", f"{x} * {scale}", f"2 - {x}", f"{x} / 3", f"{x} * ({scale} + 1).sigmoid()"]
    if "s" in x.roles:
        n = length(x, b.dim(x))
        options += [f"{x} / {n}", f"{x} * {n} ** -0.5", f"{x} + {n} % 3", f"{x} * min({n}, 4) * 0.3"]
        options += [f"{x} * 2 if {n} > 12 else {x}.sin()"]
    return b.pick(options)


@operator
def weigh(b: Builder) -> str:
    x = b.value(has_features)
    c = x.size(-1)
    return b.pick([f"{x} * {b.parameter(c)}", f"{x} + {b.parameter(1, c)}", f"{x} - {b.parameter(1, 1, c)}.tanh()"])


@operator
def by_position(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.dim(x)
    at = positions(x, d)
    return b.pick(
        [
            f"{x} * {at}.double().cos()",
            f"torch.where({at} % 2 == 0, {x}, {x} * 3)",
            f"torch.where({at} < 4, {x}, 0.5)",
            f"{x}.masked_fill({at} == {length(x, d)} - 1, 0.25)",
            f"{x} * ({at} + 1) * 0.125",
            f"{x} * {b.parameter(4)}[torch.bucketize({at}, torch.tensor([2, 5, 9]))]",
            f"{x} + {b.parameter(64)}[{at}]",
            f"{x} - {b.parameter(64)}[{length(x, d)} - {at}]",
        ]
    )


@operator
def rotary(b: Builder) -> str:
    """Pairs of features turned by an angle that grows with the position."""
    x = b.value(lambda v: is_sequence(v) and has_features(v) and v.size(-1) % 2 == 0)
    half = x.size(-1) // 2
    d = b.dim(x)
    trailing = x.ndim - 2 - d
    angle = f"angle = torch.arange({length(x, d)})[:, None] * torch.linspace(1, 0.1, {half}, dtype=torch.float64)"
    at = f"[:{', None' * trailing}]" if trailing else ""
    if b.pick([False, False, True]):
        pairs = f"torch.view_as_complex({x}.unflatten(-1, (-1, 2)).contiguous())"
        return f"{angle}\n$ = torch.view_as_real({pairs} * torch.polar(torch.ones_like(angle), angle){at}).flatten(-2)"
    first, second = f"{x}[..., :{half}]", f"{x}[..., {half}:]"
    lines = [angle, f"cos, sin = angle.cos(){at}, angle.sin(){at}"]
    return "\n".join([*lines, f"$ = torch.cat([{first} * cos - {second} * sin, {second} * cos + {first} * sin], -1)"])


@operator
def binary(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.ndim > 0)
    y = b.value(lambda v: v.is_float and b.aligned(v, x) is not None)
    other = b.aligned(y, x)
    return b.pick(
        [
            f"{x} + {other}",
            f"{x} * {other}",
            f"{x} - {other} * 0.5",
            f"torch.maximum({x}, {other} + 0.1)",
            f"{x} / ({other}.square() + 1)",
            f"torch.where({other} > 0.2, {x}, {other})",
            f"torch.lerp({x}, {other}.expand_as({x}), 0.3)",
            f"torch.addcmul({x}, {x}, {other}, value=0.5)",
        ]
    )


@operator
def where(b: Builder) -> str:
    x, m = masked(b)
    return b.pick([f"torch.where({m}, {x}, -{x})", f"{x}.masked_fill({m}, 0.5)", f"{x} * ({m})"])


@operator
def outer(b: Builder) -> str:
    """Every position with every other."""
    x = b.value(lambda v: is_sequence(v) and v.ndim <= 3)
    d = b.dim(x)
    code = f"{x}.unsqueeze({d}) {b.pick(['*', '+', '-'])} {x}.unsqueeze({d + 1})"
    return code if x.ndim < 3 else f"({code}).sin().sum(-1)"


# Features.


@operator
def linear(b: Builder) -> str:
    x = b.value(has_features)
    out = b.pick([x.size(-1), 4, 6, 1])
    weight = b.parameter(out, x.size(-1))
    return b.pick([f"F.linear({x}, {weight})", f"F.linear({x}, {weight}, {b.parameter(out)})", f"{x} @ {weight}.T"])


@operator
def norm(b: Builder) -> str:
    x = b.value(has_features)
    c = x.size(-1)
    options = [
        f"F.layer_norm({x}, ({c},))",
        f"F.layer_norm({x}, ({c},), {b.parameter(c)})",
        f"F.rms_norm({x}, ({c},))",
        f"F.normalize({x}, dim=-1)",
        f"{x} * torch.rsqrt({x}.square().mean(-1, keepdim=True) + 1e-3)",
    ]
    if x.ndim == 3 and c % 2 == 0:
        options += [
            f"F.group_norm({x}.transpose(1, 2), 2).transpose(1, 2)",
            f"F.batch_norm({x}.transpose(1, 2), None, None, training=True).transpose(1, 2)",
            f"F.instance_norm({x}.transpose(1, 2)).transpose(1, 2)",
        ]
    return b.pick(options)


@operator
def softmax(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.ndim > 0)
    d = b.written(x, b.dim(x, "sscb"))
    return b.pick([f"{x}.softmax({d})", f"{x}.log_softmax({d})", f"({x} * 0.5).exp() / {x}.exp().sum({d}, keepdim=True)"])


@operator
def gated(b: Builder) -> str:
    x = b.value(lambda v: has_features(v) and v.size(-1) % 2 == 0)
    half = x.size(-1) // 2
    return b.pick(
        [
            f"F.glu({x}, -1)",
            f"torch.cat([-{x}[..., {half}:], {x}[..., :{half}]], -1)",
            f"torch.mul(*{x}.chunk(2, -1))",
            f"torch.stack([-{x}[..., 1::2], {x}[..., ::2]], -1).flatten(-2)",
            f"sum(part.cos() for part in {x}.split({half}, -1))",
            f"torch.stack({x}.unbind(-1), -1)",
            f"top = {x}.abs().topk(2, -1).indices\n$ = torch.zeros_like({x}).scatter(-1, top, {x}.gather(-1, top).softmax(-1))",
        ]
    )


# Views.


@operator
def merge(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.ndim >= 2)
    d = b.pick(range(x.ndim - 1))
    options = [f"{x}.flatten({d}, {d + 1})", f"{x}.flatten()"]
    if d == 0:
        rest = ", ".join(length(x, k) for k in range(2, x.ndim))
        options += [f"{x}.reshape(-1{', ' + rest if rest else ''})"]
    if d == x.ndim - 2:
        rest = ", ".join(length(x, k) for k in range(x.ndim - 2))
        options += [f"{x}.reshape({rest + ', ' if rest else ''}-1)"]
    return b.pick(options)


@operator
def unmerge(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and ("m" in v.roles or "s" in v.roles))
    d = b.dim(x, "m" if "m" in x.roles else "s")
    ids = b.input("ids")
    batch, n = length(ids, 1 - b.header.sequence_dim), length(ids, b.header.sequence_dim)
    sizes = [
        (f"({batch}, -1)", batch),
        (f"(-1, {batch})", batch),
        (f"(-1, {n})", n),
        (f"({n}, -1)", n),
        ("(-1, 4)", "4"),
        ("(2, -1)", "2"),
    ]
    fits = [text for text, size in sizes if all(k % divisor == 0 for k, divisor in zip(x.shape[d], b.sizes(size), strict=True))]
    return f"{x}.unflatten({d}, {b.pick(fits)})"


@operator
def heads(b: Builder) -> str:
    x = b.value(lambda v: has_features(v) and v.size(-1) % 2 == 0)
    code = f"{x}.unflatten(-1, {b.pick(['(2, -1)', '(-1, 2)', '(2, 1, -1)'])})"
    return code + b.pick(["", ".transpose(1, 2)" if x.ndim > 1 else "", ".transpose(-3, -2)" if x.ndim > 1 else ""])


@operator
def transpose(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.ndim >= 2)
    i, j = b.pick(range(x.ndim)), b.pick(range(x.ndim))
    order = [*range(1, x.ndim), 0]
    swapped = f"{x}.transpose({i}, {j if i != j else (i + 1) % x.ndim})"
    rotated = f"{x}.permute({', '.join(map(str, order))})"
    return b.pick([swapped, swapped, rotated, f"{swapped}.contiguous()", f"{x}.movedim(0, -1)"])


@operator
def unsqueeze(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.ndim <= 4)
    d = b.pick(range(x.ndim + 1))
    return b.pick([f"{x}.unsqueeze({d})", f"{x}{index(d, 'None')}", f"{x}.unsqueeze({d - x.ndim - 1})"])


@operator
def squeeze(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and any(v.size(d) == 1 and r == "c" for d, r in enumerate(v.roles)))
    d = b.pick([d for d, r in enumerate(x.roles) if r == "c" and x.size(d) == 1])
    return b.pick([f"{x}.squeeze({d})", f"{x}{index(d, '0')}"])


@operator
def expand(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.ndim <= 3)
    y = b.value(lambda v: "s" in v.roles, inputs=True)
    n = length(y, b.dim(y))
    same = ", -1" * x.ndim
    return b.pick(
        [
            f"{x}[None].expand(3{same})",
            f"{x}[None].expand({n}{same})",
            f"{x}.unsqueeze(-1).expand({', '.join(['-1'] * x.ndim + [''])}{n})",
            f"{x}.expand(2{same})",
        ]
    )


@operator
def repeat(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.ndim > 0)
    d = b.dim(x, "sscb")
    times = ["1"] * x.ndim
    times[d] = "2"
    return b.pick([f"{x}.repeat_interleave(2, {d})", f"{x}.repeat({', '.join(times)})", f"torch.tile({x}, ({', '.join(times)},))"])


# Along the sequence.


@operator
def slice_(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.dim(x)
    start = b.pick(["", "1", "-1", "2", "-3", "3", "-4", "0"])
    stop = b.pick(["", "-1", "-2", "4", "3", "-3", "5", "100"])
    step = b.pick(["", "", "", ":2", ":3", ":4"])
    return x.name + index(d, f"{start}:{stop}{step}")


@operator
def slice_by_length(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.dim(x)
    n = length(x, d)
    return b.pick(
        [
            f"{x}{index(d, f': {n} // 2')}",
            f"{x}{index(d, f'{n} // 2 :')}",
            f"{x}.narrow({d}, 1, {n} - 2)",
            f"{x}.narrow({d}, 0, 3)",
            f"{x}{index(d, f'{n} - 3 :')}",
            f"{x}{index(d, f'{n} // 3 : -1')}",
            f"{x}{index(d, f': {n} // 4 * 4')}",
        ]
    )


@operator
def select(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.dim(x)
    at = b.pick([0, -1, 1, -2, 3, -4])
    return b.pick([f"{x}{index(d, str(at))}", f"{x}.select({d}, {at})", f"{x}{index(d, f'{length(x, d)} // 2')}"])


@operator
def move(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.written(x, b.dim(x))
    by = b.pick([1, -1, 2, -3])
    return b.pick(
        [
            f"{x}.roll({by}, {d})",
            f"{x}.flip({d})",
            f"{x}.diff(dim={d})",
            f"{x}.flip(0, {d})" if x.roles[0] != "s" else f"{x}.flip({d})",
            f"{x}.roll({by})",
        ]
    )


@operator
def cat(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.dim(x)
    c = x.size(-1)
    other = b.value(
        lambda v: is_sequence(v) and v.ndim == x.ndim and all(v.shape[k] == x.shape[k] for k in range(x.ndim) if k != d)
    )
    at = lambda what: f"{x}{index(d, what)}"
    options = [
        f"torch.cat([{x}, {other}], {d})",
        f"torch.cat([{x}, {at('-1:')}], {d})",
        f"torch.cat([{at(':1')}, {x}], {d})",
        f"torch.cat([{at('1:')}, {at(':1')}], {d})",
        f"torch.cat([{at('::2')}, {at('1::2')}], {d})",
        f"torch.cat([{at('-2:')}, {at(':-2')}], {d})",
        f"torch.cat([{x}.new_zeros({x}{index(d, ':2')}.shape), {at('2:')}], {d})",
        f"torch.cat([{other}, {at(':3')}, {x}], {d})",
    ]
    if x.roles[-1] == "c" and x.ndim == 3:
        token = f"{b.parameter(1, 1, c)}.expand({', '.join('1' if k == d else length(x, k) for k in range(2))}, -1)"
        options = [f"torch.cat([{token}, {x}], {d})", f"torch.cat([{x}, {token}], {d})", *options]
        options += [f"torch.cat([{token}, {x}, {token}], {d})"]
    return b.pick(options)


@operator
def cat_features(b: Builder) -> str:
    x = b.value(has_features)
    y = b.value(lambda v: v.is_float and v.roles[-1:] == "c" and v.shape[:-1] == x.shape[:-1])
    return b.pick([f"torch.cat([{x}, {y}], -1)", f"torch.cat([{y}.sin(), {x}], {x.ndim - 1})", f"torch.hstack([{x}, {x}])"])


@operator
def stack(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.ndim <= 4)
    y = b.value(lambda v: v.is_float and v.shape == x.shape)
    return f"torch.stack([{x}, {y}], {b.pick(range(x.ndim + 1))})"


@operator
def pad(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.dim(x)
    before, after = b.pick([(1, 0), (0, 1), (2, 1), (-1, 1), (0, -2), (1, -1), (3, 0), (-1, -1)])
    widths = "0, 0, " * (x.ndim - 1 - d)
    options = [f"F.pad({x}, ({widths}{before}, {after}))", f"F.pad({x}, ({widths}{before}, {after}), value=0.5)"]
    options += [f"F.pad({x}, ({widths}0, -{length(x, d)} % 4))"]
    if x.ndim == 3:
        t = transposed(d, 3)
        options += [f"F.pad({x}{t}, (2, 1), mode={mode!r}){t}" for mode in ("replicate", "reflect", "circular")]
    return b.pick(options)


@operator
def pieces(b: Builder) -> tuple[str, int] | str:
    x = b.value(is_sequence)
    d = b.written(x, b.dim(x))
    return b.pick(
        [
            (f"{x}.chunk(2, {d})", 2),
            (f"{x}.tensor_split(2, {d})", 2),
            (f"{x}.tensor_split((2, -1), {d})", 3),
            (f"{x}.split([2, {length(x, d)} - 2], {d})", 2),
            (f"{x}.chunk(3, {d})", 3),
        ]
    )


@operator
def by_chunk(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.dim(x)
    done = b.pick([f"part.softmax({d})", f"part - part.mean({d}, keepdim=True)", f"part.cumsum({d})", "part * 2"])
    cut = b.pick([f"{x}.split(4, {d})", f"{x}.chunk(3, {d})"])
    return f"torch.cat([{done} for part in {cut}], {d})"


@operator
def blocks(b: Builder) -> str:
    """Positions in blocks, as local attention has them."""
    x = b.value(lambda v: is_sequence(v) and v.ndim <= 3)
    d = b.dim(x)
    size = b.pick([2, 4, 3])
    n = length(x, d)
    widths = "0, 0, " * (x.ndim - 1 - d)
    cut = f"{x}{index(d, f': {n} // {size} * {size}')}"
    filled = f"F.pad({x}, ({widths}0, -{n} % {size}))"
    whole = f"{b.pick([cut, filled])}.unflatten({d}, (-1, {size}))"
    done = [whole, f"{whole}.mean({d + 1})", f"{whole}.softmax({d + 1}).flatten({d}, {d + 1})", f"{whole}.cumsum({d + 1})"]
    return b.pick([*done, f"{whole}.transpose({d}, {d + 1}).flatten({d}, {d + 1})"])


@operator
def windows(b: Builder) -> str:
    x = b.value(lambda v: is_sequence(v) and v.ndim <= 3)
    d = b.dim(x)
    size, step = b.pick([(2, 1), (3, 1), (3, 2), (4, 4), (2, 3)])
    code = f"{x}.unfold({d}, {size}, {step})"
    return b.pick([f"{code}.mean(-1)", code, f"{code}.amax(-1)"])


@operator
def scan(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.written(x, b.dim(x))
    return b.pick(
        [
            f"{x}.cumsum({d})",
            f"(1 + 0.1 * {x}.tanh()).cumprod({d})",
            f"{x}.logcumsumexp({d})",
            f"{x}.cumsum({d}) / torch.ones_like({x}).cumsum({d})",
            f"{x}.flip({d}).cumsum({d}).flip({d})",
        ]
    )


@operator
def spectral(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.dim(x)
    return b.pick(
        [
            f"torch.fft.fft({x}, dim={d}).real",
            f"torch.fft.rfft({x}, dim={d}).imag",
            f"torch.fft.irfft(torch.fft.rfft({x}, dim={d}) * 0.5, n={length(x, d)}, dim={d})",
            f"torch.fft.fft2({x}).real" if x.ndim > 1 else f"torch.fft.fft({x}).real",
        ]
    )


@operator
def cumulative_extreme(b: Builder) -> tuple[str, int]:
    b.ordered()
    x = b.value(is_sequence)
    d = b.dim(x)
    return b.pick([f"{x}.cummax({d})", f"{x}.cummin({d})"]), 2


@operator
def convolution(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.roles in ("bsc", "sbc", "bcs", "csb", "csc", "ccs") and v.ndim == 3)
    s = x.roles.index("s")
    others = [d for d in range(3) if d != s]
    channels = next((d for d in reversed(others) if x.roles[d] == "c" and 1 < x.size(d) <= 8), None)
    if channels is None:
        raise InapplicableError
    c = x.size(channels)
    batch = next(d for d in others if d != channels)
    order = (batch, channels, s)
    move_ = "" if order == (0, 1, 2) else f".permute{order}"
    back = tuple(order.index(d) for d in range(3))
    undo = "" if back == (0, 1, 2) else f".permute{back}"
    y = f"{x}{move_}"
    dense, deep, wide = b.parameter(c, c, 3), b.parameter(c, 1, 3), b.parameter(4, c, 2)
    options = [
        f"F.conv1d(F.pad({y}, (2, 0)), {dense}){undo}",
        f"F.conv1d({y}, {dense}, padding=1){undo}",
        f"F.conv1d({y}, {dense}){undo}",
        f"F.conv1d({y}, {deep}, padding=2, groups={c})[..., : {length(x, s)}]{undo}",
        f"F.conv1d({y}, {wide}, stride=2){undo}",
        f"F.conv1d({y}, {dense}, {b.parameter(c)}, padding=2, dilation=2){undo}",
        f"F.conv1d({y}, {b.parameter(c, c, 1)}){undo}",
        f"F.conv1d(F.pad({y}, (4, 0)), {dense}, dilation=2){undo}",
        f"F.conv_transpose1d({y}, {dense}, stride=2){undo}",
        f"F.conv1d({y}, {dense}, padding='same'){undo}",
    ]
    if c % 2 == 0:
        options += [f"F.conv1d({y}, {b.parameter(c, c // 2, 3)}, padding=1, groups=2){undo}"]
    return b.pick(options)


@operator
def convolution_2d(b: Builder) -> str:
    """Over positions and features at once."""
    x = b.value(lambda v: v.roles in ("bsc", "bcs") and v.is_float)
    w = b.parameter(1, 1, 3, 3)
    return b.pick([f"F.conv2d({x}[:, None], {w}, padding=1)[:, 0]", f"F.conv2d({x}[:, None], {w}, padding=1, stride=2).flatten(1)"])


@operator
def pool(b: Builder) -> str:
    x = b.value(lambda v: is_sequence(v) and v.ndim == 3)
    d = b.dim(x)
    t = transposed(d, 3)
    y = f"{x}{t}"
    return b.pick(
        [
            f"F.avg_pool1d({y}, 2){t}",
            f"F.avg_pool1d({y}, 3, stride=1, padding=1){t}",
            f"F.max_pool1d({y}, 2){t}",
            f"F.adaptive_avg_pool1d({y}, 3){t}",
            f"F.interpolate({y}, scale_factor=2, mode='nearest'){t}",
            f"F.interpolate({y}, scale_factor=2, mode='linear'){t}",
            f"F.avg_pool1d({y}, 3, ceil_mode=True){t}",
        ]
    )


# Reductions.

REDUCTIONS = ("sum", "mean", "amax", "amin", "std", "var", "logsumexp", "prod", "norm")


def reduced(x: Value, how: str, dims: Sequence[int], keepdim: bool) -> str:
    keep = ", keepdim=True" if keepdim else ""
    dim = str(dims[0]) if len(dims) == 1 else "(" + ", ".join(map(str, dims)) + ")"
    if how == "prod":
        return f"(1 + 0.2 * {x}.tanh()).prod({dims[0]}{keep})"
    if how == "norm":
        return f"({x} + 2).norm(dim={dim}{keep})"
    return f"{x}.{how}({dim}{keep})"


@operator
def reduce_sequence(b: Builder) -> str:
    x = b.value(is_sequence)
    return reduced(x, b.pick(REDUCTIONS), [b.written(x, b.dim(x))], b.pick([False, True]))


@operator
def reduce_any(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.ndim > 0)
    return reduced(x, b.pick(REDUCTIONS), [b.written(x, b.dim(x, "scbm"))], b.pick([False, True]))


@operator
def reduce_several(b: Builder) -> str:
    x = b.value(lambda v: is_sequence(v) and v.ndim >= 2)
    first = b.dim(x)
    other = b.pick([d for d in range(x.ndim) if d != first])
    return reduced(x, b.pick(REDUCTIONS), sorted((first, other)), b.pick([False, True]))


@operator
def reduce_all(b: Builder) -> str:
    x = b.value(lambda v: is_sequence(v) or "m" in v.roles)
    how = b.pick(["sum()", "mean()", "max()", "min()", "std()", "var()", "norm()", "amax()", "flatten().logsumexp(0)"])
    return f"{x}.{how}"


@operator
def reduce_to_two(b: Builder) -> tuple[str, int]:
    x = b.value(is_sequence)
    d = b.written(x, b.dim(x))
    return b.pick([f"torch.var_mean({x}, {d})", f"torch.std_mean({x}, {d})", f"{x}.aminmax(dim={d})", f"torch.std_mean({x})"]), 2


@operator
def centred(b: Builder) -> str:
    """A value against a statistic of its own."""
    x = b.value(is_sequence)
    d = b.written(x, b.dim(x))
    return b.pick(
        [
            f"{x} - {x}.mean({d}, keepdim=True)",
            f"{x} / ({x}.std({d}, keepdim=True) + 1)",
            f"{x} - {x}.amax({d}, keepdim=True).detach()",
            f"{x} * {x}.logsumexp({d}, keepdim=True)",
            f"{x} - {x}.mean()",
            f"F.normalize({x}, dim={d})",
        ]
    )


@operator
def counted(b: Builder) -> str:
    """A mean over the positions a mask leaves."""
    x, m = masked(b)
    d = b.dim(x)
    mean = b.pick([f"({x} * keep).sum({d}) / (keep.sum({d}) + 1)", f"({x} * keep).sum() / keep.sum()"])
    return f"keep = ({m}).expand_as({x})\n$ = {mean}"


@operator
def reduce_mask(b: Builder) -> str:
    found = [v for v in b.values if v.is_bool and "s" in v.roles]
    if found:
        m = b.use(b.pick(found))
        d, text = b.dim(m), str(m)
    else:
        d, text = b.header.sequence_dim, f"({b.input('ids')} != 3)"
    return b.pick([f"{text}.sum({d})", f"{text}.any({d})", f"{text}.all()", f"{text}.double().mean({d})", f"{text}.cumsum({d})"])


# Order.


@operator
def extreme(b: Builder) -> tuple[str, int]:
    b.ordered()
    x = b.value(is_sequence)
    d = b.written(x, b.dim(x))
    how = b.pick([f"max({d})", f"min({d})", f"max({d}, keepdim=True)", f"median({d})", f"kthvalue(2, {d})"])
    return f"{x}.{how}", 2


@operator
def sort(b: Builder) -> tuple[str, int]:
    b.ordered()
    x = b.value(is_sequence)
    d = b.written(x, b.dim(x))
    how = b.pick([f"sort({d})", f"topk(3, {d})", f"sort({d}, descending=True)", f"topk(2, {d}, largest=False)", f"topk(1, {d})"])
    return f"{x}.{how}", 2


@operator
def extreme_index(b: Builder) -> str:
    b.ordered()
    x = b.value(is_sequence)
    d = b.dim(x)
    best = f"{x}.argmax({d}, keepdim=True)"
    options = [f"{x}.argmax({d})", f"{x}.argmin({d})", f"{x}.take_along_dim({best}, {d})", f"{x}.argsort({d})", f"{x}.argmax()"]
    return b.pick(options)


# Indices.


def some_positions(b: Builder, x: Value, d: int) -> str:
    """Return a vector of positions along a dimension, from data or not."""
    ids = b.input("ids")
    row = f"{ids}[0]" if b.header.sequence_dim == 1 else f"{ids}[:, 0]"
    n = length(x, d)
    return b.pick(
        [
            f"{row} % {n}",
            f"torch.arange({n} - 1, -1, -1)",
            f"torch.arange(0, {n}, 2)",
            "torch.tensor([0, 2, 1])",
            f"(torch.arange({n}) * 3) % {n}",
            f"{row}.argsort(stable=True) % {n}",
        ]
    )


@operator
def pick_positions(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.dim(x)
    at = some_positions(b, x, d)
    return b.pick([f"{x}.index_select({d}, {at})", f"{x}{index(d, at)}", f"{x}{index(d, '[0, -1]')}"])


@operator
def gather(b: Builder) -> str:
    x = b.value(lambda v: is_tokens(v))
    d = x.roles.index("s")
    ids = b.input("ids")
    at = b.pick([f"{ids} % {length(x, d)}", f"{ids}{index(b.header.sequence_dim, ':3')} % {length(x, d)}"])
    rows = f"torch.arange({length(x, 1 - d)})" + ("[:, None]" if d == 1 else "")
    pair = f"{rows}, {at}" if d == 1 else f"{at}, {rows}"
    return b.pick(
        [
            f"{x}.gather({d}, ({at})[..., None].expand(-1, -1, {x.size(-1)}))",
            f"{x}[{pair}]",
            f"{x}.take_along_dim(({at})[..., None], {d})",
        ]
    )


@operator
def look_up(b: Builder) -> str:
    """Choose a feature by token, or a row of a value by token."""
    ids = b.input("ids")
    x = b.value(lambda v: is_tokens(v) and v.shape[:2] == ids.shape)
    c = x.size(-1)
    table = b.parameter(VOCABULARY, 4)
    return b.pick(
        [
            f"{x}.gather(-1, ({ids} % {c})[..., None])",
            f"{table}[{ids}]",
            f"{x} @ {b.parameter(c, 4)} * F.embedding({ids}.flip(0), {table})",
            f"F.embedding({ids}.cumsum({b.header.sequence_dim}) % {VOCABULARY}, {table})",
        ]
    )


@operator
def scatter(b: Builder) -> str:
    ids = b.input("ids")
    x = b.value(lambda v: is_tokens(v) and v.shape[:2] == ids.shape)
    d, c = b.header.sequence_dim, x.size(-1)
    row = f"{ids}[0]" if d == 1 else f"{ids}[:, 0]"
    at = f"({ids} % {length(x, d)})[..., None].expand_as({x})"
    return b.pick(
        [
            f"torch.zeros_like({x}).scatter_add({d}, {at}, {x})",
            f"torch.zeros_like({x}).index_add({d}, {row} % {length(x, d)}, {x})",
            f"{x}.new_zeros({VOCABULARY}, {c}).index_add(0, {ids}.flatten(), {x}.flatten(0, 1))",
            f"{x}.new_zeros({VOCABULARY}, {c}).index_put(({ids},), {x}, accumulate=True)",
            f"{x}.index_fill({d}, torch.tensor([0, 3]), 0.5)",
            f"torch.zeros_like({x}).scatter_reduce({d}, {at}, {x}, 'mean')",
            f"{x}.scatter(-1, ({ids} % {c})[..., None], 0.5)",
        ]
    )


# Products.


@operator
def matmul(b: Builder) -> str:
    x, y = b.pair(lambda x, y: x.ndim >= 2 and y.ndim >= 2 and y.shape[-2] == x.shape[-1] and y.shape[:-2] in (x.shape[:-2], ()))
    return f"{x} @ {y} * 0.3"


@operator
def mix(b: Builder) -> str:
    """Every position from every other, and back."""
    x = b.value(lambda v: v.is_float and v.roles in ("bsc", "sc", "bcsc"))
    w = b.pick(
        [f"({x} @ {x}.mT * 0.5)", f"({x} @ {x}.mT).softmax(-2)", f"({x} @ {x}.mT * 0.2).tril()", f"({x} @ {x}.mT).softmax(-1)"]
    )
    return b.pick(
        [f"{w} @ {x} * 0.3", f"torch.bmm({w}, {x}) * 0.3", f"{w}.diagonal(0, -2, -1)", f"{w}.sum(-1)", f"{w}.flatten(-2)"]
    )


@operator
def scores(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.ndim >= 2 and "s" in v.roles)
    y = b.value(lambda v: v.is_float and v.ndim == x.ndim and v.shape[-1] == x.shape[-1] and v.shape[:-2] == x.shape[:-2])
    return b.pick([f"{x} @ {y}.transpose(-1, -2)", f"torch.matmul({x} * 0.5, {y}.mT).tanh()"])


@operator
def contraction(b: Builder) -> str:
    x = b.value(is_tokens)
    y = b.value(lambda v: is_tokens(v) and v.shape[:2] == x.shape[:2])
    f, g = x.roles[:2] + "d", y.roles[:2] + "e"
    same = x.shape == y.shape
    t = f.replace("s", "t")
    return b.pick(
        [
            f"torch.einsum('{f},{g}->bde', {x}, {y}) * 0.3",
            f"torch.einsum('{f},{t}->bst', {x}, {x})",
            f"torch.einsum('{f},{f}->bs', {x}, {y if same else x})",
            f"torch.einsum('{f},{f}->sb', {x}, {y if same else x})",
            f"torch.einsum('{f},d->{f[:2]}', {x}, {b.parameter(x.size(-1))})",
            f"torch.einsum('{f},{f}->', {x}, {y if same else x}) * 0.1",
            f"torch.einsum('{f}->d', {x})",
        ]
    )


@operator
def linear_attention(b: Builder) -> str:
    x = b.value(is_tokens)
    f = x.roles[:2]
    d = x.roles.index("s")
    y = f"F.softplus({x})"
    return b.pick(
        [
            f"torch.einsum('{f}d,bde->{f}e', {y}, torch.einsum('{f}d,{f}e->bde', {y}, {x})) * 0.1",
            f"torch.einsum('{f}d,{f}de->{f}e', {y}, torch.einsum('{f}d,{f}e->{f}de', {y}, {x}).cumsum({d})) * 0.1",
        ]
    )


@operator
def unusual(b: Builder) -> str:
    """What hardly any model does."""
    x = b.value(is_tokens)
    d, c, ids = x.roles.index("s"), x.size(-1), b.input("ids")
    row = ids if b.header.sequence_dim == 1 else f"{ids}.T"
    return b.pick(
        [
            f"torch.vmap(lambda t: t @ {b.parameter(c, c)}, {d}, {d})({x})",
            f"torch.vmap(lambda t: t.softmax(0), {1 - d}, {1 - d})({x})",
            f"F.embedding_bag({row}, {b.parameter(VOCABULARY, 4)}, mode='mean')",
            f"torch.cdist({x}, {x}.flip({d}) + 2)",
            f"torch.trapezoid({x}, dim={d})",
            f"torch.cov({x}[0].T)",
            f"torch.logaddexp({x}, {x}.mean({d}, keepdim=True))",
            f"{x}.var({d}, correction=0)",
            f"torch.baddbmm({b.parameter(1)}, {x}, {x}.mT, alpha=0.5)",
            f"torch.einsum('...d,...d->...', {x}, {x})",
            f"torch.kron({x}[0], torch.ones(2, 1, dtype=torch.float64))",
            f"F.cosine_similarity({x}.unsqueeze(2), {x}.unsqueeze(1) + 0.5, dim=-1)",
            f"{x}.renorm(2, {d}, 1.5)",
            f"torch.cumulative_trapezoid({x}, dim={d})",
            f"F.local_response_norm({x}, 2)",
            f"torch.tensordot({x}, {x}, dims=([0, 1], [0, 1])) * 0.1",
            f"{x}.nanmean({d})",
            f"torch.block_diag({x}[0], {x}[-1])",
        ]
    )


@operator
def layers(b: Builder) -> str:
    """One layer after the other."""
    x = b.value(lambda v: v.roles == "bsc" and has_features(v))
    c = x.size(-1)
    weights = b.pick([b.parameter(3, c, c), f"({b.parameter(c, c)},) * 3", f"({b.parameter(c, c)}, {b.parameter(c, c)}.T)"])
    mixed = b.pick(
        [
            "F.scaled_dot_product_attention(u[:, None], u[:, None], u[:, None], is_causal=True)[:, 0]",
            "((u @ u.mT * 0.3).softmax(-1) @ u)",
            "u.cumsum(1) * 0.1",
            "(u - u.mean(1, keepdim=True)) * u.shape[1] ** -0.5",
            "F.pad(u, (0, 0, 1, 0))[:, :-1]",
            "u.roll(1, 1)",
            "(u * (torch.arange(u.shape[1])[:, None] % 2 == 0))",
            "u.clone().masked_fill_(u > 1, 0.5).mul_(0.9)",
            "F.conv1d(F.pad(u.mT, (2, 0)), torch.stack([w, w * 0.5, w.T], -1)).mT",
        ]
    )
    updated = b.pick(["t = t + u", "t = (t + u).tanh()", "t += u", "t = torch.cat([t[:, :1], u[:, 1:]], 1)"])
    body = [f"u = F.layer_norm(t, ({c},)) * 1.5 + 0.1", f"u = {mixed}", "u = F.gelu(F.linear(u, w) + 0.2).sin()", updated]
    first = f"t = {x} * 1"
    if b.pick([False, False, True]):
        layer = ["def layer(t, w):", *("    " + line for line in [*body, "return t"])]
        return "\n".join([*layer, first, f"for w in {weights}:", "    t = checkpoint(layer, t, w, use_reentrant=False)", "$ = t"])
    return "\n".join([first, f"for w in {weights}:", *("    " + line for line in body), "$ = t"])


# Attention.


def attention_mask(b: Builder, keys: Value | None, q_heads: int) -> str:
    """Return an expression over `row`, `col`, `q` and `k` that makes a mask: booleans, or numbers to add."""
    options = [
        "col <= row",
        "(col <= row) & (row - col < 4)",
        "(col <= row) | (col < 3)",
        "row // 4 == col // 4",
        "(row // 3 == col // 3) & (col <= row)",
        "(row - col).abs() < 3",
        "(col < row) | (col == 0)",
        "(row - col) % 3 == 0",
        "(row - col).abs() * -0.3",
        "torch.zeros(q.shape[-2], k.shape[-2], dtype=torch.float64).masked_fill(col > row, float('-inf'))",
        "torch.full((q.shape[-2], k.shape[-2]), float('-inf'), dtype=torch.float64).triu(1)",
        "torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()",
        "torch.where(col <= row, 0.0, -1e4).double()",
        "col < 6",
        "col <= row + torch.arange(q.shape[1])[:, None, None]",
        f"{b.parameter(64)}[(row - col).abs()]",
        f"{b.parameter(64, q_heads)}[(row - col).abs()].permute(2, 0, 1)",
        f"{b.parameter(64)}[(row - col).abs()].masked_fill(col > row, float('-inf'))",
    ]
    ids = b.input("ids")
    if keys is not None and keys.shape[:2] == ids.shape:
        seen = f"{ids}" if b.header.sequence_dim == 1 else f"{ids}.T"
        options += [
            f"(({seen} != 3) | (torch.arange({seen}.shape[1]) == 0))[:, None, None, :]",
            f"(({seen} != 3)[:, None, None, :] & (col <= row)) | (col == 0)",
            f"((({seen} == 0).cumsum(1)[:, None, :, None] == ({seen} == 0).cumsum(1)[:, None, None, :]) & (col <= row)) | (row == col)",
            f"torch.where({seen} > 2, 0.0, -2.0).double()[:, None, None, :]",
        ]
        if b.header.sequence_dim == 1:
            options += [f"{b.input('bias')}[:, None]"]
    return b.pick(options)


def projections(b: Builder) -> tuple[Value, list[str], str, int, bool]:
    """Return who is asked, lines that make `q`, `k` and `v` of shape `(batch, heads, length, width)`, how to go back, heads, grouped."""
    x = b.value(is_tokens)
    sources = [x, x, *(v for v in reversed(b.values) if is_tokens(v) and v.roles == x.roles and _batch(v) == _batch(x))]
    y = b.use(b.pick(sources))
    heads, kv_heads = b.pick([(2, 2), (1, 1), (4, 2), (3, 3), (2, 1), (5, 5), (4, 4)])
    c, e, width = x.size(-1), y.size(-1), 2
    cut = b.pick(["", "", "", "short", "every"]) if y is x else ""
    d = x.roles.index("s")
    memory = {"": str(y), "short": f"{y}{index(d, ':-2')}", "every": f"{y}{index(d, '::2')}"}[cut]
    to = ".transpose(1, 2)" if x.roles == "bsc" else ".permute(1, 2, 0, 3)"
    back = ".transpose(1, 2)" if x.roles == "bsc" else ".permute(2, 0, 1, 3)"
    lines = [
        f"q = F.linear({x}, {b.parameter(heads * width, c)}).unflatten(-1, ({heads}, {width})){to}",
        f"k = F.linear({memory}, {b.parameter(kv_heads * width, e)}).unflatten(-1, ({kv_heads}, {width})){to}",
        f"v = (F.linear({memory}, {b.parameter(kv_heads * width, e)}) + 0.1).unflatten(-1, ({kv_heads}, {width})){to}",
    ]
    return y, lines, f"{back}.flatten(2)", heads, heads != kv_heads


def _batch(v: Value) -> Size:
    return v.shape[v.roles.index("b")]


def row_and_column() -> list[str]:
    return ["row, col = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None]"]


@operator
def attention(b: Builder) -> str:
    keys, lines, back, num_heads, gqa = projections(b)
    options = ", enable_gqa=True" if gqa else ""
    kind = b.pick(["causal", "none", "mask", "mask", "mask"])
    if kind == "causal":
        options = ", is_causal=True" + options
    if kind == "mask":
        lines = [*lines, *row_and_column(), f"mask = {attention_mask(b, keys, num_heads)}"]
        options = ", mask" + options
    options += b.pick(["", "", ", scale=0.3"])
    return "\n".join([*lines, f"$ = F.scaled_dot_product_attention(q, k, v{options}){back}"])


@operator
def written_attention(b: Builder) -> str:
    keys, lines, back, num_heads, gqa = projections(b)
    if gqa:
        lines += ["k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))"]
    lines += [b.pick(["w = q @ k.transpose(-1, -2) * 0.7", "w = torch.einsum('bhqd,bhkd->bhqk', q, k)"])]
    lines += b.pick([[], [], ["w = 2 * torch.tanh(w / 2)"]])
    if b.pick([True, True, False]):
        lines += [*row_and_column(), f"mask = {attention_mask(b, keys, num_heads)}"]
        lines += ["w = w.masked_fill(~mask, float('-inf')) if mask.dtype is torch.bool else w + mask"]
    done = b.pick(["w.softmax(-1)", "(w - w.amax(-1, keepdim=True)).softmax(-1)", "w.softmax(-1).nan_to_num(0.0)"])
    return "\n".join([*lines, f"$ = ({done} @ v){back}"])


@operator
def multi_head_attention(b: Builder) -> str:
    """What `nn.MultiheadAttention` calls, length first."""
    x = b.value(lambda v: is_tokens(v) and v.size(-1) % 2 == 0)
    c = x.size(-1)
    turn = "" if x.roles == "sbc" else ".transpose(0, 1)"
    n = length(x, x.roles.index("s"))
    weights = f"{b.parameter(3 * c, c)}, {b.parameter(3 * c)}, None, None, False, 0.0, {b.parameter(c, c)}, {b.parameter(c)}"
    mask = b.pick(["", f", attn_mask=torch.ones({n}, {n}, dtype=torch.bool).triu(1)"])
    mask += b.pick([", need_weights=False", ""])
    call = f"F.multi_head_attention_forward(x, x, x, {c}, 2, {weights}{mask})"
    return f"x = {x}{turn}\n$ = {call}[0]{turn}"


@operator
def heads_attention(b: Builder) -> str:
    """Attention on a value of four dimensions as it is."""
    x, y = b.pair(lambda x, y: x.roles[2:] == y.roles[2:] == "sc" and x.shape[:2] == y.shape[:2] and x.shape[3] == y.shape[3])
    return f"F.scaled_dot_product_attention({x}, {y}, {y} + 0.5, is_causal={b.pick([True, False])})"


@operator
def memory_attention(b: Builder) -> str:
    """Queries from the sequence over a fixed memory, or from fixed queries over the sequence."""
    x = b.value(lambda v: v.roles == "bsc" and has_features(v))
    c = x.size(-1)
    memory = f"{b.parameter(1, 5, c)}.expand({length(x, 0)}, -1, -1)[:, None]"
    y = f"{x}[:, None]"
    return b.pick(
        [
            f"F.scaled_dot_product_attention({y}, {memory}, {memory} + 0.5)[:, 0]",
            f"F.scaled_dot_product_attention({memory}, {y}, {y})[:, 0]",
            f"({x} @ {b.parameter(1, 5, c)}[0].T).softmax(-1)",
            f"({b.parameter(1, 5, c)} @ {x}.mT).softmax(-1) @ {x}",
        ]
    )


# Losses.


def logits_and_labels(b: Builder) -> tuple[str, str, int]:
    """Return scores `(batch, length, classes)`, labels `(batch, length)` and the sequence dimension."""
    labels = b.pick([b.input("labels"), b.input("ids")])
    x = b.value(lambda v: is_tokens(v) and v.shape[:2] == labels.shape)
    return f"F.linear({x}, {b.parameter(VOCABULARY, x.size(-1))})", str(labels), b.header.sequence_dim


@operator
def cross_entropy(b: Builder) -> str:
    scores, labels, d = logits_and_labels(b)
    options = b.pick(
        [
            "",
            ", ignore_index=3",
            ", label_smoothing=0.1",
            ", reduction='sum'",
            f", weight=torch.linspace(0.5, 2, {VOCABULARY}, dtype=torch.float64)",
            ", reduction='none'",
            f", weight=torch.linspace(0.5, 2, {VOCABULARY}, dtype=torch.float64), ignore_index=2, label_smoothing=0.2",
            f", weight={b.parameter(VOCABULARY)}.detach().sigmoid(), reduction='none'",
        ]
    )
    tail, head = index(d, ":-1"), index(d, "1:")
    widths = "(0, 1)" if d == 1 else "(0, 0, 0, 1)"
    first, second = b.pick(
        [
            ("logits.flatten(0, 1)", "targets.flatten()"),
            (f"logits{tail}.flatten(0, 1)", f"targets{head}.flatten()"),
            ("logits.view(-1, logits.shape[-1])", f"F.pad(targets, {widths}, value=-100){head}.reshape(-1)"),
            ("logits.movedim(2, 1)", "targets"),
            (f"logits{tail}.reshape(-1, {VOCABULARY})", f"targets{head}.masked_fill(targets{tail} == 0, -100).reshape(-1)"),
            ("logits.flatten(0, 1)", f"targets.roll(-1, {d}).flatten()"),
        ]
    )
    if "-100" in second and "ignore_index" in options:
        options = ""
    return f"logits, targets = {scores}, {labels}\n$ = F.cross_entropy({first}, {second}{options})"


@operator
def class_loss(b: Builder) -> str:
    scores, labels, d = logits_and_labels(b)
    reduction = b.pick(["", ", reduction='sum'", ", reduction='none'"])
    return b.pick(
        [
            f"F.nll_loss({scores}.log_softmax(-1).flatten(0, 1), {labels}.flatten(){reduction})",
            f"F.nll_loss({scores}.log_softmax(-1).flatten(0, 1), {labels}.flatten(), ignore_index=2{reduction})",
            f"F.cross_entropy({scores}.flatten(0, 1), F.one_hot({labels}, {VOCABULARY}).double().flatten(0, 1) * 0.8 + 0.01{reduction})",
            f"-{scores}.log_softmax(-1).gather(-1, {labels}[..., None]).squeeze(-1)",
            f"F.multi_margin_loss({scores}.flatten(0, 1), {labels}.flatten(){reduction})",
        ]
    )


@operator
def element_loss(b: Builder) -> str:
    x = b.value(lambda v: v.is_float and v.ndim > 0)
    y = b.value(lambda v: v.is_float and v.shape == x.shape)
    reduction = b.pick(["", ", reduction='sum'", ", reduction='none'"])
    target = f"({y} * 0.3 + 0.2)"
    return b.pick(
        [
            f"F.mse_loss({x}, {target}{reduction})",
            f"F.l1_loss({x}, {target}{reduction})",
            f"F.smooth_l1_loss({x}, {target}{reduction}, beta=0.3)",
            f"F.huber_loss({x}, {target}{reduction}, delta=0.5)",
            f"F.binary_cross_entropy_with_logits({x}, {target}.sigmoid(){reduction})",
            f"F.binary_cross_entropy({x}.sigmoid(), {target}.sigmoid().detach(){reduction})",
            f"F.kl_div({x}.log_softmax(-1), {target}.softmax(-1){reduction})",
            f"F.kl_div({x}.log_softmax(-1), {target}.log_softmax(-1), log_target=True{reduction})",
            f"F.kl_div({x}.log_softmax(-1), {target}.softmax(-1), reduction='batchmean')",
            f"F.poisson_nll_loss({x}.tanh(), {target}.square(){reduction})",
            f"F.gaussian_nll_loss({x}, {target}, {target}.square() + 0.5{reduction})",
            f"F.soft_margin_loss({x}, torch.where({target} > 0, 1.0, -1.0){reduction})",
            f"F.cosine_similarity({x}, {target} + 1, dim=-1)",
        ]
    )


# Regions and updates.


@operator
def without_gradient(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.dim(x)
    options = [f"{x}.mean({d}, keepdim=True)", f"{x}.sin()", f"{x}.amax({d}, keepdim=True)", f"{x}.cumsum({d})"]
    if has_features(x):
        options += [f"F.linear({x}, {b.parameter(x.size(-1), x.size(-1))}).tanh()"]
    inner = b.pick(options)
    return f"with torch.no_grad():\n    still = {inner}\n$ = {x} * (still + 1)"


@operator
def checkpointed(b: Builder) -> str:
    x = b.value(lambda v: has_features(v) and "s" in v.roles)
    d, c = x.roles.index("s"), x.size(-1)
    weight = b.parameter(c, c)
    inner = b.pick(
        [
            f"F.gelu(F.linear(t, {weight}))",
            f"F.linear(t, {weight}).softmax({d}) * t",
            f"F.linear(t.sin(), {weight}).mean({d})",
            f"t.cumsum({d}) * {weight}.sum()",
            "F.scaled_dot_product_attention(t, t.sin(), t, is_causal=True)",
            f"t{index(d, '1:')} - t{index(d, ':-1')}",
        ]
    )
    return f"checkpoint(lambda t: {inner}, {x}, use_reentrant=False)"


@operator
def inplace(b: Builder) -> str:
    x = b.value(is_sequence)
    d = b.dim(x)
    n = length(x, d)
    at = lambda what: f"y{index(d, what)}"
    update = b.pick(
        [
            f"y += {x}.sin()",
            "y.mul_(0.5)",
            f"{at('2:5')} = 0.25",
            f"{at('1:')} += {x}{index(d, ':-1')}",
            f"{at('0')} = 0.5",
            f"{at('-1')} += 1",
            f"y.masked_fill_({positions(x, d)} % 2 == 0, 0.5)",
            f"{at('::2')} *= 2",
            f"{at(':3')}.zero_()",
            f"y.cumsum_({d})",
            f"{at('3:')}.copy_({x}{index(d, ':-3')})",
            f"{at('[0, 2]')} = 0.1",
            f"y.index_add_({d}, torch.tensor([1, 3]), {x}{index(d, ':2')})",
            f"{at(f'{n} // 2 :')} -= 1",
            "y[y > 0.5] = 0.1",
        ]
    )
    return f"y = {x}.clone()\n{update}\n$ = y"


@operator
def inplace_features(b: Builder) -> str:
    x = b.value(has_features)
    half = x.size(-1) // 2
    update = b.pick(
        [
            f"y[..., :{half}] *= 2",
            f"y[..., 0] = {x}[..., -1].sin()",
            "part = y[..., 1:]\npart.add_(1)",
            "y.transpose(0, -1).mul_(0.5)",
            f"y[..., {half}:] += y[..., :{half}].clone().mean()",
        ]
    )
    return f"y = {x} * 1\n{update}\n$ = y"


# What a program ends in; not drawn.


def term(b: Builder) -> str:
    """A scalar of a value whose number is the first choice."""
    x = b.use(b.values[b._choices.pop(0)])
    if x.ndim == 0:
        return f"{x} * 1"
    options = [f"{x}.square().mean()", f"{x}.sin().sum()", f"({x} * {x}.detach().cos()).mean()", f"{x}.tanh().mean()"]
    weights = f"torch.arange({length(x, -1)}).double().cos()"
    options += [f"({x} * {weights}).sum()", f"({x} * {weights}).square().mean()"]
    return b.pick(options)


def total(b: Builder) -> str:
    """The loss: the sum of the terms whose numbers are the choices."""
    terms = [str(b.use(b.values[choice])) for choice in b._choices]
    return " + ".join(terms)


DRAWN = tuple(OPERATORS)
OPERATORS |= {"term": term, "total": total}
