"""Token files: whole samples on one device, a slice of each on every rank of a group, the same batch for the step."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import jobs
import modules
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from pool import Pool
from test_fit import FULL, assert_same
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_autosp import AutoSPStrategy
from lightning_autosp.data import SequenceShard, TokenDataset
from lightning_autosp.data.tokens import assemble, shard_bounds, sharded_datasets


def write(folder: Path, sizes: list[int], documents: tuple[int, ...] = ()) -> list[Path]:
    files = [folder / f"part{number}.npy" for number in range(len(sizes))]
    begin = 0
    for file, size in zip(files, sizes, strict=True):
        np.save(file, np.arange(begin, begin + size, dtype=np.uint16) % modules.VOCABULARY)
        np.save(file.with_suffix(".documents.npy"), np.array([0, *documents]))
        begin += size
    return files


def test_samples_of_one_process(tmp_path: Path) -> None:
    files = write(tmp_path, [21, 20])
    data = TokenDataset(files, 5)
    tokens = np.arange(41) % modules.VOCABULARY
    assert len(data) == 4 + 3  # of 20 tokens, the last five have no next token
    for index, begin in enumerate([0, 5, 10, 15, 21, 26, 31]):
        assert data[index]["tokens"].dtype == torch.int64
        assert data[index]["tokens"].tolist() == tokens[begin : begin + 6].tolist()
    assert data[-1]["tokens"].tolist() == data[6]["tokens"].tolist()
    with pytest.raises(IndexError):
        data[7]
    assert len(TokenDataset(files, 5, next_token=False)) == 4 + 4
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch["tokens"].shape == (3, 6)


def test_raw_files(tmp_path: Path) -> None:
    file = tmp_path / "tokens.bin"
    np.arange(12, dtype=np.uint32).tofile(file)
    assert TokenDataset(file, 4, dtype="uint32")[1]["tokens"].tolist() == [4, 5, 6, 7, 8]
    with pytest.raises(ValueError, match="say dtype="):
        TokenDataset(file, 4)
    with pytest.raises(ValueError, match="no file holds the 14 tokens of a sample; they hold \\[12\\]"):
        TokenDataset(file, 13, dtype="uint32")
    np.save(tmp_path / "floats.npy", np.ones(30))
    with pytest.raises(ValueError, match="floats.npy holds float64 of shape \\(30,\\)"):
        TokenDataset(tmp_path / "floats.npy", 4)


def test_documents(tmp_path: Path) -> None:
    (file,) = write(tmp_path, [20], (3, 8, 9, 14))
    whole = [TokenDataset(file, 6, documents=True)[index] for index in range(3)]
    assert whole[0]["document_ids"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert whole[0]["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert whole[1]["document_ids"].tolist() == [0, 0, 1, 2, 2, 2, 2]
    assert whole[1]["position_ids"].tolist() == [0, 1, 0, 0, 1, 2, 3]
    assert whole[2]["position_ids"].tolist() == [0, 1, 0, 1, 2, 3, 4]
    sharded = TokenDataset(file, 6, documents=True)
    for rank in range(3):
        sharded.shard_sequence(rank, 3)
        start, stop = shard_bounds(7, rank, 3)
        for index, sample in enumerate(whole):
            for name, shard in sharded[index].items():
                assert shard.local.tolist() == sample[name][start:stop].tolist()
                assert (shard.offset, shard.length, shard.samples) == (start, 7, (index,))


class Counting:
    """An array that counts the bytes it is asked for."""

    def __init__(self, array: Any) -> None:
        self.array, self.bytes = array, 0

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, where: slice) -> Any:
        found = np.array(self.array[where])
        self.bytes += found.nbytes
        return found


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_reads_its_part(tmp_path: Path, size: int) -> None:
    (file,) = write(tmp_path, [100_001])
    everything = 2 * 100 * 1001
    for rank in range(size):
        data = TokenDataset(file, 1000)
        (store,) = data._stores
        counting = store.tokens = Counting(store.tokens)
        data.shard_sequence(rank, size)
        for batch in DataLoader(data, batch_size=7):
            assert batch["tokens"].local.shape[1] in (1001 // size, 1001 // size + 1)
        assert abs(counting.bytes / everything * size - 1) < 0.02


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_was_read_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Pages of a mapped file count as the process's own until they are given back."""
    (file,) = write(tmp_path, [2**24])
    data = TokenDataset(file, 2**18, next_token=False)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")  # of files

    before = resident()
    for index in range(len(data)):
        data[index]
    assert resident() - before < 2**22


def test_litdata() -> None:
    """Of files that litdata 0.2.76 wrote: items `range(10 i, 10 i + i % 4 + 3)` for `i` below 12, in chunks of 6, 5 and 1 items."""
    items = [list(range(10 * i, 10 * i + i % 4 + 3)) for i in range(12)]
    chunks = [sum(part, []) for part in (items[:6], items[6:11], items[11:])]
    data = TokenDataset(Path(__file__).parent / "data" / "litdata", 4, documents=True)
    wanted = [tokens[begin : begin + 5] for tokens in chunks for begin in range(0, len(tokens) - 4, 4)]
    assert [sample["tokens"].tolist() for sample in data] == wanted
    assert [sample["document_ids"].tolist() for sample in data][:2] == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert data[1]["position_ids"].tolist() == [0, 1, 2, 0, 1]
    again = pickle.loads(pickle.dumps(data))
    assert [sample["tokens"].tolist() for sample in again] == wanted


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_format": ["int"]}, "holds items of \\['int'\\]"),
        ({"compression": "zstd"}, "is compressed or encrypted"),
        (None, "is no dataset that litdata wrote"),
    ],
)
def test_litdata_that_cannot_be_read(change: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    if change is not None:
        index = json.loads((Path(__file__).parent / "data" / "litdata" / "index.json").read_text())
        (tmp_path / "index.json").write_text(json.dumps({**index, "config": {**index["config"], **change}}))
    with pytest.raises(ValueError, match=message):
        TokenDataset(tmp_path, 4)


def rows() -> Any:
    """Rows of 0, 1, 2, ... tokens, numbered on."""
    lengths = [0, 3, 1, 7, 0, 5, 9, 2]
    bounds = np.cumsum([0, *lengths])
    return {"input_ids": [list(range(low, low + n)) for low, n in zip(bounds, lengths, strict=False)], "text": ["?"] * 8}


def test_arrow(tmp_path: Path) -> None:
    """Rows are one behind the other, in however many pieces they lie on disk, and are documents."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(rows()).save_to_disk(str(tmp_path), num_shards=3)
    stored = datasets.load_from_disk(str(tmp_path))
    assert len(stored.data.column("input_ids").chunks) == 3
    data = TokenDataset(stored, 6, documents=True)
    assert [sample["tokens"].tolist() for sample in data] == [list(range(begin, begin + 7)) for begin in (0, 6, 12, 18)]
    assert data[1]["position_ids"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    data.shard_sequence(1, 2)
    assert [batch["tokens"].local.tolist() for batch in DataLoader(data)] == [[[*range(b + 4, b + 7)]] for b in (0, 6, 12, 18)]
    assert [sample["tokens"].local.tolist() for sample in pickle.loads(pickle.dumps(data))][0] == [4, 5, 6]
    part = TokenDataset([stored.select(range(4)).flatten_indices(), stored], 5)
    assert [sample["tokens"].tolist()[0] for sample in part] == [0, 5, 0, 5, 10, 15, 20]


def test_arrow_that_cannot_be_read() -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({**rows(), "one": list(range(8)), "hole": [[1, None]] * 8})
    for column, message in [("ids", "is not in the dataset"), ("text", "holds string"), ("one", "holds int64"), ("hole", "nulls")]:
        with pytest.raises(ValueError, match=message):
            TokenDataset(made, 2, column=column)
    with pytest.raises(ValueError, match="flatten_indices"):
        TokenDataset(made.shuffle(seed=1), 2)
    with pytest.raises(ValueError, match="not from int"):
        TokenDataset(3, 2)


def test_found_in_other_datasets(tmp_path: Path) -> None:
    one, other = (TokenDataset(write(tmp_path, [30]), 5) for _ in range(2))
    assert sharded_datasets(ConcatDataset([Subset(one, [0]), other])) == [one, other]
    assert sharded_datasets(modules.Tokens(3, 4)) == []


def gather(dtypes: list[str], shape: tuple[int, ...], length: int) -> list[Any]:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    whole = [torch.arange(np.prod((*shape, length))).reshape(*shape, length).to(getattr(torch, dtype)) for dtype in dtypes]
    whole.append(torch.arange(2 * length * 3).reshape(2, length, 3))
    batch = {"a": [SequenceShard.of(one, rank, size, 0, -2 if one is whole[-1] else -1) for one in whole], "other": 1}
    got = assemble(batch, dist.group.WORLD, lambda shard: torch.tensor(shard.offset))
    for one, want in zip(got["a"], whole, strict=True):
        if want.is_floating_point() and length >= size:
            assert one == shard_bounds(length, rank, size)[0]
        else:
            assert torch.equal(one, want)
            assert one.dtype == want.dtype
    return [got["other"]]


@pytest.mark.dist
@pytest.mark.parametrize("length", [2, 10, 12])  # fewer positions than ranks, uneven, even
def test_made_whole(pool: Pool, length: int) -> None:
    assert pool.run(gather, 3, ["uint8", "int64", "bool", "float32"], (3, 1), length) == [[1]] * 3


def both(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    assert type(batch["tokens"]) is Tensor
    return {"ids": batch["tokens"], "labels": batch["tokens"]}


class OnTokens(modules.Shallow):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(both(batch), batch_idx)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().validation_step(both(batch), batch_idx)


def fit_tokens(files: list[Path], strategy: dict[str, Any] | None, world: int, workers: int = 0) -> dict[str, Any]:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # loaders may start workers
    recorder = jobs.Recorder()
    trainer = jobs.trainer_of(strategy, world, [recorder])
    data = TokenDataset(files, 32)
    torch.manual_seed(7)
    train = DataLoader(data, batch_size=2, shuffle=True, num_workers=workers)
    trainer.fit(OnTokens(), train, DataLoader(Subset(data, [0, 1, 2])))
    report = jobs.report_of(trainer)
    assert type(data[0]["tokens"]) is Tensor  # whole again after training
    return {
        **recorder.found(trainer),
        "notes": report.notes if report else None,
    }


@pytest.mark.dist
def test_trainer(pool: Pool, tmp_path: Path) -> None:
    files = write(tmp_path, [200, 33])
    one = pool.run(fit_tokens, 1, files, None, 1)[0]
    for run in pool.run(fit_tokens, 2, files, FULL, 2, workers=1):
        assert_same(run, one)
        assert "train batches are loaded by every rank in slices (sharded): TokenDataset reads slices" in run["notes"]


def fit_other_samples(files: list[Path]) -> None:
    class Order(torch.utils.data.Sampler[int]):
        def __iter__(self) -> Any:
            return iter([[0, 1], [1, 0]][dist.get_rank()])

    trainer = Trainer(**jobs.QUIET, max_epochs=1, devices=2, strategy=AutoSPStrategy(batch_source="sharded"))
    trainer.fit(OnTokens(), DataLoader(TokenDataset(files, 32), sampler=Order()))


@pytest.mark.dist
def test_slices_of_different_samples_are_refused(pool: Pool, tmp_path: Path) -> None:
    for outcome in pool.outcomes(fit_other_samples, 2, write(tmp_path, [200])):
        assert "the ranks of sequence group 0 loaded different batches" in outcome.message


@pytest.mark.dist
def test_sharded_needs_a_dataset_that_can(pool: Pool) -> None:
    for outcome in pool.outcomes(jobs.fit, 2, "GPT", {"batch_source": "sharded"}, 2):
        assert outcome.kind == "ValueError"
        assert "the loader's is a Tokens" in outcome.message


class Frames(torch.utils.data.Dataset[Any]):
    """Frames of floating-point numbers, of which a rank reads its slice, and a label for each."""

    def __init__(self) -> None:
        self.frames = torch.randn(6, 11, 4, generator=torch.Generator().manual_seed(3))
        self.read = 0
        self.shard_sequence(0, 1)

    def shard_sequence(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        frames, labels = self.frames[index], torch.arange(11) % 5
        if self.size == 1:
            return {"frames": frames, "labels": labels}
        shard = SequenceShard.of(frames, self.rank, self.size, index)
        self.read += shard.local.nbytes
        return {"frames": shard, "labels": SequenceShard.of(labels, self.rank, self.size, index)}


class OnFrames(modules.Base):
    """Frames have neighbours (a halo is exchanged); with `whole`, something that is known of all frames only."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole
        self.convolution, self.head = torch.nn.Conv1d(4, 8, 3, padding=1), torch.nn.Linear(8, 5)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        frames = batch["frames"] - batch["frames"].mean(dim=1, keepdim=True)
        if self.whole:
            frames = frames - frames.kthvalue(4, dim=1, keepdim=True).values
        logits = self.head(self.convolution(frames.transpose(1, 2)).transpose(1, 2))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.head(self.convolution(batch["frames"].transpose(1, 2)).transpose(1, 2)).square().mean())


def fit_frames(strategy: dict[str, Any] | None, world: int, *, whole: bool) -> dict[str, Any]:
    recorder, data = jobs.Recorder(), Frames()
    trainer = jobs.trainer_of(strategy, world, [recorder])
    torch.manual_seed(5)
    trainer.fit(OnFrames(whole), DataLoader(data, batch_size=2), DataLoader(data, batch_size=3))
    report = jobs.report_of(trainer)
    return {
        **recorder.found(trainer),
        "read": data.read,
        "steps": {one.kind: [gathered.name for gathered in one.gathered] for one in report.steps} if report else {},
        "graphs": report.num_graphs if report else {},
    }


@pytest.mark.dist
@pytest.mark.parametrize("whole", [False, True])
def test_frames_stay_slices(pool: Pool, whole: bool) -> None:
    one = pool.run(fit_frames, 1, None, 1, whole=whole)[0]
    runs = pool.run(fit_frames, 3, FULL, 3, whole=whole)
    for run in runs:
        assert_same(run, one)
        assert run["graphs"] == {"training_step": 1, "validation_step": 1}
        assert run["steps"]["validation_step"] == []
        assert bool(run["steps"]["training_step"]) == whole
    assert sum(run["read"] for run in runs) == 2 * 6 * 11 * 4 * 4
    assert max(run["read"] for run in runs) == 2 * 6 * 4 * 4 * 4
