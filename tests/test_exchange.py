"""Exchanges between ranks against plain indexing, forward and backward."""

from __future__ import annotations

import pytest
import torch
from simulated import assert_close
from torch import Tensor

from lightning_autosp.collectives import Group
from lightning_autosp.compiler.simulate import run_ranks
from lightning_autosp.cuts import even_cuts
from lightning_autosp.exchange import Cut, Range, exchange, fetch, rearrange


def bounds_of(length: int, ranks: int) -> list[tuple[int, int]]:
    cuts = even_cuts(length, ranks)
    return list(zip(cuts, cuts[1:], strict=False))


WANTED: dict[str, list[list[Range]]] = {
    "own": [[(0, 4, 1)], [(4, 7, 1)], [(7, 10, 1)]],
    "shifted": [[(0, 3, 1)], [(3, 6, 1)], [(6, 9, 1)]],
    "overlapping": [[(0, 6, 1)], [(2, 9, 1)], [(5, 10, 1)]],
    "every_second": [[(0, 3, 2)], [(4, 7, 2)], [(8, 10, 2)]],
    "backwards": [[(9, 5, -1)], [(5, 2, -1)], [(2, -1, -1)]],
    "backwards_by_three": [[(9, -1, -3)], [], [(8, 1, -3)]],
    "rolled": [[(8, 10, 1), (0, 2, 1)], [(2, 5, 1)], [(5, 8, 1)]],
    "one_rank_wants_all": [[], [(0, 10, 1)], []],
}


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("dim", [0, 1])
def test_fetch(name: str, dim: int) -> None:
    x = torch.randn(10, 2).double() if dim == 0 else torch.randn(2, 10, 3).double()
    x.requires_grad_()
    bounds, wanted = bounds_of(10, 3), WANTED[name]

    def work(rank: int) -> tuple[Tensor, Tensor]:
        start, stop = bounds[rank]
        part = x.detach().narrow(dim, start, stop - start).requires_grad_()
        out = fetch(part, dim, bounds, wanted, Group("", 3, rank))
        (out.sin().sum() * (rank + 1)).backward()
        assert part.grad is not None
        return out, part.grad

    results = run_ranks(3, work)
    losses = []
    for rank, (out, _) in enumerate(results):
        index = torch.tensor([p for r in wanted[rank] for p in range(*r)], dtype=torch.int64)
        want = x.index_select(dim, index)
        assert torch.equal(out, want)
        losses.append(want.sin().sum() * (rank + 1))
    (gradient,) = torch.autograd.grad(sum(losses), x)  # type: ignore[arg-type]
    assert_close(torch.cat([grad for _, grad in results], dim), gradient, 1e-12, "gradient")


@pytest.mark.parametrize(("have", "want"), [(1, 2), (2, 1), (0, 2)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_exchange(have: int, want: int, ranks: int) -> None:
    x = torch.randn(4, 7, 5)
    first, second = bounds_of(x.shape[have], ranks), bounds_of(x.shape[want], ranks)

    def work(rank: int) -> Tensor:
        start, stop = first[rank]
        part = x.narrow(have, start, stop - start)
        return exchange(part, have, first, want, second, Group("", ranks, rank))

    for (start, stop), out in zip(second, run_ranks(ranks, work), strict=True):
        assert torch.equal(out, x.narrow(want, start, stop - start))


@pytest.mark.parametrize(("have", "want"), [((1, 1), (5, 2)), ((5, 2), (1, 1)), ((2, 3), (6, 5)), ((3, 10), (3, 2))])
@pytest.mark.parametrize("ranks", [2, 3])
def test_rearrange(have: tuple[int, int], want: tuple[int, int], ranks: int) -> None:
    x = torch.randn(2, 120, 3, dtype=torch.float64)

    def cut(outer: int, inner: int) -> Cut:
        return 1, outer, inner, tuple(bounds_of(120 // outer // inner, ranks))

    def part(cut: Cut, rank: int) -> Tensor:
        _, outer, inner, bounds = cut
        return x.unflatten(1, (outer, -1, inner))[:, :, slice(*bounds[rank])].flatten(1, 3)

    def work(rank: int) -> tuple[Tensor, Tensor]:
        own = part(cut(*have), rank).clone().requires_grad_()
        out = rearrange(own, cut(*have), cut(*want), Group("", ranks, rank))
        out.sin().sum().backward()
        assert own.grad is not None
        return out, own.grad

    for rank, (out, gradient) in enumerate(run_ranks(ranks, work)):
        assert torch.equal(out, part(cut(*want), rank))
        assert torch.equal(gradient, part(cut(*have), rank).cos())
