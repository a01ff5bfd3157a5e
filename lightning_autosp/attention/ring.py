"""Ring: queries stay, keys and values go around, each rank adds up what it attends to in every other's.

Source: Ring Attention, arXiv:2310.01889, in zigzag order if causal. While a rank attends to the keys it has, the next ones are on
their way. In backward gradients of keys and values do not travel with them: each rank sends what it found for another's straight
back, in the type of the kernel, and the owner sums in float32; so their error does not grow with the ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_autosp.attention.blocks import BlockSum, Gradients, attend, attend_backward, wide
from lightning_autosp.attention.operators import Call, Method, across_ranks, register
from lightning_autosp.attention.zigzag import chunk_lengths, from_zigzag, held_chunks, to_zigzag
from lightning_autosp.collectives import Group, start_all_to_all, wait

__all__ = ["ring_attention"]


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    group: Group,
) -> Tensor:
    """`F.scaled_dot_product_attention` over positions that are split over the ranks of `group`, any number of heads.

    Args:
        query: This rank's queries, shape `(..., H, l, D)`.
        key: This rank's keys, shape `(..., Hk, n, D)`, `H` a multiple of `Hk`.
        value: This rank's values, shape `(..., Hk, n, Dv)`.
        is_causal: Whether position `i` attends to positions up to `i`; then there are as many keys as queries.
        scale: Factor of the scores; `None` for `1/sqrt(D)`.
        query_lengths: Every rank's number of queries.
        key_lengths: Every rank's number of keys.
        group: The sequence group.

    Returns:
        Shape `(..., H, l, Dv)`.

    Raises:
        ValueError: If causal attention has other numbers of keys than of queries.
    """
    leading = query.shape[:-3]
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if is_causal:
        require_square(query_lengths, key_lengths)
        query, key, value = to_zigzag((query, key, value), query_lengths, group)
        call = Call(True, scale, chunk_lengths(query_lengths), 1, group)
        out = from_zigzag(across_ranks("ring", query, key, value, call), query_lengths, group)
    else:
        out = across_ranks("ring", query, key, value, Call(False, scale, key_lengths, 1, group))
    return out.reshape(*leading, *out.shape[1:])


def require_square(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> None:
    if query_lengths != key_lengths:
        raise ValueError(
            f"causal attention of {query_lengths} queries to {key_lengths} keys: ranks hold different positions of the two"
        )


def _num_keys(call: Call, rank: int) -> int:
    if not call.is_causal:
        return call.lengths[rank]
    return sum(call.lengths[chunk] for chunk in held_chunks(rank, call.group.size))


def _attended(call: Call, rank: int, source: int) -> tuple[int, int, bool]:
    """Return the first of a rank's queries that attends to keys of `source`, how many of these it attends to, whether causally."""
    if not call.is_causal:
        return 0, call.lengths[source], False
    if source == rank:  # two chunks, the first before the second: causal as they lie
        return 0, _num_keys(call, source), True
    if source < rank:  # both chunks of queries lie between the two chunks of keys
        return 0, call.lengths[source], False
    return call.lengths[rank], _num_keys(call, source), False


def _pass_on(x: Tensor, arriving: int, step: int, group: Group) -> Tensor:
    """Begin to send a flat tensor `step` ranks on, and to receive one of that many elements from as far before."""
    received, sent = [0] * group.size, [0] * group.size
    received[(group.rank - step) % group.size] = arriving
    sent[(group.rank + step) % group.size] = x.numel()
    return start_all_to_all(x, received, sent, group)


def _unpacked(flat: Tensor, key: Tensor, value: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return keys and values, or their gradients, of one rank: like this rank's, but for the number of positions."""
    shapes = [(*x.shape[:2], rows, x.shape[3]) for x in (key, value)]
    parts = flat.split([torch.Size(shape).numel() for shape in shapes])
    first, second = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
    return first, second


def _packed(key: Tensor, value: Tensor) -> Tensor:
    return torch.cat([key.reshape(-1), value.reshape(-1)])


def _elements(key: Tensor, value: Tensor, rows: int) -> int:
    return int(key.shape[0] * key.shape[1] * rows * (key.shape[3] + value.shape[3]))


def _forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    ranks, rank = call.group.size, call.group.rank
    total, held = BlockSum(query, value), _packed(key, value)
    for step in range(ranks):
        source, coming = (rank - step) % ranks, held
        if step + 1 < ranks:
            coming = _pass_on(held, _elements(key, value, _num_keys(call, (source - 1) % ranks)), 1, call.group)
        keys, values = _unpacked(held, key, value, _num_keys(call, source))
        first, count, causal = _attended(call, rank, source)
        if count and first < query.shape[2] and query.shape[1]:
            out, lse = attend(query[:, :, first:], keys[:, :, :count], values[:, :, :count], causal, call.scale)
            total.add(out, lse, first)
        if step + 1 < ranks:
            held = wait(coming)
    return total.out.to(query.dtype), total.lse


def _backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, call: Call) -> Gradients:
    ranks, rank, dtype = call.group.size, call.group.rank, wide(query.dtype)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in (query, key, value))
    held = _packed(key, value)

    def add(flat: Tensor, taker: int) -> None:
        count = _attended(call, taker, rank)[1] if flat.numel() else 0
        for target, part in zip((dk, dv), _unpacked(flat, key, value, count), strict=True):
            target[:, :, :count] += part

    def attends(taker: int, source: int) -> bool:
        first, count, _ = _attended(call, taker, source)
        rows = _num_keys(call, taker) if call.is_causal else 1
        return bool(count and first < rows and query.shape[1])

    returning: tuple[Tensor, int] | None = None
    for step in range(ranks):
        source, taker, coming = (rank - step) % ranks, (rank + step) % ranks, held
        if step + 1 < ranks:
            coming = _pass_on(held, _elements(key, value, _num_keys(call, (source - 1) % ranks)), 1, call.group)
        first, count, causal = _attended(call, rank, source)
        found = held.new_empty(0)
        if attends(rank, source):
            keys, values = (x[:, :, :count] for x in _unpacked(held, key, value, _num_keys(call, source)))
            rows, own, result, weight = (x[:, :, first:] for x in (grad, query, out, lse))
            some_dq, some_dk, some_dv = attend_backward(rows, own, keys, values, result, weight, causal, call.scale)
            dq[:, :, first:] += some_dq
            found = _packed(some_dk, some_dv)
        if returning is not None:
            add(wait(returning[0]), returning[1])
        if step:
            arriving = _elements(key, value, _attended(call, taker, rank)[1]) if attends(taker, rank) else 0
            returning = _pass_on(found, arriving, -step, call.group), taker
        else:
            add(found, rank)
        if step + 1 < ranks:
            held = wait(coming)
    if returning is not None:
        add(wait(returning[0]), returning[1])
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


register("ring", Method(_forward, _backward))
