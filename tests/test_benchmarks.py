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
