"""The joint graph of a step, forward and backward, and what running it takes for any choice of what is kept in between.

A `Joint` is read once. A `Schedule` says for one set of kept operators which run in forward and in which order backward runs,
what it computes again included; `Schedule.peaks` walks it and counts the storages alive. No graph is built to look at a choice.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lightning_autosp.memory.costs import Cost, cost, is_attention, is_view, workspace_bytes

__all__ = ["Joint", "Memory", "Operator", "Peak", "Schedule", "Transfer", "Watch"]

aten = torch.ops.aten

Storages = dict[int, int]
"""`storage -> bytes`."""


def tensors_of(node: fx.Node) -> list[Tensor]:
    """Return the tensors of a node's value."""
    return [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]


def storages(node: fx.Node) -> Storages:
    """Return the storages of a node's value."""
    found = (value.untyped_storage() for value in tensors_of(node) if value.layout == torch.strided)
    return {storage._cdata: storage.nbytes() for storage in found}


@dataclass(frozen=True)
class Transfer:
    """One step of moving a value to the host or back, among a schedule's operators.

    Attributes:
        value: What is moved.
        step: The operator of `memory.host`.
    """

    value: fx.Node
    step: Literal["offload", "offloaded", "fetch", "fetched"]

    @property
    def starts(self) -> bool:
        """Whether a copy begins, or is waited for."""
        return self.step in ("offload", "fetch")

    @property
    def all_input_nodes(self) -> list[fx.Node]:
        return [] if self.step == "fetch" else [self.value]


Operator = fx.Node | Transfer
"""What a schedule consists of."""

Watch = Callable[[Operator, Storages, int], None]
"""Is told of every operator in turn: what is alive while it runs, and the workspace of its kernel."""


@dataclass(frozen=True)
class Peak:
    """The most memory a graph takes at once.

    Attributes:
        bytes: Of all storages alive that are not resident, and the workspace of the operator that runs.
        node: The operator at which it occurs, for a copy the one whose value is copied; `None` for an empty graph.
        alive: The storages alive then, and their bytes.
        workspace: What the operator's kernel needs besides.
    """

    bytes: int
    node: fx.Node | None
    alive: Storages
    workspace: int


class Memory:
    """The storages of a graph's values, and which operators use them."""

    def __init__(self, nodes: Iterable[fx.Node], *, fused: bool = False) -> None:
        self.fused = fused
        """Whether values that are made and used between two operators that do not fuse take no memory."""
        self.made: dict[Operator, Storages] = {}
        """The storages of each node's value on the device."""
        self.used: dict[Operator, tuple[int, ...]] = {}
        """Those of its inputs and its own."""
        self.workspace: dict[Operator, int] = {}
        self.items: dict[Operator, list[fx.Node]] = {}
        same: dict[int, int] = {}
        for node in nodes:
            if node.target is torch.ops._c10d_functional.wait_tensor.default:
                # It returns what it waits for, though its fake result has a storage of its own.
                same.update(zip(storages(node), self.made[node.all_input_nodes[0]], strict=True))
            self.made[node] = {same.get(key, key): size for key, size in storages(node).items()}
            keys = dict.fromkeys(key for source in (*node.all_input_nodes, node) for key in self.made[source])
            self.used[node] = tuple(keys)
            self.workspace[node] = workspace_bytes(node)
            items = [user for user in node.users if user.target is operator.getitem]
            if items and not isinstance(node.meta.get("val"), Tensor):
                self.items[node] = items

    def bytes_made(self, node: fx.Node) -> int:
        """Return the bytes of storages that the operator makes, not those of its inputs."""
        given = {key for source in node.all_input_nodes for key in self.made[source]}
        return sum(size for key, size in self.made[node].items() if key not in given)

    def walk(
        self,
        order: Sequence[Operator],
        inputs: Storages,
        outputs: set[int],
        resident: set[int],
        collect: bool = False,
        watch: Watch | None = None,
    ) -> Peak:
        """Run operators in thought, and count.

        Args:
            order: In the order they run.
            inputs: Storages that are alive at the start and freed behind their last use.
            outputs: Storages that are never freed.
            resident: Storages that are not counted: parameters, inputs that the caller holds.
            collect: Whether to note what is alive at the peak.
            watch: Is told of every operator.
        """
        for node in order:
            if isinstance(node, Transfer) and node not in self.made:
                # What a copy on the host takes is not the device's; the one that comes back takes the value's place.
                self.used[node] = tuple(self.made[node.value])
                self.made[node] = self.made[node.value] if node.step == "fetch" else {}
                self.workspace[node] = 0
        made, used = self._versions(order)
        last: dict[Any, int] = {}
        held: dict[Operator, int] = {}
        for position, node in enumerate(order):
            for key in used[position]:
                last[key] = position
            # The tuple that an operator with several results returns holds all of them until the last was taken out.
            picks = isinstance(node, fx.Node) and node.target is operator.getitem
            source = node.all_input_nodes[0] if picks else None
            if source in held:
                for key in made[held[source]]:
                    last[key] = max(last[key], position)
            if node in self.items:
                held[node] = position
        free: dict[int, list[Any]] = {}
        for key, position in last.items():
            if key not in outputs and key not in resident:
                free.setdefault(position, []).append(key)
        fleeting: set[Any] = set()
        if self.fused:
            apart = list(itertools.accumulate((not fuses(node) for node in order), initial=0))
            for position, keys in enumerate(made):
                fleeting.update(k for k in keys if k in last and k not in outputs and apart[position] == apart[last[k] + 1])
        alive: dict[Any, int] = {
            key: size for key, size in inputs.items() if key not in resident and (key in last or key in outputs)
        }
        current = sum(alive.values())
        best, where, at_peak, space = current, None, dict(alive) if collect else {}, 0
        for position, node in enumerate(order):
            for key, size in made[position].items():
                if key not in alive and key not in resident and key not in fleeting:
                    alive[key] = size
                    current += size
            extra = self.workspace[node]
            if current + extra > best or where is None:
                best, space = max(best, current + extra), extra
                where = node.value if isinstance(node, Transfer) else node
                if collect:
                    at_peak = dict(alive)
            if watch is not None:
                watch(node, _by_storage(alive), extra)
            for key in free.get(position, ()):
                current -= alive.pop(key, 0)
        return Peak(best, where, _by_storage(at_peak), space)

    def _versions(self, order: Sequence[Operator]) -> tuple[list[dict[Any, int]], list[Sequence[Any]]]:
        """Return what each operator makes and uses. One that runs again makes storages of its own each time."""
        if len(set(order)) == len(order):
            return [self.made[node] for node in order], [self.used[node] for node in order]
        held: dict[Operator, dict[int, Any]] = {}
        runs: Counter[Operator] = Counter()
        made: list[dict[Any, int]] = []
        used: list[Sequence[Any]] = []
        for node in order:
            given: dict[int, Any] = {}
            for source in node.all_input_nodes:
                given |= held[source] if source in held else {key: key for key in self.made[source]}
            run = runs[node]
            held[node] = {key: given.get(key, (key, run) if run else key) for key in self.made[node]}
            runs[node] += 1
            made.append({held[node][key]: size for key, size in self.made[node].items()})
            used.append(tuple(dict.fromkeys((*given.values(), *held[node].values()))))
        return made, used


def _by_storage(alive: dict[Any, int]) -> Storages:
    """Add up what is alive of a storage that exists more than once, because its operator runs again."""
    found: Storages = {}
    for key, size in alive.items():
        name = key[0] if isinstance(key, tuple) else key
        found[name] = found.get(name, 0) + size
    return found


class Joint:
    """What is known of a joint graph before anything is decided.

    Attributes:
        nodes: All operators, in order.
        backward: Those that depend on a gradient.
        outputs: What forward returns.
        grads: What backward returns.
        primals: Inputs of forward.
        of_parameters: Values that follow from parameters alone: made again rather than kept.
        of_data: Values that follow from inputs alone.
    """

    def __init__(self, graph: fx.Graph, num_fwd_outputs: int, parameters: Iterable[int], *, fused: bool = False) -> None:
        """Read a joint graph.

        Args:
            graph: As AOTAutograd traces it, without symbols.
            num_fwd_outputs: How many of its outputs are forward's.
            parameters: Which of its inputs are parameters, by number.
            fused: Whether it will be compiled by a backend that fuses elementwise operators.
        """
        self.graph = graph
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.memory = Memory(self.nodes, fused=fused)
        self.position = {node: index for index, node in enumerate(self.nodes)}
        results = pytree.arg_tree_leaves(*graph.output_node().args)
        self.outputs = [node for node in results[:num_fwd_outputs] if isinstance(node, fx.Node)]
        self.grads = [node for node in results[num_fwd_outputs:] if isinstance(node, fx.Node)]
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.tangents = [node for node in placeholders if "tangents" in str(node.target)]
        self.primals = [node for node in placeholders if "tangents" not in str(node.target)]
        chosen = set(parameters)
        self.resident = {key for node in self.primals for key in self.memory.made[node]}
        """Storages of inputs: their callers hold them."""
        self.parameters = [node for index, node in enumerate(self.primals) if index in chosen]
        self.backward: set[fx.Node] = set()
        for node in self.nodes:
            if node in self.tangents or any(source in self.backward for source in node.all_input_nodes):
                self.backward.add(node)
        self.of_parameters, self.of_data = self._kinds()
        self.forward = self._needed(self.outputs)
        self._wanted: set[fx.Node] | None = None
        self._costs: dict[fx.Node, Cost] = {}

    def _kinds(self) -> tuple[set[fx.Node], set[fx.Node]]:
        with_parameters, with_data = set(self.parameters), set(self.primals) - set(self.parameters)
        for node in self.nodes:
            if node.op == "placeholder":
                continue
            if any(source in with_parameters for source in node.all_input_nodes):
                with_parameters.add(node)
            if any(source in with_data for source in node.all_input_nodes) or is_random(node):
                with_data.add(node)
        everything = set(self.nodes) - self.backward
        return (with_parameters - with_data) & everything, everything - with_parameters

    def _needed(self, roots: Iterable[fx.Node]) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        pending = list(roots)
        pending += [node for node in self.nodes if is_mutation(node) and node not in self.backward]
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending += node.all_input_nodes
        return needed

    def is_activation(self, node: fx.Node) -> bool:
        """Whether the value depends on parameters and on data, and is no gradient."""
        return node not in self.backward and node not in self.of_parameters and node not in self.of_data

    def cost(self, node: Operator) -> Cost:
        """Return what running an operator costs; copies to the host and back run beside."""
        if isinstance(node, Transfer):
            return Cost()
        if node not in self._costs:
            self._costs[node] = cost(node)
        return self._costs[node]

    def schedule(self, kept: set[fx.Node], passed: Set[fx.Node] = frozenset()) -> Schedule:
        """Return what runs if the results of these operators are kept for backward, and everything else is computed again.

        Args:
            kept: Operators; for one with several results, the operator itself, not what takes a result out.
            passed: Operators whose results backward makes first and holds: what leads to one is not held with it, but computed
                once more where its own gradient is. Backward then has the inside of one layer at a time, not of all
                between two that are kept.
        """
        pulling = _Pulling(self, kept, passed)
        wanted = self._needed_backward()
        for node in self.nodes:
            if node in wanted and node.op != "placeholder":
                pulling.provide(node)
        for grad in self.grads:  # one that depends on no tangent
            pulling.provide(grad)
        first = self._forward_with(pulling.saved)
        forward = [node for node in self.nodes if node in first and node.op != "placeholder"]
        return Schedule(self, self._with_items(forward), self._with_items(pulling.order), list(pulling.saved))

    def _forward_with(self, saved: Iterable[fx.Node]) -> set[fx.Node]:
        extra = [node for node in saved if node not in self.forward]
        if not extra:
            return self.forward
        return self._needed([*self.outputs, *saved])

    def _needed_backward(self) -> set[fx.Node]:
        if self._wanted is None:
            needed: set[fx.Node] = set()
            pending = [node for node in self.grads if node in self.backward]
            pending += [node for node in self.nodes if is_mutation(node) and node in self.backward]
            while pending:
                node = pending.pop()
                if node not in needed and node in self.backward:
                    needed.add(node)
                    pending += node.all_input_nodes
            self._wanted = needed
        return self._wanted

    def _with_items(self, order: list[fx.Node]) -> list[fx.Node]:
        """Take results out of a tuple right behind the operator that gives it, so that it does not hold what nobody needs."""
        present = set(order)
        out: list[fx.Node] = []

        def add(node: fx.Node) -> None:
            out.append(node)
            for item in self.memory.items.get(node, ()):
                if item in present:
                    add(item)

        for node in order:
            if node.target is not operator.getitem or node.args[0] not in present:
                add(node)
        return out


class _Pulling:
    """Collects what backward runs, from the operators it has to."""

    def __init__(self, joint: Joint, kept: set[fx.Node], passed: Set[fx.Node]) -> None:
        self.joint, self.kept, self.passed = joint, kept, passed
        self.order: list[fx.Node] = []
        self.saved: dict[fx.Node, None] = {}
        self._primals = set(joint.primals)
        self._done: set[fx.Node] = set(joint.tangents)

    def provide(self, node: fx.Node) -> None:
        """Have a value, and what it is computed from, exist in backward."""
        self._done |= self._run(node)

    def _run(self, node: fx.Node) -> set[fx.Node]:
        """Run what is missing to compute a value, itself last, and return it."""
        missing: set[fx.Node] = set()
        before: set[fx.Node] = set()
        pending = [node]
        while pending:
            one = pending.pop()
            if one in self._done or one in missing or one in before:
                continue
            if one in self._primals or (one not in self.joint.backward and unit(one) in self.kept):
                self.saved[one] = None
                self._done.add(one)
            elif one is not node and one not in self.joint.backward and unit(one) in self.passed:
                before.add(one)
            else:
                missing.add(one)
                pending += one.all_input_nodes
        for one in sorted(before, key=self.joint.position.__getitem__):
            if one not in self._done:  # it may have been passed on the way to another
                self._run(one)
                self._done.add(one)
        self.order += sorted(missing, key=self.joint.position.__getitem__)
        return missing


@dataclass
class Schedule:
    """What runs in forward and in backward, in order, and what is kept in between.

    Attributes:
        joint: The graph.
        forward: Operators.
        backward: Operators, those that are computed again among them.
        saved: Values that forward hands to backward, inputs included.
        offloaded: Those values that lie on the host in between.
        stalled: Seconds that operators wait for them, on the roofline.
    """

    joint: Joint
    forward: Sequence[Operator]
    backward: Sequence[Operator]
    saved: list[fx.Node]
    offloaded: frozenset[fx.Node] = field(default_factory=frozenset)
    stalled: float = 0.0

    def refreshed(self, patience: int) -> Schedule:
        """Return the schedule in which cheap values do not wait for their next use, but are computed once more before it.

        Without, whatever backward computes again exists once, and what a layer first made (the float32 copies of a norm)
        waits until the rest of the layer has been differentiated.

        Args:
            patience: So many costly operators (products, attention, collectives) they do wait.
        """
        fresh = self._fresh
        order: list[fx.Node] = []
        made_at: dict[fx.Node, int] = {}
        costly = 0

        def provide(node: fx.Node) -> None:
            for source in node.all_input_nodes:
                if source in fresh and costly - made_at.get(source, -patience) >= patience:
                    provide(source)
                    made_at[source] = costly
                    order.append(source)

        for node in self.backward:
            assert not isinstance(node, Transfer), "what lies on the host is decided of a schedule that is refreshed"
            if node not in fresh:
                provide(node)
                order.append(node)
                costly += not self._is_cheap(node)
        for grad in self.joint.grads:
            if grad in fresh and grad not in made_at:
                provide(grad)
                order.append(grad)
        return replace(self, backward=order)

    def _is_cheap(self, node: fx.Node) -> bool:
        one = self.joint.cost(node)
        return is_view(node) or not (one.flops or one.sent or is_attention(node) or self.joint.memory.workspace[node])

    @functools.cached_property
    def _fresh(self) -> set[fx.Node]:
        """The values that are no more to keep alive than what they are computed from."""
        joint, memory = self.joint, self.joint.memory
        # What no gradient goes into: computed again, or made for backward alone, as zeros that gradients of slices are written to.
        first = (node for node in dict.fromkeys(self.backward) if isinstance(node, fx.Node) and node not in joint.backward)
        again = [node for node in first if node not in memory.items and node.target is not operator.getitem]
        cheap = {node for node in again if self._is_cheap(node) and not is_random(node) and not is_mutation(node)}
        alive = set(self.saved) | set(joint.primals)
        demanded = {source for node in self.backward if node not in cheap for source in node.all_input_nodes}
        size = memory.bytes_made
        memo: dict[fx.Node, int] = {}

        def to_provide(node: fx.Node) -> int:
            """Bytes that have to stay alive, which would not otherwise, so that the value can be computed at any time."""
            if node in alive or node in demanded or node in joint.backward:
                return 0
            if node not in memo:
                own = size(node) if node in cheap else sum(memory.made[node].values())
                inside = sum(map(to_provide, node.all_input_nodes)) if node in cheap else own
                memo[node] = min(own, inside) if size(node) else inside
            return memo[node]

        fresh: set[fx.Node] = set()
        for node in reversed(again):
            if node not in cheap or (node not in demanded and node not in fresh):
                continue
            memo.clear()
            if size(node) == 0 or sum(map(to_provide, node.all_input_nodes)) < size(node):
                fresh.add(node)
                for source in node.all_input_nodes:
                    through = source in cheap and sum(map(to_provide, source.all_input_nodes)) < max(1, size(source))
                    (fresh if through and source not in demanded else demanded).add(source)
        return fresh & cheap

    @property
    def recomputed(self) -> list[fx.Node]:
        """Operators of forward that run again, as often as they do."""
        first = set(self.forward)
        return [node for node in self.backward if isinstance(node, fx.Node) and node in first]

    def saved_storages(self) -> Storages:
        """Return what is kept on the device."""
        return self._storages(node for node in self.saved if node not in self.offloaded)

    def host_storages(self) -> Storages:
        """Return what is kept on the host."""
        return self._storages(node for node in self.saved if node in self.offloaded)

    def _storages(self, nodes: Iterator[fx.Node]) -> Storages:
        made, resident = self.joint.memory.made, self.joint.resident
        return {key: size for node in nodes for key, size in made[node].items() if key not in resident}

    def peaks(self, collect: bool = False, watch: tuple[Watch | None, Watch | None] = (None, None)) -> tuple[Peak, Peak]:
        """Return the peaks of forward and of backward, without parameters and inputs; `watch` is told of the operators of each."""
        joint, made = self.joint, self.joint.memory.made
        saved = self.saved_storages()
        outputs = {key: size for node in joint.outputs for key, size in made[node].items() if key not in joint.resident}
        forward = joint.memory.walk(self.forward, {}, outputs.keys() | saved.keys(), joint.resident, collect, watch[0])
        grads = {key for node in joint.grads for key in made[node]}
        tangents = {key: size for node in joint.tangents for key, size in made[node].items()}
        start = {**outputs, **saved, **tangents}
        backward = joint.memory.walk(self.backward, start, grads | outputs.keys(), joint.resident, collect, watch[1])
        return forward, backward


def unit(node: fx.Node) -> fx.Node:
    """Return the operator that computes a value: several results are kept or computed again together."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


_REDUCTIONS = {
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.amin.default,
    aten.var_mean.correction,
    aten._softmax.default,
    aten._softmax_backward_data.default,
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
}


_POINTWISE = {aten._to_copy.default, aten.expand.default, aten.full.default, aten.slice_scatter.default}
"""Operators without that tag that Inductor computes element by element, too."""


def fuses(node: Operator) -> bool:
    """Whether Inductor computes the operator in one kernel with its neighbours: elementwise ones, views, reductions of rows."""
    if isinstance(node, Transfer):
        return False
    if is_view(node) or node.target in _REDUCTIONS:
        return True
    target = node.target
    return torch.Tag.pointwise in getattr(target, "tags", ()) or target in _POINTWISE


def is_random(node: fx.Node) -> bool:
    """Whether running the operator twice gives two results."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")  # an attention kernel, which draws only then
    given = node.args[place] if place < len(node.args) else node.kwargs.get("dropout_p", 0.0)
    return not (isinstance(given, float) and given == 0.0)


def is_mutation(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
