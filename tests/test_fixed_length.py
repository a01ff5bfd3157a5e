"""Modules that work with one sequence length, that of a table of positions: sharded none the less."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from lightning.pytorch import LightningModule
from simulated import assert_step_exact
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from lightning_autosp import CheckResult, _compat, check
from lightning_autosp.compiler import specialise
from lightning_autosp.compiler.layout import as_expr
from lightning_autosp.compiler.sizes import equal_sizes
from lightning_autosp.memory.devices import device_kind
from lightning_autosp.plan import PlanError, Planner

LENGTH = 13


class Positions(LightningModule):
    """Patches, given or cut from images, with positions from a table, attention, and a class from the mean."""

    def __init__(
        self, add: Callable[[Any, Tensor], Tensor], positions: nn.Parameter | Tensor, heads: tuple[int, int] = (2, -1)
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        width = positions.shape[-1]
        self.add, self.heads = add, heads
        if isinstance(positions, nn.Parameter):
            self.pos = positions
        else:
            self.register_buffer("pos", positions)
        self.embed, self.patches = nn.Linear(3, width), nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, 5)

    def training_step(self, batch: Tensor, batch_idx: int = 0) -> Tensor:
        x = self.patches(batch).flatten(2).transpose(1, 2) if batch.ndim == 4 else self.embed(batch)
        x = self.add(self, x)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, *self.heads)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x.mean(1)).square().mean()


def whole(module: Any, x: Tensor) -> Tensor:
    return x + module.pos


def sliced(module: Any, x: Tensor) -> Tensor:
    return x + module.pos[:, : x.shape[1]]


def after_a_token(module: Any, x: Tensor) -> Tensor:
    return torch.cat([module.token.expand(x.shape[0], -1, -1), x], 1) + module.pos


def resized(module: Any, x: Tensor) -> Tensor:
    if x.shape[1] == module.pos.shape[1]:
        return x + module.pos
    return x + F.interpolate(module.pos.transpose(1, 2), size=x.shape[1], mode="linear").transpose(1, 2)


def compared(module: Any, x: Tensor) -> Tensor:
    if x.shape[1] != LENGTH:
        raise ValueError(f"length {x.shape[1]}")
    return x + module.pos


def as_configured(module: Any, x: Tensor) -> Tensor:
    height, width = module.size
    if x.shape[1] != module.length or x.shape[1] != height:
        raise ValueError(f"length {x.shape[1]}")
    return x + module.pos[:, : module.length] + torch.arange(module.length)[:, None] * width


def table(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every graph that was captured."""
    found: list[Any] = []
    monkeypatch.setattr(specialise, "capture", lambda *args: found.append(capture(*args)) or found[-1])
    return found


capture = specialise.capture


def assert_sharded(result: CheckResult) -> None:
    """Equal to one device, and nothing of it gathered or in full."""
    assert result.ok, str(result)
    (step,) = result.report.steps
    assert len(step.attention) == 1
    assert step.in_full == []
    assert step.gathered == []
    assert result.report.num_graphs == {"training_step": 1}


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize(
    ("add", "positions"),
    [
        (whole, table(1, LENGTH, 8)),
        (whole, table(LENGTH, 8)),
        (whole, table(LENGTH, 8).detach()),
        (after_a_token, table(1, LENGTH + 1, 8)),
        (resized, table(1, LENGTH, 8)),
    ],
    ids=["samples", "rows", "buffer", "token", "resized"],
)
def test_positions_added_whole(add: Any, positions: Any, num_ranks: int, captures: list[Any]) -> None:
    module = Positions(add, positions)
    config = torch._dynamo.config.get_config_copy()
    result = check(module, torch.randn(2, LENGTH, 3), num_ranks=num_ranks)
    assert_sharded(result)
    assert len(captures) == 2
    compared = {one.name for one in result.comparisons}
    assert ("gradient of pos" if isinstance(positions, nn.Parameter) else "buffer pos") in compared
    assert torch._dynamo.config.get_config_copy() == config
    assert all(_compat.dynamic_dims(tensor) == set() for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("length", [LENGTH, LENGTH - 2])
def test_positions_that_are_sliced_need_no_second_capture(length: int, captures: list[Any]) -> None:
    assert_sharded(check(Positions(sliced, table(1, LENGTH, 8)), torch.randn(2, length, 3)))
    assert len(captures) == 1


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 8)])
def test_patches_of_images(height: int, width: int) -> None:
    """No size of the batch is fixed, but their product is."""
    images = torch.randn(2, 3, height, width)
    assert_sharded(check(Positions(whole, table(1, height * width // 16, 8)), images, sequence_dim=2))


def test_positions_of_chunks() -> None:
    """The sequence as the batch has it is a multiple of that with the table."""

    def of_chunks(module: Any, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 4)).mean(2) + module.pos

    assert_sharded(check(Positions(of_chunks, table(1, 6, 8)), torch.randn(2, 24, 3)))


def test_chunks_of_positions() -> None:
    def chunks(module: Any, x: Tensor) -> Tensor:
        return (x + module.pos).unflatten(1, (-1, 4)).cumsum(2).flatten(1, 2)

    # the product for queries, keys and values happens to be as wide as the sequence is long
    assert_sharded(check(Positions(chunks, table(1, 24, 8)), torch.randn(2, 24, 3)))


@pytest.mark.parametrize("heads", [(3, -1), (-1, 4)])
def test_a_width_that_is_the_length(heads: tuple[int, int]) -> None:
    assert_sharded(check(Positions(whole, table(1, 12, 12), heads), torch.randn(2, 12, 3), num_ranks=3))


class SameEverywhere(Positions):
    """Width, vocabulary, heads and classes: all as many as positions, and tokens are looked up."""

    def __init__(self) -> None:
        super().__init__(whole, table(4, 4))
        self.tokens, self.head = nn.Embedding(4, 4), nn.Linear(4, 4)

    def training_step(self, batch: Tensor, batch_idx: int = 0) -> Tensor:
        x = self.add(self, self.tokens(batch))
        q, k, v = (t.unflatten(-1, (-1, 1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return F.cross_entropy(self.head(x).flatten(0, 1), batch.flatten())


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_size_is_the_length(num_ranks: int) -> None:
    result = check(SameEverywhere(), torch.randint(4, (3, 4)), num_ranks=num_ranks)
    assert result.ok, str(result)


def test_modules_of_different_widths_in_one_process() -> None:
    for width in (8, 12, 6):
        assert_sharded(check(Positions(whole, table(1, LENGTH, width)), torch.randn(2, LENGTH, 3)))


@pytest.mark.skipif(not _compat.DYNAMO_IGNORES_MODES, reason="this torch compiles nothing under a dispatch mode")
def test_a_later_batch_fixes_the_length() -> None:
    """And the next one does not."""
    module = Positions(resized, table(1, LENGTH, 8)).double()
    lengths = (9, LENGTH, 11, LENGTH)
    report = assert_step_exact(module, [torch.randn(2, length, 3, dtype=torch.float64) for length in lengths])
    assert report.breaks == []
    assert [step.in_full for step in report.steps] == [[], [], []]
    assert [len(step.attention) for step in report.steps] == [1, 1, 1]


def test_a_length_that_python_compares_is_named() -> None:
    result = check(Positions(compared, table(1, LENGTH, 8)), torch.randn(2, LENGTH, 3))
    assert result.ok, str(result)
    (whole_step,) = result.report.steps[0].in_full
    assert whole_step.where.startswith(f"{__file__}:")
    assert whole_step.source == "if x.shape[1] != LENGTH:"
    assert f"the code fixes the sequence length there (to {LENGTH})" in whole_step.reason


def as_a_product(module: Any, x: Tensor) -> Tensor:
    if x.shape[1] != module.config.length * 2:
        raise ValueError(f"length {x.shape[1]}")
    return x.unflatten(1, (-1, 2)).mean(2) + module.pos


def test_a_length_that_is_compared_with_a_product(captures: list[Any]) -> None:
    """As Whisper's encoder compares its frames with what its configuration says and its strides."""
    module = Positions(as_a_product, table(1, LENGTH, 8))
    module.config = SimpleNamespace(length=LENGTH, width=8)
    assert_sharded(check(module, torch.randn(2, 2 * LENGTH, 3)))
    assert len(captures) == 2
    assert vars(module.config) == {"length": LENGTH, "width": 8}


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_length_that_is_compared_with_a_number_of_the_module(num_ranks: int, captures: list[Any]) -> None:
    module = Positions(as_configured, table(1, LENGTH + 2, 8))
    module.length, module.size = LENGTH, (LENGTH, 8)
    assert_sharded(check(module, torch.randn(2, LENGTH, 3), num_ranks=num_ranks))
    assert len(captures) == 2
    assert type(module.length) is int
    assert [type(one) for one in module.size] == [int, int]
    planner = Planner(module, torch.randn(2, LENGTH, 3), world=2, device=device_kind("h100"))
    assert planner.at(LENGTH).estimates["full"].peak > 0
    with pytest.raises(PlanError, match="length 26 cannot be planned"):
        planner.at(2 * LENGTH)


def test_a_number_of_the_module_that_the_step_changes_stays_changed() -> None:
    def counting(module: Any, x: Tensor) -> Tensor:
        module.calls += 1
        return as_configured(module, x)

    module = Positions(counting, table(1, LENGTH + 2, 8)).double()
    module.length, module.size, module.calls, module.seen = LENGTH, (LENGTH, 8), LENGTH, None
    module.register_forward_hook(lambda *_: None)
    report = assert_step_exact(module, [torch.randn(2, LENGTH, 3, dtype=torch.float64)] * 2)
    assert [step.in_full for step in report.steps][0] == []


def test_sizes_that_hold_for_other_lengths_need_no_second_capture(captures: list[Any]) -> None:
    """Windows of two positions: `-1` stands for a number that no length changes."""

    def windows(module: Any, x: Tensor) -> Tensor:
        parts = x.view(x.shape[0], x.shape[1] // 2, 2, -1).reshape(-1, 2, x.shape[-1])
        return parts.view(-1, x.shape[1] // 2, 2, x.shape[-1]).reshape(x.shape[0], x.shape[1], -1)

    assert_sharded(check(Positions(windows, table(2, 8)), torch.randn(2, 12, 3)))
    assert len(captures) == 1


def test_a_length_that_a_constant_fixes_is_named_with_the_users_line() -> None:
    offsets = torch.randn(LENGTH, 8)
    result = check(Positions(lambda module, x: x + offsets, table(1, LENGTH + 1, 8)), torch.randn(2, LENGTH, 3))
    assert result.ok, str(result)
    (whole_step,) = result.report.steps[0].in_full
    assert whole_step.where.startswith(f"{__file__}:")
    assert "x + offsets" in whole_step.source


def test_only_that_length_is_planned() -> None:
    planner = Planner(Positions(whole, table(1, LENGTH, 8)), torch.randn(2, LENGTH, 3), world=2, device=device_kind("h100"))
    assert planner.at(LENGTH).estimates["full"].peak > 0
    with pytest.raises(PlanError, match=rf"tensors of as many positions as the batch \({LENGTH}\).* length 26 cannot be planned"):
        planner.at(2 * LENGTH)


def test_what_code_found_of_the_lengths_it_runs_for() -> None:
    s = sympy.Symbol("s", integer=True, positive=True)

    def known(found: sympy.Expr, *sizes: sympy.Expr) -> list[sympy.Expr]:
        equal = equal_sizes([found], {}, set(), {s}, sizes)
        return [as_expr(size, equal) for size in sizes]

    four_blocks = sympy.Eq(FloorDiv(s + 7, 8), 4)  # 25 to 32 positions
    assert known(four_blocks, Min(16, s) - 8, Min(32, s) - 24, Max(25, s)) == [8, s - 24, s]
    assert known(four_blocks, Max(26, s), Min(31, s)) == [Max(26, s), Min(31, s)]
    padding = Mod(64 - Mod(s, 64), 64)
    assert known(sympy.Eq(s + padding, 64), s + padding, padding) == [64, 64 - s]
    # Rows of patches are a sequence, whatever their product with the columns is compared with.
    rows = FloorDiv(s, 4)
    assert known(sympy.Eq(3 * rows, 15), 3 * rows, rows + 1) == [3 * rows, rows + 1]
