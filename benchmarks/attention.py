"""Measure the methods of sequence-parallel attention alone: bytes on the wire, bytes held, time of forward and backward.

    python benchmarks/attention.py [--heads 32:8,40:8,28:4,16:1] [--lengths 1024] [--ranks 2,4,8] [--width 64] [--json [FILE]]

Ranks are processes: over gloo on the CPU, or over NCCL, one a GPU, where there are enough. Causal attention of one sample, beside
Ulysses with keys and values repeated for every query, as it is written by hand. Bytes are counted where collectives are called:
what the busiest rank sends to others, in forward and backward, and the most it holds at once, its own inputs, result and gradients
included. PyTorch's `context_parallel` is not measured: its ring takes the place of three kernels of CUDA (flash, efficient, cuDNN),
and on the CPU, whose kernel is another, each rank attends to its own positions alone.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "attention.json"
sys.path.insert(0, str(ROOT))

from machine import machine  # noqa: E402

from lightning_autosp.attention.gather_kv import gather_kv_attention  # noqa: E402
from lightning_autosp.attention.hybrid import hybrid_attention  # noqa: E402
from lightning_autosp.attention.operators import KERNELS  # noqa: E402
from lightning_autosp.attention.ring import ring_attention  # noqa: E402
from lightning_autosp.attention.select import AttentionOptions, Work, choose  # noqa: E402
from lightning_autosp.attention.ulysses import ulysses_attention  # noqa: E402
from lightning_autosp.collectives import Group  # noqa: E402
from lightning_autosp.cuts import even_cuts  # noqa: E402
from lightning_autosp.memory.meter import LiveBytes  # noqa: E402

Row = dict[str, Any]
_ops = torch.ops._c10d_functional


class Wire(TorchDispatchMode):
    """Counts the bytes that this rank hands to collectives for others."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.sent = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in KERNELS:  # collectives within
            with self:
                return KERNELS[func](*args, **(kwargs or {}))
        op = getattr(func, "overloadpacket", None)
        if op is _ops.all_to_all_single:
            rows = sum(args[2]) - args[2][self.rank]
            self.sent += rows * (args[0].nbytes // max(1, args[0].shape[0]))
        elif op is _ops.all_gather_into_tensor:
            self.sent += args[0].nbytes * (args[1] - 1)
        return func(*args, **(kwargs or {}))


def methods(heads: int, kv_heads: int, length: int, width: int, ranks: int, size: int) -> dict[str, Callable[..., Tensor]]:
    """Return what is measured: `method(query, key, value, lengths, group)`."""

    def repeated(query: Tensor, key: Tensor, value: Tensor, lengths: Any, group: Group) -> Tensor:
        key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
        return ulysses_attention(query, key, value, None, 0.0, True, None, lengths, lengths, group)

    def alone(method: Any, *more: Any) -> Callable[..., Tensor]:
        return lambda q, k, v, lengths, group: method(q, k, v, None, 0.0, True, None, lengths, lengths, group, *more)

    found: dict[str, Callable[..., Tensor]] = {
        "ulysses, keys and values repeated": repeated,
        "ulysses": alone(ulysses_attention),
        "gather_kv": alone(gather_kv_attention),
        "ring": alone(ring_attention),
    }
    lengths = _lengths(length, ranks)
    work = Work(1, heads, kv_heads, width, width, lengths, lengths, True, size)
    choice = choose(work, AttentionOptions(), "here")
    hybrid = next(offer for offer in (choice.chosen, *choice.others) if offer.method == "hybrid")
    if not hybrid.refusal:
        found[hybrid.name] = alone(hybrid_attention, hybrid.inside, hybrid.outside)
    return found


def _lengths(length: int, ranks: int) -> tuple[int, ...]:
    cuts = even_cuts(length, ranks)
    return tuple(stop - start for start, stop in zip(cuts, cuts[1:], strict=False))


def measure(rank: int, ranks: int, port: int, asked: argparse.Namespace, results: Any) -> None:
    """Run all methods on one rank; the first puts the rows into a queue."""
    torch.set_num_threads(1)
    cuda = _on_cuda(ranks)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    assert dist.group.WORLD is not None
    group, dtype = Group.of(dist.group.WORLD), torch.bfloat16 if cuda else torch.float32
    rows = []
    for heads, kv_heads in asked.heads:
        for length in asked.lengths:
            lengths = _lengths(length, ranks)
            own = lengths[rank]
            for name, method in methods(heads, kv_heads, length, asked.width, ranks, dtype.itemsize).items():
                shapes = [(1, n, own, asked.width) for n in (heads, kv_heads, kv_heads, heads)]
                query, key, value, grad = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
                leaves = [x.requires_grad_() for x in (query, key, value)]

                def step(method: Any = method, leaves: Any = leaves, lengths: Any = lengths, grad: Any = grad) -> None:
                    out = method(*leaves, lengths, group)
                    torch.autograd.grad(out, leaves, grad)

                live, wire = LiveBytes([*leaves, grad]), Wire(rank)
                with live:
                    step()
                with wire:
                    step()
                seconds = [_timed(step, cuda) for _ in range(asked.repeats)]
                inputs = sum(x.nbytes for x in (*leaves, grad))
                counts = torch.tensor([wire.sent, live.peak + inputs], device=device)
                dist.all_reduce(counts, dist.ReduceOp.MAX)
                sent, peak = counts.tolist()
                rows.append(
                    {
                        "heads": heads,
                        "kv_heads": kv_heads,
                        "length": length,
                        "num_ranks": ranks,
                        "method": name,
                        "sent_bytes": sent,
                        "peak_bytes": peak,
                        "seconds": statistics.median(seconds),
                    }
                )
    dist.destroy_process_group()
    if rank == 0:
        results.put(rows)


def _timed(step: Callable[[], None], cuda: bool) -> float:
    dist.barrier()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _on_cuda(ranks: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.device_count() >= ranks


def run(asked: argparse.Namespace) -> list[Row]:
    """Return a row for each method, number of heads, length and number of ranks."""
    rows: list[Row] = []
    for ranks in asked.ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        results = mp.get_context("spawn").SimpleQueue()
        context = mp.spawn(measure, (ranks, port, asked, results), nprocs=ranks, join=False)
        while not context.join(timeout=0.5) and results.empty():
            pass
        rows += results.get()
        context.join()
    return rows


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _pairs(text: str) -> list[tuple[int, int]]:
    pairs = [one.split(":") for one in text.split(",")]
    return [(int(heads), int(kv_heads)) for heads, kv_heads in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--heads", type=_pairs, default="32:8,40:8,28:4,16:1", help="query heads : heads of keys and values")
    parser.add_argument("--lengths", type=_numbers, default="1024", help="positions of the whole sequence")
    parser.add_argument("--ranks", type=_numbers, default="2,4,8")
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps, of which the median is taken")
    parser.add_argument("--json", nargs="?", const=str(RESULTS), help="also write the rows to a file")
    asked = parser.parse_args()
    rows = run(asked)
    print(f"{'heads':>6} {'length':>7} {'ranks':>5} {'MiB sent':>9} {'MiB held':>9} {'seconds':>8}  method")
    for row in rows:
        heads = f"{row['heads']}:{row['kv_heads']}"
        sizes = f"{row['sent_bytes'] / 2**20:9.2f} {row['peak_bytes'] / 2**20:9.2f} {row['seconds']:8.3f}"
        print(f"{heads:>6} {row['length']:>7} {row['num_ranks']:>5} {sizes}  {row['method']}")
    if asked.json:
        device = torch.cuda.get_device_name() if any(map(_on_cuda, asked.ranks)) else "cpu"
        file = Path(asked.json)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**machine(), "device": device, "width": asked.width, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
