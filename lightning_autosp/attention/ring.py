"""Ring: queries stay, keys and values go around, each rank adds up what it attends to in every other's.

Source: Ring Attention, arXiv:2310.01889, in zigzag order if causal. While a rank attends to the keys it has, the next ones are on
their way. In backward gradients of keys and values do not travel with them: each rank sends what it found for another's straight
back, in the type of the keys, and the owner sums in float32; so their error does not grow with the ring.

Under a mask, blocks that hold nothing to attend to are left out. Keys go no further than to the last rank that needs some of them;
where that passes by ranks that do not, owners send them straight to those that do. A hop that brings nothing to anyone is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_autosp.attention.blocks import BlockSum, Gradients, Pairs, attend, attend_backward, wide
from lightning_autosp.attention.operators import BlockMask, Call, Method, across_ranks, register
from lightning_autosp.attention.rows import MaskedRows, block_mask, dropped, masked_rows, needs
from lightning_autosp.attention.zigzag import chunk_lengths, from_zigzag, to_zigzag
from lightning_autosp.collectives import Group, start_all_to_all, wait

__all__ = ["Route", "ring_attention"]


def ring_attention(
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
    in_zigzag: bool | None = None,
    first_head: int = 0,
) -> Tensor:
    """`F.scaled_dot_product_attention` over positions that are split over the ranks of `group`, any number of heads.

    Args:
        query: This rank's queries, shape `(..., H, l, D)`.
        key: This rank's keys, shape `(..., Hk, n, D)`, `H` a multiple of `Hk`.
        value: This rank's values, shape `(..., Hk, n, Dv)`.
        mask: The whole mask, bool, broadcastable to `(..., H, L, N)`, or what computes it a block at a time, or `None`. Whole or
            computed, the same on all ranks.
        dropout: Probability of dropping an attention weight.
        is_causal: Whether position `i` attends to positions up to `i`; then there are as many keys as queries, and no mask.
        scale: Factor of the scores; `None` for `1/sqrt(D)`.
        query_lengths: Every rank's number of queries.
        key_lengths: Every rank's number of keys.
        group: The sequence group.
        in_zigzag: Whether positions are in zigzag order meanwhile. `None`: if causal.
        first_head: The number of the first query head, of those that the mask knows.

    Returns:
        Shape `(..., H, l, Dv)`.

    Raises:
        ValueError: If causal attention, or zigzag order, has other numbers of keys than of queries, causal attention has a mask,
            or the mask is not bool.
    """
    if is_causal and mask is not None:
        raise ValueError("causal attention with a mask: one of the two, as for one device")
    leading, mask = query.shape[:-3], block_mask(mask, query)
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    call = Call(is_causal, scale, query_lengths, key_lengths, group, first_head=first_head, dropout=dropout)
    if is_causal or in_zigzag:
        require_square(query_lengths, key_lengths)
        query, key, value = to_zigzag((query, key, value), query_lengths, group)
        call = call._replace(query_lengths=chunk_lengths(query_lengths), key_lengths=chunk_lengths(key_lengths))
        out = from_zigzag(across_ranks("ring", query, key, value, mask, call), query_lengths, group)
    else:
        out = across_ranks("ring", query, key, value, mask, call)
    return out.reshape(*leading, *out.shape[1:])


def require_square(query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> None:
    if query_lengths != key_lengths:
        raise ValueError(
            f"causal attention of {query_lengths} queries to {key_lengths} keys: ranks hold different positions of the two"
        )


class Route:
    """How blocks of keys get to the ranks that need them.

    Args:
        needs: For every rank whether it needs some of the keys of every other.
    """

    def __init__(self, needs: Sequence[Sequence[bool]]) -> None:
        ranks = range(len(needs))
        self.needs = needs
        self._reach = [max((hop for hop in ranks if needs[(source + hop) % len(needs)][source]), default=0) for source in ranks]
        straight = sum(needs[taker][source] for taker in ranks for source in ranks if taker != source)
        self.passed_on = sum(self._reach) == straight
        """Whether ranks pass on what came, from neighbour to neighbour; else owners send what is needed."""

    def comes(self, hop: int, source: int) -> bool:
        """Whether the keys of a rank come, at that hop, to the rank that is as many further."""
        if self.passed_on:
            return self._reach[source] >= hop
        return self.needs[(source + hop) % len(self.needs)][source]

    def is_empty(self, hop: int) -> bool:
        return not any(self.comes(hop, source) for source in range(len(self.needs)))

    def sent(self, rank: int) -> int:
        """Return how many blocks of keys a rank sends."""
        return sum(
            self.comes(hop, (rank - hop + 1 if self.passed_on else rank) % len(self.needs)) for hop in range(1, len(self.needs))
        )


def _num_keys(call: Call, rank: int) -> int:
    return sum(call.key_lengths[chunk] for chunk in call.chunks(rank))


def _attended(call: Call, rank: int, source: int) -> tuple[int, int, bool]:
    """Return the first of a rank's queries that attends to keys of `source`, how many of these it attends to, whether causally.

    That is without a mask.
    """
    lengths = call.key_lengths
    if not call.is_causal:
        return 0, _num_keys(call, source), False
    if source == rank:  # two chunks, the first before the second: causal as they lie
        return 0, _num_keys(call, source), True
    if source < rank:  # both chunks of queries lie between the two chunks of keys
        return 0, lengths[source], False
    return lengths[rank], _num_keys(call, source), False


class _Around:
    """One call on one rank: its blocks, and what comes and goes."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, others: Sequence[Tensor], call: Call) -> None:
        self.query, self.key, self.value, self.others, self.call = query, key, value, others, call
        self.ranks, self.rank = call.group.size, call.group.rank
        self.rows: MaskedRows | None = masked_rows(call, others)
        ranks = range(self.ranks)
        found = (
            [[self._attends(taker, source) for source in ranks] for taker in ranks] if self.rows is None else needs(call, self.rows)
        )
        self.route = Route(found)

    def _attends(self, taker: int, source: int) -> bool:
        first, count, _ = _attended(self.call, taker, source)
        return bool(count and first < sum(self.call.query_lengths[chunk] for chunk in self.call.chunks(taker)))

    def num_attended(self, taker: int, source: int) -> int:
        """Return how many of the keys of `source`, from the first, a rank may give gradients for."""
        if not self.route.needs[taker][source]:
            return 0
        return _attended(self.call, taker, source)[1] if self.rows is None else _num_keys(self.call, source)

    def blocks(self, source: int) -> Iterator[tuple[slice, slice, Pairs]]:
        """Go through what this rank attends to of the keys of `source`: its queries, the keys, and what is said of pairs."""
        call, others, scale = self.call, self.others, self.call.scale
        if not self.route.needs[self.rank][source] or not self.query.shape[1]:
            return
        if self.rows is None:
            first, count, causal = _attended(call, self.rank, source)
            yield slice(first, self.query.shape[2]), slice(0, count), Pairs(causal, scale, None, dropped(call, others, source))
            return
        begin = 0
        for chunk in call.chunks(source):
            low = sum(call.key_lengths[:chunk])
            for start, stop, row, first, behind in self.rows.blocks(low, low + call.key_lengths[chunk]):
                mask = self.rows.mask(row, stop - start, first, behind, (0, self.query.shape[1]))
                pairs = Pairs(False, scale, mask, dropped(call, others, row, first))
                yield slice(start, stop), slice(first - low + begin, behind - low + begin), pairs
            begin += call.key_lengths[chunk]

    def held(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Go through `(rank, its keys, its values)`, this one's first; the next come while one is looked at."""
        held = _packed(self.key, self.value)
        own = None if self.route.passed_on else held
        for hop in range(self.ranks):
            source, coming = (self.rank - hop) % self.ranks, None
            if hop + 1 < self.ranks and not self.route.is_empty(hop + 1):
                coming = self._begin(hop + 1, held if own is None else own)
            rows = _num_keys(self.call, source) if held.numel() else 0
            yield source, *_unpacked(held, self.key, self.value, rows)
            held = self.key.new_empty(0) if coming is None else wait(coming)

    def _begin(self, hop: int, x: Tensor) -> Tensor:
        """Begin to send keys and values so that those of the rank that is `hop` before arrive."""
        route, source = self.route, (self.rank - hop) % self.ranks
        arriving = _elements(self.key, self.value, _num_keys(self.call, source)) if route.comes(hop, source) else 0
        sent = (source + 1) % self.ranks if route.passed_on else self.rank
        x = x if route.comes(hop, sent) else x.new_empty(0)
        return _pass_on(x, arriving, 1 if route.passed_on else hop, self.call.group)

    def give_back(self, found: Tensor, hop: int) -> Tensor | None:
        """Begin to return gradients to the rank that is `hop` before, and to receive those that the one as far behind found."""
        ranks = range(self.ranks)
        if not any(self.route.needs[(source + hop) % self.ranks][source] for source in ranks):
            return None
        arriving = _elements(self.key, self.value, self.num_attended((self.rank + hop) % self.ranks, self.rank))
        return _pass_on(found, arriving, -hop, self.call.group)


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


def _forward(query: Tensor, key: Tensor, value: Tensor, others: Sequence[Tensor], call: Call) -> tuple[Tensor, Tensor]:
    around, total = _Around(query, key, value, others, call), BlockSum(query, value)
    for source, keys, values in around.held():
        for rows, columns, pairs in around.blocks(source):
            total.add(*attend(query[:, :, rows], keys[:, :, columns], values[:, :, columns], pairs), rows.start)
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
    around, dtype = _Around(query, key, value, others, call), wide(query.dtype)
    ranks, rank = call.group.size, call.group.rank
    dq, dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in (query, key, value))
    returning: Tensor | None = None

    def add(flat: Tensor, hop: int) -> None:
        """Add what the rank that is `hop` further found for this one."""
        count = around.num_attended((rank + hop) % ranks, rank)
        for target, part in zip((dk, dv), _unpacked(flat, key, value, count), strict=True):
            target[:, :, :count] += part

    for hop, (source, keys, values) in enumerate(around.held()):
        count = around.num_attended(rank, source)
        sums = [x.new_zeros((*x.shape[:2], count, x.shape[3]), dtype=dtype) for x in (key, value)] if hop else [dk, dv]
        for rows, columns, pairs in around.blocks(source):
            keys_of_block, values_of_block = keys[:, :, columns], values[:, :, columns]
            own, some, result, weight = (x[:, :, rows] for x in (grad, query, out, lse))
            found = attend_backward(own, some, keys_of_block, values_of_block, result, weight, pairs)
            for target, part in zip((dq[:, :, rows], sums[0][:, :, columns], sums[1][:, :, columns]), found, strict=True):
                target += part
        if returning is not None:
            add(wait(returning), hop - 1)
        returning = around.give_back(_packed(*sums).to(key.dtype), hop) if hop else None
    if returning is not None:
        add(wait(returning), ranks - 1)
    return dq.to(query.dtype), dk.to(key.dtype), dv.to(value.dtype)


register("ring", Method(_forward, _backward))
