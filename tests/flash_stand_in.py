"""What stands in for the flash-attn package, which needs a GPU: its functions' signatures and how they reach their kernels.

As in flash-attn 2.8, an `autograd.Function` calls custom operators; here these compute softmax and its gradient by plain PyTorch.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_autosp import _compat

Window = tuple[int, int]


def _numbers(cu_seqlens: Tensor | None, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the document, the position within it and its length for every position."""
    positions = torch.arange(length, device=device)
    if cu_seqlens is None:
        return torch.zeros_like(positions), positions, torch.full_like(positions, length)
    document = torch.searchsorted(cu_seqlens[1:].long().contiguous(), positions, right=True)
    return document, positions - cu_seqlens[document], cu_seqlens.diff()[document]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    slopes: Tensor | None,
) -> Tensor:
    """Attention of `(B, L, H, D)`; rows that attend to nothing are zero."""
    groups = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    document_q, row, rows = (x[:, None] for x in _numbers(cu_seqlens_q, q.shape[1], q.device))
    document_k, column, columns = _numbers(cu_seqlens_k, k.shape[1], q.device)
    distance = row + columns - rows - column  # the last row is aligned with the last column
    if slopes is not None:
        scores = scores - slopes.to(scores.dtype).view(-1, q.shape[2], 1, 1) * distance.abs()
    shown = document_q == document_k
    shown = shown & (distance >= 0) if causal else shown
    shown = shown & (distance <= left) if left >= 0 else shown
    shown = shown & (distance >= -right) if right >= 0 else shown
    weights = scores.masked_fill(~shown, torch.finfo(scores.dtype).min).softmax(-1) * shown
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def _padded(*tensors: Tensor) -> list[Tensor]:
    return [x if x.ndim == 4 else x[None] for x in tensors]


@torch.library.custom_op("flash_stand_in::forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    options = (softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
    return torch.empty_like(q).copy_(_attend(*_padded(q, k, v), cu_seqlens_q, cu_seqlens_k, *options).view(q.shape))


@_forward.register_fake
def _(q: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("flash_stand_in::backward", mutates_args=("dq", "dk", "dv"))
def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> None:
    with _compat.autograd_inside_operator():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        options = (softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes)
        out = _attend(*_padded(*leaves), cu_seqlens_q, cu_seqlens_k, *options)
    for target, gradient in zip((dq, dk, dv), torch.autograd.grad(out, leaves, dout.view(out.shape)), strict=True):
        target.copy_(gradient)


@_backward.register_fake
def _(*args: Any) -> None:
    return None


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = options
        return torch.ops.flash_stand_in.forward(q, k, v, *options)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in inputs]
        torch.ops.flash_stand_in.backward(dout.contiguous(), *inputs, *gradients, *ctx.options)
        return (*gradients, *[None] * len(ctx.options))


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = _Function.apply(q, k, v, None, None, scale, causal, *window_size, softcap, alibi_slopes)
    return (out, q.new_empty(0), None) if return_attn_probs else out


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, dropout_p: float = 0.0, causal: bool = False) -> Any:
    return flash_attn_func(q, *kv.unbind(2), dropout_p, causal=causal)


def flash_attn_qkvpacked_func(qkv: Tensor, dropout_p: float = 0.0, causal: bool = False) -> Any:
    return flash_attn_func(*qkv.unbind(2), dropout_p, causal=causal)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _Function.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, *window_size, softcap, alibi_slopes)


def _absent(*args: Any) -> Any:
    raise NotImplementedError("nothing stands in for it")


def packages() -> dict[str, ModuleType]:
    """Return the package, by the names that `sys.modules` is to have, and what Transformers imports beside it."""
    package = ModuleType("flash_attn")
    package.__spec__ = ModuleSpec("flash_attn", None)  # what others look at to see whether it is installed
    for function in (flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func):
        setattr(package, function.__name__, function)
    package.flash_attn_with_kvcache = _absent  # type: ignore[attr-defined]
    package.__path__ = []
    padding = ModuleType("flash_attn.bert_padding")
    padding.pad_input = padding.unpad_input = _absent  # type: ignore[attr-defined]
    return {one.__name__: one for one in (package, padding)}
