"""After running out of memory in one of the first steps: do all ranks agree that it can be run again, and as it was before?

A rank that is out of memory in the middle of a step cannot take part in a collective that others wait in. So ranks meet in
`torch.distributed`'s key-value store, and go on only if all of them failed, at the same place, behind the same number of
collectives: then none is left that some have started and others have not.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightning_autosp import _compat

__all__ = ["FIRST_STEPS", "WAIT", "Before", "Failure", "Gradients", "Meeting"]

FIRST_STEPS = 3
"""Of sequences of each shape: later steps take what these took."""

WAIT = timedelta(seconds=60)
"""How long a rank that is out of memory waits for the others to be, too: ranks do the same at nearly the same time."""


@dataclass
class Before:
    """What a step reads and changes, as it was before it ran; what it logs is not among it."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    random: tuple[Tensor, Tensor | None]
    device: torch.device
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]
    """Where each is, and a copy on the host: compiled graphs change them without a new version, and put others in their place."""
    attributes: list[tuple[nn.Module, dict[str, Any]]]

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> Before:
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        buffers = [
            (owner, name, buffer, buffer.detach().to("cpu", copy=True))
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        plain = (bool, int, float, str, Tensor, type(None))
        attributes = [
            (one, {name: value for name, value in vars(one).items() if isinstance(value, plain) and not name.startswith("_")})
            for one in module.modules()
            if not isinstance(one, Metric)  # updated when the graph has returned, once
        ]
        arguments = pytree.tree_map(lambda value: value, (args, kwargs))
        return cls(arguments, (torch.get_rng_state(), cuda), device, buffers, attributes)

    def restore_random(self) -> None:
        torch.set_rng_state(self.random[0])
        if self.random[1] is not None:
            torch.cuda.set_rng_state(self.random[1], self.device)

    def restore(self) -> None:
        self.restore_random()
        with torch.no_grad():
            for owner, name, buffer, copy in self.buffers:
                buffer.copy_(copy)
                owner._buffers[name] = buffer
        for owner, values in self.attributes:
            for name, value in values.items():
                if vars(owner).get(name, value) is not value:
                    vars(owner)[name] = value


class Gradients:
    """The gradients of parameters before a backward."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._found = [(one, one.grad, 0 if one.grad is None else one.grad._version) for one in parameters]

    def undo(self) -> bool:
        """Take back what a backward that failed has added; whether that is possible."""
        if any(grad is not None and (one.grad is not grad or grad._version != version) for one, grad, version in self._found):
            return False
        for one, grad, _ in self._found:
            one.grad = grad
        return True


@dataclass(frozen=True)
class Failure:
    """How a rank ran out of memory.

    Attributes:
        phase: "forward" or "backward".
        hopeless: Why running the step again would not help; "" if it may.
        measured: Most bytes that were in use at once; 0 if not known.
        collectives: How many of them every process group has started.
    """

    phase: str
    hopeless: str
    measured: int
    collectives: tuple[int, ...]


class Meeting:
    """Where ranks that are out of memory meet.

    Args:
        name: Not used by any other meeting of these processes.
        groups: The process groups of the step, the same ones in the same order on all ranks.
    """

    def __init__(self, name: str, rank: int, num_ranks: int, groups: Sequence[dist.ProcessGroup]) -> None:
        self._keys = [f"autosp/{name}/{one}" for one in range(num_ranks)]
        self._rank, self._groups = rank, groups

    def report(self, phase: str, hopeless: str, measured: int) -> Failure:
        """Say that this rank is out of memory, and how."""
        failure = Failure(phase, hopeless, measured, tuple(map(_compat.collectives_started, self._groups)))
        if len(self._keys) > 1:
            _compat.default_store().set(self._keys[self._rank], json.dumps(vars(failure)))
        return failure

    def wait(self, own: Failure) -> tuple[str, int]:
        """Wait until all ranks have said so.

        Returns:
            Why the step cannot be run again, the same on all ranks that are there; and the most bytes that a rank measured.
        """
        if len(self._keys) == 1 or own.hopeless:
            return own.hopeless, own.measured
        store = _compat.default_store()
        try:
            store.wait(self._keys, WAIT)
            found = [json.loads(store.get(key)) for key in self._keys]
        except RuntimeError:  # of several kinds, depending on the store
            return f"rank {self._rank} ran out of memory and not all others did, so that they wait for it in collectives", 0
        hopeless = next((one["hopeless"] for one in found if one["hopeless"]), "")
        if not hopeless and any((one["phase"], one["collectives"]) != (own.phase, list(own.collectives)) for one in found):
            hopeless = "ranks ran out of memory at different places"
        return hopeless, max(one["measured"] for one in found)

    def others(self) -> list[int]:
        """Return the ranks that said that they are out of memory."""
        try:
            store = _compat.default_store()
            return [rank for rank, key in enumerate(self._keys) if rank != self._rank and store.check([key])]
        except RuntimeError:  # the process that holds it is gone
            return []
