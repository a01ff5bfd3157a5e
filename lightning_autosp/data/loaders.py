"""What loaders that stand for a user's have in common."""

from __future__ import annotations

import copy
from typing import Any

from torch.utils.data import DataLoader

__all__ = ["StandIn", "with_sampler"]


class StandIn:
    """A loader that is iterated over in the place of another, whose attributes it has."""

    def __init__(self, given: Any, loader: Any) -> None:
        """Stand in for a loader.

        Args:
            given: The user's.
            loader: What batches come from: that one, or one that is made of it.
        """
        self._given, self._loader = given, loader

    def __getattr__(self, name: str) -> Any:
        # Lightning and users look for what a DataLoader has: `dataset`, `sampler`, `batch_size`, ...
        # Not its position, which is not the stand-in's.
        if name.startswith("__") or name in ("state_dict", "load_state_dict") or "_given" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._given, name)

    @property
    def _iterator(self) -> Any:
        # Lightning shuts workers down through it, and clears it.
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value


def with_sampler(loader: DataLoader[Any], sampler: Any) -> DataLoader[Any]:
    """Return a copy of a loader that draws from another sampler: of batches, unless it has none of them."""
    made = copy.copy(loader)
    # A DataLoader does not let itself be given another sampler; a copy that no iteration has begun of can have one.
    made.__dict__["_iterator"] = None
    made.__dict__["sampler" if loader.batch_sampler is None else "batch_sampler"] = sampler
    return made
