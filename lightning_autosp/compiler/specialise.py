"""From a captured step to callables: one program per set of sizes, compiled when first met and kept in a bounded cache."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh

from lightning_autosp import _compat
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.backend import CompileBackend, compile_module
from lightning_autosp.compiler.capture import Captured, capture
from lightning_autosp.compiler.demand import make_plan
from lightning_autosp.compiler.emit import Emitter, Program
from lightning_autosp.compiler.layout import ShardTooShortError, Span
from lightning_autosp.compiler.plan import Plan
from lightning_autosp.compiler.regions import join_attention
from lightning_autosp.compiler.report import Report, StepReport
from lightning_autosp.compiler.scalars import NeedsBreakError
from lightning_autosp.compiler.tiling import can_be_tiled

__all__ = ["MAX_PROGRAMS", "Compiler", "LoweredStep", "Parameters"]

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
    """

    mesh: DeviceMesh
    group: Group
    backend: CompileBackend
    report: Report
    kind: str
    parameters: Parameters | None = None
    rank_seed: int = 0
    strict: bool = False

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            captured = capture(gm, self.parameters.names() if self.parameters else {})
        except NeedsBreakError as error:
            if self.parameters is not None:
                raise
            # One piece of a step that is cut already: parameters are whole, so the piece can run as it is.
            self.report.notes.append(f"{self.kind}: a piece runs in full, because {error}")
            return gm.forward
        join_attention(captured, functools.partial(can_be_tiled, captured))
        self.report.num_graphs[self.kind] = self.report.num_graphs.get(self.kind, 0) + 1
        return LoweredStep(captured, self)


class LoweredStep:
    """A captured graph, callable with real inputs."""

    def __init__(self, captured: Captured, compiler: Compiler) -> None:
        self.captured, self.compiler = captured, compiler
        self._plans: dict[tuple[frozenset[sympy.Symbol], frozenset[Span]], Plan] = {}
        self._programs: OrderedDict[tuple[Any, ...], Callable[..., Any]] = OrderedDict()
        self._where = _find_symbols(captured)

    def __call__(self, *inputs: Any) -> Any:
        sizes = self.sizes(inputs)
        # What AOTAutograd makes of a program depends on whether it has to prepare a backward.
        key = (*sizes.items(), torch.is_grad_enabled())
        if key not in self._programs:
            self._programs[key] = self._compile(sizes, inputs)
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(key)
        return self._programs[key](*inputs)

    def sizes(self, inputs: Sequence[Any]) -> dict[sympy.Symbol, int]:
        """Read the value of every symbol off the inputs."""
        return {
            symbol: ((inputs[index] if dim is None else inputs[index].shape[dim]) - constant) // factor
            for symbol, (index, dim, factor, constant) in self._where.items()
        }

    def plan(self, symbols: frozenset[sympy.Symbol], too_short: frozenset[Span] = frozenset()) -> Plan:
        key = (symbols, too_short)
        if key not in self._plans:
            self._plans[key] = make_plan(self.captured, symbols, self.compiler.mesh, too_short)
        return self._plans[key]

    def emit(self, sizes: dict[sympy.Symbol, int], group: Group, parameters: Parameters | None) -> tuple[Emitter, Program]:
        """Return the program of one rank and what emitted it. Only sequences that give every rank a part are cut."""
        ranks = group.size
        symbols = frozenset(s for s in self.captured.symbols if sizes.get(s, 0) >= ranks) if ranks > 1 else frozenset()
        too_short: frozenset[Span] = frozenset()
        while True:
            emitter = Emitter(self.plan(symbols, too_short), sizes, group, parameters.enter if parameters else None)
            try:
                return emitter, emitter.emit()
            except ShardTooShortError as error:
                if error.span in too_short:  # the batch's own sequence, which inputs are cut along whatever rules say
                    symbols = frozenset()
                too_short |= {error.span}

    def _compile(self, sizes: dict[sympy.Symbol, int], inputs: Sequence[Any]) -> Callable[..., Any]:
        compiler, start = self.compiler, time.perf_counter()
        emitter, program = self.emit(sizes, compiler.group, compiler.parameters)
        entry = StepReport.of(compiler.kind, emitter, program, self.captured.symbols)
        if compiler.strict:
            entry.refuse_fallbacks()
        tensors = self._tensors(program.inputs, inputs)
        run = compile_module(program.module, tensors, compiler.backend, entry.count_collectives)
        entry.compile_s = time.perf_counter() - start
        compiler.report.add(entry)
        marks = _sequence_marks(emitter)

        def call(*inputs: Any) -> Any:
            with _rank_stream(compiler.rank_seed, inputs) if program.rank_streams else contextlib.nullcontext():
                outputs = run(*self._tensors(program.inputs, inputs))
            for index, dim in marks:  # should the graph have been cut here, the next one knows the sequence again
                _compat.mark_dynamic(outputs[index], dim)
            return outputs

        return call

    def _tensors(self, wanted: Sequence[int], inputs: Sequence[Any]) -> list[Tensor]:
        parameters = self.compiler.parameters
        tensors = []
        for index in wanted:
            name = self.captured.parameters.get(self.captured.placeholders[index])
            tensors.append(inputs[index] if name is None or parameters is None else parameters.held(name))
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


def _sequence_marks(emitter: Emitter) -> list[tuple[int, int]]:
    results: Any = emitter.plan.captured.graph.output_node().args[0]
    outputs, _ = results
    facts = emitter.facts
    return [
        (index, dim)
        for index, node in enumerate(outputs)
        if isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor)
        for dim in facts.sequence_dims(node)
    ]


@contextlib.contextmanager
def _rank_stream(rank_seed: int, inputs: Sequence[Any]) -> Iterator[None]:
    """Draw random numbers from a stream of this rank's own, and leave the common stream one draw further on all ranks."""
    cuda = sorted({value.device.index for value in inputs if isinstance(value, Tensor) and value.device.type == "cuda"})
    base = int(torch.randint(2**62, ()).item())
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed((base + 0x9E3779B97F4A7C15 * (rank_seed + 1)) % 2**63)
        yield
