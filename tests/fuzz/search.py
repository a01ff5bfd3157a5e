"""Drawing programs, comparing each with one device, and shrinking what differs."""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import hypothesis
import torch
from hypothesis import strategies as st
from simulated import assert_exact

from fuzz.grammar import DRAWN, Gene, build
from fuzz.program import Header, IllConditionedError, Program, check_on_one_device, execute

__all__ = ["MismatchError", "compare", "programs", "search"]

LENGTHS = (8, *range(9, 24), 5, 6, 7)
HEADER_BYTES, TAIL_BYTES, CHOICE_BYTES = 8, 9, 8
NUM_GENES = 6
RANK_TIMEOUT_S = 30.0
"""How long a rank waits for the others in a collective."""

# Hypothesis keeps what it learns of the source in a directory of its own: not in the repository.
hypothesis.configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")


class MismatchError(AssertionError):
    """A program that is not the same on simulated ranks."""

    def __init__(self, program: Program, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}\n\n{program.source()}")
        self.program, self.error = program, error


def programs(num_ranks: int | None = None) -> st.SearchStrategy[Program]:
    """Draw programs, for two to five ranks or as many as given.

    One string of bytes makes a program. Hypothesis draws it evenly (it would repeat parts of a structure of many draws) and shrinks
    it towards zeros, which stand for no operator and for the simplest choices.
    """
    size = HEADER_BYTES + TAIL_BYTES + NUM_GENES * (1 + CHOICE_BYTES)
    return st.binary(min_size=size, max_size=size).map(lambda drawn: decode(drawn, num_ranks))


def decode(drawn: bytes, num_ranks: int | None = None) -> Program:
    """Make a program of bytes: first the header, then the tail, then a gene after the other."""
    length, other, batch, ranks, dim, sharded, width, seed = drawn[:HEADER_BYTES]
    tail, genes = drawn[HEADER_BYTES : HEADER_BYTES + TAIL_BYTES], drawn[HEADER_BYTES + TAIL_BYTES :]
    header = Header(
        length=LENGTHS[length % len(LENGTHS)],
        other_length=max(4, LENGTHS[length % len(LENGTHS)] - 1 - other % 4),
        batch=(2, 1, 3)[batch % 3],
        num_ranks=num_ranks or 2 + ranks % 4,
        sequence_dim=(1, 1, 1, 0)[dim % 4],
        sharded=bool(sharded % 2),
        width=(4, 6)[width % 2],
        seed=seed,
    )
    cut = [genes[i : i + 1 + CHOICE_BYTES] for i in range(0, len(genes), 1 + CHOICE_BYTES)]
    return build(header, [Gene(DRAWN[(one[0] - 1) % len(DRAWN)], tuple(one[1:])) for one in cut if one[0]], tuple(tail))


def compare(program: Program) -> str:
    """Compare one program on simulated ranks with one device.

    Returns:
        `"exact"`, or why there was nothing to compare: `"ill-conditioned"`, `"not one graph"` if Dynamo cannot trace the step.

    Raises:
        MismatchError: If outputs or gradients differ or the lowered step fails.
    """
    try:
        check_on_one_device(program)
    except IllConditionedError:
        return "ill-conditioned"
    function, inputs, net = execute(program)
    h = program.header
    options = {"num_ranks": h.num_ranks, "sequence_dim": h.sequence_dim, "sharded": h.sharded}
    try:
        with mock.patch("threading.Barrier", functools.partial(threading.Barrier, timeout=RANK_TIMEOUT_S)):
            assert_exact(function, inputs, net, **options)
    except Exception as error:
        if not isinstance(error, AssertionError) and not _is_traceable(function, inputs):
            return "not one graph"
        raise MismatchError(program, error) from error
    return "exact"


def _is_traceable(function: Callable[..., object], inputs: list[torch.Tensor]) -> bool:
    """Whether Dynamo alone makes one graph of the step; the inputs are marked dynamic already."""
    torch._dynamo.reset()
    try:
        torch.compile(function, backend="eager", fullgraph=True)(*inputs)
    except Exception:  # noqa: BLE001 -- whatever it cannot trace
        return False
    return True


def search(
    num_programs: int,
    seed: int,
    num_ranks: int | None = None,
    progress: Callable[[Counter[str]], None] = lambda counts: None,
) -> Counter[str]:
    """Compare random programs.

    Args:
        num_programs: How many that could be compared; others are drawn on top.
        seed: The same seed draws the same programs.
        num_ranks: For how many ranks; from two to five by default.
        progress: Called after every program with what has been counted.

    Returns:
        How many programs ended how, as `compare` says it.

    Raises:
        MismatchError: With a program that is not the same, shrunk.
    """
    counts: Counter[str] = Counter()
    seen: dict[Program, str | MismatchError] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=num_programs,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    @hypothesis.given(programs(num_ranks))
    def run(program: Program) -> None:
        new = program not in seen
        if new:
            try:
                seen[program] = compare(program)
            except MismatchError as error:
                seen[program] = error
            outcome = seen[program]
            counts[outcome if isinstance(outcome, str) else "mismatch"] += 1
            progress(counts)
        outcome = seen[program]
        if isinstance(outcome, MismatchError):
            raise outcome
        hypothesis.assume(new and outcome == "exact")

    with quiet(), one_thread():
        try:
            run()
        except MismatchError as mismatch:
            raise tidy(mismatch) from None
    return counts


def tidy(mismatch: MismatchError) -> MismatchError:
    """Leave out what Hypothesis could not, as to leave out an operator there changes which values the others choose."""
    pending = list(mismatch.program.simpler())
    while pending:
        try:
            compare(pending.pop(0))
        except MismatchError as simpler:
            mismatch, pending = simpler, list(simpler.program.simpler())
    return mismatch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave unsaid what PyTorch says of strange programs."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run operators on one thread: the tensors are tiny, and every rank has a thread already."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
