"""The data x sequence mesh of processes and its sizes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_autosp import _compat
from lightning_autosp.collectives import Group
from lightning_autosp.data.sources import Groups

__all__ = ["DATA_AXIS", "SEQUENCE_AXIS", "ParallelMesh", "resolve_sizes"]

DATA_AXIS, SEQUENCE_AXIS = "data_parallel", "sequence_parallel"


def resolve_sizes(data: int | Literal["auto"], sequence: int | Literal["auto"], world_size: int) -> tuple[int, int]:
    """Return `(data_parallel_size, sequence_parallel_size)`.

    What is `"auto"` is filled up to the world size; when both are, every rank is a sequence rank.

    Raises:
        ValueError: If the product cannot be the world size.
    """
    asked = f"data_parallel_size={data!r} and sequence_parallel_size={sequence!r}"
    if data == "auto":
        fixed = 1 if sequence == "auto" else sequence
        data = 1 if sequence == "auto" else world_size // fixed
    if sequence == "auto":
        sequence = world_size // data
    if data * sequence != world_size:
        raise ValueError(
            f"{asked} do not fit {world_size} process(es): data_parallel_size * sequence_parallel_size must be {world_size} "
            f"(devices * num_nodes). Choose sizes that multiply to it, or leave one of them 'auto'."
        )
    return data, sequence


@dataclass(frozen=True)
class ParallelMesh:
    """The mesh, its two axes as process groups, and all ranks as one flat mesh for sharding parameters."""

    mesh: DeviceMesh
    flat: DeviceMesh
    timeout: timedelta | None = None
    """Of collectives; `None`: torch's."""

    @classmethod
    def create(cls, device_type: str, data_size: int, sequence_size: int, timeout: timedelta | None = None) -> ParallelMesh:
        """Build the mesh. Ranks of one sequence group are neighbours, hence on one node as far as they fit."""
        mesh = init_device_mesh(device_type, (data_size, sequence_size), mesh_dim_names=(DATA_AXIS, SEQUENCE_AXIS))
        flat = init_device_mesh(device_type, (data_size * sequence_size,), mesh_dim_names=("all_ranks",))
        made = cls(mesh, flat, timeout)
        if timeout is not None:
            for group in (made.data_group, made.sequence_group, flat.get_group()):
                _compat.set_timeout(group, timeout)
        return made

    @property
    def data_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group(DATA_AXIS)

    @property
    def sequence_group(self) -> dist.ProcessGroup:
        return self.mesh.get_group(SEQUENCE_AXIS)

    @property
    def data_size(self) -> int:
        return self.mesh[DATA_AXIS].size()

    @property
    def data_rank(self) -> int:
        return self.mesh[DATA_AXIS].get_local_rank()

    @property
    def sequence_size(self) -> int:
        return self.mesh[SEQUENCE_AXIS].size()

    @property
    def sequence_rank(self) -> int:
        return self.mesh[SEQUENCE_AXIS].get_local_rank()

    def sequence(self) -> Group:
        """Return the sequence group as graphs see it."""
        return Group.of(self.sequence_group)

    def all_ranks(self) -> Group:
        """Return all ranks, data times sequence, as graphs see them."""
        return Group.of(self.flat.get_group())

    @functools.cached_property
    def host(self) -> Groups:
        """Return groups for values in host memory. Every rank has to be the first time at the same place."""
        sequence, data = self.sequence_group, self.data_group
        if self.data_size * self.sequence_size > 1 and "gloo" not in dist.get_backend(sequence):
            ranks = self.mesh.mesh
            rank = dist.get_rank()
            for one in ranks.tolist():
                made = dist.new_group(one, backend="gloo", timeout=self.timeout)
                sequence = made if rank in one else sequence
            for one in ranks.T.tolist():
                made = dist.new_group(one, backend="gloo", timeout=self.timeout)
                data = made if rank in one else data
        return Groups(sequence, data, self.data_size * self.sequence_size)
