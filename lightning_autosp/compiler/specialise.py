"""From a captured step to callables: one program per set of sizes, compiled when first met and kept in a bounded cache."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from lightning_autosp import _compat
from lightning_autosp.attention.flash import keep_whole
from lightning_autosp.attention.select import AttentionOptions
from lightning_autosp.collectives import Group
from lightning_autosp.compiler import rules
from lightning_autosp.compiler.backend import CompileBackend, OnGraph, Partition, compile_module
from lightning_autosp.compiler.capture import Captured, capture, memory_of
from lightning_autosp.compiler.crossing import EagerMarks, PartTensor, Placement, placement_of
from lightning_autosp.compiler.demand import make_plan
from lightning_autosp.compiler.emit import Emitter, Program
from lightning_autosp.compiler.layout import ShardTooShortError, Span
from lightning_autosp.compiler.locate import Locator
from lightning_autosp.compiler.plan import Plan
from lightning_autosp.compiler.regions import join_attention
from lightning_autosp.compiler.report import Crossing, Ran, Report, StepReport
from lightning_autosp.compiler.rowwise import local_regions, tile, tile_losses
from lightning_autosp.compiler.scalars import NeedsBreakError
from lightning_autosp.compiler.tiling import can_be_tiled
from lightning_autosp.compiler.written_out import SDPA
from lightning_autosp.memory.costs import cost
from lightning_autosp.memory.estimate import model_flops
from lightning_autosp.memory.meter import LiveBytes
from lightning_autosp.memory.partition import Decision, DoesNotFitError, MemoryOptions, Partitioner
from lightning_autosp.saved import ProgramFacts, SavedPlan

__all__ = ["MAX_PROGRAMS", "Compiler", "LoweredStep", "Parameters"]

TILE_ROWS = 4096
"""Positions of a tile in which a step that does not fit otherwise computes its wide values."""

HEAD_CHUNKS = 4
"""Chunks in which such a step exchanges and attends to a rank's heads."""

MAX_PROGRAMS = 32
"""Programs kept per captured step; the one unused for longest goes first."""


class Parameters(Protocol):
    """How graphs get at the module's parameters."""

    def names(self) -> dict[int, str]:
        """Return `id(parameter) -> name` for the tensors that stand for parameters while a step is traced."""

    def enter(self, name: str) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        """Return the function, and its further arguments, that makes the whole parameter of what `held` gives."""

    def held(self, name: str) -> Tensor:
        """Return what this rank holds of a parameter, with autograd leading to it."""


@dataclass
class Compiler:
    """A Dynamo backend that runs steps sequence-parallel.

    Attributes:
        mesh: The one-dimensional mesh of the sequence group.
        group: The same group as graphs see it.
        backend: What programs are compiled with.
        report: Where every program is recorded.
        kind: The step kind the next captured graphs belong to, for the report.
        parameters: How parameters enter graphs; `None` if they were made whole before the step.
        rank_seed: Distinguishes this rank's random stream from the others'.
        strict: Whether anything computed in full raises.
        pieces: Whether graphs are pieces of a step that is cut.
        keep_parts: Whether what graphs compute as parts they hand on as parts (`PartTensor`).
        inspect: Called with every graph that was captured; may raise to refuse it.
        own: `id(tensor)` of the module's tensors whose sizes are marked now: no sequences by themselves.
        attention: How methods of attention are chosen.
        memory: How memory is planned; `None`: PyTorch's own partitioner, and nothing is estimated.
        saved: What was planned for a program; the first of its step has to be it, others are planned as without.
        compared: Steps whose first program was.
        meter: Counts the bytes that programs take.
        locator: Runs programs while it is there, to look for values that are no numbers.
        tile_local: Positions of a tile in which what is wide between two products (an MLP) is computed, and computed again in
            backward; `None`: it is computed at once and kept.
    """

    mesh: DeviceMesh
    group: Group
    backend: CompileBackend
    report: Report
    kind: str
    parameters: Parameters | None = None
    rank_seed: int = 0
    strict: bool = False
    pieces: bool = False
    keep_parts: bool = False
    inspect: Callable[[Captured], None] | None = None
    own: set[int] = field(default_factory=set)
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    memory: MemoryOptions | None = None
    saved: SavedPlan | None = None
    compared: set[str] = field(default_factory=set)
    meter: LiveBytes | None = None
    locator: Locator | None = None
    tile_local: int | None = None

    def __post_init__(self) -> None:
        keep_whole()

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            captured = capture(gm, self.parameters.names() if self.parameters else {}, self.own)
        except NeedsBreakError as error:
            if not self.pieces:
                raise
            # Parameters are whole and the inputs make themselves whole, so the piece can run as it is.
            self.report.notes.append(f"{self.kind}: a piece runs in full, because {error}")
            return gm.forward
        if self.inspect is not None:
            self.inspect(captured)
        join_attention(captured, functools.partial(can_be_tiled, captured, rules.find))
        tile_losses(captured, rules.find)
        self.report.num_graphs[self.kind] = self.report.num_graphs.get(self.kind, 0) + 1
        step = LoweredStep(captured, self)
        if self.tile_local is not None:
            step.tile(self.tile_local)
        return step

    def compile(
        self, module: fx.GraphModule, inputs: Sequence[Tensor], on_graph: OnGraph, partition: Partition | None = None
    ) -> Callable[..., Any]:
        """Compile one rank's program; see `backend.compile_module`."""
        return compile_module(module, inputs, self.backend, on_graph, partition, self.meter)


class _CountedError(Exception):
    """What was to be known of a graph is known."""


@dataclass(frozen=True)
class _Surroundings:
    """What a program was compiled under."""

    device: str
    autocast: torch.dtype | None
    gradients: bool
    trained: frozenset[int]
    """Inputs of the captured graph, by number, that have a gradient."""

    @classmethod
    def of(cls, numbers: Sequence[int], tensors: Sequence[Tensor]) -> _Surroundings:
        device = tensors[0].device.type if tensors else "cpu"
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        trained = frozenset(number for number, tensor in zip(numbers, tensors, strict=True) if tensor.requires_grad)
        return cls(device, autocast, torch.is_grad_enabled(), trained)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        on = self.autocast is not None
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(self.gradients),
            torch.autocast(self.device, self.autocast, enabled=on),
        ):
            yield


class LoweredStep:
    """A captured graph, callable with real inputs."""

    def __init__(self, captured: Captured, compiler: Compiler) -> None:
        self.captured, self.compiler = captured, compiler
        self._plans: dict[Any, Plan] = {}
        self._programs: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()
        self._where = _find_symbols(captured)
        self.is_tiled = False

    def tile(self, tile_rows: int) -> bool:
        """Compute what is wide between two products in tiles from now on, and again in backward; exchange heads in chunks.

        Args:
            tile_rows: Positions of a tile.

        Returns:
            Whether programs are others now.
        """
        if self.is_tiled:
            return False
        self._plans.clear()
        self.is_tiled = True
        found = [tile(self.captured, rules.find, one, tile_rows) for one in local_regions(self.captured, rules.find)]
        attends = any(node.target is SDPA for node in self.captured.graph.nodes)
        return any(found) or attends

    @property
    def attention(self) -> AttentionOptions:
        """How methods of attention are chosen."""
        options = self.compiler.attention
        return replace(options, head_chunks=HEAD_CHUNKS) if self.is_tiled else options

    def __call__(self, *inputs: Any) -> Any:
        with _compat.without_top_mode(EagerMarks) as marks:
            outputs = self._call(*inputs)
        if marks is not None:  # a piece may have been given a length as a number, and so know of no sequence
            marks.mark(outputs)
        return outputs

    def _call(self, *inputs: Any) -> Any:
        updated = {}
        for node in self.captured.mutated:
            index = self.captured.placeholders.index(node)
            if isinstance(inputs[index], PartTensor):
                inputs[index].refuse_update("a piece of the step")
                updated[index] = inputs[index].whole("an update in place")
        outputs = self._run([updated.get(index, value) for index, value in enumerate(inputs)])
        for index, value in updated.items():  # the memory is the same; this is for autograd
            inputs[index].copy_(value)
        return outputs

    def _run(self, inputs: Sequence[Any]) -> Any:
        sizes, arriving = self.sizes(inputs), self.arriving(inputs)
        if self.compiler.locator is not None:
            emitter, program = self.emit(sizes, self.compiler.group, self.compiler.parameters, arriving)
            with self._stream(program, inputs), torch.no_grad():
                return self.compiler.locator.run(emitter, program, self._tensors(program.inputs, inputs))
        # What AOTAutograd makes of a program depends on whether it has to prepare a backward.
        key = (*sizes.items(), *arriving.items(), torch.is_grad_enabled())
        if key not in self._programs:
            self._programs[key] = self._compile(sizes, inputs)
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key](*inputs)

    def sizes(self, inputs: Sequence[Any]) -> dict[sympy.Symbol, int]:
        """Read the value of every symbol off the inputs."""
        return {
            symbol: (int(inputs[index] if dim is None else inputs[index].shape[dim]) - constant) // factor
            for symbol, (index, dim, factor, constant) in self._where.items()
        }

    def arriving(self, inputs: Sequence[Any]) -> dict[int, Placement]:
        """Return which inputs are parts, and how they are cut."""
        placements = {index: placement_of(value) for index, value in enumerate(inputs)}
        return {index: placement for index, placement in placements.items() if placement is not None}

    def plan(
        self,
        symbols: frozenset[sympy.Symbol],
        too_short: frozenset[Span] = frozenset(),
        arriving: Mapping[int, Placement] | None = None,
    ) -> Plan:
        key = (symbols, too_short, tuple((arriving or {}).items()))
        if key not in self._plans:
            layouts = {}
            for index, placement in (arriving or {}).items():
                node = self.captured.placeholders[index]
                layouts[node] = placement.layout(self.captured.shape(node.meta["val"])[placement.dim])
            self._plans[key] = make_plan(
                self.captured, symbols, self.compiler.mesh, too_short, layouts, keep_parts=self.compiler.keep_parts
            )
        return self._plans[key]

    def emit(
        self,
        sizes: dict[sympy.Symbol, int],
        group: Group,
        parameters: Parameters | None,
        arriving: Mapping[int, Placement] | None = None,
    ) -> tuple[Emitter, Program]:
        """Return the program of one rank and what emitted it. Only sequences that give every rank a part are cut."""
        ranks = group.size
        symbols = frozenset(s for s in self.captured.symbols if sizes.get(s, 0) >= ranks) if ranks > 1 else frozenset()
        too_short: frozenset[Span] = frozenset()
        while True:
            enter = parameters.enter if parameters else None
            emitter = Emitter(self.plan(symbols, too_short, arriving), sizes, group, enter, self.attention)
            try:
                return emitter, emitter.emit()
            except ShardTooShortError as error:
                if error.span in too_short:  # the batch's own sequence, which inputs are cut along whatever rules say
                    symbols = frozenset()
                too_short |= {error.span}

    def _compile(self, sizes: dict[sympy.Symbol, int], inputs: Sequence[Any]) -> Callable[..., Any]:
        compiler, start = self.compiler, time.perf_counter()
        before = compiler.memory.decisions.get(compiler.kind) if compiler.memory is not None else None
        saved = compiler.saved if before is None and compiler.saved and compiler.saved.step == compiler.kind else None
        if saved is not None:
            before = saved.decision
        if before is not None and before.tiled:
            self.tile(TILE_ROWS)
        while True:
            emitter, program = self.emit(sizes, compiler.group, compiler.parameters, self.arriving(inputs))
            entry = StepReport.of(compiler.kind, emitter, program, self.captured.symbols)
            if compiler.strict:
                entry.refuse_fallbacks()
            tensors = self._tensors(program.inputs, inputs)
            if saved is not None and not self._is_planned(saved, program, tensors, sizes):
                saved, before = None, None
            try:
                run = self._compile_program(program, tensors, entry, before)
                break
            except DoesNotFitError:
                self.tile(TILE_ROWS)
        ran = Ran(entry, functools.cache(functools.partial(self._model_flops, sizes, _Surroundings.of(program.inputs, tensors))))
        entry.compile_s = time.perf_counter() - start
        compiler.report.add(entry)
        returned = _returned(emitter)
        entry.crossings = [one.crossing for one in returned if one.crossing is not None]

        def call(*inputs: Any) -> Any:
            compiler.report.last.setdefault(compiler.kind, []).append(ran)
            with self._stream(program, inputs):
                outputs = list(run(*self._tensors(program.inputs, inputs)))
            for one in returned:
                outputs[one.index] = one.hand_on(outputs[one.index], compiler.group)
            return outputs

        return call

    def _stream(self, program: Program, inputs: Sequence[Any]) -> AbstractContextManager[None]:
        return _rank_stream(self.compiler.rank_seed, inputs) if program.rank_streams else contextlib.nullcontext()

    def _model_flops(self, sizes: dict[sympy.Symbol, int], surroundings: _Surroundings) -> float:
        """Count the operations of the program of one device, of which nothing is run."""
        emitter, program = self.emit(sizes, Group("one", 1, 0), None)
        counted = 0.0

        def count(gm: fx.GraphModule) -> NoReturn:
            nonlocal counted
            counted = model_flops(cost(node) for node in _compat.without_duplicates(gm.graph).nodes)
            raise _CountedError

        def count_joint(gm: fx.GraphModule, joint_inputs: Sequence[Any], **options: Any) -> NoReturn:
            count(gm)

        with FakeTensorMode(allow_non_fake_inputs=True), surroundings.again(), contextlib.suppress(_CountedError):
            inputs = []
            for index in program.inputs:
                node = self.captured.placeholders[index]
                value = node.meta["val"]
                shape = [emitter.integer(size) for size in emitter.facts.shape(node)]
                trained = index in surroundings.trained
                inputs.append(torch.empty(shape, dtype=value.dtype, device=value.device, requires_grad=trained))
            compile_module(program.module, inputs, "aot_eager", count, count_joint)
        return counted

    def facts(self, program: Program, inputs: Sequence[Tensor], sizes: Mapping[sympy.Symbol, int]) -> ProgramFacts:
        """Return what tells a program from others."""
        length = max((size for symbol, size in sizes.items() if symbol in self.captured.symbols), default=0)
        return ProgramFacts.of(program.module.graph, inputs, length)

    def _is_planned(self, saved: SavedPlan, program: Program, inputs: Sequence[Tensor], sizes: Mapping[sympy.Symbol, int]) -> bool:
        """Return, on all ranks alike, whether this is the program that was planned: of uneven parts, the first rank's is.

        Raises:
            SavedPlanError: If it is not, and is the first of the step.
        """
        found = "the step is cut in pieces here, as the report says"
        if not self.compiler.pieces:
            found = saved.program.differences(self.facts(program, inputs, sizes))
        assert self.compiler.memory is not None
        found = self.compiler.memory.agree(found)
        if not self.compiler.compared:
            saved.refuse(found)
        self.compiler.compared.add(saved.step)
        return not found

    def _compile_program(
        self, program: Program, tensors: Sequence[Tensor], entry: StepReport, decided: Decision | None
    ) -> Callable[..., Any]:
        compiler = self.compiler
        if compiler.memory is None:
            return compiler.compile(program.module, tensors, entry.count_collectives)
        partition = Partitioner.of(
            compiler.memory,
            tensors,
            [i for i, value in enumerate(tensors) if self._is_parameter(program, i, value)],
            decided,
            may_retry=not self.is_tiled and compiler.memory.policy == "auto" and decided is None,
            length=entry.length,
        )

        def on_graph(gm: fx.GraphModule) -> None:
            entry.count_collectives(gm)
            partition.see(gm)

        run = compiler.compile(program.module, tensors, on_graph, partition)
        if compiler.memory.one_decision and partition.decided is not None:
            compiler.memory.decisions.setdefault(compiler.kind, partition.decided._replace(tiled=self.is_tiled))
        entry.memory = partition.estimate
        return run

    def _is_parameter(self, program: Program, index: int, value: Tensor) -> bool:
        """Whether an input of a program is a parameter; in a piece of a step, whole ones come as any tensor with a gradient."""
        if self.captured.placeholders[program.inputs[index]] in self.captured.parameters:
            return True
        return self.compiler.pieces and value.requires_grad and placement_of(value) is None

    def _tensors(self, wanted: Sequence[int], inputs: Sequence[Any]) -> list[Tensor]:
        parameters = self.compiler.parameters
        tensors = []
        for index in wanted:
            name = self.captured.parameters.get(self.captured.placeholders[index])
            value = inputs[index] if name is None or parameters is None else parameters.held(name)
            tensors.append(value.for_piece() if isinstance(value, PartTensor) else value)
        return tensors


def _find_symbols(captured: Captured) -> dict[sympy.Symbol, tuple[int, int | None, int, int]]:
    """Return for every symbol `(input, dim, factor, constant)`: a size of an input, or the input itself, that is affine in it."""
    where: dict[sympy.Symbol, tuple[int, int | None, int, int]] = {}
    for index, node in enumerate(captured.placeholders):
        value = node.meta["val"]
        sizes: dict[int | None, sympy.Expr] = {}
        if isinstance(value, Tensor):
            sizes.update(enumerate(captured.shape(value)))
        elif isinstance(value, torch.SymInt):
            sizes[None] = captured.expr(value)
        for dim, expr in sizes.items():
            for symbol in expr.free_symbols - where.keys():
                factor = expr.coeff(symbol)
                constant = sympy.expand(expr - factor * symbol)
                if factor.is_Integer and constant.is_Integer:
                    where[symbol] = (index, dim, int(factor), int(constant))
    return where


@dataclass
class _Returned:
    """A tensor that a graph returns, for the case that the step was cut behind it."""

    index: int
    sequence_dims: list[int]
    shape: tuple[int, ...]
    placement: Placement | None
    crossing: Crossing | None
    aliased: bool
    """Whether another input or output of the graph is the same memory."""

    def hand_on(self, value: Tensor, group: Group) -> Tensor:
        if self.placement is not None and self.crossing is not None:
            value = PartTensor.of(value, self.shape, self.placement, group, self.crossing, aliased=self.aliased)
        for dim in self.sequence_dims:  # so that the next piece knows the sequence again
            _compat.mark_dynamic(value, dim)
        return value


def _returned(emitter: Emitter) -> list[_Returned]:
    results: Any = emitter.plan.captured.graph.output_node().args[0]
    facts, found = emitter.facts, []
    returned = [(index, node) for index, node in enumerate(results[0]) if isinstance(node, fx.Node) and _is_tensor(node)]
    seen = {node for _, node in returned} | {node for node in emitter.plan.captured.placeholders if _is_tensor(node)}
    owners = Counter(memory_of(node) for node in seen)
    for index, node in returned:
        shape = tuple(emitter.integer(size) for size in facts.shape(node))
        layout, placement, crossing = emitter.plan.returned[node], None, None
        if layout is not None:
            outer, inner = emitter.integer(layout.outer), emitter.integer(layout.inner)
            placement = Placement(layout.dim, outer, inner, layout.span.begin, layout.span.end)
            crossing = Crossing.of(node, emitter)
        found.append(_Returned(index, facts.sequence_dims(node), shape, placement, crossing, owners[memory_of(node)] > 1))
    return found


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


@contextlib.contextmanager
def _rank_stream(rank_seed: int, inputs: Sequence[Any]) -> Iterator[None]:
    """Draw random numbers from a stream of this rank's own, and leave the common stream one draw further on all ranks."""
    cuda = sorted({value.device.index for value in inputs if isinstance(value, Tensor) and value.device.type == "cuda"})
    base = int(torch.randint(2**62, ()).item())
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed((base + 0x9E3779B97F4A7C15 * (rank_seed + 1)) % 2**63)
        yield
