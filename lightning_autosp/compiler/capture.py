"""Dynamo's graph, normalised: functional ATen operators with composites kept whole, and what the graph's inputs are.

Dynamo records Python-level calls (methods, in-place updates, views of views). `capture` retraces them into one small vocabulary:
`aten.linear`, `aten.scaled_dot_product_attention`, `aten.cross_entropy_loss` stay single nodes, in-place updates become
functional, `no_grad` and autocast regions stay where they were, and every node keeps the user's source line.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.utils import _pytree as pytree

from lightning_autosp import _compat
from lightning_autosp.attention.flash import is_kept
from lightning_autosp.compiler.flex import write_out_flex_attention
from lightning_autosp.compiler.inline import inline_checkpoints, inline_vmaps
from lightning_autosp.compiler.layout import as_expr
from lightning_autosp.compiler.repeats import CannotRepeatError, Repeat, Repetitions, find_repeats
from lightning_autosp.compiler.scalars import NeedsBreakError, keep_numbers_as_tensors
from lightning_autosp.compiler.sizes import equal_sizes

__all__ = ["Captured", "Fixed", "capture", "is_size", "memory_of"]


@dataclass(frozen=True)
class Fixed:
    """What follows from the sequence's length and has to be one number, because the code wants it so."""

    size: int
    place: str
    """The line of code, as `_compat.size_guards` gives it."""
    alone: bool = False
    """Whether it is a dimension of the batch itself, nothing computed from it."""


@dataclass
class Captured:
    """A traced step and what planning must know of it."""

    graph: fx.Graph
    owner: fx.GraphModule
    """Holds the constants and the bodies of opaque higher-order operators the graph refers to."""
    placeholders: list[fx.Node]
    symbols: frozenset[sympy.Symbol]
    """The sequence symbols, in canonical form."""
    replacements: dict[sympy.Expr, sympy.Expr]
    fake_mode: FakeTensorMode
    """Makes the values of operators that are added to the graph."""
    parameters: dict[fx.Node, str]
    """Placeholders that are parameters, with their fully qualified names."""
    trainable: set[fx.Node]
    """Placeholders whose values require grad: anything computed from them is expensive to hold in full."""
    mutated: list[fx.Node] = field(default_factory=list)
    """Placeholders the step updates in place; the last outputs of the graph are their new values, in this order."""
    kept: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Logits that are held whole, with a node that wants them so."""
    fixed: list[Fixed] = field(default_factory=list)
    following: set[tuple[int, int]] = field(default_factory=set)
    """`(id(tensor), dim)` of the module's marked dimensions that have to be what the sequence makes them."""
    loose: set[sympy.Symbol] = field(default_factory=set)
    """What other marked dimensions of the module consist of."""
    num_traced: int = 0
    """Operators of Dynamo's graph that were traced; the others repeat some of them."""

    def shape(self, value: torch.Tensor) -> tuple[sympy.Expr, ...]:
        return tuple(as_expr(size, self.replacements) for size in value.shape)

    def expr(self, value: Any) -> sympy.Expr:
        return as_expr(value, self.replacements)


def _copy(destination: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`aten.copy`, which `copy_` becomes, has no derivative of its own."""
    return source.to(destination.device, destination.dtype, non_blocking).expand(destination.shape)


def _type_as(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`aten.type_as` reads nothing of `other` but its type."""
    same = (tensor.device, tensor.dtype) == (other.device, other.dtype)
    return tensor if same else torch.ops.aten._to_copy.default(tensor, dtype=other.dtype, device=other.device)


def _index_select(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """`aten.index_select` of the first positions is a slice."""
    made = _compat.node_of(_compat.from_fun(index), _compat.current_tracer())
    if not isinstance(made, fx.Node) or made.target is not torch.ops.aten.arange.default or index.shape[0] > tensor.shape[dim]:
        return NotImplemented
    return torch.ops.aten.slice.Tensor(tensor, dim, 0, index.shape[0])


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.copy.default: _copy,
    torch.ops.aten.index_select.default: _index_select,
    torch.ops.aten.max_pool1d.default: _compat.max_pool1d,
    torch.ops.aten.type_as.default: _type_as,
}


def capture(gm: fx.GraphModule, parameter_names: dict[int, str], own: Container[int] = ()) -> Captured:
    """Normalise a Dynamo graph.

    Args:
        gm: The graph module Dynamo hands to a backend, while the backend runs.
        parameter_names: `id(parameter) -> fully qualified name` for the parameters that gradients are reduced for.
        own: `id(tensor)` of the module's tensors whose sizes are marked. What is marked of others is a sequence.

    Returns:
        The graph with symbolic shapes in `node.meta["val"]`.

    Raises:
        NeedsBreakError: If it needs the value of a tensor before it runs: a size, an index.
    """
    sources = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [node.meta["example_value"] for node in sources]
    examples = [_compat.example_of(node) for node in sources]
    known = pytree.tree_leaves([node.meta.get("example_value") for node in gm.graph.nodes])  # there may be no tensor among inputs
    fake_mode = next((value.fake_mode for value in known if isinstance(value, FakeTensor)), None) or FakeTensorMode()
    inline_checkpoints(gm)
    write_out_flex_attention(gm, fake_mode)
    inline_vmaps(gm, fake_mode)

    try:
        traced, mutated, num_traced = _trace(gm, values, fake_mode, find_repeats(gm.graph))
    except CannotRepeatError:
        traced, mutated, num_traced = _trace(gm, values, fake_mode, [])
    keep_numbers_as_tensors(traced.graph)
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    marked = [
        (value.shape[dim], (id(example), dim), id(example) in own)
        for value, example in zip(values, examples, strict=True)
        if isinstance(value, torch.Tensor) and isinstance(example, torch.Tensor)
        for dim in sorted(_compat.dynamic_dims(example))
    ]
    guards = _compat.size_guards(fake_mode)
    replacements = dict(_compat.shape_replacements(fake_mode))
    symbols = {symbol for size, _, is_own in marked if not is_own for symbol in as_expr(size, replacements).free_symbols}
    lengths = {symbol for size, _, is_own in marked if not is_own for symbol in _compat.symbols_at_first(size)}
    of_module = {symbol for size, _, is_own in marked if is_own for symbol in as_expr(size, replacements).free_symbols - symbols}
    known_sizes = [as_expr(size, replacements) for node in traced.graph.nodes for size in _sizes(node)]
    replacements |= equal_sizes([guard for guard, _ in guards], replacements, of_module, symbols, known_sizes)
    own_sizes = {place: as_expr(size, replacements).free_symbols for size, place, is_own in marked if is_own}
    parameters = {
        node: parameter_names[id(example)]
        for node, example in zip(placeholders, examples, strict=True)
        if id(example) in parameter_names
    }
    trainable = {
        node for node, value in zip(placeholders, values, strict=True) if isinstance(value, torch.Tensor) and value.requires_grad
    }
    captured = Captured(
        graph=traced.graph,
        owner=traced,
        placeholders=placeholders,
        symbols=frozenset(symbols),
        replacements=replacements,
        fake_mode=fake_mode,
        parameters=parameters,
        trainable=trainable | set(parameters),
        mutated=[placeholders[index] for index in mutated],
        fixed=_fixed(guards, lengths, _compat.first_sizes(values)),
        following={place for place, found in own_sizes.items() if found & symbols},
        loose={symbol for found in own_sizes.values() for symbol in found - symbols},
        num_traced=num_traced,
    )
    _refuse_sizes_of_data(captured)
    return captured


def _refuse_sizes_of_data(captured: Captured) -> None:
    """A program is made for sizes that are known before it runs: `nonzero` and its like cannot be in it.

    Raises:
        NeedsBreakError: Naming the operator.
    """
    known: set[sympy.Basic] = set()
    for node in captured.graph.nodes:
        value, sizes = node.meta.get("val"), _sizes(node)
        if node.op == "placeholder":
            for size in [*sizes, *([value] if isinstance(value, torch.SymInt) else [])]:
                known |= as_expr(size).free_symbols | captured.expr(size).free_symbols
        elif any(not as_expr(size).free_symbols <= known and not captured.expr(size).free_symbols <= known for size in sizes):
            raise _size_of_data(node)


def _sizes(node: fx.Node) -> list[torch.SymInt]:
    """Return the sizes of the tensors that a node holds, but numbers."""
    tensors = (leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor))
    sizes: list[int | torch.SymInt] = [size for tensor in tensors for size in tensor.shape]
    return [size for size in sizes if isinstance(size, torch.SymInt)]


def _size_of_data(node: fx.Node) -> NeedsBreakError:
    return NeedsBreakError(f"how large the result of {node.target} is depends on a tensor's values\n{node.stack_trace or ''}")


def _fixed(guards: Iterable[tuple[sympy.Expr, str]], lengths: set[sympy.Symbol], sizes: Mapping[sympy.Symbol, int]) -> list[Fixed]:
    """Return the numbers that sizes have to be which were made of these symbols, and would not be if the lengths were others."""

    def holds_too(guard: sympy.Eq, factor: int) -> bool:
        return guard.subs({symbol: size * (factor if symbol in lengths else 1) for symbol, size in sizes.items()}) == sympy.true

    found: dict[int, Fixed] = {}
    for guard, place in guards:
        if isinstance(guard, sympy.Eq) and guard.free_symbols & lengths and not (holds_too(guard, 2) or holds_too(guard, 3)):
            number = next((side for side in guard.args if side.is_Integer and side > 1), None)
            if number is not None:
                alone = any(side.is_Symbol for side in guard.args)
                known = found.setdefault(int(number), Fixed(int(number), place, alone))
                if known.alone and not alone:
                    found[int(number)] = Fixed(int(number), place)
    return list(found.values())


def is_size(node: fx.Node) -> bool:
    """Whether the node is a number that follows from the inputs' sizes: a constant once they are known."""
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def memory_of(node: fx.Node) -> int:
    """Return what the values of nodes have in common that share memory."""
    memory: int = node.meta["val"].untyped_storage()._cdata
    return memory


def _trace(
    gm: fx.GraphModule, values: Sequence[Any], fake_mode: FakeTensorMode, repeats: Sequence[Repeat]
) -> tuple[fx.GraphModule, list[int], int]:
    """Return the normalised graph, the inputs whose updates in place are its last outputs, and how many operators were traced."""
    mutated: list[int] = []
    normalise = _Normalise(gm, repeats)

    def run(*args: Any) -> tuple[Any, list[Any]]:
        with _compat.FunctionalTensorMode():
            inputs = [_compat.to_fun(a) if isinstance(a, torch.Tensor) else a for a in args]
            with fx_traceback.preserve_node_meta():
                outputs = normalise.run(*inputs)
            outputs = pytree.tree_map_only(torch.Tensor, _compat.from_fun, outputs)
            updates: list[Any] = []
            for index, value in enumerate(inputs):
                if isinstance(value, torch.Tensor) and _compat.has_data_mutation(value):
                    mutated.append(index)
                    updates.append(_compat.from_fun(value))
        return outputs, updates

    with fake_mode, fx_traceback.preserve_node_meta():
        try:
            traced = _compat.make_fx(run, _DECOMPOSITIONS, pre_dispatch=True, tracing_mode="real")(*values)
        except _compat.GuardOnDataDependentSymNode as error:
            raise _size_of_data(normalise.node) from error
    normalise.repetitions.expand(traced.graph)
    return traced, mutated, normalise.repetitions.num_traced


class _Normalise(fx.Interpreter):
    """Runs Dynamo's graph for tracing, repetitions only once.

    Higher-order operators (`autograd.Function`, `flex_attention`) and functions of flash-attn are recorded whole: tracing into an
    `autograd.Function` would record its forward and lose its backward.
    """

    def __init__(self, gm: fx.GraphModule, repeats: Sequence[Repeat]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.repetitions = Repetitions(repeats)
        self.node: fx.Node
        """The one that is traced now."""

    def call_function(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:  # type: ignore[override]
        if isinstance(target, torch._ops.HigherOrderOperator) or is_kept(target):
            return self._record(target, tuple(args), kwargs)
        return super().call_function(target, args, kwargs)  # type: ignore[arg-type]

    def run_node(self, n: fx.Node) -> Any:
        if self.repetitions.take(n, self.env):
            return self.env[n]
        self.node = n
        with self.repetitions.tracing(n):
            return super().run_node(n)

    def _record(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tracer = _compat.current_tracer()

        def node_of(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return _compat.node_of(_compat.from_fun(value), tracer)
            if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                return _compat.node_of(value, tracer)
            if isinstance(value, fx.GraphModule):
                name = f"opaque_body_{len(tracer.graph.nodes)}"
                setattr(tracer.root, name, value)
                return tracer.graph.get_attr(name)
            return value

        node = tracer.create_node("call_function", target, *pytree.tree_map(node_of, (args, kwargs)))
        value = self.node.meta["example_value"]
        _compat.track_tensor_tree(value, fx.Proxy(node, tracer), constant=None, tracer=tracer)
        return pytree.tree_map_only(torch.Tensor, _compat.to_fun, value)
