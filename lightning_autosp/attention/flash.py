"""Calls of the flash-attn package, computed by Ulysses: the user's own kernel on the whole sequence and this rank's heads.

Dynamo would trace into these functions and leave an `autograd.Function` that nothing is known of. `keep_whole` has it record the
call. What is said of positions (causal, window, ALiBi, where documents begin) is said of the whole sequence, and stays as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_autosp.attention.ulysses import HeadShare, exchanged, own_heads
from lightning_autosp.collectives import Group

__all__ = ["HEADS", "WHOLE", "arguments", "handle_of", "is_kept", "keep_whole", "ulysses_flash"]

_MODULES = ("flash_attn", "flash_attn_interface")
"""FlashAttention-2 and -3."""

_NAMES = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
)
HEADS = ("q", "k", "v", "kv", "qkv")
"""Arguments of shape `(B, L, H, D)` or, packed, `(B, L, 2 or 3, H, D)`; of varlen functions without `B`."""

WHOLE = ("alibi_slopes", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k")
"""Other arguments that may be tensors: numbers of heads or documents, no positions."""

_kept: list[Callable[..., Any]] = []


def keep_whole() -> None:
    """Let Dynamo record calls of flash-attn's functions as they are, if the package has been imported."""
    for module in _MODULES:
        for name in _NAMES:
            function = getattr(sys.modules.get(module), name, None)
            if function is not None and not is_kept(function) and _has_heads(function):
                _kept.append(torch.compiler.allow_in_graph(function))


def _has_heads(function: Callable[..., Any]) -> bool:
    """Whether the function's arguments are the ones that are known."""
    parameters = inspect.signature(function).parameters
    return not parameters.keys().isdisjoint(HEADS)


def is_kept(target: Any) -> bool:
    """Whether it is one of the functions whose calls are recorded."""
    return any(target is function for function in _kept)


def handle_of(function: Callable[..., Any]) -> int:
    """Return what graphs, which hold no objects, know a recorded function by."""
    return next(index for index, kept in enumerate(_kept) if kept is function)


def arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name, without defaults."""
    return dict(inspect.signature(function).bind(*args, **kwargs).arguments)


def ulysses_flash(
    handle: int,
    parts: dict[str, Tensor],
    others: dict[str, Any],
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
    group: Group,
) -> Tensor:
    """Call a function of flash-attn over positions that are split over the ranks of `group`.

    Args:
        handle: Of the function.
        parts: This rank's positions of the arguments named in `HEADS`.
        others: The other arguments, whole.
        query_lengths: Every rank's number of queries.
        key_lengths: Every rank's number of keys.
        group: The sequence group.

    Returns:
        This rank's positions of the result, shape `(..., l, H, D)`.
    """

    def kernel(query: Tensor, key: Tensor, value: Tensor, shares: Sequence[HeadShare]) -> Tensor:
        query, key, value = (x.transpose(-3, -2) for x in (query, key, value))
        given = {"q": query, "k": key, "v": value}
        if "kv" in parts:
            given["kv"] = torch.stack((key, value), -3)
        if "qkv" in parts:
            given["qkv"] = torch.stack((query, key, value), -3)
        own = {name: given[name] for name in parts} | others
        if isinstance(slopes := others.get("alibi_slopes"), Tensor):
            own["alibi_slopes"] = own_heads(slopes, slopes.ndim - 1, shares, group.rank)
        out: Tensor = _kept[handle](**own)
        return out.transpose(-3, -2)

    unpacked = [x.unbind(-3) if name in ("kv", "qkv") else (x,) for name, x in parts.items()]
    query, key, value = (x.transpose(-3, -2) for some in unpacked for x in some)
    return exchanged(query, key, value, kernel, query_lengths, key_lengths, group).transpose(-3, -2)
