"""Train an epoch on token files: what each rank reads, copies and receives, and whether its memory grows.

    python benchmarks/data.py [--mib 1024] [--ranks 4] [--length 131072] [--json [FILE]]

Tokens (uint32) are written into a temporary folder, and loaded as users load them: a `TokenDataset` in a shuffled DataLoader, given
to a Trainer with `AutoSPStrategy()`, over gloo on the CPU. The step looks tokens up in a table of one number each, so that an epoch
is little but loading. Bytes read are those asked of the mapped file, bytes copied those of the batches that move to the device,
bytes whole those of the batches that the step sees. Resident memory is the process's, pages of mapped files included, after the
first tenth of the epoch's steps and at most after that.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "data.json"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import machine  # noqa: E402

from lightning_autosp import AutoSPStrategy  # noqa: E402
from lightning_autosp.data import TokenDataset  # noqa: E402
from lightning_autosp.data.tokens import sequence_shards  # noqa: E402

Row = dict[str, Any]

VOCABULARY = 256
PIECE = 2**22
"""Tokens written at a time."""


def write(path: Path, num_tokens: int) -> None:
    """Write a token file of random tokens."""
    numbers = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint32, shape=(num_tokens,))
    for start in range(0, num_tokens, PIECE):
        file[start : start + PIECE] = numbers.integers(0, VOCABULARY, min(PIECE, num_tokens - start), dtype=np.uint32)
    file.flush()


class Counting:
    """A mapped file that counts the bytes it is asked for."""

    def __init__(self, tokens: Any) -> None:
        self.tokens, self.bytes = tokens, 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, where: slice) -> Any:
        found = self.tokens[where]
        self.bytes += found.nbytes
        return found


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 1)
        self.copied = self.whole = 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.copied += sum(shard.local.nbytes for shard in sequence_shards(batch))
        return batch

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.table(batch["tokens"]).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.whole += batch["tokens"].nbytes

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Resident(Callback):
    """Resident memory in bytes after every step."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_train_batch_end(self, *args: Any) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.sizes.append(pages * os.sysconf("SC_PAGE_SIZE"))


def epoch(rank: int, ranks: int, port: int, file: Path, length: int, results: Any) -> None:
    """Train one epoch on this rank."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "benchmark"}
    os.environ.update({name: str(value) for name, value in names.items()})
    data = TokenDataset(file, length, next_token=False)
    (store,) = data._stores
    counting = store.tokens = Counting(store.tokens)
    resident, module = Resident(), Model()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=AutoSPStrategy(),
        max_epochs=1,
        callbacks=[resident],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, DataLoader(data, batch_size=1, shuffle=True))
    first = resident.sizes[len(resident.sizes) // 10]
    results.put(
        {
            "rank": rank,
            "steps": len(resident.sizes),
            "read_bytes": counting.bytes,
            "copied_bytes": module.copied,
            "whole_bytes": module.whole,
            "resident_bytes": first,
            "most_resident_bytes": max(resident.sizes[len(resident.sizes) // 10 :]),
            "seconds": time.perf_counter() - start,
        }
    )


def run(mib: int, ranks: int, length: int) -> list[Row]:
    """Return a row for each rank."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        file = Path(folder) / "tokens.npy"
        write(file, mib * 2**20 // 4)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        results = mp.get_context("spawn").SimpleQueue()
        context = mp.spawn(epoch, (ranks, port, file, length, results), nprocs=ranks, join=False)
        rows: list[Row] = []
        while not context.join(timeout=0.5) or not results.empty():
            while not results.empty():
                rows.append(results.get())
        return sorted(rows, key=lambda row: row["rank"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=1024, help="size of the token file")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--length", type=int, default=131_072, help="tokens of a sample")
    parser.add_argument("--toy", action="store_true", help="1 MiB, 2 ranks, 4096 tokens a sample")
    parser.add_argument("--json", nargs="?", const=str(RESULTS), metavar="FILE", help="also write the numbers to a file")
    asked = parser.parse_args()
    mib, ranks, length = (1, 2, 4096) if asked.toy else (asked.mib, asked.ranks, asked.length)
    rows = run(mib, ranks, length)
    for row in rows:
        share = row["read_bytes"] / (mib * 2**20)
        growth = row["most_resident_bytes"] - row["resident_bytes"]
        print(
            f"rank {row['rank']}: read {share:.4f} of {mib} MiB, copied {row['copied_bytes'] / 2**20:.1f} MiB of "
            f"{row['whole_bytes'] / 2**20:.1f}; resident {row['resident_bytes'] / 2**20:.1f} MiB, later at most "
            f"{growth / 2**20:+.1f}; {row['steps']} steps, {row['seconds']:.1f} s"
        )
    if asked.json:
        found = {**machine(), "device": "cpu", "file_mib": mib, "num_ranks": ranks, "length": length, "rows": rows}
        Path(asked.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
