"""Attention to a block of keys at a time: kernels that give the log-sum-exp of their scores, and sums of what they give.

The result for all keys is the sum of the results for blocks, each weighed by its part of all weights, which log-sum-exps say. In
backward, a kernel that is given the result and the log-sum-exp for all keys returns a block's part of the gradients, so nothing has
to be divided again. Sums and weights are in float32 at least, whatever the kernels compute in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["BlockSum", "Dropped", "Pairs", "attend", "attend_backward", "kernel_name", "wide"]

aten = torch.ops.aten

MATH_ELEMENTS = 2**25
"""Scores that are held at once where there is no kernel."""

Gradients = tuple[Tensor, Tensor, Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type that results are summed in."""
    return torch.promote_types(dtype, torch.float32)


class Dropped(NamedTuple):
    """Weights that are dropped, each with that probability, drawn from a seed: the same ones in backward."""

    probability: float
    seed: int


class Pairs(NamedTuple):
    """What is said of the pairs of queries and keys of a block.

    Attributes:
        is_causal: Whether query `i` attends to keys `0` to `i` only; then there are as many of both.
        scale: Factor of the scores.
        mask: Bool, true: attend; shape `(B or 1, H or 1, l or 1, n or 1)`. Queries may attend to nothing.
        dropped: Of the weights.
    """

    is_causal: bool
    scale: float
    mask: Tensor | None = None
    dropped: Dropped | None = None


class BlockSum:
    """The result for all keys seen so far.

    Attributes:
        out: Shape `(B, H, l, Dv)`, in the wide type.
        lse: Log-sum-exp of the scores, shape `(B, H, l)`, in the wide type.
    """

    def __init__(self, query: Tensor, value: Tensor) -> None:
        shape = query.shape[:3]
        self.out = query.new_zeros((*shape, value.shape[3]), dtype=wide(query.dtype))
        self.lse = query.new_full(shape, float("-inf"), dtype=wide(query.dtype))

    def add(self, out: Tensor, lse: Tensor, start: int, heads: slice = slice(None)) -> None:
        """Add what queries `[start, start + out.shape[2])` give for a block of keys."""
        rows = slice(start, start + out.shape[2])
        own, total = self.out[:, heads, rows], self.lse[:, heads, rows]
        joined = torch.logaddexp(total, lse)
        one = _finite(joined)
        own.mul_((total - one).exp_().unsqueeze(-1)).add_(out * (lse - one).exp_().unsqueeze(-1))
        total.copy_(joined)


def _finite(lse: Tensor) -> Tensor:
    """Return log-sum-exps that can be taken from scores, also those of queries that attend to nothing: their weights are 0 then."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def attend(query: Tensor, key: Tensor, value: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Attend to a block of keys.

    Args:
        query: Shape `(B, H, l, D)`.
        key: Shape `(B, Hk, n, D)`, `H` a multiple of `Hk`.
        value: Shape `(B, Hk, n, Dv)`.
        pairs: The rest.

    Returns:
        The result, shape `(B, H, l, Dv)`, and the log-sum-exp of the scores, shape `(B, H, l)`, in the wide type; 0 and minus
        infinity for queries that attend to nothing.
    """
    kernel, width = _kernel_of(query, value, pairs), value.shape[3]
    out, lse = kernel.forward(*_padded(kernel, query, key, value), pairs)
    if pairs.mask is not None:  # kernels differ in what they give for those
        nothing = ~pairs.mask.any(-1)
        out, lse = out.masked_fill(nothing.unsqueeze(-1), 0.0), lse.masked_fill(nothing, float("-inf"))
    return out[..., :width], lse


def attend_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pairs: Pairs) -> Gradients:
    """Return a block's part of the gradients of queries, and the gradients of its keys and values.

    They are in the wide type where that costs nothing: a sum over blocks that were each rounded is off by more than one device's.

    Args:
        grad: Of the result for all keys, like `out`.
        query: As given to `attend`, likewise `key`, `value` and `pairs`.
        out: The result for all keys, in the dtype of `query`.
        lse: The log-sum-exp for all keys.
    """
    kernel = _kernel_of(query, value, pairs)
    widths = (query.shape[3], key.shape[3], value.shape[3])
    query, key, value = _padded(kernel, query, key, value)
    grad, out = (F.pad(x, (0, value.shape[3] - x.shape[3])) for x in (grad, out))
    found = kernel.backward(grad, query, key, value, out, _finite(lse), pairs)
    dq, dk, dv = (x[..., :width] for x, width in zip(found, widths, strict=True))
    return dq, dk, dv


class _Kernel(NamedTuple):
    """A kernel; `backward` takes gradient, queries, keys, values, result, log-sum-exp and what is said of pairs.

    Attributes:
        multiple: Of what heads' widths have to be, all equal; 0: anything will do.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Pairs], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Pairs], Gradients]
    multiple: int


def _kernel(device: str, dtype: torch.dtype, width: int, masked: bool, drops: bool) -> _Kernel:
    if drops:
        return _MATH  # other kernels draw what cannot be drawn again
    half = dtype in (torch.float16, torch.bfloat16)
    if device == "cpu":
        return _CPU_FLASH
    if device == "cuda" and half and width <= 256 and not masked:
        return _FLASH
    if device == "cuda" and (dtype is torch.float32 or (half and masked)):
        return _EFFICIENT
    return _MATH


def _kernel_of(query: Tensor, value: Tensor, pairs: Pairs) -> _Kernel:
    width = max(query.shape[3], value.shape[3])
    return _kernel(query.device.type, query.dtype, width, pairs.mask is not None, pairs.dropped is not None)


def kernel_name(device: str, dtype: torch.dtype, width: int, masked: bool, drops: bool) -> str:
    """Return the name of the kernel that `attend` calls.

    Args:
        device: Its type.
        dtype: Of the queries.
        width: The wider of a head of queries and of values.
        masked: Whether there is a mask.
        drops: Whether weights are dropped.
    """
    return _kernel(device, dtype, width, masked, drops).name


def _padded(kernel: _Kernel, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give heads a width that the kernel takes: zeros change no score, and values of zero are cut off again."""
    if not kernel.multiple:
        return query, key, value
    width = max(query.shape[3], value.shape[3])
    width += -width % kernel.multiple
    query, key, value = (x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in (query, key, value))
    return query, key, value


def _added(query: Tensor, pairs: Pairs) -> Tensor | None:
    """Return what is added to scores for the mask."""
    if pairs.mask is None:
        return None
    return torch.zeros(pairs.mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~pairs.mask, float("-inf"))


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, pairs.is_causal, attn_mask=_added(query, pairs), scale=pairs.scale
    )
    return out, lse


def _cpu_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pairs: Pairs) -> Gradients:
    # Processors multiply halves no faster than floats, most of them slower.
    grad, query, key, value, out = (x.to(wide(x.dtype)) for x in (grad, query, key, value, out))
    found: Gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse.contiguous(), 0.0, pairs.is_causal, attn_mask=_added(query, pairs), scale=pairs.scale
    )
    return found


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, pairs.is_causal, False, scale=pairs.scale)
    return out, lse


def _flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pairs: Pairs) -> Gradients:
    seed = torch.empty((), dtype=torch.int64, device=query.device)  # nothing is dropped, so nothing is drawn
    lengths, (is_causal, scale, *_) = (query.shape[2], key.shape[2]), pairs
    found: Gradients = aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse.contiguous(), None, None, *lengths, 0.0, is_causal, seed, seed, scale=scale
    )
    return found


def _bias(query: Tensor, key: Tensor, pairs: Pairs) -> Tensor | None:
    """Return the mask as the efficient kernel wants it: of all pairs, rows apart by a multiple of 16."""
    added = _added(query, pairs)
    if added is None:
        return None
    rows, columns = query.shape[2], key.shape[2]
    added = added.expand(*added.shape[:2], rows, columns)
    return F.pad(added, (0, -columns % 16))[..., :columns].expand(*query.shape[:2], rows, columns)


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    key, value, bias = _repeated(key, query), _repeated(value, query), _bias(query, key, pairs)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, pairs.is_causal, scale=pairs.scale
    )
    return out, lse[..., : query.shape[2]]


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pairs: Pairs
) -> Gradients:
    seed = torch.empty((), dtype=torch.int64, device=query.device)
    keys, values, bias = _repeated(key, query), _repeated(value, query), _bias(query, key, pairs)
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))  # the kernel reads whole groups of 32
    wanted = [True, True, True, False]
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, query, keys, values, bias, out, lse, seed, seed, 0.0, wanted, pairs.is_causal, scale=pairs.scale
    )
    return dq, _summed(dk, key), _summed(dv, value)


def _math_forward(query: Tensor, key: Tensor, value: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    keys, values = (_repeated(x, query) for x in (key, value))
    outs, lses, draw = [], [], _drawing(query, pairs)
    for start, stop in _ranges(query, key):
        scores = _scores(query, keys, start, stop, pairs)
        lse = scores.logsumexp(-1)
        weights = (scores - _finite(lse).unsqueeze(-1)).exp_().mul_(draw(scores))
        outs.append((weights @ values.to(scores.dtype)).to(query.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _math_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, pairs: Pairs) -> Gradients:
    keys, values = (_repeated(x, query).to(lse.dtype) for x in (key, value))
    dqs, dk, dv, draw = [], torch.zeros_like(keys), torch.zeros_like(values), _drawing(query, pairs)
    for start, stop in _ranges(query, key):
        own, result = (x[:, :, start:stop].to(lse.dtype) for x in (grad, out))
        weights = (_scores(query, keys, start, stop, pairs) - lse[:, :, start:stop, None]).exp_()
        kept = draw(weights)
        dv += (weights * kept).transpose(-2, -1) @ own
        # Of what is dropped too, what all weights sum to is what the result says.
        weights *= own @ values.transpose(-2, -1) * kept - (own * result).sum(-1, keepdim=True)
        dqs.append(weights @ keys * pairs.scale)
        dk += weights.transpose(-2, -1) @ query[:, :, start:stop].to(lse.dtype) * pairs.scale
    return torch.cat(dqs, 2), _summed(dk, key), _summed(dv, value)


def _scores(query: Tensor, keys: Tensor, start: int, stop: int, pairs: Pairs) -> Tensor:
    dtype = wide(query.dtype)
    scores = query[:, :, start:stop].to(dtype) @ keys.to(dtype).transpose(-2, -1) * pairs.scale
    if pairs.is_causal:
        rows, columns = (torch.arange(*ends, device=query.device) for ends in ((start, stop), (0, keys.shape[2])))
        scores.masked_fill_(columns > rows[:, None], float("-inf"))
    if pairs.mask is not None:
        mask = pairs.mask
        scores.masked_fill_(~(mask if mask.shape[2] == 1 else mask[:, :, start:stop]), float("-inf"))
    return scores


def _drawing(query: Tensor, pairs: Pairs) -> Callable[[Tensor], Tensor | float]:
    """Return what gives, one range of rows after the other, the factors of weights: 0 for those that are dropped."""
    if pairs.dropped is None:
        return lambda weights: 1.0
    probability, seed = pairs.dropped
    factor = 1 / (1 - probability) if probability < 1 else 0.0
    generator = torch.Generator(query.device).manual_seed(seed)

    def draw(weights: Tensor) -> Tensor:
        kept = torch.rand(weights.shape, generator=generator, device=weights.device) >= probability
        return kept.to(weights.dtype) * factor

    return draw


def _ranges(query: Tensor, key: Tensor) -> list[tuple[int, int]]:
    rows = query.shape[2]
    step = max(1, MATH_ELEMENTS // max(1, query.shape[0] * query.shape[1] * key.shape[2]))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) if x.shape[1] != query.shape[1] else x


def _summed(grad: Tensor, x: Tensor) -> Tensor:
    """Add up the gradients of heads that `_repeated` made of one."""
    return grad if grad.shape == x.shape else grad.unflatten(1, (x.shape[1], -1)).sum(2)


_CPU_FLASH = _Kernel("CPU flash", _cpu_forward, _cpu_backward, 1)
_FLASH = _Kernel("flash", _flash_forward, _flash_backward, 8)
_EFFICIENT = _Kernel("efficient", _efficient_forward, _efficient_backward, 8)
_MATH = _Kernel("math", _math_forward, _math_backward, 0)
