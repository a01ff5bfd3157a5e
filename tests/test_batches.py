"""Where a batch has its sequences: by one dimension, or by name."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import modules
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BatchEncoding

from lightning_autosp import AutoSPStrategy
from lightning_autosp.batches import found_tensors, sequences
from lightning_autosp.data.agreement import batch_error


@dataclass
class Sample:
    ids: Any
    name: str = "x"


Pair = namedtuple("Pair", ["ids", "frames"])

ONE, TWO, THREE = torch.zeros(2, 6), torch.zeros(2, 3, 6), torch.zeros(2)


@pytest.mark.parametrize(
    ("batch", "places"),
    [
        (ONE, [("", 1)]),
        ({"ids": ONE, "image": {"frames": TWO, "size": THREE}}, [("['ids']", 1), ("['image']['frames']", 2)]),
        ([Sample(ONE), Pair(ONE, TWO)], [("[0].ids", 1), ("[1].ids", 1), ("[1].frames", 2)]),
        (BatchEncoding({"ids": ONE, "other": TWO}), [("['ids']", 1)]),
        ((ONE, TWO, "text"), [("[1]", 2)]),
    ],
)
def test_by_name(batch: Any, places: list[tuple[str, int]]) -> None:
    named = {"ids": 1, "frames": 2, "1": 2} if places != [("", 1)] else 1
    assert [(one.place, dim) for one, dim in sequences(found_tensors(batch), named)] == places


def test_the_innermost_name_counts() -> None:
    batch = {"image": {"frames": TWO, "mask": ONE}}
    assert [dim for _, dim in sequences(found_tensors(batch), {"image": 1, "frames": 2})] == [2, 1]


@pytest.mark.parametrize(
    ("batch", "dims", "message"),
    [
        ({"ids": ONE}, {"ids": 1, "lables": 1}, "has no 'lables'; its tensors are ['ids'] (2, 6). Name keys"),
        ({"ids": ONE}, {"ids": 2}, "sequence_dim={'ids': 2} but ['ids'] has no dimension 2; its shape is (2, 6)."),
        ({"ids": ONE, "frames": TWO}, {"frames": 1}, "have 3 position(s), fewer than sequence_parallel_size=4"),
    ],
)
def test_errors(batch: Any, dims: dict[str, int], message: str) -> None:
    assert message in (batch_error(list(found_tensors(batch)), dims, 4, all_named=True) or "")


def test_not_all_names_are_in_every_batch() -> None:
    tensors = list(found_tensors({"ids": ONE}))
    assert batch_error(tensors, {"ids": 1, "labels": 1}, 2) is None
    assert "names no tensor of the batch" in (batch_error(tensors, {"labels": 1}, 2) or "")


class Spectrogram(modules.Base):
    """Frames along the last dimension, labels along the first but one."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.head = nn.Conv1d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        hidden = self.convolution(batch["frames"]).transpose(1, 2)
        return F.cross_entropy(self.head(hidden).flatten(0, 1), batch["labels"].flatten())


def test_a_dimension_for_each_key_is_exact_and_sharded() -> None:
    batch = {"frames": torch.randn(2, 3, 17), "labels": torch.randint(0, 5, (2, 17))}
    result = AutoSPStrategy(sequence_dim={"frames": 2, "labels": 1}, strict=True).check(Spectrogram(), batch, num_ranks=3)
    assert result.ok, str(result)
    (step,) = result.report.steps
    assert step.length == 17
    assert not step.gathered
    assert not step.in_full
