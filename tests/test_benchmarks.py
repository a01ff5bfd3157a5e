"""The benchmarks run and say what they promise. How long anything takes is not tested."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pool import Pool
from torch.distributed.device_mesh import init_device_mesh

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import peers  # noqa: E402
from baselines import BASELINES, make_baseline  # noqa: E402
from models import batch_of, decoder  # noqa: E402
from peers import METHODS  # noqa: E402


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


PEER_FIELDS = {
    "model",
    "layers",
    "world",
    "length",
    "method",
    "policy",
    "predicted_peak_bytes",
    "measured_peak_bytes",
    "predicted_host_bytes",
    "measured_host_bytes",
    "categories",
    "step_seconds",
    "all_step_seconds",
    "compile_seconds",
    "tokens_per_second_per_rank",
    "model_flops",
    "mfu",
    "wire_bytes",
    "wire_seconds_modelled",
}


def run_script(name: str, *options: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def assert_peers(found: dict[str, Any], methods: set[str]) -> None:
    assert found.keys() >= {"torch", "cpu", "date", "commit", "device", "dtype", "flops_formula", "links", "note", "rows"}
    assert {row["method"] for row in found["rows"]} == methods
    for row in found["rows"]:
        if "why" in row:
            assert row["method"] in ("context_parallel", "deepspeed")
            continue
        assert row.keys() == PEER_FIELDS
        assert all(row[key] > 0 for key in ("measured_peak_bytes", "step_seconds", "tokens_per_second_per_rank"))
        assert (row["wire_bytes"] > 0) == (row["world"] > 1)
        if row["method"].startswith("autosp"):
            assert row["predicted_peak_bytes"] == pytest.approx(row["measured_peak_bytes"], rel=1e-4)


def test_peers_measure_one_rank(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    methods = [method for method in METHODS if method != "autosp, values on the host"]
    run_script("peers", "--lengths", "512", "--repeats", "1", "--methods", ";".join(methods), "--json", str(file))
    assert_peers(json.loads(file.read_text()), set(methods))


def test_peers_extrapolate_depths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is linear in depth is so to the byte, and what is counted is what the algorithm says."""
    file, methods = tmp_path / "peers.json", "ulysses, eager;alst recipe, inputs on the host"
    sizes = ["--lengths", "512", "--layers", "1,2,3", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["peers", *sizes, "--methods", methods, "--json", str(file)])
    peers.main()
    found = json.loads(file.read_text())
    rows = {(row["method"], row["layers"]): row for row in found["rows"]}
    by_hand = [rows["ulysses, eager", layers]["wire_bytes"] for layers in (1, 2)]
    exchanged = 2 * (4 + 4 + 4 + 4) * 16 * (512 // 4) * 4  # queries, repeated keys and values, results; forward and backward
    parameters = (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) * 4
    assert by_hand[1] - by_hand[0] == 3 / 4 * (exchanged + 3 * parameters)  # gathered twice, and their gradients reduced
    kept = [rows["alst recipe, inputs on the host", layers]["measured_host_bytes"] for layers in (1, 2, 3)]
    assert kept[1] - kept[0] == kept[2] - kept[1] == 512 // 4 * 64 * 4  # a layer's input
    checks = [one["check"] for one in found["extrapolation"] if one["field"] == "measured_peak_bytes"]
    assert len(checks) == 2
    assert all(check["extrapolated"] == pytest.approx(check["measured"], rel=0.1) for check in checks)


def test_peers_find_the_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, methods = tmp_path / "peers.json", "alst recipe;alst recipe, inputs on the host"
    limits = ["--memory", "3MB", "--host-memory", "10KiB", "--lengths", "512"]
    monkeypatch.setattr(sys, "argv", ["peers", "--longest", "--methods", methods, *limits, "--json", str(file)])
    peers.main()
    without, on_host = json.loads(file.read_text())["rows"]
    assert 0 < without["measured_peak_bytes"] <= 3_000_000
    assert without["longest"] > 512
    assert (on_host["longest"], on_host["measured_peak_bytes"]) == (None, None)  # the host's limit is too small for anything
    assert "on the host" in on_host["next"]


def test_scaling_compares_in_one_run(tmp_path: Path) -> None:
    file = tmp_path / "scaling.json"
    run_script("scaling", "--lengths", "256", "--repeats", "1", "--json", str(file))
    assert_scaling(json.loads(file.read_text()))


def assert_scaling(found: dict[str, Any]) -> None:
    assert found.keys() == {"torch", "python", "cpu", "date", "device", "model", "note", "rows"}
    for row in found["rows"]:
        assert row["loss_off"] < 1e-6
        assert row["methods"].keys() == {"one device, eager", "ulysses, eager", "autosp"}
        times = {name: one["step_s"] for name, one in row["methods"].items()}
        assert row["speedup"] == pytest.approx(times["one device, eager"] / times["autosp"])
        assert row["step_over_by_hand"] == pytest.approx(times["autosp"] / times["ulysses, eager"])
        assert row["methods"]["autosp"]["lowering_s"] < row["methods"]["autosp"]["first_step_s"]


def test_committed_results_are_what_the_scripts_write() -> None:
    found = {name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text()) for name in ("peers", "scaling")}
    assert_peers(found["peers"], set(METHODS))
    assert_scaling(found["scaling"])
    assert [row["length"] for row in found["scaling"]["rows"]][0] == 8192


def test_figures_are_drawn_from_what_is_planned(tmp_path: Path) -> None:
    for name in ("memory", "scaling", "peers"):
        shutil.copy(ROOT / "benchmarks" / "results" / f"{name}.json", tmp_path)
    sizes = ["--predict", "--model", "toy", "--layers", "1", "--world", "2", "--lengths", "4096,8192", "--host-memory", "1MiB"]
    run_script("plots", *sizes, "--results", str(tmp_path), "--figures", str(tmp_path / "figures"))
    drawn = {file.name for file in (tmp_path / "figures").iterdir()}
    assert drawn == {file.name for file in (ROOT / "benchmarks" / "figures").iterdir()}
    assert len(drawn) == 5
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert found.keys() == json.loads((ROOT / "benchmarks" / "results" / "predictions.json").read_text()).keys()
    for row in found["rows"]:
        assert sum(row["categories"].values()) == row["peak_bytes"]
    peaks = {(row["policy"], row["length"]): row["peak_bytes"] for row in found["rows"] if not row["host_limit_bytes"]}
    assert peaks["least", 4096] < peaks["least", 8192] <= peaks["full", 8192] < peaks["none", 8192]


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
    assert len(names) == 5
    for name, *ranks in zip(names, *pool.run(baseline_steps, 2, names), strict=True):
        assert sum(part for part, _ in ranks) == pytest.approx(loss.item(), rel=1e-6), name  # the loss is in float32
        for _, grads in ranks:
            for key, parameter in module.named_parameters():
                error = np.linalg.norm(grads[key] - parameter.grad.numpy()) / np.linalg.norm(parameter.grad.numpy())
                assert error < 1e-6, f"{name}, {key}: off by {error:.3g}"
