"""Draw the figures of `README.md` beside this file from committed results, and predict what the first two of them show.

    python benchmarks/plots.py [--predict] [--model llama-8b] [--world 8] [--results FOLDER] [--figures FOLDER]

Needs matplotlib (`pip install 'lightning-autosp[bench]'`). `--predict` plans the step anew (minutes); nothing is run for it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "benchmarks" / "figures"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from machine import machine  # noqa: E402
from models import SHAPES, batch_of, decoder  # noqa: E402

from lightning_autosp.memory.devices import device_kind, parse_bytes  # noqa: E402
from lightning_autosp.memory.policy import LEAST  # noqa: E402
from lightning_autosp.plan import Planner  # noqa: E402

Row = dict[str, Any]
GiB = 2**30


def predictions(model: str, layers: int, world: int, lengths: list[int], host: str) -> dict[str, Any]:
    """Plan a step for ranks with a device's memory, with and without memory of the host, and return what it takes.

    The least that a step can take is found, at every length, by giving it nothing to take; policies are compared at the middle one.
    """
    with torch.device("meta"):
        module = decoder(model, num_hidden_layers=layers).to(torch.bfloat16)
    planner = Planner(module, batch_of(512), world=world, device=device_kind("h100"), state_bytes=12)
    middle, given, on_host = sorted(lengths)[len(lengths) // 2], planner.limit, parse_bytes(host)
    rows: list[Row] = []

    def plan(name: str, policies: Sequence[str], length: int, limit: int, host_limit: int) -> None:
        planner.limit, planner.host_limit = limit, host_limit
        for policy, one in planner.at(length, policies).estimates.items():
            row = {"length": length, "host_limit_bytes": host_limit, "policy": name or policy, "peak_bytes": one.peak}
            row |= {"host_bytes": one.host, "phase": one.phase, "categories": one.categories}
            rows.append({**row, "step_seconds": one.step_seconds})
        print(f"{length} positions, {host_limit} bytes of the host: planned", flush=True)

    plan("", ("none", "attention", "full", "auto"), middle, given, 0)
    plan("", ("auto", "offload"), middle, given, on_host)
    planner.tile()  # for good
    for host_limit, length in itertools.product((0, on_host), lengths):
        plan("least", (LEAST,), length, 1, host_limit)
    return {**machine(), "model": model, "layers": layers, "world": world, "state_bytes": 12, "rows": rows}


def draw(results: Path, figures: Path) -> list[Path]:
    """Draw every figure into a folder, as SVG; return the files."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "autosp", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    from matplotlib import pyplot as plt

    figures.mkdir(parents=True, exist_ok=True)
    read = {name: json.loads((results / f"{name}.json").read_text()) for name in ("predictions", "memory", "scaling", "peers")}
    done = []
    for name, paint, source in (
        ("context_against_memory", _context, "predictions"),
        ("peak_by_category", _categories, "predictions"),
        ("predicted_against_measured", _predicted, "memory"),
        ("step_time_against_length", _times, "scaling"),
        ("wire_bytes_by_method", _wire, "peers"),
    ):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        paint(axes, read[source])
        done.append(figures / f"{name}.svg")
        figure.savefig(done[-1], metadata={"Date": None})
        plt.close(figure)
    return done


def _title(found: dict[str, Any]) -> str:
    return f"{found['model']}, {found['layers']} layers, {found['world']} ranks"


def _context(axes: Any, found: dict[str, Any]) -> None:
    for host in sorted({row["host_limit_bytes"] for row in found["rows"]}):
        rows = [row for row in found["rows"] if row["policy"] == "least" and row["host_limit_bytes"] == host]
        label = f"{host / GiB:.0f} GiB of the host a rank" if host else "nothing on the host"
        fitting = [row for row in rows if row["host_bytes"] <= host]
        axes.plot([row["peak_bytes"] / 1e9 for row in fitting], [row["length"] for row in fitting], "o-", label=label)
    for size in (80, 141):
        axes.axvline(size, color="gray", linestyle=":")
    axes.set(xlabel="memory a rank, GB", ylabel="positions", xscale="log", yscale="log", title=f"Predicted, {_title(found)}")
    axes.legend()


def _categories(axes: Any, found: dict[str, Any]) -> None:
    lengths = sorted({row["length"] for row in found["rows"]})
    length = lengths[len(lengths) // 2]
    most = max(row["host_limit_bytes"] for row in found["rows"])
    at_length = [row for row in found["rows"] if row["length"] == length]
    rows = {row["policy"]: row for row in at_length if row["host_limit_bytes"] == 0}
    rows |= {f"{row['policy']}, host": row for row in at_length if row["host_limit_bytes"] == most and row["host_bytes"]}
    bottom = [0.0] * len(rows)
    for name in next(iter(rows.values()))["categories"]:
        sizes = [row["categories"].get(name, 0) / GiB for row in rows.values()]
        if any(sizes):
            axes.bar(list(rows), sizes, bottom=bottom, label=name)
            bottom = [below + size for below, size in zip(bottom, sizes, strict=True)]
    axes.set(ylabel="GiB at the peak", ylim=(0, 1.05 * max(bottom)), title=f"Predicted, {_title(found)}, {length} positions")
    axes.tick_params(axis="x", rotation=20)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def _predicted(axes: Any, found: dict[str, Any]) -> None:
    for ranks in sorted({row["ranks"] for row in found["rows"]}):
        rows = [row for row in found["rows"] if row["ranks"] == ranks]
        sizes = [[row[key] / 2**20 for row in rows] for key in ("peak", "predicted_peak")]
        axes.plot(*sizes, ".", label=f"one of {ranks}")
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="gray", linewidth=0.5)
    axes.set(xlabel="counted peak, MiB", ylabel="predicted peak, MiB", xscale="log", yscale="log")
    axes.set_title("Small models on the CPU, operator by operator")
    axes.legend()


def _times(axes: Any, found: dict[str, Any]) -> None:
    lengths = [row["length"] for row in found["rows"]]
    for name in found["rows"][0]["methods"]:
        ranks = 1 if name.startswith("one device") else found["rows"][0]["num_ranks"]
        axes.plot(lengths, [row["methods"][name]["step_s"] for row in found["rows"]], "o-", label=f"{name}, {ranks} thread(s)")
    axes.set(xlabel="positions", ylabel="seconds a step", xscale="log", yscale="log", title="Toy model on the CPU, a thread a rank")
    axes.legend()


def _wire(axes: Any, found: dict[str, Any]) -> None:
    rows = [row for row in found["rows"] if row.get("wire_bytes")]
    length = max(row["length"] for row in rows)
    sizes = {f"{row['method']} {row['policy']}": row["wire_bytes"] / 2**20 for row in rows if row["length"] == length}
    axes.barh(list(sizes), list(sizes.values()))
    axes.set(xlabel="MiB that a rank sends a step", title=f"{rows[0]['model']}, {rows[-1]['world']} ranks, {length} positions")


def main() -> None:
    numbers = lambda text: [int(one) for one in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description="Figures from results.")
    parser.add_argument("--predict", action="store_true", help="plan anew and write predictions.json")
    parser.add_argument("--model", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, help="default: the model's")
    parser.add_argument("--world", type=int, default=8)
    parser.add_argument("--lengths", type=numbers, default="262144,524288,1048576,2097152,4194304")
    parser.add_argument("--host-memory", default="96GiB")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    if asked.predict:
        layers = asked.layers or SHAPES[asked.model][2]["num_hidden_layers"]
        found = predictions(asked.model, layers, asked.world, asked.lengths, asked.host_memory)
        (asked.results / "predictions.json").write_text(json.dumps(found, indent=1) + "\n")
    for file in draw(asked.results, asked.figures):
        print(file)


if __name__ == "__main__":
    main()
