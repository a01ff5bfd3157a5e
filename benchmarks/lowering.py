"""Measure how long a captured step takes to lower: from Dynamo's graph to the graph of one rank, before AOTAutograd.

    python benchmarks/lowering.py [--models llama,gpt] [--layers 32] [--num-ranks 2] [--length 64] [--json [FILE]]

Every model has tiny widths, as nothing here depends on them, and is measured in a process of its own. It is compiled twice there:
the second time PyTorch's answers about operators (`locality.py`) are remembered, as they are for every graph but the first.
Seconds are of the process, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "lowering.json"
sys.path.insert(0, str(ROOT))

from machine import machine  # noqa: E402

from lightning_autosp.batches import call_tensors  # noqa: E402
from lightning_autosp.check import Simulation  # noqa: E402
from lightning_autosp.compiler.capture import capture  # noqa: E402
from lightning_autosp.compiler.report import Report  # noqa: E402
from lightning_autosp.compiler.specialise import LoweredStep  # noqa: E402
from lightning_autosp.step import mark_sequence  # noqa: E402

STAGES = ("capture", "plan", "emit")
VOCABULARY, DIM, HEADS, KV_HEADS = 128, 64, 4, 2

T = TypeVar("T")
Row = dict[str, Any]


class Llama(nn.Module):
    """A Transformers Llama with its own loss."""

    def __init__(self, num_layers: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=DIM,
            intermediate_size=2 * DIM,
            num_hidden_layers=num_layers,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Plain PyTorch, learned positions, next-token loss."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, DIM), nn.Embedding(1024, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(num_layers))
        self.head = nn.Linear(DIM, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


MODELS: dict[str, Callable[[int], nn.Module]] = {"llama": Llama, "gpt": GPT}


def measure(name: str, num_layers: int, num_ranks: int, length: int) -> Row:
    """Compile a model twice and return the seconds of every stage, and what became of its graph."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    model = MODELS[name](num_layers)
    ids = torch.randint(VOCABULARY, (2, length))
    mark_sequence(call_tensors((ids,), {}), 1)
    simulation = Simulation(model, num_ranks, sharded=False)
    (cold, _), (warm, counts) = (compile_once(model, ids, simulation) for _ in range(2))
    return {
        "model": name,
        "num_layers": num_layers,
        "num_ranks": num_ranks,
        "length": length,
        **counts,
        "cold_s": cold,
        "warm_s": warm,
        "warm_s_per_layer": warm["lowering"] / num_layers,
    }


def compile_once(model: nn.Module, ids: Tensor, simulation: Simulation) -> tuple[dict[str, float], dict[str, int]]:
    """Compile a model for the first of the ranks; return the seconds of every stage, and counts. Nothing lowered is run."""
    seconds: dict[str, float] = {}
    counts: dict[str, int] = {}

    def timed(stage: str, work: Callable[[], T]) -> T:
        start = time.process_time()
        result = work()
        seconds[stage] = time.process_time() - start
        return result

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        seconds["dynamo"] = time.process_time() - start
        parameters = simulation.parameters[0]
        num_dynamo_nodes = len(gm.graph.nodes)
        captured = timed("capture", lambda: capture(gm, parameters.names()))
        step = LoweredStep(captured, simulation.compiler(Report(), "training_step"))

        def run(*inputs: Any) -> Any:
            timed("plan", lambda: step.plan(captured.symbols))
            _, program = timed("emit", lambda: step.emit(step.sizes(inputs), parameters.group, parameters))
            counts.update(
                num_dynamo_nodes=num_dynamo_nodes,
                num_traced=captured.num_traced,
                num_captured=len(captured.graph.nodes),
                num_emitted=len(program.module.graph.nodes),
            )
            return gm.forward(*inputs)

        return run

    torch._dynamo.reset()
    start = time.process_time()
    torch.compile(model, backend=backend, fullgraph=True)(ids)
    seconds["lowering"] = sum(seconds[stage] for stage in STAGES)
    return seconds, counts


def table(row: Row) -> str:
    """Return a row as text."""
    lines = [
        f"{row['model']}, {row['num_layers']} layers, {row['num_ranks']} ranks: {row['num_dynamo_nodes']} nodes from Dynamo, "
        f"{row['num_traced']} operators traced, {row['num_captured']} nodes captured, {row['num_emitted']} emitted"
    ]
    for heading, key in (("cold", "cold_s"), ("warm", "warm_s")):
        seconds = row[key]
        parts = ", ".join(f"{stage} {seconds[stage]:.2f} s" for stage in STAGES)
        lines.append(f"  {heading}: lowered in {seconds['lowering']:.2f} s ({parts}), after {seconds['dynamo']:.2f} s in Dynamo")
    return "\n".join([*lines, f"  warm, a layer: {row['warm_s_per_layer'] * 1e3:.0f} ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names, with commas between them")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"write the numbers to a file, by default {RESULTS.name}"
    )
    options = parser.parse_args()
    rows = []
    for name in options.models.split(","):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            rows.append(process.submit(measure, name, options.layers, options.num_ranks, options.length).result())
        print(table(rows[-1]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")
        print(f"wrote {options.json}")


if __name__ == "__main__":
    main()
