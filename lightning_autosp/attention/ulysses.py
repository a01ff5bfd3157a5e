"""Ulysses: exchange a shard of the sequence for a shard of the heads, attend, exchange back.

Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3. Letters: B batch, H heads, Hk key/value heads, L whole sequence, l this
rank's part, D head dimension, P ranks.

Heads need not divide by ranks: a rank has `H // P` or one more, and of keys and values those that its own queries attend to, sent
once each. With fewer heads than ranks some are sent nothing, and compute for nothing.

In chunks, a rank's heads are exchanged and attended to some at a time: what is sent, what arrives and their gradients exist of one
chunk at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_autosp.attention.tiles import run_tiles
from lightning_autosp.collectives import Group, all_to_all
from lightning_autosp.cuts import even_cuts

__all__ = [
    "HeadShare",
    "exchanged",
    "head_shares",
    "heads_to_sequence",
    "in_chunks",
    "own_heads",
    "sequence_to_heads",
    "ulysses_attention",
    "ulysses_tiles",
    "wire_elements",
]


class HeadShare(NamedTuple):
    """The heads of one rank: `[first, behind the last)` of the queries, and of the keys and values that they attend to."""

    queries: tuple[int, int]
    keys: tuple[int, int]

    def sent(self, heads: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return those of the heads that there are, and that are sent therefore: of queries, of keys and values."""
        first, behind = (min(head, heads) for head in self.queries)
        return (first, behind), self.keys if first < behind else (self.keys[0], self.keys[0])

    @property
    def num_queries(self) -> int:
        return self.queries[1] - self.queries[0]

    @property
    def num_keys(self) -> int:
        return self.keys[1] - self.keys[0]


def head_shares(heads: int, kv_heads: int, ranks: int) -> list[HeadShare]:
    """Return every rank's heads; they differ by one query head at most.

    Ranks share the queries of one head of keys and values where that gives no rank more; else those with more come first.

    With fewer heads than ranks, the last ranks have one each that is not there (numbers from `heads` on): a rank without any would
    run other operators than the rest, and meet it in other collectives.

    Raises:
        ValueError: If the query heads are no multiple of the key/value heads.
    """
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are no multiple of {kv_heads} key/value heads")
    times, most = heads // kv_heads, -(-heads // ranks)
    together = ranks // kv_heads if ranks % kv_heads == 0 else 0
    if heads >= ranks and together and -(-times // together) == most:
        counts = _even(times, together) * kv_heads
    else:
        counts = _even(max(heads, ranks), ranks)
    cuts = list(itertools.accumulate(counts, initial=0))
    shares = []
    for first, behind in itertools.pairwise(cuts):
        low = min(first // times, kv_heads - 1)
        shares.append(HeadShare((first, behind), (low, max(low + 1, min(-(-behind // times), kv_heads)))))
    return shares


def _even(number: int, parts: int) -> list[int]:
    return [stop - start for start, stop in itertools.pairwise(even_cuts(number, parts))]


def in_chunks(shares: Sequence[HeadShare], times: int, head_chunks: int) -> list[list[HeadShare]]:
    """Return every rank's heads of one chunk after the other: whole heads of keys and values, with all queries that attend to them.

    Args:
        shares: Every rank's heads.
        times: Query heads for each head of keys and values.
        head_chunks: Chunks at most. Fewer where a rank has fewer heads of keys and values; one where ranks share some.
    """
    if any(share.queries != (share.keys[0] * times, share.keys[1] * times) for share in shares):
        return [list(shares)]
    most = min(head_chunks, *(share.num_keys for share in shares))
    chunks = []
    for chunk in range(most):
        cuts = [[share.keys[0] + share.num_keys * one // most for one in (chunk, chunk + 1)] for share in shares]
        chunks.append([HeadShare((first * times, behind * times), (first, behind)) for first, behind in cuts])
    return chunks


def _cut_heads(x: Tensor, cuts: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return ranges of the heads of `(l, B, H, D)`, which may overlap.

    The tensor is split once: gradients of parts are laid side by side then; that of a slice is written to zeros of the whole.
    """
    bounds = sorted({0, x.shape[2], *itertools.chain(*cuts)})
    parts = x.split([stop - start for start, stop in itertools.pairwise(bounds)], dim=2)
    found = []
    for start, stop in cuts:
        own = parts[bounds.index(start) : bounds.index(stop)]
        found.append(own[0] if len(own) == 1 else torch.cat(own, dim=2) if own else x[:, :, :0])
    return found


def sequence_to_heads(parts: Sequence[Sequence[Tensor]], lengths: Sequence[tuple[int, ...]], group: Group) -> list[Tensor]:
    """Give up this rank's positions of other ranks' heads for all positions of this rank's heads, in one all-to-all.

    Args:
        parts: Of each tensor every rank's heads, shape `(l, B, heads, D)`; `l`, the heads and `D` may differ from one tensor to the
            next, the dtype not.
        lengths: For each tensor every rank's number of positions; `l` is this rank's.
        group: The sequence group.

    Returns:
        For each tensor shape `(B, own heads, L, D)`, `L` the sum of its lengths.
    """
    # Positions come first in what is sent, as kernels have them: with one sample nothing is copied on arrival.
    width = len(parts)
    pieces = [[part.reshape(-1) for part in some] for some in zip(*parts, strict=True)]
    shapes = []
    for source in range(group.size):
        for own, each in zip(parts, lengths, strict=True):
            shapes.append((each[source], *own[group.rank].shape[1:]))
    sizes = [torch.Size(shape).numel() for shape in shapes]
    received = [sum(sizes[i : i + width]) for i in range(0, len(sizes), width)]
    sent = [sum(piece.numel() for piece in some) for some in pieces]
    flat = all_to_all(torch.cat([piece for some in pieces for piece in some]), received, sent, group)
    blocks = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
    return [torch.cat(blocks[i::width]).permute(1, 2, 0, 3) for i in range(width)]


def heads_to_sequence(x: Tensor, shares: Sequence[tuple[int, int]], lengths: tuple[int, ...], group: Group) -> list[Tensor]:
    """Undo `sequence_to_heads` of a tensor `(B, own heads, L, D)`; return every rank's heads, `(l, B, heads, D)`."""
    batch, own, _, width = x.shape
    shapes = [(lengths[group.rank], batch, stop - start, width) for start, stop in shares]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = all_to_all(x.permute(2, 0, 1, 3).reshape(-1), sizes, [own * batch * n * width for n in lengths], group)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def ulysses_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    group: Group,
    head_chunks: int = 1,
) -> Tensor:
    """`F.scaled_dot_product_attention` over positions that are split over the ranks of `group`.

    Args:
        query: This rank's queries, shape `(..., H, l, D)`.
        key: This rank's keys, shape `(..., Hk, l, D)`, `H` a multiple of `Hk`.
        value: This rank's values, shape `(..., Hk, l, Dv)`.
        mask: The whole mask, broadcastable to `(..., H, L, L)`, bool or the query's dtype, or `None`.
        dropout: Probability of dropping an attention weight.
        is_causal: As in `F.scaled_dot_product_attention`, over the whole sequence.
        scale: Factor of the scores; `None` for `1/sqrt(D)`.
        query_lengths: Every rank's number of queries.
        key_lengths: Every rank's number of keys.
        group: The sequence group.
        head_chunks: Chunks of a rank's heads at most: see `in_chunks`.

    Returns:
        Shape `(..., H, l, Dv)`. Sends `wire_elements` elements a rank.
    """
    grouped = query.shape[-3] != key.shape[-3]  # on all ranks alike, whatever heads they have
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    num_dims, width, value_width = query.ndim, query.shape[-1], value.shape[-1]
    if num_dims == 3:  # kernels know samples
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))

    def kernel(query: Tensor, key: Tensor, value: Tensor, shares: Sequence[HeadShare]) -> Tensor:
        own = mask
        if not query.is_cuda and width != value_width:  # the CPU's kernel wants one width: zeros change no score
            query, key, value = (F.pad(x, (0, max(width, value_width) - x.shape[-1])) for x in (query, key, value))
        if mask is not None and mask.ndim > 2 and mask.shape[-3] != 1:
            own = own_heads(mask, mask.ndim - 3, shares, group.rank)
        if grouped and query.is_cuda and query.dtype not in (torch.float16, torch.bfloat16):
            # The only kernel that takes grouped heads in other types holds all scores.
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, own, dropout, is_causal, scale=scale, enable_gqa=grouped)
        return out[..., :value_width]

    out = exchanged(query, key, value, kernel, query_lengths, key_lengths, group, head_chunks)
    return out if num_dims > 3 else out.squeeze(0)


def ulysses_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    others: tuple[Tensor, ...],
    places: tuple[tuple[int, int | None], ...],
    handle: int,
    seed: tuple[Tensor, ...],
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    group: Group,
) -> Tensor:
    """Attention by a `TileProgram` over positions that are split over the ranks of `group`.

    Args:
        query: This rank's queries, shape `(..., H, l, D)`.
        key: This rank's keys, shape `(..., Hk, l, D)`.
        value: This rank's values, shape `(..., Hk, l, Dv)`.
        others: What else the program reads, whole.
        places: For each of the program's inputs, which of query, key, value and others it is and its dimension of `H` heads, if it
            has one and the program reads this rank's.
        handle: Of the program; it computes this rank's heads.
        seed: The program's seed, if it draws random numbers.
        query_lengths: Every rank's number of queries.
        key_lengths: Every rank's number of keys.
        group: The sequence group.

    Returns:
        Shape `(..., H, l, Dv)`.
    """

    def kernel(query: Tensor, key: Tensor, value: Tensor, shares: Sequence[HeadShare]) -> Tensor:
        values = (query, key, value, *others)
        own = [values[i] if dim is None or i < 3 else own_heads(values[i], dim, shares, group.rank) for i, dim in places]
        (out,) = run_tiles(handle, *seed, *own)
        return out

    return exchanged(query, key, value, kernel, query_lengths, key_lengths, group)


def exchanged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Callable[[Tensor, Tensor, Tensor, Sequence[HeadShare]], Tensor],
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    group: Group,
    head_chunks: int = 1,
) -> Tensor:
    """Call an attention kernel on all positions of this rank's heads, chunk after chunk; it is told which every rank has then.

    It is given grouped heads where on all ranks each head of keys and values is that of equally many queries, else one for each
    query. What operators run is the same on all ranks.
    """
    leading, heads, kv_heads, rank = query.shape[:-3], query.shape[-3], key.shape[-3], group.rank
    shares = head_shares(heads, kv_heads, group.size)
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    times = heads // kv_heads
    chunks = in_chunks(shares, times, head_chunks)
    # Every rank's heads of the first chunk, then of the second.
    of_queries, of_keys = zip(*(share.sent(heads) for some in chunks for share in some), strict=True)
    parts = [_cut_heads(x.permute(2, 0, 1, 3), cuts) for x, cuts in ((query, of_queries), (key, of_keys), (value, of_keys))]
    lengths = (query_lengths, key_lengths, key_lengths)
    found: list[list[Tensor]] = [[] for _ in shares]
    for index, some in enumerate(chunks):
        of_chunk = slice(index * len(some), (index + 1) * len(some))
        query, key, value = sequence_to_heads([cut[of_chunk] for cut in parts], lengths, group)
        own = query.shape[1]
        if heads < group.size:  # those without a head attend with one of zeros
            query, key, value = (torch.cat([x, x.new_zeros((x.shape[0], 1 - own, *x.shape[2:]))], 1) for x in (query, key, value))
        if any(share.num_keys > 1 and share.queries != (share.keys[0] * times, share.keys[1] * times) for share in some):
            first = some[rank].queries[0] - some[rank].keys[0] * times
            key, value = (x.repeat_interleave(times, dim=1).narrow(1, first, own) for x in (key, value))
        query, key, value = (x.reshape(*leading, *x.shape[1:]) for x in (query, key, value))
        out = kernel(query, key, value, some)
        out = out.reshape(-1, *out.shape[-3:])[:, :own]
        for of_rank, part in zip(found, heads_to_sequence(out, of_queries[of_chunk], query_lengths, group), strict=True):
            of_rank.append(part)
    out = torch.cat([part for of_rank in found for part in of_rank], dim=2).permute(1, 2, 0, 3)
    return out.reshape(*leading, *out.shape[1:])


def own_heads(x: Tensor, dim: int, shares: Sequence[HeadShare], rank: int) -> Tensor:
    """Return a rank's query heads of a whole tensor, zeros where they are not there."""
    missing = shares[-1].queries[1] - x.shape[dim]
    if missing:
        x = torch.cat([x, x.new_zeros((*x.shape[:dim], missing, *x.shape[dim + 1 :]))], dim=dim)
    return x.narrow(dim, shares[rank].queries[0], shares[rank].num_queries)


def wire_elements(
    batch: int,
    heads: int,
    kv_heads: int,
    lengths: Sequence[int],
    width: int,
    value_width: int,
    rank: int,
    *,
    backward: bool = False,
) -> int:
    """Return the elements that a rank sends to others in one forward pass, or in backward, with as many keys as queries.

    Args:
        batch: Samples.
        heads: Query heads.
        kv_heads: Key/value heads.
        lengths: Every rank's number of positions.
        width: Of a head of queries and keys.
        value_width: Of a head of values.
        rank: Which.
        backward: Whether it is backward, which sends what forward received.
    """
    sent = [share.sent(heads) for share in head_shares(heads, kv_heads, len(lengths))]
    queries, keys = ([behind - first for first, behind in one] for one in zip(*sent, strict=True))
    given = [queries[r] * width + keys[r] * (width + value_width) for r in range(len(lengths))]
    made = [queries[r] * value_width for r in range(len(lengths))]
    if backward:
        given, made = made, given
    of_others, positions = sum(given) - given[rank], sum(lengths) - lengths[rank]
    return batch * (lengths[rank] * of_others + made[rank] * positions)
