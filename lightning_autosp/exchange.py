"""Moving parts between ranks without making the whole: any positions to any rank, or one dimension's part for another's.

What is sent is known on every rank from the lengths alone, so each exchange is one all-to-all; its transpose is autograd's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_autosp.collectives import Group, all_to_all

__all__ = ["Cut", "Range", "exchange", "fetch", "rearrange"]

Range = tuple[int, int, int]
"""Positions `range(start, stop, step)`; a negative step goes backwards."""

Cut = tuple[int, int, int, tuple[tuple[int, int], ...]]
"""`(dim, outer, inner, bounds)`: dimension `dim` is `outer * positions * inner`, and `bounds` every rank's `(start, stop)`."""


def _within(wanted: Range, low: int, high: int) -> range:
    """Return those of the wanted positions that lie in `[low, high)`, in the wanted order."""
    positions = range(*wanted)
    if not positions:
        return positions
    start, step = positions.start, positions.step
    near, far = (low, high - 1) if step > 0 else (high - 1, low)
    first = max(-((start - near) // step), 0)  # the first index whose position has reached `near`
    last = (far - start) // step  # the last one that has not passed `far`
    return positions[first : max(last + 1, first)]


def _pick(rows: Tensor, positions: range) -> Tensor:
    """Return rows by number, in order."""
    if positions.step > 0 or len(positions) < 2:
        return rows[positions.start : positions.start + len(positions) * abs(positions.step) : abs(positions.step)][
            : len(positions)
        ]
    return rows[positions[-1] : positions.start + 1 : -positions.step].flip(0)


def fetch(x: Tensor, dim: int, bounds: Sequence[tuple[int, int]], wanted: Sequence[Sequence[Range]], group: Group) -> Tensor:
    """Give every rank the positions it wants of a tensor that is split along `dim`.

    Args:
        x: This rank's part, positions `bounds[group.rank]`.
        dim: The dimension that is split.
        bounds: Every rank's `(start, stop)`, ascending and without gaps.
        wanted: For every rank the ranges it wants, in the order of the result. Ranks may want the same position.
        group: The group.

    Returns:
        The wanted positions of this rank, one range behind the other.
    """
    rows, me = x.movedim(dim, 0), group.rank
    nothing = rows[:0]
    low, high = bounds[me]
    if all(lo <= p and p < hi for (lo, hi), ranges in zip(bounds, wanted, strict=True) for r in ranges for p in _ends(r)):
        return torch.cat([nothing, *(_pick(rows, _shifted(range(*r), -low)) for r in wanted[me])]).movedim(0, dim)
    sent = [nothing, *(_pick(rows, _shifted(_within(r, low, high), -low)) for ranges in wanted for r in ranges)]
    counts = [sum(len(_within(r, low, high)) for r in ranges) for ranges in wanted]
    pieces = [[len(_within(r, lo, hi)) for r in wanted[me]] for lo, hi in bounds]
    received = all_to_all(torch.cat(sent), [sum(sizes) for sizes in pieces], counts, group)
    blocks = received.split([size for sizes in pieces for size in sizes])
    width = len(wanted[me])
    ordered = [received[:0]]  # a rank that wants nothing takes part in the backward exchange all the same
    for index, (_, _, step) in enumerate(wanted[me]):
        owners = range(group.size) if step > 0 else range(group.size - 1, -1, -1)
        ordered += [blocks[owner * width + index] for owner in owners]
    return torch.cat(ordered).movedim(0, dim)


def _ends(wanted: Range) -> tuple[int, ...]:
    positions = range(*wanted)
    return (positions[0], positions[-1]) if positions else ()


def _shifted(positions: range, by: int) -> range:
    return range(positions.start + by, positions.stop + by, positions.step)


def exchange(
    x: Tensor,
    have: int,
    have_bounds: Sequence[tuple[int, int]],
    want: int,
    want_bounds: Sequence[tuple[int, int]],
    group: Group,
) -> Tensor:
    """Give up this rank's part of dimension `have` for its part of dimension `want`.

    Args:
        x: Size `have_bounds[rank]` long along `have`, whole along `want`.
        have: The dimension that is split.
        have_bounds: Every rank's `(start, stop)` along it.
        want: The dimension to split.
        want_bounds: Every rank's `(start, stop)` along it.
        group: The group.

    Returns:
        Whole along `have`, this rank's part along `want`.
    """
    parts = [x.narrow(want, start, stop - start) for start, stop in want_bounds]
    shape = list(x.shape)
    shape[want] = want_bounds[group.rank][1] - want_bounds[group.rank][0]
    shapes = []
    for start, stop in have_bounds:
        shape[have] = stop - start
        shapes.append(tuple(shape))
    sizes = [torch.Size(one).numel() for one in shapes]
    flat = all_to_all(torch.cat([part.reshape(-1) for part in parts]), sizes, [part.numel() for part in parts], group)
    return torch.cat([block.view(one) for block, one in zip(flat.split(sizes), shapes, strict=True)], dim=have)


def rearrange(x: Tensor, have: Cut, want: Cut, group: Group) -> Tensor:
    """Give up one part of a dimension for another: other positions of it, or those of something else that was merged into it.

    Args:
        x: This rank's part along `have`.
        have: How `x` is cut.
        want: How the result is cut: the same dimension, of the same size.
        group: The group.

    Returns:
        This rank's part along `want`, contiguous.
    """
    holder, taker = _owners(have), _owners(want)
    to, of = taker[holder == group.rank], holder[taker == group.rank]
    sent, arriving = np.argsort(to, kind="stable"), np.argsort(of, kind="stable")
    from_each, to_each = (np.bincount(owners, minlength=group.size).tolist() for owners in (of, to))
    rows = x.movedim(have[0], 0)
    received = all_to_all(rows[torch.tensor(sent, device=x.device)], from_each, to_each, group)
    return received[torch.tensor(np.argsort(arriving), device=x.device)].movedim(0, have[0]).contiguous()


def _owners(cut: Cut) -> np.ndarray[Any, Any]:
    """Return the rank of every place of a dimension."""
    _, outer, inner, bounds = cut
    ranks = np.repeat(np.arange(len(bounds)), [stop - start for start, stop in bounds])
    return np.tile(np.repeat(ranks, inner), outer)
