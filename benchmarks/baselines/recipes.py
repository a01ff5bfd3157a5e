"""The baselines: each turns a Transformers decoder into a step of one rank."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from baselines import ulysses
from baselines.tiled import summed_loss, tiled, tiled_loss
from lightning_autosp.collectives import Group
from lightning_autosp.memory import costs, host


class NotRunError(RuntimeError):
    """A baseline cannot run here: says why."""


@dataclass(frozen=True)
class Baseline:
    """What a baseline does with a layer, and with positions.

    Attributes:
        name: Of the rows.
        shares: How ranks share a sequence.
        compiled: Whether every layer and the loss are compiled, with PyTorch's default partitioner.
        kept: What a layer keeps for backward: what autograd or the partitioner says, results of attention only, or its input only.
        tiled: Whether the MLP and the loss are computed a few positions at a time.
        offloads: Whether inputs of layers that are kept lie on the host.
    """

    name: str
    shares: Literal["nothing", "ulysses", "context_parallel", "deepspeed"] = "ulysses"
    compiled: bool = False
    kept: Literal["default", "attention", "inputs"] = "default"
    tiled: bool = False
    offloads: bool = False


BASELINES = {
    one.name: one
    for one in (
        Baseline("one device, eager", "nothing"),
        Baseline("ulysses, eager"),
        Baseline("ulysses, compiled", compiled=True),
        Baseline("ulysses, compiled, attention kept", compiled=True, kept="attention"),
        Baseline("alst recipe", kept="inputs", tiled=True),
        Baseline("alst recipe, inputs on the host", kept="inputs", tiled=True, offloads=True),
        Baseline("context_parallel", "context_parallel", kept="inputs"),
        Baseline("deepspeed", "deepspeed"),
    )
}

Step = Callable[[dict[str, Tensor]], Tensor]
"""Runs forward and backward on a whole batch; returns this rank's part of the loss. Parts add up to the loss of one device."""


def make_baseline(one: Baseline, model: Any, mesh: DeviceMesh, backend: str) -> tuple[Step, nn.Module]:
    """Turn a model into a baseline's step.

    Args:
        one: Which.
        model: A Llama or Qwen3 of Transformers; it is changed.
        mesh: Of all ranks, one-dimensional. They share one sequence.
        backend: What compiled ones are compiled with.

    Returns:
        The step, and the module whose parameters it trains, sharded if there are several ranks.

    Raises:
        NotRunError: If the baseline is not for this number of ranks, or what it needs is not there.
    """
    group = Group.of(mesh.get_group())
    if one.shares == "deepspeed":
        raise NotRunError(_no_deepspeed())
    if one.shares == "nothing":
        if group.size > 1:
            raise NotRunError(f"it is one device's, and these are {group.size} ranks: use --world 1")
        return functools.partial(_one_device, model), model
    model.set_attn_implementation(ulysses.NAME)
    decoder = _Decoder(model, one, group)
    for layer in model.model.layers:
        _prepare_layer(layer, one, backend)
    if one.compiled:
        decoder.head.forward = torch.compile(decoder.head.forward, backend=backend, fullgraph=True)  # type: ignore[method-assign]
    if group.size > 1:
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        for module in [*model.model.layers, *([] if tied else [model.model.embed_tokens, decoder.head])]:
            fully_shard(module, mesh=mesh)
        fully_shard(decoder, mesh=mesh)
    if one.shares == "context_parallel":
        return functools.partial(_in_context, decoder, mesh), decoder
    return functools.partial(_sliced, decoder, group), decoder


def _no_deepspeed() -> str:
    if importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    version = importlib.metadata.version("deepspeed")
    return f"deepspeed {version} is installed, but how it would run as one rank of several on one device is not written"


class _Head(nn.Module):
    """Logits and their loss."""

    def __init__(self, linear: nn.Linear, one: Baseline) -> None:
        super().__init__()
        self.linear, self.loss = linear, tiled_loss if one.tiled else summed_loss

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.loss(hidden, self.linear.weight, labels)


class _Decoder(nn.Module):
    """A model and its loss, of the positions that this rank is given."""

    def __init__(self, model: Any, one: Baseline, group: Group) -> None:
        super().__init__()
        self.model, self.head, self.one = model.model, _Head(model.lm_head, one), one
        self.attention = {"group": group} if one.shares == "ulysses" and group.size > 1 else {}

    def forward(self, ids: Tensor, labels: Tensor, positions: Tensor) -> Tensor:
        with _layer_inputs_on_host(ids, self.model.config.hidden_size) if self.one.offloads else contextlib.nullcontext():
            hidden = self.model(input_ids=ids, position_ids=positions, use_cache=False, **self.attention).last_hidden_state
        return self.head(hidden, labels)


def _shifted(ids: Tensor) -> Tensor:
    """Return the label of every position, before anything is sliced: the next token; the last has none."""
    return F.pad(ids[:, 1:], (0, 1), value=-100)


def _one_device(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss = model(input_ids=batch["ids"], labels=batch["ids"], use_cache=False).loss
    loss.backward()
    return loss.detach()


def _sliced(decoder: nn.Module, group: Group, batch: dict[str, Tensor]) -> Tensor:
    ids = batch["ids"]
    if ids.shape[1] % group.size:
        raise ValueError(f"{ids.shape[1]} positions cannot be dealt to {group.size} ranks evenly")
    labels, positions = _shifted(ids), torch.arange(ids.shape[1], device=ids.device)[None]
    own = [tensor.chunk(group.size, 1)[group.rank].contiguous() for tensor in (ids, labels, positions)]
    return _differentiated(decoder(*own), labels, group.size)


def _in_context(decoder: nn.Module, mesh: DeviceMesh, batch: dict[str, Tensor]) -> Tensor:
    from torch.distributed.tensor.experimental import context_parallel

    ids = batch["ids"].clone()
    labels, positions = _shifted(ids), torch.arange(ids.shape[1], device=ids.device)[None]
    num_ranks, all_labels = mesh.size(), labels.clone()
    with context_parallel(mesh, buffers=[ids, labels, positions], buffer_seq_dims=[1, 1, 1]):
        return _differentiated(decoder(ids, labels, positions), all_labels, num_ranks)


def _differentiated(summed: Tensor, all_labels: Tensor, num_ranks: int) -> Tensor:
    loss = summed / (all_labels != -100).sum()
    (loss * num_ranks).backward()  # FSDP2 averages over the ranks
    return loss.detach()


def _prepare_layer(layer: Any, one: Baseline, backend: str) -> None:
    """Replace what a layer's forward does; hooks on the layer stay around it."""
    if one.tiled:
        layer.mlp.forward = functools.partial(_tiled_mlp, layer.mlp, layer.mlp.forward)
    forward = layer.forward
    if one.kept != "default":
        contexts = {"context_fn": _keeping_attention} if one.kept == "attention" else {}
        forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **contexts)
    layer.forward = torch.compile(forward, backend=backend, fullgraph=True) if one.compiled else forward


def _tiled_mlp(mlp: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return tiled(forward, -(-x.shape[1] // x.shape[2]), x, tuple(mlp.parameters()))


def _keeping_attention() -> Any:
    return create_selective_checkpoint_contexts(_attention_policy)


def _attention_policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator in costs.attention_operators
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _layer_inputs_on_host(ids: Tensor, width: int) -> Iterator[None]:
    """Keep on the host what has the size of a layer's input: all that checkpointed layers and the last norm keep, but tables."""
    shape = (*ids.shape, width)

    def pack(value: Tensor) -> Any:
        if value.shape != shape or value.device != ids.device:
            return value
        return host.offloaded(host.offload(value.detach()), value)

    def unpack(kept: Tensor) -> Tensor:
        if kept.shape != shape:
            return kept
        return host.fetched(host.fetch(kept, ids.device), kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
