"""Methods of sequence-parallel attention, each alone: the same as one device, for every mask, head count and number of ranks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import assert_close, assert_exact, lower
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_autosp import collectives
from lightning_autosp.attention import blocks, gather_kv, ring, select, tiles
from lightning_autosp.attention.gather_kv import gather_kv_attention
from lightning_autosp.attention.hybrid import hybrid_attention
from lightning_autosp.attention.ring import ring_attention
from lightning_autosp.attention.select import AttentionMethod, AttentionMethodError, AttentionOptions, Offer, Work, choose
from lightning_autosp.attention.ulysses import head_shares, in_chunks, ulysses_attention
from lightning_autosp.attention.zigzag import chunk_lengths, from_zigzag, held_chunks, to_zigzag
from lightning_autosp.collectives import Group
from lightning_autosp.compiler.simulate import run_ranks
from lightning_autosp.cuts import even_cuts

Attend = Callable[..., Tensor]


def masked(name: str, length: int) -> Tensor | None:
    """The mask that is given as such; causal and full are flags."""
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    documents = torch.arange(length) * 3 // length
    return {
        "window": (column <= row) & (row - column < 4),
        "documents": (column <= row) & (documents[:, None] == documents[None]),
        "padding": ((column > 3) & (column <= row)).expand(2, 1, length, length),  # the first rows attend to nothing
        "bias": -0.3 * (row - column).abs().double(),
    }.get(name)


def lengths_of(length: int, ranks: int) -> tuple[int, ...]:
    cuts = even_cuts(length, ranks)
    return tuple(b - a for a, b in zip(cuts, cuts[1:], strict=False))


def inputs(
    heads: int, kv_heads: int, length: int, num_keys: int | None = None, width: int = 4, value_width: int = 5
) -> list[Tensor]:
    num_keys = length if num_keys is None else num_keys
    of_queries, of_keys = (2, heads, length), (2, kv_heads, num_keys)
    shapes = [(*of_queries, width), (*of_keys, width), (*of_keys, value_width), (*of_queries, value_width)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def one_device(tensors: list[Tensor], mask: Tensor | None, is_causal: bool, scale: float | None = None) -> list[Tensor]:
    """The result, and the gradients of queries, keys and values."""
    query, key, value = (x.detach().clone().requires_grad_() for x in tensors[:3])
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, enable_gqa=grouped, scale=scale)
    out.backward(tensors[3])
    return [out.detach(), *(x.grad for x in (query, key, value) if x.grad is not None)]


def on_ranks(tensors: list[Tensor], ranks: int, attend: Attend) -> list[Tensor]:
    """The same by `attend(query, key, value, query_lengths, key_lengths, group)` on simulated ranks."""
    lengths = [lengths_of(x.shape[2], ranks) for x in tensors]
    parts = [x.split(each, dim=2) for x, each in zip(tensors, lengths, strict=True)]
    leaves = [[x[rank].clone().requires_grad_() for x in parts[:3]] for rank in range(ranks)]

    def work(rank: int) -> Tensor:
        out = attend(*leaves[rank], lengths[0], lengths[1], Group("", ranks, rank))
        assert out.shape == parts[3][rank].shape
        return out

    outs = run_ranks(ranks, work)
    run_ranks(ranks, lambda rank: outs[rank].backward(parts[3][rank]))
    grads = [torch.cat([leaf[i].grad for leaf in leaves], 2) for i in range(3)]  # type: ignore[misc]
    return [torch.cat([out.detach() for out in outs], 2), *grads]


def ulysses(mask: Tensor | None, is_causal: bool) -> Attend:
    return lambda q, k, v, *rest: ulysses_attention(q, k, v, mask, 0.0, is_causal, None, *rest)


def chunks_of_heads(mask: Tensor | None, is_causal: bool) -> Attend:
    return lambda q, k, v, *rest: ulysses_attention(q, k, v, mask, 0.0, is_causal, None, *rest, 2)


def gathering(mask: Tensor | None, is_causal: bool) -> Attend:
    return lambda q, k, v, *rest: gather_kv_attention(q, k, v, mask, 0.0, is_causal, None, *rest)


def around(mask: Tensor | None, is_causal: bool) -> Attend:
    return lambda q, k, v, *rest: ring_attention(q, k, v, mask, 0.0, is_causal, None, *rest)


def in_zigzag(mask: Tensor | None, is_causal: bool) -> Attend:
    return lambda q, k, v, *rest: ring_attention(q, k, v, mask, 0.0, is_causal, None, *rest, in_zigzag=True)


def both(inside: int, outside: Any) -> Callable[[Tensor | None, bool], Attend]:
    return lambda mask, is_causal: (
        lambda q, k, v, *rest: hybrid_attention(q, k, v, mask, 0.0, is_causal, None, *rest, inside, outside)
    )


METHODS: dict[str, tuple[Callable[[Tensor | None, bool], Attend], tuple[int, ...]]] = {
    "ulysses": (ulysses, (2, 3, 4)),
    "ulysses in chunks": (chunks_of_heads, (2, 3)),
    "gather_kv": (gathering, (2, 3, 4)),
    "ring": (around, (2, 3, 4)),
    "ring in zigzag order": (in_zigzag, (2, 3, 4)),
    "hybrid with a ring": (both(2, "ring"), (4, 6)),
    "hybrid that gathers": (both(2, "gather_kv"), (4, 6)),
    "hybrid of three": (both(3, "ring"), (6,)),
}
"""Of each the numbers of ranks."""


CASES = [
    (name, ranks, mask)
    for name, (_, sizes) in METHODS.items()
    for ranks in sizes
    for mask in ("causal", "full", "window", "documents", "padding", "bias")
    if (name in ("ulysses", "gather_kv") or mask != "bias") and (name != "ring in zigzag order" or masked(mask, 2) is not None)
]


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (6, 2), (7, 1), (2, 1)])
@pytest.mark.parametrize(("method", "ranks", "mask"), CASES)
def test_same_as_one_device(method: str, ranks: int, mask: str, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if ranks == 4:
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", 30)  # blocks of few rows
    make, given, is_causal = METHODS[method][0], masked(mask, 13), mask == "causal"
    tensors = inputs(heads, kv_heads, 13)
    want = one_device(tensors, given, is_causal)
    for got, expected, name in zip(on_ranks(tensors, ranks, make(given, is_causal)), want, ("out", "dq", "dk", "dv"), strict=True):
        assert_close(got, expected, 1e-10, name)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("hybrid of three", "ring in zigzag order")])
def test_other_keys_than_queries(method: str) -> None:
    tensors = inputs(6, 2, 13, 9)
    want = one_device(tensors, None, False)
    for got, expected in zip(on_ranks(tensors, 4, METHODS[method][0](None, False)), want, strict=True):
        assert_close(got, expected, 1e-10, method)


@pytest.mark.parametrize("length", [4, 5, 7])
@pytest.mark.parametrize("attend", [around(None, True), gathering(None, True)])
def test_fewer_positions_than_chunks(attend: Attend, length: int) -> None:
    tensors = inputs(2, 1, length)
    for got, expected in zip(on_ranks(tensors, 4, attend), one_device(tensors, None, True), strict=True):
        assert_close(got, expected, 1e-10, "attention")


@pytest.mark.parametrize("is_causal", [True, False])
def test_heads_are_gathered_in_groups(is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    original = gather_kv.start_all_gather

    def noting(x: Tensor, group: Group) -> Tensor:
        gathered.append(x.shape[2])
        return original(x, group)

    monkeypatch.setattr(gather_kv, "start_all_gather", noting)
    tensors = inputs(10, 5, 13)
    for chunks in (1, 2, 5, 9):
        gathered.clear()

        def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any, chunks: int = chunks) -> Tensor:
            return gather_kv_attention(q, k, v, None, 0.0, is_causal, 0.3, *rest, head_chunks=chunks)

        for got, expected in zip(on_ranks(tensors, 3, attend), one_device(tensors, None, is_causal, 0.3), strict=True):
            assert_close(got, expected, 1e-10, "attention")
        assert max(gathered) == -(-5 // min(chunks, 5))
        assert sum(gathered) == 2 * 3 * 5  # forward and backward, three ranks


def test_causal_attention_to_other_positions_is_refused() -> None:
    tensors = inputs(2, 2, 8, 6)
    for attend in (around(None, True), gathering(None, True)):
        with pytest.raises(ValueError, match=r"causal attention of \(4, 4\) queries to \(3, 3\) keys"):
            on_ranks(tensors, 2, attend)


def test_what_blocks_cannot_be_given_is_refused() -> None:
    tensors = inputs(2, 2, 8)
    for attend, said in [
        (around(masked("bias", 8), False), "a mask of torch.float64"),
        (around(masked("window", 8), True), "causal attention with a mask"),
        (gathering(masked("window", 8), True), "causal attention with a mask"),
    ]:
        with pytest.raises(ValueError, match=said):
            on_ranks(tensors, 2, attend)


@pytest.mark.parametrize(
    ("name", "order", "kernels", "sent"),
    [
        # Natural order: each rank needs its own keys and a few of the one before.
        ("window", around, [1, 2, 2, 2], [1, 1, 1, 0]),
        # Zigzag order: 0 and 7, 1 and 6, 2 and 5, 3 and 4; all but the ends need both their neighbours, and owners send.
        ("window", in_zigzag, [4, 5, 6, 6], [2, 3, 3, 2]),
        ("both ways", around, [2, 3, 3, 2], [1, 2, 2, 1]),
        # The second of three documents begins on the second rank and ends on the third.
        ("documents", around, [1, 2, 2, 2], [1, 1, 1, 0]),
        ("own part", around, [1, 1, 1, 1], [0, 0, 0, 0]),
    ],
)
def test_what_nobody_attends_to_is_neither_sent_nor_computed(
    name: str, order: Any, kernels: list[int], sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, blocks, collectives_begun = [0] * 4, [0] * 4, [0]
    row, column = torch.arange(16)[:, None], torch.arange(16)[None]
    more = {"both ways": (row - column).abs() < 3, "own part": row // 4 == column // 4}
    mask = more[name] if name in more else masked(name, 16)
    original, exchange = ring.attend, ring.start_all_to_all
    ranks_of: dict[int, int] = {}

    def counting(*given: Any) -> Any:
        calls[ranks_of[threading.get_ident()]] += 1
        return original(*given)

    def passing(x: Tensor, received: Any, splits: Any, group: Group) -> Tensor:
        blocks[group.rank] += any(splits)
        collectives_begun[0] += 1
        return exchange(x, received, splits, group)

    monkeypatch.setattr(ring, "attend", counting)
    monkeypatch.setattr(ring, "start_all_to_all", passing)
    tensors = [x.split((4,) * 4, dim=2) for x in inputs(1, 1, 16)[:3]]

    def forward(rank: int) -> Tensor:
        ranks_of[threading.get_ident()] = rank
        return order(mask, False)(*(x[rank] for x in tensors), (4,) * 4, (4,) * 4, Group("", 4, rank))

    run_ranks(4, forward)
    assert (calls, blocks) == (kernels, sent)
    assert collectives_begun[0] % 4 == 0  # all ranks take part in the same hops
    assert any(sent) == bool(collectives_begun[0])


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("method", ["ring", "gather_kv", "hybrid"])
def test_dropped_weights_are_the_same_in_backward(method: str, is_causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the identity for values the result is the weights, so what was dropped is seen, and one device can drop the same."""
    monkeypatch.setattr(blocks, "MATH_ELEMENTS", 200)  # some rows at a time
    ranks, length, probability = 4, 26, 0.25
    query, key = torch.randn(2, 2, 4, length, 3, dtype=torch.float64).unbind()
    value = torch.eye(length, dtype=torch.float64).expand(2, 4, length, length).contiguous()
    tensors = [query, key[:, :2], value[:, :2], torch.randn(2, 4, length, length, dtype=torch.float64)]

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        if method == "hybrid":
            return hybrid_attention(q, k, v, None, probability, is_causal, None, *rest, 2, "ring")
        call = ring_attention if method == "ring" else gather_kv_attention
        return call(q, k, v, None, probability, is_causal, None, *rest)

    got = on_ranks(tensors, ranks, attend)
    kept = got[0] != 0
    allowed = torch.ones(length, length, dtype=torch.bool).tril() if is_causal else torch.ones(length, length, dtype=torch.bool)
    rate = kept[..., allowed].double().mean()
    assert abs(rate - 0.75) < 4 * (0.75 * 0.25 / kept[..., allowed].numel()) ** 0.5
    draws = kept[..., allowed].flatten(0, 1)
    assert (draws[0] != draws[1]).any()  # heads and samples draw their own
    assert (draws[0] != draws[4]).any()
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    q, k, v = leaves[0], *(x.repeat_interleave(2, 1) for x in leaves[1:])
    weights = (q @ k.transpose(-2, -1) * 3**-0.5).masked_fill(~allowed, float("-inf")).softmax(-1)
    out = (weights * kept / (1 - probability)) @ v
    out.backward(tensors[3])
    for found, want, name in zip(got, [out, *(x.grad for x in leaves)], ("out", "dq", "dk", "dv"), strict=True):
        assert want is not None
        assert_close(found, want.detach(), 1e-10, name)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("length", [5, 11, 20])
def test_zigzag_order_and_back(ranks: int, length: int) -> None:
    x, y = torch.arange(length * 2).view(1, 2, length, 1), torch.randn(1, 1, length, 3).long()
    lengths = lengths_of(length, ranks)
    chunks = torch.arange(length).split(chunk_lengths(lengths))

    def work(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        group, own = Group("", ranks, rank), [one.split(lengths, dim=2)[rank] for one in (x, y)]
        there = to_zigzag(own, lengths, group)
        return there[0], there[1], from_zigzag(there[0], lengths, group)

    for rank, (first, second, back) in enumerate(run_ranks(ranks, work)):
        held = torch.cat([chunks[chunk] for chunk in held_chunks(rank, ranks)])
        assert torch.equal(first, x[:, :, held])
        assert torch.equal(second, y[:, :, held])
        assert torch.equal(back, x.split(lengths, dim=2)[rank])


@pytest.mark.parametrize(("module", "attend"), [(ring, around(None, True)), (gather_kv, gathering(None, True))])
def test_causal_work_is_the_same_on_all_ranks(module: Any, attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: dict[int, int] = {}
    original = module.attend

    def counting(query: Tensor, key: Tensor, value: Tensor, said: blocks.Pairs) -> tuple[Tensor, Tensor]:
        rows, columns, rank = query.shape[2], key.shape[2], threading.get_ident()
        pairs[rank] = pairs.get(rank, 0) + (rows * (rows + 1) // 2 if said.is_causal else rows * columns)
        return original(query, key, value, said)

    monkeypatch.setattr(module, "attend", counting)
    tensors = [x.split(lengths_of(403, 8), dim=2) for x in inputs(1, 1, 403)[:3]]

    def work(rank: int) -> Tensor:
        own = [x[rank] for x in tensors]
        return attend(*own, lengths_of(403, 8), lengths_of(403, 8), Group("", 8, rank))

    run_ranks(8, work)
    assert sum(pairs.values()) == 403 * 404 // 2
    assert max(pairs.values()) <= 1.05 * sum(pairs.values()) / 8


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("method", ["ring", "gather_kv"])
def test_bfloat16_errors_do_not_grow_with_the_ring(method: str, is_causal: bool) -> None:
    """Of eight ranks, against float64: each gradient's is that of one device; the result is rounded once more at most."""
    torch.manual_seed(0)
    rounded = [x.bfloat16() for x in inputs(4, 2, 512, None, 32, 32)]  # widths that one device's kernel takes
    want = one_device([x.double() for x in rounded], None, is_causal)

    def errors(got: list[Tensor]) -> list[float]:
        return [float((x.double() - y).norm() / y.norm()) for x, y in zip(got, want, strict=True)]

    one, ranks = errors(one_device(rounded, None, is_causal)), errors(on_ranks(rounded, 8, METHODS[method][0](None, is_causal)))
    for limit, alone, together in zip((1.4, 1.2, 1.2, 1.2), one, ranks, strict=True):
        assert together <= limit * alone, (one, ranks)


class Layer(nn.Module):
    """Projections around one call, as in a decoder: `mask(x)` makes its mask."""

    def __init__(self, heads: int, kv_heads: int, mask: Callable[[Tensor], Tensor] | None, is_causal: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.mask, self.is_causal = heads, kv_heads, mask, is_causal
        self.q, self.k, self.v = (nn.Linear(8, 4 * n, bias=n == heads) for n in (heads, kv_heads, kv_heads))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            made(x).view(x.shape[0], x.shape[1], n, 4).transpose(1, 2)
            for made, n in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        mask = self.mask(x) if self.mask else None
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.is_causal, enable_gqa=True)
        return out.square().mean()


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.arange(x.shape[1])
    return index[:, None], index[None]


def window(x: Tensor) -> Tensor:
    row, column = positions(x)
    return (column <= row) & (row - column < 3)


def documents(x: Tensor) -> Tensor:
    row, column = positions(x)
    numbers = (x[:, :, 0] > 0.5).cumsum(1)
    return (numbers[:, None, :, None] == numbers[:, None, None, :]) & (column <= row)


def per_head(x: Tensor) -> Tensor:
    row, column = positions(x)
    return torch.arange(1, 7)[:, None, None] * -0.1 * (row - column).abs().to(x.dtype)


MASKS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "causal": None,
    "full": None,
    "window": window,
    "documents": documents,
    "padding": lambda x: ((x[:, :, 0] > -1)[:, None, None, :]) | (positions(x)[0] == positions(x)[1]),
    "bias": per_head,
}


@pytest.mark.parametrize(("ranks", "tile"), [(3, None), (4, 30)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("method", ["ulysses", "gather_kv", "ring", "hybrid"])
def test_compiled(method: AttentionMethod, mask: str, ranks: int, tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if tile is not None:
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", tile)
    net = Layer(6, 2, MASKS[mask], mask == "causal")
    x = (torch.randn(2, 13, 8).double(),)
    if method in ("ring", "hybrid") and (mask == "bias" or (method == "hybrid" and ranks == 3)):
        reason = r"its mask \(not proven.*\) is not proven to be truth" if mask == "bias" else "3 ranks do not divide"
        with pytest.raises(AttentionMethodError, match=rf"attention='{method}' cannot .* at .*test_methods.py:\d+: {reason}"):
            lower(net, x, net, num_ranks=ranks, attention=method)
        return
    call = assert_exact(net, x, net, num_ranks=ranks, attention=method).report.attention[0]
    assert call.method.startswith(method)
    assert call.chosen.startswith(call.method)
    assert call.kernel.startswith("CPU flash")
    assert call.mask_bytes == 0


def test_a_window_fetches_a_few_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Any] = []
    original = gather_kv.fetch

    def noting(x: Tensor, dim: int, bounds: Any, wanted: Any, group: Group) -> Tensor:
        fetched.append([(first, behind) for ((first, behind, _),) in wanted])
        return original(x, dim, bounds, wanted, group)

    monkeypatch.setattr(gather_kv, "fetch", noting)
    net = Layer(2, 1, window, False)
    assert_exact(net, (torch.randn(2, 16, 8).double(),), net, num_ranks=4, attention="gather_kv")
    assert fetched == [[(0, 4), (2, 8), (6, 12), (10, 16)]] * 8  # keys and values on four ranks


def test_scores_of_all_pairs_are_not_held_of_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(Layer):
        def forward(self, x: Tensor) -> Tensor:
            q = self.q(x).view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1, is_causal=True).square().mean()

    net, x = Dropping(2, 2, None, True), (torch.randn(2, 13, 8).double(),)
    assert lower(net, x, net, attention="ulysses").report.attention[0].kernel == "math"
    monkeypatch.setattr(select, "SCORES_LIMIT", 12)
    reason = (
        r"'ulysses' cannot .*test_methods.py:\d+: it drops .* 13 positions are too many. Use 'auto', or one of 'gather_kv', 'ring'"
    )
    with pytest.raises(AttentionMethodError, match=reason):
        lower(net, x, net, attention="ulysses")
    call = lower(net, x, net, attention="auto").report.attention[0]
    assert (call.method in ("gather_kv", "ring"), call.kernel) == (True, "math, some rows at a time")


def test_methods_are_for_the_operator() -> None:
    class Squashed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.made = nn.Linear(8, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            q = self.made(x).view(2, -1, 4, 2).transpose(1, 2)
            return ((q @ q.transpose(-2, -1)).tanh().softmax(-1) @ q).square().mean()

    net = Squashed()
    with pytest.raises(AttentionMethodError, match=r"'ring' cannot .*test_methods.py.*: it is written out, and computed on parts"):
        lower(net, (torch.randn(2, 13, 8).double(),), net, attention="ring")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "counts", "num_keys"),
    [
        (32, 8, 8, [4] * 8, [1] * 8),
        (28, 4, 8, [4, 3] * 4, [1] * 8),
        (6, 2, 4, [2, 1] * 2, [1] * 4),
        (7, 1, 4, [2, 2, 2, 1], [1] * 4),
        (8, 2, 3, [3, 3, 2], [1, 2, 1]),
        (10, 5, 4, [3, 3, 2, 2], [2, 2, 1, 1]),
        (2, 1, 4, [1] * 4, [1] * 4),
    ],
)
def test_shares_of_heads(heads: int, kv_heads: int, ranks: int, counts: list[int], num_keys: list[int]) -> None:
    shares = head_shares(heads, kv_heads, ranks)
    assert [share.num_queries for share in shares] == counts
    assert [share.num_keys for share in shares] == num_keys


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "counts"),
    [(32, 32, 8, [1] * 4), (32, 16, 4, [2] * 4), (10, 5, 2, [5]), (12, 6, 2, [2] * 3), (8, 8, 3, [1, 2]), (32, 8, 8, [4])],
)
def test_chunks_of_heads(heads: int, kv_heads: int, ranks: int, counts: list[int]) -> None:
    """Of the first rank; together they are its heads."""
    shares = head_shares(heads, kv_heads, ranks)
    chunks = in_chunks(shares, heads // kv_heads, 4)
    assert [chunk[0].num_queries for chunk in chunks] == counts
    for rank, share in enumerate(shares):
        assert chunks[0][rank].queries[0] == share.queries[0]
        assert chunks[-1][rank].queries[1] == share.queries[1]
        for before, behind in itertools.pairwise(chunks):
            assert before[rank].queries[1] == behind[rank].queries[0]


def work(heads: int, kv_heads: int, ranks: int, length: int, **others: Any) -> Work:
    lengths = lengths_of(length, ranks)
    return Work(1, heads, kv_heads, 128, 128, lengths, lengths, others.pop("is_causal", True), 2, **others)


H100 = AttentionOptions("auto", 9.89e14, 4.5e11, 8)


def chosen(*sizes: int, **others: Any) -> Offer:
    return choose(work(*sizes, **others), H100, "here.py:1").chosen


def test_heads_for_all_ranks_are_exchanged() -> None:
    assert chosen(32, 8, 8, 2**17).method == "ulysses"


def test_fewer_heads_than_ranks_leave_none_idle() -> None:
    assert chosen(2, 1, 8, 2**17).method != "ulysses"
    assert chosen(8, 8, 16, 2**20).method != "ulysses"


def test_a_window_fetches_from_neighbours() -> None:
    offer = chosen(
        32, 8, 8, 2**17, bounds=lambda start, stop: (start - 4095, stop), mask="a window", is_causal=False, in_graph=True
    )
    assert (offer.method, offer.sent) == ("gather_kv", 2 * 4095 * 8 * 256 * 2)


@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (16, 1), (7, 1), (2, 1)])
@pytest.mark.parametrize(
    ("method", "mask"),
    [(method, mask) for method in ("ulysses", "gather_kv", "ring", "hybrid") for mask in ("causal", "full")] + [("ring", "window")],
)
def test_estimated_bytes_are_those_that_are_sent(
    method: AttentionMethod, mask: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the busiest rank, in forward and backward; less where chunks lie where they belong, or nobody attends to them."""
    ranks, length, is_causal, given = 4, 128, mask == "causal", masked(mask, 128)
    sent = [0] * ranks
    lengths = lengths_of(length, ranks)
    bounds = (lambda start, stop: (start - 3, stop)) if mask == "window" else None
    described = Work(2, *heads, 4, 5, lengths, lengths, is_causal, 8, mask=mask if bounds else "", bounds=bounds)
    offer = choose(described, AttentionOptions(method), "here.py:1").chosen
    originals = collectives.start_all_to_all, collectives.start_all_gather

    def exchanging(x: Tensor, output: Any, splits: Any, group: Group) -> Tensor:
        rank = group.members[group.rank] if group.members else group.rank
        rows = sum(n for r, n in enumerate(splits) if r != group.rank)
        sent[rank] += rows * (x[0].numel() if len(x) else 0) * x.element_size()
        return originals[0](x, output, splits, group)

    def gathering_all(x: Tensor, group: Group) -> Tensor:
        if not group.members:
            sent[group.rank] += x.nbytes * (group.size - 1)
        return originals[1](x, group)

    for module in (collectives, ring, gather_kv):
        monkeypatch.setattr(module, "start_all_to_all", exchanging)
    for module in (collectives, gather_kv):
        monkeypatch.setattr(module, "start_all_gather", gathering_all)
    make = {"hybrid": both(offer.inside, offer.outside), "ulysses": ulysses, "gather_kv": gathering, "ring": around}[method]
    on_ranks(inputs(*heads, length), ranks, make(given, is_causal))
    assert max(sent) <= 1.01 * offer.sent
    assert max(sent) >= (0.99 if not is_causal or method == "ulysses" else 0.7) * offer.sent
