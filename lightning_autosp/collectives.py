"""The collectives the compiler emits, each with its exact autograd.

All ranks of a sequence group call `backward` on the same global loss. What autograd then differentiates is the *sum* of those equal
losses over the ranks, so every collective's backward is its plain transpose and parameter gradients are averaged over all ranks:

| forward                     | backward                    |
|-----------------------------|-----------------------------|
| all-gather                  | reduce-scatter (sum)        |
| all-reduce (sum)            | all-reduce (sum)            |
| all-to-all                  | all-to-all                  |
| slice                       | zero-pad (torch's own)      |
| parameter on use            | average over all ranks      |

Functions take local tensors and a `Group`; they work eagerly and under AOTAutograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "Group",
    "all_gather_sequence",
    "all_reduce_sum",
    "all_to_all",
    "amax_across",
    "average_gradient",
    "broadcast_first",
    "gather_parameter",
    "reduce_scatter_sequence",
    "stack_across",
    "start_all_gather",
    "start_all_to_all",
    "wait",
]

_ops = torch.ops._c10d_functional


class Group(NamedTuple):
    """A process group as graphs see it: its name in torch's registry, its size, this process's rank in it.

    A named tuple, because that is what an FX graph can hold as a constant.

    Attributes:
        name: Of the process group.
        size: How many ranks take part.
        rank: This one's number among them.
        members: Their numbers in the process group, ascending, if they are not all of it. All of it calls a collective of a part
            (every rank one of its own part), in which others are sent nothing: no process groups have to be made. Of the
            collectives, `all_to_all` and `all_gather` do so.
        whole: Ranks of the process group, if not all take part.
    """

    name: str
    size: int
    rank: int
    members: tuple[int, ...] = ()
    whole: int = 0

    @classmethod
    def of(cls, process_group: dist.ProcessGroup) -> Group:
        return cls(process_group.group_name, process_group.size(), process_group.rank())

    def part(self, ranks: Sequence[int]) -> Group:
        """Return the group of some of its ranks, ascending, this one among them."""
        members = self.members or range(self.size)
        return Group(self.name, len(ranks), list(ranks).index(self.rank), tuple(members[r] for r in ranks), self.whole or self.size)

    def spread(self, splits: Sequence[int]) -> list[int]:
        """Return sizes for all ranks of the process group, of sizes for those that take part."""
        if not self.members:
            return list(splits)
        sizes = dict(zip(self.members, splits, strict=True))
        return [sizes.get(rank, 0) for rank in range(self.whole)]


def _all_reduce(x: Tensor, op: str, group: Group) -> Tensor:
    _require_all(group)
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), op, group.name))


def _require_all(group: Group) -> None:
    if group.members:
        raise NotImplementedError(f"the collective is not written for a part of a process group, as {group} is")


def _all_gather(x: Tensor, group: Group) -> Tensor:
    """Concatenate equally shaped tensors along dim 0."""
    return wait(start_all_gather(x, group))


def start_all_gather(x: Tensor, group: Group) -> Tensor:
    """Begin to concatenate equally shaped tensors along dim 0, without autograd; `wait` gives the result."""
    if group.members:
        sizes = [x.shape[0]] * group.size
        return start_all_to_all(torch.cat([x] * group.size), sizes, sizes, group)
    return _ops.all_gather_into_tensor(x.contiguous(), group.size, group.name)


def start_all_to_all(x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: Group) -> Tensor:
    """Begin to exchange parts of dim 0 of the given sizes, without autograd; `wait` gives the result."""
    return _ops.all_to_all_single(x.contiguous(), group.spread(output_splits), group.spread(input_splits), group.name)


def wait(x: Tensor) -> Tensor:
    """Return what a collective that was begun gives."""
    return _ops.wait_tensor(x)


def _reduce_scatter(x: Tensor, op: str, group: Group) -> Tensor:
    """Reduce and keep this rank's equal part of dim 0."""
    _require_all(group)
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), op, group.size, group.name))


def _all_to_all(x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: Group) -> Tensor:
    """Exchange parts of dim 0 of the given sizes."""
    return wait(start_all_to_all(x, output_splits, input_splits, group))


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    missing = rows - x.shape[0]
    return torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) if missing else x


def _split_rows(x: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Undo `_pad_rows` for a concatenation of blocks padded to the same number of rows."""
    rows = max(lengths)
    return [block[:length] for block, length in zip(x.split(rows), lengths, strict=True)]


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _all_reduce(x, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, "sum", ctx.group), None


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """Sum a tensor of any shape over the group; every rank gets the sum."""
    return _AllReduceSum.apply(x, group) if group.size > 1 else x


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: tuple[int, ...], group: Group) -> Tensor:
        ctx.lengths, ctx.group = lengths, group
        gathered = _all_gather(_pad_rows(x, max(lengths)), group)
        return gathered if len(set(lengths)) == 1 else torch.cat(_split_rows(gathered, lengths))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        lengths = ctx.lengths
        if len(set(lengths)) > 1:
            grad = torch.cat([_pad_rows(part, max(lengths)) for part in grad.split(lengths)])
        return _reduce_scatter(grad, "sum", ctx.group)[: lengths[ctx.group.rank]], None, None


def all_gather_sequence(x: Tensor, dim: int, lengths: Sequence[int], group: Group) -> Tensor:
    """Concatenate every rank's part along `dim`.

    Args:
        x: This rank's part, size `lengths[group.rank]` along `dim`.
        dim: The dimension to join.
        lengths: Every rank's size along `dim`; they may differ.
        group: The sequence group.

    Returns:
        The whole tensor, size `sum(lengths)` along `dim`, contiguous when `dim == 0`.
    """
    rows = x.movedim(dim, 0)
    return _AllGatherRows.apply(rows, tuple(lengths), group).movedim(0, dim)


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: tuple[int, ...], group: Group) -> Tensor:
        ctx.lengths, ctx.group = lengths, group
        if len(set(lengths)) > 1:
            x = torch.cat([_pad_rows(part, max(lengths)) for part in x.split(lengths)])
        return _reduce_scatter(x, "sum", group)[: lengths[group.rank]]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gathered = _all_gather(_pad_rows(grad, max(ctx.lengths)), ctx.group)
        return torch.cat(_split_rows(gathered, ctx.lengths)), None, None


def reduce_scatter_sequence(x: Tensor, dim: int, lengths: Sequence[int], group: Group) -> Tensor:
    """Sum every rank's whole tensor and keep this rank's part along `dim`: the transpose of `all_gather_sequence`."""
    return _ReduceScatterRows.apply(x.movedim(dim, 0), tuple(lengths), group).movedim(0, dim)


def stack_across(x: Tensor, group: Group) -> Tensor:
    """Stack every rank's equally shaped `x` along a new dim 0: shape `(group.size, *x.shape)`."""
    return all_gather_sequence(x.unsqueeze(0), 0, (1,) * group.size, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, output_splits: tuple[int, ...], input_splits: tuple[int, ...], group: Group) -> Tensor:
        ctx.splits, ctx.group = (output_splits, input_splits), group
        return _all_to_all(x, output_splits, input_splits, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        output_splits, input_splits = ctx.splits
        return _all_to_all(grad, input_splits, output_splits, ctx.group), None, None, None


def all_to_all(x: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: Group) -> Tensor:
    """Send `input_splits[r]` rows of `x` to rank `r` and receive `output_splits[r]` rows from it, in rank order."""
    return _AllToAll.apply(x, tuple(output_splits), tuple(input_splits), group)


class _AmaxAcross(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dims: tuple[int, ...], keepdim: bool, sign: int, group: Group) -> Tensor:
        local = x.amax(dims, keepdim=True) if sign > 0 else x.amin(dims, keepdim=True)
        best = _all_reduce(local, "max" if sign > 0 else "min", group)
        ties = (x == best) | (x.isnan() & best.isnan() if x.is_floating_point() else x == best)
        ctx.save_for_backward(ties, _all_reduce(ties.sum(dims, keepdim=True), "sum", group))
        ctx.dims, ctx.keepdim, ctx.group = dims, keepdim, group
        return best if keepdim else best.squeeze(dims)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        ties, count = ctx.saved_tensors
        grad = _all_reduce(grad, "sum", ctx.group)
        if not ctx.keepdim:
            for dim in sorted(ctx.dims):
                grad = grad.unsqueeze(dim)
        return ties * (grad / count), None, None, None, None


def amax_across(x: Tensor, dims: Sequence[int], keepdim: bool, group: Group, *, minimum: bool = False) -> Tensor:
    """Maximum (or minimum) of a sharded tensor over `dims`, one of which is sharded.

    The gradient is shared evenly among all equal maxima on all ranks, as `torch.amax` does on one device.
    """
    dims = tuple(sorted(dim % x.ndim for dim in dims)) or tuple(range(x.ndim))
    return _AmaxAcross.apply(x, dims, keepdim, -1 if minimum else 1, group)


def broadcast_first(x: Tensor, group: Group) -> Tensor:
    """Give every rank the value of the group's first rank; no gradient."""
    return _ops.wait_tensor(_ops.broadcast(x.detach().contiguous(), 0, group.name))


class _AverageGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, "sum", ctx.group) / ctx.group.size, None


def average_gradient(x: Tensor, group: Group) -> Tensor:
    """Identity whose gradient is averaged over the group: a replicated parameter on use."""
    return _AverageGradient.apply(x, group) if group.size > 1 else x


class _GatherParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, num_rows: int, group: Group) -> Tensor:
        ctx.rows, ctx.group = shard.shape[0], group
        chunk = -(-num_rows // group.size)
        return _all_gather(_pad_rows(shard, chunk), group)[:num_rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        group = ctx.group
        chunk = -(-grad.shape[0] // group.size)
        reduced = _reduce_scatter(_pad_rows(grad, chunk * group.size), "sum", group)
        return reduced[: ctx.rows] / group.size, None, None


def gather_parameter(shard: Tensor, num_rows: int, group: Group) -> Tensor:
    """Gather a parameter sharded over dim 0; its gradient is averaged over the group and scattered.

    Args:
        shard: This rank's rows, cut as `torch.chunk` cuts `num_rows` rows (DTensor's `Shard(0)`); may have none.
        num_rows: Rows of the whole parameter.
        group: All ranks, data times sequence.
    """
    return _GatherParameter.apply(shard, num_rows, group)
