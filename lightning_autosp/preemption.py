"""SIGTERM, taken by all ranks at the same batch.

Lightning's handler broadcasts, wherever the signal interrupts a rank. Ranks are interrupted at different places, between
collectives of the compiled step, so they would wait for each other in different ones. Here a rank only notes the signal; before
every batch the ranks agree whether any has, and then all call Lightning's handler there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Preemption"]


class Preemption:
    """One rank's part, while a Trainer runs."""

    def __init__(self) -> None:
        self._received = False
        self._handler: Any = None

    def _note(self, signum: int, frame: Any) -> None:
        self._received = True

    def _take_over(self) -> None:
        """Stand in for the Trainer's handler, which it takes away itself when it is done."""
        found = signal.getsignal(signal.SIGTERM)
        if found != self._note and callable(found) and threading.current_thread() is threading.main_thread():
            self._handler = found
            signal.signal(signal.SIGTERM, self._note)

    def before_batch(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """Call the Trainer's handler if any rank was signalled. Every rank has to call this.

        Args:
            groups: For values in host memory; together they reach all ranks.
        """
        self._take_over()
        received = torch.tensor(int(self._received))
        for group in groups:
            dist.all_reduce(received, dist.ReduceOp.MAX, group=group)
        if received and self._handler is not None:
            handler, self._handler = self._handler, None  # once
            handler(signal.SIGTERM, None)

    def close(self) -> None:
        self._received, self._handler = False, None
