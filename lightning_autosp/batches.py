"""The tensors of a batch, and which of their dimensions holds the sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Found", "SequenceDim", "batch_tensors", "call_tensors", "found_tensors", "named_dim", "sequences", "shown_dim"]

SequenceDim = int | Mapping[str, int]
"""The dimension of all tensors of a batch, or of each by the name that it has there: a key, a field, or a place in a tuple ("0").

Of names within each other, the innermost counts. With a mapping, tensors that it does not name have no sequence.
"""


class Found(NamedTuple):
    """A tensor of a batch.

    Attributes:
        names: Keys, fields and places that lead to it.
        place: The same, as Python writes it: `['image']['patches']`, `[0]`.
        tensor: It.
    """

    names: tuple[str, ...]
    place: str
    tensor: Tensor


def found_tensors(batch: Any, names: tuple[str, ...] = (), place: str = "") -> Iterator[Found]:
    """Yield the tensors of a batch, in order: nested lists, tuples, mappings, dataclasses."""
    if isinstance(batch, Tensor):
        yield Found(names, place, batch)
        return
    inner: list[tuple[Any, str, Any]] = []
    if isinstance(batch, Mapping):
        inner = [(key, f"[{key!r}]", value) for key, value in batch.items()]
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        inner = [(name, f".{name}", getattr(batch, name)) for name in batch._fields]
    elif isinstance(batch, Sequence) and not isinstance(batch, (str, bytes)):
        inner = [(index, f"[{index}]", value) for index, value in enumerate(batch)]
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [one.name for one in dataclasses.fields(batch) if hasattr(batch, one.name)]
        inner = [(name, f".{name}", getattr(batch, name)) for name in fields]
    for key, shown, value in inner:
        yield from found_tensors(value, (*names, str(key)), place + shown)


def batch_tensors(batch: Any) -> list[Tensor]:
    """Return the tensors of a batch, in order: nested lists, tuples, mappings, dataclasses."""
    return [one.tensor for one in found_tensors(batch)]


def named_dim(names: Sequence[str], sequence_dim: SequenceDim) -> int | None:
    """Return the dimension that is said to hold the sequence of the tensor with these names, whether or not it has so many."""
    if isinstance(sequence_dim, int):
        return sequence_dim
    return next((sequence_dim[name] for name in reversed(names) if name in sequence_dim), None)


def call_tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Found]:
    """Return the tensors that a step is called with; the places of arguments are no names."""
    return [one for argument in (*args, kwargs) for one in found_tensors(argument)]


def sequences(tensors: Iterable[Found], sequence_dim: SequenceDim) -> list[tuple[Found, int]]:
    """Return those tensors that have a sequence, each with the dimension that holds it."""
    dims = [(one, named_dim(one.names, sequence_dim)) for one in tensors]
    return [(one, dim) for one, dim in dims if dim is not None and one.tensor.ndim > dim]


def shown_dim(sequence_dim: SequenceDim) -> str:
    """Return how messages show it."""
    return f"sequence_dim={sequence_dim if isinstance(sequence_dim, int) else dict(sequence_dim)}"
