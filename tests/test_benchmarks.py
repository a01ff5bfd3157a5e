"""The benchmarks run and say what they promise. How long anything takes is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch.distributed.device_mesh import init_device_mesh

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from baselines import BASELINES, make_baseline  # noqa: E402
from models import batch_of, decoder  # noqa: E402


def test_lowering_writes_its_numbers(tmp_path: Path) -> None:
    file = tmp_path / "lowering.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "lowering.py"), "--models", "gpt", "--layers", "2", "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = json.loads(file.read_text())
    assert found.keys() == {"torch", "python", "cpu", "date", "rows"}
    (row,) = found["rows"]
    assert (row["model"], row["num_layers"], row["num_ranks"]) == ("gpt", 2, 2)
    assert 0 < row["num_traced"] < row["num_dynamo_nodes"] < row["num_emitted"]
    for seconds in (row["cold_s"], row["warm_s"]):
        assert seconds.keys() == {"dynamo", "capture", "plan", "emit", "lowering"}
        assert all(value > 0 for value in seconds.values())


def test_attention_counts_what_is_sent(tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    sizes = ["--heads", "4:2", "--lengths", "33", "--ranks", "2", "--width", "8", "--repeats", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "attention.py"), *sizes, "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = json.loads(file.read_text())
    assert found.keys() == {"torch", "python", "cpu", "date", "device", "width", "rows"}
    rows = {row["method"]: row for row in found["rows"]}
    assert rows.keys() == {"ulysses, keys and values repeated", "ulysses", "gather_kv", "ring"}
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows.values())
    # 17 positions of half the heads of queries, keys and values go there, 16 of the result come back; gradients the other way.
    assert rows["ulysses"]["sent_bytes"] == 4 * 8 * (17 * (2 + 1 + 1) + 16 * 2 + 16 * (2 + 1 + 1) + 17 * 2)
    assert rows["ulysses"]["sent_bytes"] < rows["ulysses, keys and values repeated"]["sent_bytes"]


def test_data_counts_what_ranks_read(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "data.py"), "--toy", "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = json.loads(file.read_text())
    assert found.keys() == {"torch", "python", "cpu", "date", "device", "file_mib", "num_ranks", "length", "rows"}
    for rank, row in enumerate(found["rows"]):
        assert (row["rank"], row["steps"]) == (rank, 2**18 // 4096)
        assert row["read_bytes"] == 2**20 // 2
        assert row["copied_bytes"] == 2**21 // 2
        assert row["whole_bytes"] == 2**21
        assert row["most_resident_bytes"] >= row["resident_bytes"] > 0


def test_the_full_size_was_measured() -> None:
    """A gibibyte over four ranks: each reads a quarter within 2%, and its resident memory does not grow by what it reads."""
    found = json.loads((ROOT / "benchmarks" / "results" / "data.json").read_text())
    assert (found["file_mib"], found["num_ranks"], len(found["rows"])) == (1024, 4, 4)
    for row in found["rows"]:
        assert abs(row["read_bytes"] / 2**28 - 1) < 0.02
        assert row["most_resident_bytes"] - row["resident_bytes"] < 8 * 2**20


def baseline_step(name: str) -> tuple[float, dict[str, np.ndarray]]:
    """Run a baseline on this rank of a gloo group, and return its part of the loss and whole gradients."""
    from torch.distributed.tensor import DTensor

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch._dynamo.reset()
    module = decoder("toy", num_key_value_heads=1).double()
    step, _ = make_baseline(BASELINES[name], module.model, mesh, "aot_eager")
    loss = step(batch_of(128))
    grads = {key: value.grad for key, value in module.named_parameters()}
    return loss.item(), {key: (g.full_tensor() if isinstance(g, DTensor) else g).numpy() for key, g in grads.items()}


def baseline_steps(names: list[str]) -> list[tuple[float, dict[str, np.ndarray]]]:
    return [baseline_step(name) for name in names]


@pytest.mark.dist
def test_baselines_are_exact(pool: Pool) -> None:
    """Every baseline that runs on the CPU gives loss and gradients of one device, with fewer heads of keys than ranks."""
    module = decoder("toy", num_key_value_heads=1).double()
    loss = module.training_step(batch_of(128), 0)
    loss.backward()
    names = [name for name in BASELINES if name.startswith(("ulysses", "alst"))]
    assert len(names) == 4
    for name, *ranks in zip(names, *pool.run(baseline_steps, 2, names), strict=True):
        assert sum(part for part, _ in ranks) == pytest.approx(loss.item(), rel=1e-6), name  # the loss is in float32
        for _, grads in ranks:
            for key, parameter in module.named_parameters():
                error = np.linalg.norm(grads[key] - parameter.grad.numpy()) / np.linalg.norm(parameter.grad.numpy())
                assert error < 1e-6, f"{name}, {key}: off by {error:.3g}"
