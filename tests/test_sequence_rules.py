"""Operators that mix positions of the sequence: they stay sharded, are exact on any number of ranks, and refuse the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import assert_step_exact, lower
from test_rules import B, D, Net, V, check, ids_of
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_autosp.compiler.layout import Layout

SPANS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "whole": lambda n, x: x,
    "first_dropped": lambda n, x: x[:, 1:],
    "last_dropped": lambda n, x: x[:, :-1],
    "prepended": lambda n, x: torch.cat([n.token.expand(B, 2, D), x], 1),
}
"""What a sequence may be before it comes to an operator."""

RUNS = [(2, "last_dropped", 14), (3, "first_dropped", 13), (4, "prepended", 17)]
"""Ranks, what became of the sequence before, and its length."""


def check_sharded(
    function: Callable[[Net, Tensor], Tensor], ranks: int, span: str, length: int, *, gathers: bool = False, **parts: nn.Module
) -> None:
    """Check that a function `(B, s, D) -> (B, positions, ...)`, weighted by position, is exact and that nothing is made whole."""

    def body(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        y = function(net, SPANS[span](net, x)).flatten(2)
        return (y * (torch.arange(y.shape[1]).unsqueeze(-1) * 0.1 + 1)).square().mean()

    report = check(body, length, num_ranks=ranks, parts=parts).report
    assert not report.in_full, report.in_full
    assert gathers or not report.gathered, report.gathered


WINDOWS: dict[str, Callable[[], nn.Module]] = {
    "centred": lambda: nn.Conv1d(D, 6, 3, padding=1),
    "no_padding": lambda: nn.Conv1d(D, 6, 4),
    "dilated": lambda: nn.Conv1d(D, 6, 3, padding=2, dilation=2),
    "depthwise": lambda: nn.Conv1d(D, D, 4, padding=3, groups=D),
    "same_even": lambda: nn.Conv1d(D, 6, 4, padding="same"),
    "valid": lambda: nn.Conv1d(D, 6, 2, padding="valid", bias=False),
    "longer_than_a_part": lambda: nn.Conv1d(D, 6, 9, padding=8),
    "strided": lambda: nn.Conv1d(D, 6, 3, padding=1, stride=2),
    "patches": lambda: nn.Conv1d(D, 6, 2, stride=2),
    "stride_beyond_kernel": lambda: nn.Conv1d(D, 6, 2, padding=1, stride=3),
    "causal_by_cut": lambda: Causal(),
    "transposed": lambda: nn.ConvTranspose1d(D, 6, 3),
    "transposed_strided": lambda: nn.ConvTranspose1d(D, 6, 4, stride=2, padding=1),
    "transposed_with_gaps": lambda: nn.ConvTranspose1d(D, 6, 2, stride=3, output_padding=1),
    "transposed_dilated": lambda: nn.ConvTranspose1d(D, 6, 3, stride=2, padding=2, output_padding=1, dilation=2),
    "average_pool": lambda: nn.AvgPool1d(3, stride=1, padding=1),
    "average_pool_strided": lambda: nn.AvgPool1d(3),
    "average_pool_real_positions": lambda: nn.AvgPool1d(4, stride=2, count_include_pad=False),
    "max_pool_of_rows": lambda: nn.MaxPool1d(3, 2, 1),
    "max_pool_of_rows_rounded_up": lambda: nn.MaxPool1d(2, ceil_mode=True),
    "max_pool": lambda: nn.MaxPool2d((1, 3), stride=1, padding=(0, 1)),
    "max_pool_strided": lambda: nn.MaxPool2d(3, stride=2, padding=1),
    "max_pool_dilated": lambda: nn.MaxPool2d((1, 3), stride=1, dilation=2),
    "images": lambda: nn.Conv2d(B, 3, 3, padding=1, stride=(2, 1)),
    "images_same": lambda: nn.Conv2d(B, 3, (3, 4), padding="same"),
    "mean_of_all": lambda: nn.AdaptiveAvgPool1d(1),
    "windows": lambda: Sliding(),
    "columns": lambda: Columns(),
}


class Causal(nn.Module):
    """As state-space models write it: padded on both sides, then cut to the length."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(D, D, 4, padding=3, groups=D)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.inner(x)[..., : x.shape[-1]]) * x


class Columns(nn.Module):
    """ConvBERT's windows of an image one pixel wide."""

    def forward(self, x: Tensor) -> Tensor:
        windows = F.unfold(x.unsqueeze(-1), (5, 1), padding=(1, 0), stride=(2, 1), dilation=(1, 1))
        return (windows.unflatten(1, (D, 5)) * torch.arange(1, 6).view(5, 1)).sum(2)


class Sliding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.unfold(-1, 4, 2) * torch.arange(1, 5)).sum(-1)


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize(("ranks", "span", "length"), RUNS)
def test_windows_fetch_their_halo(name: str, ranks: int, span: str, length: int) -> None:
    check_sharded(lambda n, x: n.part(x.transpose(1, 2)).transpose(1, 2), ranks, span, length, part=WINDOWS[name]())


@pytest.mark.parametrize("name", ["centred", "longer_than_a_part"])
def test_windows_see_what_one_device_sees(name: str) -> None:
    """Cross-shard probe: one token on either side of a cut changes the same outputs as on one device."""
    net = Net(lambda n, x, i: (x.sum(), n.part(x.transpose(1, 2)).transpose(1, 2)), part=WINDOWS[name]())
    check_probe(net, length=14, tokens=(6, 7))


def check_probe(net: Net, length: int, tokens: tuple[int, ...]) -> None:
    """Change tokens one by one and compare which positions of the second output change, on two ranks and on one device."""
    ids = ids_of(length)
    for token in tokens:
        other = ids.clone()
        other[:, token] = (other[:, token] + 1) % V
        before, behind = (lower(net, (one,), net, backward=False).outputs[1][1] for one in (ids, other))
        changed = (before != behind).any(-1).any(0)
        assert torch.equal(changed, (net(ids)[1] != net(other)[1]).any(-1).any(0))
        assert changed.any()
        assert not changed.all()


POSITIONS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "roll": lambda n, x: x.roll(1, 1) * x,
    "first_by_number": lambda n, x: n.head(x.flip(1).index_select(1, torch.arange(x.shape[1] - 2))),
    "roll_back_and_features": lambda n, x: x.roll((-3, 2), (1, 2)) * x,
    "roll_by_half": lambda n, x: x.roll(x.shape[1] // 2, 1) * x,
    "flip": lambda n, x: n.head(x.flip(1)) * n.head(x),
    "flip_both": lambda n, x: x.flip(1, 2),
    "every_second": lambda n, x: n.head(x[:, ::2]),
    "every_third_but_ends": lambda n, x: x[:, 1:-1:3].tanh(),
    "half": lambda n, x: x[:, : x.shape[1] // 2].square(),
    "second_half": lambda n, x: x[:, x.shape[1] // 2 :] * 2,
    "more_than_a_part_dropped": lambda n, x: x[:, 8:].square(),
    "middle_position": lambda n, x: x * x[:, x.shape[1] // 2].unsqueeze(1),
    "third_from_the_end": lambda n, x: x * x[:, -3].unsqueeze(1),
    "two_from_the_middle": lambda n, x: x * x[:, x.shape[1] // 3 : x.shape[1] // 3 + 2].sum(1, keepdim=True),
    "narrow": lambda n, x: x.narrow(1, 2, 3).sum(1, keepdim=True) * x,
    "chunk": lambda n, x: x.chunk(3, 1)[0].exp() + x.chunk(3, 1)[1],
    "split": lambda n, x: torch.mul(*x.split([3, x.shape[1] - 3], 1)[::-1][:1], n.head(x[:, 3:])[..., :D]),
    "split_fixed_piece": lambda n, x: x * x.split([2, x.shape[1] - 2], 1)[0].sum(1, keepdim=True),
    "two_sequences": lambda n, x: n.head(torch.cat([x, n.token.expand(B, 3, D), x.sin()[:, 2:]], 1)),
    "one_twice": lambda n, x: torch.cat([x, x], 1).cos(),
    "interleaved": lambda n, x: torch.stack([x, x.square()], 2).flatten(1, 2)[:, 1:],
    "repeat": lambda n, x: n.head(x.repeat(1, 2, 1)),
    "tile": lambda n, x: x.tile(2, 2).sin(),
    "repeat_interleave": lambda n, x: n.head(x.repeat_interleave(3, 1)),
    "repeat_interleave_then_cut": lambda n, x: x.repeat_interleave(2, 1)[:, 3:-2].flip(1),
    "reflected": lambda n, x: F.pad(x.transpose(1, 2), (3, 2), mode="reflect").transpose(1, 2),
    "replicated": lambda n, x: F.pad(x.transpose(1, 2), (3, 1), mode="replicate").transpose(1, 2),
    "wrapped": lambda n, x: F.pad(x.transpose(1, 2), (1, 4), mode="circular").transpose(1, 2),
    "wrapped_in_two_dimensions": lambda n, x: F.pad(x.transpose(1, 2), (2, 1, 3, 0), mode="circular").transpose(1, 2),
    "padded_to_a_multiple": lambda n, x: F.pad(x, (0, 0, 0, -x.shape[1] % 4), value=2.0),
    "padded_by_whole_parts": lambda n, x: F.pad(x, (0, 0, -x.shape[1] % 16, -x.shape[1] % 64)) + 1,
    "padded_by_more_than_a_part": lambda n, x: F.pad(x, (1, 0, 9, 0)),
    "cropped_by_more_than_a_part": lambda n, x: F.pad(x, (0, 0, -8, 1)),
    "chunks_and_back": lambda n, x: in_chunks(x, 2),
    "patches_merged": lambda n, x: merged_patches(x),
    "torn_apart_by_a_view": lambda n, x: n.head(x)[..., :8].reshape(-1, 2).view(B, 4, -1, 2).transpose(1, 2).flatten(2),
    "tokens_before_rows_of_positions": lambda n, x: torch.cat(
        [n.token.expand(B, 2, D), x.transpose(1, 2).flatten(1)[..., None].expand(-1, -1, D)], 1
    ),
}


def in_chunks(x: Tensor, size: int) -> Tensor:
    """Softmax within chunks, as chunked linear attention pads, splits and joins."""
    length = x.shape[1]
    chunks = F.pad(x, (0, 0, 0, -length % size)).view(B, -1, size, D)
    return chunks.softmax(2).reshape(B, -1, D)[:, :length] * x


def merged_patches(x: Tensor) -> Tensor:
    """Every second row beside the rows between, as Swin merges patches: both have half of the positions, `s // 2` of them each."""
    even = F.pad(x, (0, 0, 0, x.shape[1] % 2))
    return torch.cat([even[:, ::2], even[:, 1::2]], -1)


def overwritten(x: Tensor, where: Any, new: Tensor) -> Tensor:
    y = x.clone()
    y[:, where] = new
    return y


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize(("ranks", "span", "length"), RUNS)
def test_positions_are_fetched(name: str, ranks: int, span: str, length: int) -> None:
    check_sharded(POSITIONS[name], ranks, span, length)


SCANS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "cumsum": lambda n, x: n.head(x.cumsum(1)),
    "reversed_cumsum": lambda n, x: x.flip(1).cumsum(-2).flip(1),
    "cumsum_of_a_type": lambda n, x: x.cumsum(1, dtype=torch.float64) * x,
    "cumsum_of_counts": lambda n, x: (x > 0).cumsum(1) * x,
    "cumprod": lambda n, x: x.cumprod(1),
    "cumprod_with_a_zero": lambda n, x: (x * (torch.arange(x.shape[1]) != 5).unsqueeze(-1)).cumprod(1),
    "cumprod_with_zeros": lambda n, x: (x * (torch.arange(x.shape[1]) % 4 != 2).unsqueeze(-1)).cumprod(1) + x,
    "cummax": lambda n, x: x.cummax(1).values * x,
    "cummax_of_equals": lambda n, x: x.round().detach().cummax(1).indices * (x * 0 + n.scale).cummin(1)[0],
    "cummin_indices": lambda n, x: x.cummin(1).indices * x,
    "cummax_with_nan": lambda n, x: torch.where((torch.arange(x.shape[1]) == 6).unsqueeze(-1), torch.nan, x).cummax(1)[1] * x,
    "over_features": lambda n, x: x.cumsum(2) + x.cummax(2)[0],
}


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize(("ranks", "span", "length"), RUNS)
def test_scans_exchange_totals(name: str, ranks: int, span: str, length: int) -> None:
    check_sharded(SCANS[name], ranks, span, length)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_scans_of_data_keep_the_type_of_one_device(dtype: torch.dtype) -> None:
    def body(net: Net, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = (x * 3).to(dtype)
        return x.sum(), values.cumsum(1), values.cumprod(1)

    assert not check(body, 11, num_ranks=3, rtol=1e-5).report.in_full


STATISTICS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "softmax": lambda n, x: x.softmax(1) * x,
    "attention_pooling": lambda n, x: (n.head(x).tanh()[..., 0].softmax(-1).unsqueeze(-1) * x).sum(1, keepdim=True),
    "softmax_of_a_masked_part": lambda n, x: masked_from(x, 5).softmax(1) * x,
    "log_softmax": lambda n, x: x.log_softmax(1),
    "log_softmax_of_a_type": lambda n, x: x[..., :1].log_softmax(-2, dtype=torch.float64) * x,
    "logsumexp": lambda n, x: x.logsumexp(1, keepdim=True),
    "logsumexp_of_a_masked_part": lambda n, x: masked_from(x, 5).logsumexp((1, 2), keepdim=True),
    "argmax": lambda n, x: x.argmax(1, keepdim=True) * x,
    "argmin_of_equals": lambda n, x: x.round()[..., 0].argmin(1)[:, None, None] * x,
    "std": lambda n, x: x.std(1, keepdim=True),
    "std_of_a_constant": lambda n, x: (x * 0).std(1, keepdim=True) + x,
    "var": lambda n, x: x.var((1, 2), correction=0).view(B, 1, 1) * x,
    "norm": lambda n, x: F.normalize(x.tanh(), dim=1),
    "norm_of_zeros": lambda n, x: (x * 0).norm(dim=1, keepdim=True) + x.norm(p=1, dim=(1, 2)).view(B, 1, 1),
    "prod": lambda n, x: x[..., 0].prod(1).view(B, 1, 1) * x,
    "group_norm": lambda n, x: F.group_norm(x.transpose(1, 2), 2, n.positions[0], n.positions[1]).transpose(1, 2),
    "batch_norm": lambda n, x: F.batch_norm(x.transpose(1, 2), None, None, n.positions[0], n.positions[1], True).transpose(1, 2),
    "batch_norm_of_images": lambda n, x: F.batch_norm(x.unsqueeze(1).sin(), None, None, training=True).squeeze(1),
    "batch_norm_as_remembered": lambda n, x: F.batch_norm(x.transpose(1, 2), torch.arange(D).double(), torch.ones(D).double()).mT,
    "layer_norm_over_time": lambda n, x: F.group_norm(x.transpose(1, 2), D).transpose(1, 2),
    "triangles": lambda n, x: ((x @ x.transpose(1, 2)).tril(-1) + (x @ x.transpose(1, 2)).triu(2)) @ x,
    "triangle_of_columns": lambda n, x: torch.einsum("bsd,td->bts", x, n.positions[:10]).tril(3),
}


def masked_from(x: Tensor, first: int) -> Tensor:
    """Mask so much that some rank has nothing else."""
    return x.masked_fill((torch.arange(x.shape[1]) >= first).unsqueeze(-1), float("-inf"))


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize(("ranks", "span", "length"), RUNS)
def test_statistics_are_joined(name: str, ranks: int, span: str, length: int) -> None:
    # The triangles' matrix needs all keys.
    gathers = name == "triangles"
    check_sharded(STATISTICS[name], ranks, span, length, gathers=gathers)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_remembers_what_one_device_does(training: bool) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm = nn.Embedding(V, D), nn.BatchNorm1d(D, momentum=0.3)
            self.double()

        def training_step(self, ids: Tensor, batch_idx: int) -> Tensor:
            return self.norm(self.table(ids).transpose(1, 2)).pow(3).sum()

    report = assert_step_exact(Normalised().train(training), [ids_of(13), ids_of(14)], num_ranks=3)
    assert not report.breaks
    assert not any(step.in_full or step.gathered for step in report.steps)


def shuffled(x: Tensor) -> Tensor:
    """An order of the positions for every sample and feature."""
    return (torch.arange(x.numel()).view(x.shape) * 7919 % 101).argsort(1)


LOOKUPS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "one_for_each_sample": lambda n, x: x * x[torch.arange(B), torch.tensor([6, -1])].unsqueeze(1),
    "some_for_all_samples": lambda n, x: x * n.head(x[:, torch.tensor([8, 0, 8])])[..., :D].sum(1, keepdim=True),
    "by_index_select": lambda n, x: x * x.index_select(1, torch.tensor([3, 9])).sum(1, keepdim=True),
    "by_gather": lambda n, x: x * x.gather(1, torch.tensor([[[1, 7] * 4]] * B)),
    "for_each_position": lambda n, x: x * x.gather(1, shuffled(x)),
    "for_every_other_position": lambda n, x: n.head(x).gather(1, shuffled(n.head(x))[:, ::2]),
    "one_for_many": lambda n, x: x.gather(1, (x > 0).long() * 9),
    "where_a_token_is": lambda n, x: x * x[torch.arange(B), (x > 0).any(-1).int().argmax(-1)].unsqueeze(1),
    "apart": lambda n, x: x[:, torch.tensor([2, 7, 4]), torch.tensor([0, 5, 5])].unsqueeze(1) * x[..., :1],
    "of_features": lambda n, x: x[:, :, torch.tensor([3, 0, 3])] * 2,
    "of_samples_and_features": lambda n, x: x[torch.tensor([1, 0, 1]), :, torch.tensor([1, 2, 7])].transpose(0, 1).unsqueeze(0),
    "of_samples": lambda n, x: x[torch.tensor([[1, 0], [1, 1]])].sum((0, 1)).unsqueeze(0),
}


@pytest.mark.parametrize("name", LOOKUPS)
@pytest.mark.parametrize(("ranks", "span", "length"), RUNS)
def test_named_positions_are_looked_up(name: str, ranks: int, span: str, length: int) -> None:
    check_sharded(LOOKUPS[name], ranks, span, length)


def test_a_position_that_does_not_exist_fails_as_on_one_device() -> None:
    net = Net(lambda n, x, i: x[torch.arange(B), i[:, 0] + 1000].sum())
    with pytest.raises(IndexError):
        net(ids_of(8))
    with pytest.raises(IndexError):
        lower(net, (ids_of(8),), net)


def linear_attention(x: Tensor, size: int, heads: int) -> Tensor:
    """Gated delta rule by chunks, as Transformers writes it: solved within a chunk, a state from chunk to chunk."""
    length, width = x.shape[1], D // heads
    q = F.pad(x, (0, 0, 0, -length % size)).view(B, -1, heads, width).transpose(1, 2).reshape(B, heads, -1, size, width)
    decay = q[..., 0].sigmoid().log().cumsum(-1)
    system = (q @ q.transpose(-1, -2)).tril(-1) + torch.eye(size, dtype=q.dtype)
    v = torch.linalg.solve_triangular(system, q, upper=False, unitriangular=True)
    state = x.new_zeros(B, heads, width, width)
    out = torch.zeros_like(q)
    for i in range(q.shape[2]):
        part = q[:, :, i]
        out[:, :, i] = part @ state + (part @ part.transpose(-1, -2)).tril() @ v[:, :, i]
        state = state * decay[:, :, i, -1, None, None].exp() + part.transpose(-1, -2) @ v[:, :, i]
    out = out.reshape(B, heads, -1, width)[:, :, :length].transpose(1, 2)
    gated = out.reshape(-1, width).sigmoid() * x.reshape(-1, width)
    return gated.view(B, length, D)


def attention_by_blocks(x: Tensor, size: int, heads: int) -> Tensor:
    """Lightning attention, as Transformers writes it: blocks are sliced off, what they give is joined."""
    length = x.shape[1]
    q, k = (t.view(B, length, heads, -1).transpose(1, 2) for t in (x, x.sigmoid()))
    state, out = x.new_zeros(B, heads, D // heads, D // heads), []
    for i in range((length + size - 1) // size):
        start, end = i * size, min(i * size + size, length)
        q_block, k_block = q[:, :, start:end], k[:, :, start:end]
        decay = (torch.arange(end - start) * -0.1).exp()
        within = (q_block @ k_block.transpose(-1, -2)).tril() * decay
        out.append(within @ q_block + (q_block * decay[:, None]) @ state)
        state = state * math.exp(-0.1) + k_block.transpose(-1, -2) @ q_block
    joined = torch.cat(out, -2).transpose(1, 2).reshape(B, length, D)
    return joined * joined.square().mean(-1, keepdim=True)


@pytest.mark.parametrize(("ranks", "span", "length"), RUNS)
def test_recurrences_over_blocks_take_parts_of_the_heads(ranks: int, span: str, length: int) -> None:
    check_sharded(lambda n, x: n.head(attention_by_blocks(x, 6, 4)), ranks, span, length)


def test_tokens_and_positions_apart_leave_the_sequence_cut() -> None:
    """A few tokens are given to all ranks, which costs less than to cut another dimension."""

    def body(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        return (x[:, 3:] * x[:, :1] * x[:, 1:3].sum(1, keepdim=True)).square().mean()

    lowered = check(body, 14, num_ranks=2)
    assert not lowered.report.in_full
    assert not lowered.report.gathered
    (plan,) = lowered.step._plans.values()
    assert all(layout.along_sequence for layout in plan.facts.layouts.values() if isinstance(layout, Layout))


@pytest.mark.parametrize("size", [4, 32], ids=["several_chunks", "less_than_a_chunk"])
@pytest.mark.parametrize(("ranks", "span", "length"), RUNS)
def test_recurrences_over_chunks_take_parts_of_the_heads(ranks: int, span: str, length: int, size: int) -> None:
    check_sharded(lambda n, x: n.head(linear_attention(x, size, 4)), ranks, span, length)


def test_recurrences_over_chunks_without_heads_are_exact() -> None:
    check(lambda n, x, i: n.head(linear_attention(x, 4, 1)).square().mean(), 13, num_ranks=2)


REFUSED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "rows_for_each_position": lambda n, x: x[torch.arange(B).unsqueeze(1), (x[..., 0] > 0).long()],
    "norm_of_no_norms": lambda n, x: torch.linalg.vector_norm(x[..., 0], 0.5, 1),
    "sort": lambda n, x: x[..., 0].sort(1).values,
    "kernel_of_the_sequence": lambda n, x: F.conv1d(x.transpose(1, 2)[:1], x.transpose(1, 2)[:, :, 1:]),
    "pool_rounded_up": lambda n, x: F.avg_pool1d(x[..., :1].transpose(1, 2), 4, ceil_mode=True).transpose(1, 2),
    "pool_real_positions": lambda n, x: F.avg_pool1d(x[..., :1].transpose(1, 2), 3, padding=1, count_include_pad=False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_is_exact_in_full(name: str) -> None:
    report = check(lambda n, x, i: REFUSED[name](n, x).square().sum(), 13, num_ranks=3).report
    assert report.in_full
