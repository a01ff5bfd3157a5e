"""Zigzag order: the sequence in `2 P` chunks, of which rank `r` holds number `r` and number `2 P - 1 - r`.

Under a causal mask late positions attend to more than early ones; one chunk from either end makes all ranks alike. Source: the
head-tail order of Megatron-LM's context parallelism and of zhuzilin/ring-flash-attention.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_autosp.collectives import Group, all_to_all

__all__ = ["chunk_lengths", "from_zigzag", "held_chunks", "to_zigzag"]


def chunk_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths of the `2 P` chunks: each rank's part in natural order is two of them."""
    return tuple(half for length in lengths for half in (length - length // 2, length // 2))


def held_chunks(rank: int, ranks: int) -> tuple[int, int]:
    """Return the numbers of the chunks that a rank holds in zigzag order."""
    return rank, 2 * ranks - 1 - rank


def _owner(chunk: int, ranks: int) -> int:
    return min(chunk, 2 * ranks - 1 - chunk)


def _plan(lengths: tuple[int, ...], group: Group) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Return this rank's chunks, `(start, length)` in its natural part, in the order they are sent; rows sent to and from each."""
    ranks, rank, chunks = group.size, group.rank, chunk_lengths(lengths)
    own = [(0, chunks[2 * rank]), (chunks[2 * rank], chunks[2 * rank + 1])]
    owners = [_owner(2 * rank, ranks), _owner(2 * rank + 1, ranks)]
    sent, received = [0] * ranks, [0] * ranks
    for owner, (_, length) in zip(owners, own, strict=True):
        sent[owner] += length
    for chunk in held_chunks(rank, ranks):
        received[chunk // 2] += chunks[chunk]
    return (own if owners[0] <= owners[1] else own[::-1]), sent, received


def to_zigzag(tensors: Sequence[Tensor], lengths: tuple[int, ...], group: Group) -> list[Tensor]:
    """Exchange this rank's natural part of the sequence for its part in zigzag order, in one all-to-all.

    Args:
        tensors: Each of shape `(B, H, l, D)`, of the same positions; `H` and `D` may differ, the dtype not.
        lengths: Every rank's number of positions in natural order.
        group: The group.

    Returns:
        For each tensor shape `(B, H, l', D)`, chunks in ascending order.
    """
    order, sent, received = _plan(lengths, group)
    rows = torch.cat([x.permute(2, 0, 1, 3).flatten(1) for x in tensors], dim=1)
    rows = torch.cat([rows.narrow(0, start, length) for start, length in order])
    parts = all_to_all(rows, received, sent, group).split([x.shape[0] * x.shape[1] * x.shape[3] for x in tensors], dim=1)
    return [
        part.unflatten(1, (x.shape[0], x.shape[1], x.shape[3])).permute(1, 2, 0, 3) for part, x in zip(parts, tensors, strict=True)
    ]


def from_zigzag(x: Tensor, lengths: tuple[int, ...], group: Group) -> Tensor:
    """Undo `to_zigzag` of one tensor: shape `(B, H, l', D)` to `(B, H, l, D)`."""
    order, sent, received = _plan(lengths, group)
    rows = all_to_all(x.permute(2, 0, 1, 3), sent, received, group).split([length for _, length in order])
    first, second = rows if order[0][0] == 0 else rows[::-1]
    return torch.cat([first, second]).permute(1, 2, 0, 3)
