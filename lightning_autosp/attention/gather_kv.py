"""Queries stay, keys and values of all ranks, or of the neighbours, are gathered.

Mostly this is one operator: heads of keys and values are gathered a group at a time, the next while one is attended to, and again
in backward, so that no rank holds all of them; causal queries are in zigzag order. What is added to scores, and what is computed in
tiles, runs on rows of its own: the mask's rows of this rank, all keys or those in a window.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_autosp.attention.blocks import BlockSum, Gradients, Pairs, attend, attend_backward, wide
from lightning_autosp.attention.operators import BlockMask, Call, Method, across_ranks, register
from lightning_autosp.attention.ring import require_square
from lightning_autosp.attention.rows import MaskedRows, block_mask, dropped, masked_rows
from lightning_autosp.attention.tiles import run_tiles
from lightning_autosp.attention.zigzag import chunk_lengths, from_zigzag, to_zigzag
from lightning_autosp.collectives import Group, all_gather_sequence, start_all_gather, start_all_to_all, wait
from lightning_autosp.cuts import even_cuts
from lightning_autosp.exchange import fetch

__all__ = ["CHUNK_BYTES", "gather_kv_attention", "gather_kv_tiles", "head_chunks_for"]

CHUNK_BYTES = 2**28
"""Of whole keys and values that a rank holds at once, if nothing else is said: heads are gathered in as many groups as it takes."""


def gather_kv_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | BlockMask | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    group: Group,
    head_chunks: int | None = None,
    first_head: int = 0,
) -> Tensor:
    """`F.scaled_dot_product_attention` over positions that are split over the ranks of `group`, any number of heads.

    Args:
        query: This rank's queries, shape `(..., H, l, D)`.
        key: This rank's keys, shape `(..., Hk, n, D)`, `H` a multiple of `Hk`.
        value: This rank's values, shape `(..., Hk, n, Dv)`.
        mask: The whole mask, broadcastable to `(..., H, L, N)`, bool or the query's dtype, or what computes it a block at a time,
            or `None`. Whole or computed, the same on all ranks.
        dropout: Probability of dropping an attention weight.
        is_causal: Whether position `i` attends to positions up to `i`; then there are as many keys as queries, and no mask.
        scale: Factor of the scores; `None` for `1/sqrt(D)`.
        query_lengths: Every rank's number of queries.
        key_lengths: Every rank's number of keys.
        group: The sequence group.
        head_chunks: Into how many groups heads of keys and values are divided, where nothing is added to scores. `None`: as many as
            keep each below `CHUNK_BYTES`.
        first_head: The number of the first query head, of those that a mask knows that is computed in blocks.

    Returns:
        Shape `(..., H, l, Dv)`.

    Raises:
        ValueError: If causal attention has other numbers of keys than of queries, or a mask.
    """
    if is_causal and mask is not None:
        raise ValueError("causal attention with a mask: one of the two, as for one device")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    leading = query.shape[:-3]
    if isinstance(mask, Tensor) and (mask.dtype is not torch.bool or len(leading) > 1):
        key, value = (all_gather_sequence(x, x.ndim - 2, key_lengths, group) for x in (key, value))
        if mask.ndim > 1 and mask.shape[-2] != 1:
            mask = mask.narrow(-2, sum(query_lengths[: group.rank]), query_lengths[group.rank])
        grouped = query.shape[-3] != key.shape[-3]
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale, enable_gqa=grouped)
    mask = block_mask(mask, query)
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    chunks = head_chunks_for(key, value, sum(key_lengths)) if head_chunks is None else min(head_chunks, key.shape[1])
    call = Call(is_causal, scale, query_lengths, key_lengths, group, chunks, first_head=first_head, dropout=dropout)
    if is_causal:
        require_square(query_lengths, key_lengths)
        (query,) = to_zigzag((query,), query_lengths, group)
        call = call._replace(query_lengths=chunk_lengths(query_lengths))
        out = from_zigzag(across_ranks("gather_kv", query, key, value, mask, call), query_lengths, group)
    else:
        out = across_ranks("gather_kv", query, key, value, mask, call)
    return out.reshape(*leading, *out.shape[1:])


def head_chunks_for(key: Tensor, value: Tensor, num_keys: int) -> int:
    """Return into how many groups the heads of keys and values have to be divided so that one is below `CHUNK_BYTES`."""
    size = key.shape[0] * key.shape[1] * num_keys * (key.shape[3] + value.shape[3]) * key.element_size()
    return max(1, min(key.shape[1], -(-size // CHUNK_BYTES)))


def gather_kv_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    others: tuple[Tensor, ...],
    places: tuple[tuple[int, tuple[int, int, int] | None, int | None], ...],
    handle: int,
    seed: tuple[Tensor, ...],
    columns: tuple[tuple[int, int], ...] | None,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    group: Group,
) -> Tensor:
    """Attention by a `TileProgram` over positions that are split over the ranks of `group`.

    Args:
        query: This rank's queries, shape `(..., H, l, D)`.
        key: This rank's keys, shape `(..., Hk, n, D)`.
        value: This rank's values, shape `(..., Hk, n, Dv)`.
        others: What else the program reads, whole.
        places: For each of the program's inputs, which of query, key, value and others it is, `(dim, outer, inner)` of its rows if
            the program reads this rank's, and its dimension of columns if it reads those that are attended to.
        handle: Of the program; it computes this rank's rows.
        seed: The program's seed, if it draws random numbers.
        columns: For each rank which keys its queries attend to, `(first, behind the last)`; `None`: all.
        query_lengths: Every rank's number of queries.
        key_lengths: Every rank's number of keys.
        group: The sequence group.

    Returns:
        Shape `(..., H, l, Dv)`.
    """
    dim = key.ndim - 2
    if columns is None:
        key, value = (all_gather_sequence(x, dim, key_lengths, group).contiguous() for x in (key, value))
    else:
        bounds = list(itertools.pairwise(itertools.accumulate(key_lengths, initial=0)))
        wanted = [((first, behind, 1),) for first, behind in columns]
        key, value = (fetch(x, dim, bounds, wanted, group).contiguous() for x in (key, value))
    first_row = sum(query_lengths[: group.rank])
    values = (query, key, value, *others)

    def own(index: int, rows: tuple[int, int, int] | None, column_dim: int | None) -> Tensor:
        x = values[index]
        if index < 3:
            return x
        if rows is not None:
            where, outer, inner = rows
            x = x.unflatten(where, (outer, -1, inner)).narrow(where + 1, first_row, query_lengths[group.rank])
            x = x.flatten(where, where + 2)
        if column_dim is not None and columns is not None:
            first, behind = columns[group.rank]
            x = x.narrow(column_dim, first, behind - first)
        return x

    (out,) = run_tiles(handle, *seed, *(own(*place) for place in places))
    return out


def _heads(key: Tensor, call: Call) -> list[tuple[int, int]]:
    """Return the groups of heads of keys and values."""
    return list(itertools.pairwise(even_cuts(key.shape[1], call.head_chunks)))


def _gathered(key: Tensor, value: Tensor, call: Call) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Go through `(first head, behind the last, whole keys, whole values)`; the next heads come while one is looked at."""
    lengths, most = call.key_lengths, max(call.key_lengths)

    def start(first: int, behind: int) -> Tensor:
        rows = torch.cat([key[:, first:behind], value[:, first:behind]], dim=3).permute(2, 0, 1, 3)
        return start_all_gather(F.pad(rows, (0, 0) * 3 + (0, most - rows.shape[0])), call.group)

    heads = _heads(key, call)
    coming = start(*heads[0])
    for index, (first, behind) in enumerate(heads):
        rows = wait(coming)
        if index + 1 < len(heads):
            coming = start(*heads[index + 1])
        if len(set(lengths)) > 1:
            rows = torch.cat([part[:length] for part, length in zip(rows.split(most), lengths, strict=True)])
        keys, values = rows.permute(1, 2, 0, 3).split([key.shape[3], value.shape[3]], dim=3)
        yield first, behind, keys, values


def _blocks(others: Sequence[Tensor], call: Call, rows: MaskedRows | None, heads: slice) -> Iterator[tuple[slice, slice, Pairs]]:
    """Go through what this rank computes for some heads: its queries, whole keys, and what is said of pairs."""
    if rows is not None:
        for start, stop, row, low, high in rows.ranges:
            mask = rows.mask(row, stop - start, low, high, (heads.start, heads.stop))
            yield slice(start, stop), slice(low, high), Pairs(False, call.scale, mask, dropped(call, others, row, heads.start))
        return
    found, start = [], 0
    for chunk in call.chunks(call.group.rank):
        place, length = sum(call.query_lengths[:chunk]), call.query_lengths[chunk]
        some = slice(start, start + length)
        if call.is_causal:
            found += [(some, slice(0, place), False), (some, slice(place, place + length), True)]
        else:
            found.append((some, slice(0, sum(call.key_lengths)), False))
        start += length
    for some, columns, causal in found:
        if some.start < some.stop and columns.start < columns.stop:
            yield some, columns, Pairs(causal, call.scale, None, dropped(call, others, some.start, columns.start, heads.start))


def _forward(query: Tensor, key: Tensor, value: Tensor, others: Sequence[Tensor], call: Call) -> tuple[Tensor, Tensor]:
    times, total = query.shape[1] // key.shape[1], BlockSum(query, value)
    masked = masked_rows(call, others)
    for first, behind, keys, values in _gathered(key, value, call):
        heads = slice(first * times, behind * times)
        for rows, columns, pairs in _blocks(others, call, masked, heads):
            out, lse = attend(query[:, heads, rows], keys[:, :, columns], values[:, :, columns], pairs)
            total.add(out, lse, rows.start, heads)
    return total.out.to(query.dtype), total.lse


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    others: Sequence[Tensor],
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    call: Call,
) -> Gradients:
    times, dtype, lengths = query.shape[1] // key.shape[1], wide(query.dtype), call.key_lengths
    rank, sizes = call.group.rank, key.shape[3] + value.shape[3]
    dq = query.new_zeros(query.shape, dtype=dtype)
    dk, dv, masked = key.new_empty(key.shape), value.new_empty(value.shape), masked_rows(call, others)
    for first, behind, keys, values in _gathered(key, value, call):
        heads = slice(first * times, behind * times)
        sums = keys.new_zeros((sum(lengths), key.shape[0], behind - first, sizes), dtype=dtype)
        dks, dvs = sums.permute(1, 2, 0, 3).split([key.shape[3], value.shape[3]], dim=3)
        for rows, columns, pairs in _blocks(others, call, masked, heads):
            block = keys[:, :, columns], values[:, :, columns]
            own, some, result, weight = (x[:, heads, rows] for x in (grad, query, out, lse))
            found = attend_backward(own, some, *block, result, weight, pairs)
            for target, part in zip((dq[:, heads, rows], dks[:, :, columns], dvs[:, :, columns]), found, strict=True):
                target += part
        # Sent in the type of the keys, but summed in the wide one.
        received = [lengths[rank]] * call.group.size
        parts = wait(start_all_to_all(sums.to(key.dtype), received, lengths, call.group))
        mine = parts.unflatten(0, (call.group.size, -1)).sum(0, dtype=dtype).permute(1, 2, 0, 3).to(key.dtype)
        dk[:, first:behind], dv[:, first:behind] = mine.split([key.shape[3], value.shape[3]], dim=3)
    return dq.to(query.dtype), dk, dv


register("gather_kv", Method(_forward, _backward))
