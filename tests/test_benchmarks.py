"""The benchmarks run and say what they promise. How long anything takes is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


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
