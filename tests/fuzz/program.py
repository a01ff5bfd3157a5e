"""A program: plain data that renders as the Python that is run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

__all__ = [
    "VOCABULARY",
    "Header",
    "IllConditionedError",
    "Instruction",
    "Program",
    "check_on_one_device",
    "execute",
    "render",
    "scope",
]

VOCABULARY = 11
JITTER = 1e-9
"""Relative change of parameters (and of values that are ordered) that shows a program to be ill-conditioned."""
MAX_CHANGE = 1e-5
MIN_NORM = 1e-10
"""Results smaller than this are what rounding left of a cancellation."""

INPUTS: dict[str, str] = {
    "ids": "torch.randint(0, {vocabulary}, ({shape}))",
    "labels": "torch.randint(0, {vocabulary}, ({shape}))",
    "other": "torch.randint(0, {vocabulary}, ({shape}))",
    "features": "torch.randn({shape}, 3).double()",
    "bias": "torch.randn({shape}, {length}).double()",
}
"""What a step can be given: tokens, labels, a second sequence, numbers a token, numbers a pair of tokens."""


@dataclass(frozen=True)
class Header:
    """What a program is run with."""

    length: int = 13
    other_length: int = 9
    batch: int = 2
    num_ranks: int = 2
    sequence_dim: int = 1
    sharded: bool = False
    width: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Instruction:
    """One operator: lines of Python, with `v3` for the third value and `$` for the names of the results.

    `operands` are the values read; `ordered` says that the result depends on how the operands' elements compare.
    """

    operator: str
    operands: tuple[int, ...]
    code: str
    num_results: int = 1
    ordered: bool = False


@dataclass(frozen=True)
class Program:
    """A step and how to run it.

    The values are numbered in the order they are made; `outputs` are the numbers of the values that are returned, the loss first.
    """

    instructions: tuple[Instruction, ...]
    outputs: tuple[int, ...]
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    header: Header

    def prune(self) -> Program:
        """Drop what no output depends on, and number the values anew."""
        first = self.first_results()
        owner = {first[i] + k: i for i, one in enumerate(self.instructions) for k in range(one.num_results)}
        wanted: set[int] = set()
        pending = [owner[value] for value in self.outputs]
        while pending:
            index = pending.pop()
            if index not in wanted:
                wanted.add(index)
                pending.extend(owner[value] for value in self.instructions[index].operands)
        names: dict[int, int] = {}
        kept = []
        for index in sorted(wanted):
            one = self.instructions[index]
            for k in range(one.num_results):
                names[first[index] + k] = len(names)
            code = re.sub(r"\bv(\d+)\b", lambda m: f"v{names[int(m[1])]}", one.code)
            kept.append(replace(one, code=code, operands=tuple(names[v] for v in one.operands)))
        text = "\n".join(one.code for one in kept)
        parameters = tuple((name, shape) for name, shape in self.parameters if re.search(rf"\bnet\.{name}\b", text))
        return replace(self, instructions=tuple(kept), outputs=tuple(names[v] for v in self.outputs), parameters=parameters)

    def simpler(self) -> Iterator[Program]:
        """Go through the programs that lack one thing: an output, a term of the loss, a step between two others."""
        for value in self.outputs[1:]:
            yield replace(self, outputs=tuple(v for v in self.outputs if v != value)).prune()
        first = self.first_results()
        *others, loss = self.instructions
        if loss.operator == "total" and len(loss.operands) == 1:
            yield replace(self, outputs=(loss.operands[0], *self.outputs[1:])).prune()
        elif loss.operator == "total":
            for term in loss.operands:
                terms = tuple(v for v in loss.operands if v != term)
                total = replace(loss, operands=terms, code=" + ".join(f"v{v}" for v in terms))
                yield replace(self, instructions=(*others, total)).prune()
        for index, one in enumerate(others):
            for number, operand in ((first[index] + k, o) for k in range(one.num_results) for o in dict.fromkeys(one.operands)):
                yield self.instead(number, operand).prune()

    def instead(self, number: int, other: int) -> Program:
        """Read one value wherever another is read."""

        def changed(one: Instruction) -> Instruction:
            code = re.sub(rf"\bv{number}\b", f"v{other}", one.code)
            return replace(one, code=code, operands=tuple(other if v == number else v for v in one.operands))

        outputs = (self.outputs[0], *(other if v == number else v for v in self.outputs[1:]))
        return replace(self, instructions=tuple(changed(one) for one in self.instructions), outputs=outputs)

    def first_results(self) -> list[int]:
        """Return the number of every instruction's first result."""
        starts = [0]
        for one in self.instructions:
            starts.append(starts[-1] + one.num_results)
        return starts

    def inputs(self) -> list[str]:
        text = "\n".join(one.code for one in self.instructions)
        return [name for name in INPUTS if re.search(rf"\b{name}\b", text)]

    def setup(self) -> str:
        """Return the lines that make parameters and inputs."""
        h = self.header
        lines = [f"torch.manual_seed({h.seed})", "net = nn.Module()"]
        lines += [f"net.{name} = nn.Parameter(torch.randn({shape}).double() * 0.5)" for name, shape in self.parameters]
        for name in self.inputs():
            length = h.other_length if name == "other" else h.length
            shape = f"{h.batch}, {length}" if h.sequence_dim == 1 else f"{length}, {h.batch}"
            lines.append(f"{name} = {INPUTS[name].format(vocabulary=VOCABULARY, shape=shape, length=length)}")
        return "\n".join(lines)

    def step(self, *, jitter: bool = False) -> str:
        """Return the step; with `jitter`, ordered values and all gradients are changed by a hair."""
        lines = [f"def step({', '.join(self.inputs())}):"]
        for one, first in zip(self.instructions, self.first_results(), strict=False):
            lines += ["    " + line for line in render(one, first, jitter=jitter).split("\n")]
            lines += [f"    jitter_gradient(v{first + k})" for k in range(one.num_results) if jitter]
        lines.append(f"    return {', '.join(f'v{value}' for value in self.outputs)}")
        return "\n".join(lines)

    def source(self) -> str:
        """Return the program as a script that compares one device with simulated ranks."""
        h, names = self.header, self.inputs()
        arguments = f"step, ({', '.join(names)}{',' if len(names) == 1 else ''}), net, num_ranks={h.num_ranks}"
        arguments += f", sequence_dim={h.sequence_dim}" if h.sequence_dim != 1 else ""
        arguments += ", sharded=True" if h.sharded else ""
        text = self.setup() + self.step()
        imports = ["import torch", "from simulated import assert_exact", "from torch import nn"]
        imports += ["from torch.nn import functional as F"] if "F." in text else []
        imports += ["from torch.utils.checkpoint import checkpoint"] if "checkpoint(" in text else []
        return "\n".join([*imports, "", self.setup(), "", "", self.step(), "", "", f"assert_exact({arguments})", ""])


def render(one: Instruction, first: int, *, jitter: bool = False) -> str:
    """Return an instruction's lines, its results numbered from `first`."""
    names = ", ".join(f"v{first + k}" for k in range(one.num_results))
    code = one.code if "$" in one.code else f"$ = {one.code}"
    if jitter and one.ordered:
        code = re.sub(r"\bv(\d+)\b(?!\.shape)", r"jitter(v\1)", code)
    return code.replace("$", names)


def jitter(x: Tensor) -> Tensor:
    """Change every element by a hair, each differently."""
    return x * (1 + JITTER * torch.randn_like(x)) if x.is_floating_point() else x


def jitter_gradient(x: Tensor) -> None:
    """Change every element of the gradient by a hair, so that what cancels shows."""
    if x.requires_grad:
        x.register_hook(lambda gradient: None if gradient is None else jitter(gradient))


def scope() -> dict[str, Any]:
    """Return the names a program may use."""
    return {"torch": torch, "nn": nn, "F": F, "checkpoint": checkpoint, "jitter": jitter, "jitter_gradient": jitter_gradient}


def execute(program: Program, *, jitter: bool = False) -> tuple[Callable[..., Any], list[Tensor], nn.Module]:
    """Return the step, its inputs and its parameters."""
    names = scope()
    exec(compile(program.setup() + "\n\n" + program.step(jitter=jitter), "<program>", "exec"), names)
    return names["step"], [names[name] for name in program.inputs()], names["net"]


class IllConditionedError(ValueError):
    """A comparison in float64 would say nothing: the program fails on one device or enlarges rounding errors."""


def check_on_one_device(program: Program) -> None:
    """Run a program twice, with parameters, ordered values and gradients changed by a hair, and see that results hardly change.

    Raises:
        IllConditionedError: If they do, or are not finite, or the step fails.
    """
    plain = _run(program, perturbed=False)
    for got, want in zip(_run(program, perturbed=True), plain, strict=True):
        if got is None or want is None:
            if got is not want:
                raise IllConditionedError("a gradient comes and goes")
        elif not want.is_floating_point():
            if not torch.equal(got, want):
                raise IllConditionedError("an integer depends on rounding")
        elif not want.isfinite().all():
            raise IllConditionedError("not finite")
        elif want.norm() < MIN_NORM:
            raise IllConditionedError("nothing but rounding")
        elif not (got - want).norm() <= MAX_CHANGE * want.norm():
            raise IllConditionedError("changes more than its inputs do")


def _run(program: Program, *, perturbed: bool) -> Sequence[Tensor | None]:
    try:
        function, inputs, net = execute(program, jitter=perturbed)
        if perturbed:
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.copy_(jitter(parameter))
        outputs = [value for value in pytree.tree_leaves(function(*inputs)) if isinstance(value, Tensor)]
        outputs[0].backward()
    except Exception as error:
        raise IllConditionedError(f"{type(error).__name__}: {error}") from error
    return [value.detach() for value in outputs] + [parameter.grad for parameter in net.parameters()]
