"""Running out of memory in the first steps: planned again once, nothing lost; or an error on every rank, and no rank hangs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import jobs
import modules
import pytest
import torch
from lightning.pytorch.plugins.precision import Precision
from pool import JobError, Pool
from test_fit import assert_same
from torch import Tensor
from torch.nn import functional as F

from lightning_autosp import recovery
from lightning_autosp.compiler.specialise import LoweredStep

pytestmark = pytest.mark.dist


class Changing(modules.Shallow):
    """Draws random numbers and changes a buffer in every step."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("total", torch.zeros(()))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = F.dropout(self(batch["ids"]), self.rate)
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        self.total += loss.detach()
        self.accuracy.update(logits.flatten(0, 1), batch["labels"].flatten())
        self.log("loss", loss)
        self.log("accuracy", self.accuracy)
        return loss


modules.Changing = Changing  # type: ignore[attr-defined]
PLACES = {"forward": (LoweredStep, "_run"), "backward": (Precision, "backward")}


@contextmanager
def out_of_memory(phase: str, times: tuple[int, ...], ranks: tuple[int, ...], *, late: bool) -> Iterator[None]:
    """Raise what CUDA raises, at these calls on these ranks: before the compiled graph runs, or when it has."""
    owner, name = PLACES[phase]
    run, count = getattr(owner, name), 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        fails = count in times and torch.distributed.get_rank() in ranks
        out = run(*args, **kwargs) if late or not fails else None
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return out

    setattr(owner, name, failing)
    try:
        yield
    finally:
        setattr(owner, name, run)


def fit_out_of_memory(
    world: int,
    phase: str,
    strategy: dict[str, Any] | None = None,
    *,
    module: str = "Changing",
    times: tuple[int, ...] = (2,),
    ranks: tuple[int, ...] = (0, 1),
    late: bool = False,
    **options: Any,
) -> dict[str, Any]:
    recovery.WAIT = timedelta(seconds=5)
    with out_of_memory(phase, times, ranks, late=late):
        return jobs.fit(module, strategy or {}, world, num_samples=8, **options)


EVERYWHERE = (("forward", False), ("forward", True), ("backward", False), ("backward", True))
ACCUMULATE = {"accumulate_grad_batches": 2}


@pytest.mark.parametrize(
    ("world", "options", "places"),
    # Late in backward, gradients that accumulate have been added to: see below.
    [(1, {}, EVERYWHERE[:1]), (2, {}, EVERYWHERE), (2, ACCUMULATE, EVERYWHERE[1:3])],
    ids=["1", "2", "accumulate"],
)
def test_planned_again_and_nothing_lost(pool: Pool, world: int, options: dict[str, Any], places: Any) -> None:
    """Random numbers, buffers, metrics, logs and gradients of earlier batches are what they are without running out of memory."""
    expected = pool.run(fit_out_of_memory, world, world, "forward", times=(), **options)[0]
    for phase, late in places:
        runs = pool.run(fit_out_of_memory, world, world, phase, late=late, **options)
        for run in runs:
            assert_same(run, expected)
            assert run["weights"]["total"] == pytest.approx(expected["weights"]["total"], rel=1e-6)
            steps = [step["memory"] for step in run["report"]["steps"]]
            assert len(steps) == 2
            assert steps[1]["saved"] < steps[0]["saved"]
            assert steps[0]["policy"] == "none"
            assert steps[1]["policy"] != "none"
            assert f"out of memory in {phase}" in " ".join(run["report"]["notes"])


def failed(pool: Pool, *args: Any, **kwargs: Any) -> list[JobError]:
    errors = pool.outcomes(fit_out_of_memory, *args, **kwargs)
    assert all(isinstance(error, JobError) for error in errors), errors
    assert {error.kind for error in errors} == {"OutOfMemoryError"}, errors
    for error in errors:
        assert "predicted" in error.message
        assert "kept for backward" in error.message
        assert "Use a shorter sequence" in error.message
    return errors


def test_a_second_time(pool: Pool) -> None:
    for error in failed(pool, 2, 2, "backward", times=(2, 3)):
        assert "memory was planned again, and the step still takes too much" in error.message
        assert error.message.count("kept for backward") == 2


def fit_and_exit(directory: str) -> None:
    """As a script does: a rank that fails ends, and its connections with it."""
    try:
        fit_out_of_memory(2, "backward", ranks=(1,))
    except torch.OutOfMemoryError as error:
        Path(directory, str(torch.distributed.get_rank())).write_text(str(error))
    os._exit(1)


def test_on_one_rank_of_two(pool: Pool, tmp_path: Path) -> None:
    """The other one is inside a collective: it is told when the first gives up."""
    with pytest.raises(RuntimeError, match="died with exit code 1"):
        pool.outcomes(fit_and_exit, 2, str(tmp_path))
    first, second = ((tmp_path / rank).read_text() for rank in "01")
    assert "rank 1 ran out of memory, and this one waited for it" in first
    assert "rank 1 ran out of memory and not all others did" in second
    assert first.splitlines()[1:] == second.splitlines()[1:]  # the table


def test_gradients_that_cannot_be_taken_back(pool: Pool) -> None:
    for error in failed(pool, 1, 1, "backward", late=True, accumulate_grad_batches=2):
        assert "gradients were partly added to those of earlier batches" in error.message


@pytest.mark.parametrize(
    ("strategy", "module", "why"),
    [
        ({"checkpoint_policy": "full"}, "Changing", "checkpoint_policy='full' leaves nothing to choose"),
        ({}, "Broken", "the step is not one graph"),
    ],
)
def test_where_planning_again_does_not_help(strategy: dict[str, Any], module: str, why: str) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=why):
        fit_out_of_memory(1, "backward", strategy, module=module)


def test_later_steps_are_not_watched(pool: Pool) -> None:
    (error,) = pool.outcomes(fit_out_of_memory, 1, 1, "backward", times=(4,))
    assert error.message == "CUDA out of memory (injected)"
