"""What would run on each rank and what it would take: shown before anything is trained, as a table, plain data or a page.

Made of what `plan` finds, on one CPU and without allocating parameters: the graph that was captured, the program of the first of
the ranks, and every operator of its forward and backward with the bytes that are held while it runs.
"""

from __future__ import annotations

import functools
import json
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from lightning_autosp.compiler.emit import Emitter, Program
from lightning_autosp.compiler.regions import RowRegion
from lightning_autosp.compiler.report import Report, StepReport, print_rows, role
from lightning_autosp.lines import user_line
from lightning_autosp.memory.devices import format_bytes
from lightning_autosp.memory.estimate import MemoryEstimate, Moment
from lightning_autosp.page import page_of
from lightning_autosp.plan import Moments, Plan, PlanError, Planner, planner_of

__all__ = ["Collective", "Explanation", "GraphRegion", "explain", "explain_target"]

_BARS = "▁▂▃▄▅▆▇█"
_COLUMNS = 60
"""Characters in which a terminal shows memory over time."""


@dataclass(frozen=True)
class GraphRegion:
    """Neighbouring operators of a captured step of which the same becomes.

    Attributes:
        form: "sharded", "joined", "attention", "on data" or "in full", as `compiler.report.role` has it; or "in tiles".
        num_operators: How many.
        lines: Where they are from, the lines of each file together: `model.py:12-31`.
    """

    form: str
    num_operators: int
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind that one line leads to.

    Attributes:
        operator: Its name; "within ..." for those that an operator of attention makes.
        phase: "forward" or "backward".
        where: The line.
        count: How many.
        bytes: That a rank hands to all of them.
    """

    operator: str
    phase: str
    where: str
    count: int
    bytes: int


@dataclass
class Explanation:
    """What a step does on one rank. `str()`, `to_dict()` and `to_html()` give it as text, plain data and a page.

    Attributes:
        name: Module and step.
        device: What each rank has.
        policy: The checkpoint policy that is shown: the one asked for, else the fastest that fits.
        plan: What every checkpoint policy takes.
        report: What becomes of the step's operators, for the first rank.
        regions: The captured graph, in order.
        moments: The program operator by operator, forward and backward.
        before: The captured graph as text, shapes in the symbols of the sequence.
        after: The program of the first rank as text, forward only: backward is autograd's.
    """

    name: str
    device: str
    policy: str
    plan: Plan
    report: StepReport
    regions: list[GraphRegion]
    moments: list[Moment]
    before: str
    after: str
    collectives: list[Collective] = field(init=False)

    def __post_init__(self) -> None:
        self.collectives = _collectives(self.moments)

    @property
    def estimate(self) -> MemoryEstimate:
        """What the policy shown takes."""
        return self.plan.estimates[self.policy]

    @property
    def fits(self) -> bool:
        """Whether that is within the limits."""
        return self.estimate.fits

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers."""
        return {
            "name": self.name,
            "length": self.plan.length,
            "world": self.plan.world,
            "device": self.device,
            "limit_bytes": self.plan.limit,
            "host_limit_bytes": self.plan.host_limit,
            "policy": self.policy,
            "fits": self.fits,
            "regions": [asdict(one) for one in self.regions],
            "collectives": [asdict(one) for one in self.collectives],
            "attention": [asdict(one) for one in self.report.attention],
            "report": {key: value for key, value in asdict(self.report).items() if key not in ("attention", "memory")},
            "policies": {name: one.to_dict() for name, one in self.plan.estimates.items()},
            "memory": [
                {
                    "operator": one.operator,
                    "where": one.where,
                    "phase": one.phase,
                    "again": one.again,
                    "bytes": {name: size for name, size in one.categories.items() if size},
                }
                for one in self.moments
            ],
            "graph": {"before": self.before, "after": self.after},
        }

    def to_html(self) -> str:
        """Return one page that needs nothing beside it."""
        return page_of(self.to_dict())

    def rows(self) -> list[tuple[str, str]]:
        """Return `(heading, text)` pairs, in the order they are printed."""
        report = Report()
        report.add(self.report)
        rows = [("explain", f"{self.name}, {self.plan.world} rank(s) of {self.device}"), *report.rows()]
        for count, one in _runs(self.regions):
            rows.append(("  region", f"{count} x {one.form}, {_operators(one.num_operators)} at {', '.join(one.lines)}"))
        for each in self.collectives:
            rows.append((f"  {each.phase}", f"{each.count} x {each.operator} at {each.where}, {format_bytes(each.bytes)}"))
        rows.append(("  memory over time", _sparkline(self.moments)))
        for name, estimate in self.plan.estimates.items():
            again = estimate.flops_again / estimate.flops if estimate.flops else 0.0
            shown = " (shown)" if name == self.policy else ""
            fits = "" if estimate.fits else ", does not fit"
            text = f"{format_bytes(estimate.peak)}{fits}, {format_bytes(estimate.saved)} kept, {again:.1%} of FLOPs again"
            rows.append((f"  policy {name}", f"{text}, {estimate.step_seconds:.3g} s a step{shown}"))
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{heading:<32} {text}" for heading, text in self.rows())

    def print(self) -> None:
        """Print a table: with rich if it is installed, else as plain text."""
        print_rows("lightning-autosp", self.rows())

    def save(self, *, json_path: str | Path | None = None, html_path: str | Path | None = None) -> None:
        """Write plain data as JSON, the page, or both."""
        if json_path is not None:
            Path(json_path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        if html_path is not None:
            Path(html_path).write_text(self.to_html())


def explain(planner: Planner, length: int | None = None) -> Explanation:
    """Show what a planner finds.

    Args:
        planner: Of the step, the ranks and the device. Without a `policy`, the fastest that fits is shown, or what takes least.
        length: Positions of the longest sequence. Default: the batch's own.

    Raises:
        PlanError: If the length cannot be planned, or there is no such policy for the step.
    """
    start, moments = time.perf_counter(), Moments()
    plan = planner.fitting(length, moments)
    shown = planner.policy or plan.best[0]
    if shown not in plan.estimates:
        raise PlanError(f"checkpoint policy {shown!r} is not known of this step. There is: {', '.join(plan.estimates)}.")
    emitter, program = planner.emit(plan.length)
    report = StepReport.of(planner.step, emitter, program, planner.lowered.captured.symbols)
    names = {node.name: name for node, name in planner.lowered.captured.parameters.items()}
    explanation = Explanation(
        name=f"{type(planner.module).__name__}.{planner.step}",
        device=planner.device.name,
        policy=shown,
        plan=plan,
        report=report,
        regions=list(_regions(emitter)),
        moments=moments[shown](),
        before=_text(planner.lowered.captured.graph, functools.partial(_captured_shape, emitter), names),
        after=_text(_with_values(planner, emitter, program), _shape, names),
    )
    for one in explanation.collectives:
        count, size = report.collectives.get(one.operator, (0, 0))
        report.collectives[one.operator] = (count + one.count, size + one.bytes)
    report.memory = explanation.estimate
    report.compile_s = time.perf_counter() - start
    return explanation


def explain_target(target: str, *, length: int | None = None, **options: Any) -> Explanation:
    """Show a module that is named.

    Args:
        target: A module or a LightningCLI configuration.
        length: Positions of the longest sequence. Default: the batch's own.
        options: As of `plan.planner_of`.

    Raises:
        PlanError: If the step cannot be planned.
        TargetError: If something named does not exist.
        ValueError: If the device, its memory, the number of ranks or the length is not known.
    """
    return explain(planner_of(target, **options), length)


# Parts of it.


def _regions(emitter: Emitter) -> Iterator[GraphRegion]:
    form, nodes = "", list[fx.Node]()
    for node in emitter.plan.captured.graph.nodes:
        found = role(node, emitter)
        if found and isinstance(node.target, RowRegion):
            found = "in tiles"
        if not found:
            continue
        if found != form and nodes:
            yield GraphRegion(form, len(nodes), _lines(nodes))
            nodes = []
        form = found
        nodes.append(node)
    if nodes:
        yield GraphRegion(form, len(nodes), _lines(nodes))


def _lines(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    found: dict[str, list[int]] = {}
    for node in nodes:
        file, _, line = user_line(node).rpartition(":")
        found.setdefault(file, []).append(int(line))
    return tuple(f"{file}:{min(lines)}" + (f"-{max(lines)}" if max(lines) > min(lines) else "") for file, lines in found.items())


def _collectives(moments: Iterable[Moment]) -> list[Collective]:
    found: dict[tuple[str, str, str], tuple[int, int]] = {}
    for one in moments:
        name = _short(one.operator)
        if one.is_collective and name != "wait_tensor":
            if one.operator.startswith("autosp."):
                name = f"within {name}"
            count, size = found.get((name, one.phase, one.where), (0, 0))
            found[name, one.phase, one.where] = (count + 1, size + int(one.cost.sent))
    return [Collective(*key, count, size) for key, (count, size) in found.items()]


def _short(name: str) -> str:
    """Return an operator's name without its namespace and overload."""
    return name.split(".")[1] if name.count(".") == 2 else name


def _runs(regions: Sequence[GraphRegion]) -> list[tuple[int, GraphRegion]]:
    """Count regions that are alike: those of repeated layers."""
    counts: dict[GraphRegion, int] = {}
    for one in regions:
        counts[one] = counts.get(one, 0) + 1
    return [(count, one) for one, count in counts.items()]


def _operators(number: int) -> str:
    return f"{number} operator{'s' if number > 1 else ''}"


def _sparkline(moments: Sequence[Moment]) -> str:
    """Draw the memory of a step in characters, the most of each stretch, from the least to the most."""
    if not moments:
        return ""
    sizes = [one.bytes for one in moments]
    stretch = -(-len(sizes) // _COLUMNS)
    least, most = min(sizes), max(sizes)
    drawn = "".join(
        _BARS[(max(sizes[start : start + stretch]) - least) * (len(_BARS) - 1) // max(most - least, 1)]
        for start in range(0, len(sizes), stretch)
    )
    behind = sum(one.phase == "forward" for one in moments) // stretch
    return f"{drawn[:behind]}|{drawn[behind:]} forward|backward, from {format_bytes(least)} to {format_bytes(most)}"


# Graphs as text.

_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    kind = name.rstrip("0123456789")
    return _DTYPES.get(kind, kind) + name[len(kind) :]


def _captured_shape(emitter: Emitter, node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return str(emitter.facts.expr(node))
    if not isinstance(value, Tensor):
        return ""
    return f"{_dtype(value.dtype)}[{', '.join(map(str, emitter.facts.shape(node)))}]"


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"{_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]" if isinstance(value, Tensor) else ""


def _text(graph: fx.Graph, shape: Callable[[fx.Node], str], parameters: Mapping[str, str]) -> str:
    """Return a graph with one operator a line: its name, what it gives, and its arguments; parameters by their names."""
    width = max((len(node.name) for node in graph.nodes if node.op != "output"), default=0)
    lines = []
    for node in graph.nodes:
        arguments = [*map(_argument, node.args), *(f"{name}={_argument(value)}" for name, value in node.kwargs.items())]
        given = shape(node)
        if node.op == "output":
            lines.append(f"return {', '.join(arguments)}")
            continue
        line = f"{node.name:<{width}}" + (f" : {given}" if given else "")
        if node.op == "call_function":
            line += f" = {_target(node.target)}({', '.join(arguments)})"
        elif node.name in parameters:
            line += f"  # {parameters[node.name]}"
        lines.append(line)
    return "\n".join(lines)


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    return "getitem" if target is operator.getitem else getattr(target, "__name__", None) or str(target)


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if type(value) in (list, tuple):
        return f"[{', '.join(map(_argument, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_argument(one)}' for key, one in value.items())}}}"
    if isinstance(value, tuple):  # a group of ranks
        return type(value).__name__.lower()
    return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _with_values(planner: Planner, emitter: Emitter, program: Program) -> fx.Graph:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, planner.computing():
        FakeTensorProp(program.module, mode).propagate_dont_convert_inputs(*planner.inputs(emitter, program)[0])
    return program.module.graph
