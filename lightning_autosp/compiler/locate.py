"""Where a value that is no number arises within a step: found by running its program once more, operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lightning_autosp.compiler.emit import Emitter, Program
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.lines import user_line

__all__ = ["Locator", "Place"]


@dataclass(frozen=True)
class Place:
    """Where the first such value of a rank is.

    Attributes:
        order: Of the operator in the step, the same on all ranks.
        operator: Its name and line.
        index: Of the element, in the whole value; this and the following are `None` where they cannot be told.
        sample: Of the element.
        position: Of the sequence.
        bounds: The rank's positions, if it has a part of them.
        is_part: Whether the rank holds a part of the value.
    """

    order: int
    operator: str
    index: tuple[int, ...] | None
    sample: int | None
    position: int | None
    bounds: tuple[int, int] | None
    is_part: bool


class Locator:
    """Runs programs in the place of what was compiled of them, without gradients, and looks at what each operator gives."""

    def __init__(self, *, nan: bool) -> None:
        """Look for NaN, or for infinite values of what the model computes."""
        self._nan = nan
        self.first: Place | None = None
        """Of this rank."""

    def run(self, emitter: Emitter, program: Program, inputs: Sequence[Tensor]) -> list[Any]:
        """Return what a program gives."""
        return list(_Looking(self, emitter, program).run(*(tensor.detach() for tensor in inputs)))

    def look(self, emitter: Emitter, node: fx.Node, form: Layout | None, value: Tensor, order: int) -> None:
        """Look at a value of the captured graph."""
        if self.first is not None or not value.is_floating_point() or (not self._nan and node not in emitter.facts.trained):
            return  # masks are of infinite values, with a right
        found = value.isnan() if self._nan else value.isinf()
        if bool(found.any()):
            index = found.nonzero()[0].tolist()
            self.first = _placed(emitter, node, order, index, form)


class _Looking(fx.Interpreter):
    def __init__(self, locator: Locator, emitter: Emitter, program: Program) -> None:
        super().__init__(program.module)
        self._locator, self._emitter = locator, emitter
        order = {node: number for number, node in enumerate(emitter.plan.captured.graph.nodes)}
        self._of = {emitted: (node, form, order[node]) for emitted, node, form in emitter.computed()}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten.copy_.default:  # of what the step leaves behind, which it has done already
            return None
        value = super().run_node(n)
        if n in self._of and isinstance(value, Tensor):
            node, form, order = self._of[n]
            self._locator.look(self._emitter, node, form, value, order)
        return value


def _placed(emitter: Emitter, node: fx.Node, order: int, index: list[int], form: Layout | None) -> Place:
    facts, operator = emitter.facts, f"{node.target} at {user_line(node)}"
    if form is not None and form.routed:  # rows in the order of their experts
        return Place(order, operator, None, None, None, None, is_part=True)
    layout, bounds = form or facts.layout(node), None
    if form is not None:
        bounds = emitter.bounds(form)[emitter.group.rank]
        inner, whole = emitter.integer(form.inner), emitter.size(form)
        outer, rest = divmod(index[form.dim], (bounds[1] - bounds[0]) * inner)
        index[form.dim] = (outer * whole + bounds[0]) * inner + rest
    if layout is None or layout.routed or not layout.along_sequence:
        return Place(order, operator, tuple(index), None, None, None, is_part=form is not None)
    outer, rest = divmod(index[layout.dim], emitter.size(layout) * emitter.integer(layout.inner))
    begin = layout.span.begin
    return Place(
        order,
        operator,
        tuple(index),
        sample=index[0] if layout.dim > 0 else outer if layout.outer != 1 else None,
        position=rest // emitter.integer(layout.inner) + begin,
        bounds=None if bounds is None else (bounds[0] + begin, bounds[1] + begin),
        is_part=form is not None,
    )
