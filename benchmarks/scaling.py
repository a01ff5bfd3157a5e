"""Two CPU processes against one, a thread each: does sharing a sequence halve the time, and what does the compiler add to it?

    python benchmarks/scaling.py [--lengths 8192,16384,32768] [--repeats 5] [--json [FILE]]

One process trains the unmodified module; two train it lowered, and with Ulysses written by hand (`baselines/`), over gloo. All is
in one run, so that ratios mean something where times do not. Losses are compared: what is faster has to be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from baselines import BASELINES, make_baseline  # noqa: E402
from machine import machine  # noqa: E402
from models import batch_of, decoder  # noqa: E402
from one_rank import prepare_step  # noqa: E402

from lightning_autosp.memory.devices import device_of  # noqa: E402
from lightning_autosp.memory.partition import MemoryOptions  # noqa: E402
from lightning_autosp.mesh import ParallelMesh  # noqa: E402

Row = dict[str, Any]
Step = Callable[[dict[str, Tensor]], Tensor]

RANKS = 2
ONE, BY_HAND, OURS = "one device, eager", "ulysses, eager", "autosp"


def _seconds(step: Step, batch: dict[str, Tensor], repeats: int) -> tuple[float, float, float]:
    """Return the loss, the seconds of the first step, and the median of `repeats` after another."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        loss = step(batch)
        times.append(time.perf_counter() - start)
    return loss.item(), times[0], statistics.median(times[2:])


def measure(rank: int, ranks: int, port: int, length: int, repeats: int, results: Any) -> None:
    """Put what every method takes on this number of ranks into `results`, as the first rank sees it."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    mesh, batch, found = ParallelMesh.create("cpu", 1, ranks), batch_of(length), {}
    for name in (ONE,) if ranks == 1 else (BY_HAND, OURS):
        torch.manual_seed(0)
        module = decoder("toy")
        lowering = None
        if name == OURS:
            options = MemoryOptions("auto", None, False, device_of(torch.device("cpu")).roofline)
            prepared = prepare_step(module, batch, mesh, options, counted=False)

            def step(batch: dict[str, Tensor], prepared: Any = prepared) -> Tensor:
                loss = prepared.step(batch, 0)
                loss.backward()
                return loss.detach()

        else:
            step, _ = make_baseline(BASELINES[name], module.model, mesh.flat, "aot_eager")
        loss, first, median = _seconds(step, batch, repeats)
        if name == OURS:
            lowering = prepared.report.steps[-1].compile_s
        else:
            total = torch.tensor(loss)
            dist.all_reduce(total)
            loss = total.item()
        found[name] = {"loss": loss, "first_step_s": first, "step_s": median, "lowering_s": lowering}
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        results.put(found)


def row(length: int, repeats: int) -> Row:
    """Return times of all methods at one length, and their ratios."""
    results = mp.get_context("spawn").SimpleQueue()
    measure(0, 1, _free_port(), length, repeats, results)
    found = results.get()
    context = mp.spawn(measure, (RANKS, _free_port(), length, repeats, results), nprocs=RANKS, join=False)
    while not context.join(timeout=0.5) and results.empty():
        pass
    found |= results.get()
    context.join()
    one, by_hand, ours = (found[name] for name in (ONE, BY_HAND, OURS))
    return {
        "length": length,
        "num_ranks": RANKS,
        "methods": found,
        "speedup": one["step_s"] / ours["step_s"],
        "speedup_by_hand": one["step_s"] / by_hand["step_s"],
        "step_over_by_hand": ours["step_s"] / by_hand["step_s"],
        "first_step_over_step": ours["first_step_s"] / ours["step_s"],
        "loss_off": abs(ours["loss"] / one["loss"] - 1),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Two CPU processes against one.")
    parser.add_argument("--lengths", type=_numbers, default="8192,16384,32768")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, after two that are not")
    parser.add_argument("--note", default="", help="to be read with the results")
    parser.add_argument("--json", nargs="?", const=str(RESULTS), help=f"write a file (default: {RESULTS.name})")
    asked = parser.parse_args()
    rows = []
    for length in asked.lengths:
        rows.append(row(length, asked.repeats))
        one, two = rows[-1]["methods"][ONE], rows[-1]["methods"][OURS]
        speedup, over = rows[-1]["speedup"], rows[-1]["step_over_by_hand"]
        times = f"{one['step_s']:.2f} s with one rank, {two['step_s']:.2f} s with {RANKS}: {speedup:.2f} times as fast"
        once = f"first step {two['first_step_s']:.1f} s, lowering {two['lowering_s']:.1f} s"
        print(f"{length:>7}: {times}, {over:.2f} times Ulysses by hand; {once}; loss off by {rows[-1]['loss_off']:.1e}", flush=True)
    if asked.json:
        found = {**machine(), "device": "cpu", "model": "toy", "note": asked.note, "rows": rows}
        Path(asked.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
