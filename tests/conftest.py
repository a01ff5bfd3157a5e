"""Shared set-up: fixed seeds, and a clean Dynamo, environment and process group for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from pool import Pool

torch.set_num_threads(1)  # tests run side by side, and their tensors are small


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch.manual_seed(0)
    environment = dict(os.environ)
    yield
    torch._dynamo.reset()
    # A Trainer run in this process leaves ranks in the environment, which a script started later would take for its own.
    os.environ.clear()
    os.environ.update(environment)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Gloo ranks, as many as were asked for at most, that live as long as the session."""
    ranks = Pool()
    yield ranks
    ranks.close()
