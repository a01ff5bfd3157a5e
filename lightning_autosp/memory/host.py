"""Operators that move a tensor to host memory and back while other operators run.

Each way has two, so that graphs say how long memory is taken: `offload` starts the copy to the host, and the device's memory may be
given back behind `offloaded`; `fetch` takes memory on the device and starts the copy back, which may be read behind `fetched`.

On CUDA copies run on a stream of their own, one for each device, in the order they were started, and host memory is pinned. What is
copied is an argument of the operator that waits, and the stream that computes waits for the copy there: the caching allocator
cannot hand the memory to anyone else before. On the CPU a copy is a copy.

CUDA: written from PyTorch's documentation and sources, never run on a GPU.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["PinningError", "fetch", "fetched", "offload", "offloaded", "require_pinning"]


class PinningError(RuntimeError):
    """Host memory cannot be pinned, so that nothing can be copied to it while a device computes."""


class _PinnedMemory:
    """Pinned memory that is kept for the next step: to pin it takes longer than to copy to it.

    PyTorch's own pool rounds sizes up to powers of two, which is too much for tensors of gigabytes; this one keeps to them.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[mmap.mmap]] = {}

    def take(self, size: int) -> Tensor:
        """Return bytes that are nobody else's as long as the tensor, or a view of it, lives."""
        try:
            memory = self._free.get(size, []).pop()
        except IndexError:
            self._release()
            memory = _pin(size)
        given = torch.frombuffer(memory, dtype=torch.uint8)  # a storage of its own, whose end is seen
        weakref.finalize(given.untyped_storage(), self._take_back, size, memory).atexit = False
        return given

    def _take_back(self, size: int, memory: mmap.mmap) -> None:
        # Copies from it may not have ended. The next that writes to it is of the same stream, behind them.
        self._free.setdefault(size, []).append(memory)

    def _release(self) -> None:
        """Give back what the last step took and this one, whose sizes are others, does not."""
        while self._free:
            _, memories = self._free.popitem()
            for memory in memories:
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaHostUnregister(_address(memory))


def _address(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def _pin(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size)
    error = torch.cuda.cudart().cudaHostRegister(_address(memory), size, 0)
    if int(error) != 0:
        raise PinningError(
            f"{size} bytes of host memory cannot be pinned (CUDA error {int(error)}). Use a smaller host_memory_limit, raise the "
            "limit of locked memory (ulimit -l), or use another checkpoint_policy than 'offload'."
        )
    return memory


_memory = _PinnedMemory()
_streams: dict[torch.device, torch.cuda.Stream] = {}
_copies: dict[int, torch.cuda.Event] = {}
"""What ends a copy that was started, by the storage it writes to."""


def require_pinning(device: torch.device) -> None:
    """Make sure that values of the device can be kept on the host.

    Raises:
        PinningError: If the device's host memory cannot be pinned.
    """
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise PinningError(
            "checkpoint_policy='offload' needs pinned host memory, which is supported for CUDA devices, and the device is "
            f"{device}. Use checkpoint_policy='auto'."
        )
    try:
        torch.empty(1, pin_memory=True)
    except RuntimeError as error:
        raise PinningError(
            f"checkpoint_policy='offload' needs pinned host memory, and none can be pinned for {device}: {error}. "
            "Use checkpoint_policy='auto'."
        ) from error


def _copy(target: Tensor, source: Tensor, device: torch.device) -> None:
    """Start a copy behind what the current stream of the device has been given."""
    stream = _streams.get(device)
    if stream is None:
        stream = _streams[device] = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        _copies[target.untyped_storage()._cdata] = stream.record_event()


def _wait(target: Tensor, device: torch.device) -> None:
    """Let what the current stream of the device is given next begin behind the copy."""
    event = _copies.pop(target.untyped_storage()._cdata, None)
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)


def _flat(value: Tensor) -> Tensor:
    """Return the elements in the order they lie in memory; there are no gaps (`memory.offload`)."""
    return value.as_strided((value.numel(),), (1,))


def _offload(value: Tensor) -> Tensor:
    if value.device.type == "cuda":
        flat = _memory.take(value.nbytes).view(value.dtype)
        _copy(flat, _flat(value), value.device)
    else:
        flat = _flat(value).clone()
    return flat.as_strided(value.size(), value.stride())


def _offloaded(host: Tensor, value: Tensor) -> Tensor:
    if value.device.type == "cuda":
        _wait(host, value.device)
    return host


def _fetch(host: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        flat = torch.empty(host.numel(), dtype=host.dtype, device=device)
        _copy(flat, _flat(host), device)
    else:
        flat = _flat(host).clone()
    return flat.as_strided(host.size(), host.stride())


def _fetched(value: Tensor, host: Tensor) -> Tensor:
    if value.device.type == "cuda":
        _wait(value, value.device)
    return value


def _like(value: Tensor, device: torch.device | str) -> Tensor:
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)


_library = torch.library.Library("autosp", "FRAGMENT")


def _define(schema: str, kernel: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Any:
    _library.define(schema)
    name = schema.split("(")[0]
    _library.impl(name, kernel, "CompositeExplicitAutograd")  # host and device meet in one call
    torch.library.register_fake(f"autosp::{name}", fake, lib=_library)
    return getattr(torch.ops.autosp, name).default


# What waits returns what it waited for, so that its users come behind it.
offload = _define("offload(Tensor value) -> Tensor", _offload, lambda value: _like(value, "cpu"))
offloaded = _define("offloaded(Tensor(a) host, Tensor value) -> Tensor(a)", _offloaded, lambda host, value: host)
fetch = _define("fetch(Tensor host, Device device) -> Tensor", _fetch, _like)
fetched = _define("fetched(Tensor(a) value, Tensor host) -> Tensor(a)", _fetched, lambda value, host: value)
