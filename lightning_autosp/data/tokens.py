"""Token files of which every rank of a sequence group reads its slice of each sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import Dataset

from lightning_autosp._compat import default_collate_fn_map
from lightning_autosp.cuts import even_cuts
from lightning_autosp.data.stores import Source, stores_of

__all__ = ["SequenceShard", "TokenDataset", "assemble", "sequence_shards", "shard_bounds", "sharded_datasets"]


def shard_bounds(length: int, rank: int, size: int) -> tuple[int, int]:
    """Return the first position of a rank's slice and the one after its last: those that compiled steps cut sequences into.

    Slices differ by one position at most, the longer ones first.
    """
    cuts = even_cuts(length, size)
    return cuts[rank], cuts[rank + 1]


@dataclass
class SequenceShard:
    """A rank's slice of a sequence, or of a batch of them.

    `torch.utils.data.default_collate` stacks them, pinning and moving to a device keep them. On the device, the strategy makes
    whole tensors of those of integers. Those of floating-point numbers stay slices under the shape of the whole: a compiled step
    takes the slice, and gathers it only if its code wants more; what reads values outside of the step gathers them, which all
    ranks of the group have to do.
    """

    local: Tensor
    """`(..., positions, ...)`"""
    length: int
    """Positions of the whole sequence."""
    rank: int
    size: int
    """Which slice of how many."""
    samples: tuple[int, ...]
    """Numbers of the samples, by which ranks find out whether theirs are the same."""
    dim: int = -1
    """The sequence's, counted from the last one, which is -1: batches have further dimensions in front."""

    def __post_init__(self) -> None:
        start, stop = shard_bounds(self.length, self.rank, self.size)
        if not -self.local.ndim <= self.dim < 0 or self.local.shape[self.dim] != stop - start:
            raise ValueError(
                f"slice {self.rank} of {self.size} of {self.length} positions has {stop - start} of them; the tensor's shape is "
                f"{tuple(self.local.shape)}, and dim={self.dim}"
            )

    @classmethod
    def of(cls, values: Any, rank: int, size: int, sample: int, dim: int = 0) -> SequenceShard:
        """Return a rank's slice of what is sliced as arrays are; of a mapped file, only that is read.

        Args:
            values: The whole, such as a `numpy.memmap` or a tensor, `(..., positions, ...)`.
            rank: Which slice.
            size: Of how many.
            sample: The sample's number.
            dim: The sequence's.
        """
        start, stop = shard_bounds(values.shape[dim], rank, size)
        dim = dim % len(values.shape)
        local = values[(slice(None),) * dim + (slice(start, stop),)]
        local = local.clone() if isinstance(local, Tensor) else torch.from_numpy(np.array(local))
        return cls(local, values.shape[dim], rank, size, (sample,), dim - local.ndim)

    @property
    def offset(self) -> int:
        """The slice's first position."""
        return shard_bounds(self.length, self.rank, self.size)[0]

    def shape(self, rank: int | None = None) -> tuple[int, ...]:
        """Return the shape of a rank's slice, or of the whole."""
        start, stop = (0, self.length) if rank is None else shard_bounds(self.length, rank, self.size)
        dim = self.local.ndim + self.dim
        return (*self.local.shape[:dim], stop - start, *self.local.shape[dim + 1 :])

    def to(self, *args: Any, **kwargs: Any) -> SequenceShard:
        """Return the shard with its slice moved, as `Tensor.to` does."""
        return replace(self, local=self.local.to(*args, **kwargs))

    def pin_memory(self, *args: Any) -> SequenceShard:
        """Return the shard with its slice in pinned memory."""
        return replace(self, local=self.local.pin_memory(*args))

    def num_bytes(self, rank: int) -> int:
        """Return the bytes of a rank's slice."""
        return math.prod(self.shape(rank)) * self.local.element_size()


def _collate(shards: Sequence[SequenceShard], *, collate_fn_map: Any = None) -> SequenceShard:
    first = shards[0]
    lengths = sorted({shard.length for shard in shards})
    if len(lengths) > 1:
        raise ValueError(f"sequences of {lengths} positions are in one batch; default_collate stacks those that are as long")
    samples = tuple(sample for shard in shards for sample in shard.samples)
    return replace(first, local=torch.stack([shard.local for shard in shards]), samples=samples)


default_collate_fn_map[SequenceShard] = _collate


def sequence_shards(batch: Any) -> list[SequenceShard]:
    """Return the shards in a batch, in order."""
    found: list[SequenceShard] = []

    def keep(shard: SequenceShard) -> SequenceShard:
        found.append(shard)
        return shard

    apply_to_collection(batch, SequenceShard, keep, allow_frozen=True)
    return found


def assemble(batch: Any, group: dist.ProcessGroup, part: Callable[[SequenceShard], Tensor]) -> Any:
    """Return a batch with tensors for its shards: whole ones of integers, others as `part` makes them of slices.

    One all-gather, on the device that the slices are on.
    """
    shards = sequence_shards(batch)
    if not shards:
        return batch
    size = dist.get_world_size(group)
    sizes = sorted({shard.size for shard in shards})
    if sizes != [size]:
        raise ValueError(f"the batch holds slices for {sizes} ranks; the sequence group has {size}")
    # Of fewer positions than ranks, some would have none.
    gathered = [shard for shard in shards if not shard.local.is_floating_point() or shard.length < size]
    whole = iter(_gathered(gathered, group))
    chosen = {id(shard) for shard in gathered}
    made = iter([next(whole) if id(shard) in chosen else part(shard) for shard in shards])
    return apply_to_collection(batch, SequenceShard, lambda _: next(made), allow_frozen=True)


def _gathered(shards: Sequence[SequenceShard], group: dist.ProcessGroup) -> list[Tensor]:
    if not shards:
        return []
    size = dist.get_world_size(group)
    raw = torch.cat([shard.local.contiguous().reshape(-1).view(torch.uint8) for shard in shards])
    most = max(sum(shard.num_bytes(rank) for shard in shards) for rank in range(size))
    own = raw.new_zeros(most)
    own[: raw.numel()] = raw
    gathered = raw.new_empty(size * most)
    dist.all_gather_into_tensor(gathered, own, group=group)
    parts: list[list[Tensor]] = [[] for _ in shards]
    for rank, buffer in enumerate(gathered.view(size, most)):
        at = 0
        for shard, found in zip(shards, parts, strict=True):
            piece = buffer[at : (at := at + shard.num_bytes(rank))]
            found.append(piece.clone().view(shard.local.dtype).view(shard.shape(rank)))  # where it begins need not suit the dtype
    return [torch.cat(found, dim=shard.dim) for shard, found in zip(shards, parts, strict=True)]


def sharded_datasets(dataset: Any) -> list[Any]:
    """Return what can shard its sequences among a dataset and those it is made of (`Subset`, `ConcatDataset`).

    That is what has a method `shard_sequence(rank, size)`, after which its samples hold `SequenceShard`s of that slice, and whole
    tensors again after `shard_sequence(0, 1)`.
    """
    if callable(getattr(dataset, "shard_sequence", None)):
        return [dataset]
    inner = [getattr(dataset, "dataset", None), *(getattr(dataset, "datasets", None) or ())]
    return [found for one in inner if one is not None and one is not dataset for found in sharded_datasets(one)]


class TokenDataset(Dataset[dict[str, Any]]):
    """Fixed-length samples of memory-mapped tokens.

    A sample is `{"tokens": ids}` of `length + 1` positions, the next token last: inputs are `tokens[:, :-1]`, labels
    `tokens[:, 1:]`. With `documents=True` there are also `"document_ids"`, counted within the sample from 0, and `"position_ids"`,
    counted within the document from its first token in the sample; both have a number for every token. All are int64, and tensors,
    or `SequenceShard`s where the strategy has sharded the dataset: of each sample, a rank then reads its slice alone.

    Samples follow each other without a gap, do not reach from one file (of litdata's, one chunk) into the next, and leave out what
    remains at its end. Rows of a `datasets.Dataset` are taken as one file.
    """

    def __init__(
        self,
        sources: Source | Sequence[Source],
        length: int,
        *,
        dtype: str | np.dtype[Any] | None = None,
        column: str = "input_ids",
        next_token: bool = True,
        documents: bool = False,
    ) -> None:
        """Look at the sources' sizes.

        Args:
            sources: One or several. Files of one-dimensional integers, as `.npy`, or raw; directories of one-dimensional tensors
                of integers that litdata's `optimize` wrote for its `TokensLoader`, not compressed; `datasets.Dataset`s with a
                column of lists of integers.
            length: Positions of a sample.
            dtype: Of raw files, such as "uint16".
            column: Of `datasets.Dataset`s.
            next_token: Whether samples have the token that follows them as a further position.
            documents: Whether to number documents. Those of files by `documents_path(file)`: a one-dimensional int64 `.npy` with
                the positions they start at, ascending, which `write_tokens` writes; of others, items and rows are documents.

        Raises:
            ValueError: If a source holds something else, or none holds a whole sample.
        """
        if not isinstance(length, int) or length < 1:
            raise ValueError(f"length={length!r} is not known. Use a number of tokens, 1 or larger.")
        self._stores = stores_of(sources, dtype, column)
        self.length, self.documents = length, documents
        self.span = length + bool(next_token)
        self._rank, self._size = 0, 1
        sizes = [len(store.tokens) for store in self._stores]
        counts = [max(0, size - (self.span - length)) // length for size in sizes]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if not len(self):
            raise ValueError(f"no file holds the {self.span} tokens of a sample; they hold {sizes}. Use a smaller length.")
        if documents:
            for store in self._stores:
                assert len(store.documents)

    def shard_sequence(self, rank: int, size: int) -> None:
        """Give slice `rank` of `size` of each sample from now on; whole samples with `size=1`. The strategy calls it."""
        self._rank, self._size = rank, size

    def __len__(self) -> int:
        return int(self._first[-1])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = int(index) % len(self)
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        store = self._stores[number]
        begin = (index - int(self._first[number])) * self.length
        start, stop = shard_bounds(self.span, self._rank, self._size)
        values = {"tokens": np.asarray(store.tokens[begin + start : begin + stop]).astype(np.int64)}
        if self.documents:
            starts = store.documents
            first = int(np.searchsorted(starts, begin, side="right")) - 1
            last = int(np.searchsorted(starts, begin + self.span, side="left"))
            within = np.maximum(np.asarray(starts[first:last]), begin)
            positions = np.arange(begin + start, begin + stop)
            values["document_ids"] = np.searchsorted(within, positions, side="right") - 1
            values["position_ids"] = positions - within[values["document_ids"]]
        return {name: self._sample(torch.from_numpy(value), index) for name, value in values.items()}

    def _sample(self, local: Tensor, index: int) -> Tensor | SequenceShard:
        return local if self._size == 1 else SequenceShard(local, self.span, self._rank, self._size, (index,))
