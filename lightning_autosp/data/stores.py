"""What token datasets read: one-dimensional integers on disk, mapped into memory, wherever they come from.

A store opens when it is first read, and again in a worker process: pickling a map would read all of it.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Source", "Store", "documents_path", "stores_of"]

Source = Any
"""A path of a token file or of a directory that litdata wrote, or a `datasets.Dataset`."""

Integers = Any
"""One-dimensional integers, `len` and slices of which are NumPy's."""


def documents_path(path: str | os.PathLike[str]) -> Path:
    """Return where the positions that documents start at stand, beside a token file: `corpus.documents.npy`."""
    return Path(path).with_suffix(".documents.npy")


AROUND = 2**21
"""Bytes that a page which is read may bring others of into a process's memory: what one page table of the kernel spans."""


class _Mapped:
    """A mapped file whose pages do not stay in the process's resident memory: those of a slice are given back with it."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, wanted: slice) -> Any:
        found = np.array(self._values[wanted])
        if hasattr(mmap, "MADV_DONTNEED"):
            start, stop, _ = wanted.indices(len(self))
            before, size = self._values.offset % mmap.ALLOCATIONGRANULARITY, self._values.itemsize
            begin = (before + start * size) // AROUND * AROUND
            memory = self._values.base
            end = min(-(-(before + stop * size) // AROUND) * AROUND, len(memory))
            if begin < end:
                memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)
        return found


class Store:
    """Tokens one after the other, and where documents start."""

    name: str

    @functools.cached_property
    def tokens(self) -> Integers:
        """The tokens."""
        return self._open_tokens()

    @functools.cached_property
    def documents(self) -> Integers:
        """The positions that documents start at, ascending, from 0."""
        return self._open_documents()

    def _open_tokens(self) -> Integers:
        raise NotImplementedError

    def _open_documents(self) -> Integers:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("tokens", "documents")}


@dataclass
class _File(Store):
    """A `.npy` file, or raw numbers."""

    path: Path
    dtype: Any

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.path)

    def _open_tokens(self) -> Integers:
        path, dtype = self.path, self.dtype
        if path.suffix == ".npy":
            return _Mapped(_checked(np.load(path, mmap_mode="r"), path))
        if dtype is None:
            raise ValueError(f"{path} is a raw file of tokens: say dtype='uint16', or what they are; or use .npy files.")
        if path.stat().st_size % np.dtype(dtype).itemsize or not path.stat().st_size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, which is no number of {np.dtype(dtype)} tokens.")
        return _Mapped(_checked(np.memmap(path, dtype, "r"), path))

    def _open_documents(self) -> Integers:
        path = documents_path(self.path)
        starts = _checked(np.load(path, mmap_mode="r"), path)
        if not len(starts) or starts[0] != 0:
            raise ValueError(f"{path}: the first document has to start at 0; found {starts[:1].tolist()}")
        return starts


def _checked(values: Any, path: Path) -> Integers:
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(
            f"{path} holds {values.dtype} of shape {values.shape}; tokens and positions are one dimension of integers."
        )
    return values


@dataclass
class _Chunk(Store):
    """A chunk of a dataset that litdata's `optimize` wrote with a `TokensLoader`; an item is a document.

    `num_items`, `num_items + 1` offsets of items from the file's start in bytes, both uint32, and the tokens of all items.
    """

    path: Path
    dtype: Any
    num_items: int

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self.path)

    def _open_tokens(self) -> Integers:
        return _Mapped(np.memmap(self.path, self.dtype, "r", offset=4 * (self.num_items + 2)))

    def _open_documents(self) -> Integers:
        offsets = np.fromfile(self.path, np.uint32, self.num_items, offset=4).astype(np.int64)
        return _starts(np.diff((offsets - 4 * (self.num_items + 2)) // np.dtype(self.dtype).itemsize, append=len(self.tokens)))


_LITDATA_DTYPES = {11: "uint8", 12: "int8", 13: "int16", 14: "int16", 15: "int32", 16: "int32", 17: "int64", 18: "int64"}
_LITDATA_DTYPES[20] = "uint16"
"""By number in its index, of tensors."""


def _chunks(directory: Path) -> list[Store]:
    try:
        index = json.loads((directory / "index.json").read_text())
        config, chunks = index["config"], index["chunks"]
        kind, _, number = config["data_format"][0].partition(":")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{directory} is no dataset that litdata wrote: {type(error).__name__}: {error}") from error
    if kind != "no_header_tensor" or int(number) not in _LITDATA_DTYPES or len(config["data_format"]) != 1:
        raise ValueError(
            f"{directory} holds items of {config['data_format']}, which are not one-dimensional tensors of integers. Have "
            "litdata's optimize() return such, with item_loader=TokensLoader()."
        )
    if config.get("compression") or config.get("encryption"):
        raise ValueError(f"{directory} is compressed or encrypted, and slices of it cannot be read. Write it without.")
    dtype = _LITDATA_DTYPES[int(number)]
    return [_Chunk(directory / one["filename"], dtype, one["chunk_size"]) for one in chunks]


@dataclass
class _Column(Store):
    """A column of lists of a `datasets.Dataset`, whose Arrow files are mapped; a row is a document."""

    dataset: Any
    column: str

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"column {self.column!r} of the dataset"

    def _lists(self) -> list[Any]:
        if self.column not in self.dataset.column_names:
            raise ValueError(f"column={self.column!r} is not in the dataset; it has {self.dataset.column_names}.")
        if self.dataset._indices is not None:
            raise ValueError(
                "the dataset's rows were selected, shuffled or filtered, and no longer lie one after the other: call "
                "flatten_indices() on it, and let the DataLoader shuffle."
            )
        return self.dataset.data.column(self.column).chunks

    def _open_tokens(self) -> Integers:
        parts = []
        for chunk in self._lists():
            values = chunk.flatten() if hasattr(chunk, "flatten") else chunk
            kind = str(values.type)
            if not hasattr(chunk, "value_lengths") or not kind.startswith(("int", "uint")) or values.null_count:
                raise ValueError(f"column {self.column!r} holds {chunk.type}; tokens are lists of integers, without nulls.")
            parts.append(values.to_numpy(zero_copy_only=True))
        return _Joined(parts)

    def _open_documents(self) -> Integers:
        lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in self._lists()]
        return _starts(np.concatenate(lengths).astype(np.int64))


def _starts(lengths: Any) -> Integers:
    """Return where documents of these lengths start; empty ones do not."""
    lengths = lengths[lengths > 0]
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)


class _Joined:
    """Arrays one behind the other."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self._parts = [part for part in parts if len(part)]
        self._bounds = np.concatenate([[0], np.cumsum([len(part) for part in self._parts], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, wanted: slice) -> Any:
        start, stop, _ = wanted.indices(len(self))
        first = int(np.searchsorted(self._bounds, start, side="right")) - 1
        last = max(int(np.searchsorted(self._bounds, stop, side="left")), first + 1)
        pieces = [
            part[max(start - low, 0) : stop - low]
            for part, low in zip(self._parts[first:last], self._bounds[first:last].tolist(), strict=True)
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def stores_of(sources: Source | Sequence[Source], dtype: Any, column: str) -> list[Store]:
    """Return the stores of one or several sources, in order.

    Raises:
        ValueError: If a directory or a dataset holds something else than tokens.
    """
    found: list[Store] = []
    for one in sources if isinstance(sources, (list, tuple)) else [sources]:
        if hasattr(one, "column_names") and hasattr(one, "data"):
            found.append(_Column(one, column))
        elif not isinstance(one, (str, os.PathLike)):
            raise ValueError(
                f"tokens are read from files, directories that litdata wrote, and datasets.Dataset, not from {type(one).__name__}."
            )
        elif Path(one).is_dir():
            found += _chunks(Path(one))
        else:
            found.append(_File(Path(one), dtype))
    return found
