"""Attention over several ranks as one operator: what is sent and computed in between is no matter of compilers.

A ring of 64 ranks takes 64 exchanges and as many kernels a layer, and which positions each of them gets differs from rank to rank.
In a graph it is one node, the same on all ranks: it takes this rank's parts and gives this rank's part and its log-sum-exp, which
backward needs. Nothing else is kept, keys and values of other ranks come again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_autosp.attention.blocks import Gradients, wide
from lightning_autosp.attention.zigzag import held_chunks
from lightning_autosp.collectives import Group

__all__ = ["KERNELS", "BlockMask", "Call", "Method", "across_ranks", "call_of", "register"]


class BlockMask(NamedTuple):
    """A mask that is computed a block of pairs at a time.

    Attributes:
        handle: Of the `TileProgram` whose one result it is: true or 0 where queries attend. Its rows and columns are those of the
            whole sequence.
        inputs: Of the program, whole.
    """

    handle: int
    inputs: tuple[Tensor, ...]


class Call(NamedTuple):
    """What a method is told beside tensors.

    Attributes:
        is_causal: Whether queries attend to keys up to their own position, by the kernels' flag; ranks then hold zigzag order.
        scale: Factor of the scores.
        query_lengths: Every rank's number of queries; in zigzag order the lengths of the `2 P` chunks (`zigzag.chunk_lengths`).
        key_lengths: Every rank's number of keys, likewise.
        group: The sequence group.
        head_chunks: Into how many groups the heads of keys and values are divided, one after the other.
        mask: The program that computes the mask; -1: there is none.
        first_head: The number of the first query head, of those that the mask knows.
        dropout: Probability that a weight is dropped; the last of the other tensors is then a seed.
    """

    is_causal: bool
    scale: float
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    group: Group
    head_chunks: int = 1
    mask: int = -1
    first_head: int = 0
    dropout: float = 0.0

    @property
    def in_zigzag(self) -> bool:
        """Whether ranks hold queries, and in a ring keys, in zigzag order."""
        return len(self.query_lengths) == 2 * self.group.size

    def chunks(self, rank: int) -> tuple[int, ...]:
        """Return the numbers of the chunks of the sequence whose queries a rank holds."""
        return held_chunks(rank, self.group.size) if self.in_zigzag else (rank,)


class Method(NamedTuple):
    """Forward gives the result, shape `(B, H, l, Dv)`, contiguous, and the log-sum-exp, shape `(B, H, l)`; backward gradients.

    Both are given queries, keys and values, the other tensors and the call; backward, between the two, the gradient of the result,
    the result and the log-sum-exp.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Call], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Sequence[Tensor], Tensor, Tensor, Tensor, Call], Gradients]


_METHODS: dict[str, Method] = {}


def register(name: str, method: Method) -> None:
    """Make a method known to `across_ranks`."""
    _METHODS[name] = method


def across_ranks(name: str, query: Tensor, key: Tensor, value: Tensor, mask: BlockMask | None, call: Call) -> Tensor:
    """Attend to all ranks' keys by a registered method; exact in forward and backward.

    Args:
        name: Of the method.
        query: This rank's queries, shape `(B, H, l, D)`.
        key: This rank's keys, shape `(B, Hk, n, D)`, `H` a multiple of `Hk`.
        value: This rank's values, shape `(B, Hk, n, Dv)`.
        mask: Of the whole sequence.
        call: The rest; what it says of the mask is `mask`'s.

    Returns:
        Shape `(B, H, l, Dv)`.
    """
    others = () if mask is None else mask.inputs
    if mask is not None:
        call = call._replace(mask=mask.handle)
    if call.dropout:
        others = (*others, torch.randint(2**62, (), dtype=torch.int64))
    return _AcrossRanks.apply(name, query, key, value, call, *others)  # type: ignore[no-any-return]


class _AcrossRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, query: Tensor, key: Tensor, value: Tensor, call: Call, *others: Tensor) -> Tensor:
        out, lse = torch.ops.autosp.across_ranks(query, key, value, list(others), name, *_flat(call))
        ctx.save_for_backward(query, key, value, *others, out, lse)
        ctx.name, ctx.call = name, call
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *others, out, lse = ctx.saved_tensors
        given = (query, key, value, others, grad, out, lse)
        found = torch.ops.autosp.across_ranks_backward(*given, ctx.name, *_flat(ctx.call))
        return (None, *found, None, *(None for _ in others))


def _flat(call: Call) -> tuple[Any, ...]:
    """Return what operators may be given."""
    group = call.group
    sizes = [group.size, group.rank, group.whole, *group.members]
    return (*(list(one) if isinstance(one, tuple) else one for one in call[:4]), group.name, sizes, *call[5:])


def call_of(arguments: Sequence[Any]) -> Call:
    """Return the call of which one of the operators was told, from its arguments."""
    is_causal, scale, query_lengths, key_lengths, name, sizes, *rest = arguments[-len(Call._fields) - 1 :]
    size, rank, whole, *members = sizes
    group = Group(name, size, rank, tuple(members), whole)
    return Call(is_causal, scale, tuple(query_lengths), tuple(key_lengths), group, *rest)


def _across_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    others: Sequence[Tensor],
    name: str,
    is_causal: bool,
    scale: float,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    group_name: str,
    group_sizes: Sequence[int],
    head_chunks: int,
    mask: int,
    first_head: int,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    rest = (is_causal, scale, query_lengths, key_lengths, group_name, group_sizes, head_chunks, mask, first_head, dropout)
    return _METHODS[name].forward(query, key, value, others, call_of(rest))


_operator = torch.library.custom_op("autosp::across_ranks", _across_ranks, mutates_args=())


@_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = query.shape[:3]
    return query.new_empty((*rows, value.shape[3])), query.new_empty(rows, dtype=wide(query.dtype))


def _across_ranks_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    others: Sequence[Tensor],
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    name: str,
    is_causal: bool,
    scale: float,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    group_name: str,
    group_sizes: Sequence[int],
    head_chunks: int,
    mask: int,
    first_head: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rest = (is_causal, scale, query_lengths, key_lengths, group_name, group_sizes, head_chunks, mask, first_head, dropout)
    return _METHODS[name].backward(query, key, value, others, grad, out, lse, call_of(rest))


_backward_operator = torch.library.custom_op("autosp::across_ranks_backward", _across_ranks_backward, mutates_args=())


@_backward_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.autosp.across_ranks.default: _across_ranks,
    torch.ops.autosp.across_ranks_backward.default: _across_ranks_backward,
}
"""What the operators do, for those who want to see inside."""
