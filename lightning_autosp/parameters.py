"""The module's parameters: whole on every rank, or sharded over all of them and gathered inside the graph.

Between steps, a sharded parameter is a DTensor `nn.Parameter` in the module, so optimizers, gradient clipping and
`torch.distributed.checkpoint` see what they know. While a step is traced, the user's own `nn.Parameter` objects stand in for
them: global shape, no memory. The graph takes this rank's rows and gathers them on use (`collectives.gather_parameter`); the
gradient comes back reduced to those rows. `restore` puts the user's parameters back, with their new values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils import _pytree as pytree

from lightning_autosp.collectives import Group, average_gradient, gather_parameter

__all__ = ["Entry", "ModuleParameters", "enter_parameter", "gather_to_cpu", "largest_part", "own_rows", "parameter_slots"]


Entry = tuple[Callable[..., Tensor], tuple[Any, ...]]


def enter_parameter(parameter: Tensor, group: Group, *, sharded: bool) -> Entry:
    """Return the function, and its further arguments, that makes a whole parameter of what a rank of `group` holds of it."""
    if not sharded or parameter.ndim == 0:
        return average_gradient, (group,)
    return gather_parameter, (parameter.shape[0], group)


def own_rows(parameter: Tensor, group: Group) -> Tensor:
    """Return the rows of a whole parameter that this rank holds if it is sharded: a view."""
    chunk = -(-parameter.shape[0] // group.size)
    return parameter[group.rank * chunk : (group.rank + 1) * chunk]


def largest_part(parameter: Tensor, group: Group, *, sharded: bool) -> Tensor:
    """Return a tensor on the meta device, of the shape and type of the largest part of a parameter that a rank holds."""
    shape = list(parameter.shape)
    if sharded and shape:
        shape[0] = -(-shape[0] // group.size)
    return torch.empty(shape, dtype=parameter.dtype, device="meta", requires_grad=parameter.requires_grad)


def parameter_slots(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return every `(submodule, key, parameter)` of a module, those that share a parameter too."""
    return [
        (submodule, key, parameter)
        for submodule in module.modules()
        for key, parameter in submodule._parameters.items()
        if parameter is not None
    ]


class ModuleParameters:
    """The parameters of one module. Implements what `compiler.specialise.Parameters` asks for."""

    def __init__(self, module: nn.Module, mesh: DeviceMesh, group: Group, *, sharded: bool) -> None:
        """Take the module's parameters over.

        Args:
            module: Plain parameters, equal on all ranks.
            mesh: All ranks, one-dimensional.
            group: The same ranks as graphs see them.
            sharded: Whether to shard them over dim 0 now; scalars stay whole.
        """
        self.module, self.mesh, self.group, self.sharded = module, mesh, group, sharded
        self._slots = parameter_slots(module)
        self.originals = dict(module.named_parameters())
        self._names = {id(parameter): name for name, parameter in self.originals.items()}
        self.owned: dict[str, nn.Parameter] = self.originals
        if sharded:
            self.owned = {name: self._shard(parameter) for name, parameter in self.originals.items()}
            self._put(self.owned)

    def names(self) -> dict[int, str]:
        return self._names

    def enter(self, name: str) -> Entry:
        return enter_parameter(self.originals[name], self.group, sharded=self.sharded)

    def held(self, name: str) -> Tensor:
        parameter = self.owned[name]
        return parameter.to_local(grad_placements=parameter.placements) if isinstance(parameter, DTensor) else parameter

    def largest_parts(self) -> dict[str, Tensor]:
        """Return for every parameter a tensor without memory, of the shape and type of the largest part that a rank holds."""
        return {name: largest_part(original, self.group, sharded=self.sharded) for name, original in self.originals.items()}

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Put the user's own parameters into the module, to be traced and not to be read."""
        if not self.sharded:
            yield
            return
        self._put(self.originals)
        try:
            yield
        finally:
            self._put(self.owned)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Put whole values into the module that any code can compute with; their gradients reach the owned parameters."""
        self._put({name: self._enter_whole(name) for name in self.originals})
        try:
            yield
        finally:
            self._put(self.owned)

    def without_stand_ins(self, tree: Any) -> Any:
        """Replace the parameters that stood in by whole values, in what a traced step returned or logged as it is."""
        if not self.sharded:
            return tree

        def one(parameter: nn.Parameter) -> Tensor:
            name = self._names.get(id(parameter))
            return parameter if name is None else self._enter_whole(name)

        return apply_to_collection(tree, nn.Parameter, one, allow_frozen=True)

    def _enter_whole(self, name: str) -> Tensor:
        function, args = self.enter(name)
        return function(self.held(name), *args)

    def restore(self, *, values: bool) -> None:
        """Put the user's own parameters back for good.

        Args:
            values: Whether to gather their values first (a collective). Without, they are left sharded: after an error on one rank
                the others may be gone.
        """
        if not self.sharded or not values:
            return
        for name, original in self.originals.items():
            owned = self.owned[name]
            assert isinstance(owned, DTensor)
            with torch.no_grad():
                value = owned.full_tensor()
                _allocate(original)
                original.copy_(value)
        self._put(self.originals)
        self.owned, self.sharded = self.originals, False

    def load(self, state: Mapping[str, Any], *, strict: bool) -> None:
        """Load whole values into the module, each rank keeping its rows."""
        if self.sharded:
            owned = self.module.state_dict(keep_vars=True)
            state = {name: self.like(value, owned[name]) if name in owned else value for name, value in state.items()}
        self.module.load_state_dict(state, strict=strict)

    def like(self, value: Any, parameter: Any) -> Any:
        """Return a whole tensor placed as `parameter` is; anything else as it is."""
        if not isinstance(value, Tensor) or not isinstance(parameter, DTensor) or isinstance(value, DTensor):
            return value
        if value.shape == parameter.shape:
            return self._place(value.to(parameter.device), sharded=isinstance(parameter.placements[0], Shard))
        # State of another shape (a factored second moment): whole on every rank. Scalars stay plain, as optimizers keep them.
        return self._place(value.to(parameter.device), sharded=False) if value.ndim else value

    def _shard(self, original: nn.Parameter) -> nn.Parameter:
        placed = self._place(original.detach(), sharded=original.ndim > 0)
        owned = nn.Parameter(placed, requires_grad=original.requires_grad)
        original.data.untyped_storage().resize_(0)
        return owned

    def _place(self, value: Tensor, *, sharded: bool) -> DTensor:
        if not sharded:
            return DTensor.from_local(value.clone(), self.mesh, [Replicate()], run_check=False)
        rows = own_rows(value, self.group).clone()
        return DTensor.from_local(rows, self.mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride())

    def _put(self, values: Mapping[str, Tensor]) -> None:
        for submodule, key, original in self._slots:
            submodule._parameters[key] = values[self._names[id(original)]]  # type: ignore[assignment]


def _allocate(parameter: nn.Parameter) -> None:
    storage = parameter.data.untyped_storage()
    if storage.size() == 0:
        storage.resize_(parameter.numel() * parameter.element_size())


def gather_to_cpu(tree: Any, *, keep: bool) -> Any:
    """Replace every DTensor by its whole value on the CPU. A collective: every rank calls it with the same tree.

    Args:
        tree: Nested dicts, lists and tuples.
        keep: Whether this rank wants the result; the others get `None` in each place and hold one tensor at a time.
    """

    def one(value: Any) -> Any:
        if isinstance(value, DTensor):
            with torch.no_grad():
                whole: Tensor = value.full_tensor()
            return whole.cpu() if keep else None
        return value

    return pytree.tree_map(one, tree)
