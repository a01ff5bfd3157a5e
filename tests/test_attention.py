"""Attention over a sharded sequence: exact for every head count and mask, and what masks are proven to be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import assert_close, assert_exact, lower
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_autosp.attention import tiles
from lightning_autosp.attention.select import AttentionMethod
from lightning_autosp.attention.ulysses import ulysses_attention, wire_elements
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.report import MASK_LIMIT_BYTES, StrictModeError
from lightning_autosp.compiler.simulate import run_ranks
from lightning_autosp.cuts import even_cuts

WIDTH = 4
Mask = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    """Projections around one attention call; `mask(x)` makes its mask."""

    def __init__(
        self, heads: int = 4, kv_heads: int = 4, mask: Mask | None = None, *, repeat: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.repeat = repeat
        self.heads, self.kv_heads, self.mask, self.options = heads, kv_heads, mask, options
        self.q = nn.Linear(8, heads * WIDTH)
        self.k = nn.Linear(8, kv_heads * WIDTH, bias=False)  # its gradient would be zero but for rounding
        self.v = nn.Linear(8, kv_heads * WIDTH)
        self.double()

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, WIDTH).transpose(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(self.q(x), self.heads), self.split(self.k(x), self.kv_heads), self.split(self.v(x), self.kv_heads)
        mask = self.mask(x) if self.mask else None
        if self.repeat:
            times = self.heads // self.kv_heads
            batch, _, length, _ = k.shape
            k, v = (
                one[:, :, None].expand(batch, self.kv_heads, times, length, WIDTH).reshape(batch, self.heads, length, WIDTH)
                for one in (k, v)
            )
        return self.attend(q, k, v, mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1], **self.options)
        return out.square().mean(), out


def inputs(length: int = 13, batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, length, 8).double(),)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 2), (7, 1), (1, 1), (3, 3)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_every_head_count(heads: int, kv_heads: int, ranks: int, is_causal: bool) -> None:
    net = Attention(heads, kv_heads, is_causal=is_causal)
    report = assert_exact(net, inputs(), net, num_ranks=ranks).report
    assert [call.method for call in report.attention] == ["ulysses"]
    assert not report.in_full


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (8, 4), (6, 2)])
def test_repeated_heads_are_sent_once(heads: int, kv_heads: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped queries as Transformers write them: keys and values repeated before the operator."""
    sent: list[tuple[int, int]] = []
    import lightning_autosp.compiler.rules.attention as module

    original = module.ulysses_attention

    def noting(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        sent.append((key.shape[1], value.shape[1]))
        return original(query, key, value, *rest)

    monkeypatch.setattr(module, "ulysses_attention", noting)
    net = Attention(heads, kv_heads, is_causal=True, repeat=True)
    report = assert_exact(net, inputs(), net, num_ranks=ranks).report
    assert not report.in_full
    assert all(whole.reason == "returned, logged or recorded by the step" for whole in report.gathered)
    assert set(sent) == {(kv_heads, kv_heads)}


class InWindows(Attention):
    """Attention within windows of four positions, as Swin has it."""

    def split(self, x: Tensor, heads: int) -> Tensor:
        windows = x.view(x.shape[0], x.shape[1] // 4, 4, heads, WIDTH).flatten(0, 1)  # those of all samples
        return windows.transpose(1, 2)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "mask",
    [
        None,
        lambda x: torch.arange(64).view(4, 4, 4).sin(),
        lambda x: torch.arange(4).view(1, 4, 1).sin(),
        lambda x: torch.ones(4, 4, dtype=torch.bool).tril(),
    ],
)
def test_windows_attend_on_their_own(mask: Mask | None, ranks: int) -> None:
    net = InWindows(mask=mask)
    report = assert_exact(lambda x: net(x)[0], inputs(32), net, num_ranks=ranks).report
    assert [call.method for call in report.attention] == ["each sample on its own"]
    assert not report.gathered
    assert not report.in_full


@pytest.mark.parametrize("ranks", [2, 3])
def test_windows_with_a_mask_each(ranks: int) -> None:
    net = InWindows(mask=lambda x: torch.arange(x.shape[0] * x.shape[1] * 4).view(-1, 1, 4, 4).sin())
    report = assert_exact(lambda x: net(x)[0], inputs(32), net, num_ranks=ranks).report
    assert not report.gathered
    assert not report.in_full


def test_scale() -> None:
    net = Attention(scale=0.3, is_causal=True)
    assert_exact(net, inputs(), net)


@pytest.mark.parametrize("method", ["ulysses", "gather_kv", "ring"])
def test_dropout_differs_from_head_to_head_and_keeps_its_mean(method: AttentionMethod) -> None:
    class Ones(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.view(1, -1, 4, 2).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, torch.ones_like(q), dropout_p=0.25)

    out = lower(Ones(), (torch.randn(1, 256, 8),), Ones(), backward=False, attention=method).outputs[0][0]
    assert abs(out.mean().item() - 1) < 0.02
    assert not torch.equal(out[:, 0], out[:, 2])


def rows_and_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(x.shape[1], device=x.device)
    return positions[:, None], positions[None, :]


def causal(x: Tensor) -> Tensor:
    row, column = rows_and_columns(x)
    return column <= row


def vmapped(allowed: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    """A mask from a function of two numbers."""
    positions = torch.arange(x.shape[1])
    return torch.vmap(torch.vmap(allowed, (None, 0)), (0, None))(positions, positions)


def packed(x: Tensor) -> Tensor:
    """Hugging Face's packed-sequence check on default positions."""
    positions = torch.arange(x.shape[1])[None].expand(x.shape[0], -1)
    documents = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(x.shape[0])[:, None, None, None]
    row, column = torch.arange(x.shape[1])[None, None, :, None], torch.arange(x.shape[1])[None, None, None, :]
    return (column <= row) & (documents[batch, row] == documents[batch, column])


PROVEN: dict[str, tuple[Mask, str]] = {
    "comparison": (causal, "causal"),
    "tril": (lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), "causal"),
    "negated_triu": (lambda x: ~torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), "causal"),
    "additive_triu": (lambda x: torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1), "causal"),
    "additive_where": (lambda x: torch.where(causal(x), 0.0, torch.finfo(torch.float32).min).to(x.dtype), "causal"),
    "masked_fill": (lambda x: torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype).masked_fill(~causal(x), float("-inf")), "causal"),
    "expanded": (lambda x: causal(x)[None, None].expand(x.shape[0], 1, -1, -1), "causal"),
    "offset": (lambda x: (rows_and_columns(x)[1] - rows_and_columns(x)[0]) < 1, "causal"),
    "and_of_true": (lambda x: causal(x) & (rows_and_columns(x)[0] >= 0), "causal"),
    "packed_positions": (packed, "causal"),
    "vmapped": (lambda x: vmapped(lambda i, j: j <= i, x), "causal"),
    "all_ones": (lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool), "mask nothing"),
    "always_true": (lambda x: rows_and_columns(x)[1] < x.shape[1], "mask nothing"),
}


@pytest.mark.parametrize("name", PROVEN)
def test_mask_is_proven_and_dropped(name: str) -> None:
    make, kind = PROVEN[name]
    net = Attention(mask=make)
    lowered = assert_exact(net, inputs(), net)
    call = lowered.report.attention[0]
    assert f"proven {kind}" in call.mask or f"proven to {kind}" in call.mask
    assert "dropped" in call.mask
    assert call.mask_bytes == 0
    plan = next(iter(lowered.step._plans.values()))
    attention = next(node for node, sharding in plan.shardings.items() if sharding.kind == "attention")
    assert attention.args[3] not in plan.demands, "the mask is still computed"


TILED: dict[str, tuple[Mask, str]] = {
    "window": (
        lambda x: causal(x) & (rows_and_columns(x)[0] - rows_and_columns(x)[1] < 5),
        "proven -row + column + 4 >= 0 and row",
    ),
    "window_longer_than_most": (lambda x: causal(x) & (rows_and_columns(x)[0] - rows_and_columns(x)[1] < 4096), "proven"),
    "window_to_both_sides": (lambda x: (rows_and_columns(x)[0] - rows_and_columns(x)[1]).abs() <= 3, "of the batch's data"),
    "strictly_causal_or_first": (
        lambda x: (rows_and_columns(x)[1] < rows_and_columns(x)[0]) | (rows_and_columns(x)[1] == 0),
        "proven",
    ),
    "anti_causal": (lambda x: rows_and_columns(x)[1] >= rows_and_columns(x)[0], "proven"),
    "chunked": (
        lambda x: causal(x) & (rows_and_columns(x)[0] // 4 == rows_and_columns(x)[1] // 4),
        "documents (segment ids), proven",
    ),
    "prefix": (lambda x: causal(x) | (rows_and_columns(x)[1] < 3), "proven"),
    "documents": (lambda x: causal(x) & same_document(x), "documents (segment ids), proven row - column >= 0"),
    "documents_both_ways": (lambda x: same_document(x), "documents (segment ids)"),
    "other_documents": (lambda x: ~same_document(x), "of the batch's data"),
    "documents_or_first": (lambda x: same_document(x) | (rows_and_columns(x)[1] == 0), "of the batch's data"),
    "documents_of_a_bitmap": (lambda x: ~(looked_up(x, x) != looked_up(x, x, True)) & causal(x), "documents (segment ids), proven"),
    "documents_shifted": (lambda x: shifted(documents(x)), "documents (segment ids)"),
    "documents_narrowed": (lambda x: equal(documents(x).to(torch.int8)), "documents (segment ids)"),
    "documents_in_additive_mask": (
        lambda x: torch.where(same_document(x), 0.0, float("-inf")).to(x.dtype),
        "documents (segment ids)",
    ),
    "additive_documents_and_padding": (
        lambda x: torch.where(same_document(x) & shown(x), 0.0, torch.finfo(torch.float32).min).to(x.dtype),
        "documents (segment ids), proven",
    ),
    "documents_by_positions_in_additive_mask": (
        lambda x: torch.where(same_document(x) & in_order(x), 0.0, torch.finfo(torch.float32).min).to(x.dtype),
        "of the batch's data within documents (segment ids)",
    ),
    "documents_in_no_order": (lambda x: equal((x[:, :, 0] * 2).long()) & causal(x), "documents (segment ids), proven"),
    "documents_of_heads": (
        lambda x: equal(documents(x)[:, None] // torch.arange(1, 5)[:, None], heads=True),
        "documents (segment ids)",
    ),
    "documents_of_columns_backwards": (
        lambda x: documents(x)[:, None, :, None] == documents(x).flip(1)[:, None, None, :],
        "documents (segment ids)",
    ),
    "padding": (lambda x: (x[:, :, 0] > -1)[:, None, None, :] & causal(x) | (row_is_column(x)), "of the batch's data"),
    "padding_and_documents": (
        lambda x: (x[:, :, 0] > -1)[:, None, None, :] & same_document(x),
        "of the batch's data within documents (segment ids)",
    ),
    "padding_without_a_way_out": (lambda x: (x[:, :, 0] > 0.5)[:, None, None, :] & causal(x), "of the batch's data, proven"),
    "left_padding_lowest": (lambda x: torch.where(causal(x) & shown(x), 0.0, torch.finfo(torch.float32).min).to(x.dtype), "proven"),
    "additive_window": (
        lambda x: torch.where(causal(x) & (rows_and_columns(x)[0] - rows_and_columns(x)[1] < 4), 0.0, float("-inf")).to(x.dtype),
        "proven",
    ),
    "additive_bias": (lambda x: torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype) + (rows_and_columns(x)[1] * 0.1), "not proven"),
    "minus_one_thousand": (lambda x: torch.where(causal(x), 0.0, -1000.0).to(x.dtype), "not proven"),
    "alibi": (
        lambda x: -torch.arange(1, 5)[:, None, None].double() * (rows_and_columns(x)[0] - rows_and_columns(x)[1]),
        "not proven",
    ),
    "per_head": (lambda x: rows_and_columns(x)[1] <= rows_and_columns(x)[0] + torch.arange(4)[:, None, None], "proven"),
}


def row_is_column(x: Tensor) -> Tensor:
    row, column = rows_and_columns(x)
    return row == column


def documents(x: Tensor) -> Tensor:
    """The number of the document at every position."""
    return (x[:, :, 0] > 0.7).cumsum(1)


def equal(numbers: Tensor, *, heads: bool = False) -> Tensor:
    numbers = numbers if heads else numbers[:, None]
    return numbers[:, :, :, None] == numbers[:, :, None, :]


def same_document(x: Tensor) -> Tensor:
    return equal(documents(x)) & torch.ones(x.shape[1], 1, dtype=torch.bool)


def in_order(x: Tensor) -> Tensor:
    """Whether a column's position, counted within its document, is at most the row's: as Transformers compares them."""
    number, place = documents(x), torch.arange(x.shape[1])
    first = torch.where(F.pad(number, (1, 0), value=-1)[:, 1:] > number, place, 0).cummax(1)[0]
    position = place - first
    return position[:, None, None, :] <= position[:, None, :, None]


def looked_up(x: Tensor, like: Tensor, columns: bool = False) -> Tensor:
    """The numbers of documents by index, as functions of four indices look them up."""
    batch, position = torch.arange(x.shape[0])[:, None, None, None], torch.arange(x.shape[1])
    return documents(like)[batch, position[None, None, None, :] if columns else position[None, None, :, None]]


def shifted(numbers: Tensor) -> Tensor:
    """Whether a row's number is that of the column before."""
    longer = F.pad(numbers, (1, 0), value=0)
    return longer[:, None, 1:, None] == longer[:, None, None, :-1]


def shown(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[1]) >= 4)[None, None, None, :]


@pytest.fixture(params=[None, 30], ids=["one_tile", "many_tiles"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Tiles of that many elements: a row or two."""
    if request.param is not None:
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", request.param)
    return request.param


@pytest.mark.parametrize("name", TILED)
def test_other_masks_are_computed_in_tiles(name: str, tile: int | None) -> None:
    make, proof = TILED[name]
    net = Attention(mask=make)
    lowered = assert_exact(net, inputs(), net, num_ranks=3)
    call = lowered.report.attention[0]
    assert call.method == "ulysses"
    assert call.mask.startswith(proof)
    assert call.mask.endswith("computed in tiles")
    assert call.mask_bytes == 0
    assert no_pairs(lowered)


@pytest.mark.parametrize("name", ["window", "documents", "padding"])
def test_one_rank_has_tiles_too(name: str, tile: int | None) -> None:
    net = Attention(8, 2, mask=TILED[name][0])
    assert no_pairs(assert_exact(net, inputs(), net, num_ranks=1))


def no_pairs(lowered: Any) -> bool:
    """Whether no value outside of regions has two sequence dimensions."""
    captured = lowered.step.captured
    values = (node.meta.get("val") for node in captured.graph.nodes)
    shapes = [captured.shape(value) for value in values if isinstance(value, Tensor)]
    return not any(sum(bool(size.free_symbols & captured.symbols) for size in shape) > 1 for shape in shapes)


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (6, 2), (7, 1), (3, 3)])
def test_heads_in_tiles(heads: int, kv_heads: int, tile: int | None) -> None:
    net = Attention(heads, kv_heads, mask=lambda x: causal(x) & (x[:, None, :, :1] > x[:, None, None, :, 0] - 3))
    for ranks in (2, 4):
        assert no_pairs(assert_exact(net, inputs(), net, num_ranks=ranks))


def test_columns_that_nothing_attends_to_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 16 * 4)
    net = Attention(mask=TILED["window"][0])
    (x,) = inputs()
    net(x)
    assert_exact(net, (x,), net)
    program = tiles._PROGRAMS[max(tiles._PROGRAMS)]
    assert list(program.tiles()) == [(0, 4, 0, 4), (4, 8, 0, 8), (8, 12, 4, 12), (12, 13, 8, 13)]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("by_index", [True, False])
def test_documents_cost_the_sum_of_their_squares(is_causal: bool, by_index: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with other numbers in another order, and padding of the number zero at the end."""
    lengths = [5, 20, 9, 23, 7]
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 2 * sum(lengths))  # a row of one rank's heads
    pairs = 0

    def compute(program: tiles.TileProgram, tile: tuple[int, int, int, int], values: Any) -> Tensor:
        nonlocal pairs
        pairs += (tile[1] - tile[0]) * (tile[3] - tile[2])
        return original(program, tile, values)

    original = tiles.TileProgram.compute
    monkeypatch.setattr(tiles.TileProgram, "compute", compute)
    net = Attention()

    def step(x: Tensor, numbers: Tensor) -> Tensor:
        same = equal(numbers)
        if by_index:
            batch, row = torch.arange(x.shape[0])[:, None, None, None], torch.arange(x.shape[1])[:, None]
            same = numbers[batch, row] == numbers[batch, row.transpose(0, 1)]
        net.mask = lambda x: same & causal(x) if is_causal else same
        loss = net(x)[0]
        net.mask = None
        return loss

    (x,) = inputs(sum(lengths))
    for names in ([1, 2, 3, 4, 0], [7, 3, 5, -2, 0], [0, 1, 2, 3, 4]):
        numbers = torch.repeat_interleave(torch.tensor(names), torch.tensor(lengths)).expand(2, -1).contiguous()
        pairs = 0
        call = assert_exact(step, (x, numbers), net).report.attention[0]
        assert call.mask.startswith("documents (segment ids)")
        cost = sum(length * (length + 1) // 2 if is_causal else length**2 for length in lengths)
        assert pairs == 2 * 2 * cost  # two ranks, forward and backward


def test_positions_that_count_from_the_end_prove_nothing() -> None:
    def mask(x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        return positions <= positions[positions - 1][:, None]

    net = Attention(mask=mask)
    report = assert_exact(net, inputs(), net).report
    assert report.attention[0].mask.startswith("of the batch's data")


def test_a_mask_of_pairs_that_comes_with_the_batch_is_kept() -> None:
    net = Attention(mask=lambda x: None)
    mask = torch.rand(2, 1, 13, 13) > 0.3

    def step(x: Tensor, mask: Tensor) -> Tensor:
        net.mask = lambda _: mask
        return net(x)[0]

    (x,) = inputs()
    call = assert_exact(step, (x, mask | torch.eye(13, dtype=torch.bool)), net).report.attention[0]
    assert (call.mask, call.mask_bytes, call.mask_proven) == ("of the batch's data, kept whole", 2 * 13 * 13, False)


@pytest.mark.parametrize("heads", [4, 3])
def test_mask_with_heads(heads: int) -> None:
    net = Attention(heads, heads, mask=lambda x: torch.randn(heads, 13, 13, generator=torch.Generator().manual_seed(1)).double())
    net.mask = _fixed(heads)
    assert_exact(net, inputs(), net)


def _fixed(heads: int) -> Mask:
    return lambda x: (torch.arange(heads)[:, None, None] * 0.1 * (x[0, :, :1] - x[0, :, 0][None]).abs()).to(x.dtype)


def test_queries_over_a_fixed_memory_stay_local() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.Parameter(torch.randn(1, 2, 5, 4).double())
            self.q = nn.Linear(8, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).view(x.shape[0], -1, 2, 4).transpose(1, 2)
            memory = self.memory.expand(x.shape[0], -1, -1, -1)
            return F.scaled_dot_product_attention(q, memory, memory).square().sum()

    net = Cross()
    report = assert_exact(net, inputs(), net, num_ranks=3).report
    assert report.attention[0].method == "local queries over fixed keys"


def test_strict_refuses_a_large_unproven_mask() -> None:
    net = Attention(mask=lambda x: (x @ x.transpose(1, 2)).cumsum(1)[:, None] > 0)
    report = lower(net, inputs(), net, backward=False).report
    assert report.attention[0].mask_bytes == 2 * 13 * 13
    report.in_full.clear()
    report.refuse_fallbacks()
    report.attention[0].mask_bytes = MASK_LIMIT_BYTES + 1
    with pytest.raises(StrictModeError, match=r"mask at .*test_attention.py:\d+ is 64 MiB"):
        report.refuse_fallbacks()


def test_strict_refuses_an_operator_in_full() -> None:
    net = nn.Linear(8, 8).double()
    report = lower(lambda x: net(x).mean((0, 2)).logcumsumexp(0).mean(), inputs(), net).report
    with pytest.raises(StrictModeError, match=r"aten.logcumsumexp.default at .*test_attention.py:\d+"):
        report.refuse_fallbacks()


@pytest.mark.parametrize("name", [None, "window", "chunked", "documents", "padding"])
def test_cross_shard_probe(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing one token changes exactly the outputs it changes on one device."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 30)
    net = Attention(is_causal=True) if name is None else Attention(mask=TILED[name][0])
    (x,) = inputs()
    for position in (0, 4, 5, 12):
        changed = x.clone()
        changed[:, position, 1:] += 1  # the first feature says where documents begin and what is padding
        one = (net(x)[1] - net(changed)[1]).abs().amax((0, 1, 3)) > 1e-12
        before = lower(net, (x,), net, num_ranks=3, backward=False).outputs[0][1]
        after = lower(net, (changed,), net, num_ranks=3, backward=False).outputs[0][1]
        assert torch.equal((before - after).abs().amax((0, 1, 3)) > 1e-12, one)
        assert one.any()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks"), [(4, 2, 2), (6, 3, 2), (5, 5, 2), (7, 1, 4), (6, 2, 4), (2, 1, 4), (12, 4, 3), (32, 8, 8)]
)
def test_function_alone_and_its_wire_bytes(heads: int, kv_heads: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    length = 4 * ranks + 1
    q, k, v = torch.randn(2, heads, length, 4), torch.randn(2, kv_heads, length, 4), torch.randn(2, kv_heads, length, 3)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
    cuts = even_cuts(length, ranks)
    lengths = tuple(b - a for a, b in zip(cuts, cuts[1:], strict=False))
    sent = dict.fromkeys(range(ranks), 0)
    calls = 0
    import lightning_autosp.attention.ulysses as module

    original = module.all_to_all

    def counting(x: Tensor, output: Any, splits: Any, group: Group) -> Tensor:
        nonlocal calls
        calls += 1
        sent[group.rank] += sum(n for r, n in enumerate(splits) if r != group.rank)
        return original(x, output, splits, group)

    monkeypatch.setattr(module, "all_to_all", counting)

    def work(rank: int) -> Tensor:
        part = slice(cuts[rank], cuts[rank + 1])
        group = Group("", ranks, rank)
        return ulysses_attention(q[:, :, part], k[:, :, part], v[:, :, part], None, 0.0, True, None, lengths, lengths, group)

    got = torch.cat(run_ranks(ranks, work), dim=2)
    assert_close(got, want, 1e-6, "output")
    assert calls == 2 * ranks
    assert sent == {rank: wire_elements(2, heads, kv_heads, lengths, 4, 3, rank) for rank in range(ranks)}


def test_grouped_heads_are_sent_once() -> None:
    once, repeated = (wire_elements(1, 32, kv_heads, (64,) * 8, 128, 128, 0) for kv_heads in (8, 32))
    assert once <= 0.63 * repeated
