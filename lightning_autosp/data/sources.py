"""Which ranks of a sequence group load, and how the others come by the batch.

| source | loads | the group's steps |
|---|---|---|
| `replicated` | every rank, the same batch | one for each batch |
| `broadcast` | the first rank | one for each of its batches |
| `exchange` | every rank, batches of its own | one for each batch of any rank, rank after rank |
| `sharded` | every rank, its slice of the same batch (`tokens`) | one for each batch |
"""

from __future__ import annotations

import io
import itertools
import pickle
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
)

from lightning_autosp.data.loaders import StandIn, with_sampler
from lightning_autosp.data.position import DRAWS
from lightning_autosp.data.tokens import sharded_datasets

__all__ = ["SOURCES", "BatchSource", "Groups", "LoadError", "SharedLoader", "choose_source", "number_of_batches", "share"]

BatchSource = Literal["auto", "replicated", "broadcast", "exchange", "sharded"]

SOURCES: dict[BatchSource, str] = {
    "replicated": "loaded by every rank (replicated)",
    "broadcast": "loaded by the first rank of each sequence group (broadcast)",
    "exchange": "loaded by the ranks in turn (exchange)",
    "sharded": "loaded by every rank in slices (sharded)",
}
"""What is said of each."""


class LoadError(RuntimeError):
    """A rank could not load its batch, or has no more of them."""


@dataclass(frozen=True)
class Groups:
    """Process groups for values in host memory, and where this rank is in them."""

    sequence: dist.ProcessGroup
    data: dist.ProcessGroup
    world_size: int

    @property
    def rank(self) -> int:
        """This rank's place in its sequence group."""
        return dist.get_rank(self.sequence)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.sequence)

    @property
    def num_groups(self) -> int:
        return dist.get_world_size(self.data)

    def global_rank(self, rank: int) -> int:
        return dist.get_global_rank(self.sequence, rank)

    def broadcast(self, value: Any, source: int) -> Any:
        """Return what rank `source` of the sequence group has."""
        values = [value]
        dist.broadcast_object_list(values, src=self.global_rank(source), group=self.sequence, device=torch.device("cpu"))
        return values[0]


def choose_source(loader: Any, asked: BatchSource, groups: Groups) -> tuple[BatchSource, str]:
    """Return the source for a loader, and why.

    Raises:
        ValueError: If "sharded" is asked for and the dataset cannot.
    """
    dataset = getattr(loader, "dataset", None)
    if asked == "sharded" and not sharded_datasets(dataset):
        found = type(loader if dataset is None else dataset).__name__
        raise ValueError(
            f"batch_source='sharded' needs a dataset that reads slices of its sequences, as lightning_autosp.data.TokenDataset "
            f"does; the loader's is a {found}. Use 'auto'."
        )
    if asked == "exchange" and isinstance(getattr(loader, "batch_sampler", None), _IndexBatchSamplerWrapper):
        return "broadcast", "batch_source='exchange', but predictions are written with the numbers of samples in order"
    if asked != "auto":
        return asked, f"batch_source={asked!r}"
    if isinstance(loader, DataLoader) and (able := sharded_datasets(dataset)):
        return "sharded", f"{type(able[0]).__name__} reads slices"
    if not isinstance(loader, DataLoader):
        return "broadcast", f"{type(loader).__name__} is no torch DataLoader"
    if isinstance(loader.dataset, IterableDataset):
        return "broadcast", f"{type(loader.dataset).__name__} is an IterableDataset"
    sampler, batches = loader.sampler, loader.batch_sampler
    if isinstance(batches, _IndexBatchSamplerWrapper):  # Lightning's own, when it predicts
        batches = batches._batch_sampler
    if batches is not None and type(batches) is not BatchSampler:
        return "broadcast", f"{type(batches).__name__} is a batch sampler that is not known"
    if isinstance(sampler, DistributedSampler):
        if groups.num_groups < sampler.num_replicas == groups.world_size:
            return "exchange", f"{type(sampler).__name__} deals to all ranks"
        return "replicated", f"{type(sampler).__name__} deals to {sampler.num_replicas} group(s)"
    if type(sampler) in DRAWS:
        return "replicated", f"{type(sampler).__name__} draws the same on every rank"
    return "broadcast", f"{type(sampler).__name__} is a sampler that is not known"


def share(loader: Any, source: BatchSource, groups: Groups, say: Callable[[str], None]) -> Any:
    """Return the loader that a rank iterates over. Every rank has to call it.

    Args:
        loader: The rank's own. It is only iterated where it loads.
        source: Who loads.
        groups: The rank's.
        say: Called with what a user should know.
    """
    if groups.world_size == 1:
        return loader
    stateful = hasattr(loader, "state_dict")
    if source in ("broadcast", "exchange"):
        return (_StatefulSharedLoader if source == "broadcast" and stateful else SharedLoader)(loader, source, groups, say)
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return loader  # ends where its length says, and lengths have been compared
    return (_StatefulSameLoader if stateful else SameLoader)(loader, groups)


class SameLoader(StandIn):
    """A loader of this rank that has to end when those of all others do."""

    def __init__(self, loader: Any, groups: Groups) -> None:
        """Stand in for a loader.

        Args:
            loader: The rank's own.
            groups: The rank's.
        """
        super().__init__(loader, loader)
        self._groups = groups

    def __len__(self) -> int:
        return len(self._given)

    def __iter__(self) -> Iterator[Any]:
        end = object()
        iterator = iter(self._loader)
        for taken in itertools.count():
            batch = next(iterator, end)
            ended = self._ended(batch is end)
            if len(ended) == self._groups.world_size:
                return
            if ended:
                raise LoadError(
                    f"rank(s) {', '.join(map(str, ended[:8]))} got a shorter loader than the others: it has no more than {taken} "
                    f"batches. All ranks take their steps together: give each as many batches, or use batch_source='broadcast', or "
                    f"'exchange', which end with the shortest."
                )
            yield batch

    def _ended(self, own: bool) -> list[int]:
        """Return the ranks that have no more batches. A collective over all."""
        ended = torch.zeros(self._groups.world_size, dtype=torch.int32)
        ended[dist.get_rank()] = own
        for group in (self._groups.sequence, self._groups.data):  # together they reach all ranks
            dist.all_reduce(ended, group=group)
        return ended.nonzero().flatten().tolist()


class _Stateful:
    """Of a loader that keeps its position: this rank's."""

    _given: Any

    def state_dict(self) -> dict[str, Any]:
        return self._given.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._given.load_state_dict(state)


class _StatefulSameLoader(_Stateful, SameLoader):
    pass


class SharedLoader(StandIn):
    """Gives every rank of a sequence group the same batches, each of which one rank has loaded.

    Batches may be anything that can be pickled; tensors in them, on whatever device, arrive in host memory. An epoch ends on all
    ranks at the same step: when all that load have no more, or when any sequence group has no more. What a loader raises is raised
    on every rank of its group. Random numbers drawn while loading leave all ranks of a group with the first loading rank's state.
    """

    def __init__(self, loader: Any, source: BatchSource, groups: Groups, say: Callable[[str], None]) -> None:
        """Agree on the length. A collective over all ranks.

        Args:
            loader: The rank's own.
            source: "broadcast": the first rank of each group loads. "exchange": all do; of a map-style dataset whose sampler is
                not dealt to all ranks already, each loads every `size`-th batch.
            groups: The rank's.
            say: Called with what a user should know.
        """
        super().__init__(loader, loader)
        self._groups, self._say = groups, say
        self._turns: _Turns | None = None
        self._sources = [0] if source == "broadcast" else list(range(groups.size))
        length = number_of_batches(loader)
        if source == "exchange":
            if _can_be_dealt(loader, groups):
                self._loader, self._turns = _dealt(loader, groups)
            else:
                lengths = _everyone(length, groups.sequence)
                length = None if None in lengths else sum(lengths)
        else:
            length = groups.broadcast(length, 0)
        lengths = _everyone(length, groups.data)
        self._length = None if None in lengths else min(lengths)
        self._may_differ = len(set(lengths)) > 1 or self._length is None

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError(f"{type(self._given).__name__} has no length")
        return self._length

    def __iter__(self) -> Iterator[Any]:
        return _Rounds(self)


class _StatefulSharedLoader(_Stateful, SharedLoader):
    pass


@dataclass
class _Outcome:
    """What came of loading one batch: a batch, the end, or an error."""

    kind: Literal["batch", "end", "error"]
    value: Any = None


class _Rounds:
    """One pass. In each round, every rank that still loads has loaded one batch, and the group takes them in turn."""

    def __init__(self, shared: SharedLoader) -> None:
        self._shared, self._groups = shared, shared._groups
        self._live, self._queue = list(shared._sources), deque[int]()
        self._iterator: Iterator[Any] | None = None
        self._own = _Outcome("end")
        self._done = False
        self._pinned = bool(getattr(shared, "pin_memory", False)) and torch.cuda.is_available()
        # Lightning's, when it predicts: it is the batch sampler that writers of predictions learn the samples' numbers from.
        sampler = getattr(shared, "batch_sampler", None)
        self._indices = sampler if isinstance(sampler, _IndexBatchSamplerWrapper) and shared._turns is None else None
        if self._indices is not None and self._groups.rank not in self._live:
            self._indices.seen_batch_indices = []
        self._num_seen = 0
        before = torch.get_rng_state()
        if self._groups.rank in self._live:
            self._own = self._attempt(self._start)
        # An error at the start is told in the first turn.
        self._share_random_state(before)

    def __iter__(self) -> _Rounds:
        return self

    def __next__(self) -> Any:
        if self._done:
            raise StopIteration
        outcome = self._next_of_group()
        if self._shared._may_differ and self._groups.num_groups > 1 and outcome.kind != "error":
            going = torch.tensor(int(outcome.kind == "batch"))
            dist.all_reduce(going, dist.ReduceOp.MIN, group=self._groups.data)
            if outcome.kind == "batch" and not going:
                self._shared._say("a sequence group has no more batches, so the epoch ends; others have some left")
                outcome = _Outcome("end")
        if outcome.kind == "batch":
            return outcome.value
        self._done = True
        if outcome.kind == "error":
            raise outcome.value
        raise StopIteration

    def _next_of_group(self) -> _Outcome:
        while self._live:
            if not self._queue:
                self._load_round()
            source = self._queue.popleft()
            outcome = self._passed_on(source)
            if outcome.kind != "end":
                return outcome
            self._live.remove(source)
        return _Outcome("end")

    def _start(self) -> None:
        self._iterator = iter(self._shared._loader)

    def _load_round(self) -> None:
        self._queue.extend(self._live)
        before = torch.get_rng_state()
        if self._groups.rank in self._live and self._own.kind != "error":
            assert self._iterator is not None
            self._own = self._attempt(self._iterator.__next__)
        self._share_random_state(before)
        if self._shared._turns is not None:
            total = self._shared._turns.round_total()
            bounds = torch.tensor([total, -total])
            dist.all_reduce(bounds, dist.ReduceOp.MIN, group=self._groups.sequence)
            if int(bounds[0]) != -int(bounds[1]):
                sampler = self._shared._turns.sampler
                raise LoadError(
                    f"batch_source='exchange': the samplers ({type(sampler).__name__}) of a sequence group's ranks gave different "
                    f"indices. They have to draw the same on every rank: seed them alike, or use batch_source='broadcast'."
                )

    def _attempt(self, load: Callable[[], Any]) -> _Outcome:
        try:
            return _Outcome("batch", load())
        except StopIteration:
            return _Outcome("end")
        except Exception as error:  # noqa: BLE001 -- raised on every rank, at its turn
            return _Outcome("error", error)

    def _share_random_state(self, before: Tensor) -> None:
        """Leave all ranks with the state in which loading left the first that loads: as on one device."""
        source = self._live[0]
        after = torch.get_rng_state()
        state = self._groups.broadcast(None if torch.equal(after, before) else after, source)
        torch.set_rng_state(before if state is None else state)

    def _passed_on(self, source: int) -> _Outcome:
        """Return what one rank has loaded, on all of the group."""
        if self._groups.rank == source:
            return self._send(source)
        header, specs, seen = self._groups.broadcast(None, source)
        if seen and self._indices is not None:
            self._indices.seen_batch_indices.extend(seen)
        if specs is None:
            return header
        tensors = [torch.empty(shape, dtype=dtype, pin_memory=self._pinned) for shape, dtype in specs]
        for tensor in tensors:
            self._broadcast(tensor, source)
        return _Outcome("batch", _Unpickler(io.BytesIO(header), tensors).load())

    def _send(self, source: int) -> _Outcome:
        outcome, self._own = self._own, _Outcome("end")
        tensors: list[Tensor] = []
        header: Any
        if outcome.kind == "batch":
            try:
                header, tensors = _packed(outcome.value)
            except Exception as error:  # noqa: BLE001 -- the others are waiting for a batch
                reason = TypeError(f"a batch of type {type(outcome.value).__name__} cannot be sent to other ranks: {error}")
                outcome = _Outcome("error", reason)
        if outcome.kind == "error":
            rank = self._groups.global_rank(source)
            header = _Outcome("error", LoadError(f"rank {rank} could not load: {type(outcome.value).__name__}: {outcome.value}"))
        elif outcome.kind == "end":
            header = outcome
        specs = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors] if outcome.kind == "batch" else None
        seen = [] if self._indices is None else self._indices.seen_batch_indices[self._num_seen :]
        self._num_seen += len(seen)
        self._groups.broadcast((header, specs, seen), source)
        for tensor in tensors:
            self._broadcast(tensor, source)
        return outcome

    def _broadcast(self, tensor: Tensor, source: int) -> None:
        if tensor.numel():
            raw = tensor.reshape(-1).view(torch.uint8)
            dist.broadcast(raw, src=self._groups.global_rank(source), group=self._groups.sequence)


class _Pickler(pickle.Pickler):
    """Leaves tensors out, so that each is sent from its own memory, and a view without what it is a view of."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not Tensor or obj.layout is not torch.strided or obj.is_quantized or obj.requires_grad or obj.is_nested:
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._places[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


def _packed(batch: Any) -> tuple[bytes, list[Tensor]]:
    """Return a batch without its tensors, and these, contiguous in host memory."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(batch)
    return file.getvalue(), [tensor.detach().cpu().resolve_conj().resolve_neg().contiguous() for tensor in pickler.tensors]


class _Turns:
    """Every `size`-th element of a sampler, from the rank's own on.

    All ranks take from the sampler a round at a time, so that one that draws with every element stays the same on all of them.
    """

    def __init__(self, sampler: Any, rank: int, size: int) -> None:
        self.sampler, self._rank, self._size = sampler, rank, size
        self._totals = deque[int]()

    def __iter__(self) -> Iterator[Any]:
        self._totals.clear()
        elements = iter(self.sampler)
        while turn := list(itertools.islice(elements, self._size)):
            self._totals.append(zlib.crc32(repr(turn).encode()))
            if len(turn) > self._rank:
                yield turn[self._rank]

    def __len__(self) -> int:
        return len(range(self._rank, len(self.sampler), self._size))

    def round_total(self) -> int:
        """Return the checksum of the elements of the next round, for all ranks; 0 if there is none."""
        return self._totals.popleft() if self._totals else 0


def _can_be_dealt(loader: Any, groups: Groups) -> bool:
    """Whether ranks of a group have the same map-style loader, so that each can load a part of its batches."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    sampler = loader.sampler
    return not (isinstance(sampler, DistributedSampler) and groups.num_groups < sampler.num_replicas == groups.world_size)


def _dealt(loader: DataLoader[Any], groups: Groups) -> tuple[DataLoader[Any], _Turns]:
    """Return a copy of a loader that takes this rank's turns."""
    turns = _Turns(loader.batch_sampler if loader.batch_sampler is not None else loader.sampler, groups.rank, groups.size)
    return with_sampler(loader, turns), turns


def number_of_batches(loader: Any) -> int | None:
    """Return the length of a loader, `None` if it has none."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _everyone(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
