"""Which method computes an attention call: what each would take, from sizes alone, so that all ranks choose alike.

A model, not a measurement: arithmetic of the busiest rank at a part of the device's peak, bytes it sends over the links that they
cross, and a fixed time for each exchange. Forward and backward are counted, also where there will be no backward, so that training
and validation do the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_autosp.attention.ring import Route
from lightning_autosp.attention.tiles import ColumnBounds
from lightning_autosp.attention.ulysses import head_shares, wire_elements
from lightning_autosp.attention.zigzag import chunk_lengths, held_chunks

__all__ = ["AttentionMethod", "AttentionMethodError", "AttentionOptions", "Choice", "Offer", "Work", "choose", "halo"]

AttentionMethod = Literal["auto", "ulysses", "gather_kv", "ring", "hybrid"]

METHODS = get_args(AttentionMethod)[1:]
"""Of equal ones the first is chosen."""

KERNEL_SHARE = 0.6
"""Of a device's peak that attention kernels reach."""

RING_SHARE = 0.75
"""Of the kernels' speed that is left in a ring, whose kernels are smaller and whose results are added up. MagiAttention's own
measurements on 8 to 64 H100 have rings at 420 to 475 TFLOPS where Ulysses has 557 to 600."""

SCORES_LIMIT = 2**14
"""Positions beyond which no method may call a kernel that holds the scores of all pairs: it would take the memory, and most of the
time, of everything else."""

EXCHANGE_SECONDS = 1e-5
"""What an exchange takes beside its bytes."""

BETWEEN_NODES = 1 / 9
"""Of a link's speed within a node that a rank has to other nodes: one 400 Gb/s adapter beside an NVLink of 450 GB/s."""

BACKWARD = 2.5
"""Times the arithmetic of forward that backward does: five products, and forward two."""


class AttentionMethodError(ValueError):
    """The method that was asked for cannot compute an attention call."""


@dataclass(frozen=True)
class AttentionOptions:
    """How attention is computed.

    Attributes:
        method: Which method, or "auto": the one that takes least time.
        flops: Floating-point operations a second of the device, at its peak.
        link: Bytes a second that a rank sends to others of its node.
        node_size: Neighbouring ranks that are one node; 0: all.
        head_chunks: Chunks in which Ulysses exchanges a rank's heads.
    """

    method: AttentionMethod = "auto"
    flops: float = 1e15
    link: float = 4.5e11
    node_size: int = 0
    head_chunks: int = 1


@dataclass(frozen=True)
class Work:
    """One attention call, whole.

    Attributes:
        batch: Samples.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        width: Of a head of queries and keys.
        value_width: Of a head of values.
        query_lengths: Every rank's number of queries.
        key_lengths: Every rank's number of keys.
        is_causal: Whether it is causal by the kernel's flag.
        element_size: Bytes of an element.
        dropout: Whether weights are dropped.
        mask: What is attended to, if not all or by the flag; "" if so.
        bounds: Which keys queries attend to, as far as is known: `(first query, behind the last) -> (first key, behind the last)`;
            `None`: all.
        not_in_blocks: Why the mask cannot be given to kernels a block at a time; "" if it can.
        in_graph: Whether gathered keys go to PyTorch's operator, in tiles or because numbers are added to scores; else a block at a
            time to kernels.
        in_tiles: Whether PyTorch's operator is called on some queries at a time.
        kernel: What PyTorch's operator runs; "" if that is not known.
        block_kernel: What runs for blocks of keys.
    """

    batch: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    is_causal: bool
    element_size: int
    dropout: bool = False
    mask: str = ""
    bounds: ColumnBounds | None = None
    not_in_blocks: str = ""
    in_graph: bool = False
    in_tiles: bool = False
    kernel: str = ""
    block_kernel: str = ""

    def kernel_of(self, method: str) -> str:
        """Return what runs if a method computes the call."""
        by_operator = method == "ulysses" or (method == "gather_kv" and self.in_graph)
        name, in_tiles = (self.kernel, self.in_tiles) if by_operator else (self.block_kernel, self.block_kernel == "math")
        return f"{name}, some rows at a time" if name and in_tiles else name

    @property
    def ranks(self) -> int:
        return len(self.query_lengths)

    def columns(self, start: int, stop: int) -> tuple[int, int]:
        """Return `(first, behind the last)` of the keys that queries attend to; one at least, which kernels want."""
        num_keys = sum(self.key_lengths)
        low, high = self.bounds(start, stop) if self.bounds else (0, num_keys)
        low = max(0, min(low, num_keys - 1))
        return low, max(min(high, num_keys), low + 1)

    def pairs(self, start: int, stop: int) -> int:
        """Return how many pairs of queries `[start, stop)` and keys are computed, a sixteenth of the queries at a time."""
        step = max(1, -(-(stop - start) // 16))
        tiles = [(first, min(first + step, stop)) for first in range(start, stop, step)]
        return sum((behind - first) * (high - low) for first, behind in tiles for low, high in [self.columns(first, behind)])

    def all_pairs(self) -> int:
        """Return the pairs that are computed of each head and sample."""
        queries = sum(self.query_lengths)
        if self.is_causal:
            return queries * (queries + 1) // 2
        return sum(self.pairs(*bounds) for bounds in _bounds(self.query_lengths))

    def flops(self, pairs: float, heads: float) -> float:
        return (1 + BACKWARD) * 2 * self.batch * heads * pairs * (self.width + self.value_width)

    def keys_bytes(self, length: float) -> float:
        """Return the bytes of keys and values of that many positions."""
        return self.batch * self.kv_heads * length * (self.width + self.value_width) * self.element_size

    def queries_bytes(self, length: float) -> float:
        """Return the bytes of queries and result of that many positions."""
        return self.batch * self.heads * length * (self.width + self.value_width) * self.element_size


@dataclass(frozen=True)
class Offer:
    """What a method would take for a call, forward and backward.

    Attributes:
        method: Which.
        seconds: As estimated.
        sent: Bytes that the busiest rank sends to others.
        flops: Floating-point operations of the busiest rank.
        peak: Bytes that a rank holds at once beside its own parts of queries, keys, values and result.
        refusal: Why it cannot compute the call; "" if it can.
        inside: Of a hybrid, ranks that exchange heads.
        outside: Of a hybrid, what is done across them.
        in_zigzag: Whether a ring holds positions in zigzag order.
    """

    method: str
    seconds: float = float("inf")
    sent: int = 0
    flops: float = 0.0
    peak: int = 0
    refusal: str = ""
    inside: int = 0
    outside: str = ""
    in_zigzag: bool = False

    @property
    def name(self) -> str:
        return f"{self.method}, {self.inside} ranks exchange heads, {self.outside} across" if self.inside else self.method

    def __str__(self) -> str:
        if self.refusal:
            return f"{self.method}: {self.refusal}"
        sizes = f"{self.sent / 2**20:.2f} MiB sent, {self.flops:.3g} FLOPs, {self.peak / 2**20:.2f} MiB held"
        return f"{self.name} {self.seconds * 1e3:.3g} ms ({sizes})"


@dataclass(frozen=True)
class Choice:
    """What was chosen, what else there was, and which kernel runs, if that is known."""

    chosen: Offer
    others: tuple[Offer, ...]
    kernel: str = ""


def choose(work: Work, options: AttentionOptions, where: str) -> Choice:
    """Return the method for a call.

    Args:
        work: The call.
        options: What was asked for, and how fast the device is.
        where: The line that the call is from, for errors.

    Raises:
        AttentionMethodError: If the method that was asked for cannot compute it.
    """
    offers = [_OFFERS[name](work, options) for name in METHODS]
    chosen = min(offers, key=lambda offer: offer.seconds)
    if chosen.refusal:
        raise AttentionMethodError(f"No method can compute the attention at {where}. {'; '.join(map(str, offers))}.")
    if options.method != "auto":
        chosen = next(offer for offer in offers if offer.method == options.method)
        if chosen.refusal:
            possible = ", ".join(repr(offer.method) for offer in offers if not offer.refusal)
            raise AttentionMethodError(
                f"attention={options.method!r} cannot compute the attention at {where}: {chosen.refusal}. Use 'auto', or one of "
                f"{possible or 'none'}."
            )
    return Choice(chosen, tuple(offer for offer in offers if offer is not chosen), work.kernel_of(chosen.method))


def halo(work: Work) -> tuple[tuple[int, int], ...] | None:
    """Return which keys each rank fetches, where that is so few that they are fetched and not gathered."""
    if work.bounds is None:
        return None
    columns = tuple(work.columns(*bounds) for bounds in _bounds(work.query_lengths))
    fetched = sum(behind - first for first, behind in columns)
    return columns if fetched <= 3 * sum(work.key_lengths) else None


def _bounds(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))


def _spans_nodes(ranks: int, options: AttentionOptions) -> bool:
    return bool(options.node_size) and ranks > options.node_size


def _wire_seconds(sent: float, ranks: int, options: AttentionOptions, crossing: float | None = None) -> float:
    """Return how long bytes take that go to all other ranks alike, or of which that many cross between nodes."""
    if not _spans_nodes(ranks, options):
        return sent / options.link
    if crossing is None:
        crossing = sent * (ranks - options.node_size) / (ranks - 1)
    return max((sent - crossing) / options.link, crossing / (options.link * BETWEEN_NODES))


def _compute_seconds(flops: float, options: AttentionOptions) -> float:
    return flops / (options.flops * KERNEL_SHARE)


def _too_long(work: Work) -> str:
    """Return why PyTorch's operator may not be called on whole keys; "" if it may."""
    length = sum(work.key_lengths)
    if work.kernel != "math" or work.in_tiles or length <= SCORES_LIMIT:
        return ""
    why = "drops weights" if work.dropout else f"has {work.heads}:{work.kv_heads} heads of {work.width} and {work.value_width}"
    return f"it {why}, for which PyTorch has no kernel here but the one that holds all scores, and {length} positions are too many"


def _ulysses(work: Work, options: AttentionOptions) -> Offer:
    if refusal := _too_long(work):
        return Offer("ulysses", refusal=refusal)
    ranks = work.ranks
    shares = head_shares(work.heads, work.kv_heads, ranks)
    most = max(share.num_queries for share in shares)
    keys = max(share.num_keys for share in shares)
    sent = _exchanged(work, work.query_lengths)
    flops = work.flops(work.all_pairs(), most)
    seconds = _compute_seconds(flops, options) + _wire_seconds(sent, ranks, options) + 4 * EXCHANGE_SECONDS
    whole = work.queries_bytes(sum(work.query_lengths)) * most / work.heads
    whole += work.keys_bytes(sum(work.key_lengths)) * keys / work.kv_heads
    return Offer("ulysses", seconds, sent, flops, int(2 * whole))


def _exchanged(work: Work, lengths: Sequence[int]) -> int:
    """Return the bytes that the busiest of ranks that exchange heads sends, there and back, forward and backward."""
    sizes = (work.batch, work.heads, work.kv_heads, lengths, work.width, work.value_width)
    ways = (False, True)
    return work.element_size * max(sum(wire_elements(*sizes, r, backward=way) for way in ways) for r in range(len(lengths)))


def _square(work: Work) -> str:
    if work.is_causal and min(work.query_lengths) < 2:
        return "a rank has one position, and zigzag order takes two"
    if work.is_causal and work.query_lengths != work.key_lengths:
        return f"it is causal, with {sum(work.query_lengths)} queries and {sum(work.key_lengths)} keys"
    return ""


def _zigzag_bytes(work: Work, keys: bool) -> float:
    """Return what a rank sends to change the order of positions, there and back, forward and backward."""
    most = max(work.query_lengths)
    return 2 * (work.queries_bytes(most) + (work.keys_bytes(most) if keys else 0))


def _gather_kv(work: Work, options: AttentionOptions, at_once: bool = False) -> Offer:
    """Return the offer; `at_once`: as the one operator that it is within a hybrid, which gathers all keys."""
    ranks, most = work.ranks, max(work.key_lengths)
    refusal = _square(work) or (_too_long(work) if work.in_graph else "")
    if refusal:
        return Offer("gather_kv", refusal=refusal)
    fetched = None if at_once else halo(work)
    others = (ranks - 1) * most
    if fetched is not None:
        others = max(behind - first - n for (first, behind), n in zip(fetched, work.key_lengths, strict=True))
    in_graph = work.in_graph and not at_once  # gathered once, and kept or computed again as the planner likes
    times = 2 if in_graph else 3
    sent = times * work.keys_bytes(max(others, 0))
    crossing = None
    if fetched is not None:
        crossing = sent
    elif options.node_size:
        crossing = times * work.keys_bytes(max(ranks - options.node_size, 0) * most) / options.node_size
    rows: float = work.all_pairs() / ranks
    if not work.is_causal:
        rows = max(work.pairs(*bounds) for bounds in _bounds(work.query_lengths))
    flops = work.flops(rows, work.heads)
    moved = _zigzag_bytes(work, keys=False) if work.is_causal else 0.0
    seconds = (
        _compute_seconds(flops, options) + _wire_seconds(sent, ranks, options, crossing) + _wire_seconds(moved, ranks, options)
    )
    seconds += (times + (4 if moved else 0)) * EXCHANGE_SECONDS
    held = work.keys_bytes(max(others, 0) + most)
    return Offer("gather_kv", seconds, int(sent + moved), flops, int(held + held * 4 / work.element_size))


def _ring(work: Work, options: AttentionOptions) -> Offer:
    refusal = work.not_in_blocks or _square(work)
    if refusal:
        return Offer("ring", refusal=refusal)
    orders = [work.is_causal]
    if work.bounds is not None and work.query_lengths == work.key_lengths and min(work.query_lengths) > 1:
        orders = [False, True]  # a mask may leave late positions more work, or only their neighbours'
    return min((_around(work, options, in_zigzag) for in_zigzag in orders), key=lambda offer: offer.seconds)


def _around(work: Work, options: AttentionOptions, in_zigzag: bool) -> Offer:
    ranks, most = work.ranks, max(work.key_lengths)
    queries, keys = (chunk_lengths(x) if in_zigzag else x for x in (work.query_lengths, work.key_lengths))
    of_queries, of_keys = _bounds(queries), _bounds(keys)
    held = [held_chunks(rank, ranks) if in_zigzag else (rank,) for rank in range(ranks)]
    route, pairs = Route([[True] * ranks] * ranks), work.all_pairs() / ranks
    if not work.is_causal:
        columns = [work.columns(*bounds) if bounds[0] < bounds[1] else (0, 0) for bounds in of_queries]
        reach = [[max(a, c) < min(b, d) for c, d in of_keys] for a, b in columns]
        route = Route(
            [[any(reach[q][k] for q in held[taker] for k in held[owner]) for owner in range(ranks)] for taker in range(ranks)]
        )
        pairs = max(sum(work.pairs(*of_queries[chunk]) for chunk in held[rank]) for rank in range(ranks))
    sent = 3 * work.keys_bytes(max(map(route.sent, range(ranks))) * most)
    moved = _zigzag_bytes(work, keys=True) if in_zigzag else 0.0
    flops = work.flops(pairs, work.heads)
    passing = _wire_seconds(sent, ranks, options, crossing=sent)  # one of a node's ranks sends to the next node, and all wait
    seconds = max(_compute_seconds(flops, options) / RING_SHARE, passing) + _wire_seconds(moved, ranks, options)
    hops = sum(not route.is_empty(hop) for hop in range(1, ranks))
    seconds += (3 * hops + (4 if moved else 0)) * EXCHANGE_SECONDS
    held_bytes = (
        3 * work.keys_bytes(most)
        + (work.queries_bytes(max(work.query_lengths)) / 2 + work.keys_bytes(most)) * 4 / work.element_size
    )
    return Offer("ring", seconds, int(sent + moved), flops, int(held_bytes), in_zigzag=in_zigzag)


def _hybrid(work: Work, options: AttentionOptions) -> Offer:
    refusal, ranks = work.not_in_blocks or _square(work), work.ranks
    node = options.node_size if _spans_nodes(ranks, options) else ranks
    splits = [inside for inside in range(2, min(ranks - 1, node) + 1) if ranks % inside == 0 and node % inside == 0]
    if not refusal and not splits:
        refusal = f"{ranks} ranks do not divide into parts of two or more within nodes"
    if refusal:
        return Offer("hybrid", refusal=refusal)
    found = [_split(work, options, inside, outside) for inside in splits for outside in ("ring", "gather_kv")]
    return min(found, key=lambda offer: offer.seconds)


def _split(work: Work, options: AttentionOptions, inside: int, outside: Literal["ring", "gather_kv"]) -> Offer:
    shares = head_shares(work.heads, work.kv_heads, inside)

    def sums(lengths: Sequence[int]) -> tuple[int, ...]:
        return tuple(sum(lengths[i : i + inside]) for i in range(0, len(lengths), inside))

    def part(heads: int, kv_heads: int, queries: tuple[int, ...], keys: tuple[int, ...]) -> Work:
        return replace(work, heads=heads, kv_heads=kv_heads, query_lengths=queries, key_lengths=keys)

    # Within: what is sent; the arithmetic is that of the ranks across, which have the same heads.
    sent = _exchanged(work, work.query_lengths[:inside])
    own = max(shares, key=lambda share: share.num_queries)
    aligned = all(share.num_queries % share.num_keys == 0 for share in shares)
    heads, kv_heads = own.num_queries, own.num_keys if aligned else own.num_queries
    if heads % kv_heads:
        kv_heads = heads
    # Neighbours across are on different nodes, if there are several.
    far = AttentionOptions(options.method, options.flops, options.link, 1 if _spans_nodes(work.ranks, options) else 0)
    of_part = part(heads, kv_heads, sums(work.query_lengths), sums(work.key_lengths))
    across = _ring(of_part, far) if outside == "ring" else _gather_kv(of_part, far, at_once=True)
    seconds = across.seconds + sent / options.link + 4 * EXCHANGE_SECONDS
    most = sum(work.query_lengths[:inside])
    held = across.peak + int(2 * (work.queries_bytes(most) * heads / work.heads + work.keys_bytes(most) * kv_heads / work.kv_heads))
    name, order = (inside, outside), across.in_zigzag
    return Offer("hybrid", seconds, sent + across.sent, across.flops, held, "", *name, order)


_OFFERS: dict[str, Callable[[Work, AttentionOptions], Offer]] = {
    "ulysses": _ulysses,
    "gather_kv": _gather_kv,
    "ring": _ring,
    "hybrid": _hybrid,
}
