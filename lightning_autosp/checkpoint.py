"""Full checkpoints that plain Lightning reads, and distributed ones every rank writes its part of."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from lightning_autosp.parameters import ModuleParameters, gather_to_cpu

__all__ = [
    "is_distributed_checkpoint",
    "load_distributed_module",
    "load_distributed_optimizers",
    "load_optimizer",
    "optimizer_state",
    "save_distributed",
    "whole_checkpoint",
]

_META = "lightning.pt"


def is_distributed_checkpoint(path: Path) -> bool:
    """Whether `save_distributed` wrote this directory."""
    return path.is_dir() and (path / _META).is_file() and (path / ".metadata").is_file()


def optimizer_state(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """Return an optimizer's state with whole tensors, as one device has it; a collective.

    Args:
        optimizer: Its parameters may be DTensors.
        keep: Whether this rank wants it; the others get `{}`.
    """
    state = gather_to_cpu(optimizer.state_dict(), keep=keep)
    return state if keep else {}


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any], parameters: ModuleParameters) -> None:
    """Load one-device state, each rank keeping its part of what belongs to a sharded parameter."""
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    placed = {
        index: {key: parameters.like(value, ordered[index]) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": placed})


def _named_state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Return an optimizer's state by parameter names, in the form of `torch.distributed.checkpoint.state_dict`."""
    state = optimizer.state_dict()
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [ordered[index] for index in group["params"]]} for group in state["param_groups"]]
    return {"state": {ordered[index]: values for index, values in state["state"].items()}, "param_groups": groups}


def save_distributed(
    checkpoint: dict[str, Any],
    path: Path,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    names: Mapping[int, str],
    *,
    is_first: bool,
) -> None:
    """Write a checkpoint directory, every rank its part.

    Args:
        checkpoint: Lightning's checkpoint; weights and optimizer states are taken from the live objects instead.
        path: A directory; an older one there is replaced once the new one is complete.
        module: The module.
        optimizers: Its optimizers, possibly none.
        names: `id(parameter) -> name` for the parameters the optimizers hold.
        is_first: Whether this is global rank 0.
    """
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    rest["num_optimizers"] = len(optimizers) if "optimizer_states" in checkpoint else 0
    states: dict[str, Any] = {"state_dict": module.state_dict()}
    for index, optimizer in enumerate(optimizers[: rest["num_optimizers"]]):
        states[f"optimizer_{index}"] = _named_state(optimizer, names)
    unfinished = path.with_name(path.name + ".incomplete")
    if is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    torch.distributed.barrier()
    save(states, checkpoint_id=str(unfinished))
    if is_first:
        torch.save(rest, unfinished / _META)
        previous = _previous(path)
        if path.exists():
            _remove(previous)
            path.rename(previous)
        unfinished.rename(path)
        _remove(previous)
    torch.distributed.barrier()


def _previous(path: Path) -> Path:
    """Return where a checkpoint is while the one that replaces it takes its place."""
    return path.with_name(path.name + ".previous")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def whole_checkpoint(path: Path) -> Path:
    """Return the checkpoint to read for a path: the previous one, where saving was killed as one was about to replace the other."""
    return _previous(path) if not path.exists() and _previous(path).exists() else path


def load_distributed_module(path: Path, module: nn.Module, *, weights_only: bool | None) -> dict[str, Any]:
    """Read the weights of a distributed checkpoint, and return the rest of it in Lightning's form.

    The entry `distributed_path` says where `load_distributed_optimizers` finds the optimizers.
    """
    weights = {"state_dict": {name: value.detach().clone() for name, value in module.state_dict().items()}}
    load(weights, checkpoint_id=str(path))
    rest: dict[str, Any] = torch.load(path / _META, map_location="cpu", weights_only=bool(weights_only))
    return {**rest, **weights, "optimizer_states": [{}] * rest.pop("num_optimizers"), "distributed_path": str(path)}


def load_distributed_optimizers(path: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Read the optimizer states of a distributed checkpoint into live optimizers, whatever number of ranks wrote it."""
    for index, optimizer in enumerate(optimizers):
        states = {f"optimizer_{index}": get_optimizer_state_dict(module, optimizer)}
        load(states, checkpoint_id=str(path))
        set_optimizer_state_dict(module, optimizer, states[f"optimizer_{index}"])
