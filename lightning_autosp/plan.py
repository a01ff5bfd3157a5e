"""What a step would take on ranks that are not there: planned on one CPU, before anything is allocated.

The step is traced once on a short batch. For any length its program is emitted as for the first of `world` ranks, differentiated on
tensors without memory, and estimated by `memory`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import sympy
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_autosp import _compat
from lightning_autosp.attention.select import AttentionMethod, AttentionOptions
from lightning_autosp.batches import SequenceDim
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.backend import CompileBackend, compile_module
from lightning_autosp.compiler.emit import Emitter, Program
from lightning_autosp.compiler.report import Report
from lightning_autosp.compiler.specialise import TILE_ROWS, Compiler, LoweredStep
from lightning_autosp.memory.devices import DeviceKind, device_kind, format_bytes, limit_bytes, parse_bytes
from lightning_autosp.memory.estimate import (
    MemoryEstimate,
    Moment,
    States,
    forward_moments,
    optimizer_memory,
    training_moments,
)
from lightning_autosp.memory.partition import Agreed, Decision, MemoryOptions, Partitioner
from lightning_autosp.memory.policy import LEAST, CheckpointPolicy
from lightning_autosp.parameters import Entry, enter_parameter, largest_part, parameter_slots
from lightning_autosp.saved import ProgramFacts, SavedPlan, torch_release
from lightning_autosp.step import CompiledStep
from lightning_autosp.targets import TargetError, load_target, step_arguments

__all__ = ["Moments", "Plan", "PlanError", "Planner", "plan_target", "planned_host_limit", "planner_of"]

POLICIES: tuple[CheckpointPolicy, ...] = get_args(CheckpointPolicy)
NODE_SIZE = 8
"""Ranks that plans take a node to have."""

Moments = dict[str, Callable[[], list[Moment]]]
"""By checkpoint policy, what gives the step operator by operator."""


class PlanError(TargetError):
    """The step cannot be planned: says why and what to do."""


@dataclass
class Plan:
    """What a step takes at one length.

    Attributes:
        length: Positions of the longest sequence.
        world: Ranks, which share each sequence.
        estimates: By checkpoint policy.
        limit: Bytes a rank may take.
        saved: By checkpoint policy, what can be given to training.
        host_limit: Bytes a rank may keep on its host.
    """

    length: int
    world: int
    estimates: dict[str, MemoryEstimate]
    limit: int
    saved: dict[str, SavedPlan] = field(default_factory=dict)
    host_limit: int = 0

    @property
    def best(self) -> tuple[str, MemoryEstimate]:
        """The fastest policy that fits; the one that takes least if none does."""
        fitting = {name: one for name, one in self.estimates.items() if one.fits}
        if fitting:
            return min(fitting.items(), key=lambda pair: (pair[1].seconds_again, pair[1].peak))
        return min(self.estimates.items(), key=lambda pair: (not pair[1].fits_host, pair[1].peak))

    def save(self, path: str | Path) -> None:
        """Write what was found, for `AutoSPStrategy(plan=path)`.

        Raises:
            PlanError: If the step has no backward, so that nothing was decided.
        """
        if not self.saved:
            raise PlanError("The step has no backward, so there is no decision to save. Plan a training step.")
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        policy, best = self.best
        return {
            "length": self.length,
            "world": self.world,
            "fits": best.fits,
            "policy": policy,
            "peak_bytes": best.peak,
            "host_bytes": best.host,
            "limit_bytes": self.limit,
            "host_limit_bytes": self.host_limit,
            "categories": best.categories,
            "step_seconds": best.step_seconds,
            "policies": {name: one.to_dict() for name, one in self.estimates.items()},
            "saved": self.saved[policy].to_dict() if policy in self.saved else None,
        }

    def __str__(self) -> str:
        host = f" and {format_bytes(self.host_limit)} of the host" if self.host_limit else ""
        lines = [f"{self.length} positions on {self.world} rank(s), {format_bytes(self.limit)}{host} each"]
        head = f"{'policy':<11}{'peak':>12}{'fits':>6}{'kept':>12}{'host':>12}{'again':>8}{'step':>10}  where"
        lines.append(head)
        for name, one in self.estimates.items():
            again = one.flops_again / one.flops if one.flops else 0.0
            fits = "yes" if one.fits else "no"
            lines.append(
                f"{name:<11}{format_bytes(one.peak):>12}{fits:>6}{format_bytes(one.saved):>12}{format_bytes(one.host):>12}"
                f"{again:>8.1%}{one.step_seconds:>9.2f}s  {one.phase} at {one.where}"
            )
        policy, best = self.best
        lines.append(f"{policy}: " + ", ".join(f"{name} {format_bytes(size)}" for name, size in best.categories.items() if size))
        return "\n".join(lines)


class _Captured(Exception):
    """Ends tracing: the graph is there."""


class _Divided(Exception):
    """Ends compiling: the joint graph has been read."""


@dataclass
class _Capturing(Compiler):
    """A Dynamo backend that keeps the graph and runs nothing."""

    found: list[tuple[LoweredStep, dict[sympy.Symbol, int]]] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        # To ask a traced size for its number would fix it.
        examples = [_hint(_compat.example_of(node)) for node in gm.graph.find_nodes(op="placeholder")]
        step = super().__call__(gm, example_inputs)
        assert isinstance(step, LoweredStep)
        self.found.append((step, {symbol: int(size) for symbol, size in step.sizes(examples).items()}))
        raise _Captured


def _hint(value: Any) -> Any:
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value


class _PlannedParameters:
    """The parameters of a module as the first of several ranks would hold them, without memory."""

    def __init__(self, module: nn.Module, group: Group, *, sharded: bool, dtype: torch.dtype | None) -> None:
        self.group, self.sharded = group, sharded
        self._slots = parameter_slots(module)
        real = dict(module.named_parameters())
        self.stand_ins = {name: _without_memory(parameter, dtype) for name, parameter in real.items()}
        self._by_id = {id(parameter): self.stand_ins[name] for name, parameter in real.items()}
        self._names = {id(parameter): name for name, parameter in self.stand_ins.items()}

    def names(self) -> dict[int, str]:
        return self._names

    def enter(self, name: str) -> Entry:
        return enter_parameter(self.stand_ins[name], self.group, sharded=self.sharded)

    def held(self, name: str) -> Tensor:
        return self.part(self.stand_ins[name])

    def part(self, parameter: Tensor) -> Tensor:
        """Return this rank's part of a parameter, on the meta device."""
        return largest_part(parameter, self.group, sharded=self.sharded)

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        for submodule, key, parameter in self._slots:
            submodule._parameters[key] = self._by_id[id(parameter)]  # type: ignore[assignment]
        try:
            yield
        finally:
            for submodule, key, parameter in self._slots:
                submodule._parameters[key] = parameter

    def whole(self) -> AbstractContextManager[None]:
        raise PlanError("the step cannot be captured as one graph")

    def without_stand_ins(self, tree: Any) -> Any:
        return tree


def _without_memory(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    chosen = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
    value = torch.empty(parameter.shape, dtype=chosen)  # nothing is written to it, so the system gives it no pages
    value.untyped_storage().resize_(0)
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


class Planner:
    """Plans one step of one module for a number of ranks; for any number of lengths."""

    def __init__(
        self,
        module: nn.Module,
        batch: Any,
        *,
        world: int,
        device: DeviceKind,
        limit: int | None = None,
        host_limit: int = 0,
        step: str = "training_step",
        sequence_dim: SequenceDim = 1,
        precision: str | None = None,
        sharded: bool = True,
        attention: AttentionMethod = "auto",
        state_bytes: int | None = None,
        backend: CompileBackend = "inductor",
        policy: str | None = None,
    ) -> None:
        """Trace the step.

        Args:
            module: A LightningModule; its parameters may be on the meta device. It stays as it is.
            batch: One batch, real, of any length.
            world: Ranks that share each sequence.
            device: What each rank has.
            limit: Bytes a rank may take. Default: the device's memory.
            host_limit: Bytes a rank may keep on its host.
            step: The method to plan.
            sequence_dim: The dimension of batch tensors that is the sequence.
            precision: The Trainer's: "32-true", "bf16-true", "16-true", "bf16-mixed" or "16-mixed". `None`: parameters as they are.
            sharded: Whether parameters, gradients and optimizer state are sharded over the ranks.
            attention: As the strategy's. Nodes are taken to have eight ranks.
            state_bytes: Optimizer state, in bytes for each parameter; `None`: what the optimizer's own step makes.
            backend: What the step will be compiled with.

        Raises:
            PlanError: If the step is not one graph, or has no dimension that could be followed.
        """
        self.module, self.world, self.device = module, world, device
        self.limit = device.memory if limit is None else limit
        self.host_limit = host_limit
        self.group = Group("planned", world, 0)
        dtype, self._autocast = _precision(precision)
        self.parameters = _PlannedParameters(module, self.group, sharded=sharded and world > 1, dtype=dtype)
        compiler = _Capturing(
            mesh=_compat.mesh_without_group(max(world, 2)),
            group=self.group,
            backend="aot_eager",
            report=Report(),
            kind=step,
            parameters=self.parameters,
            attention=AttentionOptions(attention, device.roofline.flops, device.roofline.link, NODE_SIZE),
        )
        compiled = CompiledStep(module, step, compiler, self.parameters, sequence_dim)  # type: ignore[arg-type]
        arguments, options = step_arguments(module, step, batch, dtype)
        try:
            with self.computing(), _buffers_with_memory(module):
                compiled(*arguments, **options)
        except BackendCompilerFailed as error:
            if not isinstance(error.inner_exception, _Captured):
                raise
        if not compiler.found:
            raise PlanError(f"{type(module).__name__}.{step} is not captured as one graph, so it cannot be planned.")
        self.lowered, self.sizes = compiler.found.pop()
        if not self.lowered.captured.symbols:
            raise PlanError(f"{type(module).__name__}.{step} fixes the sequence length, so other lengths cannot be planned.")
        self._one_length = bool(self.lowered.captured.following or compiled.numbers)
        self.step, self._state_bytes = step, state_bytes
        self._backend, self.policy = backend, policy

    def tile(self) -> bool:
        """Compute what is wide between two products in tiles, as a step does that does not fit otherwise; whether there is any."""
        return self.lowered.tile(TILE_ROWS)

    def computing(self) -> AbstractContextManager[Any]:
        """Return the context that the step runs in: autocast, if the precision is mixed."""
        return torch.autocast("cpu", self._autocast) if self._autocast is not None else contextlib.nullcontext()

    def _find_optimizers(self) -> Sequence[Optimizer]:
        if not isinstance(self.module, LightningModule):
            return []
        with self.parameters.standing_in():
            found: Any = self.module.configure_optimizers()
        return [one for one in pytree.tree_leaves(found) if isinstance(one, Optimizer)]

    @functools.cached_property
    def states(self) -> States:
        """What a rank holds besides what a step takes, at any length; without the batch."""
        parts = [self.parameters.part(parameter) for parameter in self.parameters.stand_ins.values()]
        found = [optimizer_memory(optimizer, self.parameters.part) for optimizer in self._find_optimizers()]
        state = sum(one for one, _ in found)
        if self._state_bytes is not None:
            state = self._state_bytes * sum(part.numel() for part in parts if part.requires_grad)
        return States(
            parameters=sum(part.nbytes for part in parts) + sum(buffer.nbytes for buffer in self.module.buffers()),
            optimizer=state,
            optimizer_step=max((step for _, step in found), default=0),
        )

    def fitting(self, length: int | None = None, moments: Moments | None = None) -> Plan:
        """Return the plan for sequences of that length, the batch's own by default; in tiles if it does not fit otherwise."""
        plan = self.at(self.length if length is None else length, moments=moments)
        return plan if plan.best[1].fits or not self.tile() else self.at(plan.length, moments=moments)

    def at(self, length: int, policies: Sequence[str] = POLICIES, moments: Moments | None = None) -> Plan:
        """Return the plan for sequences of that length.

        Args:
            length: Positions of the longest sequence; others keep their ratio to it.
            policies: Which to estimate.
            moments: Where to put, by policy, what gives the step operator by operator.

        Raises:
            PlanError: If the module works with the batch's length only.
            ValueError: If the length is no number of positions.
        """
        emitter, program = self.emit(length)
        estimates: dict[str, MemoryEstimate] = {}
        decisions: dict[str, Decision] = {}
        seen: Moments = {} if moments is None else moments
        held = self.states
        with FakeTensorMode(allow_non_fake_inputs=True), self.computing():
            inputs, parameters = self.inputs(emitter, program)
            batch = sum(value.nbytes for place, value in enumerate(inputs) if place not in set(parameters))
            states = replace(held, inputs=batch)

            def divide(gm: fx.GraphModule, joint_inputs: Sequence[Any], **options: Any) -> Any:
                found = self._decide(gm, joint_inputs, states, parameters, policies, options, seen)
                for name, (decision, estimate) in found.items():
                    decisions[name], estimates[name] = decision, estimate
                raise _Divided

            def forward_only(gm: fx.GraphModule) -> None:
                partitioner = Partitioner(self._options("none"), states, parameters)
                partitioner.see(gm)
                assert partitioner.estimate is not None
                estimates["none"] = partitioner.estimate
                seen["none"] = functools.partial(forward_moments, gm.graph, states, self.device.overhead)
                raise _Divided

            with contextlib.suppress(_Divided):
                compile_module(program.module, inputs, self._backend, forward_only, divide)
        with self.computing():
            facts = self.lowered.facts(program, inputs, self._sizes(length))
        saved = {name: self._saved(facts, decision) for name, decision in decisions.items()}
        return Plan(length, self.world, estimates, self.limit, saved, self.host_limit)

    def emit(self, length: int) -> tuple[Emitter, Program]:
        """Return the program of the first rank for sequences of that length, and what emitted it; raises what `at` raises."""
        if length < 1:
            raise ValueError(f"length={length} is not known. Use a number of positions, 1 or larger.")
        if length != self.length and self._one_length:
            raise PlanError(
                f"{type(self.module).__name__} has tensors of as many positions as the batch ({self.length}), or compares its "
                f"length with a number, so length {length} cannot be planned. Make the module and the batch for that length."
            )
        return self.lowered.emit(self._sizes(length), self.group, self.parameters)

    def inputs(self, emitter: Emitter, program: Program) -> tuple[list[Tensor], list[int]]:
        """Return what a program is called with, made under a `FakeTensorMode`, and which of it, by number, are parameters."""
        inputs, parameters = [], []
        for place, index in enumerate(program.inputs):
            node = self.lowered.captured.placeholders[index]
            value = node.meta["val"]
            name = self.lowered.captured.parameters.get(node)
            if name is None:
                shape: Sequence[int] = [emitter.integer(size) for size in emitter.facts.shape(node)]
            else:
                value = self.parameters.held(name)
                shape = value.shape
                parameters.append(place)
            inputs.append(torch.empty(shape, dtype=value.dtype, requires_grad=value.requires_grad))
        return inputs, parameters

    def _saved(self, facts: ProgramFacts, decision: Decision) -> SavedPlan:
        name = type(self.module).__name__
        decision = decision._replace(tiled=self.lowered.is_tiled, kept=(), offloaded=())
        return SavedPlan(name, self.step, torch_release(), self.world, self.parameters.sharded, facts, decision)

    def _options(self, policy: str) -> MemoryOptions:
        overhead = self.device.overhead
        return MemoryOptions(
            policy, self.limit, False, self.device.roofline, overhead, self.host_limit, fused=self._backend == "inductor"
        )

    def _decide(
        self,
        gm: fx.GraphModule,
        joint_inputs: Sequence[Any],
        states: States,
        parameters: Sequence[int],
        policies: Sequence[str],
        options: Mapping[str, Any],
        moments: Moments,
    ) -> dict[str, Agreed]:
        joint = Partitioner.read(gm, options["num_fwd_outputs"], parameters, fused=self._backend == "inductor")
        default = None
        found: dict[str, Agreed] = {}
        for policy in policies:
            partitioner = Partitioner(self._options(policy), states, parameters)
            if default is None and policy in ("none", "auto"):
                default = partitioner.default(gm, joint, joint_inputs, **options)
            choice = partitioner.decide(joint, default or set())
            assert partitioner.decided is not None
            assert partitioner.estimate is not None
            name = partitioner.decided.policy if policy == LEAST else policy
            found[name] = (partitioner.decided, partitioner.estimate)
            moments[name] = functools.partial(training_moments, joint, choice, states, self.device.overhead)
        return found

    @property
    def length(self) -> int:
        """Positions of the longest sequence of the batch."""
        return max(size for symbol, size in self.sizes.items() if symbol in self.lowered.captured.symbols)

    def _sizes(self, length: int) -> dict[sympy.Symbol, int]:
        symbols = self.lowered.captured.symbols
        return {
            symbol: max(1, round(size * length / self.length)) if symbol in symbols else size for symbol, size in self.sizes.items()
        }

    def longest(self, policies: Sequence[str] = (LEAST,), *, granularity: float = 0.01) -> tuple[Plan, Plan | None]:
        """Return the plan of the longest sequence that fits, and that of the shortest tried that does not.

        Args:
            policies: Which may be used. Default: what takes least.
            granularity: How close the two lengths have to be, relatively.

        Raises:
            PlanError: If not even one position on each rank fits.
        """
        multiple = self.world * 128
        fits: Plan | None = None
        fails: Plan | None = None
        length = multiple * 8
        for _ in range(12):
            plan = self.at(length, policies)
            best = plan.best[1]
            if plan.best[1].fits:
                fits = plan if fits is None or plan.length > fits.length else fits
            else:
                fails = plan if fails is None or plan.length < fails.length else fails
            low, high = (fits.length if fits else 0), (fails.length if fails else math.inf)
            if fits is not None and fails is not None and (high - low <= max(multiple, granularity * low)):
                break
            held = self.states.total + self.device.overhead
            # Memory grows with the length, on the device and the host.
            guess = length * max(0.1, (self.limit - held + self.host_limit) / max(1, best.peak - held + best.host))
            if not low < guess < high:
                guess = (low + high) / 2 if math.isfinite(high) else low * 2
            length = max(multiple, round(guess / multiple) * multiple)
            if length in (low, high):
                length = int(low) + multiple if length == low else int(high) - multiple
            if not low < length < high:
                break
        if fits is None:
            assert fails is not None
            raise PlanError(f"Not even {fails.length} positions fit {format_bytes(self.limit)} a rank.\n{fails}")
        return fits, fails


_DTYPES = {"64": torch.float64, "32": torch.float32, "16": torch.float16, "bf16": torch.bfloat16}


def _precision(name: str | int | None) -> tuple[torch.dtype | None, torch.dtype | None]:
    """Return what parameters are in, and what autocast computes in, for a Trainer's `precision`."""
    if name is None:
        return None, None
    kind, _, how = str(name).partition("-")
    if kind not in _DTYPES or how not in ("", "true", "mixed"):
        raise PlanError(f"precision={name!r} cannot be planned. Use '32-true', 'bf16-true', '16-true', 'bf16-mixed' or '16-mixed'.")
    if how == "mixed" or (how == "" and kind in ("16", "bf16")):
        return torch.float32, _DTYPES[kind]
    return _DTYPES[kind], None


@contextlib.contextmanager
def _buffers_with_memory(module: nn.Module) -> Iterator[None]:
    """Give buffers on the meta device zeros: they are few, and the batch they meet is real."""
    before = [
        (submodule, name, buffer)
        for submodule in module.modules()
        for name, buffer in submodule._buffers.items()
        if buffer is not None and buffer.is_meta
    ]
    for submodule, name, buffer in before:
        submodule._buffers[name] = torch.zeros_like(buffer, device="cpu")
    try:
        yield
    finally:
        for submodule, name, buffer in before:
            submodule._buffers[name] = buffer


def plan_target(target: str, *, world: int, length: int | None = None, longest: bool = False, **options: Any) -> list[Plan]:
    """Plan a module that is named.

    Args:
        target: A module or a LightningCLI configuration.
        world: Ranks that share each sequence.
        length: Positions to plan. Default: the batch's own.
        longest: Also find the longest sequence that fits.
        options: As of `planner_of`.

    Returns:
        The plan of the length asked for, then, if `longest`, of the longest.

    Raises:
        PlanError: If the step cannot be planned.
        TargetError: If something named does not exist.
        ValueError: If the device, its memory, the number of ranks or the length is not known.
    """
    planner = planner_of(target, world=world, **options)
    plans = [planner.fitting(length)]
    if longest:
        planner.tile()
        plans.append(planner.longest()[0])
    return plans


def planner_of(
    target: str,
    *,
    world: int | None = None,
    device: str | None = None,
    device_memory: str | None = None,
    host_memory: str | None = None,
    batch: str | None = None,
    config: str | None = None,
    step: str | None = None,
    sequence_dim: SequenceDim | None = None,
    precision: str | None = None,
    state_bytes: int | None = None,
    backend: CompileBackend = "inductor",
    policy: str | None = None,
) -> Planner:
    """Return the planner of a module that is named, as `targets.load_target` reads names.

    What the configuration says of the strategy holds (`attention`, `parameter_sharding`, `checkpoint_policy`, `memory_limit`,
    `host_memory_limit` in bytes), unless the same is an argument here.

    Args:
        target: A module or a LightningCLI configuration.
        world: Ranks that share each sequence. Default: the configuration's `sequence_parallel_size`, else 2.
        device: A device kind: see `memory.devices.DEVICES`. Default: "h100".
        device_memory: Bytes a rank may take, as "80GiB". Default: the device's.
        host_memory: Bytes a rank may keep on its host, as "96GiB". Default: none.
        batch: Where a batch is from.
        config: A configuration with arguments of the classes named.
        step: The method. Default: "training_step".
        sequence_dim: The dimension of batch tensors that is the sequence.
        precision: As the Trainer's. Default: the configuration's.
        state_bytes: Optimizer state in bytes for each parameter. Default: what the module's optimizers make.
        backend: What training will compile with.
        policy: The checkpoint policy to show. Default: the configuration's.

    Raises:
        PlanError: If the step cannot be planned.
        TargetError: If something named does not exist.
        ValueError: If the device, its memory or the number of ranks is not known.
    """
    kind = device_kind(device or "h100")
    limit = None if device_memory is None else parse_bytes(device_memory, "--device-memory")
    host_limit = None if host_memory is None else parse_bytes(host_memory, "--host-memory")
    if world is not None and world < 1:
        raise ValueError(f"world={world} is not known. Use a number of ranks, 1 or larger.")
    module, data, step, options = load_target(
        target, batch=batch, config=config, step=step, sequence_dim=sequence_dim, device="meta"
    )
    if limit is None and "memory_limit" in options:
        limit = limit_bytes(options["memory_limit"], kind.memory)
    if host_limit is None:
        host_limit = planned_host_limit(options.get("host_memory_limit", "auto"))
    return Planner(
        module,
        data,
        world=options.get("sequence_parallel_size", 2) if world is None else world,
        device=kind,
        limit=limit,
        host_limit=host_limit,
        step=step,
        sequence_dim=options["sequence_dim"],
        precision=precision or options["precision"],
        sharded=options.get("parameter_sharding") != "replicate",
        attention=options.get("attention", "auto"),
        state_bytes=state_bytes,
        backend=backend,
        policy=policy or options.get("checkpoint_policy"),
    )


def planned_host_limit(limit: int | float | str) -> int:
    """Return what a planned rank may keep on its host, of which nothing is known but a number of bytes."""
    return 0 if limit == "auto" or isinstance(limit, float) else limit_bytes(limit, 1, "host_memory_limit")
