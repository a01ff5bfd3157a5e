"""Random programs on simulated ranks against one device; `python -m tests.fuzz` compares any number."""

from __future__ import annotations

import pytest
from fuzz.program import Header, Instruction, Program
from fuzz.search import MismatchError, compare, search

from lightning_autosp import collectives

NUM_PROGRAMS = 50


@pytest.mark.parametrize("seed", range(6))
def test_random_programs_are_exact(seed: int) -> None:
    try:
        counts = search(NUM_PROGRAMS, seed)
    except MismatchError as mismatch:
        pytest.fail(f"python -m tests.fuzz --programs {NUM_PROGRAMS} --seed {seed} finds\n\n{mismatch}", pytrace=False)
    assert counts["exact"] == NUM_PROGRAMS


def test_a_lost_sum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    table = ("table", (11, 4))
    embedded = Instruction("embedding", (), "F.embedding(ids, net.table)")
    program = Program((embedded, Instruction("term", (0,), "v0.square().mean()")), (1,), (table,), Header())
    assert compare(program) == "exact"
    monkeypatch.setattr(collectives, "all_reduce_sum", lambda x, group: x)
    with pytest.raises(MismatchError, match="off by"):
        compare(program)
