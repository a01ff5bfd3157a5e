"""What once was wrong, each as small as it gets: found by fuzzing, named for what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F

B, D, V = 2, 6, 11


class Net(nn.Module):
    """Parameters for a function of activations: `body(net, x, ids)` returns a loss, or `(loss, ...)`."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(V, D))
        self.positions = nn.Parameter(torch.randn(64, D))
        self.body = body
        self.double()

    def forward(self, ids: Tensor) -> Any:
        return self.body(self, F.embedding(ids, self.table), ids)


def assigned(change: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Return a body that changes a copy of the activations in place."""

    def body(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        y = x.clone()
        change(y)
        return (y * net.positions[: y.shape[1]]).square().mean()

    return body


CASES: dict[str, Callable[..., Any]] = {
    "copy_has_no_derivative": assigned(lambda y: y[:, 3:].copy_(y[:, :-3].clone())),
    "copy_of_another_dtype": assigned(lambda y: y[:, 1:].copy_(torch.arange(D))),
    "in_place_product_of_a_part": assigned(lambda y: y[..., :2].mul_(2)),
    # DTensor takes a scan over a dimension counted from the last for a scan over no dimension.
    "scan_over_a_negative_dim": lambda n, x, i: x.logcumsumexp(-2).tanh().mean() + x.cumsum(-2).square().mean(),
    "scan_of_a_transposed_negative_dim": lambda n, x, i: x.transpose(1, 2).cumprod(-1).square().mean(),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_same_as_one_device(name: str, num_ranks: int) -> None:
    net = Net(CASES[name])
    assert_exact(net, (torch.randint(0, V, (B, 13)),), net, num_ranks=num_ranks)


def test_data_is_cut_like_samples_merged_with_positions() -> None:
    """The merged dimension's size follows the length, though samples are cut, not positions."""

    def body(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        y = x.cumsum(0).flatten(0, 1)
        return (y * torch.arange(y.shape[0]).double().cos()[:, None]).square().mean()

    net = Net(body)
    assert_exact(net, (torch.randint(0, V, (17, 3)),), net, num_ranks=3, sequence_dim=0)
