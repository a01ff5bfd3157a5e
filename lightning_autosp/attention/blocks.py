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

__all__ = ["BlockSum", "attend", "attend_backward", "kernel_name", "wide"]

aten = torch.ops.aten

MATH_ELEMENTS = 2**25
"""Scores that are held at once where there is no kernel."""

Gradients = tuple[Tensor, Tensor, Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type that results are summed in."""
    return torch.promote_types(dtype, torch.float32)


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
        own.mul_((total - joined).exp_().unsqueeze(-1)).add_(out * (lse - joined).exp_().unsqueeze(-1))
        total.copy_(joined)


def attend(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attend to a block of keys.

    Args:
        query: Shape `(B, H, l, D)`.
        key: Shape `(B, Hk, n, D)`, `H` a multiple of `Hk`.
        value: Shape `(B, Hk, n, Dv)`.
        is_causal: Whether query `i` attends to keys `0` to `i` only; then `l == n`.
        scale: Factor of the scores.

    Returns:
        The result, shape `(B, H, l, Dv)`, and the log-sum-exp of the scores, shape `(B, H, l)`, in the wide type.
    """
    kernel, width = _kernel(query, value), value.shape[3]
    out, lse = kernel.forward(*_padded(kernel, query, key, value), is_causal, scale)
    return out[..., :width], lse


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    """Return a block's part of the gradients of queries, and the gradients of its keys and values.

    Args:
        grad: Of the result for all keys, like `out`.
        query: As given to `attend`, likewise `key`, `value`, `is_causal` and `scale`.
        out: The result for all keys, in the dtype of `query`.
        lse: The log-sum-exp for all keys.
    """
    kernel = _kernel(query, value)
    widths = (query.shape[3], key.shape[3], value.shape[3])
    query, key, value = _padded(kernel, query, key, value)
    grad, out = (F.pad(x, (0, value.shape[3] - x.shape[3])) for x in (grad, out))
    found = kernel.backward(grad, query, key, value, out, lse, is_causal, scale)
    dq, dk, dv = (x[..., :width] for x, width in zip(found, widths, strict=True))
    return dq, dk, dv


class _Kernel(NamedTuple):
    """A kernel; `backward` takes gradient, queries, keys, values, result, log-sum-exp, causal, scale.

    Attributes:
        multiple: Of what heads' widths have to be, all equal; 0: anything will do.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], Gradients]
    multiple: int


def _kernel(query: Tensor, value: Tensor) -> _Kernel:
    width = max(query.shape[3], value.shape[3])
    if query.device.type == "cpu":
        return _CPU_FLASH
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and width <= 256:
        return _FLASH
    if query.device.type == "cuda" and query.dtype is torch.float32:
        return _EFFICIENT
    return _MATH


def kernel_name(query: Tensor, value: Tensor) -> str:
    """Return the name of the kernel that `attend` calls."""
    return _kernel(query, value).name


def _padded(kernel: _Kernel, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give heads a width that the kernel takes: zeros change no score, and values of zero are cut off again."""
    if not kernel.multiple:
        return query, key, value
    width = max(query.shape[3], value.shape[3])
    width += -width % kernel.multiple
    query, key, value = (x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in (query, key, value))
    return query, key, value


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)
    return out, lse


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    found: Gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse.contiguous(), 0.0, is_causal, scale=scale
    )
    return found


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)
    return out, lse


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    seed = torch.empty((), dtype=torch.int64, device=query.device)  # nothing is dropped, so nothing is drawn
    lengths = (query.shape[2], key.shape[2])
    found: Gradients = aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse.contiguous(), None, None, *lengths, 0.0, is_causal, seed, seed, scale=scale
    )
    return found


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    key, value = (_repeated(x, query) for x in (key, value))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(query, key, value, None, True, 0.0, is_causal, scale=scale)
    return out, lse[..., : query.shape[2]]


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    seed = torch.empty((), dtype=torch.int64, device=query.device)
    keys, values = (_repeated(x, query) for x in (key, value))
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))  # the kernel reads whole groups of 32
    wanted = [True, True, True, False]
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, query, keys, values, None, out, lse, seed, seed, 0.0, wanted, is_causal, scale=scale
    )
    return dq, _summed(dk, key), _summed(dv, value)


def _math_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    keys, values = (_repeated(x, query) for x in (key, value))
    outs, lses = [], []
    for start, stop in _ranges(query, key):
        scores = _scores(query, keys, start, stop, is_causal, scale)
        lse = scores.logsumexp(-1)
        outs.append(((scores - lse.unsqueeze(-1)).exp_() @ values.to(scores.dtype)).to(query.dtype))
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _math_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, is_causal: bool, scale: float
) -> Gradients:
    keys, values = (_repeated(x, query).to(lse.dtype) for x in (key, value))
    dqs, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    for start, stop in _ranges(query, key):
        own, result = (x[:, :, start:stop].to(lse.dtype) for x in (grad, out))
        weights = (_scores(query, keys, start, stop, is_causal, scale) - lse[:, :, start:stop, None]).exp_()
        dv += weights.transpose(-2, -1) @ own
        weights *= own @ values.transpose(-2, -1) - (own * result).sum(-1, keepdim=True)
        dqs.append((weights @ keys * scale).to(query.dtype))
        dk += weights.transpose(-2, -1) @ query[:, :, start:stop].to(lse.dtype) * scale
    return torch.cat(dqs, 2), _summed(dk, key).to(key.dtype), _summed(dv, value).to(value.dtype)


def _scores(query: Tensor, keys: Tensor, start: int, stop: int, is_causal: bool, scale: float) -> Tensor:
    dtype = wide(query.dtype)
    scores = query[:, :, start:stop].to(dtype) @ keys.to(dtype).transpose(-2, -1) * scale
    if is_causal:
        rows, columns = (torch.arange(*ends, device=query.device) for ends in ((start, stop), (0, keys.shape[2])))
        scores.masked_fill_(columns > rows[:, None], float("-inf"))
    return scores


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
