"""Do the ranks of a sequence group hold the same batch? Found out before any other collective."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_autosp.batches import Found, SequenceDim, named_dim, sequences, shown_dim

__all__ = ["agree", "batch_error", "checksum", "loader_error"]


def checksum(tensors: Sequence[Tensor]) -> int:
    """Return a checksum of shapes, dtypes and contents."""
    total = 0
    for tensor in tensors:
        total = zlib.crc32(f"{tuple(tensor.shape)} {tensor.dtype}".encode(), total)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        total = zlib.crc32(raw.numpy().tobytes(), total)
    return total


def batch_error(tensors: Sequence[Found], sequence_dim: SequenceDim, num_ranks: int, *, all_named: bool = False) -> str | None:
    """Return what is wrong with a batch, or `None`.

    Args:
        tensors: Of the batch.
        sequence_dim: Where their sequences are.
        num_ranks: That share each of them.
        all_named: Whether every name in `sequence_dim` has to be in the batch.
    """
    asked, shapes = shown_dim(sequence_dim), [tuple(one.tensor.shape) for one in tensors]
    if not isinstance(sequence_dim, int):
        shapes_by_place = ", ".join(f"{one.place or 'batch'} {tuple(one.tensor.shape)}" for one in tensors) or "none"
        known = {name for one in tensors for name in one.names}
        missing = [name for name in sequence_dim if name not in known]
        if missing and all_named:
            return (
                f"{asked} but the batch has no {', '.join(map(repr, missing))}; its tensors are {shapes_by_place}. "
                f'Name keys, fields or places in a tuple ("0") of the batch.'
            )
        for one in tensors:
            dim = named_dim(one.names, sequence_dim)
            if dim is not None and one.tensor.ndim <= dim:
                return f"{asked} but {one.place} has no dimension {dim}; its shape is {tuple(one.tensor.shape)}."
    lengths = [one.tensor.shape[dim] for one, dim in sequences(tensors, sequence_dim)]
    if not lengths and isinstance(sequence_dim, int):
        return (
            f"{asked} but no tensor of the batch has such a dimension; the shapes are {shapes or 'none'}. "
            f"Pass AutoSPStrategy(sequence_dim=...) for batches that are laid out differently."
        )
    if not lengths:
        return f"{asked} names no tensor of the batch; its tensors are {shapes_by_place}."
    if max(lengths) < num_ranks:
        return (
            f"the batch's sequences have {max(lengths)} position(s), fewer than sequence_parallel_size={num_ranks}; the shapes are "
            f"{shapes} with {asked}. Use fewer sequence ranks or longer sequences."
        )
    return None


def agree(error: str | None, total: int, data_rank: int) -> str | None:
    """Compare batches over all ranks. A collective over the default group; every rank gets the same answer.

    Args:
        error: What this rank found wrong with its batch.
        total: The checksum of its batch.
        data_rank: Ranks with the same number have to hold the same batch.

    Returns:
        What is wrong with any rank's batch, or `None`.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (error, total, data_rank))
    for rank, (problem, _, _) in enumerate(everyone):
        if problem is not None:
            return f"rank {rank}: {problem}"
    totals: dict[int, dict[int, int]] = {}
    for rank, (_, value, group) in enumerate(everyone):
        totals.setdefault(group, {})[rank] = value
    for group, by_rank in totals.items():
        if len(set(by_rank.values())) > 1:
            shown = ", ".join(f"rank {rank}: {value:08x}" for rank, value in by_rank.items())
            return (
                f"the ranks of sequence group {group} loaded different batches (checksums {shown}). They have to load the same "
                f"samples: let Lightning inject its sampler, or shard custom samplers and IterableDatasets by "
                f"trainer.strategy.data_parallel_rank of trainer.strategy.data_parallel_size, with random transforms seeded by it; "
                f"or use batch_source='broadcast', or 'exchange' if every rank is to load samples of its own."
            )
    return None


def loader_error(source: str, length: int | None) -> str | None:
    """Compare loaders over all ranks. A collective over the default group; every rank gets the same answer.

    Args:
        source: Who loads, as this rank sees it.
        length: Number of batches of this rank's loader, `None` if it is not known.

    Returns:
        How ranks differ, or `None`.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (source, length))
    found: dict[tuple[str, int | None], list[int]] = {}
    for rank, one in enumerate(everyone):
        found.setdefault(one, []).append(rank)
    sources = {one for one, _ in found}
    if len(sources) == 1 and (len(found) == 1 or sources <= {"broadcast", "exchange"}):  # these two end on all ranks together
        return None

    def shown(source: str, length: int | None) -> str:
        number = "an unknown number of batches" if length is None else f"{length} batches"
        return f"{source!r}, {number}" if len(sources) > 1 else number

    listed = "; ".join(f"{shown(*one)} on rank(s) {', '.join(map(str, ranks[:8]))}" for one, ranks in found.items())
    return (
        f"ranks have different loaders: {listed}. All ranks take their steps together: give each as many batches (drop_last, "
        f"shards of one size), or use batch_source='broadcast', or 'exchange', which end with the shortest."
    )
