"""Where in an epoch a run is, so that one that goes on from a checkpoint sees each sample of the epoch once, on any ranks.

What counts is the order of all samples of the epoch, of which each of D sequence groups takes every D-th, and how many of them have
been given. The order is not stored, but what it is drawn from. Random numbers go on where they were, too.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_autosp.data.loaders import StandIn, with_sampler

__all__ = ["DRAWS", "Epoch", "PositionedLoader", "put_back", "reordered", "set_aside"]

_KEY = "autosp"


class Epoch(NamedTuple):
    """What the Trainer knows of an epoch.

    Attributes:
        batches: Returns how many batches a loader gives in an epoch.
        alone: Whether there is no other loader.
        set_progress: Told how many batches of the epoch are behind, where that is another number than in the checkpoint.
        device: Whose random state is saved.
    """

    batches: Callable[[PositionedLoader], int]
    alone: Callable[[], bool]
    set_progress: Callable[[int], None]
    device: torch.device


class _Order(Sampler[int]):
    """A sampler that can begin in the middle of an order that another one had.

    Attributes:
        drawn: What the order of the pass that was begun last is drawn from.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drawn: dict[str, Any] = {}
        self._begin: tuple[dict[str, Any], int] | None = None

    @property
    def groups(self) -> int:
        """The number of groups that share the order."""
        return self.sampler.num_replicas if type(self.sampler) is DistributedSampler else 1

    @property
    def length(self) -> int:
        """Samples of the order."""
        return len(self.sampler.dataset) if type(self.sampler) is DistributedSampler else len(self.sampler)  # type: ignore[arg-type]

    @staticmethod
    def knows(sampler: Any) -> bool:
        """Whether it is known how a sampler draws."""
        return type(sampler) in (DistributedSampler, *DRAWS)

    def begin_at(self, drawn: dict[str, Any], samples: int) -> None:
        """Have the next pass begin behind so many samples of an order."""
        self._begin = drawn, samples

    def left(self, drawn: dict[str, Any], samples: int) -> int:
        """Return how many samples each group has to take behind so many of an order."""
        left = max(drawn["length"] - samples, 0)
        if drawn["kind"] == "distributed" and self.groups > 1 and self.sampler.drop_last:
            return left // self.groups
        return -(-left // self.groups)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        begin, self._begin = self._begin, None
        if begin is None:
            self.drawn = _drawn(self.sampler)
            yield from self.sampler
            return
        self.drawn, samples = begin
        order = _order(self.drawn, self.sampler)[samples:]
        if self.groups == 1:
            yield from order
            return
        # As the sampler itself does it.
        total = self.left(*begin) * self.groups
        order = list(itertools.islice(itertools.cycle(order), total)) if order else []
        yield from order[self.sampler.rank :: self.groups]


DRAWS: dict[type, str] = {
    SequentialSampler: "sequential",
    RandomSampler: "random",
    SubsetRandomSampler: "subset",
    WeightedRandomSampler: "weighted",
}
"""Samplers that draw the same on ranks with the same random state, which those of a group have."""


def _drawn(sampler: Any) -> dict[str, Any]:
    """Return what the next order of a sampler is drawn from."""
    if type(sampler) is DistributedSampler:
        seed = sampler.seed + sampler.epoch if sampler.shuffle else None
        return {"kind": "distributed", "length": len(sampler.dataset), "seed": seed}  # type: ignore[arg-type]
    drawn = {"kind": DRAWS[type(sampler)], "length": len(sampler)}
    if drawn["kind"] != "sequential":
        generator = sampler.generator
        drawn["own"] = generator is not None
        drawn["state"] = torch.get_rng_state() if generator is None else generator.get_state()
    if drawn["kind"] == "random":
        drawn |= {"replacement": sampler.replacement, "of": len(sampler.data_source)}
    return drawn


def _order(drawn: dict[str, Any], sampler: Any) -> list[int]:
    """Return an order from what it was drawn from.

    Raises:
        ValueError: If only the sampler that drew it could say, and there is another one now.
    """
    length = drawn["length"]
    if drawn["kind"] == "sequential" or drawn.get("seed", 0) is None:
        return list(range(length))
    if drawn["kind"] == "distributed":
        return list(DistributedSampler(range(length), 1, 0, shuffle=True, seed=drawn["seed"]))  # type: ignore[arg-type]
    if drawn["kind"] != "random" and DRAWS.get(type(sampler)) != drawn["kind"]:
        raise ValueError(
            f"The checkpoint was saved in the middle of an epoch of samples that another sampler had drawn ({drawn['kind']}), "
            f"which a {type(sampler).__name__} cannot go on with. Resume with the same sampler and data_parallel_size, or from the "
            "end of an epoch."
        )
    again = RandomSampler(range(drawn["of"]), drawn["replacement"], length) if drawn["kind"] == "random" else copy.copy(sampler)
    with torch.random.fork_rng(devices=[]):
        again.generator = torch.Generator() if drawn["own"] else None
        (again.generator.set_state if drawn["own"] else torch.set_rng_state)(drawn["state"])
        return list(again)


def reordered(loader: Any, groups: int) -> tuple[Any, _Order | None]:
    """Return a copy of a DataLoader whose order can be gone on with, and that order; of anything else itself.

    Args:
        loader: A rank's.
        groups: The number of sequence groups.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or hasattr(loader, "state_dict"):
        return loader, None
    batches = loader.batch_sampler
    if not _Order.knows(loader.sampler) or not (batches is None or type(batches) is BatchSampler):
        return loader, None
    if type(loader.sampler) is DistributedSampler and loader.sampler.num_replicas != groups:
        return loader, None  # dealt to ranks that share sequences, which take them in turn
    order = _Order(loader.sampler)
    return with_sampler(loader, order if batches is None else BatchSampler(order, batches.batch_size, batches.drop_last)), order


class PositionedLoader(StandIn):
    """A training loader that knows how many samples it has given, and can go on behind them."""

    def __init__(self, given: Any, loader: Any, order: _Order, epoch: Epoch) -> None:
        """Wrap a loader.

        Args:
            given: The user's, whose attributes this one has.
            loader: What is iterated over: made of what `reordered` returned of it.
            order: Of its samples.
            epoch: What is known of it.
        """
        super().__init__(given, loader)
        self._order, self._epoch = order, epoch
        self._pass: _Pass | None = None
        self._begin = _START

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._pass = _Pass(iter(self._loader), self._begin)
        self._begin = _START
        return self._pass

    @property
    def _per_step(self) -> int:
        """Samples of a step of all groups."""
        return (self._given.batch_size or 1) * self._order.groups

    def state_dict(self) -> dict[str, Any]:
        """Return the position behind the last batch that was given; none at the end of an epoch."""
        current = self._pass
        if current is None or not current.taken or current.begin.batches + current.taken >= self._epoch.batches(self):
            return {_KEY: None}
        samples = current.begin.samples + current.taken * self._per_step
        state = {"samples": samples, "per_step": self._per_step, "drawn": self._order.drawn}
        return {_KEY: {**state, "random": _random_state(self._epoch.device)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the pass that is about to begin, or of which no batch was taken, go on there.

        Raises:
            ValueError: If it cannot: the data are others, or the step's size is, and there are other loaders.
        """
        where = state[_KEY]
        if where is None:
            return
        drawn, samples = where["drawn"], where["samples"]
        if drawn["length"] != self._order.length:
            raise ValueError(
                f"The checkpoint was saved in the middle of an epoch of {drawn['length']} samples, and there are "
                f"{self._order.length} now. Resume with the same data, or from the end of an epoch."
            )
        batches = samples // self._per_step
        if where["per_step"] != self._per_step:
            if not self._epoch.alone():
                raise ValueError(
                    f"The checkpoint was saved in the middle of an epoch with {where['per_step']} samples a step, and there are "
                    f"{self._per_step} now, which cannot be resumed with several training dataloaders. Resume with as many, or "
                    "from the end of an epoch."
                )
            batches = self._behind(self._order.left(drawn, samples), samples)
            self._epoch.set_progress(batches)
        self._order.begin_at(drawn, samples)
        self._begin = _Begin(samples, batches, where["random"])
        if self._pass is not None and not self._pass.taken:  # begun before the checkpoint was read: its length was wanted
            self._pass.inner, self._pass.begin = iter(self._loader), self._begin
            self._begin = _START

    def _behind(self, left: int, samples: int) -> int:
        """Return how many batches of this size are behind, if each group has so many samples left: the epoch ends with the last."""
        total, size = len(self), self._given.batch_size or 1
        limit = self._epoch.batches(self)
        if limit < total:
            return min(-(-samples // self._per_step), limit)
        return total - (left // size if self._given.drop_last else -(-left // size))


class _Begin(NamedTuple):
    """Where a pass begins.

    Attributes:
        samples: That are behind.
        batches: That are, by this run's size.
        random: The state of random numbers with which its first batch is loaded; `None`: as it is.
    """

    samples: int = 0
    batches: int = 0
    random: dict[str, Any] | None = None


_START = _Begin()


class _Pass:
    """One pass, and how many batches of it have been taken."""

    def __init__(self, inner: Iterator[Any], begin: _Begin) -> None:
        self.inner, self.begin, self.taken = inner, begin, 0

    def __iter__(self) -> _Pass:
        return self

    def __next__(self) -> Any:
        if not self.taken and self.begin.random is not None:
            _set_random_state(self.begin.random)
        batch = next(self.inner)
        self.taken += 1
        return batch


def _random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of the random numbers that users draw, of types that any checkpoint may hold."""
    kind, keys, *rest = np.random.get_state()  # type: ignore[misc]
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": (str(kind), np.asarray(keys).tolist(), *rest)}
    return state if device.type != "cuda" else {**state, "cuda": torch.cuda.get_rng_state(device)}


def _set_random_state(state: dict[str, Any]) -> None:
    kind, keys, *rest = state["numpy"]
    version, internal, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def set_aside(checkpoint: dict[str, Any]) -> None:
    """Move the positions of `PositionedLoader`s to where a Trainer without such loaders does not look for its own."""
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    states = loop.pop("combined_loader", [])
    ours = {index: state for index, state in enumerate(states) if isinstance(state, dict) and state.keys() == {_KEY}}
    if others := [state for index, state in enumerate(states) if index not in ours]:
        loop["combined_loader"] = others
    if ours:
        checkpoint[_KEY] = {"loaders": ours}


def put_back(checkpoint: dict[str, Any]) -> None:
    """Undo `set_aside`."""
    ours = checkpoint.get(_KEY, {}).get("loaders", {})
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    states = list(loop.get("combined_loader", []))
    for index, state in sorted(ours.items()):
        states.insert(index, state)
    if states:
        loop["combined_loader"] = states
