"""`AutoSPStrategy`: everything Lightning asks of a strategy, nothing about graphs.

```python
import lightning_autosp
trainer = Trainer(devices=8, strategy="autosp")
trainer.fit(module, datamodule)
```
"""

from __future__ import annotations

import functools
import gc
import math
import os
import sys
import types
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, get_args

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.fabric.utilities.seed import pl_worker_init_function, reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_autosp import checkpoint as checkpoints
from lightning_autosp.attention.select import AttentionMethod, AttentionOptions
from lightning_autosp.batches import SequenceDim, batch_tensors, call_tensors, found_tensors, named_dim, shown_dim
from lightning_autosp.callbacks import count_sequences_once
from lightning_autosp.check import CheckResult, check
from lightning_autosp.compiler.backend import resolve_backend
from lightning_autosp.compiler.crossing import PartTensor, Placement, placement_of
from lightning_autosp.compiler.report import Crossing, Report
from lightning_autosp.compiler.specialise import Compiler
from lightning_autosp.data.agreement import agree, batch_error, checksum, loader_error
from lightning_autosp.data.position import Epoch, PositionedLoader, put_back, reordered, set_aside
from lightning_autosp.data.sources import SOURCES, BatchSource, choose_source, number_of_batches, share
from lightning_autosp.data.tokens import SequenceShard, assemble, sequence_shards, sharded_datasets
from lightning_autosp.explain import Explanation, explain
from lightning_autosp.faults import Watch, described, not_finite
from lightning_autosp.launcher import ScriptLauncher
from lightning_autosp.memory.devices import device_kind, device_of, format_bytes, free_host_memory, limit_bytes
from lightning_autosp.memory.estimate import MemoryEstimate, States, optimizer_memory
from lightning_autosp.memory.host import require_pinning
from lightning_autosp.memory.partition import MemoryOptions
from lightning_autosp.memory.policy import CheckpointPolicy
from lightning_autosp.mesh import SEQUENCE_AXIS, ParallelMesh, resolve_sizes
from lightning_autosp.parameters import ModuleParameters, gather_to_cpu
from lightning_autosp.plan import Plan, Planner, planned_host_limit
from lightning_autosp.preemption import Preemption
from lightning_autosp.recovery import FIRST_STEPS, Before, Gradients, Meeting
from lightning_autosp.saved import SavedPlan
from lightning_autosp.step import CompiledStep

__all__ = ["AutoSPStrategy", "refuse_pytorch_lightning"]

ParameterSharding = Literal["auto", "replicate", "full"]
Backend = Literal["auto", "inductor", "aot_eager"]
StateDictType = Literal["full", "sharded"]
StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


PEAKS = 2
"""Steps whose memory is measured on CUDA: the first compiles, the second is like those that follow."""

FREE_HOST_MEMORY = 0.75
"""How much of a rank's share of the host's free memory is pinned by default: the rest is for workers that load data, and files."""

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class _AlsoOnClass(Generic[P, R]):
    """A method that can be called on the class too: `self` is then an instance with default options."""

    def __init__(self, method: Callable[Concatenate[Any, P], R]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: Any, owner: Callable[[], Any]) -> Callable[P, R]:
        return types.MethodType(self._method, owner() if instance is None else instance)


class AutoSPStrategy(ParallelStrategy):
    """Trains an unmodified LightningModule, its sequences split over ranks; loss, gradients and logs are those of one device."""

    def __init__(
        self,
        sequence_parallel_size: int | Literal["auto"] = "auto",
        data_parallel_size: int | Literal["auto"] = "auto",
        parameter_sharding: ParameterSharding = "auto",
        attention: AttentionMethod = "auto",
        sequence_dim: int | dict[str, int] = 1,
        batch_source: BatchSource = "auto",
        compile_backend: Backend = "auto",
        checkpoint_policy: CheckpointPolicy = "auto",
        memory_limit: int | float | str = "auto",
        host_memory_limit: int | float | str = "auto",
        plan: str | Path | None = None,
        strict: bool = False,
        state_dict_type: StateDictType = "full",
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
        start_method: StartMethod = "popen",
        **kwargs: Any,
    ) -> None:
        """Configure the strategy; nothing is started yet.

        Args:
            sequence_parallel_size: Ranks that share one sequence. "auto": all that data parallelism leaves.
            data_parallel_size: Groups of ranks that see different samples. "auto": 1, or what `sequence_parallel_size` leaves.
            parameter_sharding: "replicate": every rank holds all parameters. "full": parameters, gradients and optimizer state are
                sharded over all ranks; parameters are gathered on use, inside the graph. "auto": "full" with more than one
                rank, but for a callback that averages weights, which needs whole ones.
            attention: How attention sees the whole sequence. "ulysses": ranks exchange their part of the sequence for a part of
                the heads and back. "gather_kv": queries stay, keys and values are gathered, a few heads at a time; of a window only
                the neighbours'. "ring": queries stay, keys and values go around. "hybrid": heads are exchanged within parts of
                the ranks (of a node, where there are several), across them keys and values are gathered or go around. "auto":
                for each call what is estimated to take the least time (`attention.select`). A method that cannot compute a
                call raises, with the line and the reason, when the step is compiled.
            sequence_dim: The dimension of batch tensors that holds the sequence; or of each by the name that it has in the batch:
                a key, a field, or its place in a tuple, as in `{"ids": 1, "frames": 2}`. Of names within each other the innermost
                counts, and tensors that are not named have no sequence. A training batch has to have all of them.
            batch_source: Who loads in a group of ranks that share sequences. "replicated": every rank loads the same batch; the
                first one of each stage is compared. "broadcast": the first rank loads, and sends. "exchange": every rank loads
                batches of its own, which the group works through in turn. "sharded": every rank loads its slice of the same batch.
                "auto": "sharded" for a dataset that can (`data.TokenDataset`), "replicated" where the sampler is known to draw the
                same on every rank, "exchange" where it deals to all ranks, else "broadcast"; which is said (`data.sources`).
            compile_backend: "inductor", or "aot_eager" to run compiled graphs operator by operator. "auto": Inductor on CUDA.
            checkpoint_policy: Which values are kept for backward, and which are computed again (`memory.policy`). "none": what
                PyTorch's partitioner keeps. "attention": attention's results, what collectives brought, and what enters each
                layer. "full": what enters each layer alone. "offload": that, on the host. "auto": the least computing again and
                waiting for the host that fits `memory_limit`; on the CPU, whose memory is the host's, nothing is moved there.
            memory_limit: What a rank may take: bytes, text as "80GiB", or a fraction of the device's memory. A step that is
                predicted to take more is refused before it runs. "auto": what the device has free; then it is only reported.
            host_memory_limit: What a rank may keep on the host between forward and backward, in pinned memory: bytes, text as
                "96GiB", or a fraction of its share of what is free there. "auto": three quarters of that share.
            plan: A file that `autosp plan --save` or `Plan.save` wrote: training does what it says, instead of
                choosing by itself, for the sequences it was made for, and refuses it, before the first step runs, if the module,
                the ranks or the batch are others. Batches that come later with other sizes are planned as without.
            strict: Raise, with the line, if anything runs unsharded for want of a rule, if an attention mask above 64 MiB
                is not proven, or if a step is not a single graph.
            state_dict_type: "full": checkpoints are one file that plain Lightning reads. "sharded": a directory every rank writes
                its part of. Both load on any number of ranks.
            process_group_backend: "nccl", "gloo", ... Default: by device.
            timeout: How long a rank waits for others in a collective, before all end with who was missing. Default: torch's.
            start_method: How processes start: "popen" (scripts), "spawn", "fork" (notebooks), "forkserver".
            kwargs: Lightning's own: `accelerator`, `parallel_devices`, `cluster_environment`, `checkpoint_io`, `precision_plugin`.

        Raises:
            ValueError: If an option has a value that is not known, or `plan` is no plan.
        """
        super().__init__(**kwargs)
        _require_size("sequence_parallel_size", sequence_parallel_size)
        _require_size("data_parallel_size", data_parallel_size)
        _require_choice("parameter_sharding", parameter_sharding, ParameterSharding)
        _require_choice("attention", attention, AttentionMethod)
        _require_choice("batch_source", batch_source, BatchSource)
        _require_choice("compile_backend", compile_backend, Backend)
        _require_choice("checkpoint_policy", checkpoint_policy, CheckpointPolicy)
        if memory_limit != "auto":
            limit_bytes(memory_limit, 1)
        if host_memory_limit != "auto":
            limit_bytes(host_memory_limit, 1, "host_memory_limit")
        if plan is not None and checkpoint_policy != "auto":
            raise ValueError(
                f"plan={str(plan)!r} and checkpoint_policy={checkpoint_policy!r} both say what is kept for backward. "
                "Leave one away."
            )
        _require_choice("state_dict_type", state_dict_type, StateDictType)
        _require_choice("start_method", start_method, StartMethod)
        _require_dim(sequence_dim)
        self._asked_sizes = (data_parallel_size, sequence_parallel_size)
        self._parameter_sharding = parameter_sharding
        self._attention = attention
        self.sequence_dim: SequenceDim = sequence_dim
        """The dimension of batch tensors that holds the sequence, or of each by its name in the batch."""
        self._batch_source: BatchSource = batch_source
        self._compile_backend = compile_backend
        self._checkpoint_policy = checkpoint_policy
        self._memory_limit = memory_limit
        self._host_memory_limit = host_memory_limit
        self._saved = None if plan is None else SavedPlan.load(plan)
        self._strict = strict
        self._state_dict_type = state_dict_type
        self._process_group_backend = process_group_backend
        self._timeout = timeout
        self._start_method = start_method
        self.num_nodes = 1
        self.report = Report()
        """What the compiler did so far."""
        self._printed = False
        self._peaks_read = 0
        self._failed = False
        self._mesh: ParallelMesh | None = None
        self._watch: Watch | None = None
        self._preemption = Preemption()
        self._parameters: ModuleParameters | None = None
        self._optimized_names: dict[int, str] = {}
        """Names of the parameters optimizers hold: still needed when a checkpoint is saved after the Trainer has finished."""
        self._steps: dict[str, CompiledStep] = {}
        self._before: Before | None = None
        """In the first steps, what it takes to run the step again."""
        self._steps_of: Counter[tuple[torch.Size, ...]] = Counter()
        """Training steps by the shapes of their batch."""
        self._planned_again, self._meetings = False, 0
        self._checked_stages: set[Any] = set()
        self._metric_groups: list[tuple[Metric, Any]] = []
        self._sharded_datasets: list[Any] = []

    def __repr__(self) -> str:
        # Names the package of its base class: pytorch_lightning's Trainer, whose classes are others, prints this when refusing it.
        data, sequence = self._asked_sizes
        return f"<lightning.pytorch strategy AutoSPStrategy(data_parallel_size={data!r}, sequence_parallel_size={sequence!r})>"

    @_AlsoOnClass
    def check(
        self, module: nn.Module, batch: Any, *, num_ranks: int | None = None, step: str = "training_step", rtol: float | None = None
    ) -> CheckResult:
        """Compare a module's step on simulated ranks with one device, in this process, before there is a Trainer.

        `AutoSPStrategy.check(module, batch)` does it with default options, `AutoSPStrategy(sequence_dim=0).check(module, batch)`
        with the instance's `sequence_dim`, `attention` and `strict`.

        Args:
            module: A LightningModule; it stays as it is.
            batch: One batch of its data.
            num_ranks: Ranks that share the sequence. Default: `sequence_parallel_size`; 2 where that is "auto".
            step: The method to compare.
            rtol: What relative norms may differ by; see `lightning_autosp.check`.

        Raises:
            CheckError: If there is nothing to compare with.
            MisconfigurationException: If the module is compiled, wrapped or sharded already.
        """
        _refuse_module(module)
        asked = self._asked_sizes[1]
        return check(
            module,
            batch,
            num_ranks=num_ranks or (asked if isinstance(asked, int) else 2),
            step=step,
            sequence_dim=self.sequence_dim,
            rtol=rtol,
            strict=self._strict,
            attention=self._attention,
        )

    @_AlsoOnClass
    def plan(
        self,
        module: nn.Module,
        batch: Any,
        *,
        world: int,
        device: str = "h100",
        length: int | None = None,
        precision: str | None = None,
        step: str = "training_step",
    ) -> Plan:
        """Predict what a module's step takes on ranks that are not there, in this process, without allocating anything.

        `AutoSPStrategy.plan(module, batch, world=8)` does it with default options; an instance's `memory_limit`,
        `host_memory_limit` in bytes, `sequence_dim`, `parameter_sharding` and `compile_backend` hold.

        Args:
            module: A LightningModule; its parameters may be on the meta device. It stays as it is.
            batch: One batch, of any length.
            world: Ranks that share each sequence.
            device: What each has: see `lightning_autosp.memory.devices.DEVICES`.
            length: Positions of the longest sequence. Default: the batch's own.
            precision: The Trainer's. Default: parameters as they are.
            step: The method to plan.

        Raises:
            PlanError: If the step cannot be planned.
            ValueError: If the device is not known.
        """
        return self._planner(module, batch, world=world, device=device, precision=precision, step=step).fitting(length)

    @_AlsoOnClass
    def explain(
        self,
        module: nn.Module,
        batch: Any,
        *,
        world: int | None = None,
        device: str = "h100",
        length: int | None = None,
        precision: str | None = None,
        step: str = "training_step",
    ) -> Explanation:
        """Show what would run on each rank and what it would take, in this process, without allocating anything.

        `AutoSPStrategy.explain(module, batch)` does it with default options; what holds of an instance's for `plan` holds here, and
        its `checkpoint_policy`. The result prints as a table; `to_dict()` and `to_html()` give it as plain data and as a page.

        Args:
            module: As of `plan`.
            batch: As of `plan`.
            world: Ranks that share each sequence. Default: `sequence_parallel_size`; 2 where that is "auto".
            device: As of `plan`.
            length: As of `plan`.
            precision: As of `plan`.
            step: As of `plan`.

        Raises:
            PlanError: If the step cannot be planned.
            ValueError: If the device is not known.
        """
        asked = self._asked_sizes[1]
        ranks = world or (asked if isinstance(asked, int) else 2)
        policy = None if self._checkpoint_policy == "auto" else self._checkpoint_policy
        planner = self._planner(module, batch, world=ranks, device=device, precision=precision, step=step, policy=policy)
        return explain(planner, length)

    def _planner(self, module: nn.Module, batch: Any, *, device: str, **options: Any) -> Planner:
        kind = device_kind(device)
        return Planner(
            module,
            batch,
            device=kind,
            limit=None if self._memory_limit == "auto" else limit_bytes(self._memory_limit, kind.memory),
            host_limit=planned_host_limit(self._host_memory_limit),
            sequence_dim=self.sequence_dim,
            sharded=self._parameter_sharding != "replicate",
            attention=self._attention,
            backend="aot_eager" if self._compile_backend == "aot_eager" else "inductor",
            **options,
        )

    # Processes and ranks.

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def is_distributed(self) -> bool:
        """Whether ranks see different samples: Lightning then injects samplers and honours `sync_dist=True`.

        With one sequence group there is nothing to distribute. Samples come in the one-device order, from the user's own sampler.
        """
        return self._mesh is None or self.data_parallel_size > 1

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @property
    def process_group_backend(self) -> str | None:
        """The name of the communication backend."""
        return self._process_group_backend

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh with axes `data_parallel` and `sequence_parallel`."""
        return self._meshes.mesh

    @property
    def _meshes(self) -> ParallelMesh:
        if self._mesh is None:
            raise RuntimeError("The device mesh does not exist before the Trainer has started its processes.")
        return self._mesh

    @property
    def data_parallel_size(self) -> int:
        """Number of sequence groups, each with samples of its own."""
        return self._meshes.data_size

    @property
    def data_parallel_rank(self) -> int:
        """Which of them this process is in: what to shard custom samplers by."""
        return self._meshes.data_rank

    @property
    def sequence_parallel_size(self) -> int:
        """Number of ranks that share one sequence."""
        return self._meshes.sequence_size

    @property
    def sequence_parallel_rank(self) -> int:
        """This process's place among them."""
        return self._meshes.sequence_rank

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.data_parallel_size, "rank": self.data_parallel_rank}

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self._start_method == "popen":
            if not self.cluster_environment.creates_processes_externally:
                self._launcher = ScriptLauncher(
                    self.cluster_environment, self.num_processes, self.num_nodes, lambda: self._mesh is not None
                )
        else:
            self._launcher = _MultiProcessingLauncher(self, start_method=self._start_method)  # type: ignore[arg-type]

    def set_world_ranks(self) -> None:
        """Tell the environment this process's place (called by Lightning's connector)."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        fabric_rank_zero_only.rank = rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @override
    def connect(self, model: LightningModule) -> None:
        _refuse_module(model)
        super().connect(model)

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.set_world_ranks()
        data, sequence = resolve_sizes(*self._asked_sizes, self.num_nodes * self.num_processes)  # type: ignore[arg-type]
        reset_seed()
        self._process_group_backend = self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)
        assert self.cluster_environment is not None
        options: dict[str, Any] = {} if self._timeout is None else {"timeout": self._timeout}
        if self.root_device.type != "cpu":
            options["device_id"] = self.root_device
        _init_dist_connection(self.cluster_environment, self._process_group_backend, **options)
        if self._mesh is None:
            self._mesh = ParallelMesh.create(self.root_device.type, data, sequence, self._timeout)
        if self.world_size > 1:
            self._watch = Watch(self.global_rank, self.world_size, self._doing)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._mesh.mesh

    # Set-up and teardown.

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert self.model is not None
        module = self.lightning_module
        assert module is not None
        self.accelerator.setup(trainer)
        _refuse_module(module)
        if self._layer_sync is not None:
            raise MisconfigurationException(
                "sync_batchnorm=True is not supported by strategy 'autosp': sequence groups already compute batch statistics over "
                "the whole batch of their group. Use sync_batchnorm=False."
            )
        if trainer.state.fn == TrainerFn.FITTING and not module.automatic_optimization:
            raise MisconfigurationException(
                "automatic_optimization=False is not supported by strategy 'autosp': the step is compiled as one graph, which an "
                "optimizer step in the middle would cut. Use automatic optimization."
            )
        if self.world_size > 1 and any(isinstance(callback, BatchSizeFinder) for callback in getattr(trainer, "callbacks", ())):
            raise MisconfigurationException(
                "BatchSizeFinder is not supported by strategy 'autosp' on several ranks: one of them running out of memory would "
                "leave the others waiting. Choose batch_size by hand."
            )
        self.model = self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        meshes = self._meshes
        count_sequences_once(trainer, meshes.sequence_size, self.data_parallel_size)
        _sync_module_states(module)
        self._share_random_state()
        sharded = self._shards_parameters(trainer)
        if self._saved is not None and trainer.state.fn == TrainerFn.FITTING:
            self._saved.refuse_run(type(module).__name__, meshes.sequence_size, self.world_size, sharded=sharded)
        self._parameters = ModuleParameters(module, meshes.flat, meshes.all_ranks(), sharded=sharded and self.world_size > 1)
        self._optimized_names = {id(parameter): name for name, parameter in self._parameters.owned.items()}
        for metric in (m for m in module.modules() if isinstance(m, Metric)):
            self._metric_groups.append((metric, metric.process_group))
            metric.process_group = metric.process_group or meshes.data_group
        if trainer.state.fn == TrainerFn.FITTING:
            # After an earlier fit, its optimizers still point at parameters that are no longer the module's.
            self._reset_optimizers_and_schedulers()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)
        self._compiler = Compiler(
            mesh=meshes.mesh[SEQUENCE_AXIS],
            group=meshes.sequence(),
            backend=resolve_backend(self._compile_backend, self.root_device),
            report=self.report,
            kind="",
            rank_seed=self.global_rank,
            strict=self._strict,
            memory=self._memory_options(),
            saved=self._saved,
            attention=self._attention_options(),
        )

    def _attention_options(self) -> AttentionOptions:
        roofline = device_of(self.root_device).roofline
        speeds = torch.tensor([roofline.flops, roofline.link], dtype=torch.float64, device=self.root_device)
        if self.world_size > 1:  # what is chosen shapes the graphs
            dist.all_reduce(speeds, dist.ReduceOp.MIN)
        flops, link = speeds.tolist()
        return AttentionOptions(self._attention, flops, link, self.num_processes)

    def _shards_parameters(self, trainer: Trainer) -> bool:
        """Whether parameters are sharded over all ranks.

        Raises:
            MisconfigurationException: If they are to be, and a callback averages them with whole copies of its own.
        """
        averaging = [
            one for one in getattr(trainer, "callbacks", ()) if isinstance(one, (StochasticWeightAveraging, WeightAveraging))
        ]
        if self.world_size == 1 or self._parameter_sharding == "replicate":
            return False
        if averaging and trainer.state.fn == TrainerFn.FITTING:
            name = type(averaging[0]).__name__
            if self._parameter_sharding == "full":
                raise MisconfigurationException(
                    f"{name} keeps whole copies of parameters, which it cannot average with parts of them "
                    "(parameter_sharding='full'). Use parameter_sharding='replicate' or 'auto'."
                )
            self._say(f"parameters are replicated: {name} averages whole ones")
            return False
        return True

    def _memory_options(self) -> MemoryOptions:
        device = device_of(self.root_device)
        share = device.memory // (self.num_processes if self.root_device.type == "cpu" else 1)
        limit = share
        if self._memory_limit != "auto":
            limit = limit_bytes(self._memory_limit, share)
        elif self.root_device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.root_device)
            limit = free + torch.cuda.memory_reserved(self.root_device)
        host_limit = self._host_limit()
        if self.world_size > 1:  # what is chosen shapes the graphs, whose collectives all ranks have to meet in
            smallest = torch.tensor([limit, host_limit], device=self.root_device)
            dist.all_reduce(smallest, dist.ReduceOp.MIN)
            limit, host_limit = smallest.tolist()
        return MemoryOptions(
            policy=self._checkpoint_policy,
            limit=limit,
            refuse=self._memory_limit != "auto",
            roofline=device.roofline,
            overhead=device.overhead,
            host_limit=host_limit,
            states=self._states_held,
            fused=resolve_backend(self._compile_backend, self.root_device) == "inductor",
            agree=self._agree_on_memory,
            one_decision=self.data_parallel_size > 1,
        )

    def _host_limit(self) -> int:
        """Return the bytes this rank may keep on the host: of what is free there, other processes may want some, too."""
        if self._checkpoint_policy == "offload" or (self._saved is not None and self._saved.decision.moved):
            require_pinning(self.root_device)
        elif self._checkpoint_policy != "auto" or self.root_device.type != "cuda":
            return 0
        share = free_host_memory() // self.num_processes
        if self._host_memory_limit == "auto":
            return int(share * FREE_HOST_MEMORY)
        return limit_bytes(self._host_memory_limit, share, "host_memory_limit")

    def _agree_on_memory(self, own: T) -> T:
        """Return what the first rank decided: of the sequence group, or of all where other groups may have other lengths."""
        group = None if self.data_parallel_size > 1 else self._meshes.sequence_group
        decided = [own]

        def broadcast() -> None:
            if self.root_device.type == "cuda":
                torch.cuda.set_device(self.root_device)
            dist.broadcast_object_list(decided, src=dist.get_process_group_ranks(group)[0] if group else 0, group=group)

        if self.world_size > 1:
            # A graph is being traced, and what is sent must not become part of it: tracing is a thread's own matter.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(broadcast).result()
        return decided[0]

    def _states_held(self) -> States:
        """Return what this rank holds besides what a step takes. Of uneven parts, the first rank's are the largest."""
        assert self._parameters is not None
        assert self.lightning_module is not None
        parts = self._parameters.largest_parts()
        trained = {name for name, parameter in self._parameters.owned.items() if parameter.requires_grad}
        buffers = sum(buffer.nbytes for buffer in self.lightning_module.buffers())
        by_id = {id(parameter): parts[name] for name, parameter in self._parameters.owned.items()}
        found = [
            optimizer_memory(optimizer, lambda parameter: by_id.get(id(parameter), parameter)) for optimizer in self.optimizers
        ]
        accumulates = self.lightning_module.trainer.accumulate_grad_batches > 1
        return States(
            parameters=sum(part.nbytes for part in parts.values()) + buffers,
            gradients=sum(part.nbytes for name, part in parts.items() if name in trained) if accumulates else 0,
            optimizer=sum(state for state, _ in found),
            optimizer_step=max((step for _, step in found), default=0),
        )

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def _share_random_state(self) -> None:
        """Give all ranks of a sequence group the first one's random state: between graphs they are to do the same."""
        group = self._meshes.sequence_group
        first = dist.get_process_group_ranks(group)[0]
        states = [torch.get_rng_state(), torch.cuda.get_rng_state(self.root_device) if self.root_device.type == "cuda" else None]
        dist.broadcast_object_list(states, src=first, group=group)
        assert states[0] is not None
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], self.root_device)

    def _doing(self) -> str:
        """Return what the Trainer is at, for people."""
        trainer = self.lightning_module.trainer if self.lightning_module is not None else None
        if trainer is None or trainer.state.stage is None:
            return "set-up"
        return f"{trainer.state.stage.value}, step {trainer.global_step}" if trainer.training else str(trainer.state.stage.value)

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed = True
        if self._watch is not None and not _reaches_all(exception):
            self._watch.fail(exception)

    @override
    def teardown(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._preemption.close()
        self._print_report()
        self._steps.clear()
        self._steps_of.clear()
        self._before, self._planned_again = None, False
        self._checked_stages.clear()
        for metric, group in self._metric_groups:
            metric.process_group = group
        self._metric_groups.clear()
        for dataset in self._sharded_datasets:
            dataset.shard_sequence(0, 1)
        self._sharded_datasets.clear()
        if self._parameters is not None:
            self._parameters.restore(values=not self._failed)
        self._parameters, self._failed = None, False
        if self.lightning_module is not None:
            self.lightning_module._device_mesh = None
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    def __getstate__(self) -> dict[str, Any]:
        # Spawned processes get the strategy before it is set up; what setup makes cannot travel.
        return {**super().__getstate__(), "_steps": {}, "_mesh": None, "_parameters": None, "_metric_groups": []}

    # Data.

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        groups = self._meshes.host
        source, reason = choose_source(dataloader, self._batch_source, groups)
        if self.world_size > 1 and (error := loader_error(source, number_of_batches(dataloader))):
            raise MisconfigurationException(f"{self._stage()}{error}")
        if int(os.environ.get("PL_SEED_WORKERS", 0)) and getattr(dataloader, "worker_init_fn", False) is None:
            # Lightning would seed by global rank, and ranks that load the same samples would augment them differently.
            rank = self.global_rank if source == "exchange" else self.data_parallel_rank
            dataloader.worker_init_fn = functools.partial(pl_worker_init_function, rank=rank)
        if groups.size > 1:
            self._say(f"{self._stage()}batches are {SOURCES[source]}: {reason}")
        if source == "sharded" and groups.size > 1:
            for dataset in sharded_datasets(dataloader.dataset):
                dataset.shard_sequence(groups.rank, groups.size)
                self._sharded_datasets.append(dataset)
        if not self._trains():
            return share(dataloader, source, groups, self._say)
        loader, order = reordered(dataloader, self.data_parallel_size)
        loader = share(loader, source, groups, self._say)
        return loader if order is None else PositionedLoader(dataloader, loader, order, self._epoch())

    def _trains(self) -> bool:
        """Whether the loader that is being processed is for training: it may be before that begins, for its length."""
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        return trainer.state.fn == TrainerFn.FITTING and not (trainer.validating or trainer.sanity_checking)

    def _epoch(self) -> Epoch:
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer

        def batches(loader: PositionedLoader) -> int:
            combined = trainer.fit_loop._combined_loader
            limits = zip(combined.flattened, combined.limits or (), strict=False) if combined is not None else ()
            return next((int(min(len(loader), limit)) for one, limit in limits if one is loader and limit is not None), len(loader))

        def alone() -> bool:
            combined = trainer.fit_loop._combined_loader
            return combined is None or len(combined.flattened) == 1

        def set_progress(batches: int) -> None:
            progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            unfinished = progress.processed - progress.completed  # saved before the batch was counted
            progress.ready = progress.started = progress.processed = batches
            progress.completed = batches - unfinished

        return Epoch(batches, alone, set_progress, self.root_device)

    @override
    def on_train_start(self) -> None:
        # Whoever asks for the number of batches in configure_optimizers has the loaders made before the checkpoint is read.
        assert self.lightning_module is not None
        loop = self.lightning_module.trainer.fit_loop
        if getattr(loop, "_combined_loader_states_to_load", None):
            loop._load_combined_loader_states()

    def _stage(self) -> str:
        stage = self.lightning_module.trainer.state.stage if self.lightning_module is not None else None
        return f"{stage.dataloader_prefix} " if stage is not None else ""

    def _say(self, note: str) -> None:
        if note not in self.report.notes:
            self.report.notes.append(note)
            rank_zero_info(f"lightning-autosp: {note}")

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        batch = super().batch_to_device(batch, device, dataloader_idx)
        module = self.lightning_module
        if module is None or self._parameters is None:
            return batch
        if self.world_size > 1:
            self._preemption.before_batch([self._meshes.host.sequence, self._meshes.host.data])
        stage = (module.trainer.state.stage, dataloader_idx)
        shards = sequence_shards(batch)
        if shards and stage not in self._checked_stages:  # what they are slices of, before they are put together
            known = [torch.tensor([*shard.samples, *shard.shape()]) for shard in shards]
            if error := agree(None, checksum(known), self.data_parallel_rank):
                raise MisconfigurationException(f"{module.trainer.state.stage.value}: {error}")  # type: ignore[union-attr]
        batch = assemble(batch, self._meshes.sequence_group, self._part)
        error, total = self._look_at(batch, all_named=module.trainer.training)
        if stage not in self._checked_stages and self.world_size > 1:
            self._checked_stages.add(stage)
            error = agree(error, total(), self.data_parallel_rank)
        if error is not None:
            raise MisconfigurationException(f"{module.trainer.state.stage.value}: {error}")  # type: ignore[union-attr]
        return batch

    def verify_batch(self, batch: Any) -> None:
        """Compare a batch over the ranks, as is done for the first one of each stage. Every rank has to call it.

        Raises:
            MisconfigurationException: If the batch is unfit, or ranks of a sequence group hold different ones.
        """
        error, total = self._look_at(batch)
        error = agree(error, total(), self.data_parallel_rank)
        if error is not None:
            raise MisconfigurationException(error)

    def _part(self, shard: SequenceShard) -> Tensor:
        """Return a tensor of the whole's shape of which this rank holds its slice."""
        shape, dim = shard.shape(), shard.local.ndim + shard.dim
        crossing = Crossing("a slice", "the batch", math.prod(shape) * shard.local.element_size())
        group = self._meshes.sequence()
        return PartTensor.of(shard.local.contiguous(), shape, Placement(dim, 1, 1, 0, 0), group, crossing, aliased=False)

    def _look_at(self, batch: Any, *, all_named: bool = False) -> tuple[str | None, Callable[[], int]]:
        """Return what is wrong with a batch, and what gives its checksum."""
        tensors = list(found_tensors(batch))
        error = batch_error(tensors, self.sequence_dim, self.sequence_parallel_size, all_named=all_named)
        for one in tensors:
            placement, dim = placement_of(one.tensor), named_dim(one.names, self.sequence_dim)
            if placement is not None and placement.dim != dim:
                error = error or (
                    f"batch{one.place} comes in slices of dimension {placement.dim}, and {shown_dim(self.sequence_dim)}. "
                    "Name the dimension by the tensor's key."
                )
        whole = [one.tensor for one in tensors if placement_of(one.tensor) is None]
        return error, lambda: checksum(whole)  # of slices, the samples' numbers have been compared

    # Steps.

    def _step(
        self,
        kind: str,
        context: AbstractContextManager[None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        repeated: bool = False,
    ) -> Any:
        module = self.lightning_module
        assert module is not None
        assert self._parameters is not None
        if kind not in self._steps:
            all_come = self._watch.all_come if self._watch is not None else lambda: True
            self._steps[kind] = CompiledStep(module, kind, self._compiler, self._parameters, self.sequence_dim, all_come=all_come)
        with context:
            return self._steps[kind].repeat(*args, **kwargs) if repeated else self._steps[kind](*args, **kwargs)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._read_peak()
        module = self.lightning_module
        assert module is not None
        shapes = tuple(tensor.shape for tensor in batch_tensors((args, kwargs)))
        self._steps_of[shapes] += 1
        self._before = Before.of(module, args, kwargs, self.root_device) if self._steps_of[shapes] <= FIRST_STEPS else None
        run = functools.partial(self._step, "training_step")
        result = self._run_or_plan_again(
            "forward",
            lambda: run(self.precision_plugin.train_step_context(), args, kwargs),
            lambda before: run(self.precision_plugin.train_step_context(), *before.arguments),
        )
        loss = _loss_of(result)
        if isinstance(loss, Tensor):
            _refuse_loss(loss, self._checkpoint_policy)
            if self._before is not None:
                self._look_for_numbers(loss.item(), self._before)
        return result

    def _look_for_numbers(self, loss: float, before: Before) -> None:
        """Say of a loss in the first steps that is NaN or infinite where that comes from."""
        module = self.lightning_module
        assert module is not None
        ok, where = math.isfinite(loss), None
        if self.data_parallel_size > 1 and self._steps_of.total() <= FIRST_STEPS:  # what is run once more gathers parameters
            bad = torch.tensor(int(not ok))
            for group in (self._meshes.host.sequence, self._meshes.host.data):
                dist.all_reduce(bad, dist.ReduceOp.MAX, group=group)
            if bad:
                where = self._located(loss, before)
        elif self.data_parallel_size == 1 and not ok:
            where = self._located(loss, before)
        if ok:
            return
        args, kwargs = before.arguments
        why = not_finite(args[0] if args else kwargs, module, self.sequence_dim, self.sequence_parallel_size)
        note = (
            f"the loss is {loss} in step {module.trainer.global_step} on rank {self.global_rank} (sequence group "
            f"{self.data_parallel_rank}): {why or where or 'batch and parameters are finite, so it comes from within the step'}"
        )
        if note not in self.report.notes:
            self.report.notes.append(note)
            if self.sequence_parallel_rank == 0 or "parameter" in why:  # the others of a group have the same batch and loss
                warnings.warn(f"lightning-autosp: {note}.", stacklevel=2)

    def _located(self, loss: float, before: Before) -> str | None:
        """Return where in the step the first value that is no number arises. Every rank has to call it."""
        step, module = self._steps["training_step"], self.lightning_module
        assert module is not None
        if not step.is_one_graph:
            return None
        args, kwargs = before.arguments
        after = Before.of(module, args, kwargs, self.root_device)
        before.restore_random()
        with self.precision_plugin.train_step_context():
            own = step.locate(*args, nan=math.isnan(loss), **kwargs)
        after.restore()
        found: list[Any] = [None] * self.sequence_parallel_size
        dist.all_gather_object(found, own, group=self._meshes.host.sequence)
        places = [(place.order, rank, place) for rank, place in enumerate(found) if place is not None]
        if not places:
            return None
        _, rank, place = min(places, key=lambda one: one[:2])
        return described(place, self._meshes.host.global_rank(rank), loss, call_tensors(args, kwargs), self.sequence_dim)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        backward = super().backward
        module = self.lightning_module
        assert module is not None

        def again(before: Before) -> None:
            context = self.precision_plugin.train_step_context()
            result = self._step("training_step", context, *before.arguments, repeated=True)
            backward(_loss_of(result) / module.trainer.accumulate_grad_batches, optimizer, *args, **kwargs)

        self._run_or_plan_again("backward", lambda: backward(closure_loss, optimizer, *args, **kwargs), again, closure_loss)
        self._before = None

    def _run_or_plan_again(self, phase: str, run: Callable[[], T], again: Callable[[Before], T], loss: Tensor | None = None) -> T:
        """Run a part of a training step; if the first steps run out of memory, plan with more set aside, and run the step again.

        Args:
            phase: "forward" or "backward".
            run: Does it.
            again: Does it with what there was before the step.
            loss: Of the forward whose backward it is.

        Raises:
            torch.OutOfMemoryError: With what was predicted, if that does not help, on every rank that can say so.
        """
        before = self._before
        if before is None:
            return run()
        meshes = self._meshes
        groups = [dist.group.WORLD, meshes.sequence_group, meshes.data_group, meshes.flat.get_group()]
        name = f"{meshes.flat.get_group().group_name}/{self._meetings}"
        meeting = Meeting(name, self.global_rank, self.world_size, groups)  # type: ignore[arg-type]
        gradients = Gradients(list(self._parameters.owned.values()) if self._parameters and phase == "backward" else [])
        try:
            return run()
        except torch.OutOfMemoryError as error:
            failed = error.with_traceback(None)  # its frames hold what the step made
        except RuntimeError as error:
            others = meeting.others()
            if others:
                raise self._out_of_memory(phase, f"rank {others[0]} ran out of memory, and this one waited for it") from error
            raise
        if loss is not None:
            loss.detach_()  # what was kept for backward goes
        hopeless = self._why_hopeless() or ("" if gradients.undo() else "gradients were partly added to those of earlier batches")
        cuda = self.root_device.type == "cuda"
        measured = torch.cuda.max_memory_allocated(self.root_device) if cuda else 0
        hopeless, measured = meeting.wait(meeting.report(phase, hopeless, measured))
        if hopeless:
            raise self._out_of_memory(phase, hopeless) from failed
        self._plan_with_less(phase, measured)
        del failed
        gc.collect()
        if cuda:
            torch.cuda.synchronize(self.root_device)
            torch.cuda.empty_cache()
        before.restore()
        try:
            return again(before)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(phase, "memory was planned again, and the step still takes too much") from error

    def _why_hopeless(self) -> str:
        """Return why planning again would not help; "" if it may."""
        step = self._steps.get("training_step")
        if self._planned_again:
            return "memory has been planned again already"
        if self._saved is not None or self._checkpoint_policy != "auto":
            asked = f"checkpoint_policy={self._checkpoint_policy!r}" if self._saved is None else f"plan={self._saved.path!r}"
            return f"{asked} leaves nothing to choose"
        if step is None or not step.is_one_graph:
            return "the step is not one graph, and pieces of it that ran cannot be undone"
        return "" if self._training_estimates() else "it was not planned yet"

    def _training_estimates(self) -> list[MemoryEstimate]:
        return [step.memory for step in self.report.steps if step.kind == "training_step" and step.memory is not None]

    def _plan_with_less(self, phase: str, measured: int) -> None:
        """Have the training step compiled again, with so much set aside that what did not fit does not seem to."""
        memory = self._compiler.memory
        assert memory is not None
        last = self._training_estimates()[-1]
        excess = max(measured - last.peak, (last.limit or 0) - last.peak, 0) + last.peak // 20
        self._compiler = replace(self._compiler, memory=replace(memory, overhead=memory.overhead + excess, decisions={}))
        del self._steps["training_step"]
        self._planned_again = True
        self._meetings += 1
        note = (
            f"training_step: out of memory in {phase}, {format_bytes(last.peak)} predicted; "
            f"planned again with {format_bytes(excess)} more set aside"
        )
        self.report.notes.append(note)
        rank_zero_warn(f"lightning-autosp: {note}.")

    def _out_of_memory(self, phase: str, why: str) -> torch.OutOfMemoryError:
        rows = [row for one in self._training_estimates() for row in one.rows()]
        table = "\n".join(f"  {head:<12} {text}" for head, text in rows)
        return torch.OutOfMemoryError(
            f"Out of memory in {phase} of the training step: {why}. What was predicted:\n{table}\n"
            "Use a shorter sequence, more ranks, or a smaller memory_limit (what the device has free may not be all in one piece); "
            "`autosp plan` shows what every checkpoint policy takes."
        )

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("validation_step", self.precision_plugin.val_step_context(), args, kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("test_step", self.precision_plugin.test_step_context(), args, kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return self._step("predict_step", self.precision_plugin.predict_step_context(), args, kwargs)

    def _read_peak(self) -> None:
        """Put what the first steps took, read at the next, beside what was predicted."""
        if self.root_device.type != "cuda" or self._peaks_read > PEAKS:
            return
        estimates = [step.memory for step in self.report.steps if step.kind == "training_step" and step.memory is not None]
        if self._peaks_read and len(estimates) == 1:
            estimates[0].measured = torch.cuda.max_memory_allocated(self.root_device)
        if self._peaks_read == PEAKS and len(estimates) == 1:
            rank_zero_info(f"lightning-autosp: {estimates[0].rows()[0][1]}")
        torch.cuda.reset_peak_memory_stats(self.root_device)
        self._peaks_read += 1

    def flops_of_last(self, kind: str) -> float | None:
        """Return the floating-point operations of the last step of a kind on one device; `None` if it is not compiled.

        Those of products and attentions, in forward and, if it has one, backward, as PyTorch's `FlopCounterMode` counts them. What
        is computed again to save memory is left out; a causal attention counts whole.
        """
        return sum(one.model_flops() for one in self.report.last.get(kind, [])) or None

    def memory_of_last(self, kind: str) -> dict[str, int]:
        """Return `predicted_bytes`, the most that a rank takes in such a step, and on CUDA `measured_bytes`."""
        programs = [one.report.memory for one in self.report.last.get(kind, [])]
        peaks = [memory.peak for memory in programs if memory is not None]
        found = {"predicted_bytes": max(peaks)} if peaks else {}
        if self.root_device.type == "cuda":
            found["measured_bytes"] = torch.cuda.max_memory_allocated(self.root_device)
        return found

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        self._print_report()

    def _print_report(self) -> None:
        if not self._printed and self.report.steps and self.is_global_zero:
            self.report.print()
        self._printed = self._printed or bool(self.report.steps)

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Give the module whole parameters for code outside the steps (sampling text in a callback). Every rank has to enter it."""
        assert self._parameters is not None, "only while the Trainer runs"
        return self._parameters.whole()

    # Communication.

    @override
    def barrier(self, name: str | None = None) -> None:
        if _distributed_is_initialized():
            device_ids = [self.root_device.index] if dist.get_backend() == "nccl" else None
            dist.barrier(device_ids=device_ids)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not _distributed_is_initialized():
            return obj
        objects = [obj]
        dist.broadcast_object_list(objects, src)
        return objects[0]

    @override
    def reduce(self, tensor: Tensor | Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the data axis by default: the ranks of a sequence group already hold the same value."""
        if isinstance(tensor, Tensor):
            return _sync_ddp_if_available(tensor, group or self._meshes.data_group, reduce_op=reduce_op)
        return tensor

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        """Gather over the data axis by default, so that no sample appears twice."""
        return super().all_gather(tensor, group=group or self._meshes.data_group, sync_grads=sync_grads)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        # Over every rank, not the data axis: the base class compares the sum with the world size.
        votes = torch.tensor(int(decision), device=self.root_device)
        if _distributed_is_initialized():
            dist.all_reduce(votes)
        return bool(votes == self.world_size) if all else bool(votes)

    # Checkpoints.

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = self.lightning_module
        assert module is not None
        self._refuse_saving_alone(module.trainer)
        if self._parameters is None or not self._parameters.sharded:
            return module.state_dict()
        if self._state_dict_type == "sharded":
            return {}
        state = gather_to_cpu(module.state_dict(), keep=self.is_global_zero)
        return state if self.is_global_zero else {}

    def _refuse_saving_alone(self, trainer: Trainer) -> None:
        """Raise where a callback saves because of an error that not all ranks have: saving takes all of them."""
        error = sys.exc_info()[1]
        if self._watch is None or error is None or trainer.state.status != TrainerStatus.INTERRUPTED or _reaches_all(error):
            return
        if not self._watch.fail(error):
            raise RuntimeError(f"No checkpoint is saved, which takes all ranks. {self._watch.verdict}") from error

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        return {} if self._state_dict_type == "sharded" else checkpoints.optimizer_state(optimizer, keep=self.is_global_zero)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None) -> None:
        path = Path(self.broadcast(filepath))  # names may hold metrics, which ranks may format differently
        set_aside(checkpoint)
        if self._state_dict_type == "full":
            if checkpoints.is_distributed_checkpoint(path):
                raise IsADirectoryError(
                    f"{path} is a distributed checkpoint; state_dict_type='full' writes a file. Choose another path."
                )
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        if storage_options is not None:
            raise TypeError(
                "storage_options has no effect with state_dict_type='sharded', which torch.distributed.checkpoint writes"
            )
        assert self.lightning_module is not None
        checkpoints.save_distributed(
            checkpoint, path, self.lightning_module, self.optimizers, self._optimized_names, is_first=self.is_global_zero
        )

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = checkpoints.whole_checkpoint(Path(self.broadcast(checkpoint_path)))
        if checkpoints.is_distributed_checkpoint(path):
            assert self.lightning_module is not None
            checkpoint = checkpoints.load_distributed_module(path, self.lightning_module, weights_only=weights_only)
        else:
            checkpoint = super().load_checkpoint(path, weights_only)
        put_back(checkpoint)
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        if self._parameters is None:
            module.load_state_dict(checkpoint["state_dict"], strict=strict)
        else:
            self._parameters.load(checkpoint["state_dict"], strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.lightning_module is not None
        assert self._parameters is not None
        if "distributed_path" in checkpoint:
            checkpoints.load_distributed_optimizers(Path(checkpoint["distributed_path"]), self.lightning_module, self.optimizers)
            return
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            checkpoints.load_optimizer(optimizer, state, self._parameters)
        _optimizers_to_device(self.optimizers, self.root_device)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for name, method in {"autosp": "popen", "autosp_spawn": "spawn", "autosp_fork": "fork", "autosp_notebook": "fork"}.items():
            if name not in strategy_registry:
                strategy_registry.register(name, cls, description=f"Sequence parallel, processes by {method}", start_method=method)


def refuse_pytorch_lightning(**options: Any) -> None:
    """Stand in for the strategy in `pytorch_lightning`'s registry.

    Raises:
        MisconfigurationException: Always. Its Trainer would take a `lightning.pytorch` strategy for an undistributed one.
    """
    raise MisconfigurationException(
        "Strategy 'autosp' works with lightning.pytorch, and this Trainer is pytorch_lightning's, a different package. "
        "Import Trainer and LightningModule from lightning.pytorch."
    )


def _require_size(name: str, value: Any) -> None:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{name}={value!r} is not known. Use 'auto' or a number of ranks, 1 or larger.")


def _require_dim(value: Any) -> None:
    dims = list(value.values()) if isinstance(value, Mapping) else [value]
    names = list(value) if isinstance(value, Mapping) else ["0"]
    if not names or any(not isinstance(dim, int) or isinstance(dim, bool) or dim < 0 for dim in dims):
        raise ValueError(
            f"sequence_dim={value!r} is not known. Use a dimension number, 0 or larger, or one for each key of the batch."
        )
    if any(not isinstance(name, str) for name in names):
        raise ValueError(f'sequence_dim={value!r} names what is no text. Use keys, fields, or places in a tuple ("0").')


def _require_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name}={value!r} is not known. Use one of {', '.join(map(repr, get_args(choices)))}.")


def _refuse_module(module: nn.Module) -> None:
    """Raise for a module that something else already compiles, wraps or shards."""
    if getattr(module, "_compiler_ctx", None) is not None:
        raise MisconfigurationException(
            f"{type(module).__name__} is already compiled. Strategy 'autosp' compiles the steps itself: pass the module "
            "without torch.compile."
        )
    for name, submodule in module.named_modules():
        where = f"submodule {name!r}" if name else type(module).__name__
        if isinstance(submodule, OptimizedModule) or getattr(submodule, "_compiled_call_impl", None) is not None:
            raise MisconfigurationException(
                f"{where} is already compiled. Strategy 'autosp' compiles the steps itself: leave torch.compile away."
            )
        if isinstance(submodule, (DistributedDataParallel, FullyShardedDataParallel, FSDPModule)):
            raise MisconfigurationException(
                f"{where} is already wrapped by {type(submodule).__name__}. Strategy 'autosp' shards parameters and reduces "
                f"gradients itself: pass plain modules."
            )
    placed = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
    if placed:
        plain = [name for name, parameter in module.named_parameters() if not isinstance(parameter, DTensor)]
        mixture = f", others ({plain[0]!r}, ...) are plain" if plain else ""
        raise MisconfigurationException(
            f"{len(placed)} parameter(s) ({placed[0]!r}, ...) are DTensors already{mixture}. Strategy 'autosp' needs plain "
            f"parameters: it shards them itself (parameter_sharding='full')."
        )


def _reaches_all(error: BaseException) -> bool:
    """Whether all ranks have it: by a broadcast of Lightning's, or by the terminal."""
    return isinstance(error, (SIGTERMException, KeyboardInterrupt))


def _loss_of(result: Any) -> Any:
    return result["loss"] if isinstance(result, Mapping) and "loss" in result else result


def _refuse_loss(loss: Tensor, policy: str) -> None:
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"training_step returned a loss of shape {tuple(loss.shape)}; it has to be a scalar. Reduce it with .mean() or .sum()."
        )
    if not loss.requires_grad:
        asked = "" if policy == "auto" else f" There is no backward that checkpoint_policy={policy!r} could apply to."
        raise MisconfigurationException(
            "training_step returned a loss without a gradient: it was detached, computed under torch.no_grad(), or depends on "
            f"no parameter that requires one.{asked} Return the loss as it was computed, and leave some parameters trainable."
        )
