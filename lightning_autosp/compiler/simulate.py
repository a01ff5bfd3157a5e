"""All ranks of a group in one process: a thread a rank, collectives by rendezvous.

Lowered programs run eagerly under a dispatch mode that answers the functional collectives from the other threads' tensors. No
process group, no network: what the compiler made can be compared with one device anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_autosp.attention.operators import KERNELS
from lightning_autosp.compiler.crossing import PartTensor

__all__ = ["run_ranks"]

T = TypeVar("T")
_ops = torch.ops._c10d_functional
_JOIN: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda stacked: stacked.sum(0, dtype=stacked.dtype),
    "max": lambda stacked: stacked.amax(0),
    "min": lambda stacked: stacked.amin(0),
}


class _Meeting:
    """Every rank puts a value in and takes all values out. Between meetings one rank runs at a time: they share a random state."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.turn = threading.Lock()
        self._barrier = threading.Barrier(num_ranks)
        self._values: list[Any] = [None] * num_ranks

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self.turn.release()
        try:
            self._barrier.wait()
            values = list(self._values)
            self._barrier.wait()
        finally:
            self.turn.acquire()
        return values

    def abort(self) -> None:
        self._barrier.abort()


class _Collectives(TorchDispatchMode):
    def __init__(self, rank: int, meeting: _Meeting) -> None:
        super().__init__()
        self.rank, self.meeting = rank, meeting

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let Dynamo compile what runs under this mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, PartTensor) for one in types):  # it comes back with plain ones
            return NotImplemented
        if func in KERNELS:  # collectives within
            with self:
                return KERNELS[func](*args, **(kwargs or {}))
        with torch._C._DisableTorchDispatch():
            if func.namespace != "_c10d_functional":
                return func(*args, **(kwargs or {}))
            return self._collective(func.overloadpacket, *args)

    def _collective(self, op: Any, x: Tensor, *args: Any) -> Tensor:
        if op is _ops.wait_tensor:
            return x
        splits = args[1] if op is _ops.all_to_all_single else None
        gathered = self.meeting.exchange(self.rank, (op, x.detach(), splits))
        if any(other is not op for other, _, _ in gathered):
            raise RuntimeError(f"ranks disagree: {[str(other) for other, _, _ in gathered]}")
        parts = [part for _, part, _ in gathered]
        if op is _ops.all_to_all_single:
            sent = [part.split(list(sizes))[self.rank] for _, part, sizes in gathered]
            if [len(block) for block in sent] != list(args[0]):
                raise RuntimeError(f"rank {self.rank} expects {args[0]} but is sent {[len(block) for block in sent]}")
            return torch.cat([block for block in sent if len(block)] or [x[:0]])  # parts of the group may send other rows
        if any(part.shape != x.shape for part in parts):
            raise RuntimeError(f"ranks disagree on the shape for {op}: {[tuple(part.shape) for part in parts]}")
        if op is _ops.all_reduce:
            return _JOIN[args[0]](torch.stack(parts))
        if op is _ops.all_gather_into_tensor:
            return torch.cat(parts)
        if op is _ops.reduce_scatter_tensor:
            return _JOIN[args[0]](torch.stack(parts)).chunk(len(parts))[self.rank].clone()
        if op is _ops.broadcast:
            return parts[0].clone()
        raise NotImplementedError(str(op))


def run_ranks(num_ranks: int, work: Callable[[int], T]) -> list[T]:
    """Run `work(rank)` for every rank at once and return the results in rank order.

    Functional collectives inside `work`, forward and backward, meet across the ranks (CPU tensors only). The first rank's exception
    is raised again.
    """
    meeting = _Meeting(num_ranks)
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def thread(rank: int) -> None:
        try:
            with meeting.turn, _Collectives(rank, meeting):
                results[rank] = work(rank)
        except BaseException as error:  # noqa: BLE001 -- raised again below
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            meeting.abort()

    threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(num_ranks)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if errors:
        raise errors[0]
    return results
