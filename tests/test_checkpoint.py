"""Checkpoints written on some ranks and read on others: training goes on as if never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import modules
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from pool import Pool
from test_fit import fit, reference
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_autosp.collectives import Group
from lightning_autosp.parameters import ModuleParameters

pytestmark = pytest.mark.dist
WHOLE_RUN = {"max_epochs": 2, "num_samples": 8}


def assert_goes_on(run: dict[str, Any], whole: dict[str, Any]) -> None:
    rest = whole["curve"][len(whole["curve"]) - len(run["curve"]) :]
    assert len(run["curve"]) == 4
    for got, want in zip(run["curve"], rest, strict=True):
        assert got["loss_step"] == pytest.approx(want["loss_step"], abs=2e-6, rel=2e-6)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_resume_on_any_number_of_ranks(pool: Pool, tmp_path: Path, kind: str) -> None:
    whole = reference(pool, "Shallow", **WHOLE_RUN)
    path = str(tmp_path / "model.ckpt")
    options = {"state_dict_type": kind, "parameter_sharding": "full"}
    saved = fit(pool, "Shallow", options, 2, num_samples=8, checkpoint=path)
    assert Path(path).is_dir() == (kind == "sharded")
    for world_size in (1, 2, 4):
        assert_goes_on(fit(pool, "Shallow", options, world_size, **WHOLE_RUN, resume=path), whole)
    assert_goes_on(fit(pool, "Shallow", {"parameter_sharding": "replicate"}, 2, **WHOLE_RUN, resume=path), whole)
    if kind == "full":
        assert_goes_on(pool.run(jobs.fit, 1, "Shallow", None, 1, **WHOLE_RUN, resume=path)[0], whole)
        plain = modules.Shallow.load_from_checkpoint(path, lr=1e-2)
        for name, value in plain.state_dict().items():
            np.testing.assert_array_equal(value.numpy(), saved["weights"][name])


def test_reads_what_plain_lightning_wrote(pool: Pool, tmp_path: Path) -> None:
    path = str(tmp_path / "plain.ckpt")
    pool.run(jobs.fit, 1, "Shallow", None, 1, num_samples=8, checkpoint=path)
    assert_goes_on(
        fit(pool, "Shallow", {"parameter_sharding": "full"}, 2, **WHOLE_RUN, resume=path), reference(pool, "Shallow", **WHOLE_RUN)
    )


def test_a_checkpoint_callback_saves_during_fit(pool: Pool, tmp_path: Path) -> None:
    runs = pool.run(jobs.fit_with_model_checkpoint, 2, "Shallow", str(tmp_path))
    assert runs[0] == runs[1]
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    state = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)
    assert all(not isinstance(value, DTensor) for value in state["state_dict"].values())
    assert "tokens.weight" in state["state_dict"]


class TestParameters:
    """Sharding and restoring, on one rank of a world of one (the fake group needs no other)."""

    @pytest.fixture
    def sharded(self) -> tuple[nn.Module, ModuleParameters, list[nn.Parameter]]:
        from simulated import mesh_of

        module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5))
        module[1].weight.requires_grad_(False)
        module.scale = nn.Parameter(torch.tensor(2.0))
        before = list(module.parameters())
        values = [p.detach().clone() for p in before]
        parameters = ModuleParameters(module, mesh_of(1), Group("", 1, 0), sharded=True)
        module.values = values  # type: ignore[assignment]
        return module, parameters, before

    def test_holds_dtensors_between_steps(self, sharded: Any) -> None:
        module, _, _ = sharded
        assert all(isinstance(p, DTensor) for p in module.parameters())
        assert [p.requires_grad for p in module.parameters()] == [True, True, True, False, True]

    def test_users_parameters_stand_in_while_tracing(self, sharded: Any) -> None:
        module, parameters, before = sharded
        with parameters.standing_in():
            assert all(a is b for a, b in zip(module.parameters(), before, strict=True))
            assert all(p.untyped_storage().size() == 0 for p in module.parameters())
        assert all(isinstance(p, DTensor) for p in module.parameters())

    def test_restores_the_users_own_parameters(self, sharded: Any) -> None:
        module, parameters, before = sharded
        with torch.no_grad():
            module[0].weight.mul_(2)
        parameters.restore(values=True)
        assert all(a is b for a, b in zip(module.parameters(), before, strict=True))
        weight = next(i for i, p in enumerate(before) if p is module[0].weight)
        assert torch.equal(module[0].weight, module.values[weight] * 2)


def test_trainer_leaves_the_module_as_it_was(pool: Pool) -> None:
    import copy
    import pickle

    module = modules.Shallow()
    before = set(module.__dict__), list(module.parameters()), type(module)
    trainer = Trainer(**jobs.QUIET, devices=1, strategy=jobs.strategy_of({}), max_steps=1)
    trainer.fit(module, modules.loader(2, 16))
    assert all(a is b for a, b in zip(module.parameters(), before[1], strict=True))
    assert type(module) is before[2]
    assert "log" not in module.__dict__
    module.accuracy.update(torch.tensor([1]), torch.tensor([1]))
    assert module.accuracy.compute() == 1
    assert torch.equal(pickle.loads(pickle.dumps(module)).tokens.weight, module.tokens.weight)
    copied = copy.deepcopy(module)
    assert torch.equal(copied.tokens.weight, module.tokens.weight)
    assert copied.head.weight is copied.tokens.weight


def save_and_be_killed(directory: str, at: str) -> None:
    """Save twice to one path; be killed by the second at one of the moments that files take their places."""
    import os
    import signal

    trainer = Trainer(**jobs.QUIET, devices=1, strategy=jobs.strategy_of({"state_dict_type": "sharded"}), max_steps=1)
    trainer.fit(modules.Shallow(), modules.loader(2, 16))
    trainer.save_checkpoint(f"{directory}/model.ckpt")
    rename = Path.rename

    def killing(self: Path, target: Any) -> Any:
        if self.name.endswith(at):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = killing  # type: ignore[method-assign]
    trainer.save_checkpoint(f"{directory}/model.ckpt")


@pytest.mark.parametrize("at", [".ckpt", ".incomplete"])
def test_killed_while_saving(pool: Pool, tmp_path: Path, at: str) -> None:
    """The previous checkpoint can be read, and the next one be saved."""
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        pool.run(save_and_be_killed, 1, str(tmp_path), at)
    path = str(tmp_path / "model.ckpt")
    options = {"num_samples": 2, "length": 16, "max_steps": 2, "max_epochs": 2, "resume": path, "checkpoint": path}
    for run in pool.run(jobs.fit, 2, "Shallow", {"state_dict_type": "sharded"}, 2, **options):
        assert len(run["curve"]) == 1
    assert [one.name for one in tmp_path.iterdir()] == ["model.ckpt"]


def fit_and_save_asynchronously(directory: str) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    saver = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {**jobs.QUIET, "enable_checkpointing": True, "max_steps": 3}
    trainer = Trainer(**options, devices=2, strategy=jobs.strategy_of({}), callbacks=[saver], plugins=[AsyncCheckpointIO()])
    trainer.fit(modules.Shallow(), modules.loader(8, 32))


def test_saves_asynchronously(pool: Pool, tmp_path: Path) -> None:
    """What is written beside training is what was there when it was saved, however far training has come."""
    pool.run(fit_and_save_asynchronously, 2, str(tmp_path))
    saved = [torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"] for step in (1, 2, 3)]
    for steps, state in enumerate(saved, 1):
        weights = reference(pool, "Shallow", num_samples=8, length=32, max_steps=steps)["weights"]
        for name, weight in weights.items():
            if "qkv.bias" not in name:  # whose gradient is zero but for rounding, for keys
                assert torch.allclose(state[name], torch.from_numpy(weight), rtol=1e-4, atol=1e-6), (steps, name)
