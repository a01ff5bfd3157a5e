"""Throughput as users count it: each sequence once, however many ranks share it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch.callbacks import ThroughputMonitor as LightningThroughputMonitor

from lightning_autosp.batches import SequenceDim, found_tensors, sequences

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightning.pytorch import LightningModule, Trainer

    from lightning_autosp.strategy import AutoSPStrategy

__all__ = ["ThroughputMonitor", "count_sequences_once"]


class ThroughputMonitor(LightningThroughputMonitor):
    """Lightning's ThroughputMonitor with nothing to fill in: samples, tokens and floating-point operations are read off the step.

    Logs, beside `samples_per_sec` and `batches_per_sec`, `items_per_sec` (tokens), `flops_per_sec`, `device/mfu`, and
    `memory/predicted_bytes` with, on CUDA, `memory/measured_bytes`: the most a step takes on a rank, and the most allocated since
    the first steps. Those called `device/...` are the others' divided by the number of ranks, but for `mfu`: model FLOPs
    utilization (PaLM, arXiv:2204.02311, appendix B), the operations a second of the model over those the devices can do.

    The operations of a step are those of one device: products and attentions in its graph's forward and backward, each once (what
    is computed again to save memory, and what ranks do several times, is left out), a causal attention whole, as there and in
    PyTorch's `FlopCounterMode`. A step that is not compiled has none. A module's own `flops_per_batch` is preferred.
    """

    def __init__(
        self,
        batch_size_fn: Callable[[Any], int] | None = None,
        length_fn: Callable[[Any], int] | None = None,
        **kwargs: Any,
    ) -> None:
        """Say how to count.

        Args:
            batch_size_fn: Samples of a batch of a sequence group. Default: the first dimension (the second, if the sequence is
                the first) of the batch's longest tensor.
            length_fn: Tokens of a batch of a sequence group. Default: samples times positions of that tensor, padding included.
            kwargs: Of `lightning.fabric.utilities.throughput.Throughput`.
        """
        self._sequence_dim: SequenceDim = 1
        super().__init__(batch_size_fn or self._samples_of, length_fn or self._tokens_of, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse other strategies.

        Raises:
            TypeError: If the Trainer's strategy is not `AutoSPStrategy`.
        """
        if not hasattr(trainer.strategy, "sequence_dim"):
            raise TypeError(
                f"lightning_autosp.ThroughputMonitor reads steps of strategy 'autosp', and the Trainer's is "
                f"{type(trainer.strategy).__name__}. Use lightning.pytorch.callbacks.ThroughputMonitor."
            )
        self._sequence_dim = trainer.strategy.sequence_dim
        super().setup(trainer, pl_module, stage)

    def _shape(self, batch: Any) -> tuple[int, int]:
        """Return samples and positions of a batch."""
        found = [(one.tensor, dim) for one, dim in sequences(found_tensors(batch), self._sequence_dim)]
        found = [(tensor, dim) for tensor, dim in found if tensor.ndim > max(dim, dim == 0)]
        if not found:
            raise ValueError("ThroughputMonitor: no tensor of the batch has a sequence; pass batch_size_fn and length_fn.")
        longest, dim = max(found, key=lambda pair: pair[0].shape[pair[1]])
        return longest.shape[1 if dim == 0 else 0], longest.shape[dim]

    def _samples_of(self, batch: Any) -> int:
        return self._shape(batch)[0]

    def _tokens_of(self, batch: Any) -> int:
        samples, positions = self._shape(batch)
        return samples * positions

    def _update(self, trainer: Trainer, pl_module: LightningModule, batch: Any, iter_num: int) -> None:
        strategy: AutoSPStrategy = trainer.strategy  # type: ignore[assignment]
        assert trainer.state.stage is not None
        kind = {"train": "training", "validate": "validation"}.get(trainer.state.stage.value, trainer.state.stage.value) + "_step"
        # What a module says of itself holds, as it does in Lightning's.
        flops = getattr(pl_module, "flops_per_batch", None) or strategy.flops_of_last(kind)
        throughput = self._throughputs[trainer.state.stage]
        if isinstance(throughput, _GroupThroughput):
            throughput.memory = strategy.memory_of_last(kind)
        super()._update(trainer, SimpleNamespace(flops_per_batch=flops), batch, iter_num)  # type: ignore[arg-type]


class _GroupThroughput(Throughput):
    """Counts what a sequence group does: its ranks do the same samples together."""

    def __init__(self, of_rank: Throughput, ranks: int, groups: int, options: dict[str, Any]) -> None:
        available = of_rank.available_flops
        super().__init__(available_flops=available * ranks if available else None, world_size=1, **options)
        self._ranks, self._groups = ranks, groups
        self.memory: dict[str, int] = {}
        """Bytes of a rank, by name."""

    def compute(self) -> dict[str, int | float]:  # type: ignore[override]
        prefix, metrics = f"device{self.separator}", dict(super().compute())
        for name, rate in list(metrics.items()):
            if name.startswith(prefix) and name != f"{prefix}mfu":  # of group and device, that is the same
                metrics[name] = rate / self._ranks
                if self._ranks * self._groups > 1:
                    metrics[name.removeprefix(prefix)] = rate * self._groups
        return {**metrics, **{f"memory{self.separator}{name}": size for name, size in self.memory.items()}}


def count_sequences_once(trainer: Trainer, ranks: int, groups: int) -> None:
    """Have ThroughputMonitors, Lightning's too, count a sequence that ranks share once: they take every rank's batch for another.

    Args:
        trainer: Whose callbacks have been set up.
        ranks: Of a sequence group.
        groups: Their number.
    """
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, LightningThroughputMonitor):
            for stage, throughput in callback._throughputs.items():
                callback._throughputs[stage] = _GroupThroughput(throughput, ranks, groups, callback.kwargs)
