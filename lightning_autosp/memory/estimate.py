"""What a program takes: bytes by category at its peak, where that is, and the time that computing again costs."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_autosp.lines import user_line
from lightning_autosp.memory.costs import Cost, Roofline, cost, is_collective
from lightning_autosp.memory.devices import format_bytes
from lightning_autosp.memory.joint import Joint, Memory, Operator, Peak, Storages, Transfer, Watch
from lightning_autosp.memory.meter import LiveBytes
from lightning_autosp.memory.policy import Choice

__all__ = [
    "MemoryEstimate",
    "MemoryLimitError",
    "Moment",
    "States",
    "estimate_forward",
    "estimate_training",
    "forward_moments",
    "model_flops",
    "optimizer_memory",
    "training_moments",
]


class MemoryLimitError(RuntimeError):
    """A step is predicted not to fit the memory limit."""


@dataclass(frozen=True)
class States:
    """What a rank holds whatever the step does, in bytes.

    Attributes:
        parameters: Parameters and buffers, this rank's part.
        gradients: Of parameters, held over several steps that accumulate; 0 if each step starts without.
        optimizer: Its state after the first step.
        optimizer_step: What its step takes besides, for a moment.
        inputs: The batch.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    optimizer_step: int = 0
    inputs: int = 0

    @property
    def total(self) -> int:
        """Bytes held while the step runs."""
        return self.parameters + self.gradients + self.optimizer + self.inputs


@dataclass
class MemoryEstimate:
    """What one program is predicted to take.

    Attributes:
        policy: What decides which values are kept for backward: a checkpoint policy, or "mixture" between them.
        peak: Most bytes at once on the device, everything included.
        where: The line at which that is.
        phase: "forward", "backward" or "optimizer step".
        categories: Bytes of the peak by what they are: parameters, gradients, optimizer, inputs, saved (for backward), gathered
            (parameters made whole), collectives (what they brought), transient, workspace (of kernels), overhead.
        saved: Bytes kept for backward on the device.
        host: Bytes kept for backward on the host.
        limit: Bytes a rank may take; `None` if any.
        flops: Of forward and backward, without what is computed again.
        flops_again: Of what is computed again, but for what tiles do within backward.
        seconds_again: What computing again, and waiting for copies to the host and back, costs on the stated roofline.
        step_seconds: Of forward and backward on the same roofline, nothing overlapping but copies to the host and back.
        measured: Most bytes at once in a step that ran; 0 if not measured.
        host_limit: Bytes a rank may keep on the host; `None` if any.
    """

    policy: str
    peak: int
    where: str
    phase: str
    categories: dict[str, int]
    saved: int = 0
    host: int = 0
    limit: int | None = None
    flops: float = 0.0
    flops_again: float = 0.0
    seconds_again: float = 0.0
    step_seconds: float = 0.0
    measured: int = 0
    host_limit: int | None = None

    @property
    def fits_host(self) -> bool:
        """Whether what is kept on the host is within its limit."""
        return self.host_limit is None or self.host <= self.host_limit

    @property
    def fits(self) -> bool:
        """Whether both are within their limits."""
        return (self.limit is None or self.peak <= self.limit) and self.fits_host

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "fits": self.fits}

    def rows(self) -> list[tuple[str, str]]:
        """Return `(heading, text)` pairs."""
        limit = "" if self.limit is None else f" of {format_bytes(self.limit)}"
        measured = f", measured {format_bytes(self.measured)}" if self.measured else ""
        rows = [("memory", f"{format_bytes(self.peak)}{limit} predicted{measured}, in {self.phase} at {self.where}")]
        parts = [f"{name} {format_bytes(size)}" for name, size in self.categories.items() if size]
        rows.append(("", ", ".join(parts)))
        if self.phase != "forward" or self.saved:
            again = self.flops_again / self.flops if self.flops else 0.0
            host = f", {format_bytes(self.host)} on the host" if self.host else ""
            rows.append(
                ("checkpoints", f"{self.policy}: {format_bytes(self.saved)} kept for backward{host}, {again:.1%} of FLOPs again")
            )
        return rows


@dataclass(frozen=True)
class Moment:
    """An operator that runs, and what is held while it does.

    Attributes:
        operator: Its name; for a copy to the host or back, the name of that.
        where: The line it is from.
        phase: "forward", "backward" or "optimizer step".
        categories: Bytes by what they are, as in `MemoryEstimate`.
        cost: What running it costs.
        again: Whether backward computes again what forward has.
        is_collective: Whether all ranks have to take part.
    """

    operator: str
    where: str
    phase: str
    categories: dict[str, int]
    cost: Cost = field(default_factory=Cost)
    again: bool = False
    is_collective: bool = False

    @property
    def bytes(self) -> int:
        """All that is held."""
        return sum(self.categories.values())


def estimate_training(
    joint: Joint, choice: Choice, states: States, limit: int | None, overhead: int, roofline: Roofline
) -> MemoryEstimate:
    """Return what a training step takes, its optimizer step included."""
    schedule = choice.schedule
    once = (node for node in schedule.backward if node in joint.backward)
    forward, backward = schedule.peaks(collect=True)
    grads: Storages = {key: size for node in joint.grads for key, size in joint.memory.made[node].items()}
    phase, peak = max((("forward", forward), ("backward", backward)), key=lambda pair: pair[1].bytes)
    kinds = _kinds(joint, schedule.saved_storages(), grads)
    categories = _categories(states, peak, kinds, overhead)
    estimate = MemoryEstimate(
        policy=choice.policy,
        peak=sum(categories.values()),
        where=user_line(peak.node) if peak.node is not None else "<nothing runs>",
        phase=phase,
        categories=categories,
        saved=sum(schedule.saved_storages().values()),
        host=sum(schedule.host_storages().values()),
        limit=limit,
        flops=model_flops(joint.cost(node) for node in (*schedule.forward, *once)),
        flops_again=sum(joint.cost(node).flops for node in schedule.recomputed),
        seconds_again=choice.seconds,
        step_seconds=schedule.stalled + sum(roofline.seconds(joint.cost(node)) for node in (*schedule.forward, *schedule.backward)),
    )
    step = _optimizer_step(joint, states, grads, overhead)
    if sum(step.values()) > estimate.peak:
        estimate = replace(estimate, peak=sum(step.values()), phase="optimizer step", where="the optimizer", categories=step)
    return estimate


def _optimizer_step(joint: Joint, states: States, grads: Storages, overhead: int) -> dict[str, int]:
    """Return what is held while the optimizer steps, by category."""
    total_grads = sum(size for key, size in grads.items() if key not in joint.resident)
    held = _held(states, overhead)
    return {**held, "gradients": max(total_grads, states.gradients), "transient": states.optimizer_step}


def training_moments(joint: Joint, choice: Choice, states: States, overhead: int) -> list[Moment]:
    """Return a training step operator by operator; the most that is held at one is the peak of `estimate_training`."""
    schedule = choice.schedule
    grads: Storages = {key: size for node in joint.grads for key, size in joint.memory.made[node].items()}
    kinds, again = _kinds(joint, schedule.saved_storages(), grads), set(schedule.recomputed)
    moments: list[Moment] = []

    def watching(phase: str) -> Watch:
        def watch(operator: Operator, alive: Storages, workspace: int) -> None:
            categories = _categories(states, Peak(sum(alive.values()) + workspace, None, alive, workspace), kinds, overhead)
            moments.append(_moment(operator, phase, categories, joint.cost(operator), phase == "backward" and operator in again))

        return watch

    schedule.peaks(watch=(watching("forward"), watching("backward")))
    step = _optimizer_step(joint, states, grads, overhead)
    return [*moments, Moment("step", "the optimizer", "optimizer step", step)]


def _moment(operator: Operator, phase: str, categories: dict[str, int], taken: Cost, again: bool) -> Moment:
    node = operator.value if isinstance(operator, Transfer) else operator
    name = f"{operator.step} {node.target}" if isinstance(operator, Transfer) else str(node.target)
    together = not isinstance(operator, Transfer) and (is_collective(node) or taken.sent > 0)
    # Parameters enter a program, and their gradients leave it, at no line of the user's.
    where = user_line(node) if node.meta.get("stack_trace") or not together else "parameters"
    return Moment(name, where, phase, categories, taken, again, together)


def model_flops(costs: Iterable[Cost]) -> float:
    """Return the FLOPs of operators, without those that backward does within tiles what forward has done."""
    return sum(one.flops - one.repeated for one in costs)


def estimate_forward(graph: fx.Graph, states: States, limit: int | None, overhead: int) -> MemoryEstimate:
    """Return what a graph without backward takes."""
    peak, order = _walk_forward(graph)
    categories = _categories(states, peak, {}, overhead)
    where = user_line(peak.node) if peak.node is not None else "<nothing runs>"
    flops = sum(cost(node).flops for node in order)
    return MemoryEstimate("none", sum(categories.values()), where, "forward", categories, limit=limit, flops=flops)


def forward_moments(graph: fx.Graph, states: States, overhead: int) -> list[Moment]:
    """Return a graph without backward operator by operator."""
    moments: list[Moment] = []

    def watch(operator: Operator, alive: Storages, workspace: int) -> None:
        assert isinstance(operator, fx.Node)
        categories = _categories(states, Peak(sum(alive.values()) + workspace, None, alive, workspace), {}, overhead)
        moments.append(_moment(operator, "forward", categories, cost(operator), False))

    _walk_forward(graph, watch)
    return moments


def _walk_forward(graph: fx.Graph, watch: Watch | None = None) -> tuple[Peak, list[fx.Node]]:
    nodes = [node for node in graph.nodes if node.op != "output"]
    memory = Memory(nodes)
    resident = {key for node in nodes if node.op == "placeholder" for key in memory.made[node]}
    outputs = {key for node in graph.output_node().all_input_nodes for key in memory.made[node]}
    order = [node for node in nodes if node.op != "placeholder"]
    return memory.walk(order, {}, outputs, resident, True, watch), order


def _kinds(joint: Joint, saved: Storages, grads: Storages) -> dict[int, str]:
    kinds: dict[int, str] = {}
    for node in joint.nodes:
        if node.op == "placeholder":
            continue
        for key in joint.memory.made[node]:
            if node in joint.of_parameters:
                kinds.setdefault(key, "gathered")
            elif is_collective(node):
                kinds.setdefault(key, "collectives")
    return {**kinds, **dict.fromkeys(grads, "gradients"), **dict.fromkeys(saved, "saved")}


def _held(states: States, overhead: int) -> dict[str, int]:
    return {
        "parameters": states.parameters,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "inputs": states.inputs,
        "overhead": overhead,
    }


def _categories(states: States, peak: Peak, kinds: dict[int, str], overhead: int) -> dict[str, int]:
    found = {**_held(states, overhead), "saved": 0, "gathered": 0, "collectives": 0, "transient": 0, "workspace": peak.workspace}
    for key, size in peak.alive.items():
        found[kinds.get(key, "transient")] += size
    # What an input of backward held at its start is no more than that.
    found["transient"] += peak.bytes - peak.workspace - sum(peak.alive.values())
    return found


def optimizer_memory(optimizer: Optimizer, local: Callable[[Tensor], Tensor]) -> tuple[int, int]:
    """Return bytes of an optimizer's state after its first step, and what the step takes besides, without allocating either.

    A copy of the optimizer makes two steps on fake tensors.

    Args:
        optimizer: Any; it stays as it is.
        local: Gives this rank's part of a parameter.

    Returns:
        State and transient bytes. Where an optimizer cannot be copied, two numbers of a parameter's size and type for each.
    """
    shapes = [[(tuple(local(p).shape), p.dtype) for p in group["params"] if p.requires_grad] for group in optimizer.param_groups]
    try:
        with FakeTensorMode():
            double = copy.copy(optimizer)
            double.__dict__ = {name: OrderedDict() if "_hooks" in name else value for name, value in vars(optimizer).items()}
            double.state = defaultdict(dict)
            parameters = [[nn.Parameter(torch.empty(s, dtype=d)) for s, d in sizes] for sizes in shapes]
            double.param_groups = [{**group, "params": own} for group, own in zip(optimizer.param_groups, parameters, strict=True)]
            for group, real in zip(double.param_groups, optimizer.param_groups, strict=True):
                if group.get("foreach", False) is None and not group.get("fused"):
                    # The default depends on the device, and fake tensors are on the CPU.
                    group["foreach"] = any(parameter.device.type == "cuda" for parameter in real["params"])
            known: list[Tensor] = []
            for parameter in itertools.chain(*parameters):
                parameter.grad = torch.empty_like(parameter)
                known += [parameter, parameter.grad]
            # Steps undecorated: a learning-rate scheduler counts the calls of the optimizer's own.
            step = inspect.unwrap(type(optimizer).step)
            meter = LiveBytes(known)
            with torch.no_grad(), meter, _AnyNumber():
                step(double)
                state = meter.live
                meter.reset()
                step(double)
            return state, meter.peak - state
    except Exception:  # noqa: BLE001  (an optimizer is anyone's code)
        return sum(2 * torch.Size(s).numel() * d.itemsize for sizes in shapes for s, d in sizes), 0


class _AnyNumber(TorchDispatchMode):
    """Gives a number where an optimizer reads one of a tensor that has none (its count of steps)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        return 1.0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))
