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
