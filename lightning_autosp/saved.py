"""Plans on disk: what was decided for a program, and what tells that program from any other."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lightning_autosp.attention.tiles import Handle, program_of
from lightning_autosp.collectives import Group
from lightning_autosp.memory.partition import Decision, SavedPlanError

__all__ = ["ProgramFacts", "SavedPlan", "SavedPlanError", "torch_release"]


def torch_release() -> str:
    """Return torch's version without what it was built for: plans are made on other machines than those that train."""
    return str(torch.__version__).partition("+")[0]


@dataclass(frozen=True)
class ProgramFacts:
    """What tells the program of a step's first rank from others: nothing that depends on where it was made.

    Attributes:
        length: Positions of the longest sequence.
        inputs: Types and shapes of what it takes, parameters as the rank holds them.
        autocast: What autocast computes in; "" if there is none.
        operators: How often it runs each.
        structure: A digest of its operators in order, and of their arguments.
    """

    length: int
    inputs: tuple[str, ...]
    autocast: str
    operators: Mapping[str, int]
    structure: str

    @classmethod
    def of(cls, graph: fx.Graph, inputs: Sequence[Tensor], length: int) -> ProgramFacts:
        """Describe a lowered program in the context that it runs in (before AOTAutograd, whose operators depend on the device)."""
        counts: Counter[str] = Counter(_name(node.target) for node in graph.nodes if node.op == "call_function")
        digest = hashlib.sha256("\n".join(_lines(graph)).encode()).hexdigest()
        found = {str(torch.get_autocast_dtype(kind)) for kind in _devices(inputs) if torch.is_autocast_enabled(kind)}
        return cls(length, tuple(map(_described, inputs)), " ".join(sorted(found)), dict(sorted(counts.items())), digest)

    def differences(self, other: ProgramFacts) -> str:
        """Return in words what is different in another program; "" if nothing is."""
        if self.length != other.length:
            return f"it is for sequences of {self.length} positions, and these have {other.length}"
        if self.inputs != other.inputs:
            pairs = zip(self.inputs, other.inputs, strict=False)
            first = next((pair for pair in pairs if pair[0] != pair[1]), None)
            if first is None:
                return f"its program takes {len(self.inputs)} inputs, and this one {len(other.inputs)}"
            return f"its program takes {first[0]} where this one takes {first[1]} (the batch, parameters or precision)"
        if self.autocast != other.autocast:
            return f"it is for {self.autocast or 'no'} autocast, and here is {other.autocast or 'none'} (precision)"
        names = dict.fromkeys((*self.operators, *other.operators))
        counts = [(name, self.operators.get(name, 0), other.operators.get(name, 0)) for name in names]
        found = [f"{one} x {name} where this one has {two}" for name, one, two in counts if one != two]
        if found:
            return f"its program has {', '.join(found[:3])}"
        return "" if self.structure == other.structure else "operators of its program have other arguments or another order"


def _lines(graph: fx.Graph) -> Iterator[str]:
    """Describe operators and their arguments, leaving out what is other in another process or on another device."""
    place = {node: index for index, node in enumerate(graph.nodes)}

    def plain(value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"%{place[value]}"
        if isinstance(value, Group):
            return f"group {value.size} {value.rank}"
        if isinstance(value, Handle):
            program = program_of(value)
            rows = f"{program.num_rows} {program.num_columns} {program.tile_rows} {program.random}"
            return f"tiles {rows} {program.cuts} {program.results} ({'; '.join(_lines(program.module.graph))})"
        if isinstance(value, (bool, int, float, str, torch.dtype, torch.layout, torch.memory_format)):
            return repr(value)
        return type(value).__name__

    for node in graph.nodes:
        leaves = pytree.tree_leaves((node.args, node.kwargs), is_leaf=lambda value: value is None or isinstance(value, Group))
        name = _name(node.target) if node.op == "call_function" else ""
        yield f"{node.op} {name} {' '.join(map(plain, leaves))}"


def _name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", type(target).__name__)


def _devices(inputs: Sequence[Tensor]) -> list[str]:
    return list(dict.fromkeys(value.device.type for value in inputs))


def _described(value: Tensor) -> str:
    gradient = " with gradient" if value.requires_grad else ""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{gradient}"


@dataclass(frozen=True)
class SavedPlan:
    """A decision for one program.

    Attributes:
        module: The class of the module.
        step: The method.
        torch: The version it was planned with.
        world: Ranks that share each sequence.
        sharded: Whether they share parameters too.
        program: The program of the first of them.
        decision: What is kept for backward.
        path: Where the plan is from, for messages.
    """

    module: str
    step: str
    torch: str
    world: int
    sharded: bool
    program: ProgramFacts
    decision: Decision
    path: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, from which `from_dict` makes the same plan."""
        found = {name: value for name, value in asdict(self).items() if name != "path"}
        return {**found, "decision": self.decision._asdict()}

    @classmethod
    def load(cls, path: str | Path) -> SavedPlan:
        """Read what `Plan.save` wrote.

        Raises:
            SavedPlanError: If it is not there or is something else.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise SavedPlanError(f"plan={str(path)!r} cannot be read: {error}. {_MAKE_ONE}") from error
        try:
            found = dict(data["saved"])
            program = {**found.pop("program")}
            program["inputs"] = tuple(program["inputs"])
            decided = found.pop("decision").items()
            fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in decided}
            return cls(**found, program=ProgramFacts(**program), decision=Decision(**fields), path=str(path))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise SavedPlanError(f"plan={str(path)!r} holds no plan of this version of lightning-autosp. {_MAKE_ONE}") from error

    def refuse_run(self, module: str, world: int, num_ranks: int, *, sharded: bool) -> None:
        """Raise if the plan is not for this module on these ranks.

        Args:
            module: The class of the module.
            world: Ranks that share each sequence.
            num_ranks: All ranks.
            sharded: Whether parameters are sharded over all of them.
        """
        here = torch_release()
        layout = {True: "sharded", False: "replicated"}
        found = ""
        if module != self.module:
            found = f"it is for {self.module}, and this is {module}"
        elif here != self.torch:
            found = f"it was made with torch {self.torch}, and this is {here}"
        elif world != self.world:
            found = f"it is for {self.world} rank(s) that share each sequence, and here are {world}"
        elif self.world > 1 and sharded != self.sharded:
            found = f"it is for {layout[self.sharded]} parameters, and here they are {layout[sharded]}"
        elif sharded and num_ranks != self.world:
            found = f"it is for parameters sharded over {self.world} rank(s), and here they are sharded over {num_ranks}"
        self.refuse(found)

    def refuse(self, difference: str) -> None:
        """Raise if there is a difference, in words.

        Raises:
            SavedPlanError: Then.
        """
        if difference:
            raise SavedPlanError(f"plan={self.path!r} is not for this step: {difference}. {_MAKE_ONE} Without it, leave plan away.")


_MAKE_ONE = "Make one with `autosp plan ... --save FILE` or AutoSPStrategy.plan(...).save(FILE)."
