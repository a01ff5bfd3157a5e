"""`flex_attention` as what it says: scores, changed by a function of batch, head, row and column, and a mask that is another.

Both functions are vmapped over all pairs, as PyTorch's own reference does it; `regions.py` then sees to it that pairs are computed
in tiles. A block mask only says again, a block at a time, what its function says of every pair, if `create_block_mask` made it of
that function. One that comes from elsewhere may hide more, and the operator stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_autosp import _compat

__all__ = ["write_out_flex_attention"]

_MADE_HERE = (", in create_block_mask", ", in _create_empty_block_mask")
"""Frames of functions whose block masks hide nothing but what the mask's function does."""


def write_out_flex_attention(gm: fx.GraphModule, fake_mode: Any) -> None:
    """Replace calls of `flex_attention` in one of Dynamo's graphs, if their block masks were made in it.

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
        if not (only_values and grouped and _made_in_graph(block_mask)):
            continue
        functions = [getattr(gm, str(function.target)) for function in (score_mod, block_mask[-1])]
        values = fx.map_arg((query, key, score_buffers, mask_buffers), lambda source: source.meta["example_value"])
        with fake_mode:
            written = _Written(*functions, scale, *values)
        name = f"written_{node.name}"
        gm.add_submodule(name, written)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_module(name, (query, key, value, *score_buffers, *mask_buffers))
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


class _Written(nn.Module):
    def __init__(
        self, score_mod: fx.GraphModule, mask_mod: fx.GraphModule, scale: float, query: Tensor, key: Tensor, *buffers: Any
    ) -> None:
        super().__init__()
        score_buffers, mask_buffers = buffers
        self.scale, self.num_buffers = scale, len(score_buffers)
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
        attended = self.mask(*indices, *buffers[self.num_buffers :])
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
