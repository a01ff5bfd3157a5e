"""A few positions at a time, by hand: an MLP that is computed again in backward, and a loss whose logits are never all there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOGITS_BYTES = 2**30
"""Of a tile's logits, as floats."""


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], num_tiles: int, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.function, ctx.num_tiles = function, num_tiles
        ctx.save_for_backward(x, *parameters)
        out = torch.empty_like(x)
        for tile, part in zip(x.tensor_split(num_tiles, 1), out.tensor_split(num_tiles, 1), strict=True):
            part.copy_(function(tile))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *parameters = ctx.saved_tensors
        grad_x, grads = torch.empty_like(x), [torch.zeros_like(parameter) for parameter in parameters]
        tiles = (one.tensor_split(ctx.num_tiles, 1) for one in (x, grad, grad_x))
        for tile, grad_tile, grad_part in zip(*tiles, strict=True):
            leaf = tile.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.function(leaf)
            found, *own = torch.autograd.grad(out, [leaf, *parameters], grad_tile)
            grad_part.copy_(found)
            for total, one in zip(grads, own, strict=True):
                total += one
        return None, None, grad_x, *grads


def tiled(function: Callable[[Tensor], Tensor], num_tiles: int, x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return `function(x)` for a function of single positions, from `(B, s, D)` to `(B, s, D)`, that uses these parameters."""
    return _Tiled.apply(function, num_tiles, x, *parameters)


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, num_tiles: int) -> Tensor:
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        total = hidden.new_zeros((), dtype=torch.float32)
        tiles = (one.tensor_split(num_tiles, 1) for one in (hidden, labels, grad_hidden))
        for tile, own, grad_part in zip(*tiles, strict=True):
            leaf, leaf_weight = tile.detach().requires_grad_(), weight.detach().requires_grad_()
            with torch.enable_grad():
                loss = summed_loss(leaf, leaf_weight, own)
            found, found_weight = torch.autograd.grad(loss, [leaf, leaf_weight])
            grad_part.copy_(found)
            grad_weight += found_weight
            total += loss.detach()
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None


def tiled_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the summed loss of `(B, s, D)`, whose gradients are made in forward, tile by tile."""
    num_tiles = -(-labels.numel() * weight.shape[0] * 4 // LOGITS_BYTES)
    return _TiledLoss.apply(hidden, weight, labels, num_tiles)


def summed_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of all positions with a label, summed, in float32 as Transformers computes it."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
