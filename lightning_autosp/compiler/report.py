"""What the compiler did, for people and for tests."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from lightning_autosp.attention import operators
from lightning_autosp.attention.flash import is_kept
from lightning_autosp.compiler.regions import Region, RowRegion
from lightning_autosp.compiler.rule import bound
from lightning_autosp.compiler.written_out import SDPA
from lightning_autosp.lines import frames, source, user_line
from lightning_autosp.memory.costs import cost

if TYPE_CHECKING:
    from lightning_autosp.compiler.capture import Captured
    from lightning_autosp.compiler.emit import Emitter, Program
    from lightning_autosp.compiler.rule import Sharding
    from lightning_autosp.memory.estimate import MemoryEstimate

__all__ = [
    "MASK_LIMIT_BYTES",
    "Crossing",
    "GraphBreak",
    "Report",
    "StepReport",
    "StrictModeError",
    "print_rows",
    "role",
]

MiB = 2**20
MASK_LIMIT_BYTES = 64 * MiB
"""The largest unproven attention mask that `strict=True` lets pass."""


class StrictModeError(RuntimeError):
    """`strict=True` and something would run unsharded."""


@dataclass
class Whole:
    """A value that was gathered, or an operator that ran in full."""

    name: str
    where: str
    source: str
    bytes: int
    reason: str


@dataclass
class Attention:
    where: str
    method: str
    mask: str
    """What the mask was proven to be and what became of it; empty if the call has none."""
    mask_bytes: int
    """Size of a mask that is kept whole; 0 if there is none."""
    mask_proven: bool
    sent: int = 0
    """Bytes that the busiest rank sends in forward and backward, as the choice of the method has it; 0 if there was none."""
    flops: float = 0.0
    """Of the busiest rank, likewise."""
    peak: int = 0
    """Bytes that a rank holds at once, likewise."""
    kernel: str = ""
    """What runs on a rank; empty if that is not known."""
    chosen: str = ""
    """What the method was estimated to take, and what others would, or why they cannot."""


@dataclass
class Tiled:
    """Values that exist only of a few positions at a time: logits, or the inside of an MLP."""

    where: str
    results: list[str]
    """What is computed of them."""
    bytes: int
    """Of the largest such value, whole."""
    num_tiles: int
    """How many a rank computes; 1 if it is small enough to be computed at once, and kept."""


@dataclass
class Crossing:
    """A value of the model that leaves a compiled piece as parts, for what comes behind a graph break."""

    name: str
    where: str
    bytes: int
    """Of the whole."""
    gathers: list[str] = field(default_factory=list)
    """What Python did that made it whole, each place once; empty if it stayed a part."""

    @classmethod
    def of(cls, node: fx.Node, emitter: Emitter) -> Crossing:
        return cls(_name(node), user_line(node), _bytes(node, emitter))

    def add_gather(self, reader: str) -> None:
        if reader not in self.gathers:
            self.gathers.append(reader)


@dataclass
class GraphBreak:
    where: str
    reason: str


@dataclass
class StepReport:
    """One program: a step kind at one set of sizes.

    Attributes:
        kind: `training_step`, `validation_step`, ...
        length: Positions of the sequence; 0 if no dimension of the batch stayed symbolic.
        sizes: The value of every symbol.
        num_local: Operators that run on this rank's part.
        num_reductions: Operators that run on the part and then join the parts: reductions and losses.
        num_data: Operators on data that met no parameter; every rank runs them whole.
        gathered: Values of the model that were made whole by a collective.
        in_full: Operators of the model that every rank runs on the whole sequence, for want of a rule.
        crossings: Values that leave a piece of a step that is cut as parts.
        attention: Every attention call.
        tiled: What is computed in tiles beside attention.
        kept: Logits that are held whole, and what wants them so.
        collectives: `name -> (count, bytes)` a rank and step, forward and backward, as far as they have been compiled.
        memory: What it is predicted to take; `None` if memory is not planned.
        compile_s: Seconds from the captured graph to a callable forward.
    """

    kind: str
    length: int
    sizes: dict[str, int]
    num_ranks: int
    num_local: int = 0
    num_reductions: int = 0
    num_data: int = 0
    gathered: list[Whole] = field(default_factory=list)
    in_full: list[Whole] = field(default_factory=list)
    crossings: list[Crossing] = field(default_factory=list)
    attention: list[Attention] = field(default_factory=list)
    tiled: list[Tiled] = field(default_factory=list)
    kept: list[Whole] = field(default_factory=list)
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)
    memory: MemoryEstimate | None = None
    compile_s: float = 0.0

    @classmethod
    def of(cls, kind: str, emitter: Emitter, program: Program, symbols: Iterable[sympy.Symbol]) -> StepReport:
        """Read a program's report off what was planned and emitted."""
        plan, facts = emitter.plan, emitter.facts
        lengths = [int(emitter.sizes[s]) for s in symbols if s in emitter.sizes]
        entry = cls(
            kind,
            max(lengths, default=0),
            {str(symbol): int(size) for symbol, size in emitter.sizes.items()},
            emitter.group.size,
        )
        for node in facts.captured.graph.nodes:
            found = role(node, emitter)
            if found == "attention":
                entry.attention.append(_attention(node, plan.shardings[node], emitter))
            elif found == "in full" and emitter.group.size > 1 and isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
                entry.in_full.append(_whole(node, emitter, "no rule keeps it sharded"))
            entry.num_local += found == "sharded"
            entry.num_reductions += found == "joined"
            entry.num_data += found == "on data"
        entry.tiled = [_tiled(node, emitter) for node in emitter.tile_programs]
        for node, reader in facts.captured.kept.items():
            entry.kept.append(_whole(node, emitter, _why_kept(reader)))
        for node, askers in program.gathers:
            entry.gathered.append(_whole(node, emitter, _reason(askers)))
        if emitter.group.size > 1 and not facts.symbols:
            entry.in_full.insert(0, _unsharded(facts.captured, lengths, emitter.group.size))
        return entry

    def count_collectives(self, gm: fx.GraphModule) -> None:
        """Add the collectives of a compiled forward or backward graph."""
        for node in gm.graph.nodes:
            target = node.target
            if target in operators.KERNELS:
                name, size = f"within {target._schema.name.split('::')[1]}", int(cost(node).sent)
                count, total = self.collectives.get(name, (0, 0))
                self.collectives[name] = (count + 1, total + size)
            if node.op != "call_function" or getattr(target, "namespace", "") != "_c10d_functional":
                continue
            name = target._schema.name.split("::")[1]
            if name == "wait_tensor":
                continue
            sent = node.args[0].meta.get("val")
            size = sent.numel() * sent.element_size() if isinstance(sent, torch.Tensor) else 0
            count, total = self.collectives.get(name, (0, 0))
            self.collectives[name] = (count + 1, total + size)

    def refuse_fallbacks(self) -> None:
        """Raise for anything that runs in full.

        Raises:
            StrictModeError: Naming the first such line and how many there are.
        """
        if self.in_full:
            first = self.in_full[0]
            raise StrictModeError(
                f"strict=True: {self.kind} at length {self.length} computes {len(self.in_full)} operator(s) in full. The first is "
                f"{first.name} at {first.where} ({first.source!r}): {first.reason}. Rewrite the line, or use strict=False."
            )
        for call in self.attention:
            if call.mask_bytes > MASK_LIMIT_BYTES and not call.mask_proven:
                raise StrictModeError(
                    f"strict=True: the attention mask at {call.where} is {call.mask_bytes / MiB:.0f} MiB on every rank and is "
                    f"{call.mask}. Build it from positions (torch.arange), pass is_causal=True, or use strict=False."
                )


def role(node: fx.Node, emitter: Emitter) -> str:
    """Return what becomes of an operator of a captured step.

    "sharded": it runs on this rank's part. "joined": so it does, and the parts are then joined (reductions, losses). "attention".
    "on data": every rank computes it of data that met no parameter. "in full": every rank computes it of the whole sequence. "":
    it has nothing to do with a sequence, or nobody needs it.
    """
    plan, facts = emitter.plan, emitter.facts
    if node.op != "call_function" or node not in plan.demands:
        return ""
    sharding = plan.shardings.get(node)
    if sharding is not None:
        kinds = {"local": "sharded", "exchange": "sharded", "attention": "attention"}
        return kinds.get(sharding.kind, "joined")
    sources = node.all_input_nodes
    if any(facts.has_sequence(source) and source in facts.trained for source in sources):
        return "in full"
    return "on data" if facts.has_sequence(node) or any(map(facts.has_sequence, sources)) else ""


def _unsharded(captured: Captured, lengths: list[int], num_ranks: int) -> Whole:
    where, source, reason = "<batch>", "", "the code fixes the sequence length, so no dimension could be followed"
    if lengths:
        reason = f"length {max(lengths)} leaves some of {num_ranks} ranks without a position"
    elif captured.fixed and captured.fixed[0].place:
        source, _, rest = captured.fixed[0].place.rpartition("  # ")
        where = _located(rest.partition(" in ")[0], captured.graph)
        reason = f"the code fixes the sequence length there (to {captured.fixed[0].size}), so no dimension could be followed"
    return Whole("the whole step", where, source.strip(), 0, reason)


def _located(place: str, graph: fx.Graph) -> str:
    """Return the user's line that led to an innermost `file:line` (the start of its path missing); that line if no operator did."""
    end, _, line = place.rpartition(":")
    files: dict[str, None] = {}
    for node in graph.nodes:
        found = frames(node)
        if found and found[-1][0].endswith(end) and found[-1][1] == int(line):
            return user_line(node)
        files.update((file, None) for file, _ in found if file.endswith(end))
    return f"{next(iter(files), end)}:{line}"


def _attention(node: fx.Node, sharding: Sharding, emitter: Emitter) -> Attention:
    target, said = node.target, sharding.mask
    if isinstance(target, Region):
        kept = [source for source in node.all_input_nodes if len(emitter.facts.sequence_dims(source)) > 1]
        said = "" if target.proof is None else f"{target.proof.text}, " + ("kept whole" if kept else "computed in tiles")
        proven = not kept or (target.proof is not None and target.proof.kind != "unknown")
    else:
        mask = bound(node)["attn_mask"] if node.target is SDPA else None
        kept, proven = [mask] if isinstance(mask, fx.Node) else [], False
        said = said or ("kept" if kept else "")
    call = Attention(user_line(node), sharding.note, said, sum(_bytes(one, emitter) for one in kept), proven)
    choice = emitter.attention_choices.get(node)
    if choice is not None:
        best, others, call.kernel = choice.chosen, choice.others, choice.kernel
        call.method, call.sent, call.flops, call.peak = best.name, best.sent, best.flops, best.peak
        call.chosen = "; ".join(str(offer) for offer in (best, *others))
    return call


def _tiled(node: fx.Node, emitter: Emitter) -> Tiled:
    target = node.target
    assert isinstance(target, RowRegion)
    largest = max(_bytes(one, emitter) for one in target.body.nodes if one.op == "call_function")
    results = [str(_computed_by(one).target) for one in target.exits]
    return Tiled(user_line(node), results, largest, emitter.tile_programs[node].num_tiles)


def _computed_by(node: fx.Node) -> fx.Node:
    while node.target in (operator.getitem, torch.ops.aten.detach.default):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _bytes(node: fx.Node, emitter: Emitter) -> int:
    total = 0
    for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, torch.Tensor):
            size = value.element_size()
            for dim in emitter.facts.captured.shape(value):
                size *= emitter.integer(dim)
            total += size
    return total


def _whole(node: fx.Node, emitter: Emitter, reason: str) -> Whole:
    where = user_line(node)
    return Whole(_name(node), where, source(where), _bytes(node, emitter), reason)


def _reason(askers: list[fx.Node]) -> str:
    if all(asker.op == "output" for asker in askers):
        return "returned, logged or recorded by the step"
    asker = next(asker for asker in askers if asker.op != "output")
    return f"wanted whole by {_name(asker)} at {user_line(asker)}"


def _name(node: fx.Node) -> str:
    """Return how the report calls a node's operator."""
    return node.target.__name__ if is_kept(node.target) else str(node.target)  # type: ignore[union-attr]


@dataclass(frozen=True)
class Ran:
    """A program that ran.

    Attributes:
        report: Of it.
        model_flops: Counts the floating-point operations of its products and attentions on one device, forward and, if it has
            one, backward, each once.
    """

    report: StepReport
    model_flops: Callable[[], float]


class Report:
    """What was compiled so far. `str()` and `to_dict()` give it as text and as plain data."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.num_graphs: dict[str, int] = {}
        """Graphs captured for each step kind: 1, plus one for every break and for every change of the code's guards."""
        self.breaks: list[GraphBreak] = []
        self.notes: list[str] = []
        self.last: dict[str, list[Ran]] = {}
        """For each step kind the programs that ran when it last did: one, or the pieces of a step that is cut."""

    def add(self, step: StepReport) -> None:
        self.steps.append(step)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, strings and numbers."""
        return {
            "steps": [asdict(step) for step in self.steps],
            "num_graphs": dict(self.num_graphs),
            "graph_breaks": [asdict(one) for one in self.breaks],
            "notes": list(self.notes),
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return `(heading, text)` pairs, in the order they are printed."""
        rows: list[tuple[str, str]] = []
        for step in self.steps:
            rows.append(
                (
                    f"{step.kind}, length {step.length}",
                    f"{step.num_local} operators sharded over {step.num_ranks} ranks, {step.num_reductions} joined, "
                    f"{step.num_data} on data, {len(step.gathered)} gathered, {len(step.in_full)} in full; "
                    f"lowered in {step.compile_s:.2f} s",
                )
            )
            for count, call in _grouped(_describe(call) for call in step.attention):
                rows.append(("  attention", f"{count} x {call}"))
            for count, offers in _grouped(call.chosen for call in step.attention if call.chosen):
                rows.append(("  estimated", f"{count} x {offers}"))
            for count, text in _grouped(_describe_tiled(one) for one in step.tiled):
                rows.append(("  in tiles", f"{count} x {text}"))
            for whole in step.kept:
                rows.append(("  logits are kept", f"{whole.name} at {whole.where}, {whole.bytes / MiB:.2f} MiB: {whole.reason}"))
            for name, (count, size) in step.collectives.items():
                rows.append(("  collective", f"{count} x {name}, {size / MiB:.2f} MiB a rank"))
            if step.memory is not None:
                rows.extend((f"  {heading}", text) for heading, text in step.memory.rows())
            for whole in step.gathered:
                rows.append(("  gathered", f"{whole.name} at {whole.where}, {whole.bytes / MiB:.2f} MiB: {whole.reason}"))
            for crossing in step.crossings:
                cost = f"gathered by {', '.join(crossing.gathers)}" if crossing.gathers else "stays a part"
                place = f"{crossing.name} at {crossing.where}, {crossing.bytes / MiB:.2f} MiB"
                rows.append(("  crosses a break", f"{place}: {cost}"))
            for whole in step.in_full:
                rows.append(("  in full", f"{whole.name} at {whole.where}, {whole.bytes / MiB:.2f} MiB: {whole.reason}"))
        rows.extend((kind, f"{number} graph(s) captured") for kind, number in self.num_graphs.items())
        rows.extend(("graph break", f"{one.where}: {one.reason}") for one in self.breaks)
        rows.extend(("note", note) for note in self.notes)
        return rows

    def __str__(self) -> str:
        return "\n".join(f"{heading:<32} {text}" for heading, text in self.rows())

    def print(self) -> None:
        """Print a table: with rich if it is installed, else as plain text."""
        print_rows("lightning-autosp", self.rows())


def print_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print `(heading, text)` pairs: as a table with rich if it is installed, else as plain text."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print("\n".join([title, *(f"{heading:<32} {text}" for heading, text in rows)]))  # noqa: T201
        return
    table = Table("step", "what runs", title=title, show_lines=False, title_justify="left")
    for heading, text in rows:
        table.add_row(heading, text)
    Console(markup=False).print(table)


def _describe(call: Attention) -> str:
    kept = f" ({call.mask_bytes / MiB:.2f} MiB)" if call.mask_bytes else ""
    kernel = f", kernel: {call.kernel}" if call.kernel else ""
    return f"{call.method} at {call.where}{kernel}" + (f", mask: {call.mask}{kept}" if call.mask else "")


def _why_kept(reader: fx.Node) -> str:
    if reader.op == "output":
        return _reason([reader])
    if reader.target is torch.amp.autocast_mode._enter_autocast:
        return f"computed under the autocast that the step enters at {user_line(reader)}; the Trainer's own is no hindrance"
    return f"used by {reader.target} at {user_line(reader)}"


def _describe_tiled(one: Tiled) -> str:
    tiles = f"{one.num_tiles} tiles" if one.num_tiles > 1 else "at once, being small"
    return f"{', '.join(one.results)} at {one.where}, {tiles}, of values of {one.bytes / MiB:.2f} MiB"


def _grouped(texts: Iterable[str]) -> list[tuple[int, str]]:
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
    return [(count, text) for text, count in counts.items()]
