"""A rank's queries under a mask: which keys ranges of them attend to, and the mask of a block of pairs.

Every rank has what masks are computed from whole, so it knows its own blocks. What ranks need of each other's keys decides what is
sent, so that they tell each other, unless positions alone say it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from lightning_autosp.attention import tiles
from lightning_autosp.attention.blocks import Dropped
from lightning_autosp.attention.operators import BlockMask, Call
from lightning_autosp.attention.tiles import Attended, Cut, Result, Rows, TileProgram, program_of
from lightning_autosp.collectives import start_all_gather, wait

__all__ = ["MaskedRows", "block_mask", "dropped", "masked_rows", "needs"]


class MaskedRows:
    """This rank's queries.

    Attributes:
        ranges: `(first of this rank's queries, behind the last, first row, first column, behind the last)` of queries that are
            attended for together; rows and columns are the whole sequence's. Those that attend to nothing are left out.
    """

    def __init__(self, call: Call, others: Sequence[Tensor]) -> None:
        self.program, self.first_head = program_of(call.mask), call.first_head
        self.inputs = others[: len(others) - bool(call.dropout)]
        self.ranges = _ranges(self.program, call, call.group.rank, None if _without_values(self.inputs) else self.inputs)

    def blocks(self, low: int, high: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Go through ranges with those of columns `[low, high)` that they may attend to."""
        for start, stop, row, first, behind in self.ranges:
            if max(first, low) < min(behind, high):
                yield start, stop, row, max(first, low), min(behind, high)

    def mask(self, row: int, num_rows: int, low: int, high: int, heads: tuple[int, int]) -> Tensor:
        """Return the mask of a block, for heads from the first to behind the last of this rank's.

        Returns:
            Bool, shape `(B or 1, H or 1, num_rows or 1, high - low or 1)`.
        """
        tile = (row, row + num_rows, low, high)
        (mask,) = self.program.compute(tile, self.program.cut(self.inputs, tile))
        mask = mask if mask.dtype is torch.bool else mask == 0
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        if mask.shape[1] == 1:
            return mask
        # Heads that are not there attend as the last one does: nobody reads what they give.
        return mask[:, [min(self.first_head + head, mask.shape[1] - 1) for head in range(*heads)]]


def _without_values(inputs: Sequence[Tensor]) -> bool:
    return any(isinstance(x, FakeTensor) for x in inputs)


def _ranges(program: TileProgram, call: Call, rank: int, inputs: Sequence[Tensor] | None) -> list[tuple[int, int, int, int, int]]:
    found, start = [], 0
    for chunk in call.chunks(rank):
        first, length = sum(call.query_lengths[:chunk]), call.query_lengths[chunk]
        for row, behind, low, high in program.ranges(first, first + length, inputs):
            if max(low, 0) < min(high, sum(call.key_lengths)):
                found.append((start + row - first, start + behind - first, row, max(low, 0), min(high, sum(call.key_lengths))))
        start += length
    return found


def masked_rows(call: Call, others: Sequence[Tensor]) -> MaskedRows | None:
    """Return this rank's queries under the call's mask, if it has one."""
    return MaskedRows(call, others) if call.mask >= 0 else None


def needs(call: Call, rows: MaskedRows) -> list[list[bool]]:
    """Return for every rank of whose keys it needs some: the same on all ranks."""
    size, keys = call.group.size, call.key_lengths

    def of(ranges: Sequence[tuple[int, int, int, int, int]]) -> list[bool]:
        found = []
        for source in range(size):
            bounds = [(sum(keys[:chunk]), sum(keys[: chunk + 1])) for chunk in call.chunks(source)]
            found.append(any(max(one[3], low) < min(one[4], high) for one in ranges for low, high in bounds))
        return found

    if not rows.program.segments or _without_values(rows.inputs):
        return [of(_ranges(rows.program, call, rank, None)) for rank in range(size)]
    own = torch.tensor(of(rows.ranges), dtype=torch.uint8, device=rows.inputs[0].device)
    return [[bool(one) for one in row] for row in wait(start_all_gather(own, call.group)).view(size, size).tolist()]


def dropped(call: Call, others: Sequence[Tensor], *place: int) -> Dropped | None:
    """Return which weights of a block are dropped, if any: drawn from the call's seed and the block's place."""
    if not call.dropout:
        return None
    seed = 0 if _without_values(others[-1:]) else int(others[-1])
    for number in place:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return Dropped(call.dropout, seed)


def block_mask(mask: Tensor | BlockMask | None, query: Tensor) -> BlockMask | None:
    """Return a mask that is whole as one that blocks are taken from.

    Raises:
        ValueError: If it is not bool, or samples have more than one dimension.
    """
    if mask is not None and query.ndim > 4:
        raise ValueError(f"a mask with queries of shape {tuple(query.shape)}: samples may have one dimension")
    if not isinstance(mask, Tensor):
        return mask
    if mask.dtype is not torch.bool:
        raise ValueError(f"a mask of {mask.dtype}: keys are attended to in blocks, under masks of bools, true where queries attend")
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return BlockMask(_given(tuple(mask.shape), tiles.TILE_ELEMENTS).handle, (mask,))


@functools.lru_cache(maxsize=256)
def _given(shape: tuple[int, ...], largest: int) -> TileProgram:
    """Return the program that takes blocks of a mask that is there."""
    graph = fx.Graph()
    for name in ("num_rows", "num_columns"):
        graph.placeholder(name)
    graph.output((graph.placeholder("mask"),))
    by_rows, by_columns = (Rows(2) if shape[2] > 1 else None), (3 if shape[3] > 1 else None)
    tile_rows = max(1, largest // (shape[0] * shape[1] * shape[3]))
    return TileProgram(
        module=fx.GraphModule({}, graph),
        cuts=(Cut(by_rows, by_columns),),
        results=(Result(shape, torch.bool, Rows(2), differentiable=False),),
        num_rows=shape[2],
        num_columns=shape[3],
        tile_rows=tile_rows,
        largest=largest,
        inlined=False,
        segments=(Attended(0),),
    )
