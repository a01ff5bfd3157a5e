"""Samples that differ in length: padded, or packed into one row, as Transformers does, and exact in training."""

from __future__ import annotations

import functools
from typing import Any

import jobs
import modules
import numpy as np
import pytest
import torch
from pool import Pool
from test_fit import FULL, assert_same
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening

from lightning_autosp.data import SequenceShard, pack_collate, pad_collate

SAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [5, -100, 7], "frames": np.ones((2, 2)), "name": "a", "weight": 0.5},
    {"input_ids": torch.tensor([8]), "labels": np.array([8]), "frames": np.ones((4, 2)), "name": "b", "weight": 1.5},
]


def test_padded() -> None:
    batch = pad_collate(SAMPLES, value=9, values={"frames": -1}, multiple=4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 9, 9, 9]]
    assert batch["labels"].tolist() == [[5, -100, 7, -100], [8, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["frames"].shape == (2, 4, 2)
    assert batch["frames"][0, 2:].tolist() == [[-1, -1]] * 2
    assert batch["name"] == ["a", "b"]
    assert batch["weight"].tolist() == [0.5, 1.5]
    assert pad_collate([{"input_ids": []}, {"input_ids": [1]}])["input_ids"].tolist() == [[0], [1]]
    own = pad_collate([{"input_ids": [1, 2], "attention_mask": [1, 0]}, {"input_ids": [1], "attention_mask": [1]}])
    assert own["attention_mask"].tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("labels", [False, True])
def test_packed_as_transformers_does(labels: bool) -> None:
    samples = [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}, {"input_ids": [5, 6]}]
    if labels:
        samples = [{**one, "labels": [10 * token for token in one["input_ids"]]} for one in samples]
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([dict(one) for one in samples])
    ours = pack_collate(samples, cu_seqlens=True)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert torch.equal(ours[name], value), name
            assert ours[name].dtype == value.dtype
        else:
            assert ours[name] == value


def test_a_packed_row_can_be_filled_up() -> None:
    batch = pack_collate([{"input_ids": [1, 2, 3]}, {"input_ids": []}, {"input_ids": [4, 5]}], value=9, multiple=4, cu_seqlens=True)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8]


@pytest.mark.parametrize(
    ("collate", "samples", "message"),
    [
        (pad_collate, [{"a": [1]}, {"b": [1]}], "different keys: \\['a'\\] and \\['b'\\]"),
        (pad_collate, [{"a": np.ones((2, 3))}, {"a": np.ones((2, 4))}], "'a': samples are padded along their first .*3,.*4,"),
        (functools.partial(pad_collate, multiple=0), [{"a": [1]}], "multiple=0 is not known"),
        (pad_collate, [{"a": SequenceShard(torch.zeros(3), 3, 0, 1, (0,))}], "give them whole"),
        (pack_collate, [{"input_ids": [1], "labels": [1, 2]}], "'labels' has lengths \\[2\\], and 'input_ids' \\[1\\]"),
        (pack_collate, [{"tokens": [1]}], "samples have \\['tokens'\\]"),
        (pack_collate, [{"input_ids": []}], "all documents are empty"),
    ],
)
def test_errors(collate: Any, samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate(samples)


class Documents(modules.Base):
    """One layer of attention, within documents or without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Embedding(modules.VOCABULARY, 8), nn.Linear(8, 24)
        self.head = nn.Linear(8, modules.VOCABULARY)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ids = batch["input_ids"]
        query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.mix(self.table(ids)).chunk(3, -1))
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        if "position_ids" in batch:
            number = (batch["position_ids"] == 0).cumsum(-1)
            mask = causal & (number[:, :, None] == number[:, None])
        else:
            mask = causal & batch["attention_mask"][:, None].bool()
        hidden = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None])
        logits = self.head(hidden.transpose(1, 2).flatten(2))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        self.log("loss", loss)
        return loss


def fit_documents(strategy: dict[str, Any] | None, world: int, *, packed: bool) -> dict[str, Any]:
    recorder = jobs.Recorder()
    trainer = jobs.trainer_of(strategy, world, [recorder])
    numbers = torch.Generator().manual_seed(2)
    lengths = [7, 3, 12, 2, 5, 5]
    rows = [torch.randint(modules.VOCABULARY, (length,), generator=numbers) for length in lengths]
    samples = [{"input_ids": row, "labels": row} for row in rows]
    torch.manual_seed(4)
    trainer.fit(Documents(), DataLoader(samples, batch_size=2, collate_fn=pack_collate if packed else pad_collate))
    return recorder.found(trainer)


@pytest.mark.dist
@pytest.mark.parametrize("packed", [False, True])
def test_trainer(pool: Pool, packed: bool) -> None:
    one = pool.run(fit_documents, 1, None, 1, packed=packed)[0]
    assert len(one["curve"]) == 3
    for run in pool.run(fit_documents, 2, FULL, 2, packed=packed):
        assert_same(run, one)
