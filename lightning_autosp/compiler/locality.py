"""Is an operator local in the sequence? PyTorch is asked, not a table.

The operator runs once on fake DTensors sharded along the sequence dimension. No communication and a sharded output means that every
position is computed from its own; a `Partial` output means local work and then a reduction; anything else is not local. The answer
is then tried on numbers: parts, put together, have to be the whole.
Answers are cached by operator, shapes and placements for the life of the process.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils import _pytree as pytree

__all__ = ["CONTRACTIONS", "Argument", "is_pointwise", "placements_of"]

_MAX_ELEMENTS = 2**20
"""Operators on more elements are not tried on numbers."""


@dataclass(frozen=True)
class Argument:
    """A tensor argument as PyTorch is asked about it: global shape, dtype, and the dimension it is sharded on."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int | None = None


CONTRACTIONS = {
    torch.ops.aten.matmul.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.einsum.default,
    torch.ops.aten.baddbmm.default,
}
"""Operators that take rows of one input and all of another: they turn values of pairs into values of positions."""

_UNTAGGED = {getattr(torch.ops.aten, f"__{name}__").Tensor for name in ("and", "or", "xor")}
"""Other names of `bitwise_and` and its like."""

_cache: dict[Any, tuple[Placement, ...] | None] = {}


def is_pointwise(target: Any) -> bool:
    """Whether PyTorch declares the operator to compute each output element from the elements at its place."""
    return isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or target in _UNTAGGED)


def placements_of(target: Any, args: Any, kwargs: Any, mesh: DeviceMesh) -> tuple[Placement, ...] | None:
    """Ask PyTorch how `target` treats sharded inputs.

    Args:
        target: An operator.
        args: Its arguments, each tensor given as an `Argument` whose sharded size divides by the mesh size.
        kwargs: Likewise.
        mesh: A one-dimensional mesh; nothing is communicated on it.

    Returns:
        The placement of every output tensor, or `None` if the operator communicates or PyTorch cannot say.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    key = (target, tuple((type(leaf), leaf) for leaf in leaves), str(spec))
    try:
        if key not in _cache:
            _cache[key] = _ask(target, leaves, spec, mesh)
    except TypeError:  # an unhashable argument
        return _ask(target, leaves, spec, mesh)
    return _cache[key]


def _ask(target: Any, leaves: list[Any], spec: Any, mesh: DeviceMesh) -> tuple[Placement, ...] | None:
    ranks = mesh.size()

    def build(leaf: Any) -> Any:
        if not isinstance(leaf, Argument):
            return leaf
        shape, placement = list(leaf.shape), Replicate()
        if leaf.dim is not None:
            shape[leaf.dim], placement = shape[leaf.dim] // ranks, Shard(leaf.dim)  # type: ignore[assignment]
        local = torch.empty(shape, dtype=leaf.dtype, device=mesh.device_type)
        return DTensor.from_local(local, mesh, [placement], run_check=False)

    log = logging.getLogger(FakeTensorMode.__module__)
    silent, log.disabled = log.disabled, True  # shapes that do not fit are an answer here, not an error to print
    try:
        with FakeTensorMode(), torch.no_grad(), CommDebugMode() as communication:
            args, kwargs = pytree.tree_unflatten([build(leaf) for leaf in leaves], spec)
            outputs = target(*args, **kwargs)
            # DTensor cuts whole inputs by itself where that suits an operator. The parts alone have to give its answer.
            own_args, own_kwargs = pytree.tree_map_only(DTensor, DTensor.to_local, (args, kwargs))
            own = target(*own_args, **own_kwargs)
    except Exception:  # noqa: BLE001 -- any refusal of DTensor's means "not known to be local"
        return None
    finally:
        log.disabled = silent
    if communication.get_total_counts():
        return None
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    placed = [tensor for tensor in tensors if isinstance(tensor, DTensor)]
    local = [leaf for leaf in pytree.tree_leaves(own) if isinstance(leaf, torch.Tensor)]
    if len(placed) < len(tensors) or [tensor.to_local().shape for tensor in placed] != [tensor.shape for tensor in local]:
        return None
    placements = tuple(tensor.placements[0] for tensor in placed)
    return placements if _holds(target, leaves, spec, placements, ranks) else None


def _holds(target: Any, leaves: list[Any], spec: Any, placements: tuple[Placement, ...], ranks: int) -> bool:
    """Whether the operator on the parts gives the parts of the operator on the whole; unknown counts as yes."""
    if sum(math.prod(leaf.shape) for leaf in leaves if isinstance(leaf, Argument)) > _MAX_ELEMENTS:
        return True
    generator = torch.Generator().manual_seed(0)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Argument):
            return leaf
        if leaf.dtype.is_floating_point or leaf.dtype.is_complex:  # in full precision, so that only what is wrong differs
            dtype = torch.complex128 if leaf.dtype.is_complex else torch.float64
            return torch.randn(leaf.shape, dtype=dtype, generator=generator)
        return torch.randint(0, 2, leaf.shape, generator=generator).to(leaf.dtype)  # as an index, valid almost everywhere

    values = [draw(leaf) for leaf in leaves]

    def run(rank: int | None) -> list[torch.Tensor]:
        own = [
            value if rank is None or not isinstance(leaf, Argument) or leaf.dim is None else value.chunk(ranks, leaf.dim)[rank]
            for value, leaf in zip(values, leaves, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(own, spec)
        return [leaf for leaf in pytree.tree_leaves(target(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]

    try:
        with torch.no_grad():
            whole, parts = run(None), [run(rank) for rank in range(ranks)]
    except Exception:  # noqa: BLE001 -- not for numbers like these, or not on this device: nothing is learnt
        return True
    return all(
        _is_joined(expected, list(found), placement) for expected, placement, *found in zip(whole, placements, *parts, strict=True)
    )


def _is_joined(whole: torch.Tensor, parts: list[torch.Tensor], placement: Placement) -> bool:
    if isinstance(placement, Shard):
        joined = torch.cat(parts, placement.dim)
    elif type(placement) is Partial and placement.reduce_op in ("sum", "avg"):
        joined = torch.stack(parts).to(whole.dtype).sum(0) / (len(parts) if placement.reduce_op == "avg" else 1)
    else:
        return True  # nobody believes these
    tolerance = 1e-9 if whole.dtype in (torch.float64, torch.complex128) else 0.05
    return joined.shape == whole.shape and torch.allclose(joined.to(whole.dtype), whole, tolerance, tolerance, equal_nan=True)
