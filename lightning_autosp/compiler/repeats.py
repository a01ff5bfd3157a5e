"""Runs of nodes that Dynamo's graph has several times, such as a model's layers: each is traced once and copied from then on.

    embedding, layer, layer, layer, layer, head    is traced as    embedding, layer, repeat(1), repeat(2), head

A repetition has the same operators on values of the same description (sizes and strides as expressions, type, device, requires
grad), wired in the same way, with the same constants and in the same `no_grad` and autocast regions; only what it takes from before
itself may be other values (its own parameters, the previous layer's result). Such a run is traced to the same nodes. An update
in place is the exception, if its effect leaves the run or comes from without: then everything is traced.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from lightning_autosp import _compat

__all__ = ["CannotRepeatError", "Repeat", "Repetitions", "find_repeats"]

_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)

MIN_NODES = 8
"""Shorter runs are as quickly traced."""


@dataclass
class Repeat:
    """A run of nodes that does what an earlier run did.

    Attributes:
        nodes: The run.
        source: The run it repeats, node by node.
        inputs: What `source` takes from before itself, with what `nodes` takes in its place.
        outputs: The nodes of the run that other nodes use.
    """

    nodes: list[fx.Node]
    source: list[fx.Node]
    inputs: dict[fx.Node, fx.Node]
    outputs: list[fx.Node]


def find_repeats(graph: fx.Graph) -> list[Repeat]:
    """Return the repetitions in a graph of Dynamo's, in order, none overlapping another."""
    # Numbers that follow from numbers: Dynamo computes each once, where it is first used.
    return _Search(
        [node for node in graph.nodes if not (_is_number(node) and all(map(_is_number, node.all_input_nodes)))]
    ).repeats()


class _Search:
    def __init__(self, nodes: list[fx.Node]) -> None:
        self.nodes = nodes
        self.place = {node: place for place, node in enumerate(nodes)}
        self.references = [[self.place[one] for one in _references(node)] for node in nodes]
        self.regions, descriptions = _describe_nodes(nodes)
        numbers: dict[Any, int] = {}
        self.kinds = [None if one is None else numbers.setdefault(one, len(numbers)) for one in descriptions]

    def repeats(self) -> list[Repeat]:
        found: list[Repeat] = []
        starts: dict[tuple[int | None, ...], list[int]] = defaultdict(list)
        start = 0
        while start < len(self.nodes):
            source, length, inputs = self._longest(start, starts[self._first_kinds(start)])
            if length:
                found.append(self._repeat(start, source, length, inputs))
            for place in range(start, start + max(length, 1)):
                starts[self._first_kinds(place)].append(place)
            start += max(length, 1)
        return found

    def _first_kinds(self, start: int) -> tuple[int | None, ...]:
        return tuple(self.kinds[start : start + MIN_NODES])

    def _longest(self, start: int, sources: Sequence[int]) -> tuple[int, int, dict[int, int]]:
        """Return `(source, length, inputs)` of the longest run from `start` on that one of the sources begins; length 0: none."""
        best: tuple[int, int, dict[int, int]] = (0, 0, {})
        if self.kinds[start] is None:
            return best
        for source in sources:
            if start - source < max(best[1], MIN_NODES):  # a run and what it repeats do not overlap
                break
            length, inputs = self._common(start, source)
            if length >= MIN_NODES and length > best[1]:
                best = (source, length, inputs)
        return best

    def _common(self, start: int, source: int) -> tuple[int, dict[int, int]]:
        """Return how many nodes from `start` on do what those from `source` on do, and their inputs for those of the source."""
        inputs: dict[int, int] = {}
        length = settled = num_inputs = 0
        while source + length < start and self._alike(start, source, length, inputs):
            length += 1
            # A run that stays in a region it entered, or leaves one, would have to switch modes.
            if self.regions[start + length] == self.regions[start]:
                settled, num_inputs = length, len(inputs)
        return settled, dict(list(inputs.items())[:num_inputs])

    def _alike(self, start: int, source: int, offset: int, inputs: dict[int, int]) -> bool:
        kind = self.kinds[source + offset]
        if kind is None or kind != self.kinds[start + offset]:
            return False
        for theirs, ours in zip(self.references[source + offset], self.references[start + offset], strict=True):
            if theirs >= source or ours >= start:
                if theirs - source != ours - start:
                    return False
            elif inputs.setdefault(theirs, ours) != ours:
                return False
        return True

    def _repeat(self, start: int, source: int, length: int, inputs: dict[int, int]) -> Repeat:
        nodes = self.nodes[start : start + length]
        outputs = [node for node in nodes if node.users.keys() - set(nodes)]
        pairs = {self.nodes[theirs]: self.nodes[ours] for theirs, ours in inputs.items()}
        return Repeat(nodes, self.nodes[source : source + length], pairs, outputs)


def _references(node: fx.Node) -> list[fx.Node]:
    """Return the nodes among the arguments, in order, each as often as it stands there, but for numbers: those are expressions."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return [one for one in found if not _is_number(one)]


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), _NUMBERS)


class _Unknown(Exception):
    """What decides how operators treat a value is not known."""


def _describe_nodes(nodes: Sequence[fx.Node]) -> tuple[list[Any], list[Any]]:
    """Return the region of each node, and all that decides what it is traced to but which values it takes (`None`: unknown)."""
    regions: list[Any] = []
    descriptions: list[Any] = []
    grad: Any = torch.is_grad_enabled()
    autocast: tuple[Any, ...] = ()
    unknown = 0
    values: dict[fx.Node, Any] = {}
    for node in nodes:
        region = (grad, autocast, unknown)
        opaque = isinstance(node.target, torch._ops.HigherOrderOperator)
        description = None
        try:
            values[node] = _describe(node.meta.get("example_value"))
            arguments = _describe_argument((node.args, node.kwargs), values)
            if node.op in ("call_function", "call_method", "get_attr") and not opaque:
                marks = (frozenset(node.meta), node.meta.get("recompute"))
                description = (node.op, node.target, arguments, values[node], marks, region)
        except _Unknown:
            pass
        regions.append(region)
        descriptions.append(description)
        if node.target is torch._C._set_grad_enabled:
            grad = node.args[0]
        elif node.target is torch.amp.autocast_mode._enter_autocast:
            autocast = (*autocast, node.args)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            autocast = autocast[:-1]
        elif node.op.startswith("call") and not opaque and node.target is not operator.setitem and values.get(node) is None:
            unknown += 1  # it may have switched a mode
    return regions, descriptions


def _describe(value: Any) -> Any:
    """Return what decides how operators treat a value, hashable.

    Raises:
        _Unknown: If that is more than is looked at here.
    """
    if isinstance(value, Tensor):
        if type(value) is not FakeTensor or value.layout is not torch.strided:
            raise _Unknown
        kind = (value.dtype, value.device, value.requires_grad, value.is_conj(), value.is_neg())
        return (kind, *map(_size, value.shape), *map(_size, value.stride()), _size(value.storage_offset()))
    if isinstance(value, _NUMBERS):
        return (type(value), value.node.expr)
    if isinstance(value, torch.Size):
        return (torch.Size, *map(_size, value))
    if isinstance(value, (tuple, list)):
        return (type(value), *map(_describe, value))
    if value is None:
        return None
    raise _Unknown


def _size(size: int | torch.SymInt) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _describe_argument(value: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(value, fx.Node):
        if _is_number(value):
            return (fx.Node, _describe(value.meta["example_value"]))
        if value not in values:
            raise _Unknown
        return (fx.Node, values[value])
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(_describe_argument(one, values) for one in value))
    if isinstance(value, dict):
        return (dict, tuple((key, _describe_argument(one, values)) for key, one in value.items()))
    if isinstance(value, slice):
        return (slice, tuple(_describe_argument(one, values) for one in (value.start, value.stop, value.step)))
    if isinstance(value, (float, complex)):
        return (type(value), repr(value))  # 0.0 equals -0.0
    try:
        hash(value)
    except TypeError:
        raise _Unknown from None
    return (type(value), value)


class CannotRepeatError(Exception):
    """A repetition that was taken turns out not to be one."""


class Repetitions:
    """Stands in for repetitions while a graph is traced and puts copies of what they repeat in their places afterwards."""

    def __init__(self, repeats: Sequence[Repeat]) -> None:
        self._repeats = {repeat.nodes[0]: repeat for repeat in repeats}
        self._taken: list[tuple[fx.Node, Repeat, list[tuple[fx.Node, int]]]] = []
        """The traced node that stands for a repetition, and of which node it returns which tensors."""
        self._origin: dict[fx.Node, fx.Node] = {}
        """For the nodes of repetitions, the node that was traced."""
        self._made: dict[fx.Node, list[fx.Node]] = {}
        """The nodes that tracing a node added."""
        self._results: dict[fx.Node, list[fx.Node]] = {}
        """The traced nodes that hold a node's tensors, as far as repetitions need to know them."""
        self._tensors: list[Tensor] = []
        """What goes into repetitions and comes out of them. Nothing that shares memory with it may be updated in place."""

    @property
    def num_traced(self) -> int:
        """Operators that were traced."""
        return sum(node.op.startswith("call") for node in self._made.keys() - self._origin.keys())

    @contextmanager
    def tracing(self, node: fx.Node) -> Iterator[None]:
        """Note what is added to the traced graph for a node."""
        nodes = _compat.current_tracer().graph.nodes
        last = next(iter(reversed(nodes)), None)
        yield
        made = self._made[node] = []
        for one in reversed(nodes):
            if one is last:
                break
            made.insert(0, one)

    def take(self, node: fx.Node, env: dict[fx.Node, Any]) -> bool:
        """Put one node into the traced graph for a repetition that starts here, and the values of its nodes into `env`."""
        repeat = self._repeats.get(node)
        if repeat is None:
            return False
        origin = {one: self._origin.get(one, one) for one in (*repeat.source, *repeat.inputs)}
        sources = dict(zip(repeat.nodes, repeat.source, strict=True))
        inputs = [(env[origin[theirs]], env[ours]) for theirs, ours in repeat.inputs.items()]
        outputs = {ours: env[origin[sources[ours]]] for ours in repeat.outputs}
        tensors = _tensors([inputs, list(outputs.values())])
        if any(map(_compat.is_updated, tensors)):
            return False
        examples = [ours.meta["example_value"] for ours in outputs]
        if not all(_interchangeable(*pair) for pair in (*inputs, *zip(outputs.values(), examples, strict=True))):
            return False

        # By the identity of Dynamo's tensors: an operator that does nothing returns its input.
        known: dict[int, Tensor] = {}
        for ours in repeat.inputs.values():
            known.update(zip(map(id, _tensors(ours.meta["example_value"])), _tensors(env[ours]), strict=True))
        new = {id(tensor): tensor for tensor in _tensors(examples) if id(tensor) not in known}
        tracer = _compat.current_tracer()
        if any(_compat.is_traced(tensor, tracer) for tensor in new.values()):
            return False
        call = tracer.create_node("call_function", _repetition, (), {})
        _compat.track_tensor_tree(list(new.values()), fx.Proxy(call, tracer), constant=None, tracer=tracer)
        known.update((key, _compat.to_fun(tensor)) for key, tensor in new.items())
        env.update(dict.fromkeys(repeat.nodes))
        for (ours, theirs), example in zip(outputs.items(), examples, strict=True):
            leaves, spec = pytree.tree_flatten(example)
            pairs = zip(leaves, pytree.tree_leaves(theirs), strict=True)  # numbers are the same
            env[ours] = pytree.tree_unflatten([known[id(own)] if isinstance(own, Tensor) else other for own, other in pairs], spec)

        for one in (*repeat.inputs, *repeat.inputs.values(), *(sources[ours] for ours in outputs)):
            traced = self._origin.get(one, one)
            if traced not in self._results:
                self._results[traced] = [_compat.node_of(_compat.from_fun(tensor), tracer) for tensor in _tensors(env[traced])]
        self._origin.update((ours, origin[theirs]) for ours, theirs in sources.items())
        self._tensors += tensors + list(known.values())
        places = {
            id(tensor): (ours, index) for ours in outputs for index, tensor in enumerate(_tensors(ours.meta["example_value"]))
        }
        self._taken.append((call, repeat, [places[key] for key in new]))
        return True

    def expand(self, graph: fx.Graph) -> None:
        """Replace every node that stands for a repetition by copies of what its source was traced to.

        Raises:
            CannotRepeatError: If that is not what tracing would have given; the graph is of no use then.
        """
        if any(map(_compat.is_updated, self._tensors)):
            raise CannotRepeatError
        kept = set(graph.nodes)
        for call, repeat, outputs in self._taken:
            copies: dict[fx.Node, fx.Node] = {}
            for theirs, ours in repeat.inputs.items():
                for one, other in zip(self._results[theirs], self._results[ours], strict=True):
                    if copies.setdefault(one, other) is not other:
                        raise CannotRepeatError
            with graph.inserting_before(call):
                for theirs, ours in zip(repeat.source, repeat.nodes, strict=True):
                    made = [one for one in self._made[theirs] if one in kept]
                    self._made[ours] = [_copy(graph, one, copies, ours) for one in made]
                    kept.update(self._made[ours])
                    if theirs in self._results:
                        self._results[ours] = [copies.get(one, one) for one in self._results[theirs]]
            for item in list(call.users):
                ours, index = outputs[item.args[1]]  # type: ignore[index]
                item.replace_all_uses_with(self._results[ours][index])
                graph.erase_node(item)
            graph.erase_node(call)


def _copy(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node], source: fx.Node) -> fx.Node:
    """Copy a traced node for another node of Dynamo's graph, whose source lines and modules it gets."""
    copies[node] = copy = graph.node_copy(node, lambda one: copies.get(one, one))
    copy.meta = {**node.meta, **{key: source.meta[key] for key in node.meta.keys() & source.meta.keys()}}
    return copy


def _repetition() -> None:
    """Stands for a repetition in a graph that is being traced."""


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _interchangeable(one: Any, other: Any) -> bool:
    """Whether operators are traced alike for two values. A tensor whose elements are known while tracing is like no other."""
    if one is other:
        return True
    try:
        one, other = (pytree.tree_map_only(Tensor, _compat.from_fun, value) for value in (one, other))
        known = any(map(_compat.has_known_elements, _tensors((one, other))))
        return not known and _describe(one) == _describe(other)
    except _Unknown:
        return False
