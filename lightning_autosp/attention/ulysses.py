"""Ulysses: exchange a shard of the sequence for a shard of the heads, attend, exchange back.

Source: DeepSpeed-Ulysses, arXiv:2309.14509, section 3. Letters: B batch, H heads, L whole sequence, l this rank's part, D
head dimension, P ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_autosp.attention.tiles import run_tiles
from lightning_autosp.collectives import Group, all_to_all

__all__ = [
    "exchanged",
    "heads_to_sequence",
    "own_heads",
    "sequence_to_heads",
    "ulysses_attention",
    "ulysses_tiles",
    "wire_elements",
]


def sequence_to_heads(x: Tensor, lengths: tuple[int, ...], group: Group) -> Tensor:
    """Give up this rank's positions of all heads for all positions of this rank's heads.

    Args:
        x: Shape `(B, H, l, D)`, `l == lengths[group.rank]`, `H % P == 0`.
        lengths: Every rank's number of positions.
        group: The sequence group.

    Returns:
        Shape `(B, H/P, L, D)`, `L == sum(lengths)`.
    """
    batch, heads, length, width = x.shape
    own = heads // group.size
    sizes = [own * batch * n * width for n in lengths]
    flat = x.transpose(0, 1).reshape(-1)
    flat = all_to_all(flat, sizes, [own * batch * length * width] * group.size, group)
    blocks = [part.view(own, batch, n, width) for part, n in zip(flat.split(sizes), lengths, strict=True)]
    return torch.cat(blocks, dim=2).transpose(0, 1)


def heads_to_sequence(x: Tensor, lengths: tuple[int, ...], group: Group) -> Tensor:
    """Undo `sequence_to_heads`: shape `(B, H/P, L, D)` to `(B, H, l, D)`."""
    batch, own, _, width = x.shape
    length = lengths[group.rank]
    parts = [part.reshape(-1) for part in x.transpose(0, 1).split(lengths, dim=2)]
    sizes = [own * batch * n * width for n in lengths]
    flat = all_to_all(torch.cat(parts), [own * batch * length * width] * group.size, sizes, group)
    return flat.view(group.size * own, batch, length, width).transpose(0, 1)


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
) -> Tensor:
    """`F.scaled_dot_product_attention` over positions that are split over the ranks of `group`.

    Any head count works: key/value heads are repeated when they do not divide by the group size, and heads are padded with zeros,
    dropped again at the end, when the query heads do not.

    Args:
        query: This rank's queries, shape `(..., H, l, D)`.
        key: This rank's keys, shape `(..., Hk, l, D)`.
        value: This rank's values, shape `(..., Hk, l, Dv)`.
        mask: The whole mask, broadcastable to `(..., H, L, L)`, bool or the query's dtype, or `None`.
        dropout: Probability of dropping an attention weight.
        is_causal: As in `F.scaled_dot_product_attention`, over the whole sequence.
        scale: Factor of the scores; `None` for `1/sqrt(D)`.
        query_lengths: Every rank's number of queries.
        key_lengths: Every rank's number of keys.
        group: The sequence group.

    Returns:
        Shape `(..., H, l, Dv)`. Sends `wire_elements` elements a rank.
    """

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        own = mask
        if mask is not None and mask.ndim > 2 and mask.shape[-3] != 1:
            own = own_heads(mask, mask.ndim - 3, group)
        grouped = query.shape[-3] != key.shape[-3]
        if grouped and query.is_cuda and query.dtype not in (torch.float16, torch.bfloat16):
            # The only kernel that takes grouped heads in other types holds all scores.
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
            grouped = False
        return F.scaled_dot_product_attention(query, key, value, own, dropout, is_causal, scale=scale, enable_gqa=grouped)

    return exchanged(query, key, value, kernel, query_lengths, key_lengths, group)


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
        handle: Of the program; it computes this rank's heads, `H` padded to a multiple of the group's size and divided by it.
        seed: The program's seed, if it draws random numbers.
        query_lengths: Every rank's number of queries.
        key_lengths: Every rank's number of keys.
        group: The sequence group.

    Returns:
        Shape `(..., H, l, Dv)`.
    """

    def kernel(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        values = (query, key, value, *others)
        own = [values[i] if dim is None or i < 3 else own_heads(values[i], dim, group) for i, dim in places]
        (out,) = run_tiles(handle, *seed, *own)
        return out

    return exchanged(query, key, value, kernel, query_lengths, key_lengths, group)


def exchanged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Callable[[Tensor, Tensor, Tensor], Tensor],
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    group: Group,
) -> Tensor:
    """Call an attention kernel on all positions of this rank's heads."""
    leading, heads, ranks = query.shape[:-3], query.shape[-3], group.size
    if key.shape[-3] != heads and (key.shape[-3] % ranks or heads % ranks):
        key, value = (x.repeat_interleave(heads // x.shape[-3], dim=-3) for x in (key, value))
    padding = -heads % ranks
    if padding:
        query, key, value = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (query, key, value))

    def all_positions(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
        x = sequence_to_heads(x.reshape(-1, *x.shape[-3:]), lengths, group)
        return x.reshape(*leading, *x.shape[1:])

    out = kernel(all_positions(query, query_lengths), all_positions(key, key_lengths), all_positions(value, key_lengths))
    out = heads_to_sequence(out.reshape(-1, *out.shape[-3:]), query_lengths, group)[:, :heads]
    return out.reshape(*leading, *out.shape[1:])


def own_heads(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's heads of a whole tensor, heads padded with zeros to a multiple of the group's size."""
    own = -(-x.shape[dim] // group.size)
    missing = own * group.size - x.shape[dim]
    if missing:
        x = torch.cat([x, x.new_zeros((*x.shape[:dim], missing, *x.shape[dim + 1 :]))], dim=dim)
    return x.narrow(dim, group.rank * own, own)


def wire_elements(batch: int, heads: int, kv_heads: int, length: int, width: int, value_width: int, ranks: int) -> int:
    """Return the elements a rank sends in one forward pass: a share `(P-1)/P` of its part of q, k, v and the output."""
    if kv_heads != heads and (kv_heads % ranks or heads % ranks):
        kv_heads = heads
    padding = -heads % ranks
    heads, kv_heads = heads + padding, kv_heads + (padding if kv_heads == heads else 0)
    per_token = (heads + kv_heads) * (width + value_width)
    return batch * (length // ranks) * per_token * (ranks - 1) // ranks
