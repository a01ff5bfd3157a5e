"""Positions that data name are written by the rank that holds them: nothing that is written into is gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import lower
from test_rules import B, D, Net, check, ids_of
from test_sequence_rules import RUNS, SPANS
from torch import Tensor

PICTURE = 3
"""The token of which the places are written to."""


def check_write(function: Callable[[Net, Tensor, Tensor], Tensor], ranks: int, span: str, length: int) -> Any:
    """Check a function `(net, (B, s, D), mask (B, s)) -> (B, s, ...)`, weighted by position, the mask of both samples unlike."""

    def body(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        places = SPANS[span](net, (ids == PICTURE).unsqueeze(-1).expand(-1, -1, D).to(x.dtype))[..., 0] > 0.5
        y = function(net, SPANS[span](net, x), places).flatten(2)
        return (y * (torch.arange(y.shape[1]).unsqueeze(-1) * 0.1 + 1)).square().mean()

    return check(body, length, num_ranks=ranks).report


def features(net: Net) -> Tensor:
    """Enough for every place."""
    return net.positions.tanh()


MASKED: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "transformers": lambda n, x, m: x.masked_scatter(m.unsqueeze(-1), features(n)),
    "expanded": lambda n, x, m: x.masked_scatter(m.unsqueeze(-1).expand_as(x), features(n)),
    "of_some_features": lambda n, x, m: x.masked_scatter(m.unsqueeze(-1) & (torch.arange(D) % 3 == 1), features(n)),
    "for_all_samples": lambda n, x, m: x.masked_scatter(m[0].unsqueeze(-1), features(n)),
    "for_all_positions": lambda n, x, m: x.masked_scatter(torch.arange(D) < 2, features(n)),
    "sequence_first": lambda n, x, m: x.transpose(0, 1).masked_scatter(m.T.unsqueeze(-1), features(n)).transpose(0, 1),
    "sequence_last": lambda n, x, m: x.transpose(1, 2).masked_scatter(m.unsqueeze(1), features(n)).transpose(1, 2),
    "samples_merged": lambda n, x, m: x.reshape(-1, D).masked_scatter(m.reshape(-1, 1), features(n)).view(B, -1, D),
    "assigned_one_for_all": lambda n, x, m: assigned(x, m, n.token.flatten()),
    "assigned_number": lambda n, x, m: assigned(x, m, 0.5),
}


def assigned(x: Tensor, where: Any, value: Any) -> Tensor:
    y = x * 1
    y[where] = value
    return y


def added(x: Tensor, where: Any, value: Any) -> Tensor:
    y = x * 1
    y[where] += value
    return y


@pytest.mark.parametrize(("ranks", "span", "length"), RUNS)
@pytest.mark.parametrize("name", MASKED)
def test_places_of_a_mask(name: str, ranks: int, span: str, length: int) -> None:
    report = check_write(MASKED[name], ranks, span, length)
    assert not report.in_full, report.in_full
    assert not report.gathered, report.gathered


def picked() -> Tensor:
    """Positions before, at and behind cuts, the last but one counted from the end, some twice."""
    return torch.tensor([0, 4, 5, -2, 6, 4])


AT_POSITIONS: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "assigned": lambda n, x, m: assigned(x, (slice(None), picked()[:5]), n.positions[:5]),
    "added": lambda n, x, m: added(x, (slice(None), picked()[:5]), n.positions[:5]),
    "accumulated": lambda n, x, m: x.index_put((torch.arange(B)[:, None], picked()), n.positions[:6], accumulate=True),
    "one_a_sample": lambda n, x, m: assigned(x, (torch.arange(B), m.int().argmax(-1)), n.positions[:B]),
    "some_features_of_them": lambda n, x, m: assigned(x, (slice(None), picked()[:3], picked()[:3]), n.positions[0, :3]),
    "of_features": lambda n, x, m: assigned(x, (slice(None), slice(None), torch.tensor([1, -1])), n.positions[0, :2]),
    "of_features_and_samples": lambda n, x, m: (
        x.transpose(1, 2).index_put((torch.tensor([0, 1]), torch.tensor([1, 2])), x.sum(-1), accumulate=True).transpose(1, 2)
    ),
    "index_add": lambda n, x, m: x.index_add(1, picked()[:3], n.positions[:6].view(B, 3, D), alpha=2),
    "index_copy": lambda n, x, m: x.index_copy(1, picked()[:3], n.positions[:6].view(B, 3, D)),
    "samples_merged": lambda n, x, m: x.reshape(-1, D).index_copy(0, picked()[:3] * 3, n.positions[:3]).view(B, -1, D),
    "samples_merged_assigned": lambda n, x, m: assigned(x.reshape(-1, D), picked()[:5] * 2, n.positions[:5]).view(B, -1, D),
    "index_fill": lambda n, x, m: x.index_fill(1, picked()[:3], 0.5),
    "index_add_of_features": lambda n, x, m: x.index_add(2, torch.tensor([1, 4, 1]), x[..., 2:5]),
    "scatter": lambda n, x, m: x.scatter(1, picked()[:3].view(1, 3, 1).expand(B, 3, D), n.positions[:6].view(B, 3, D)),
    "scatter_number": lambda n, x, m: x.scatter(1, picked()[:3].view(1, 3, 1).expand(B, 3, 4), 0.5),
    "scatter_add": lambda n, x, m: x.scatter_add(1, (picked() % 7).view(1, 6, 1).expand(B, 6, D), n.positions[:12].view(B, 6, D)),
    "scatter_mean": lambda n, x, m: x.scatter_reduce(
        1, (picked() % 7).view(1, 6, 1).expand(B, 6, D), n.positions[:12].view(B, 6, D), "mean"
    ),
    "scatter_amax": lambda n, x, m: x.scatter_reduce(
        1, (picked() % 7).view(1, 6, 1).expand(B, 6, D), n.positions[:12].view(B, 6, D), "amax", include_self=False
    ),
    "scatter_of_features": lambda n, x, m: x.scatter(2, (m.long() * 3).unsqueeze(-1), x.sum(-1, keepdim=True)),
}


@pytest.mark.parametrize(("ranks", "span", "length"), RUNS)
@pytest.mark.parametrize("name", AT_POSITIONS)
def test_positions(name: str, ranks: int, span: str, length: int) -> None:
    report = check_write(AT_POSITIONS[name], ranks, span, length)
    assert not report.in_full, report.in_full
    assert not report.gathered, report.gathered


OF_A_SEQUENCE: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "index_copy": lambda n, x, i: x.index_copy(1, torch.arange(x.shape[1]).flip(0), x.sin()),
    "masked_scatter": lambda n, x, i: x.masked_scatter((i == PICTURE).unsqueeze(-1), x.sin()),
}


@pytest.mark.parametrize("name", OF_A_SEQUENCE)
def test_only_what_is_written_is_gathered(name: str) -> None:
    report = check(lambda n, x, i: n.head(OF_A_SEQUENCE[name](n, x, i)).square().mean(), num_ranks=3).report
    assert not report.in_full, report.in_full
    assert [whole.name for whole in report.gathered] == ["aten.sin.default"]


def test_no_place_and_no_feature() -> None:
    def body(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        return net.head(x.masked_scatter((ids < 0).unsqueeze(-1), net.positions[:0] * 2)).square().mean()

    assert not check(body).report.in_full


REFUSED: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "product": lambda n, x, i: x.scatter_reduce(1, picked()[:1].expand(B, 1, D), n.positions[:2].view(B, 1, D), "prod"),
    "mask_and_positions": lambda n, x, i: assigned(x, (torch.tensor([True, False]), torch.tensor([3])), 1.0),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_runs_in_full(name: str) -> None:
    assert check(lambda n, x, i: REFUSED[name](n, x, i).square().sum()).report.in_full


BAD: dict[str, tuple[Callable[[Net, Tensor, Tensor], Tensor], str]] = {
    "too_few": (lambda n, x, i: x.masked_scatter((i >= 0).unsqueeze(-1), n.positions[:9]), "as many places as the 9 rows"),
    "too_many_assigned": (lambda n, x, i: assigned(x, i == 99, n.positions[:9]), "as many places as the 9 rows"),
    "no_such_position": (lambda n, x, i: x.index_add(1, picked()[:3] + 20, n.positions[:6].view(B, 3, D)), "out of"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_fails(name: str) -> None:
    function, message = BAD[name]
    net = Net(lambda n, x, i: function(n, x, i).square().sum())
    with pytest.raises((RuntimeError, IndexError), match=message):
        lower(net, (ids_of(13),), net)
