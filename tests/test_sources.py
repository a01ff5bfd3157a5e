"""Who loads: every batch of an epoch reaches every rank of a group, in the one-device order, loaded as often as is said."""

from __future__ import annotations

import multiprocessing
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jobs
import modules
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from pool import Pool
from test_fit import FULL, assert_same
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler
from transformers import BatchEncoding

from lightning_autosp import AutoSPStrategy
from lightning_autosp.data.sources import SharedLoader, choose_source, share
from lightning_autosp.mesh import ParallelMesh

pytestmark = pytest.mark.dist


class Numbers(Dataset[Tensor]):
    def __init__(self, size: int, *, fails_at: int | None = None, noise: bool = False) -> None:
        self.size, self.fails_at, self.noise, self.loaded = size, fails_at, noise, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        if index == self.fails_at:
            raise ValueError("no such sample")
        self.loaded.append(index)
        return torch.tensor(index) + (torch.rand(()) if self.noise else 0)


class Stream(IterableDataset[Tensor]):
    def __init__(self, numbers: list[int]) -> None:
        self.numbers, self.loaded = numbers, []

    def __iter__(self) -> Iterator[Tensor]:
        for number in self.numbers:
            self.loaded.append(number)
            yield torch.tensor(number)


class Backwards(Sampler[int]):
    """Draws from the global generator with every index."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        left = list(range(self.size))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))

    def __len__(self) -> int:
        return self.size


def make(kind: str, rank: int, world: int) -> DataLoader[Any]:
    """One loader of 11 samples in batches of 2, or parts of it."""
    if kind == "stream":
        return DataLoader(Stream(list(range(11))), batch_size=2)
    if kind == "own streams":  # of other lengths
        return DataLoader(Stream(list(range(100 * rank, 100 * rank + 2 * (2 + rank)))), batch_size=2)
    if kind == "shuffled in workers":
        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # the pool's ranks may have children
        return DataLoader(Numbers(11), batch_size=2, shuffle=True, num_workers=1, persistent_workers=True)
    if kind == "custom":
        return DataLoader(Numbers(11), batch_size=2, sampler=Backwards(11))
    if kind == "noise":
        return DataLoader(Numbers(11, noise=True), batch_size=2, shuffle=True)
    if kind == "samples":
        return DataLoader(Numbers(11), batch_size=None)
    if kind == "dealt to all":
        data = Numbers(12)
        return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, world, rank, shuffle=False))
    if kind == "fails":
        return DataLoader(Numbers(11, fails_at=5), batch_size=2)
    assert kind == "shuffled"
    return DataLoader(Numbers(11), batch_size=2, shuffle=True)


def passes(kind: str, source: Any, data: int, sequence: int, *, num: int = 2) -> dict[str, Any]:
    """Iterate without a Trainer and return what this rank saw and loaded."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    meshes = ParallelMesh.create("cpu", data, sequence)
    torch.manual_seed(3)
    loader = make(kind, rank, world)
    source, reason = choose_source(loader, source, meshes.host)
    said: list[str] = []
    shared = share(loader, source, meshes.host, said.append)
    seen = [[batch.reshape(-1).tolist() for batch in shared] for _ in range(num)]
    try:
        length = len(shared)
    except TypeError:
        length = None
    state = torch.get_rng_state().tolist()
    loaded = loader.dataset.loaded
    worked = getattr(shared, "_iterator", None) is not None
    return {"seen": seen, "loaded": loaded, "length": length, "source": source, "state": state, "worked": worked, "said": said}


def alone(kind: str, *, num: int = 2) -> dict[str, Any]:
    torch.manual_seed(3)
    loader = make(kind, 0, 1)
    seen = [[batch.reshape(-1).tolist() for batch in loader] for _ in range(num)]
    return {"seen": seen, "state": torch.get_rng_state().tolist(), "length": len(loader) if kind != "stream" else None}


@pytest.mark.parametrize("source", ["broadcast", "exchange"])
@pytest.mark.parametrize(("kind", "world"), [("shuffled", 3), ("shuffled in workers", 2), ("custom", 2), ("samples", 2)])
def test_the_epoch_is_that_of_one_device(pool: Pool, kind: str, source: str, world: int) -> None:
    one = pool.run(alone, 1, kind)[0]
    runs = pool.run(passes, world, kind, source, 1, world)
    for run in runs:
        assert run["seen"] == one["seen"]
        assert run["length"] == one["length"] == (11 if kind == "samples" else 6)
        assert run["state"] == one["state"]
    if kind != "shuffled in workers":
        everything = sorted(number for run in runs for number in run["loaded"])
        assert everything == sorted(2 * list(range(11)))  # nothing twice in an epoch
        assert (runs[1]["loaded"] == []) == (source == "broadcast")
    elif source == "broadcast":
        assert [run["worked"] for run in runs] == [True] + [False] * (world - 1)  # no workers where nothing is loaded


def test_loaders_of_each_rank_end_together(pool: Pool) -> None:
    one = pool.run(alone, 1, "stream")[0]
    for run in pool.run(passes, 2, "stream", "replicated", 1, 2):
        assert (run["seen"], run["length"]) == (one["seen"], None)
    for outcome in pool.outcomes(passes, 3, "own streams", "replicated", 1, 3):
        assert outcome.kind == "LoadError"
        assert outcome.message.startswith("rank(s) 0 got a shorter loader than the others: it has no more than 2 batches.")


def test_groups_of_one_end_with_the_shortest(pool: Pool) -> None:
    for rank, run in enumerate(pool.run(passes, 2, "own streams", "broadcast", 2, 1)):
        assert run["seen"] == 2 * [[[100 * rank, 100 * rank + 1], [100 * rank + 2, 100 * rank + 3]]]


def test_random_numbers_drawn_while_loading(pool: Pool) -> None:
    """The first rank's draws are those of one device; all ranks go on from them."""
    one = pool.run(alone, 1, "noise")[0]
    for run in pool.run(passes, 2, "noise", "broadcast", 1, 2):
        assert run["seen"] == one["seen"]
        assert run["state"] == one["state"]
    runs = pool.run(passes, 2, "noise", "exchange", 1, 2)
    assert runs[0]["seen"] == runs[1]["seen"]
    assert runs[0]["state"] == runs[1]["state"]
    assert sorted(int(x) for batch in runs[0]["seen"][1] for x in batch) == list(range(11))


def test_streams(pool: Pool) -> None:
    want = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    runs = pool.run(passes, 2, "stream", "auto", 1, 2)
    assert [run["source"] for run in runs] == ["broadcast"] * 2
    assert [run["seen"] for run in runs] == [[want, want]] * 2
    assert [len(run["loaded"]) for run in runs] == [22, 0]


def test_exchange_of_loaders_of_other_lengths(pool: Pool) -> None:
    """Rank after rank; who has no more is passed over."""
    want = [[0, 1], [100, 101], [2, 3], [102, 103], [104, 105]]
    for run in pool.run(passes, 2, "own streams", "exchange", 1, 2):
        assert run["seen"] == [want, want]


def test_groups_of_other_lengths_end_together(pool: Pool) -> None:
    runs = pool.run(passes, 4, "own streams", "exchange", 2, 2)
    assert [[len(one) for one in run["seen"]] for run in runs] == [[5, 5]] * 4  # the others' 9 batches are cut
    assert runs[0]["seen"][0][0] == [0, 1]
    assert runs[2]["seen"][0][:3] == runs[3]["seen"][0][:3] == [[200, 201], [300, 301], [202, 203]]
    assert [len(run["said"]) for run in runs] == [0, 0, 2, 2]


def test_auto(pool: Pool) -> None:
    for kind, world, want in [
        ("shuffled", 2, "replicated"),
        ("custom", 2, "broadcast"),
        ("dealt to all", 2, "exchange"),
        ("stream", 2, "broadcast"),
    ]:
        runs = pool.run(passes, world, kind, "auto", 1, world, num=1)
        assert {run["source"] for run in runs} == {want}, kind
        assert runs[0]["seen"] == runs[1]["seen"]
    dealt = pool.run(passes, 2, "dealt to all", "auto", 1, 2, num=1)[0]
    assert sorted(number for batch in dealt["seen"][0] for number in batch) == list(range(12))
    assert dealt["length"] == 6


def test_what_a_loader_raises_is_raised_on_every_rank(pool: Pool) -> None:
    outcomes = pool.outcomes(passes, 2, "fails", "exchange", 1, 2)
    assert [outcome.kind for outcome in outcomes] == ["ValueError", "LoadError"]
    assert "rank 0 could not load: ValueError: no such sample" in outcomes[1].message


def test_samplers_that_differ_are_refused(pool: Pool) -> None:
    outcomes = pool.outcomes(differing, 2)
    assert {outcome.kind for outcome in outcomes} == {"LoadError"}
    assert "the samplers (BatchSampler) of a sequence group's ranks gave different indices" in outcomes[0].message


def differing() -> None:
    dist.init_process_group("gloo")
    order = [[0, 1, 2], [2, 1, 0]][dist.get_rank()]
    list(share(DataLoader(Numbers(3), sampler=order), "exchange", ParallelMesh.create("cpu", 1, 2).host, print))


Pair = namedtuple("Pair", "left right")


@dataclass
class Record:
    ids: Tensor
    name: str


def _everything() -> list[Any]:
    shared = torch.arange(3)
    return [
        {"a": torch.arange(1000)[::100], "nested": [Pair(torch.tensor(2.5), (None, "text")), Record(torch.zeros(0, 3), "x")]},
        BatchEncoding({"ids": torch.ones(2, 3, dtype=torch.bool)}),
        torch.arange(4, dtype=torch.bfloat16).reshape(2, 2).T,
        [shared, shared],
        torch.eye(2).to_sparse(),
        {1: 2j * torch.ones(2).conj()},
    ]


def send_everything() -> list[Any]:
    dist.init_process_group("gloo")
    meshes = ParallelMesh.create("cpu", 1, 2)
    batches = _everything() if dist.get_rank() == 0 else None
    loader = SharedLoader(batches, "broadcast", meshes.host, print)
    got = list(loader)
    assert type(got[0]["nested"][0]).__name__ == "Pair"
    assert got[0]["a"].untyped_storage().nbytes() <= 8000
    assert got[3][0] is got[3][1]
    return [str(got), type(got[1]).__name__, len(loader)]


def test_any_batch_can_be_sent(pool: Pool) -> None:
    want = [str(_everything()), "BatchEncoding", 6]
    assert pool.run(send_everything, 2) == [want, want]


def send_a_lambda() -> None:
    dist.init_process_group("gloo")
    meshes = ParallelMesh.create("cpu", 1, 2)
    list(SharedLoader([lambda: 0], "broadcast", meshes.host, print))


def test_a_batch_that_cannot_be_sent(pool: Pool) -> None:
    for outcome in pool.outcomes(send_a_lambda, 2):
        assert "a batch of type function cannot be sent to other ranks" in outcome.message


# With a Trainer.


class Seen(Callback):
    def __init__(self) -> None:
        self.train: list[Any] = []
        self.val: list[Any] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, *args: Any) -> None:
        batch = batch if isinstance(batch, dict) else {"ids": torch.cat([one["ids"] for one in batch])}
        self.train.append(batch["ids"][:, :4].tolist())

    def on_validation_batch_start(self, trainer: Trainer, module: Any, batch: Any, *args: Any) -> None:
        self.val.append(batch["ids"][:, :4].tolist())


class Streamed(IterableDataset[dict[str, Tensor]]):
    def __init__(self, num_samples: int, length: int) -> None:
        self.data, self.opened = modules.Tokens(num_samples, length), 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.opened += 1
        return (self.data[index] for index in range(len(self.data)))


def fit_from(strategy: dict[str, Any] | None, world: int, *, stream: bool, **options: Any) -> dict[str, Any]:
    recorder, seen = jobs.Recorder(), Seen()
    own = {"max_epochs": 2, "num_sanity_val_steps": 1, **options}
    trainer = jobs.trainer_of(strategy, world, [recorder, seen], **own)
    torch.manual_seed(7)
    data = Streamed(7, 32) if stream else modules.Tokens(7, 32)
    train = DataLoader(data, batch_size=2, shuffle=not stream)
    trainer.fit(TwoSets(), train, [modules.loader(3, 32, 1), modules.loader(2, 32, 1)])
    report = jobs.report_of(trainer)
    return {
        **recorder.found(trainer),
        "train": seen.train,
        "val": seen.val,
        "opened": getattr(data, "opened", None),
        "notes": report.notes if report else None,
    }


class TwoSets(modules.Shallow):
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch)[0], sync_dist=True)


@pytest.mark.parametrize(("source", "stream"), [("auto", True), ("exchange", False), ("broadcast", False)])
def test_trainer(pool: Pool, source: str, stream: bool) -> None:
    one = pool.run(fit_from, 1, None, 1, stream=stream)[0]
    runs = pool.run(fit_from, 2, {**FULL, "batch_source": source}, 2, stream=stream)
    for run in runs:
        assert run["train"] == one["train"]
        assert run["val"] == one["val"]
    assert_same(runs[0], one)
    if stream:
        assert [run["opened"] for run in runs] == [2, 0]
    name = "broadcast" if source == "auto" else source
    assert f"({name}): " in " ".join(note for note in runs[0]["notes"] if note.startswith("train batches are loaded by"))


class Writer(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch")
        self.indices: list[Any] = []

    def write_on_batch_end(self, trainer: Any, module: Any, prediction: Any, batch_indices: Any, *args: Any) -> None:
        self.indices.append(batch_indices)


def predict_from(source: str, data: int) -> tuple[list[Any], list[list[int]]]:
    writer = Writer()
    strategy = AutoSPStrategy(batch_source=source, data_parallel_size=data)
    trainer = Trainer(**jobs.QUIET, devices=2 * data, strategy=strategy, callbacks=[writer], limit_predict_batches=3)
    predicted = trainer.predict(modules.Shallow(), DataLoader(modules.Tokens(11, 16), batch_size=2))
    return writer.indices, [list(one.shape) for one in predicted]


@pytest.mark.parametrize("source", ["replicated", "broadcast", "exchange"])
def test_prediction_writers_are_told_the_samples(pool: Pool, source: str) -> None:
    for indices, shapes in pool.run(predict_from, 2, source, 1):
        assert indices == [[0, 1], [2, 3], [4, 5]]
        assert shapes == [[2, 16, modules.VOCABULARY]] * 3


def test_groups_predict_samples_of_their_own(pool: Pool) -> None:
    runs = pool.run(predict_from, 4, "exchange", 2)
    assert [run[0] for run in runs] == [[[0, 2], [4, 6], [8, 10]]] * 2 + [[[1, 3], [5, 7], [9]]] * 2


class Stateful(list):  # type: ignore[type-arg]
    def state_dict(self) -> dict[str, int]:
        return {"at": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.append(state["at"])


def stateful() -> list[Any]:
    dist.init_process_group("gloo")
    groups = ParallelMesh.create("cpu", 1, 2).host
    loaders = [share(Stateful(), source, groups, print) for source in ("broadcast", "exchange")]
    loaders[0].load_state_dict(loaders[0].state_dict())
    return [[isinstance(loader, _Stateful) for loader in loaders], list(loaders[0])]


def test_position_of_a_stateful_loader(pool: Pool) -> None:
    assert pool.run(stateful, 2) == [[[True, False], [3]]] * 2
