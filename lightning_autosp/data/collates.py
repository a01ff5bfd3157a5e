"""Batches of samples that differ in length: padded to the longest, or packed one behind the other into one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from lightning_autosp.data.tokens import sequence_shards

__all__ = ["IGNORED", "pack_collate", "pad_collate"]

IGNORED = -100
"""The label that losses leave out."""


def pad_collate(
    samples: Sequence[Mapping[str, Any]],
    *,
    value: float = 0,
    values: Mapping[str, float] | None = None,
    key: str = "input_ids",
    multiple: int = 1,
) -> dict[str, Any]:
    """Stack samples of different lengths, each padded at its end to the longest.

    For `DataLoader(collate_fn=pad_collate)`, or `functools.partial(pad_collate, value=tokenizer.pad_token_id)`.

    Args:
        samples: With the same keys. What has a dimension (tensors, arrays, lists of numbers) is a sequence along its first one,
            `(S, ...)`; the lengths of a sample's need not be the same. Everything else is collated as by default.
        value: What sequences are padded with, but "labels" (-100, which losses ignore) and "attention_mask" (0).
        values: By key, what they are padded with instead.
        key: Whose lengths "attention_mask" `(B, S)` tells, int64, 1 for what there was, if samples have no mask of their own.
            Without such a key there is none.
        multiple: Lengths are rounded up to a multiple of this. A step is compiled for each length it meets.

    Returns:
        By key, `(B, S, ...)`.

    Raises:
        ValueError: If keys differ, or sizes of other dimensions do.
    """
    rows = _rows(samples)
    fill = {"labels": IGNORED, "attention_mask": 0, **(values or {})}
    found: dict[str, Any] = {}
    for name, column in rows.items():
        if not all(isinstance(one, Tensor) and one.ndim for one in column):
            found[name] = default_collate(column)
            continue
        shapes = sorted({tuple(one.shape[1:]) for one in column})
        if len(shapes) > 1:
            raise ValueError(f"{name!r}: samples are padded along their first dimension, and differ in others: {shapes}")
        length = _rounded(max(len(one) for one in column), multiple)
        padded = _filled(column).new_full((len(column), length, *shapes[0]), fill.get(name, value))
        for row, one in zip(padded, column, strict=True):
            row[: len(one)] = one
        found[name] = padded
        if name == key and "attention_mask" not in rows:
            lengths = torch.tensor([len(one) for one in column])
            found["attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
    return found


def pack_collate(
    samples: Sequence[Mapping[str, Any]],
    *,
    value: float = 0,
    key: str = "input_ids",
    multiple: int = 1,
    cu_seqlens: bool = False,
) -> dict[str, Any]:
    """Put documents one behind the other into one row, as Transformers' `DataCollatorWithFlattening` does.

    Positions begin again with each document. Attention has to keep documents apart, which modules of Transformers do by
    "position_ids". No document predicts the first token of the next: that token's label is -100.

    Args:
        samples: With the same keys, each a sequence `(S, ...)` as long as the sample's others: tensors, arrays, lists of numbers.
        value: What the row is padded with, where `multiple` asks for it; that is a document of its own, its labels -100.
        key: Whose lengths count, and which "labels" are, if samples have none.
        multiple: The row's length is rounded up to a multiple of this. A step is compiled for each length it meets.
        cu_seqlens: Whether to give, as flash-attn wants it, "cu_seq_lens_q" and "cu_seq_lens_k" (where documents begin and the last
            ends, int32), "max_length_q" and "max_length_k" (the longest one's) too.

    Returns:
        By key, `(1, S, ...)`, with "labels" and "position_ids".

    Raises:
        ValueError: If keys differ, or lengths within a sample do.
    """
    rows = _rows(samples)
    if key not in rows:
        raise ValueError(f"pack_collate(key={key!r}): samples have {sorted(rows)}")
    rows.setdefault("labels", rows[key])
    lengths = [len(one) if one.ndim else 0 for one in rows[key]] if all(isinstance(one, Tensor) for one in rows[key]) else []
    for name, column in rows.items():
        sizes = [len(one) if isinstance(one, Tensor) and one.ndim else None for one in column]
        if sizes != lengths:
            raise ValueError(f"pack_collate: {name!r} has lengths {sizes}, and {key!r} {lengths}")
    # A document of no tokens would put its label on the next one's.
    kept = [index for index, length in enumerate(lengths) if length]
    if not kept:
        raise ValueError("pack_collate: all documents are empty")
    documents = {name: [column[index] for index in kept] for name, column in rows.items()}
    documents["labels"] = [torch.cat([one.new_full((1,), IGNORED), one[1:]]) for one in documents["labels"]]
    lengths = [lengths[index] for index in kept]
    missing = _rounded(sum(lengths), multiple) - sum(lengths)
    if missing:
        lengths.append(missing)
        for name, column in documents.items():
            column.append(column[0].new_full((missing, *column[0].shape[1:]), IGNORED if name == "labels" else value))
    found: dict[str, Any] = {name: torch.cat(column)[None] for name, column in documents.items()}
    found["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    if cu_seqlens:
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        found |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths), "max_length_k": max(lengths)}
    return found


def _rows(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return what samples have by key, lists and arrays of numbers as tensors."""
    if sequence_shards(list(samples)):
        raise ValueError("samples hold slices of sequences (SequenceShard), which cannot be padded or packed: give them whole")
    keys = [sorted(sample) for sample in samples]
    if any(one != keys[0] for one in keys):
        raise ValueError(f"samples of a batch have different keys: {keys[0]} and {next(one for one in keys if one != keys[0])}")
    return {name: [_tensor(sample[name]) for sample in samples] for name in samples[0]}


def _filled(column: Sequence[Tensor]) -> Tensor:
    """Return one with elements, if there is any: a list without has no type."""
    return next((one for one in column if one.numel()), column[0])


def _tensor(value: Any) -> Any:
    if isinstance(value, (int, float, str, bytes)) or value is None:
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):  # texts, and lists of them
        return value


def _rounded(length: int, multiple: int) -> int:
    if multiple < 1:
        raise ValueError(f"multiple={multiple!r} is not known. Use a number of positions, 1 or larger.")
    return -(-length // multiple) * multiple
