"""Ulysses within parts of the group, a ring or gathered keys across them: two dimensions of ranks, as USP has it.

Source: USP, arXiv:2405.07719. Neighbours (ranks of one node) exchange heads, where links are fast; ranks that have the same heads,
one of each part, pass keys and values on. Both dimensions are parts of one process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from lightning_autosp.attention.gather_kv import gather_kv_attention
from lightning_autosp.attention.operators import BlockMask
from lightning_autosp.attention.ring import ring_attention
from lightning_autosp.attention.rows import block_mask
from lightning_autosp.attention.ulysses import HeadShare, exchanged
from lightning_autosp.collectives import Group

__all__ = ["hybrid_attention"]


def hybrid_attention(
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
    inside: int,
    outside: Literal["ring", "gather_kv"],
    in_zigzag: bool | None = None,
) -> Tensor:
    """`F.scaled_dot_product_attention` over positions that are split over the ranks of `group`, any number of heads.

    Args:
        query: This rank's queries, shape `(..., H, l, D)`.
        key: This rank's keys, shape `(..., Hk, n, D)`, `H` a multiple of `Hk`.
        value: This rank's values, shape `(..., Hk, n, Dv)`.
        mask: As `ring_attention` takes it.
        dropout: Probability of dropping an attention weight.
        is_causal: Whether position `i` attends to positions up to `i`; then there are as many keys as queries, and no mask.
        scale: Factor of the scores; `None` for `1/sqrt(D)`.
        query_lengths: Every rank's number of queries.
        key_lengths: Every rank's number of keys.
        group: The sequence group.
        inside: Ranks that exchange heads: that many neighbours. A divisor of the group's size.
        outside: What the others do.
        in_zigzag: Of a ring, whether positions are in zigzag order meanwhile. `None`: if causal.

    Returns:
        Shape `(..., H, l, Dv)`.

    Raises:
        ValueError: If the group does not divide into parts of `inside` ranks, or what `ring_attention` and `gather_kv_attention`
            raise.
    """
    if group.size % inside:
        raise ValueError(f"{group.size} ranks do not divide into parts of {inside}")
    start = group.rank - group.rank % inside
    neighbours = group.part(range(start, start + inside))
    across = group.part(range(group.rank % inside, group.size, inside))
    queries, keys = (
        tuple(sum(lengths[i : i + inside]) for i in range(0, group.size, inside)) for lengths in (query_lengths, key_lengths)
    )

    blocks = block_mask(mask, query)

    def kernel(query: Tensor, key: Tensor, value: Tensor, shares: Sequence[HeadShare]) -> Tensor:
        first_head = shares[neighbours.rank].queries[0]
        given = (query, key, value, blocks, dropout, is_causal, scale, queries, keys, across)
        if outside == "ring":
            return ring_attention(*given, in_zigzag=in_zigzag, first_head=first_head)
        return gather_kv_attention(*given, first_head=first_head)

    of_part = slice(start, start + inside)
    return exchanged(query, key, value, kernel, query_lengths[of_part], key_lengths[of_part], neighbours)
