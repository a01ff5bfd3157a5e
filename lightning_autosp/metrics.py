"""Metrics that are given the positions of one rank at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum

from lightning_autosp.collectives import Group, all_reduce_sum
from lightning_autosp.compiler.crossing import PartTensor, Placement
from lightning_autosp.compiler.emit import slice_layout

__all__ = ["by_position", "is_by_position", "update_by_position"]

M = TypeVar("M", bound=Metric)

_MARK = "_autosp_by_position"


def by_position(metric: M) -> M:
    """Say that what `metric.update` adds to its states is a sum over positions, so that ranks can update it with their own.

    It then needs no whole logits: `self.perplexity = by_position(Perplexity(ignore_index=-100))`. That holds for metrics of tokens
    (perplexity, micro accuracy, confusion, sums, means of a value for each token), not for those of whole sequences. Whether it
    does cannot be seen from outside: it is taken at your word. Under any other strategy nothing changes.

    Args:
        metric: No collection, which groups metrics by what their states are. `metric(...)`, which gives the value of a batch, is
            called with whole values all the same.

    Returns:
        The metric.

    Raises:
        TypeError: If it is none, or a state is no tensor that ranks reduce by its sum.
    """
    if not isinstance(metric, Metric):
        raise TypeError(f"by_position takes a torchmetrics.Metric, not a {type(metric).__name__}")
    for name, reduce in metric._reductions.items():
        if reduce is not dim_zero_sum or not isinstance(getattr(metric, name), Tensor):
            raise TypeError(
                f"by_position({type(metric).__name__}): its state {name!r} is no tensor that is summed over ranks "
                f"(dist_reduce_fx='sum'), so that it cannot be updated with parts of a sequence. Update it with whole values."
            )
    metric.__dict__[_MARK] = True
    return metric


def is_by_position(metric: Any) -> bool:
    """Whether `by_position` said so."""
    return bool(metric.__dict__.get(_MARK))


def update_by_position(
    metric: Metric, update: Callable[..., None], args: Sequence[Any], kwargs: dict[str, Any], group: Group
) -> bool:
    """Update a metric with this rank's parts and leave all ranks of the group with the whole's states.

    Args:
        metric: That `is_by_position`.
        update: Its method.
        args: Of its update; what is cut along the sequence are `PartTensor`s.
        kwargs: Likewise.
        group: The sequence group.

    Returns:
        Whether it could be: tensors that are cut differently, or of which that cannot be told, need the whole.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), kwargs))
    parts = _parts(leaves, group)
    if parts is None:
        return False
    local_args, local_kwargs = pytree.tree_unflatten(parts, spec)
    before: dict[str, Any] = dict(metric.metric_state)
    for name, value in before.items():
        setattr(metric, name, torch.zeros_like(value))
    update(*local_args, **local_kwargs)
    with torch.no_grad():
        for name, value in before.items():
            setattr(metric, name, value + all_reduce_sum(getattr(metric, name), group))
    return True


def _parts(leaves: Sequence[Any], group: Group) -> list[Any] | None:
    """Return this rank's positions of every tensor; `None` if that cannot be told of one, or none is cut."""
    cut = [(leaf, leaf.placement) for leaf in leaves if isinstance(leaf, PartTensor) and leaf.placement is not None]
    if not cut or len({placement for _, placement in cut}) > 1:
        return None
    first, placement = cut[0]
    kept: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, PartTensor) and leaf.placement is not None:
            if leaf.shape[: placement.dim + 1] != first.shape[: placement.dim + 1]:
                return None
            kept.append(leaf.for_piece().detach())
        elif isinstance(leaf, Tensor) and leaf.numel() > 1:
            if leaf.shape[: placement.dim + 1] != first.shape[: placement.dim + 1]:
                return None
            kept.append(_slice(leaf, placement, group))
        else:
            kept.append(leaf)
    return kept


def _slice(whole: Tensor, placement: Placement, group: Group) -> Tensor:
    lengths = placement.lengths(whole.shape[placement.dim], group)
    start = sum(lengths[: group.rank])
    return slice_layout(whole, placement.dim, placement.outer, placement.inner, start, start + lengths[group.rank])
