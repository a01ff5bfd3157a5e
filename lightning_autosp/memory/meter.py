"""Counting the bytes of live tensors while operators run, on real and on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_autosp.attention import operators, tiles
from lightning_autosp.memory.host import offload

__all__ = ["LiveBytes"]

_KERNELS = {**tiles.KERNELS, **operators.KERNELS}


class LiveBytes(TorchDispatchMode):
    """A dispatch mode that counts the bytes of the storages that operators under it make, until they are freed.

    What a kernel of PyTorch's allocates and frees within itself is not seen, nor is an allocator's rounding.

    Attributes:
        live: Bytes alive now.
        peak: The most there were at once since the mode was made or `reset`.
        host_live: Bytes of copies on the host that are alive now, which `live` does not count.
        host_peak: The most there were at once, likewise.
    """

    supports_higher_order_operators = True

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Start at zero.

        Args:
            known: Tensors that are not to be counted: parameters, inputs.
        """
        super().__init__()
        self.live = self.peak = self.host_live = self.host_peak = 0
        self._seen: set[int] = set()
        for tensor in known:
            self._watch(tensor, counted=False)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let Dynamo compile what is called under the mode; operators of the compiled graphs are counted when they run."""
        return True

    def reset(self) -> None:
        """Start over with what is alive."""
        self.peak, self.host_peak = self.live, self.host_live

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kernel = _KERNELS.get(func)
        if kernel is None:
            out = func(*args, **(kwargs or {}))
        else:  # made of operators, whose values count too
            with self:
                out = kernel(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._watch(leaf, counted=True, on_host=func is offload)
        return out

    def _watch(self, tensor: Tensor, *, counted: bool, on_host: bool = False) -> None:
        if not _has_storage(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes() if counted else 0
        self._add(size, on_host)
        self.peak = max(self.peak, self.live)
        self.host_peak = max(self.host_peak, self.host_live)
        # The Python object of a storage lives as long as the storage does.
        weakref.finalize(storage, self._free, key, size, on_host)

    def _free(self, key: int, size: int, on_host: bool) -> None:
        self._seen.discard(key)
        self._add(-size, on_host)

    def _add(self, size: int, on_host: bool) -> None:
        if on_host:
            self.host_live += size
        else:
            self.live += size


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided
