"""One capture serves every length; programs are kept in a bounded cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated import mesh_of
from torch import nn

from lightning_autosp import _compat
from lightning_autosp.collectives import Group
from lightning_autosp.compiler import specialise
from lightning_autosp.compiler.layout import Span
from lightning_autosp.compiler.report import Report
from lightning_autosp.compiler.specialise import Compiler
from lightning_autosp.cuts import even_cuts


def run(compiler: Compiler, compiled: Any, module: nn.Module, length: int, batch: int = 2) -> None:
    x = torch.randn(batch, length, 4)
    _compat.mark_dynamic(x, 1)
    torch.testing.assert_close(compiled(x), module(x))


class Keeping(Compiler):
    """Remembers the steps it lowered."""

    def __call__(self, *args: Any) -> Any:
        step = super().__call__(*args)
        self.steps = [*getattr(self, "steps", []), step]
        return step


@pytest.fixture
def compiler() -> Keeping:
    return Keeping(mesh_of(1), Group("", 1, 0), "aot_eager", Report(), "step")


def test_one_capture_and_one_program_a_length(compiler: Compiler) -> None:
    module = nn.Linear(4, 4)
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    for length in (8, 9, 20, 8, 9):
        run(compiler, compiled, module, length)
    assert compiler.report.num_graphs == {"step": 1}
    assert [step.length for step in compiler.report.steps] == [8, 9, 20]


def test_programs_are_bounded(compiler: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specialise, "MAX_PROGRAMS", 2)
    module = nn.Linear(4, 4)
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    for length in (8, 9, 8, 10, 8, 9):
        run(compiler, compiled, module, length)
    assert [step.length for step in compiler.report.steps] == [8, 9, 10, 9]  # 9 was unused for longest when 10 came
    assert len(compiler.steps[0]._programs) == 2


def test_gradients_after_an_evaluation(compiler: Compiler) -> None:
    module = nn.Linear(4, 4)
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    with torch.no_grad():
        run(compiler, compiled, module, 8)
    run(compiler, compiled, module, 8)
    x = torch.randn(2, 8, 4)
    compiled(x).sum().backward()
    assert module.weight.grad is not None


@pytest.mark.parametrize(("length", "ranks"), [(8, 2), (9, 4), (14, 7), (1000, 3)])
def test_every_position_has_one_owner(length: int, ranks: int) -> None:
    cuts = even_cuts(length, ranks)
    sizes = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]
    assert cuts[0] == 0
    assert cuts[-1] == length
    assert max(sizes) - min(sizes) <= 1
    import sympy

    for begin, end in ((0, -1), (-1, 0), (-2, 3)):
        bounds = Span(sympy.Symbol("s"), begin, end).bounds(length + 1, ranks)
        assert bounds[0][0] == 0
        assert bounds[-1][1] == length + 1 + end - begin
        assert all(a[1] == b[0] for a, b in zip(bounds, bounds[1:], strict=False))
