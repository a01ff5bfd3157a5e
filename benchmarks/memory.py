"""Compare what memory is predicted with what is counted, and what "auto" computes again with PyTorch's own memory budget.

    python benchmarks/memory.py [--models llama,bert] [--lengths 128,500] [--ranks 1,2,4] [--json [FILE]] [--budget]

Programs are of the first of so many ranks and run operator by operator on this CPU (`one_rank.py`); bytes are of the storages that
operators make, kernels of this package included, without parameters, optimizer and batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import machine  # noqa: E402
from models import MODELS, batch_of, make  # noqa: E402
from one_rank import Measured, fake_ranks, measure_step  # noqa: E402

from lightning_autosp.compiler.backend import compile_module  # noqa: E402
from lightning_autosp.memory.costs import cost  # noqa: E402
from lightning_autosp.memory.meter import LiveBytes  # noqa: E402

POLICIES = ("none", "attention", "full", "auto")
Row = dict[str, Any]


def predictions(models: list[str], lengths: list[int], ranks: list[int]) -> list[Row]:
    """Return predicted and counted bytes of every configuration. "auto" is given half of what "none" takes beyond "full"."""
    rows: list[Row] = []
    for world in ranks:
        with fake_ranks(world) as mesh:
            for name, length in itertools.product(models, lengths):
                peaks: dict[str, int] = {}
                for policy in POLICIES:
                    limit = (peaks["full"] + peaks["none"]) // 2 if policy == "auto" else None
                    found = measure_step(make(name), batch_of(length), mesh, policy, limit)
                    peaks[policy] = found.peak
                    rows.append(_row(name, length, world, policy, found))
                    _say(rows[-1])
    return rows


def _row(name: str, length: int, world: int, policy: str, found: Measured) -> Row:
    return {
        "model": name,
        "length": length,
        "ranks": world,
        "policy": policy,
        "saved": found.saved,
        "predicted_saved": found.estimate.saved,
        "peak": found.peak,
        "predicted_peak": found.predicted_peak,
        "phase": found.estimate.phase,
        "flops_again": found.estimate.flops_again / found.estimate.flops,
    }


def _say(row: Row) -> None:
    errors = [row[f"predicted_{name}"] / row[name] - 1 for name in ("saved", "peak")]
    place = f"{row['model']:<8} {row['length']:>5} {row['ranks']} {row['policy']:<10}"
    sizes = f"saved {row['saved']:>9} {errors[0]:+.2%}  peak {row['peak']:>9} {errors[1]:+.2%}"
    print(f"{place} {sizes}  again {row['flops_again']:.1%}", flush=True)


def budgets(layers: int = 4, length: int = 256) -> list[Row]:
    """Return what "auto" computes again at four limits, and what the least is among PyTorch's budgets that take no more."""
    rows: list[Row] = []
    options = {"num_hidden_layers": layers}
    with fake_ranks(1) as mesh:
        most = measure_step(make("llama", **options), batch_of(length), mesh, "none")
        least = measure_step(make("llama", **options), batch_of(length), mesh, "full")
        theirs = []
        for percent in range(0, 100, 5):
            with torch._functorch.config.patch(activation_memory_budget=percent / 100):
                theirs.append((percent / 100, *_torchs_own(make("llama", **options), batch_of(length))))
        for share in (0.8, 0.5, 0.25, 0.1):
            limit = int(least.peak + share * (most.peak - least.peak))
            found = measure_step(make("llama", **options), batch_of(length), mesh, "auto", limit)
            fitting = [(flops, budget, peak) for budget, peak, flops in theirs if peak <= limit]
            flops, budget, peak = min(fitting, default=(float("inf"), None, None))
            rows.append(
                {
                    "limit": limit,
                    "peak": found.peak,
                    "flops_again": found.estimate.flops_again,
                    "torch_budget": budget,
                    "torch_peak": peak,
                    "torch_flops_again": flops if fitting else None,
                }
            )
            print(rows[-1], flush=True)
    return rows


def _torchs_own(module: Any, batch: Any) -> tuple[int, float]:
    """Return peak bytes, and FLOPs that backward runs again, under PyTorch's partitioner as it is configured."""
    torch._dynamo.reset()
    meter = LiveBytes([*module.parameters(), *module.buffers(), *batch.values()])
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        return compile_module(gm, inputs, "aot_eager", graphs.append, meter=meter)

    torch.compile(module.training_step, backend=backend, fullgraph=True)(batch, 0).backward()
    forward = {node.name for node in graphs[0].graph.nodes if node.op == "call_function"}
    again = [node for node in graphs[1].graph.nodes if node.op == "call_function" and node.name in forward]
    return meter.peak, sum(cost(node).flops for node in again)


def main() -> None:
    parser = argparse.ArgumentParser(description="Predicted against counted memory.")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--lengths", default="128,500,1024")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--budget", action="store_true", help="also compare with activation_memory_budget")
    parser.add_argument(
        "--json", nargs="?", const=str(RESULTS), metavar="FILE", help=f"write the numbers (default: {RESULTS.name})"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    numbers = [[int(one) for one in text.split(",") if one] for text in (options.lengths, options.ranks)]
    found: dict[str, Any] = {
        **machine(),
        "rows": predictions([one for one in options.models.split(",") if one], *numbers),
    }
    if options.budget:
        found["budgets"] = budgets()
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
