"""Attention that is written out: exact, without a value of pairs outside of tiles and without a gather."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import assert_exact, lower
from test_attention import inputs, no_pairs
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_autosp.attention import tiles

HEADS, WIDTH, LENGTH = 4, 4, 13
Written = Callable[["Net", Tensor, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Projections around an attention that is written out: `written(net, q, k, v)` with `(B, H, S, D)` each."""

    def __init__(self, written: Written) -> None:
        super().__init__()
        self.written = written
        self.qkv = nn.Linear(8, 3 * HEADS * WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS))
        self.slopes = nn.Parameter(torch.rand(HEADS))
        self.buckets = nn.Embedding(32, HEADS)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.written(self, q, k, v)
        out = out if isinstance(out, tuple) else (out,)
        return (out[0].transpose(1, 2).flatten(2).square().mean(), *out)


def row_column(q: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(q.shape[-2])
    return positions[:, None], positions


def causal(q: Tensor) -> Tensor:
    row, column = row_column(q)
    return column <= row


def dots(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * WIDTH**-0.5


def multi_query(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head of keys and values, with a bias."""
    return (dots(q, k[:, :1]) + net.slopes.view(-1, 1, 1) * row_column(q)[1]).softmax(-1) @ v[:, :1]


def relative(net: Net, q: Tensor) -> Tensor:
    """A learned bias for every distance and head."""
    row, column = row_column(q)
    return net.buckets((row - column).abs().clamp(max=31)).permute(2, 0, 1)[None]


def softcapped(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(dots(q, k) / 3.0) * 3.0
    return scores.masked_fill(~causal(q), float("-inf")).softmax(-1) @ v


def sinks(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = dots(q, k).masked_fill(~causal(q), float("-inf"))
    sink = net.sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    joined = torch.cat([scores, sink], -1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return joined.softmax(-1)[..., :-1] @ v


def by_bmm(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q3, k3, v3 = (x.reshape(-1, x.shape[2], WIDTH) for x in (q, k, v))
    scores = torch.bmm(q3, k3.transpose(1, 2)).view(q.shape[0], HEADS, q.shape[2], k.shape[2])
    scores = scores + torch.where(causal(q), 0.0, -1e9).to(q.dtype)
    weights = F.softmax(scores.view(-1, q.shape[2], k.shape[2]), dim=-1)
    return torch.bmm(weights, v3).view_as(q)


def by_baddbmm(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q3, k3, v3 = (x.flatten(0, 1) for x in (q, k, v))
    mask = torch.full((q.shape[2], k.shape[2]), float("-inf"), dtype=q.dtype).triu(1)
    scores = torch.baddbmm(mask.expand(q3.shape[0], -1, -1), q3, k3.transpose(1, 2))
    return torch.bmm(scores.softmax(-1), v3).view_as(q)


def retention(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, column = row_column(q)
    decay = torch.where(column <= row, net.slopes.view(-1, 1, 1).sigmoid() ** (row - column).clamp(min=0), 0.0)
    return (q @ k.transpose(-1, -2) * decay) @ v


def disentangled(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries and keys meet embeddings of distances, looked up for every pair, as DeBERTa has it."""
    row, column = row_column(q)
    distances = net.buckets.weight[:, :1] * torch.arange(WIDTH)
    places = (row - column).clamp(-8, 7) + 8
    places = places.expand(*q.shape[:2], -1, -1)
    of_queries = torch.gather(q @ distances.T, -1, places)
    of_keys = torch.gather(k @ distances.T, -1, places).transpose(-1, -2)
    return (dots(q, k) + of_queries + of_keys).softmax(-1) @ v


def mask_of_queries(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries meet embeddings of distances, and the kernel takes that for its mask."""
    row, column = row_column(q)
    distances = net.buckets((row - column).clamp(-8, 7) + 8)
    return F.scaled_dot_product_attention(q, k, v, torch.einsum("bhqd,qkd->bhqk", q, distances))


def repeated(q: Tensor, keep: Tensor) -> Tensor:
    """A mask of columns, repeated for samples and rows."""
    return keep.repeat(q.shape[0], q.shape[2], 1)[:, None]


def window(q: Tensor) -> Tensor:
    row, column = row_column(q)
    return causal(q) & (row - column < 5)


# What a kernel computes: the operator takes its place.
JOINED: dict[str, Written] = {
    "full": lambda n, q, k, v: dots(q, k).softmax(-1) @ v,
    "divided": lambda n, q, k, v: F.softmax(q @ k.transpose(2, 3) / 2, dim=-1) @ v,
    "scaled_before": lambda n, q, k, v: F.softmax((q * 0.5) @ k.transpose(2, 3), dim=-1) @ v,
    "causal_fill": lambda n, q, k, v: dots(q, k).masked_fill(~causal(q), float("-inf")).softmax(-1) @ v,
    "causal_lowest": lambda n, q, k, v: dots(q, k).masked_fill(~causal(q), torch.finfo(q.dtype).min).softmax(-1) @ v,
    "causal_where": lambda n, q, k, v: torch.where(causal(q), dots(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v,
    "causal_where_tensor": lambda n, q, k, v: (
        torch.where(causal(q), q @ k.transpose(2, 3) / torch.full([], 2.0, dtype=q.dtype), torch.full([], -1e300, dtype=q.dtype))
        .softmax(-1)
        .to(q.dtype)
        @ v
    ),
    "causal_added": lambda n, q, k, v: (
        (dots(q, k) + torch.full((q.shape[2], q.shape[2]), float("-inf"), dtype=q.dtype).triu(1)).softmax(-1) @ v
    ),
    "window": lambda n, q, k, v: dots(q, k).masked_fill(~window(q), float("-inf")).softmax(-1) @ v,
    "repeated_for_heads": lambda n, q, k, v: (
        dots(q, k).masked_fill(~causal(q).repeat(q.shape[0], q.shape[1], 1, 1), float("-inf")).softmax(-1) @ v
    ),
    "no_dropout": lambda n, q, k, v: F.dropout(dots(q, k).softmax(-1), 0.3, training=False) @ v,
    "by_baddbmm": by_baddbmm,
    "one_head_of_keys": lambda n, q, k, v: dots(q, k[:, :1]).masked_fill(~causal(q), -1e300).softmax(-1) @ v[:, :1],
    "by_bmm_alone": lambda n, q, k, v: torch.bmm(
        torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1), v.flatten(0, 1)
    ).unflatten(0, (-1, HEADS)),
}

# What no kernel has a flag for: regions, in tiles.
TILED: dict[str, Written] = {
    "softcapped": softcapped,
    "sinks": sinks,
    "alibi": lambda n, q, k, v: (
        (dots(q, k) - n.slopes.view(-1, 1, 1) * (row_column(q)[0] - row_column(q)[1])).masked_fill(~causal(q), -1e9).softmax(-1) @ v
    ),
    "relative": lambda n, q, k, v: (dots(q, k) + relative(n, q)).softmax(-1) @ v,
    "einsum": lambda n, q, k, v: torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
    "by_bmm": by_bmm,
    "by_baddbmm_with_factors": lambda n, q, k, v: torch.bmm(
        torch.baddbmm(
            (n.slopes.view(1, -1, 1, 1) * row_column(q)[1]).expand(q.shape[0], -1, -1, -1).flatten(0, 1),
            q.flatten(0, 1),
            k.flatten(0, 1).mT,
            beta=0.5,
            alpha=0.25,
        ).softmax(-1),
        v.flatten(0, 1),
    ).view_as(q),
    "retention": retention,
    "disentangled": disentangled,
    "rows_that_attend_to_nothing": lambda n, q, k, v: (
        (
            dots(q, k)
            + torch.zeros(q.shape[2], q.shape[2], dtype=q.dtype).masked_fill(
                ~(causal(q) & (row_column(q)[1] > 2)), torch.finfo(q.dtype).min
            )
        ).softmax(-1)
        @ v
    ),
    "repeated": lambda n, q, k, v: (
        dots(q, k).masked_fill_(repeated(q, torch.arange(q.shape[2])[None, None] < 3), -1e300).softmax(-1).type_as(q) @ v
    ),
    "sigmoid": lambda n, q, k, v: (dots(q, k).sigmoid() * causal(q)) @ v / (row_column(q)[0] + 1),
    "may_attend_to_nothing": lambda n, q, k, v: (
        dots(q, k).masked_fill(~((row_column(q)[0] + row_column(q)[1] > 5) & causal(q)), -1e9).softmax(-1) @ v
    ),
    "multi_query": multi_query,
    "mask_of_queries": mask_of_queries,
    "mask_of_queries_and_keys": lambda n, q, k, v: F.scaled_dot_product_attention(q, k, v, dots(k, q).transpose(-1, -2).tanh()),
    "softmax_with_own_sum": lambda n, q, k, v: (dots(q, k).exp() / dots(q, k).exp().sum(-1, keepdim=True)) @ v,
}


@pytest.fixture(params=[None, 2 * LENGTH * 3], ids=["one_tile", "many_tiles"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", request.param)


def assert_sharded(lowered: Any) -> None:
    assert no_pairs(lowered)
    assert not lowered.report.gathered
    assert not lowered.report.in_full


@pytest.mark.parametrize("name", JOINED)
def test_a_kernel_takes_its_place(name: str) -> None:
    net = Net(lambda *args: JOINED[name](*args))
    lowered = assert_exact(net, inputs(LENGTH), net, num_ranks=3)
    assert [call.method for call in lowered.report.attention] == ["ulysses"]
    assert no_pairs(lowered)


@pytest.mark.parametrize("name", TILED)
def test_in_tiles(name: str, tile: None) -> None:
    net = Net(lambda *args: TILED[name](*args))
    for ranks in (2, 3):
        lowered = assert_exact(net, inputs(LENGTH), net, num_ranks=ranks)
        (call,) = lowered.report.attention
        assert call.method.startswith("parts of heads, in tiles")
        assert ("one head of keys" in call.method) == (name == "multi_query")
        assert no_pairs(lowered)
        assert not lowered.report.in_full
        assert all(one.reason.startswith("returned") for one in lowered.report.gathered)


@pytest.mark.parametrize("name", ["softcapped", "sinks", "by_bmm", "einsum", "relative"])
def test_one_rank_has_tiles_too(name: str, tile: None) -> None:
    net = Net(lambda *args: TILED[name](*args))
    assert no_pairs(assert_exact(net, inputs(LENGTH), net, num_ranks=1))


def test_fewer_heads_than_ranks_share_the_rows(tile: None) -> None:
    net = Net(lambda *args: softcapped(*args))
    lowered = assert_exact(net, inputs(LENGTH, batch=1), net, num_ranks=5)
    assert lowered.report.attention[0].method.startswith("parts of")
    assert no_pairs(lowered)


def test_a_bias_whose_rows_are_merged_with_columns_is_kept(tile: None) -> None:
    """Looked up for all pairs in one list, as BEiT has it."""

    def written(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row, column = row_column(q)
        pairs = (row - column).abs().clamp(max=31).view(-1)
        bias = net.buckets(pairs).view(q.shape[2], q.shape[2], -1).permute(2, 0, 1)
        return F.scaled_dot_product_attention(q, k, v, bias[None])

    net = Net(written)
    for ranks in (1, 2):
        assert_exact(net, inputs(LENGTH), net, num_ranks=ranks)


def test_weights_that_are_returned_stay(tile: None) -> None:
    def written(net: Net, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = dots(q, k).masked_fill(~causal(q), float("-inf")).softmax(-1)
        return weights @ v, weights

    net = Net(written)
    assert not no_pairs(assert_exact(net, inputs(LENGTH), net))


def test_what_attends_to_nothing_stays_not_a_number() -> None:
    def written(net: Net, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row, column = row_column(q)
        return dots(q, k).masked_fill(column >= row, float("-inf")).softmax(-1) @ v

    net = Net(written)
    out = lower(net, inputs(LENGTH), net, backward=False).outputs[0][1]
    assert out[:, :, 0].isnan().all()
    assert not out[:, :, 1:].isnan().any()


def test_dropout_is_the_same_in_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a sum over values that are one is, for each value, the weights it was given in forward."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 2 * 64 * 8)

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(1, HEADS, 1, 1).double())

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            weights = F.dropout(torch.tanh(q @ q.transpose(-1, -2)).softmax(-1), 0.5)
            out = weights @ (self.value * torch.ones_like(q))
            return out.sum(), out

    net = Dropped()
    lowered = lower(net, (torch.randn(1, 64, 8).double(),), net)
    assert lowered.report.attention[0].method == "parts of heads, in tiles"
    for outputs, gradients in zip(lowered.outputs, lowered.gradients, strict=True):
        gradient = gradients["value"]
        assert gradient is not None
        assert torch.allclose(gradient.sum(), outputs[1].sum())
        assert abs(outputs[1].mean().item() - 1) < 0.1
        assert not torch.allclose(outputs[1][:, :, :8], outputs[1][:, :, 8:16])


def test_cross_attention_over_another_sequence(tile: None) -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, HEADS * WIDTH).double() for _ in range(3))

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            q, k, v = (p(z).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for p, z in ((self.q, x), (self.k, y), (self.v, y)))
            scores = torch.tanh(q @ k.transpose(2, 3)).masked_fill((y[:, :, 0] > 0)[:, None, None], -1e9)
            out = scores.softmax(-1) @ v
            return out.square().mean(), out

    net = Cross()
    lowered = assert_exact(net, (torch.randn(2, 13, 8).double(), torch.randn(2, 9, 8).double()), net)
    assert lowered.report.attention
    assert no_pairs(lowered)


def test_shared_bias_is_computed_where_it_is_used(tile: None) -> None:
    """One learned bias for two layers, as T5 has it."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Net(lambda *args: args[1]) for _ in range(2)])
            self.out = nn.Linear(HEADS * WIDTH, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            bias = relative(self.layers[0], x)
            for layer in self.layers:
                layer.written = lambda n, q, k, v: (dots(q, k) + bias).softmax(-1) @ v
                x = x + self.out(layer(x)[1].transpose(1, 2).flatten(2))
                layer.written = None
            return x.square().mean()

    net = Shared()
    lowered = assert_exact(net, inputs(LENGTH), net)
    assert len(lowered.report.attention) == 2
    assert_sharded(lowered)
