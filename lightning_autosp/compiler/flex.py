"""`flex_attention` as what it says: scores, changed by a function of batch, head, row and column, and a mask that is another.

Both functions are vmapped over all pairs, as PyTorch's own reference does it; `regions.py` then sees to it that pairs are computed
in tiles. A block mask only says again, a block at a time, what its function says of every pair, if `create_block_mask` made it of
that function. One that comes from elsewhere may list other blocks, and what kernels make of them is written out too: the function
is asked in blocks that are listed as attended in part, not in those listed as attended in full.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_autosp import _compat

__all__ = ["write_out_flex_attention"]

_MADE_HERE = (", in create_block_mask", ", in _create_empty_block_mask")
"""Frames of functions whose block masks hide nothing but what the mask's function does."""


def write_out_flex_attention(gm: fx.GraphModule, fake_mode: Any) -> None:
    """Replace calls of `flex_attention` in one of Dynamo's graphs.

    Args:
        gm: The graph; changed in place.
        fake_mode: That of its example values.
    """
    for node in list(gm.graph.nodes):
        if node.target is not torch.ops.higher_order.flex_attention:
            continue
        query, key, value, score_mod, block_mask, scale, _, score_buffers, mask_buffers = node.args
        only_values = all(user.args[1] == 0 for user in node.users)
        grouped = query.meta["example_value"].shape[0] == key.meta["example_value"].shape[0]
        if not (only_values and grouped):
            continue
        score_mod, mask_mod = (getattr(gm, str(function.target)) for function in (score_mod, block_mask[-1]))
        lists = [] if _made_in_graph(block_mask) else [one for one in block_mask[2:6] if one is not None]
        values = fx.map_arg((query, key, score_buffers, mask_buffers, lists), lambda source: source.meta["example_value"])
        with fake_mode:
            written = _Written(score_mod, mask_mod, scale, block_mask[-3:-1], *values)
        name = f"written_{node.name}"
        gm.add_submodule(name, written)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_module(name, (query, key, value, *score_buffers, *mask_buffers, *lists))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _made_in_graph(block_mask: tuple[Any, ...]) -> bool:
    num_blocks = block_mask[2]
    return isinstance(num_blocks, fx.Node) and any(frame in num_blocks.meta.get("stack_trace", "") for frame in _MADE_HERE)


def _over_pairs(function: nn.Module, num_leading: int, num_buffers: int) -> Any:
    """Return `function(*leading, b, h, row, column, *buffers)` over tensors of batch, heads, rows and columns."""
    for index in (3, 2, 1, 0):
        indices: list[int | None] = [None] * 4
        indices[index] = 0
        function = torch.vmap(function, in_dims=(*[0] * num_leading, *indices, *[None] * num_buffers))  # type: ignore[assignment]
    return function


def _indices(query: Tensor, key: Tensor) -> list[Tensor]:
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return [torch.arange(size, device=query.device) for size in sizes]


def _blocks(lists: Sequence[Tensor]) -> list[Tensor]:
    """Return which blocks are attended in part and, if the mask says it, which in full.

    Args:
        lists: For each of the two, how many blocks of columns every block of rows has, and which they are, that many first.
    """
    found = []
    for number, columns in zip(lists[::2], lists[1::2], strict=True):
        size = columns.shape[-1]
        listed = torch.arange(size, device=columns.device) < number[..., None]
        places = torch.where(listed, columns, size).long()  # what is not listed goes behind the last
        found.append(places.new_zeros((*places.shape[:-1], size + 1)).scatter(-1, places, 1)[..., :size].bool())
    return found


class _InBlocks(nn.Module):
    """The function of a mask, asked where a kernel asks it."""

    def __init__(self, mask_mod: nn.Module, blocks: Sequence[Tensor], block_size: tuple[int, int]) -> None:
        super().__init__()
        self.mask_mod, self.num_blocks, self.block_size = mask_mod, len(blocks), block_size
        self.of_each = [size > 1 for size in blocks[0].shape[:2]]
        """Whether samples, and whether heads, have blocks of their own."""

    def forward(self, sample: Tensor, head: Tensor, row: Tensor, column: Tensor, *buffers: Tensor) -> Tensor:
        own = [index if each else torch.zeros_like(index) for index, each in zip((sample, head), self.of_each, strict=True)]
        place = (*own, *(index // size for index, size in zip((row, column), self.block_size, strict=True)))
        blocks = buffers[len(buffers) - self.num_blocks :]
        attended = self.mask_mod(sample, head, row, column, *buffers[: len(buffers) - self.num_blocks])
        in_part, *in_full = (one[place] for one in blocks)
        return (attended & in_part) | in_full[0] if in_full else attended & in_part


class _Written(nn.Module):
    def __init__(
        self,
        score_mod: fx.GraphModule,
        mask_mod: nn.Module,
        scale: float,
        block_size: tuple[int, int],
        query: Tensor,
        key: Tensor,
        score_buffers: Sequence[Any],
        mask_buffers: Sequence[Any],
        lists: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self.scale, self.num_buffers, self.num_lists = scale, len(score_buffers), len(lists)
        if lists:
            blocks = _blocks(lists)
            mask_mod, mask_buffers = _InBlocks(mask_mod, blocks, block_size), [*mask_buffers, *blocks]
        indices = _indices(query, key)
        placeholders = [node for node in score_mod.graph.nodes if node.op == "placeholder"]
        self.score: fx.GraphModule | None = None
        if score_mod.graph.output_node().args[0] is not placeholders[0]:
            scores = query.new_empty([index.shape[0] for index in indices], dtype=_wide(query.dtype))
            over_pairs = _over_pairs(score_mod, 1, len(score_buffers))
            self.score = _compat.make_fx(over_pairs, tracing_mode="real")(scores, *indices, *score_buffers)
        self.mask = _compat.make_fx(_over_pairs(mask_mod, 0, len(mask_buffers)), tracing_mode="real")(*indices, *mask_buffers)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *buffers: Any) -> tuple[Tensor, None, None]:
        indices = _indices(query, key)
        place = len(buffers) - self.num_lists
        attended = self.mask(*indices, *buffers[self.num_buffers : place], *_blocks(buffers[place:]))
        groups = query.shape[1] // key.shape[1]
        if self.score is None:
            out = F.scaled_dot_product_attention(query, key, value, attended, scale=self.scale, enable_gqa=groups > 1)
            return out, None, None
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = (query @ key.transpose(-2, -1)).to(_wide(query.dtype)) * self.scale
        scores = self.score(scores, *indices, *buffers[: self.num_buffers])
        # Rows that attend to nothing are zero.
        weights = scores.masked_fill(~attended, torch.finfo(scores.dtype).min).softmax(-1) * attended
        return weights.to(query.dtype) @ value, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
