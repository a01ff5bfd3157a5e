"""Ulysses by hand: attention of all positions for some of the heads, between two all-to-alls."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from lightning_autosp.collectives import Group, all_to_all

NAME = "ulysses_by_hand"
"""What a configuration's `attn_implementation` is to be. Transformers makes no mask for names it has no mask for."""


def to_heads(x: Tensor, group: Group) -> Tensor:
    """Turn all heads of this rank's positions `(B, H, s, D)` into this rank's heads of all positions `(B, H / P, P * s, D)`."""
    ones = (1,) * group.size
    parts = x.unflatten(1, (group.size, -1)).movedim(1, 0).contiguous()
    return all_to_all(parts, ones, ones, group).movedim(0, 2).flatten(2, 3)


def to_positions(x: Tensor, group: Group) -> Tensor:
    """Turn them back."""
    ones = (1,) * group.size
    parts = x.unflatten(2, (group.size, -1)).movedim(2, 0).contiguous()
    return all_to_all(parts, ones, ones, group).movedim(0, 1).flatten(1, 2)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    group: Group | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend causally; heads of keys and values are repeated where there are fewer of them than ranks.

    Args:
        module: The attention layer.
        query: `(B, H, s, D)`, this rank's positions.
        key: `(B, K, s, D)`.
        value: Likewise.
        attention_mask: None is made.
        scaling: Of the scores.
        group: Of the ranks; `None`: what is given is all.
        options: Others of Transformers.

    Returns:
        `(B, s, H, D)`, and no weights.

    Raises:
        ValueError: If the heads cannot be dealt evenly.
    """
    if group is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    heads, kv_heads, ranks = query.shape[1], key.shape[1], group.size
    copies = max(1, ranks // kv_heads)
    if heads % ranks or (kv_heads * copies) % ranks:
        raise ValueError(f"{heads}:{kv_heads} heads cannot be dealt to {ranks} ranks evenly: choose a divisor of {heads}")
    key, value = (x.repeat_interleave(copies, 1) if copies > 1 else x for x in (key, value))
    q, k, v = (to_heads(x, group) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    return to_positions(out, group).transpose(1, 2), None


AttentionInterface.register(NAME, attention)
