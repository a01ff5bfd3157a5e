"""What the ranks of `pool.Pool` run: a Trainer on a module of `modules`, and what it did as plain data."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import modules
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

import lightning_autosp  # noqa: F401 -- registers the strategy names
from lightning_autosp import AutoSPStrategy
from lightning_autosp.attention import tiles
from lightning_autosp.memory import offload

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().clone()


class Recorder(Callback):
    """Logged values after every batch, the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.curve: list[dict[str, float]] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        if not self.gradients:
            self.gradients = {n: whole(p.grad) for n, p in module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        self.curve.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def found(self, trainer: Trainer) -> dict[str, Any]:
        """Return what a run on ranks and one on a device have in common, as plain data."""
        module = trainer.lightning_module
        return {
            "curve": self.curve,
            "gradients": {name: value.numpy() for name, value in self.gradients.items()},
            "logged": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "plain": not any(isinstance(p, DTensor) for p in module.parameters()),
        }


def strategy_of(options: dict[str, Any] | None) -> Any:
    return "auto" if options is None else AutoSPStrategy(**options)


def trainer_of(strategy: dict[str, Any] | None, world_size: int, callbacks: list[Callback], **options: Any) -> Trainer:
    """Return a Trainer of ranks, or, without options of a strategy, of one device that does not see the ranks' environment."""
    from lightning.fabric.plugins.environments import LightningEnvironment

    return Trainer(
        **{**QUIET, "max_epochs": 1, **options},
        devices=world_size,
        strategy=strategy_of(strategy),
        callbacks=callbacks,
        **({"plugins": [LightningEnvironment()]} if strategy is None else {}),
    )


def report_of(trainer: Trainer) -> Any:
    """Return the strategy's report; `None` on one device."""
    return trainer.strategy.report if isinstance(trainer.strategy, AutoSPStrategy) else None


def fit(
    module_name: str,
    strategy: dict[str, Any] | None,
    world_size: int,
    *,
    length: int = 64,
    num_samples: int = 16,
    batch_size: int = 2,
    ignore_half: bool = False,
    validate: bool = False,
    checkpoint: str | None = None,
    resume: str | None = None,
    module_options: dict[str, Any] | None = None,
    tile_elements: int = tiles.TILE_ELEMENTS,
    smallest_moved: int = offload.SMALLEST,
    **trainer_options: Any,
) -> dict[str, Any]:
    """Fit on this rank and return the curve, logged values, first gradients, final weights and the report."""
    tiles.TILE_ELEMENTS = tile_elements
    offload.SMALLEST = smallest_moved
    recorder = Recorder()
    trainer = trainer_of(strategy, world_size, [recorder], **trainer_options)
    module = getattr(modules, module_name)(**(module_options or {}))
    train = modules.loader(num_samples, length, batch_size, ignore_half=ignore_half)
    trainer.fit(module, train, modules.loader(5, length, 1) if validate else None, ckpt_path=resume)
    if checkpoint is not None:
        trainer.save_checkpoint(checkpoint)
    pickle.loads(pickle.dumps(copy.deepcopy(module)))
    report = report_of(trainer)
    return {
        **recorder.found(trainer),
        "weights": {name: value.detach().numpy().copy() for name, value in module.state_dict().items()},
        "report": report.to_dict() if report else None,
        "text": str(report),
    }


def evaluate(module_name: str, strategy: dict[str, Any] | None, world_size: int, length: int = 64) -> dict[str, Any]:
    """Validate, test and predict on this rank."""
    trainer = trainer_of(strategy, world_size, [])
    module = getattr(modules, module_name)()
    data = modules.loader(5, length, 2)
    validated = trainer.validate(module, data, verbose=False)
    tested = trainer.test(module, data, verbose=False)
    predicted = trainer.predict(module, data)
    assert predicted is not None
    return {"validated": validated, "tested": tested, "predicted": [p.numpy() for p in predicted]}


def fit_dealt(module_name: str, num_groups: int, num_samples: int = 16, length: int = 64) -> dict[str, Any]:
    """Train on one device with batches made of what a distributed sampler deals to the groups, in plain PyTorch."""
    from torch.utils.data import DistributedSampler, default_collate

    data = modules.Tokens(num_samples, length)
    samplers = [DistributedSampler(data, num_groups, rank, shuffle=True, seed=0) for rank in range(num_groups)]
    module = getattr(modules, module_name)()
    module.log = lambda *args, **kwargs: None
    optimizer = module.configure_optimizers()
    losses: list[float] = []
    gradients: dict[str, Any] = {}
    for indices in zip(*samplers, strict=True):
        loss = module.training_step(default_collate([data[i] for i in indices]), 0)
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {n: p.grad.numpy().copy() for n, p in module.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "gradients": gradients}


def fit_with_model_checkpoint(module_name: str, directory: str) -> list[str]:
    """Fit two epochs with a checkpoint each and return the paths the callback knows."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    saver = ModelCheckpoint(directory, monitor="val_loss", save_top_k=-1, filename="{epoch}-{val_loss:.4f}")
    options = {**QUIET, "enable_checkpointing": True, "max_epochs": 2}
    trainer = Trainer(**options, devices=2, strategy=AutoSPStrategy(), callbacks=[saver])
    trainer.fit(getattr(modules, module_name)(), modules.loader(4, 32), modules.loader(3, 32, 1))
    return sorted(saver.best_k_models)
