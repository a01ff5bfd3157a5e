"""What was decided about a captured step, for the emitter to carry out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from lightning_autosp.compiler.capture import Captured
from lightning_autosp.compiler.layout import Layout
from lightning_autosp.compiler.rule import Facts, Sharding

__all__ = ["Form", "Plan"]

Form = Layout | None
"""`None`: whole, every rank holds all of a value. A `Layout`: part, this rank's positions."""


@dataclass
class Plan:
    """What to emit for every node of a captured step."""

    facts: Facts
    shardings: dict[fx.Node, Sharding]
    """Nodes that are computed from parts."""
    demands: dict[fx.Node, dict[Form, list[fx.Node]]]
    """Forms of each node that are asked for, with who asks; nodes that are absent are dead."""
    returned: dict[fx.Node, Form]
    """The form in which each output is returned."""
    rank_streams: bool
    """Whether each rank draws random numbers of its own while the graph runs."""
    whole: dict[fx.Node, Callable[[Any, fx.Node], fx.Node]]
    """Nodes whose whole value is computed in another way than by calling their operator, with what emits them."""

    @property
    def captured(self) -> Captured:
        return self.facts.captured
