"""Modules and batches named on a command line or in a LightningCLI configuration."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_autosp.batches import SequenceDim, found_tensors, sequences, shown_dim

__all__ = ["STEP_LOADERS", "TargetError", "headline", "load_target", "named_object", "step_arguments"]


class TargetError(RuntimeError):
    """Something that was named does not exist, or gives no module or batch."""


STEP_LOADERS = {
    "training_step": ("train_dataloader", "max_size_cycle", "fit"),
    "validation_step": ("val_dataloader", "sequential", "validate"),
    "test_step": ("test_dataloader", "sequential", "test"),
    "predict_step": ("predict_dataloader", "sequential", "predict"),
}
"""For every step: the loader that feeds it, how Lightning combines several, the stage data is set up for."""


def load_target(
    target: str,
    *,
    batch: str | None = None,
    config: str | None = None,
    step: str | None = None,
    sequence_dim: SequenceDim | None = None,
    length: int | None = None,
    device: str = "cpu",
) -> tuple[nn.Module, Any, str, dict[str, Any]]:
    """Return a module that is named, a batch of its own data, the step the batch is for, and the options to run it with.

    Options are the configuration's for the strategy but for those that are "auto", `sequence_dim` always among them, and its
    Trainer's `precision`.

    Args:
        target: `package.module:Name` or `path/to/file.py:Name`, a module class or a function that returns a module; or the path of
            a LightningCLI configuration, whose `model` has a `class_path`.
        batch: Likewise, a function that returns a batch, or a LightningDataModule class.
        config: A LightningCLI configuration whose `model` (and `data`) sections are the arguments of the classes named.
        step: The method that is asked for.
        sequence_dim: The dimension of batch tensors that is the sequence. Default: the configuration's, else 1.
        length: Use only that many positions of every sequence.
        device: Where the module is made: "meta" gives parameters no memory.

    Raises:
        TargetError: If something that is named does not exist, or gives nothing of use.
    """
    is_config = target.endswith((".yaml", ".yml"))
    if is_config and config is not None:
        raise TargetError(
            f"Two configurations, {target!r} and {config!r}. Name a module class as the target, or leave --config away."
        )
    sections = _read_config(target if is_config else config)
    options = {"sequence_dim": 1, **_strategy_options(sections)}
    if sequence_dim is not None:
        options["sequence_dim"] = sequence_dim
    named = None if is_config else named_object(target)
    with torch.device(device):
        module = _made(named, sections, "model", LightningModule, target)
    if not isinstance(module, nn.Module):
        raise TargetError(f"{target!r} gave a {type(module).__name__}. Name a module class or a function that returns a module.")
    data, step = _find_batch(module, batch, sections, step)
    if length is not None:
        data = _shortened(data, length, options["sequence_dim"])
    options["precision"] = (sections.get("trainer") or {}).get("precision")
    return module, data, step, options


def named_object(text: str) -> Any:
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise TargetError(f"{text!r} names nothing. Use package.module:Name, path/to/file.py:Name or a LightningCLI file.yaml.")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise TargetError(f"{text!r}: {place} cannot be imported: {headline(error)}") from error
    if not hasattr(module, name):
        own = [
            key for key, value in vars(module).items() if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise TargetError(f"{text!r}: {place} has no {name!r}. It has: {', '.join(own) or 'nothing that can be called'}.")
    return getattr(module, name)


def _import_file(path: Path) -> Any:
    """Import a file as running it would: its folder comes first on the path, so that it finds its neighbours."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and Path(getattr(loaded, "__file__", None) or "") == path.resolve():
        return loaded
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _read_config(path: str | None) -> dict[str, Any]:
    """Return a LightningCLI configuration's sections, those of `fit` where it has subcommands."""
    if path is None:
        return {}
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise TargetError(f"{path!r} cannot be read as YAML: {headline(error)}") from error
    if isinstance(found, dict) and "model" not in found:
        found = found.get("fit", found)
    if not isinstance(found, dict) or "model" not in found:
        raise TargetError(f"{path!r} has no 'model' section, so it is no LightningCLI configuration.")
    return {**found, "": path}


def _strategy_options(sections: Mapping[str, Any]) -> dict[str, Any]:
    strategy = (sections.get("trainer") or {}).get("strategy")
    if not isinstance(strategy, dict) or not str(strategy.get("class_path", "")).endswith("AutoSPStrategy"):
        return {}
    return {name: value for name, value in (strategy.get("init_args") or {}).items() if value not in ("auto", None)}


def _made(named: Any, sections: Mapping[str, Any], section: str, base: type, text: str) -> Any:
    """Return an instance of what was named, with the arguments of a configuration's section; or of the section's own class."""
    if isinstance(named, base):
        return named
    is_class = isinstance(named, type)
    if named is not None and (section not in sections or not is_class):
        try:
            return named()
        except Exception as error:
            hint = (
                f" Give its arguments in the {section!r} section of --config." if is_class and isinstance(error, TypeError) else ""
            )
            raise TargetError(f"{text!r}, called without arguments, raises {headline(error)}.{hint}") from error
    path, arguments = sections[""], sections[section]
    if named is None and not (isinstance(arguments, str) or "class_path" in (arguments or {})):
        example = "path/to/file.py:Name --config" if section == "model" else "--batch path/to/file.py:Name"
        raise TargetError(f"{path!r}: {section!r} has no 'class_path', so its class is not known. Name it: {example} ...")
    try:
        from jsonargparse import ArgumentParser
    except ImportError as error:
        raise TargetError(f"{path!r}: reading it needs jsonargparse. pip install 'lightning-autosp[cli]'") from error
    parser = ArgumentParser(exit_on_error=False)
    if named is None:
        parser.add_subclass_arguments(base, section)
    else:
        parser.add_class_arguments(named, section)
    try:
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its name before 4.49
        return instantiate(parser.parse_object({section: arguments or {}}))[section]
    except Exception as error:
        raise TargetError(f"{path!r}: {section!r} gives no {getattr(named, '__name__', base.__name__)}: {error}") from error


def _find_batch(module: nn.Module, named: str | None, sections: Mapping[str, Any], step: str | None) -> tuple[Any, str]:
    """Return the first batch there is and the step it is for."""
    kind = step or "training_step"
    loader, mode, stage = STEP_LOADERS.get(kind, STEP_LOADERS["training_step"])
    source: Any = named_object(named) if named is not None else None
    if named is not None and not (isinstance(source, type) and issubclass(source, LightningDataModule)):
        try:
            return source() if callable(source) else source, kind
        except Exception as error:
            raise TargetError(f"--batch {named!r}, called without arguments, raises {headline(error)}.") from error
    if named is not None or "data" in sections:
        source = _made(source, sections, "data", LightningDataModule, f"--batch {named}")
    elif isinstance(module, LightningModule) and is_overridden(loader, module):
        source = module
    elif getattr(module, "example_input_array", None) is not None:
        # What `forward` takes: without a step being named, that is what is called.
        return module.example_input_array, step or "forward"
    else:
        raise TargetError(
            f"{type(module).__name__} has no {loader} and no example_input_array: there is no batch. Name a function that "
            f"returns one, or a LightningDataModule: --batch package.module:name."
        )
    try:
        source.prepare_data()
        source.setup(stage)
        combined = CombinedLoader(getattr(source, loader)(), mode)  # type: ignore[arg-type]
        first = next(iter(combined), None)
    except Exception as error:
        raise TargetError(f"{type(source).__name__}.{loader} gives no batch: {headline(error)}") from error
    if first is None:
        raise TargetError(f"{type(source).__name__}.{loader} is empty: there is no batch. Give it at least one sample.")
    batch = first[0]
    if isinstance(source, LightningDataModule):
        batch = source.on_after_batch_transfer(source.on_before_batch_transfer(batch, 0), 0)
    return batch, kind


def _shortened(batch: Any, length: int, sequence_dim: SequenceDim) -> Any:
    """Cut every sequence to its first positions, and what has as many positions in further dimensions (a mask) alike."""
    found = sequences(found_tensors(batch), sequence_dim)
    longest = max((one.tensor.shape[dim] for one, dim in found), default=0)
    if not 0 < length <= longest:
        raise TargetError(
            f"--length {length}: the batch has {longest} position(s) with {shown_dim(sequence_dim)}. Use 1 to {longest}."
        )
    dims = {id(one.tensor): dim for one, dim in found}

    def one(tensor: Tensor) -> Tensor:
        sequence = dims.get(id(tensor))
        if sequence is None:
            return tensor
        for dim, size in enumerate(tensor.shape):
            if dim == sequence or (dim != (sequence == 0) and size == longest):
                tensor = tensor.narrow(dim, 0, min(length, size))
        return tensor

    return apply_to_collection(batch, Tensor, one, allow_frozen=True)


def step_arguments(module: nn.Module, method: str, batch: Any, dtype: torch.dtype | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the method is called with: as Lightning calls steps, floating tensors in `dtype`, if one is given."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)

    batch = apply_to_collection(batch, Tensor, convert, allow_frozen=True)
    if not method.endswith("_step"):
        if isinstance(batch, Mapping):
            return (), dict(batch)
        return (tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)), {}
    if isinstance(module, LightningModule):
        batch = module._apply_batch_transfer_handler(module._on_before_batch_transfer(batch), torch.device("cpu"))
    takes_index = is_param_in_hook_signature(getattr(module, method), "batch_idx", min_args=2)
    return ((batch, 0) if takes_index else (batch,)), {}


def headline(error: BaseException) -> str:
    error = getattr(error, "inner_exception", error)  # what torch.compile wraps
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
