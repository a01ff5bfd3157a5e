"""What would be large is computed a few rows at a time: the scores of attention, the logits of a loss, the inside of an MLP.

A `TileProgram` computes a range of rows of some results from the same rows of some inputs and all of the others. `run_tiles` runs
it range after range: the values of one range exist at a time, in forward and in backward, where each range is computed again. To
autograd and to compilers it is one operator.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from lightning_autosp import _compat

__all__ = [
    "TILE_ELEMENTS",
    "Attended",
    "ColumnBounds",
    "Cut",
    "Handle",
    "Result",
    "Rows",
    "TileProgram",
    "description",
    "program_of",
    "rehearse",
    "run_tiles",
]

TILE_ELEMENTS = 2**25
"""Elements of the largest value of one tile: 128 MiB in float32."""

ColumnBounds = Callable[[int, int], tuple[int, int]]
"""`(first row, behind the last) -> (first column, behind the last)` outside of which nothing is attended."""


@dataclass(frozen=True)
class Rows:
    """The rows of a tensor: dimension `dim` of size `outer * rows * inner`, where a view merged it with its neighbours."""

    dim: int
    outer: int = 1
    inner: int = 1

    def split(self, value: Tensor) -> Tensor:
        """Return a view with the rows at dimension `dim + 1`, if they are merged with others."""
        return value if self.outer == self.inner == 1 else value.unflatten(self.dim, (self.outer, -1, self.inner))

    def within(self, value: Tensor, start: int, stop: int) -> Tensor:
        """Return a view of a range of rows, split."""
        return self.split(value).narrow(self.dim + (self.outer != 1 or self.inner != 1), start, stop - start)

    def take(self, value: Tensor, start: int, stop: int) -> Tensor:
        """Return a range of rows, contiguous: products of matrices round their result once then, not again with the bias."""
        part = self.within(value, start, stop)
        return (part if part.ndim == value.ndim else part.flatten(self.dim, self.dim + 2)).contiguous()


@dataclass(frozen=True)
class Cut:
    """How an input is cut to a tile; `None`: along this axis it is not. Columns are a dimension."""

    rows: Rows | None = None
    columns: int | None = None

    def view(self, value: Tensor, tile: tuple[int, int, int, int], *, split: bool = False) -> Tensor:
        """Return a tile of an input. Split, it is a view of the input in any case."""
        start, stop, low, high = tile
        if self.columns is not None:
            value = value.narrow(self.columns, low, high - low)
        if self.rows is None:
            return value
        return self.rows.within(value, start, stop) if split else self.rows.take(value, start, stop)


@dataclass(frozen=True)
class Result:
    """One of the values a program computes: its whole shape, its dtype, where its rows are, and whether a gradient comes to it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Rows
    differentiable: bool = True


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

    def bounds(self, inputs: Sequence[Tensor], tile_rows: int, first_row: int, num_rows: int) -> Tensor:
        """Return for every range of some rows the first column and the one behind the last whose number may be one of theirs.

        Numbers may be in any order; where they ascend, columns in between are few. Holds `TILE_ELEMENTS` booleans at most.

        Returns:
            Shape `(tiles, 2)`, int64. A range that attends to nothing has its first column behind its last.
        """
        all_rows, num_columns = self.shape[-2:]
        num_tiles = -(-num_rows // tile_rows)
        device = inputs[self.rows.input].device
        padded = first_row + torch.arange(num_tiles * tile_rows, device=device).clamp(max=num_rows - 1)
        rows = self.rows(inputs, self.shape)[..., 0].expand(*self.shape[:-2], all_rows)[..., padded]
        low, high = torch.aminmax(rows.unflatten(-1, (num_tiles, tile_rows)), dim=-1)
        low, high = (limit.reshape(-1, num_tiles, 1) for limit in (low, high))
        columns = self.columns(inputs, self.shape)[..., 0, :].expand(*self.shape[:-2], num_columns).reshape(-1, 1, num_columns)
        step = max(1, TILE_ELEMENTS // columns.numel())
        found = []
        for some_low, some_high in zip(low.split(step, 1), high.split(step, 1), strict=True):
            found.append(_first_and_behind(((columns >= some_low) & (columns <= some_high)).any(0).to(torch.uint8)))
        return torch.cat(found)


@dataclass(frozen=True)
class Attended:
    """Rows attend to columns where an input, a mask of bools, says so.

    Attributes:
        input: Which of the program's inputs, not cut; shape `(..., rows, columns)`, either may be 1.
    """

    input: int

    def bounds(self, inputs: Sequence[Tensor], tile_rows: int, first_row: int, num_rows: int) -> Tensor:
        """Return the same as `Segments.bounds`."""
        mask = inputs[self.input].flatten(0, -3)
        rows = mask if mask.shape[-2] == 1 else mask[:, first_row : first_row + num_rows]
        found = [part.any(0).any(0) for part in rows.split(tile_rows, 1)]
        within = torch.stack(found).expand(-(-num_rows // tile_rows), -1)
        if mask.shape[-1] == 1:  # for all columns
            return torch.cat([~within, within * 2**62], -1).long()
        return _first_and_behind(within.to(torch.uint8))


def _first_and_behind(within: Tensor) -> Tensor:
    """Return the first column of every row that is not 0 and the one behind the last, the other way round if there is none."""
    num_columns, any_column = within.shape[-1], within.amax(-1) > 0
    first, behind = within.argmax(-1), num_columns - within.flip(-1).argmax(-1)
    return torch.stack([first.where(any_column, num_columns), behind.where(any_column, 0)], -1)


class Handle(int):
    """The number of a tile program in this process."""


_HANDLES = itertools.count()


@dataclass(frozen=True, eq=False)
class TileProgram:
    """How to compute rows of results.

    Attributes:
        module: `module(num_rows, num_columns, *inputs)` returns those rows of the results, its inputs cut as `cuts` says.
        cuts: How every input is cut.
        results: What is computed.
        num_rows: Rows there are.
        num_columns: Of scores; 0 where columns are never left out.
        tile_rows: Rows of one range.
        largest: Elements of the largest value of one range.
        inlined: Whether all rows are computed at once and compilers see how. The same on all ranks, whatever rows they have: what
            they see decides the order of collectives.
        columns: Which columns a range of rows needs; `None` for all.
        segments: Which columns it needs for the values of inputs.
        first: The row and the column that its rows and columns begin with, as `columns` and `segments` count them.
        attends: Whether it is attention, whose rows read other positions; otherwise rows are computed from their own.
        random: Whether random numbers are drawn; the first input is then a seed.
        autocast: Arguments of `torch.autocast` the program runs under; `None` for what is in force.
    """

    module: fx.GraphModule
    cuts: tuple[Cut, ...]
    results: tuple[Result, ...]
    num_rows: int
    num_columns: int
    tile_rows: int
    largest: int
    inlined: bool
    columns: ColumnBounds | None = None
    segments: tuple[Segments | Attended, ...] = ()
    first: tuple[int, int] = (0, 0)
    attends: bool = True
    random: bool = False
    autocast: tuple[str, torch.dtype, bool] | None = None
    handle: Handle = field(default_factory=lambda: Handle(next(_HANDLES)))
    """What graphs, which hold no objects, know the program by."""

    def __post_init__(self) -> None:
        _PROGRAMS[self.handle] = self

    @property
    def num_tiles(self) -> int:
        """Ranges of rows."""
        return -(-self.num_rows // self.tile_rows)

    def ranges(self, start: int, stop: int, inputs: Sequence[Tensor] | None = None) -> Iterator[tuple[int, int, int, int]]:
        """Go through `(first row, behind the last, first column, behind the last)` of rows `[start, stop)`, as `columns` counts.

        A range that attends to nothing has its first column behind its last, or at it. Columns may lie beyond those there are.

        Args:
            start: The first row.
            stop: Behind the last one.
            inputs: The program's inputs, not cut; their values say which columns are not needed. `None`: only positions do.
        """
        limits: list[list[list[int]]] = []
        if inputs is not None and start < stop:
            limits = [segments.bounds(inputs, self.tile_rows, start, stop - start).tolist() for segments in self.segments]
        for index, first in enumerate(range(start, stop, self.tile_rows)):
            behind = min(first + self.tile_rows, stop)
            low, high = self.columns(first, behind) if self.columns else (0, 2**62)
            for limit in limits:
                low, high = max(low, limit[index][0]), min(high, limit[index][1])
            yield first, behind, low, high

    def tiles(self, inputs: Sequence[Tensor] | None = None) -> Iterator[tuple[int, int, int, int]]:
        """Go through `(first row, behind the last, first column, behind the last)`, counted from `first`.

        Args:
            inputs: As in `ranges`.
        """
        first_row, first_column = self.first
        for start, stop, low, high in self.ranges(first_row, first_row + self.num_rows, inputs):
            # A kernel wants at least one column; rows that attend to nothing do so with one as with many.
            low = max(0, min(low - first_column, self.num_columns - 1))
            yield start - first_row, stop - first_row, low, max(min(high - first_column, self.num_columns), low + 1)

    def cut(self, inputs: Sequence[Tensor], tile: tuple[int, int, int, int]) -> list[Tensor]:
        """Return the inputs of one tile."""
        return [how.view(value, tile) for value, how in zip(inputs, self.cuts, strict=True)]

    def compute(self, tile: tuple[int, int, int, int], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        start, stop, low, high = tile
        context = contextlib.nullcontext() if self.autocast is None else torch.autocast(*self.autocast)
        with context:
            return self.module(stop - start, high - low, *inputs)  # type: ignore[no-any-return]


_PROGRAMS: dict[int, TileProgram] = {}


def run_tiles(handle: int, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Compute the results of the program of that handle; its inputs are not cut."""
    program = _PROGRAMS[handle]
    if program.inlined:  # nothing is saved by computing it again: let autograd and compilers see into it
        (tile,) = program.tiles()
        return program.compute(tile, program.cut(inputs[int(program.random) :], tile))
    return _Tiles.apply(handle, *inputs)  # type: ignore[no-any-return]


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, handle: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.handle = handle
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        results = tuple(torch.ops.autosp.tiles(list(inputs), handle))
        constant = (value for value, one in zip(results, _PROGRAMS[handle].results, strict=True) if not one.differentiable)
        ctx.mark_non_differentiable(*constant)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        results = _PROGRAMS[ctx.handle].results
        given = [index for index, one in enumerate(results) if one.differentiable and grads[index] is not None]
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        found: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        if given:
            own = [grads[index] for index in given]
            sums = torch.ops.autosp.tiles_backward(own, ctx.saved_tensors, given, wanted, ctx.handle)
            for index, one in zip(wanted, sums, strict=True):
                found[index] = one
        return (None, *found)


def _tiles(inputs: Sequence[Tensor], handle: int) -> list[Tensor]:
    program = _PROGRAMS[handle]
    with _draws(program, inputs) as values:
        return _forward(program, values, program.tiles(values))


def _forward(program: TileProgram, values: Sequence[Tensor], tiles: Iterable[tuple[int, int, int, int]]) -> list[Tensor]:
    out: list[Tensor] = []
    for tile in tiles:
        parts = program.compute(tile, program.cut(values, tile))
        if not out:
            out = [part.new_empty(result.shape) for part, result in zip(parts, program.results, strict=True)]
        for whole, part, result in zip(out, parts, program.results, strict=True):
            result.rows.within(whole, *tile[:2]).copy_(result.rows.split(part))
    return out


_tiles_operator = torch.library.custom_op("autosp::tiles", _tiles, mutates_args=())


@_tiles_operator.register_fake
def _(inputs: Sequence[Tensor], handle: int) -> list[Tensor]:
    return [inputs[-1].new_empty(result.shape, dtype=result.dtype) for result in _PROGRAMS[handle].results]


def _tiles_backward(
    grads: Sequence[Tensor], inputs: Sequence[Tensor], given: Sequence[int], wanted: Sequence[int], handle: int
) -> list[Tensor]:
    program = _PROGRAMS[handle]
    with _draws(program, inputs) as values:
        first = int(program.random)
        return _backward(program, grads, values, given, [index - first for index in wanted], program.tiles(values))


def _backward(
    program: TileProgram,
    grads: Sequence[Tensor],
    values: Sequence[Tensor],
    given: Sequence[int],
    wanted: Sequence[int],
    tiles: Iterable[tuple[int, int, int, int]],
) -> list[Tensor]:
    # Of an input that all tiles read, the sum is kept in float32 at least; of one that is cut to rows there is none.
    sums = [
        torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32) if how.rows is None else value.dtype)
        for value, how in ((values[index], program.cuts[index]) for index in wanted)
    ]
    for tile in tiles:
        with _compat.autograd_inside_operator():
            cut = [value.detach() for value in program.cut(values, tile)]
            for index in wanted:
                cut[index].requires_grad_()
            parts = program.compute(tile, cut)
        own = {
            parts[index]: program.results[index].rows.take(grad, *tile[:2])
            for index, grad in zip(given, grads, strict=True)
            if parts[index].requires_grad
        }
        if not own:
            continue
        found = torch.autograd.grad(list(own), [cut[index] for index in wanted], list(own.values()), allow_unused=True)
        for index, whole, part in zip(wanted, sums, found, strict=True):
            if part is not None:
                how = program.cuts[index]
                target = how.view(whole, tile, split=True)
                target += part if how.rows is None else how.rows.split(part)
        del cut, parts, own, found, part  # else they are held while the next tile is computed
    return [whole.to(values[index].dtype) for index, whole in zip(wanted, sums, strict=True)]


_tiles_backward_operator = torch.library.custom_op("autosp::tiles_backward", _tiles_backward, mutates_args=())


@_tiles_backward_operator.register_fake
def _(grads: Sequence[Tensor], inputs: Sequence[Tensor], given: Sequence[int], wanted: Sequence[int], handle: int) -> list[Tensor]:
    return [torch.empty_like(inputs[index]) for index in wanted]


KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.autosp.tiles.default: _tiles,
    torch.ops.autosp.tiles_backward.default: _tiles_backward,
}
"""What the operators do, for those who want to see inside."""


def program_of(handle: int) -> TileProgram:
    """Return the program of a handle."""
    return _PROGRAMS[handle]


def description(handle: int) -> Any:
    """Return what is equal for programs that do the same to inputs of the same shapes."""
    program = _PROGRAMS[handle]
    return program.module.code, program.cuts, program.results, program.random, program.autocast, tuple(program.tiles())


def rehearse(handle: int, inputs: Sequence[Tensor], *backward: Any) -> float:
    """Run two tiles of a program as its operators do, on tensors whose values do not matter, to see what that takes.

    Args:
        handle: Of the program.
        inputs: Of the operator, fake ones also.
        backward: For the backward operator: the gradients that come, of which results, and which inputs' are wanted.

    Returns:
        How many times the work of the two tiles the whole is.
    """
    program = _PROGRAMS[handle]
    tiles = sorted(program.tiles(), key=lambda tile: (tile[0] - tile[1]) * max(1, tile[3] - tile[2]))
    values, first = inputs[int(program.random) :], int(program.random)
    if backward:
        grads, given, wanted = backward
        _backward(program, grads, values, given, [index - first for index in wanted], tiles[:2])
    else:
        _forward(program, values, tiles[:2])
    work = [(stop - start) * max(1, high - low) for start, stop, low, high in tiles]
    return sum(work) / sum(work[:2])


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
