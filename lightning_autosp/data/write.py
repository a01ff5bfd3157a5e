"""Token files from text, a document at a time; a run that was interrupted goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_autosp.data.stores import documents_path

__all__ = ["WriteError", "find_documents", "write_tokens"]

_HEADER = 128
"""Bytes of a `.npy` file before its elements; numpy's own for one dimension."""


class WriteError(ValueError):
    """Sources, or what a tokenizer made of them, cannot be written."""


def write_tokens(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    tokenize: Callable[[str], Any],
    *,
    dtype: str = "uint32",
    end_of_document: int | None = None,
    text_key: str = "text",
    overwrite: bool = False,
    progress: bool = True,
    save_every: int = 1000,
) -> int:
    """Write the tokens of documents, one after the other, and where each starts, for `TokenDataset`.

    What is not finished lies beside the output, in files named `*.partial`; the output appears when it is whole. The same call
    after an interruption goes on after the document that was saved last.

    Args:
        sources: UTF-8 files. Each line of a `.jsonl` file is a document, an object whose text is under `text_key`; any other file
            is one document, read at once.
        output: A `.npy` file of one dimension. Documents' starts come into `documents_path(output)`.
        tokenize: Gives a text's tokens: a sequence or an array of integers, or something with these as `input_ids`.
        dtype: Of the tokens written.
        end_of_document: A token to write after each document.
        text_key: Where a line of a `.jsonl` file has its text.
        overwrite: Start from the beginning, whatever is there.
        progress: Show a bar.
        save_every: Documents after which an interrupted run can go on.

    Returns:
        The number of tokens.

    Raises:
        WriteError: If the output exists, a source cannot be read as documents, an interrupted run had other sources or options, or
            a token does not fit `dtype`.
    """
    output = Path(output)
    if output.suffix != ".npy":
        raise WriteError(f"the output {str(output)!r} has to be named *.npy")
    if output.exists() and not overwrite:
        raise WriteError(f"{output} exists already. Choose another name, or overwrite=True (--overwrite).")
    kind = np.dtype(dtype)
    if kind.kind not in "iu":
        raise WriteError(f"dtype={dtype!r} is no integer type; tokens are, as 'uint16'.")
    files = [Path(file) for file in ([sources] if isinstance(sources, (str, os.PathLike)) else sources)]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise WriteError(f"no such file: {', '.join(missing)}" if missing else "no sources")
    sizes = [file.stat().st_size for file in files]
    about = [[str(file.resolve()), size, file.stat().st_mtime_ns] for file, size in zip(files, sizes, strict=True)]
    asked = {"sources": about, "dtype": str(kind), "end_of_document": end_of_document, "text_key": text_key}
    output.parent.mkdir(parents=True, exist_ok=True)
    with _Unfinished(output, kind, asked, overwrite=overwrite) as unfinished:
        done = sum(sizes[: unfinished.source]) + unfinished.position
        with tqdm(total=sum(sizes), initial=done, unit="B", unit_scale=True, disable=not progress, desc=output.name) as bar:
            since = 0
            for number, position, where, text in _documents(files, unfinished.source, unfinished.position, text_key):
                unfinished.append(_tokens(tokenize(text), kind, end_of_document, where))
                unfinished.source, unfinished.position = number, position
                since += 1
                if since >= save_every:
                    unfinished.save()
                    since = 0
                bar.update(sum(sizes[:number]) + position - bar.n)
        return unfinished.finish()


def find_documents(file: str | os.PathLike[str], end_of_document: int, *, dtype: str | None = None) -> int:
    """Write where documents start, of a token file in which each ends with a token, and return how many there are.

    Args:
        file: `.npy`, or raw.
        end_of_document: The token. It belongs to the document that it ends.
        dtype: Of a raw file.
    """
    tokens = np.load(file, mmap_mode="r") if Path(file).suffix == ".npy" else np.memmap(file, dtype or "uint16", "r")
    step = 1 << 24
    ends = [np.flatnonzero(tokens[at : at + step] == end_of_document) + at + 1 for at in range(0, len(tokens), step)]
    starts = np.concatenate([[0], *ends]).astype(np.int64)
    starts = starts[starts < len(tokens)]
    _replace(documents_path(file), lambda out: np.save(out, starts))
    return len(starts)


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as out:
        write(out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def _documents(files: list[Path], source: int, position: int, key: str) -> Iterator[tuple[int, int, str, str]]:
    """Yield documents from a place on: the place after each, as a source's number and bytes of it, where it is, its text."""
    for number in range(source, len(files)):
        file = files[number]
        with file.open("rb") as lines:
            begin = position if number == source else 0
            lines.seek(begin)
            if file.suffix != ".jsonl":
                if text := lines.read():
                    yield number, lines.tell(), str(file), _decoded(text, str(file))
                continue
            while line := lines.readline():
                where = f"{file}, the line at byte {begin}"
                begin = lines.tell()
                if line.strip():
                    yield number, begin, where, _text(line, key, where)


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise WriteError(f"{where}: this is no UTF-8 text: {error}") from error


def _text(line: bytes, key: str, where: str) -> str:
    try:
        value = json.loads(_decoded(line, where))
    except json.JSONDecodeError as error:
        raise WriteError(f"{where}: this is no JSON: {error}") from error
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        found = f"its keys are {', '.join(map(repr, value))}" if isinstance(value, dict) else f"it is a {type(value).__name__}"
        raise WriteError(f"{where}: there is no text under {key!r}; {found}. Say text_key=... (--text-key).")
    return text


def _tokens(found: Any, dtype: np.dtype[Any], end_of_document: int | None, where: str) -> np.ndarray[Any, Any]:
    found = found["input_ids"] if isinstance(found, Mapping) else getattr(found, "input_ids", found)
    tokens = np.asarray(found)
    if tokens.size == 0:
        tokens = np.zeros(0, np.int64)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise WriteError(
            f"{where}: the tokenizer gave {tokens.dtype} of shape {tokens.shape}; tokens are one dimension of integers"
        )
    if end_of_document is not None:
        tokens = np.append(tokens.astype(np.int64), end_of_document)
    limits = np.iinfo(dtype)
    if tokens.size and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
        raise WriteError(
            f"{where}: tokens from {tokens.min()} to {tokens.max()} do not fit dtype {str(dtype)!r}. Use a larger one."
        )
    return tokens.astype(dtype)


class _Unfinished:
    """Tokens and documents' starts written so far, and up to where they are known to be whole."""

    def __init__(self, output: Path, dtype: np.dtype[Any], asked: dict[str, Any], *, overwrite: bool) -> None:
        self._output, self._dtype, self._asked = output, dtype, asked
        self._paths = [output.with_name(output.name + suffix) for suffix in (".partial", ".starts.partial", ".state.partial")]
        self.source = self.position = self._num_tokens = self._num_documents = 0
        if self._paths[2].exists() and not overwrite:
            self._read_state()
        for path, end in zip(self._paths[:2], (_HEADER + self._num_tokens * dtype.itemsize, 8 * self._num_documents), strict=True):
            with path.open("ab"):  # it is there
                os.truncate(path, end)
        self._tokens, self._starts = (path.open("r+b") for path in self._paths[:2])
        for file in (self._tokens, self._starts):
            file.seek(0, os.SEEK_END)
        self.save()

    def _read_state(self) -> None:
        state = json.loads(self._paths[2].read_text())
        different = [name for name in self._asked if state["asked"].get(name) != self._asked[name]]
        if different:
            raise WriteError(
                f"{self._output}: an interrupted run had other {', '.join(different)} ({self._paths[2].name} beside it). Go on "
                f"with those, or start again with overwrite=True (--overwrite)."
            )
        sizes = [path.stat().st_size if path.exists() else 0 for path in self._paths[:2]]
        if sizes[0] < _HEADER + state["tokens"] * self._dtype.itemsize or sizes[1] < 8 * state["documents"]:
            return  # a finished run was stopped while it cleaned up: what the state is of is in place, or was taken away
        self.source, self.position = state["source"], state["position"]
        self._num_tokens, self._num_documents = state["tokens"], state["documents"]

    def __enter__(self) -> _Unfinished:
        return self

    def __exit__(self, *_: object) -> None:
        self._tokens.close()
        self._starts.close()

    def append(self, tokens: np.ndarray[Any, Any]) -> None:
        """Write a document. One without a token is none."""
        if not tokens.size:
            return
        self._starts.write(np.int64(self._num_tokens).tobytes())
        self._tokens.write(tokens.tobytes())
        self._num_tokens += tokens.size
        self._num_documents += 1

    def save(self) -> None:
        """Let a later run go on from here."""
        for file in (self._tokens, self._starts):
            file.flush()
            os.fsync(file.fileno())
        state = {
            "asked": self._asked,
            "source": self.source,
            "position": self.position,
            "tokens": self._num_tokens,
            "documents": self._num_documents,
        }
        _replace(self._paths[2], lambda out: out.write(json.dumps(state).encode()))

    def finish(self) -> int:
        """Put the files in place: documents first, so that tokens are never there without."""
        if not self._num_tokens:
            raise WriteError(f"{self._output}: the sources hold no token")
        self._tokens.seek(0)
        self._tokens.write(_npy_header(self._dtype, self._num_tokens))
        self.save()
        starts = np.fromfile(self._paths[1], np.int64)
        _replace(documents_path(self._output), lambda out: np.save(out, starts))
        os.replace(self._paths[0], self._output)
        for path in self._paths[1:]:
            path.unlink()
        return self._num_tokens


def _npy_header(dtype: np.dtype[Any], length: int) -> bytes:
    described = f"{{'descr': {np.lib.format.dtype_to_descr(dtype)!r}, 'fortran_order': False, 'shape': ({length},), }}"
    start = b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little")
    return start + described.encode().ljust(_HEADER - 11) + b"\n"
