"""The command `autosp`, in a folder that holds nothing but the user's own files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml
from lightning.pytorch import cli as lightning_cli
from lightning.pytorch.strategies import Strategy

from lightning_autosp.cli import TRAINER_COMMANDS, _sequence_dim, main

ROOT = Path(__file__).parents[1]

MODEL = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


class Model(LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.table, self.head = nn.Embedding(16, width), nn.Linear(width, 16)

    def loss(self, ids):
        return F.cross_entropy(self.head(self.table(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())

    def training_step(self, ids, batch_idx):
        loss = self.loss(ids)
        self.log("loss", loss)
        return loss

    def validation_step(self, ids, batch_idx):
        self.log("val_loss", self.loss(ids))

    test_step = validation_step

    def predict_step(self, ids, batch_idx):
        return self.head(self.table(ids)).argmax(-1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(LightningDataModule):
    def __init__(self, length: int = 32):
        super().__init__()
        self.length = length

    def train_dataloader(self):
        return DataLoader(torch.arange(2 * self.length).reshape(2, -1) % 16, batch_size=2)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""


def write(folder: Path, **trainer: Any) -> Path:
    """Write a user's folder: a module, its data and a configuration."""
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    config = {
        "seed_everything": 0,
        "trainer": {**quiet, "max_steps": 1, "num_sanity_val_steps": 0, **trainer},
        "model": {"class_path": "user_model.Model", "init_args": {"width": 4}},
        "data": {"class_path": "user_model.Data"},
    }
    (folder / "user_model.py").write_text(MODEL)
    (folder / "config.yaml").write_text(yaml.dump(config))
    return folder / "config.yaml"


def installed(folder: Path) -> Path:
    """Write the script as pip writes it."""
    (line,) = (line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("autosp = "))
    module, _, function = line.split('"')[1].partition(":")
    script = folder / "bin" / "autosp"
    script.parent.mkdir()
    script.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return script


@pytest.mark.dist
def test_two_processes(tmp_path: Path) -> None:
    """The name needs no import in a configuration, and the script starts itself again."""
    script, folder = installed(tmp_path), tmp_path / "user"
    folder.mkdir()
    write(folder, devices=2, strategy="autosp", limit_val_batches=0)
    command = [sys.executable, script, "fit", "--config", "config.yaml"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sharded over 2 ranks" in " ".join(done.stdout.split())
    assert sorted(path.name for path in folder.iterdir() if path.suffix) == ["config.yaml", "user_model.py"]


@pytest.mark.parametrize("command", TRAINER_COMMANDS)
def test_every_command_uses_the_strategy(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the configuration says."""
    write(tmp_path, devices=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["autosp"])
    monkeypatch.delitem(sys.modules, "user_model", raising=False)
    ran = []
    monkeypatch.setattr("lightning_autosp.step.CompiledStep._finished", lambda self, tree: ran.append(self.kind) or tree)
    assert main([command, "--config", "config.yaml"]) == 0
    steps = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
    assert steps[command] in ran


def test_configurations_are_kept_with_the_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write(tmp_path, devices=1, logger={"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}}, limit_val_batches=0)
    before = config.read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["autosp"])
    monkeypatch.delitem(sys.modules, "user_model", raising=False)
    assert main(["fit", "--config", "config.yaml"]) == 0
    (kept,) = tmp_path.glob("logs/*/*/config.yaml")
    assert yaml.safe_load(kept.read_text())["trainer"]["strategy"] == "autosp"
    assert config.read_text() == before


def test_a_dimension_for_each_key_in_a_configuration_and_on_the_command_line() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--strategy", type=Strategy)
    options = {"class_path": "lightning_autosp.AutoSPStrategy", "init_args": {"sequence_dim": {"ids": 1, "frames": 2}}}
    made = parser.instantiate(parser.parse_object({"strategy": options})).strategy
    assert made.sequence_dim == {"ids": 1, "frames": 2}
    assert _sequence_dim("ids=1, frames=2") == made.sequence_dim
    assert _sequence_dim("2") == 2


def test_without_jsonargparse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Missing:
        def __bool__(self) -> bool:
            return False

        def __str__(self) -> str:
            return "Requirement 'jsonargparse[signatures]' not met."

    monkeypatch.setattr(lightning_cli, "_JSONARGPARSE_SIGNATURES_AVAILABLE", Missing())
    assert main(["fit", "--config", "config.yaml"]) == 2
    assert "needs jsonargparse, which is not installed: pip install 'lightning-autosp[cli]'" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for command in (*TRAINER_COMMANDS, "check", "plan", "explain", "tokens"):
        assert f"\n    {command} " in out
