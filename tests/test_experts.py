"""Mixture of experts: every spelling of routing on simulated ranks against one device, in float64, and what leaves a rank."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401 -- registers its grouped product
from simulated import Lowered, assert_exact, assert_step_exact
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_autosp.collectives import Group
from lightning_autosp.compiler.emit import exchange_dims, fetch_layout, gather_layout

B, D, H, E, K, V = 2, 6, 5, 4, 2, 11
RUNS = [(2, 13), (3, 10), (4, 9)]
"""Ranks and length."""


class Routed(nn.Module):
    """Tokens, each through `K` of `E` experts.

    `body(module, tokens, weights, experts)` gives a row for every token; in a tuple, a further loss and what else to return follow.
    """

    def __init__(self, body: Callable[..., Any], route: Callable[..., tuple[Tensor, Tensor]] | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.router = nn.Linear(D, E, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E, D, H)), nn.Parameter(torch.randn(E, H, D))
        self.bias = nn.Parameter(torch.randn(E, H))
        self.body, self.route = body, route or top_k
        self.double()

    def forward(self, ids: Tensor) -> Any:
        place = torch.arange(ids.shape[1])[:, None] * 0.1 + 1
        x = self.embedding(ids) * place
        tokens = x.view(-1, D)
        out = self.body(self, tokens, *self.route(self, tokens, ids))
        y, *more = out if isinstance(out, tuple) else (out,)
        return (x + y.view(x.shape) * place).square().mean() + sum(more[:1]), *more[1:]

    def expert(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Row `i` through expert `ids[i]`."""
        hidden = torch.bmm(rows.unsqueeze(1), self.up[ids]).squeeze(1) + self.bias[ids]
        return torch.einsum("nh,nhd->nd", F.silu(hidden), self.down[ids])

    def grouped(self, rows: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
        """Rows sorted by expert, `offsets[e]` the end of those of expert `e`."""
        linear = torch.ops.transformers.grouped_mm_fallback
        return linear(F.silu(linear(rows, self.up, offsets) + self.bias[ids]), self.down, offsets)


def top_k(module: Routed, tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    weights, experts = module.router(tokens).softmax(-1).topk(K, -1)
    return weights / weights.sum(-1, keepdim=True), experts


def check(body: Callable[..., Any], ranks: int, length: int, **options: Any) -> Lowered:
    module = Routed(body, **options)
    return assert_exact(module, (torch.randint(0, V, (B, length)),), module, num_ranks=ranks)


def check_stays(body: Callable[..., Any], ranks: int, length: int, **options: Any) -> Lowered:
    """Check that nothing is made whole, and that no row of any size goes to another rank."""
    lowered = check(body, ranks, length, **options)
    assert not lowered.report.in_full, lowered.report.in_full
    assert not lowered.report.gathered, lowered.report.gathered
    _, program = lowered.step.emit(dict.fromkeys(lowered.step.captured.symbols, length), Group("", ranks, 0), None)
    moved = {node.target for node in program.module.graph.nodes} & {exchange_dims, fetch_layout, gather_layout}
    assert not moved, moved
    return lowered


def sorted_rows(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Return every token's weighted rows in the order of their experts, and the permutation."""
    ids, perm = e.reshape(-1).sort()
    return m.expert(x[perm // K], ids) * w.reshape(-1)[perm].unsqueeze(-1), perm


def by_index_put(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, perm = sorted_rows(m, x, w, e)
    inverse = torch.empty_like(perm)
    inverse[perm] = torch.arange(perm.size(0))
    return rows[inverse].view(-1, K, D).sum(1)


def by_scatter(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, perm = sorted_rows(m, x, w, e)
    inverse = torch.zeros_like(perm).scatter_(0, perm, torch.arange(perm.numel()))
    return rows.index_select(0, inverse).unflatten(0, (-1, K)).sum(1)


def by_argsort(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    order = e.flatten().argsort(stable=True)
    rows = m.expert(x.index_select(0, torch.div(order, K, rounding_mode="floor")), e.flatten()[order])
    return (rows[order.argsort()].view(-1, K, D) * w.unsqueeze(-1)).sum(1)


def by_sorting_again(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, perm = sorted_rows(m, x, w, e)
    return rows[perm.sort()[1]].view(-1, K, D).sum(1)


def written_back(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, perm = sorted_rows(m, x, w, e)
    out = torch.zeros_like(rows)
    out[perm] = rows
    return out.view(-1, K, D).sum(1)


def copied_back(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, perm = sorted_rows(m, x, w, e)
    return torch.zeros(x.shape[0] * K, D, dtype=x.dtype).index_copy(0, perm, rows).view(-1, K, D).sum(1)


def added(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, perm = sorted_rows(m, x, w, e)
    return torch.zeros_like(x).index_add_(0, perm // K, rows)


def added_to_zeros_of_a_size(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, perm = sorted_rows(m, x, w, e)
    return torch.zeros(x.shape[0], D, dtype=x.dtype).index_add_(0, perm // K, rows)


def added_to_the_input(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, perm = sorted_rows(m, x, w, e)
    return x.index_add(0, perm // K, F.layer_norm(rows, (D,)), alpha=0.5)


def scattered(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, perm = sorted_rows(m, x, w, e)
    tokens = (perm // K).unsqueeze(-1).expand(-1, D)
    return x.new_zeros(x.shape).scatter_add_(0, tokens, rows)


def reduced(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, perm = sorted_rows(m, x, w, e)
    return torch.zeros_like(x).scatter_reduce(0, (perm // K)[:, None].expand_as(rows), rows, "sum")


def accumulated(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, perm = sorted_rows(m, x, w, e)
    return torch.zeros_like(x).index_put((perm // K,), rows, accumulate=True)


def gathered_rows(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    ids, perm = e.view(-1).sort(stable=True)
    token = perm // K
    rows = m.expert(x.gather(0, token[:, None].expand(-1, D)), ids) * w[token, perm % K, None]
    return torch.zeros_like(x).index_add(0, token, rows)


def numbered_tokens(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    perm = e.view(-1).argsort()
    token = torch.arange(x.shape[0]).repeat_interleave(K)[perm]
    rows = m.expert(x[token], e.view(-1)[perm]) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, token, rows)


def expanded_numbers(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    perm = e.view(-1).argsort()
    token = torch.arange(x.shape[0]).unsqueeze(1).expand(-1, K).reshape(-1)[perm]
    rows = m.expert(x[token], e.view(-1)[perm]) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, token, rows)


SORTED = [
    by_index_put,
    by_scatter,
    by_argsort,
    by_sorting_again,
    written_back,
    copied_back,
    added,
    added_to_zeros_of_a_size,
    added_to_the_input,
    scattered,
    reduced,
    accumulated,
    gathered_rows,
    numbered_tokens,
    expanded_numbers,
]


@pytest.mark.parametrize("body", SORTED, ids=lambda body: body.__name__)
@pytest.mark.parametrize(("ranks", "length"), RUNS[:2])
def test_sorted_rows_stay_on_their_rank(body: Callable[..., Any], ranks: int, length: int) -> None:
    check_stays(body, ranks, length)


def by_histogram(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ids, perm = e.view(-1).sort()
    counts = torch.histc(ids.float(), bins=E, min=0, max=E - 1)
    rows = m.grouped(x[perm // K], ids, counts.cumsum(0, dtype=torch.int32)) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // K, rows), rows.new_zeros(()), counts


def by_one_hot(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    ids, perm = e.view(-1).sort()
    counts = F.one_hot(e, E).sum(1).to(torch.int32).sum(0)
    rows = m.grouped(x[perm // K], ids, counts.cumsum(0)) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // K, rows), (counts / counts.sum()).square().sum()


def by_comparison(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    perm = e.view(-1).argsort()
    ids = e.view(-1)[perm]
    offsets = (ids.unsqueeze(-1) == torch.arange(E)).sum(0).cumsum(0).to(torch.int32)
    rows = m.grouped(x[perm // K], ids, offsets) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // K, rows)


def by_scattered_ones(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    counts = e.new_zeros((e.shape[0], E)).scatter_(1, e, 1).sum(dim=0)
    ids, perm = e.view(-1).sort()
    rows = m.grouped(x[perm // K], ids, counts.cumsum(0)) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // K, rows)


def by_search(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    ids, perm = e.view(-1).sort()
    offsets = torch.searchsorted(ids, torch.arange(E), right=True)
    rows = m.grouped(x[perm // K], ids, offsets.int()) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // K, rows)


GROUPED = [by_histogram, by_one_hot, by_comparison, by_scattered_ones, by_search]


@pytest.mark.parametrize("body", GROUPED, ids=lambda body: body.__name__)
@pytest.mark.parametrize(("ranks", "length"), RUNS[1:])
def test_grouped_rows_stay_on_their_rank(body: Callable[..., Any], ranks: int, length: int) -> None:
    check_stays(body, ranks, length)


def scattered_weights(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    dense = torch.zeros(x.shape[0], E, dtype=x.dtype).scatter(1, e, w)
    hidden = F.silu(torch.einsum("nd,edh->neh", x, m.up))
    return torch.einsum("neh,ehd,ne->nd", hidden, m.down, dense)


def one_hot_weights(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    dense = (F.one_hot(e, E).to(x.dtype) * w.unsqueeze(-1)).sum(1)
    rows = F.silu(torch.bmm(x.unsqueeze(0).expand(E, -1, D), m.up)).bmm(m.down)
    return (rows * dense.t().unsqueeze(-1)).sum(0)


def loop_over_masks(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    chosen = F.one_hot(e, E).permute(2, 1, 0)
    out = torch.zeros_like(x)
    for i in range(E):
        weight = (chosen[i].t() * w).sum(-1, keepdim=True)
        out += weight * (F.silu(x @ m.up[i] + m.bias[i]) @ m.down[i])
    return out


def loop_over_choices(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    return sum(w[:, i, None] * m.expert(x, e[:, i]) for i in range(K))


def repeated_rows(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows = m.expert(x.repeat_interleave(K, dim=0), e.reshape(-1)) * w.reshape(-1, 1)
    return rows.view(-1, K, D).sum(1)


def numbered_rows(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    token = torch.arange(x.shape[0]).repeat_interleave(K)
    rows = m.expert(x[token], e.reshape(-1)) * w.reshape(-1, 1)
    return torch.zeros_like(x).index_add_(0, token, rows)


def shared_gate(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    scores = m.router(x).sigmoid()
    picked = scores.gather(1, e) / scores.gather(1, e).sum(-1, keepdim=True)
    masked = scores.masked_fill(~torch.zeros_like(scores).scatter(1, e, 1.0).bool(), 0.0)
    return repeated_rows(m, x, picked, e) + masked @ m.bias @ m.down[0]


def grouped_choice(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    """Experts of the best of two groups only."""
    scores = m.router(x).sigmoid()
    groups = scores.view(-1, 2, E // 2).topk(2, dim=-1)[0].sum(-1)
    best = torch.zeros_like(groups).scatter_(1, groups.topk(1, sorted=False)[1], 1)
    allowed = best.unsqueeze(-1).expand(-1, 2, E // 2).reshape(-1, E).bool()
    experts = scores.masked_fill(~allowed, float("-inf")).topk(K)[1]
    return repeated_rows(m, x, scores.gather(1, experts), experts)


DENSE = [
    scattered_weights,
    one_hot_weights,
    loop_over_masks,
    loop_over_choices,
    repeated_rows,
    numbered_rows,
    shared_gate,
    grouped_choice,
]


@pytest.mark.parametrize("body", DENSE, ids=lambda body: body.__name__)
def test_dense_spellings_stay_on_their_rank(body: Callable[..., Any]) -> None:
    check_stays(body, *RUNS[1])


def balanced(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of the Switch transformer: share of tokens times mean probability, over the experts."""
    probabilities = m.router(x).softmax(-1)
    chosen = F.one_hot(e, E).to(x.dtype)
    return added(m, x, w, e), E * (chosen.mean(0).sum(0) * probabilities.mean(0)).sum() + m.router(x).logsumexp(-1).square().mean()


def balanced_by_histogram(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of the sorted experts tell the rank's offsets and, of all ranks, the loss."""
    out, _, counts = by_histogram(m, x, w, e)
    return out, (m.router(x).sigmoid().mean(0) * counts / counts.sum()).sum(), counts


def balanced_layers(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Router scores of layers behind each other, some tokens masked."""
    y = x + added(m, x, w, e)
    scores = torch.cat([m.router(x), m.router(y)]).softmax(-1)
    chosen = F.one_hot(scores.topk(K, -1)[1], E).to(x.dtype)
    mask = (torch.arange(x.shape[0] // B) > 2)[None, None, :, None].expand(2, B, -1, E).reshape(-1, E).to(x.dtype)
    share = (chosen * mask.unsqueeze(1)).sum(0) / mask.unsqueeze(1).sum(0)
    return y, (share * ((scores * mask).sum(0) / mask.sum(0))).sum()


@pytest.mark.parametrize("body", [balanced, balanced_by_histogram, balanced_layers], ids=lambda body: body.__name__)
@pytest.mark.parametrize(("ranks", "length"), RUNS)
def test_losses_over_all_tokens_are_exact(body: Callable[..., Any], ranks: int, length: int) -> None:
    check_stays(body, ranks, length)


def by_position(module: Routed, tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Experts 0 and 1 get the first half of the tokens only, expert 3 none."""
    first = (torch.arange(ids.shape[1]) < ids.shape[1] // 2).expand_as(ids).reshape(-1, 1)
    scores = module.router(tokens)
    blocked = torch.stack([~first[:, 0], ~first[:, 0], first[:, 0], torch.ones_like(first[:, 0])], 1)
    weights, experts = scores.masked_fill(blocked, -1e9).softmax(-1).topk(1, -1)
    return torch.cat([weights, weights], -1), torch.cat([experts, experts], -1)


def by_id(module: Routed, tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The token's id says the expert: nothing of the order is trained."""
    experts = torch.stack([ids % E, (ids + 1) % E], -1).view(-1, K)
    return module.router(tokens).softmax(-1).gather(1, experts), experts


@pytest.mark.parametrize("route", [by_position, by_id], ids=lambda route: route.__name__)
@pytest.mark.parametrize("body", [by_histogram, by_index_put], ids=lambda body: body.__name__)
def test_experts_without_tokens_and_fixed_routes(route: Callable[..., Any], body: Callable[..., Any]) -> None:
    lowered = check(body, 4, 16, route=route)
    assert not lowered.report.gathered, lowered.report.gathered


def order_returned(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, perm = sorted_rows(m, x, w, e)
    return torch.zeros_like(x).index_add(0, perm // K, rows), rows.new_zeros(()), rows


def positions_returned(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, perm = sorted_rows(m, x, w, e)
    return torch.zeros_like(x).index_add(0, perm // K, rows), rows.new_zeros(()), perm


def positions_in_a_loss(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    rows, perm = sorted_rows(m, x, w, e)
    return torch.zeros_like(x).index_add(0, perm // K, rows), (rows.sum(-1) * perm).mean()


def limited_capacity(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    """An expert takes its first five rows."""
    ids, perm = e.view(-1).sort(stable=True)
    ends = F.one_hot(ids, E).sum(0).cumsum(0)
    place = torch.arange(ids.shape[0]) - (ends - F.one_hot(ids, E).sum(0))[ids]
    rows = m.expert(x[perm // K], ids) * (w.view(-1)[perm] * (place < 5)).unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, perm // K, rows)


def first_rows_only(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    ids, perm = e.view(-1).sort(stable=True)
    perm, ids = perm[: x.shape[0]], ids[: x.shape[0]]
    rows = m.expert(x[perm // K], ids) * w.view(-1)[perm].unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, perm // K, rows)


def neighbours_in_order(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    ids, perm = e.view(-1).sort(stable=True)
    rows = m.expert(x[perm // K], ids)
    return torch.zeros_like(x).index_add(0, perm // K, rows - rows.roll(1, 0))


def pairs_in_order(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    ids, perm = e.view(-1).sort(stable=True)
    rows = m.expert(x[perm // K], ids).view(-1, K, D)
    return torch.zeros_like(x).index_add(0, perm // K, (rows - rows.mean(1, keepdim=True)).view(-1, D))


def weights_in_natural_order(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    """Rows in sorted order meet weights that are not."""
    ids, perm = e.view(-1).sort(stable=True)
    rows = m.expert(x[perm // K], ids) * w.view(-1, 1)
    return torch.zeros_like(x).index_add(0, perm // K, rows)


def order_taken_for_natural(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, _ = sorted_rows(m, x, w, e)
    return rows.view(-1, K, D).sum(1)


def two_orders(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    ids, perm = e.view(-1).sort(stable=True)
    other = (-e).view(-1).argsort(stable=True)
    rows = m.expert(x[perm // K], ids) + m.expert(x[other // K], e.view(-1)[other])
    return torch.zeros_like(x).index_add(0, perm // K, rows)


def last_write_wins(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    ids, perm = e.view(-1).sort(stable=True)
    out = torch.zeros_like(x)
    out[perm // K] = m.expert(x[perm // K], torch.zeros_like(ids))
    return out


def offsets_of_other_rows(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    ids, perm = e.view(-1).sort(stable=True)
    counts = F.one_hot((e + 1) % E, E).sum((0, 1))
    rows = m.grouped(x[perm // K], ids, counts.cumsum(0)) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // K, rows)


def offsets_in_descending_order(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    ids, perm = e.view(-1).sort(stable=True, descending=True)
    rows = m.grouped(x[perm // K], ids, F.one_hot(ids, E).sum(0).cumsum(0)) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // K, rows)


def fixed_offsets(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    ids, perm = e.view(-1).sort(stable=True)
    rows = m.grouped(x[perm // K], ids, torch.tensor([3, 8, 9, 20])) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // K, rows)


def offsets_after_uncounted_rows(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    """Keys below the histogram's first are in no group, though they come first."""
    ids, perm = (e - 1).view(-1).sort(stable=True)
    counts = torch.histc(ids.double(), bins=E, min=0, max=E - 1)
    rows = m.grouped(x[perm // K], ids.clamp(min=0), counts.cumsum(0).int()) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // K, rows)


def offsets_of_distinct_choices(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    """A token that chose an expert twice has two rows but counts once."""
    ids, perm = (e // 2).view(-1).sort(stable=True)
    chosen = F.one_hot(e // 2, E).sum(1).bool().long()
    rows = m.grouped(x[perm // K], ids, chosen.sum(0).cumsum(0)) * w.view(-1)[perm, None]
    return torch.zeros_like(x).index_add(0, perm // K, rows)


def rows_by_number(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    rows, _ = sorted_rows(m, x, w, e)
    return x + rows[torch.arange(3) * 4].sum(0) + rows.index_select(0, rows.sum(-1).argmax().view(1))


LEAKS = [
    offsets_of_distinct_choices,
    rows_by_number,
    order_returned,
    positions_returned,
    positions_in_a_loss,
    limited_capacity,
    first_rows_only,
    neighbours_in_order,
    pairs_in_order,
    weights_in_natural_order,
    order_taken_for_natural,
    two_orders,
    last_write_wins,
    offsets_of_other_rows,
    offsets_in_descending_order,
    fixed_offsets,
    offsets_after_uncounted_rows,
]
"""Something depends on where a sort puts rows among those of other ranks."""


@pytest.mark.parametrize("body", LEAKS, ids=lambda body: body.__name__)
def test_an_order_that_matters_is_made_in_full(body: Callable[..., Any]) -> None:
    assert check(body, *RUNS[1]).report.in_full


class Cut(Routed):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)[0]


def test_an_order_that_crosses_a_graph_break_is_that_of_all_rows() -> None:
    def body(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
        rows, perm = sorted_rows(m, x, w, e)
        torch._dynamo.graph_break()
        return torch.zeros_like(x).index_add(0, perm // K, rows)

    report = assert_step_exact(Cut(body), [torch.randint(0, V, (B, 13))])
    assert "aten.sort.default" in [whole.name for step in report.steps for whole in step.in_full]


def loop_over_positions(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    chosen, out = F.one_hot(e, E).permute(2, 1, 0), torch.zeros_like(x)
    for i in range(E):
        place, token = torch.where(chosen[i])
        rows = F.silu(x[token] @ m.up[i]) @ m.down[i]
        out.index_add_(0, token, rows * w[token, place, None])
    return out


def loop_over_chosen_rows(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(E):
        chosen = (e == i).any(-1)
        out[chosen] = out[chosen] + F.silu(x[chosen] @ m.up[i]) @ m.down[i]
    return out


@pytest.mark.parametrize("body", [loop_over_positions, loop_over_chosen_rows], ids=lambda body: body.__name__)
def test_as_many_rows_as_the_data_say_cut_the_step(body: Callable[..., Any]) -> None:
    report = assert_step_exact(Cut(body), [torch.randint(0, V, (B, 13))])
    assert "depends on a tensor's values" in report.breaks[0].reason
    assert "test_experts.py:" in report.breaks[0].where


def test_one_leak_leaves_other_sorts_where_they_are() -> None:
    def body(m: Routed, x: Tensor, w: Tensor, e: Tensor) -> Tensor:
        return added(m, order_taken_for_natural(m, x, w, e), w, e)

    in_full = [whole.name for whole in check(body, *RUNS[0]).report.in_full]
    assert in_full.count("aten.sort.default") == 1


class BfloatExperts(nn.Module):
    """PyTorch's own grouped product, which takes bfloat16 only."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.router = nn.Embedding(V, 16), nn.Linear(16, E)
        self.weights = nn.Parameter(torch.randn(E, 16, 16))
        self.bfloat16()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).flatten(0, 1)
        w, e = self.router(x).softmax(-1).topk(K, -1)
        perm = e.flatten().argsort()
        offsets = F.one_hot(e.flatten(), E).sum(0).cumsum(0, dtype=torch.int32)
        rows = F.grouped_mm(x[perm // K], self.weights, offs=offsets) * w.flatten()[perm].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, perm // K, rows).float().square().mean()


def test_pytorchs_grouped_product_stays_on_its_rank() -> None:
    module = BfloatExperts()
    report = assert_exact(module, (torch.randint(0, V, (B, 13)),), module, rtol=3e-2).report
    assert not report.in_full, report.in_full
    assert not report.gathered, report.gathered


def test_hugging_face_models_keep_their_experts_on_a_rank(tmp_path: Path) -> None:
    """Their casts are widened to float64 as Transformers is imported, so this takes a process of its own."""
    names, root = ["mixtral (router loss)", "qwen3_moe"], Path(__file__).parent.parent
    command = [sys.executable, "benchmarks/coverage.py", "--only", ",".join(names), "--implementations", "sdpa"]
    subprocess.run(
        [*command, "--num-ranks", "3", "--json", tmp_path / "rows.json"], cwd=root, check=True, stdout=subprocess.DEVNULL
    )
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert (row["status"], row["precision"]) == ("exact", "float64"), row
        assert max(row["loss_error"], row["gradient_error"]) < 1e-10
        assert row["gathered"] == row["in_full"] == []
