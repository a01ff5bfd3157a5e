"""Is the lowered step that of one device? Found out in one process: all ranks are simulated, nothing is started.

The step runs on one device and, lowered, on every simulated rank, in float64 where the module allows it. Compared are what the step
returns and logs, the module's buffers and metrics and every parameter's gradient. Then single tokens are changed: what
changes with them has to be what changes on one device, or something crosses from rank to rank that should not.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection

from lightning_autosp import _compat
from lightning_autosp.attention.select import AttentionMethod, AttentionOptions
from lightning_autosp.batches import SequenceDim, call_tensors, sequences
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.backend import OnGraph, Partition
from lightning_autosp.compiler.capture import Captured
from lightning_autosp.compiler.emit import Program
from lightning_autosp.compiler.report import Report, StepReport, StrictModeError
from lightning_autosp.compiler.rules.random import is_random
from lightning_autosp.compiler.simulate import run_ranks
from lightning_autosp.compiler.specialise import Compiler, LoweredStep
from lightning_autosp.data.agreement import batch_error
from lightning_autosp.lines import user_line
from lightning_autosp.parameters import Entry, ModuleParameters, enter_parameter, own_rows
from lightning_autosp.step import CompiledStep
from lightning_autosp.targets import STEP_LOADERS, TargetError, headline, load_target, step_arguments

__all__ = [
    "CheckError",
    "CheckResult",
    "Comparison",
    "Probe",
    "RankParameters",
    "RankStep",
    "RememberingCompiler",
    "Run",
    "Simulation",
    "check",
    "check_target",
]

TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-6, 1e-5),
    torch.float16: (1e-2, 5e-2),
    torch.bfloat16: (1e-2, 5e-2),
}
"""By the coarsest dtype a step computes in, relative norms: of scalars, and of gradients and other tensors."""


class CheckError(TargetError):
    """The check cannot be made: says what was wrong and what to do."""


# What was found.


@dataclass
class Comparison:
    """One value or gradient, lowered against one device.

    Attributes:
        name: `loss`, `logged loss`, `gradient of head.weight`, `buffer norm.running_mean`, ...
        error: The largest error over the ranks, relative to the norm of the one-device value.
        tolerance: What `error` may be.
        problem: What differs; empty if nothing does.
    """

    name: str
    error: float
    tolerance: float
    problem: str = ""


@dataclass
class Probe:
    """What changed with one token.

    Attributes:
        position: The token's.
        num_changed: Positions of the outputs that changed on one device; where the step returns no sequence, rows of gradients.
        leaked: Those that changed only in the lowered form, as `name[index]`.
        lost: Those that changed only on one device.
    """

    position: int
    num_changed: int
    leaked: list[str]
    lost: list[str]


@dataclass
class CheckResult:
    """What a check found. `str()` and `to_dict()` give it as text and as plain data.

    Attributes:
        name: Module and step.
        length: Positions of the batch's sequences.
        num_ranks: Simulated ranks.
        precision: What was computed in.
        attention: The method of attention that was asked for.
        traced: Whether the step is one graph. If not, it runs, and is compared, in pieces.
        complete: Whether the loss and the gradients, or all values if there is no loss, were compared.
        comparisons: Every value and gradient, the worst rank of each.
        probes: Every token that was changed.
        problems: What differs beyond single values: the lowered step failed, or `strict` refuses it.
        skipped: What could not be compared, and why.
        notes: What was done to make the comparison possible.
        report: What the compiler did.
    """

    name: str
    length: int
    num_ranks: int
    precision: str = ""
    attention: AttentionMethod = "auto"
    traced: bool = True
    complete: bool = False
    comparisons: list[Comparison] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    report: Report = field(default_factory=Report)

    @property
    def differences(self) -> list[str]:
        """Everything that is not as on one device."""
        found = [*self.problems, *(f"{one.name}: {one.problem}" for one in self.comparisons if one.problem)]
        for probe in self.probes:
            for what, places in (("changes too", probe.leaked), ("does not change", probe.lost)):
                if places:
                    more = f" and {len(places) - 4} more" if len(places) > 4 else ""
                    found.append(f"token {probe.position} changed: {', '.join(places[:4])}{more} {what}")
        return found

    @property
    def methods(self) -> list[str]:
        """What calls of attention were computed by, as far as there was a choice."""
        calls = (call for step in self.report.steps for call in step.attention if call.chosen)
        return list(dict.fromkeys(call.method for call in calls))

    @property
    def ok(self) -> bool:
        """Whether the step was compared and nothing differs."""
        return self.exit_code == 0

    @property
    def exit_code(self) -> int:
        """0: nothing differs. 1: something does. 2: it could not be compared."""
        if self.differences:
            return 1
        return 0 if self.complete else 2

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("comparisons", "probes", "report")}
        return {
            "ok": self.ok,
            "exit_code": self.exit_code,
            **own,
            "differences": self.differences,
            "comparisons": [dataclasses.asdict(one) for one in self.comparisons],
            "probes": [dataclasses.asdict(one) for one in self.probes],
            "report": self.report.to_dict(),
        }

    def __str__(self) -> str:
        rows = [("check", f"{self.name}, length {self.length}, {self.num_ranks} simulated ranks, {self.precision}")]
        groups = {"values": [], "gradients": []}  # type: dict[str, list[Comparison]]
        for one in self.comparisons:
            groups["gradients" if one.name.startswith("gradient of ") else "values"].append(one)
        for heading, members in groups.items():
            if members:
                worst = max(members, key=lambda one: one.error / (one.tolerance or 1.0))
                rows.append((f"  {heading}", f"{len(members)} compared; {worst.name} is off most, {worst.error:.1e} relative"))
        if self.probes:
            changed = ", ".join(f"{probe.position} ({probe.num_changed} changed)" for probe in self.probes)
            rows.append(("  tokens changed", changed))
        if self.methods:
            others = f", chosen for {self.length} positions; training chooses by its own length and device, and attention= fixes it"
            rows.append(("  attention by", ", ".join(self.methods) + (others if self.attention == "auto" else ", as asked")))
        rows += [("  not compared", text) for text in self.skipped]
        rows += [("  note", text) for text in self.notes]
        rows += [("  DIFFERENCE", text) for text in self.differences]
        verdict = ("equal to one device", "NOT equal to one device", "could not be checked")[self.exit_code]
        table = "\n".join(f"{heading:<32} {text}" for heading, text in [*rows, *self.report.rows()])
        return f"{table}\n{self.name}: {verdict}"


# All ranks in one process.


class RankParameters:
    """The parameters of one simulated rank: replicated, or cut over dim 0 as `ModuleParameters` cuts them."""

    def __init__(self, module: nn.Module, group: Group, *, sharded: bool) -> None:
        self.group, self.sharded = group, sharded
        self.originals = dict(module.named_parameters())
        self.leaves = {name: self._part(p).detach().clone().requires_grad_(p.requires_grad) for name, p in self.originals.items()}

    def _part(self, parameter: Tensor) -> Tensor:
        return own_rows(parameter, self.group) if self.sharded and parameter.ndim else parameter

    def names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self.originals.items()}

    def enter(self, name: str) -> Entry:
        return enter_parameter(self.originals[name], self.group, sharded=self.sharded)

    def held(self, name: str) -> Tensor:
        return self.leaves[name]

    # What `CompiledStep` asks for: the module keeps its own, whole parameters.

    def standing_in(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def without_stand_ins(self, tree: Any) -> Any:
        return tree


@dataclass
class Run:
    """One run of a lowered graph on every rank.

    Attributes:
        step: The lowered graph.
        report: What was emitted for the first rank.
        inputs: Of the captured graph.
        outputs: `[rank][output]`, every rank's with autograd to its own parameters.
        updates: `[rank][i]`: the new value of the i-th input that the step updates in place.
    """

    step: LoweredStep
    report: StepReport
    inputs: tuple[Any, ...]
    outputs: list[tuple[Any, ...]]
    updates: list[list[Tensor]]

    @property
    def updated(self) -> list[int]:
        """The inputs that the step updates in place."""
        captured = self.step.captured
        return [captured.placeholders.index(node) for node in captured.mutated]

    def everywhere(self, tensor: Tensor) -> list[Tensor]:
        """Return every rank's value of a tensor the step returned or updated; any other tensor alone."""
        for index, output in enumerate(self.outputs[0]):
            if output is tensor:
                return [outputs[index] for outputs in self.outputs]
        for place, index in enumerate(self.updated):
            if self.inputs[index] is tensor:
                return [updates[place] for updates in self.updates]
        return [tensor]

    def node_of(self, tensor: Tensor) -> fx.Node | None:
        """Return what computes a tensor the step returned or updated."""
        results: Any = self.step.captured.graph.output_node().args[0]
        nodes = pytree.tree_leaves(results[0], is_leaf=lambda leaf: leaf is None)
        pairs = [*zip(nodes, self.outputs[0], strict=True)]
        pairs += zip(results[1], (self.inputs[index] for index in self.updated), strict=True)
        return next((node for node, value in pairs if value is tensor and isinstance(node, fx.Node)), None)


class Simulation:
    """A group of ranks in one process, with a module's parameters on each."""

    def __init__(self, module: nn.Module, num_ranks: int, *, sharded: bool, attention: AttentionOptions | None = None) -> None:
        """Give every rank its parameters.

        Args:
            module: Whose parameters; they are copied.
            num_ranks: Ranks that share the sequence.
            sharded: Whether parameters are cut over dim 0.
            attention: How methods of attention are chosen.
        """
        self.num_ranks, self.attention = num_ranks, attention or AttentionOptions()
        self.parameters = [
            RankParameters(module, Group("simulated", num_ranks, rank), sharded=sharded) for rank in range(num_ranks)
        ]
        self.last: Run | None = None
        self._programs: dict[tuple[Any, ...], tuple[list[Program], StepReport]] = {}

    def compiler(self, report: Report, kind: str) -> Compiler:
        """Return a Dynamo backend whose graphs run on every rank; their caller gets the first rank's outputs."""
        mesh = _compat.mesh_without_group(self.num_ranks)
        first = self.parameters[0]
        return _SimulatedCompiler(
            mesh=mesh,
            group=first.group,
            backend="aot_eager",
            report=report,
            kind=kind,
            parameters=first,
            attention=self.attention,
            simulation=self,
        )

    def run(self, step: LoweredStep, inputs: tuple[Any, ...]) -> Run:
        """Run a lowered graph on every rank. `inputs` stay as they are."""
        programs, report = self._emitted(step, inputs)
        grad_enabled = torch.is_grad_enabled()  # a thread has its own

        def work(rank: int) -> tuple[tuple[Any, ...], list[Tensor]]:
            held = []
            for index in programs[rank].inputs:
                name = step.captured.parameters.get(step.captured.placeholders[index])
                held.append(_detached(inputs[index]) if name is None else self.parameters[rank].leaves[name])
            with torch.set_grad_enabled(grad_enabled):
                return programs[rank].module(*held)

        done = run_ranks(self.num_ranks, work)
        self.last = Run(step, report, inputs, [outputs for outputs, _ in done], [updates for _, updates in done])
        return self.last

    def backward(self, losses: Sequence[Tensor]) -> None:
        """Differentiate every rank's loss."""
        run_ranks(self.num_ranks, lambda rank: losses[rank].backward())

    def gradients(self) -> list[dict[str, Tensor | None]]:
        """Return every rank's gradients of what it holds."""
        return [{name: leaf.grad for name, leaf in parameters.leaves.items()} for parameters in self.parameters]

    def _emitted(self, step: LoweredStep, inputs: tuple[Any, ...]) -> tuple[list[Program], StepReport]:
        sizes = step.sizes(inputs)
        key = (step, *sizes.items())
        if key not in self._programs:
            start = time.perf_counter()
            emitted = [step.emit(sizes, one.group, one) for one in self.parameters]
            programs = [program for _, program in emitted]
            for program in programs:
                _return_updates(program.module)
            report = StepReport.of(step.compiler.kind, *emitted[0], step.captured.symbols)
            report.compile_s = time.perf_counter() - start
            step.compiler.report.add(report)
            self._programs[key] = programs, report
        return self._programs[key]


@dataclass
class _SimulatedCompiler(Compiler):
    simulation: Simulation = field(kw_only=True)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.parameters is None:  # a piece of a step that is cut
            return gm.forward
        step = super().__call__(gm, example_inputs)
        assert isinstance(step, LoweredStep)

        def run(*inputs: Any) -> tuple[Any, ...]:
            result = self.simulation.run(step, inputs)
            with torch.no_grad():
                for index, value in zip(result.updated, result.updates[0], strict=True):
                    inputs[index].copy_(value)
            return result.outputs[0]

        return run


def _return_updates(module: fx.GraphModule) -> None:
    """Make a program return what it would update in place after its outputs: eager autograd may have saved the old values."""
    graph = module.graph
    updates = [node for node in graph.nodes if node.target is torch.ops.aten.copy_.default]
    output = graph.output_node()
    output.args = ((output.args[0], [node.args[1] for node in updates]),)
    for node in updates:
        graph.erase_node(node)
    module.recompile()


def _detached(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _reached(graph: fx.Graph, sources: set[fx.Node], *, floating: bool = False) -> set[fx.Node]:
    """Return the sources and everything computed from them; `floating`: only as far as gradients can flow."""
    found = set(sources)
    for node in graph.nodes:
        if node.op == "output" or not any(source in found for source in node.all_input_nodes):
            continue
        tensors = [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
        if not floating or any(tensor.is_floating_point() for tensor in tensors):
            found.add(node)
    return found


# The two sides of the comparison.


@dataclass
class _Observed:
    """What one call of the step gave: by name, every rank's value; by parameter, the gradient, of every rank that has it whole."""

    values: dict[str, list[Tensor]]
    gradients: dict[str, list[Tensor | None]]
    loss: str | None
    """The name of the value that was differentiated."""
    random: set[str]
    """Names of the values that depend on random numbers; known for the lowered step."""
    sequences: dict[str, int]
    """Names of the values that have a sequence, with its dimension; known for the lowered step."""
    opaque: dict[str, str]
    """Values that are neither tensors nor containers, with their types."""


class _OneDevice:
    """A copy of the module, and what calls of its step give."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method
        self._logged: list[tuple[str, Any]] = []
        if callable(getattr(type(module), "log", None)):
            module.__dict__.update(log=self._log, log_dict=self._log_dict)

    def _log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self._logged.append((f"logged {name}", value))

    def _log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            self._log(name, value)

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0) -> _Observed:
        """Call the step, differentiate what it returns and collect everything it leaves."""
        self._logged.clear()
        torch.manual_seed(seed)
        with torch.set_grad_enabled(self.method not in ("validation_step", "test_step", "predict_step")):
            result = self._call(args, kwargs)
            everything = dict(self._named(result))
            named = {name: value for name, value in everything.items() if isinstance(value, Tensor)}
            opaque = {name: type(value).__name__ for name, value in everything.items() if name not in named}
            loss = _loss(result)
            values = {name: [_detached(one) for one in self._everywhere(value)] for name, value in named.items()}
            random, sequences = self._random_and_sequences(named)
            name = None
            if loss is not None and loss.requires_grad:
                if not any(parameter.requires_grad for parameter in self.module.parameters()):
                    raise CheckError(
                        f"{_name(self.module, self.method)} has no trainable parameters, but computes with some: they can be "
                        f"neither copied nor compared. Pass the module they belong to, or a method of it."
                    )
                name = next((name for name, value in named.items() if value is loss), None)
                self._backward(loss)
        gradients = {parameter: [gradient] for parameter, gradient in self._gradients().items()}
        return _Observed(values, gradients, name, random, sequences, opaque)

    def _named(self, result: Any) -> Iterator[tuple[str, Any]]:
        """Return the names and values of all there is to compare."""
        counts: dict[str, int] = {}
        returned = "loss" if isinstance(result, Tensor) and result.ndim == 0 else "returned"
        for start, tree in [(returned, result), *self._logged]:
            for name, value in _leaves(tree, start):
                counts[name] = counts.get(name, 0) + 1
                yield name if counts[name] == 1 else f"{name} ({counts[name]})", value
        for name, buffer in self.module.named_buffers():
            yield f"buffer {name}", buffer
        for name, module in self.module.named_modules():
            if isinstance(module, Metric):
                yield from _leaves(module.metric_state, f"metric {name}")

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.module.zero_grad()
        return getattr(self.module, self.method)(*args, **kwargs)

    def _everywhere(self, value: Tensor) -> list[Tensor]:
        return [value]

    def _random_and_sequences(self, named: Mapping[str, Tensor]) -> tuple[set[str], dict[str, int]]:
        return set(), {}

    def _backward(self, loss: Tensor) -> None:
        loss.mean().backward()

    def _gradients(self) -> dict[str, Tensor | None]:
        return {name: _detached(parameter.grad) for name, parameter in self.module.named_parameters()}


class _Lowered(_OneDevice):
    """Another copy, its step lowered on simulated ranks."""

    def __init__(
        self, module: nn.Module, method: str, num_ranks: int, sequence_dim: SequenceDim, attention: AttentionMethod
    ) -> None:
        super().__init__(module, method)
        self.report = Report()
        # Sharded, as the strategy shards by default: the parameters' own collectives are checked too.
        self.simulation = Simulation(module, num_ranks, sharded=True, attention=AttentionOptions(attention))
        compiler = self.simulation.compiler(self.report, method)
        first: Any = self.simulation.parameters[0]
        self._step = CompiledStep(module, method, compiler, first, sequence_dim, whole_metrics=True)  # type: ignore[arg-type]

    @property
    def run(self) -> Run | None:
        """The last run; `None` if the step is not one graph."""
        return None if self.report.breaks else self.simulation.last

    @property
    def graphs(self) -> list[Captured]:
        """The graph that ran last; none if the step is not one graph."""
        return [self.run.step.captured] if self.run else []

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for parameters in self.simulation.parameters:
            for leaf in parameters.leaves.values():
                leaf.grad = None
        return self._step(*args, **kwargs)

    def _everywhere(self, value: Tensor) -> list[Tensor]:
        return self.run.everywhere(value) if self.run else [value]

    def _random_and_sequences(self, named: Mapping[str, Tensor]) -> tuple[set[str], dict[str, int]]:
        if self.run is None:
            return set(), {}
        captured = self.run.step.captured
        touched = _reached(captured.graph, {node for node in captured.graph.nodes if is_random(node)})
        random: set[str] = set()
        sequences: dict[str, int] = {}
        for name, value in named.items():
            node = self.run.node_of(value)
            if node is not None:
                random.update({name} if node in touched else ())
                sizes = captured.shape(node.meta["val"])
                dims = [dim for dim, size in enumerate(sizes) if size.free_symbols & captured.symbols]
                sequences.update({name: dims[0]} if dims else {})
        return random, sequences

    def _backward(self, loss: Tensor) -> None:
        losses = self._everywhere(loss)
        if len(losses) == self.simulation.num_ranks:  # else it is no output of the graph: a parameter, returned as it is
            self.simulation.backward([loss.mean() for loss in losses])

    def _gradients(self) -> dict[str, Tensor | None]:
        parameters = self.simulation.parameters[0]
        by_rank = self.simulation.gradients()
        whole: dict[str, Tensor | None] = {}
        for name, original in parameters.originals.items():
            parts = [gradients[name] for gradients in by_rank]
            whole[name] = None
            if any(part is not None for part in parts):
                leaves = [one.leaves[name] for one in self.simulation.parameters]
                filled = [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(leaves, parts, strict=True)]
                whole[name] = torch.cat(filled) if original.ndim else filled[0]
        return whole


@dataclass
class RememberingCompiler(Compiler):
    """Keeps what was captured, of all pieces of a step."""

    graphs: list[Captured] = field(default_factory=list, kw_only=True)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        step = super().__call__(gm, example_inputs)
        if isinstance(step, LoweredStep):
            self.graphs.append(step.captured)
        return step


class _PieceCompiler(RememberingCompiler):
    """Runs programs operator by operator: AOTAutograd cannot trace under what simulates collectives."""

    def compile(
        self, module: fx.GraphModule, inputs: Sequence[Tensor], on_graph: OnGraph, partition: Partition | None = None
    ) -> Callable[..., Any]:
        names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
        updates = [names.index(node.args[0].name) for node in module.graph.nodes if node.target is torch.ops.aten.copy_.default]
        _return_updates(module)

        def run(*inputs: Any) -> Any:
            outputs, new = module(*(x.clone() if index in updates else x for index, x in enumerate(inputs)))
            for index, value in zip(updates, new, strict=True):
                inputs[index].copy_(value)
            return outputs

        return run


class RankStep:
    """A module's step as one rank of a simulated group runs it, cut in pieces where Python cuts it.

    To be called under `run_ranks`, by every rank with a copy of the module of its own.

    Attributes:
        report: What the compiler did.
        graphs: What it captured.
    """

    def __init__(
        self, module: nn.Module, kind: str, group: Group, *, sequence_dim: SequenceDim = 1, attention: AttentionMethod = "auto"
    ) -> None:
        self.report, self.graphs = Report(), list[Captured]()
        mesh = _compat.mesh_without_group(group.size)
        options = AttentionOptions(attention)
        compiler = _PieceCompiler(
            mesh, group, "aot_eager", self.report, kind, rank_seed=group.rank, attention=options, graphs=self.graphs
        )
        parameters = ModuleParameters(module, None, group, sharded=False)  # type: ignore[arg-type]
        self._step = CompiledStep(module, kind, compiler, parameters, sequence_dim)  # type: ignore[arg-type]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)


class _Rank(_OneDevice):
    def __init__(self, module: nn.Module, method: str, group: Group, sequence_dim: SequenceDim, attention: AttentionMethod) -> None:
        super().__init__(module, method)
        self.step = RankStep(module, method, group, sequence_dim=sequence_dim, attention=attention)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.module.zero_grad()
        return self.step(*args, **kwargs)


class _InPieces:
    """Copies of the module, one a simulated rank, whose steps are cut in pieces."""

    def __init__(self, modules: Sequence[nn.Module], method: str, sequence_dim: SequenceDim, attention: AttentionMethod) -> None:
        size = len(modules)
        self._ranks = [
            _Rank(module, method, Group("simulated", size, rank), sequence_dim, attention) for rank, module in enumerate(modules)
        ]
        self.report, self.graphs = self._ranks[0].step.report, self._ranks[0].step.graphs

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Observed:
        """Call the step on every rank and collect what all of them leave."""
        # Ranks have code in common, and guards of their own.
        limit = torch._dynamo.config.recompile_limit * len(self._ranks)
        with torch._dynamo.config.patch(recompile_limit=limit):
            by_rank = run_ranks(len(self._ranks), lambda rank: self._ranks[rank].observe(*_copied((args, kwargs))))
        first = by_rank[0]
        values = {name: [one.values[name][0] for one in by_rank] for name in first.values}
        gradients = {name: [one.gradients[name][0] for one in by_rank] for name in first.gradients}
        return dataclasses.replace(first, values=values, gradients=gradients)


def _leaves(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Return what nested containers hold, with names; numbers as tensors."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, str(key) if name == "returned" else f"{name}.{key}")
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{name}[{index}]")
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for one in dataclasses.fields(tree):
            yield from _leaves(getattr(tree, one.name), f"{name}.{one.name}")
    elif isinstance(tree, (int, float)):
        yield name, torch.tensor(tree, dtype=torch.float64 if isinstance(tree, float) else None)
    elif tree is not None and not isinstance(tree, (str, Metric, MetricCollection)):  # metrics: their states are compared
        yield name, tree


def _loss(result: Any) -> Tensor | None:
    """Return what to differentiate: a returned tensor, what is called `loss`, else the first tensor with a gradient."""
    found = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", result)
    if isinstance(found, Tensor):
        return found
    return next((value for _, value in _leaves(result, "") if isinstance(value, Tensor) and value.requires_grad), None)


# Comparing.


def _compare(name: str, got: Sequence[Tensor], want: Tensor, tolerance: float, floor: float) -> Comparison:
    """Compare every rank's value with one device's; errors are relative to the larger of `want`'s norm and `floor`."""
    found = Comparison(name, 0.0, tolerance)
    for rank, value in enumerate(got):
        error, problem = _difference(value, want, tolerance, floor)
        if problem and not found.problem:
            found.problem = f"rank {rank} has {problem}" if len(got) > 1 else problem
        found.error = max(found.error, error)
    return found


def _difference(got: Tensor, want: Tensor, tolerance: float, floor: float) -> tuple[float, str]:
    if (got.shape, got.dtype) != (want.shape, want.dtype):
        return 0.0, f"{tuple(got.shape)} of {got.dtype}, one device {tuple(want.shape)} of {want.dtype}"
    if not want.is_floating_point() and not want.is_complex():
        differ = int((got != want).sum())
        return 0.0, f"{differ} of {want.numel()} elements different{_shown(got, want)}" if differ else ""
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return 0.0, f"{int(got.isfinite().sum())} of {want.numel()} elements finite, one device {int(finite.sum())}"
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.to(wide), want.to(wide)
    error = float((got[finite] - want[finite]).norm()) / max(float(want[finite].norm()), floor, 1e-300)
    return error, f"relative error {error:.2e} (allowed {tolerance:.0e}){_shown(got, want)}" if error > tolerance else ""


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape and torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())
    )


def _shown(got: Tensor, want: Tensor) -> str:
    return f": {got.item():.9g}, one device {want.item():.9g}" if want.numel() == 1 else ""


def _largest(gradients: Mapping[str, list[Tensor | None]]) -> float:
    """Return the norm of the largest gradient."""
    return max((float(one.norm()) for ranks in gradients.values() for one in ranks if one is not None), default=0.0)


def _comparisons(got: _Observed, want: _Observed, tolerance_of: Callable[[Tensor], float]) -> Iterator[Comparison]:
    """Compare everything but what is random."""
    for name in sorted(want.values.keys() ^ got.values.keys()):
        where = "on one device" if name in want.values else "in the lowered step"
        yield Comparison(name, 0.0, 0.0, f"there only {where}")
    for name in [name for name in want.values if name in got.values and name not in got.random]:
        (value,) = want.values[name]
        # A logged number may be zero but for rounding; the step's results and state are not.
        yield _compare(name, got.values[name], value, tolerance_of(value), 1.0 if name.startswith("logged ") else 0.0)
    if got.loss in got.random:
        return
    largest = _largest(want.gradients)
    for name, (gradient,) in want.gradients.items():
        lowered = got.gradients[name]
        some = next((one for one in (gradient, *lowered) if one is not None), None)
        if some is None:
            continue
        # Likewise the gradient of a key's bias: held to a tenth of the tolerance of the largest gradient.
        zero = torch.zeros_like(some)
        tolerance = tolerance_of(zero.reshape(-1))
        yield _compare(
            f"gradient of {name}",
            [zero if one is None else one for one in lowered],
            zero if gradient is None else gradient,
            tolerance,
            largest / 10,
        )


def _changed(before: Tensor, after: Tensor, dim: int | None, tolerance: float, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return which positions along `dim` (`None`: which elements) changed surely, and which may have changed.

    Both are boolean, of shape `(positions,)`. Surely: by more than `tolerance` of the largest value, or of `floor` if that is more.
    Maybe: by more than rounding.
    """
    if not before.is_floating_point():
        change, scale, rounding = (after != before).double(), 1.0, 0.0
    else:
        both = before.isfinite() & after.isfinite()
        change = torch.where(both, after - before, 0.0).abs().double()
        change = torch.where(before.isfinite() == after.isfinite(), change, float("inf"))
        scale = max(floor, float(before[both].abs().max()) if both.any() else 0.0)
        rounding = 16 * torch.finfo(before.dtype).eps
    by_place = change.reshape(-1) if dim is None else change.movedim(dim, 0).reshape(change.shape[dim], -1).amax(1)
    return by_place > tolerance * scale, by_place > rounding * scale


class _Check:
    """A check in progress: fills a `CheckResult`."""

    def __init__(
        self,
        result: CheckResult,
        one: _OneDevice,
        lowered: _Lowered,
        in_pieces: Callable[[], tuple[_InPieces, _OneDevice]],
        inputs: Any,
        sequence_dim: SequenceDim,
        rtol: float | None,
    ) -> None:
        self.result, self.one, self.inputs = result, one, inputs
        self.lowered: _Lowered | _InPieces = lowered
        self.in_pieces, self.sequence_dim, self.rtol = in_pieces, sequence_dim, rtol
        self._coarsest = torch.float64

    def fill(self, want: _Observed) -> None:
        """Compare the lowered step with `want`, which is what one device gave, and change tokens."""
        result = self.result
        got = self._observe_lowered(self.inputs)
        if got is not None and not self.lowered.graphs:
            got = self._cut(want)
        if got is None:
            return
        graphs = self.lowered.graphs
        self._find_precision(graphs)
        result.skipped += [f"{name}: a {kind} is not looked into" for name, kind in want.opaque.items()]
        if want.loss is None:
            result.skipped.append("gradients: the step returns nothing that has one")
        if got.random:
            where = sorted({user_line(node) for captured in graphs for node in captured.graph.nodes if is_random(node)})
            names = sorted(got.random) + (["gradients"] if got.loss in got.random else [])
            result.skipped.append(
                f"{', '.join(names)}, and tokens changed: random numbers are drawn at {', '.join(where) or 'a cut'}"
            )
        result.comparisons = list(_comparisons(got, want, self._tolerance))
        result.complete = got.loss not in got.random if want.loss else bool(result.comparisons)
        if not got.random:
            self._probe(want, got)

    def _cut(self, want: _Observed) -> _Observed | None:
        """Run the step in pieces on ranks that are simulated together."""
        result, breaks = self.result, self.result.report.breaks
        result.traced = False
        if not breaks:
            result.skipped.append(
                "anything: torch.compile captured no graph (the step computes nothing, or compilation is disabled)"
            )
            return None
        if not _compat.DYNAMO_IGNORES_MODES:
            result.skipped += [
                f"anything: not one graph, at {one.where}: {one.reason}. This torch simulates no pieces" for one in breaks
            ]
            return None
        self.lowered, other = self.in_pieces()
        # Which values are random is not seen in pieces, between which anything may happen.
        args, kwargs = _copied(self.inputs)
        again = other.observe(args, kwargs, seed=1)
        random = {name for name, (value,) in want.values.items() if not _same(value, again.values[name][0])}
        got = self._observe_lowered(self.inputs)
        result.report = self.lowered.report
        return got and dataclasses.replace(got, random=random)

    def _observe_lowered(self, inputs: Any) -> _Observed | None:
        try:
            return self.lowered.observe(*_copied(inputs))
        except Exception as error:  # noqa: BLE001 -- whatever it is, one device did not raise it
            self.result.problems.append(f"the lowered step fails where one device does not: {headline(error)}")
            return None

    def _find_precision(self, graphs: Sequence[Captured]) -> None:
        """Find the dtype with the fewest digits between the parameters and what is returned."""
        where = ""
        reached = (_reached(one.graph, one.trainable, floating=True) - set(one.placeholders) for one in graphs)
        for node in itertools.chain.from_iterable(reached):
            for value in pytree.tree_leaves(node.meta.get("val")):
                if isinstance(value, Tensor) and TOLERANCES.get(value.dtype, (0.0,)) > TOLERANCES[self._coarsest]:
                    self._coarsest, where = value.dtype, user_line(node)
        if where and str(self._coarsest).removeprefix("torch.") not in self.result.precision:
            self.result.precision += f", {str(self._coarsest).removeprefix('torch.')} where the step asks for it ({where})"

    def _tolerance(self, value: Tensor) -> float:
        if self.rtol is not None:
            return self.rtol
        return max(TOLERANCES.get(dtype, (0.0, 0.0))[value.ndim > 0] for dtype in (self._coarsest, value.dtype))

    def _probe(self, want: _Observed, got: _Observed) -> None:
        """Change the first token, the last, and the two at the first cut between ranks, one after the other."""
        length = self.result.length
        cut = -(-length // self.result.num_ranks)
        for position in sorted({0, cut - 1, cut, length - 1} & set(range(length))):
            changed = _with_token_changed(self.inputs, position, self.sequence_dim, length)
            if changed is None:
                self.result.skipped.append(f"token {position} changed: all tokens of the batch are the same")
                continue
            try:
                one_after = self.one.observe(*_copied(changed))
            except Exception as error:  # noqa: BLE001 -- the user's code may refuse the changed token
                self.result.skipped.append(f"token {position} changed: one device fails: {headline(error)}")
                continue
            after = self._observe_lowered(changed)
            if after is None:
                return
            self.result.probes.append(self._changes(position, (want, one_after), (got, after)))

    def _changes(self, position: int, one: tuple[_Observed, _Observed], lowered: tuple[_Observed, _Observed]) -> Probe:
        state = ("buffer ", "metric ")  # these have seen the other batches too
        names = [name for name in one[0].values if name in lowered[0].values and not name.startswith(state)]
        sequences = lowered[0].sequences
        probe = Probe(position, 0, [], [])

        def compare(name: str, dim: int | None, sides: list[tuple[Tensor, Tensor]], floor: float = 0.0) -> None:
            tolerance = self._tolerance(sides[0][0])
            (sure, maybe), (lowered_sure, lowered_maybe) = (_changed(*side, dim, tolerance, floor) for side in sides)
            probe.num_changed += int(sure.sum())
            for places, found in ((probe.leaked, lowered_sure & ~maybe), (probe.lost, sure & ~lowered_maybe)):
                places += [f"{name}[{place}]" for place in found.nonzero()[:, 0].tolist()]

        for name in names:
            sides = [(before.values[name][0], after.values[name][0]) for before, after in (one, lowered)]
            if sides[0][0].numel() and sides[0][0].shape == sides[1][0].shape:
                compare(name, sequences.get(name), sides)
        if not sequences.keys() & set(names):
            # Nothing returned has positions: rows of gradients (of embeddings, say) tell what reached what. One may be zero but for
            # rounding (of a key's bias), whatever changes.
            floor = _largest(one[0].gradients) / 10
            for name, (gradient,) in one[0].gradients.items():
                found: list[Any] = [(before.gradients[name][0], after.gradients[name][0]) for before, after in (one, lowered)]
                if gradient is not None and gradient.numel() and all(value is not None for pair in found for value in pair):
                    compare(f"gradient of {name}", 0 if gradient.ndim else None, found, floor)
        return probe


def _with_token_changed(inputs: Any, position: int, sequence_dim: SequenceDim, length: int) -> Any:
    """Return the inputs with one position changed in every sequence; `None` if that changes nothing.

    Floats grow by one, integers become the next larger one that occurs in the same tensor (the largest becomes the smallest), so
    they stay valid ids. Booleans are masks and stay.
    """
    differs = False
    dims = {id(one.tensor): dim for one, dim in sequences(call_tensors(*inputs), sequence_dim)}

    def one(tensor: Tensor) -> Tensor:
        nonlocal differs
        dim = dims.get(id(tensor))
        if dim is None or tensor.shape[dim] != length or tensor.dtype == torch.bool:
            return tensor
        new = tensor.clone()
        token = new.select(dim, position)
        if tensor.is_floating_point() or tensor.is_complex():
            token += 1
        else:
            known = tensor.unique()
            token.copy_(known[(torch.searchsorted(known, token.contiguous()) + 1) % len(known)])
        differs = differs or not torch.equal(new, tensor)
        return new

    changed = apply_to_collection(inputs, Tensor, one, allow_frozen=True)
    return changed if differs else None


def _copied(inputs: Any) -> Any:
    return apply_to_collection(inputs, Tensor, _detached, allow_frozen=True)


# The check.


def check(
    module: nn.Module | Callable[..., Any],
    batch: Any,
    *,
    num_ranks: int = 2,
    step: str = "training_step",
    sequence_dim: SequenceDim = 1,
    rtol: float | None = None,
    strict: bool = False,
    attention: AttentionMethod = "auto",
) -> CheckResult:
    """Compare a module's step with its lowered form on simulated ranks, on the CPU of this process.

    The module, the batch, the process group and the random state stay as they are: copies are computed with, without dropout, in
    float64 if one device can. Memory: about four times the module's parameters in that precision; if Python cuts the step, two
    times more for every rank.

    Args:
        module: A LightningModule; or any module, method of a module or function, which is then called with the batch.
        batch: What the step gets. For a call: a dict of keyword arguments, a tuple or list of positional ones, or one argument.
        num_ranks: Ranks that share the sequence, 2 or more.
        step: The method to compare. A module without a `training_step` is called.
        sequence_dim: The dimension of batch tensors that holds the sequence.
        rtol: What relative norms may differ by. Default: 1e-10 in float64; in float32, 1e-6 for scalars and 1e-5 for gradients and
            other tensors. Logged numbers below one are held to it as if they were one.
        strict: Whether anything that runs in full for want of a rule, and a step that is not one graph, is a difference.
        attention: As the strategy's.

    Raises:
        CheckError: If there is nothing to compare with: the step fails on one device, the batch has no sequence to split, ...
    """
    if not isinstance(num_ranks, int) or num_ranks < 2:
        raise CheckError(f"num_ranks={num_ranks!r} leaves nothing to compare with one device. Use 2 or more.")
    module, method = _method(module, step)
    state = _collect_rng_states()
    torch._dynamo.reset()  # its limit on recompilation counts over all checks
    try:
        with torch.enable_grad():
            return _check(module, method, batch, num_ranks, sequence_dim, rtol, strict, attention)
    finally:
        torch._dynamo.reset()
        _set_rng_states(state)


def _check(
    module: nn.Module,
    method: str,
    batch: Any,
    num_ranks: int,
    sequence_dim: SequenceDim,
    rtol: float | None,
    strict: bool,
    attention: AttentionMethod,
) -> CheckResult:
    notes: list[str] = []
    double_error: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        one = _OneDevice(_copy(module, dtype, notes), method)
        lowered_module = _copy(module, dtype, [])
        try:
            inputs = step_arguments(one.module, method, batch, dtype)
            tensors = call_tensors(*inputs)
            unfit = batch_error(tensors, sequence_dim, num_ranks)
            if unfit is not None:
                raise CheckError(unfit)
            want = one.observe(*_copied(inputs))
            break
        except CheckError:
            raise
        except Exception as error:
            if dtype == torch.float64:
                double_error = error
                continue
            raise CheckError(f"{_name(module, method)} fails on one device: {headline(error)}") from error
    if double_error is not None:
        notes.append(f"not in float64, where one device fails: {headline(double_error)}")
    if all(name.startswith("buffer ") for name in want.values):
        raise CheckError(f"{_name(module, method)} returned and logged nothing on one device: there is nothing to compare.")
    lowered = _Lowered(lowered_module, method, num_ranks, sequence_dim, attention)
    result = CheckResult(
        name=_name(module, method),
        length=max(one.tensor.shape[dim] for one, dim in sequences(tensors, sequence_dim)),
        num_ranks=num_ranks,
        precision=str(dtype).removeprefix("torch."),
        attention=attention,
        notes=list(dict.fromkeys(notes)),
        report=lowered.report,
    )

    def in_pieces() -> tuple[_InPieces, _OneDevice]:
        ranks = [_copy(module, dtype, []) for _ in range(num_ranks)]
        return _InPieces(ranks, method, sequence_dim, attention), _OneDevice(_copy(module, dtype, []), method)

    _Check(result, one, lowered, in_pieces, inputs, sequence_dim, rtol).fill(want)
    if strict:
        result.problems += _refusals(result)
    return result


def _refusals(result: CheckResult) -> Iterator[str]:
    for cut in result.report.breaks:
        yield f"strict=True: not one graph. At {cut.where}: {cut.reason}"
    for entry in result.report.steps:
        try:
            entry.refuse_fallbacks()
        except StrictModeError as error:
            yield str(error)


def _method(module: Any, step: str) -> tuple[nn.Module, str]:
    """Return the module and the name of its method that are meant."""
    if isinstance(module, nn.Module):
        if step in ("forward", "__call__") or (step == "training_step" and not hasattr(module, step)):
            return module, "__call__"
        own = not isinstance(module, LightningModule) or step not in STEP_LOADERS or is_overridden(step, module)
        if not own or not callable(getattr(module, step, None)):
            raise CheckError(f"step={step!r}: {type(module).__name__} has no such method. Name one it has; 'forward' calls it.")
        return module, step
    if not callable(module):
        raise CheckError(f"module is a {type(module).__name__}. Pass a module, a method of a module or a function.")
    owner = getattr(module, "__self__", None)
    return (owner, module.__name__) if isinstance(owner, nn.Module) else (_Function(module), "__call__")


class _Function(nn.Module):
    """A function as a module without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def _name(module: nn.Module, method: str) -> str:
    if isinstance(module, _Function):
        return getattr(module.forward, "__qualname__", repr(module.forward))
    return type(module).__name__ + ("" if method == "__call__" else f".{method}")


def _copy(module: nn.Module, dtype: torch.dtype, notes: list[str]) -> nn.Module:
    """Return a copy on the CPU in `dtype`, without gradients and dropout."""
    try:
        copied: nn.Module = copy.deepcopy(module).to("cpu", dtype)
    except Exception as error:
        raise CheckError(f"{type(module).__name__} cannot be copied (copy.deepcopy): {headline(error)}") from error
    copied.zero_grad()
    silenced = sum(_without_dropout(one) for one in copied.modules())
    if silenced:
        notes.append(f"dropout is 0 here: {silenced} setting(s) changed in the copies")
    return copied


def _without_dropout(module: nn.Module) -> int:
    """Set every number that is called a dropout to 0, in the module and its config; return how many were not."""
    changed = 0
    for owner in (module, getattr(module, "config", None)):
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            dropout = "drop" in name.lower() or (name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd))
            if dropout and isinstance(value, float) and value:
                setattr(owner, name, 0.0)
                changed += 1
    return changed


def check_target(
    target: str,
    *,
    batch: str | None = None,
    config: str | None = None,
    length: int | None = None,
    num_ranks: int | None = None,
    step: str | None = None,
    sequence_dim: SequenceDim | None = None,
    rtol: float | None = None,
    strict: bool = False,
) -> CheckResult:
    """Check a module that is named, with a batch of its own data.

    Args:
        target: `package.module:Name` or `path/to/file.py:Name`, a module class or a function that returns a module; or the path of
            a LightningCLI configuration, whose `model` has a `class_path`.
        batch: Likewise, a function that returns a batch, or a LightningDataModule class. Default: the configuration's `data`, the
            module's own loader, its `example_input_array`.
        config: A LightningCLI configuration whose `model` (and `data`) sections are the arguments of the classes named.
        length: Use only that many positions of every sequence.
        num_ranks: As in `check`. Default: the configuration's `sequence_parallel_size`, else 2.
        step: As in `check`.
        sequence_dim: As in `check`. Default: the configuration's, else 1.
        rtol: As in `check`.
        strict: As in `check`; so does the configuration's.

    Raises:
        CheckError: If something that is named does not exist, or `check` raises it.
    """
    try:
        module, data, step, options = load_target(
            target, batch=batch, config=config, step=step, sequence_dim=sequence_dim, length=length
        )
    except TargetError as error:
        raise CheckError(str(error)) from error
    return check(
        module,
        data,
        num_ranks=options.get("sequence_parallel_size", 2) if num_ranks is None else num_ranks,
        step=step,
        sequence_dim=options["sequence_dim"],
        rtol=rtol,
        strict=strict or bool(options.get("strict")),
        attention=options.get("attention", "auto"),
    )
