"""What Lightning and its users meet: names, launchers, command line, logging forms, repeated runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jobs
import modules
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from pool import Pool
from test_fit import FULL, assert_same, fit, reference
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_autosp import AutoSPStrategy

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["autosp", "AutoSP"])
def test_by_name_and_by_object(name: str) -> None:
    for strategy in (name, AutoSPStrategy()):
        trainer = Trainer(**jobs.QUIET, devices=1, strategy=strategy)
        assert type(trainer.strategy) is AutoSPStrategy


@pytest.mark.parametrize(
    ("name", "method"), [("autosp", "popen"), ("autosp_spawn", "spawn"), ("autosp_fork", "fork"), ("autosp_notebook", "fork")]
)
def test_registered_names(name: str, method: str) -> None:
    strategy = StrategyRegistry.get(name)
    assert isinstance(strategy, AutoSPStrategy)
    assert strategy._start_method == method


@pytest.mark.dist
@pytest.mark.parametrize("name", ["autosp_spawn", "autosp_notebook"])
def test_launched_by_multiprocessing(name: str, tmp_path: Path) -> None:
    """The parent gets trained, whole, plain weights back."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, modules, jobs\n"
        "from lightning.pytorch import Trainer\n"
        "if __name__ == '__main__':\n"
        "    module = modules.Regression()\n"
        "    before = module.value.weight.detach().clone()\n"
        "    trainer = Trainer(**jobs.QUIET, devices=2, strategy=sys.argv[2], max_steps=2)\n"
        "    trainer.fit(module, modules.loader(4, 16))\n"
        "    assert type(module.value.weight) is torch.nn.Parameter\n"
        "    assert module.value.weight.shape == before.shape and not torch.equal(module.value.weight, before)\n"
        "    print('loss', float(trainer.callback_metrics['loss']))\n"
    )
    done = subprocess.run([sys.executable, script, ROOT / "tests", name], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss" in done.stdout


@pytest.mark.dist
@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "config.yaml", "--trainer.strategy.strict", "true"],
        [
            "--trainer.strategy=lightning_autosp.AutoSPStrategy",
            "--trainer.strategy.sequence_parallel_size=2",
            "--trainer.accelerator=cpu",
            "--trainer.devices=2",
            "--trainer.logger=false",
            "--trainer.enable_checkpointing=false",
        ],
    ],
    ids=["yaml_and_flag", "flags"],
)
def test_command_line(arguments: list[str]) -> None:
    command = [sys.executable, "cli.py", "fit", *arguments, "--trainer.max_steps=2", "--data.length=128", "--data.num_windows=2"]
    done = subprocess.run(command, cwd=ROOT / "examples", capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "sharded over 2 ranks" in " ".join(done.stdout.split())


def test_help_documents_every_option() -> None:
    command = [sys.executable, "cli.py", "fit", "--trainer.strategy.help=lightning_autosp.AutoSPStrategy"]
    done = subprocess.run(command, cwd=ROOT / "examples", capture_output=True, text=True, check=False, timeout=300)
    for option in ("sequence_parallel_size", "parameter_sharding", "compile_backend", "strict", "sequence_dim"):
        assert option in done.stdout
    assert "Ranks that share one sequence" in done.stdout


class Everything(modules.Shallow):
    """Logs an item, branches on Python numbers, anneals, freezes a parameter, draws random numbers."""

    def __init__(self, lr: float = 1e-2, rate: float = 0.0) -> None:
        super().__init__(lr)
        self.rate = rate
        self.positions.weight.requires_grad_(False)
        self.temperature = nn.Parameter(torch.tensor(3.0))

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.anneal = 1 / (1 + 0.1 * batch_idx)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        logits = self(batch["ids"]) * self.temperature
        self.log("temperature", self.temperature)
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        self.log("item", loss.item())
        self.log("tokens", batch["ids"].shape[1], batch_size=batch["ids"].shape[0])
        if batch_idx % 2 == 0:
            self.log("even", loss)
        loss = loss * self.anneal + 0.01 * (1 - self.anneal)
        loss = F.dropout(loss.expand(3), self.rate).mean() + 0 * F.dropout(logits, self.rate).mean()
        self.log("loss", loss)
        return {"loss": loss, "last": logits[:, -1].detach(), "parameter": self.temperature}


modules.Everything = Everything  # type: ignore[attr-defined]


def fit_everything(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return jobs.fit("Everything", *args, **kwargs)


@pytest.mark.dist
def test_logging_forms(pool: Pool) -> None:
    one = pool.run(fit_everything, 1, None, 1)[0]
    run = pool.run(fit_everything, 2, FULL, 2)[0]
    assert_same(run, one)
    assert run["report"]["graph_breaks"] == []
    assert "positions.weight" not in run["gradients"]


@pytest.mark.dist
def test_dropout_under_data_and_sequence_parallelism(pool: Pool) -> None:
    """Every rank of a group logs the same loss, whatever it drew; groups draw apart."""
    runs = pool.run(fit_everything, 4, {**FULL, "data_parallel_size": 2}, 4, module_options={"rate": 0.5})
    losses = [[step["loss"] for step in run["curve"]] for run in runs]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]
    assert losses[0] != losses[2]


def fit_then_test_then_fit(world_size: int) -> tuple[list[float], float]:
    recorder = jobs.Recorder()
    trainer = Trainer(**jobs.QUIET, devices=world_size, strategy="autosp", max_epochs=1, callbacks=[recorder])
    module, data = modules.Shallow(), modules.loader(4, 32)
    trainer.fit(module, data)
    tested = trainer.test(module, data, verbose=False)[0]["test_loss"]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data)
    return [step["loss"] for step in recorder.curve], tested


@pytest.mark.dist
def test_fit_test_fit(pool: Pool) -> None:
    (one, one_tested), *_ = pool.run(fit_then_test_then_fit, 1, 1)
    for losses, tested in pool.run(fit_then_test_then_fit, 2, 2):
        assert losses == pytest.approx(one, rel=2e-6)
        assert tested == pytest.approx(one_tested, rel=2e-6)


def validate_in_inference_mode() -> list[float]:
    """As on NCCL, where Lightning evaluates under inference mode."""

    class Inference(modules.Shallow):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch)[0])

    strategy = AutoSPStrategy(parameter_sharding="full")
    own = strategy.validation_step

    def step(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():
            return own(*args, **kwargs)

    strategy.validation_step = step  # type: ignore[method-assign]
    trainer = Trainer(**jobs.QUIET, devices=2, strategy=strategy, max_epochs=1)
    trainer.fit(Inference(), modules.loader(4, 32), modules.loader(3, 32, 1))
    return [float(trainer.callback_metrics["val_loss"]), float(trainer.callback_metrics["loss"])]


@pytest.mark.dist
def test_inference_mode(pool: Pool) -> None:
    one = pool.run(jobs.fit, 1, "Shallow", None, 1, num_samples=4, length=32, validate=False)[0]
    runs = pool.run(validate_in_inference_mode, 2)
    assert runs[0] == runs[1]
    assert runs[0][1] == pytest.approx(one["logged"]["loss"], rel=2e-6)


class Frames(modules.Base):
    """Float inputs whose feature size is the sequence length: both dimensions get a symbol, one is the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).softmax(-1).square().mean()
        self.log("loss", loss)
        return loss


def fit_frames(world_size: int, strategy: dict[str, Any] | None) -> tuple[list[float], Any]:
    torch.manual_seed(1)
    recorder = jobs.Recorder()
    trainer = jobs.trainer_of(strategy, world_size, [recorder])
    trainer.fit(Frames(), torch.utils.data.DataLoader(torch.randn(6, 16, 16), batch_size=2))
    report = jobs.report_of(trainer)
    return [step["loss"] for step in recorder.curve], report and report.to_dict()


@pytest.mark.dist
def test_feature_size_equal_to_the_length(pool: Pool) -> None:
    one = pool.run(fit_frames, 1, 1, None)[0][0]
    losses, report = pool.run(fit_frames, 2, 2, {})[0]
    assert losses == pytest.approx(one, rel=2e-6)
    assert report["steps"][0]["in_full"] == []
    assert report["steps"][0]["num_local"] > 0


@pytest.mark.dist
def test_report_reads_as_text(pool: Pool) -> None:
    run = fit(pool, "Shallow", FULL, 2, num_samples=2)
    assert "sharded over 2 ranks" in run["text"]
    assert "ulysses at" in run["text"]
    assert "all_to_all_single" in run["text"]
    assert reference(pool, "Shallow", num_samples=2)["report"] is None
