"""Shared set-up: fixed seeds, and a clean Dynamo for every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pool import Pool


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Gloo ranks, as many as were asked for at most, that live as long as the session."""
    ranks = Pool()
    yield ranks
    ranks.close()
