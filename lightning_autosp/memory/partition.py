"""The partitioner that AOTAutograd and Inductor call: from a joint graph to forward and backward, by a policy and a limit."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lightning_autosp import _compat
from lightning_autosp.lines import user_line
from lightning_autosp.memory import host
from lightning_autosp.memory.costs import Roofline
from lightning_autosp.memory.devices import format_bytes
from lightning_autosp.memory.estimate import (
    MemoryEstimate,
    MemoryLimitError,
    States,
    estimate_forward,
    estimate_training,
)
from lightning_autosp.memory.joint import Joint, Operator, Transfer, unit
from lightning_autosp.memory.policy import MIXTURE, NESTED_MIXTURE, Choice, Limits, Recomputation, choose, keep_for, place

__all__ = ["Agreed", "Decision", "DoesNotFitError", "MemoryOptions", "Partitioner", "SavedPlanError"]


class DoesNotFitError(RuntimeError):
    """A program does not fit its limit; raised before it is compiled, where there is another way to compile it."""


class SavedPlanError(ValueError):
    """A file holds no plan, or the plan of another step than the one that runs."""


class Decision(NamedTuple):
    """What is kept, in words that mean the same on all ranks: a policy, for a mixture the operators, what is moved (`_keys`)."""

    policy: str
    kept: tuple[str, ...]
    patience: int
    fits: bool
    tiled: bool = False
    offloaded: tuple[str, ...] = ()
    places: tuple[int, ...] = ()
    """Of a mixture: the operators' numbers among those of the first rank's forward, which hold in other processes too."""
    moved: tuple[int, ...] = ()
    """The numbers of what is moved to the host, likewise."""
    operators: str = ""
    """A digest of that forward."""
    refused: str = ""
    """Why what was decided in another process cannot be done in this one."""


Agreed = tuple[Decision, MemoryEstimate]


def _own(found: Any) -> Any:
    return found


@dataclass(frozen=True)
class MemoryOptions:
    """How memory is planned.

    Attributes:
        policy: Which values are kept for backward: a `CheckpointPolicy`, or `memory.policy.LEAST`.
        limit: Bytes a rank may take in all; `None`: any.
        refuse: Whether a step that is predicted to take more is an error, or only reported.
        roofline: What time is estimated by.
        overhead: Bytes that are not the program's.
        host_limit: Bytes a rank may keep on the host; `None`: any. "auto" with 0 moves nothing there.
        states: Gives what the rank holds besides, when a program is compiled.
        fused: Whether the backend fuses elementwise operators, so that what is between them takes no memory.
        agree: Gives all ranks that compile a program at the same time one decision and estimate: graphs that differ would meet in
            different collectives. Of uneven parts, the first rank's are the largest.
        one_decision: Whether what is decided for a step's first program holds for all, because ranks meet others in the gathers of
            parameters that may be running another: then a named policy is chosen.
        decisions: What was decided for each kind of step, where that holds for all.
    """

    policy: str
    limit: int | None
    refuse: bool
    roofline: Roofline
    overhead: int = 0
    host_limit: int | None = 0
    states: Callable[[], States] = States
    fused: bool = False
    agree: Callable[[Any], Any] = _own
    one_decision: bool = False
    decisions: dict[str, Decision] = field(default_factory=dict)


@dataclass
class Partitioner:
    """Divides the joint graph of one program, and estimates what it takes.

    Attributes:
        options: How.
        states: What the rank holds besides, the program's inputs included.
        parameters: Which inputs of the program are parameters, by number.
        decided: What was decided for another program, to be done here too.
        may_retry: Whether there is another way to compile the program if it does not fit.
        length: Positions of the longest sequence, for messages; 0 if there is none.
        estimate: What was found; `None` before it was called.
    """

    options: MemoryOptions
    states: States
    parameters: Sequence[int]
    decided: Decision | None = None
    may_retry: bool = False
    length: int = 0
    estimate: MemoryEstimate | None = field(default=None, init=False)

    @classmethod
    def of(
        cls,
        options: MemoryOptions,
        inputs: Sequence[Tensor],
        parameters: Sequence[int],
        decided: Decision | None = None,
        *,
        may_retry: bool = False,
        length: int = 0,
    ) -> Partitioner:
        """Return the partitioner of a program that is about to be called with these inputs."""
        of_parameters = set(parameters)
        batch = sum(value.nbytes for index, value in enumerate(inputs) if index not in of_parameters)
        states = options.states()
        held = replace(states, inputs=batch)
        return cls(options, held, parameters, decided, may_retry, length)

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[Any], *, num_fwd_outputs: int, **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        joint = self.read(gm, num_fwd_outputs, self.parameters, fused=self.options.fused)
        options["num_fwd_outputs"] = num_fwd_outputs
        if not joint.backward or any(isinstance(node.meta.get("val"), torch.SymInt) for node in joint.nodes):
            return _compat.min_cut(gm, joint_inputs, set(), **options)
        default: set[fx.Node] = set()
        if (self.options.policy if self.decided is None else self.decided.policy) in ("none", "auto"):
            default = self.default(gm, joint, joint_inputs, **options)
        choice = self.decide(joint, default)
        assert self.decided is not None
        if not self.decided.fits and self.may_retry:
            raise DoesNotFitError
        self._refuse()
        schedule = choice.schedule
        forward, backward = _compat.extract_forward_and_backward(gm, list(schedule.saved), num_fwd_outputs)
        return reorder(forward, schedule.forward), reorder(backward, schedule.backward)

    @staticmethod
    def read(gm: fx.GraphModule, num_fwd_outputs: int, parameters: Sequence[int], *, fused: bool = False) -> Joint:
        """Return what is known of a joint graph, which is rid of what it computes twice."""
        gm.graph = _compat.without_duplicates(gm.graph)
        return Joint(gm.graph, num_fwd_outputs, parameters, fused=fused)

    @staticmethod
    def default(gm: fx.GraphModule, joint: Joint, joint_inputs: Sequence[Any], **options: Any) -> set[fx.Node]:
        """Return the operators whose results PyTorch's partitioner keeps, parameters that were gathered excepted."""
        again = joint.of_parameters - set(joint.primals)
        _, backward = _compat.min_cut(gm, joint_inputs, again, **options)
        names = {node.name for node in backward.graph.find_nodes(op="placeholder")}
        return {unit(node) for node in joint.nodes if node.name in names and node.op != "placeholder"}

    def decide(self, joint: Joint, default: set[fx.Node]) -> Choice:
        """Choose what is kept, and estimate it."""
        chosen = self.options
        limit = None if chosen.limit is None else chosen.limit - self.states.total - chosen.overhead
        limits = Limits(limit, chosen.host_limit)
        if self.decided is not None:
            if (self.decided.places and not self.decided.kept) or (self.decided.moved and not self.decided.offloaded):
                self.decided = chosen.agree(_named(joint, self.decided))
            if self.decided.refused:
                raise SavedPlanError(self.decided.refused)
            choice = self._follow(joint, self.decided, limits, default)
            self.estimate = self._estimate(joint, choice)
            return choice
        choice = choose(joint, chosen.policy, chosen.roofline, limits, default, mixtures=not chosen.one_decision)
        own = Decision(choice.policy, (), choice.patience, choice.fits)
        keys = _keys(joint)
        kept = choice.kept if choice.policy in (MIXTURE, NESTED_MIXTURE) else set()
        if kept or choice.schedule.offloaded:
            places = [place for place, node in enumerate(keys) if node in kept]
            moved = [place for place, node in enumerate(keys) if node in choice.schedule.offloaded]
            own = own._replace(places=tuple(places), moved=tuple(moved), operators=_digest(joint))
            own = _named(joint, own)
        self.decided, self.estimate = chosen.agree((own, self._estimate(joint, choice)))
        return choice if self.decided == own else self._follow(joint, self.decided, limits, default)

    def _estimate(self, joint: Joint, choice: Choice) -> MemoryEstimate:
        chosen = self.options
        estimate = estimate_training(joint, choice, self.states, chosen.limit, chosen.overhead, chosen.roofline)
        return replace(estimate, host_limit=chosen.host_limit)

    def _follow(self, joint: Joint, decision: Decision, limits: Limits, default: set[fx.Node]) -> Choice:
        """Return what another rank, or this one for another program, decided."""
        keys = _keys(joint)
        if decision.policy in (MIXTURE, NESTED_MIXTURE):
            wanted = set(decision.kept)
            kept = {node for node, key in keys.items() if key in wanted}
        else:
            kept = default if decision.policy == "none" else keep_for(joint, decision.policy)
        again = Recomputation(joint, self.options.roofline)
        moved = set(decision.offloaded)
        return place(joint, decision.policy, kept, decision.patience, lambda value: keys[value] in moved, again, limits)

    def see(self, gm: fx.GraphModule) -> None:
        """Estimate a graph without backward, which is not partitioned."""
        if self.estimate is None:
            self.estimate = estimate_forward(gm.graph, self.states, self.options.limit, self.options.overhead)
            self._refuse()

    def _refuse(self) -> None:
        found = self.estimate
        if found is None:
            return
        if not found.fits_host:
            assert found.host_limit is not None
            raise MemoryLimitError(
                f"checkpoint_policy={self.options.policy!r} keeps {format_bytes(found.host)} on the host for each rank, and "
                f"host_memory_limit is {format_bytes(found.host_limit)}. Use checkpoint_policy='auto', which moves as much as "
                "fits, a shorter sequence, more ranks or a larger limit."
            )
        if found.fits or not self.options.refuse:
            return
        assert found.limit is not None
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in found.categories.items() if size)
        raise MemoryLimitError(
            f"The step is predicted to take {format_bytes(found.peak)} on a rank, and memory_limit is {format_bytes(found.limit)} "
            f"(checkpoint_policy={self.options.policy!r}, {found.phase} at {found.where}: {parts}). "
            f"{self._advice(found, found.limit)}"
        )

    def _advice(self, found: MemoryEstimate, limit: int) -> str:
        fixed = sum(found.categories.get(name, 0) for name in ("parameters", "gradients", "optimizer", "gathered", "overhead"))
        if fixed >= limit:
            return "Parameters, gradients and optimizer state alone are more: use more ranks or a larger limit."
        length = int(self.length * (limit - fixed) / max(1, found.peak - fixed))
        fits = f"About {length} of {self.length} positions would fit: use" if length else "Use"
        return f"{fits} a shorter sequence, more ranks or a larger limit."


def _keys(joint: Joint) -> dict[fx.Node, str]:
    """Return for every operator of forward what means the same on ranks whose graphs differ a little.

    Of uneven parts some are padded, so that neither names nor places agree: an operator is the n-th of its kind at its line.
    """
    counts: Counter[tuple[str, str]] = Counter()
    keys = {}
    for node in joint.nodes:
        if node.op == "call_function" and node not in joint.backward:
            kind = (str(node.target), user_line(node))
            counts[kind] += 1
            keys[node] = f"{kind[0]} {kind[1]} {counts[kind]}"
    return keys


def _digest(joint: Joint) -> str:
    return hashlib.sha256(" ".join(str(node.target) for node in _keys(joint)).encode()).hexdigest()


def _named(joint: Joint, decision: Decision) -> Decision:
    """Return a decision from another process with the operators it keeps and moves named as this process's ranks name them."""
    if _digest(joint) != decision.operators:
        return decision._replace(
            refused="The plan keeps or moves single operators of forward, and for this device or compile_backend forward has "
            "others. Plan with the compile_backend that trains, or use checkpoint_policy='auto'."
        )
    keys = list(_keys(joint).values())
    kept, moved = (tuple(keys[place] for place in places) for places in (decision.places, decision.moved))
    return decision._replace(kept=kept, offloaded=moved)


def reorder(module: fx.GraphModule, order: Sequence[Operator]) -> fx.GraphModule:
    """Return the module with these operators, by name, in this order; who uses one that runs again uses its latest result.

    What else it holds is left over: operators that draw random numbers, and collectives, are not taken for dead code.
    """
    named = {node.name: node for node in module.graph.nodes if node.op != "output"}
    inputs = module.graph.find_nodes(op="placeholder")
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.node_copy(node)
    results = dict(env)
    copies: dict[fx.Node, fx.Node] = {}
    for one in order:
        if isinstance(one, Transfer):
            value = named[one.value.name]
            _add_transfer(graph, one, value, env, copies, results)
        else:
            node = named[one.name]
            env[node] = results[node] = graph.node_copy(node, env.__getitem__)
    graph.node_copy(module.graph.output_node(), results.__getitem__)
    graph.lint()
    return fx.GraphModule(module, graph)


def _add_transfer(
    graph: fx.Graph,
    one: Transfer,
    value: fx.Node,
    env: dict[fx.Node, fx.Node],
    copies: dict[fx.Node, fx.Node],
    results: dict[fx.Node, fx.Node],
) -> None:
    """Add one step of moving a value to the host, for which forward then returns what lies there, or back from it."""
    if one.step == "offload":
        copies[value] = _call(graph, host.offload, env[value])
    elif one.step == "offloaded":
        results[value] = _call(graph, host.offloaded, copies[value], env[value])
    elif one.step == "fetch":
        device = value.meta["val"].device
        env[value].meta["val"] = host.offload(value.meta["val"])
        copies[value] = _call(graph, host.fetch, env[value], device)
    else:
        env[value] = _call(graph, host.fetched, copies[value], env[value])


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    given: Any = fx.map_arg(args, lambda source: source.meta["val"])
    node.meta["val"] = target(*given)
    return node
