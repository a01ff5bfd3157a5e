"""Attention whose scores are more than a kernel's own flags can say, computed a few rows at a time.

A `TileProgram` computes a range of rows from the same rows of some inputs and all of the others. `run_tiles` runs it range after
range: scores and mask of one range exist at a time, in forward and in backward, where each range is computed again. To autograd
and to compilers it is one operator.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lightning_autosp import _compat

__all__ = ["TILE_ELEMENTS", "ColumnBounds", "Cut", "TileProgram", "run_tiles"]

TILE_ELEMENTS = 2**25
"""Elements of the largest value of one tile: 128 MiB in float32."""

ColumnBounds = Callable[[int, int], tuple[int, int]]
"""`(first row, behind the last) -> (first column, behind the last)` outside of which nothing is attended."""


@dataclass(frozen=True)
class Cut:
    """The dimensions along which an input is cut to a tile; `None`: it is not."""

    rows: int | None = None
    columns: int | None = None


@dataclass(frozen=True)
class Lookup:
    """Numbers of a mask's rows or columns: elements of an input, looked up by affine functions of the mask's indices.

    Attributes:
        input: Which of the program's inputs, not cut.
        places: For every dimension of the input one factor for every index of the mask, and what is added.
    """

    input: int
    places: tuple[tuple[int, ...], ...]

    def __call__(self, inputs: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Return the numbers for all indices of a mask of that shape; of size 1 where they are the same for all."""
        table = inputs[self.input]
        ndim = len(shape)
        places = []
        for *factors, added in self.places:
            place = torch.full((1,) * ndim, added, device=table.device)
            for dim, factor in enumerate(factors):
                if factor:
                    steps = torch.arange(shape[dim], device=table.device) * factor
                    place = place + steps.view([-1 if d == dim else 1 for d in range(ndim)])
            places.append(place)
        return table[tuple(places)] if places else table.view((1,) * ndim)


@dataclass(frozen=True)
class Segments:
    """Rows attend to columns of the same number only: those of the same document.

    Attributes:
        rows: The number of every row.
        columns: The number of every column.
        shape: Of the mask, rows and columns last.
    """

    rows: Lookup
    columns: Lookup
    shape: tuple[int, ...]

    def bounds(self, inputs: Sequence[Tensor], tile_rows: int) -> Tensor:
        """Return for every range of rows the first column and the one behind the last whose number may be one of theirs.

        Numbers may be in any order; where they ascend, columns in between are few. Holds `TILE_ELEMENTS` booleans at most.

        Returns:
            Shape `(tiles, 2)`, int64. A range that attends to nothing has its first column behind its last.
        """
        num_rows, num_columns = self.shape[-2:]
        num_tiles = -(-num_rows // tile_rows)
        device = inputs[self.rows.input].device
        padded = torch.arange(num_tiles * tile_rows, device=device).clamp(max=num_rows - 1)
        rows = self.rows(inputs, self.shape)[..., 0].expand(*self.shape[:-2], num_rows)[..., padded]
        low, high = torch.aminmax(rows.unflatten(-1, (num_tiles, tile_rows)), dim=-1)
        low, high = (limit.reshape(-1, num_tiles, 1) for limit in (low, high))
        columns = self.columns(inputs, self.shape)[..., 0, :].expand(*self.shape[:-2], num_columns).reshape(-1, 1, num_columns)
        step = max(1, TILE_ELEMENTS // columns.numel())
        found = []
        for some_low, some_high in zip(low.split(step, 1), high.split(step, 1), strict=True):
            within = ((columns >= some_low) & (columns <= some_high)).any(0).to(torch.uint8)
            any_column = within.amax(-1) > 0
            first, behind = within.argmax(-1), num_columns - within.flip(-1).argmax(-1)
            found.append(torch.stack([first.where(any_column, num_columns), behind.where(any_column, 0)], -1))
        return torch.cat(found)


@dataclass(frozen=True, eq=False)
class TileProgram:
    """How to compute rows of a result.

    Attributes:
        module: `module(num_rows, num_columns, *inputs)` returns those rows of the result, its inputs cut as `cuts` says.
        cuts: How every input is cut.
        shape: Of the whole result.
        dtype: Of the result.
        row_dim: Dimension of the result that is computed in ranges.
        num_columns: Of the scores; 0 where columns are never left out.
        tile_rows: Rows of one range.
        columns: Which columns a range of rows needs; `None` for all.
        segments: Which columns it needs for the values of inputs.
        random: Whether random numbers are drawn; the first input is then a seed.
        autocast: Arguments of `torch.autocast` the program runs under; `None` for what is in force.
    """

    module: fx.GraphModule
    cuts: tuple[Cut, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    row_dim: int
    num_columns: int
    tile_rows: int
    columns: ColumnBounds | None = None
    segments: tuple[Segments, ...] = ()
    random: bool = False
    autocast: tuple[str, torch.dtype, bool] | None = None
    handle: int = field(default_factory=itertools.count().__next__)
    """What graphs, which hold no objects, know the program by."""

    def __post_init__(self) -> None:
        _PROGRAMS[self.handle] = self

    @property
    def num_tiles(self) -> int:
        """Ranges of rows."""
        return -(-self.shape[self.row_dim] // self.tile_rows)

    def tiles(self, inputs: Sequence[Tensor] | None = None) -> Iterator[tuple[int, int, int, int]]:
        """Go through `(first row, behind the last, first column, behind the last)`.

        Args:
            inputs: The program's inputs, not cut; their values say which columns are not needed. `None`: only positions do.
        """
        rows = self.shape[self.row_dim]
        limits: list[list[list[int]]] = []
        if inputs is not None:
            limits = [segments.bounds(inputs, self.tile_rows).tolist() for segments in self.segments]
        for index, start in enumerate(range(0, rows, self.tile_rows)):
            stop = min(start + self.tile_rows, rows)
            low, high = self.columns(start, stop) if self.columns else (0, self.num_columns)
            for limit in limits:
                low, high = max(low, limit[index][0]), min(high, limit[index][1])
            # A kernel wants at least one column; rows that attend to nothing do so with one as with many.
            low = max(0, min(low, self.num_columns - 1))
            yield start, stop, low, max(min(high, self.num_columns), low + 1)

    def cut(self, inputs: Sequence[Tensor], tile: tuple[int, int, int, int]) -> list[Tensor]:
        """Return the inputs of one tile, views of the whole ones."""
        start, stop, low, high = tile
        cut = []
        for value, how in zip(inputs, self.cuts, strict=True):
            if how.rows is not None:
                value = value.narrow(how.rows, start, stop - start)
            if how.columns is not None:
                value = value.narrow(how.columns, low, high - low)
            cut.append(value)
        return cut

    def compute(self, tile: tuple[int, int, int, int], inputs: Sequence[Tensor]) -> Tensor:
        start, stop, low, high = tile
        context = contextlib.nullcontext() if self.autocast is None else torch.autocast(*self.autocast)
        with context:
            return self.module(stop - start, high - low, *inputs)


_PROGRAMS: dict[int, TileProgram] = {}


def run_tiles(handle: int, *inputs: Tensor) -> Tensor:
    """Compute the result of the program of that handle; its inputs are not cut."""
    program = _PROGRAMS[handle]
    if program.num_tiles == 1:  # nothing is saved by computing it again: let autograd and compilers see into it
        (tile,) = program.tiles()
        return program.compute(tile, program.cut(inputs[int(program.random) :], tile))
    return _Tiles.apply(handle, *inputs)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: int, *inputs: Tensor) -> Tensor:
        ctx.handle = handle
        ctx.save_for_backward(*inputs)
        return torch.ops.autosp.tiles(list(inputs), handle)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        found: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        for index, one in zip(wanted, torch.ops.autosp.tiles_backward(grad, ctx.saved_tensors, wanted, ctx.handle), strict=True):
            found[index] = one
        return (None, *found)


@torch.library.custom_op("autosp::tiles", mutates_args=())
def _tiles(inputs: Sequence[Tensor], handle: int) -> Tensor:
    program = _PROGRAMS[handle]
    with _draws(program, inputs) as values:
        out: Tensor | None = None
        for tile in program.tiles(values):
            rows = program.compute(tile, program.cut(values, tile))
            if out is None:
                out = rows.new_empty(program.shape)
            out.narrow(program.row_dim, tile[0], tile[1] - tile[0]).copy_(rows)
    assert out is not None
    return out


@_tiles.register_fake
def _(inputs: Sequence[Tensor], handle: int) -> Tensor:
    program = _PROGRAMS[handle]
    return inputs[-1].new_empty(program.shape, dtype=program.dtype)


@torch.library.custom_op("autosp::tiles_backward", mutates_args=())
def _tiles_backward(grad: Tensor, inputs: Sequence[Tensor], wanted: Sequence[int], handle: int) -> list[Tensor]:
    program = _PROGRAMS[handle]
    with _draws(program, inputs) as values:
        first = int(program.random)
        # Sums over many tiles are kept in float32 at least.
        sums = {i: torch.zeros_like(inputs[i], dtype=torch.promote_types(inputs[i].dtype, torch.float32)) for i in wanted}
        for tile in program.tiles(values):
            with _compat.autograd_inside_operator():
                cut = [value.detach() for value in program.cut(values, tile)]
                for index in wanted:
                    cut[index - first].requires_grad_()
                rows = program.compute(tile, cut)
            own = grad.narrow(program.row_dim, tile[0], tile[1] - tile[0])
            parts = torch.autograd.grad(rows, [cut[index - first] for index in wanted], own, allow_unused=True)
            for index, part in zip(wanted, parts, strict=True):
                if part is not None:
                    start, stop, low, high = tile
                    how, target = program.cuts[index - first], sums[index]
                    if how.rows is not None:
                        target = target.narrow(how.rows, start, stop - start)
                    if how.columns is not None:
                        target = target.narrow(how.columns, low, high - low)
                    target += part
    return [sums[index].to(inputs[index].dtype) for index in wanted]


@_tiles_backward.register_fake
def _(grad: Tensor, inputs: Sequence[Tensor], wanted: Sequence[int], handle: int) -> list[Tensor]:
    return [torch.empty_like(inputs[index]) for index in wanted]


@contextlib.contextmanager
def _draws(program: TileProgram, inputs: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Let the program draw random numbers from the seed that is its first input, the same in forward and backward."""
    if not program.random:
        yield inputs
        return
    devices = {value.device.index for value in inputs if value.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(int(inputs[0]))
        yield inputs[1:]
