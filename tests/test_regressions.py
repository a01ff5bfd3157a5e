"""What once was wrong, each as small as it gets: found by fuzzing, named for what went wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import assert_exact
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_autosp.compiler.capture import capture

D, V = 6, 11


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


def check(body: Callable[..., Any], *, length: int = 13, batch: int = 2, sequence_dim: int = 1, num_ranks: int = 2) -> None:
    net = Net(body)
    shape = (batch, length) if sequence_dim == 1 else (length, batch)
    assert_exact(net, (torch.randint(0, V, shape),), net, num_ranks=num_ranks, sequence_dim=sequence_dim)


def assigned(change: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """Return a body that changes a copy of the activations in place."""

    def body(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        y = x.clone()
        change(y)
        return (y * net.positions[: y.shape[1]]).square().mean()

    return body


def updated_in_place(probability: float, training: bool) -> Callable[..., Tensor]:
    """Return a body that updates what a dropout returned."""

    def body(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        x = x.sin()
        y = F.dropout(x, probability, training)
        y += net.positions[: y.shape[1]]
        return (y + x).square().mean()

    return body


CASES: dict[str, Callable[..., Any]] = {
    "copy_has_no_derivative": assigned(lambda y: y[:, 3:].copy_(y[:, :-3].clone())),
    "copy_of_another_dtype": assigned(lambda y: y[:, 1:].copy_(torch.arange(D))),
    "in_place_product_of_a_part": assigned(lambda y: y[..., :2].mul_(2)),
    "dropout_updated_in_place": updated_in_place(1.0, True),
    "dropout_of_nothing_shares_memory": updated_in_place(0.0, True),
    "dropout_in_evaluation_shares_memory": updated_in_place(0.5, False),
    # DTensor takes a scan over a dimension counted from the last for a scan over no dimension.
    "scan_over_a_negative_dim": lambda n, x, i: x.logcumsumexp(-2).tanh().mean() + x.cumsum(-2).square().mean(),
    "scan_of_a_transposed_negative_dim": lambda n, x, i: x.transpose(1, 2).cumprod(-1).square().mean(),
    "part_of_nothing_but_padding": lambda n, x, i: F.pad(x, (0, 0, 0, -x.shape[1] % 4)).cos().square().mean(),
    "attention_over_repeated_positions": lambda n, x, i: (
        F.scaled_dot_product_attention(x[:, None], x.repeat(1, 2, 1)[:, None], x.repeat(1, 2, 1)[:, None] + 1).square().mean()
    ),
    # What small numbers in the place of symbols make of a quotient: a division by zero.
    "quotient_of_lengths": lambda n, x, i: (
        x[:, : x.shape[1] // 3 * 3].unflatten(1, (-1, 3)).transpose(1, 2).flatten(1, 2).sort(1).values.square().mean()
    ),
    "attention_written_out_over_too_few_positions": lambda n, x, i: (
        ((x @ x.mT).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1) > 0, float("-inf")).softmax(-1) @ x).square().mean()
    ),
}


SETTINGS: dict[str, Any] = {
    "quotient_of_lengths": {"num_ranks": 3, "length": 21},
    "attention_written_out_over_too_few_positions": {"num_ranks": 5, "length": 4},
    "part_of_nothing_but_padding": {"num_ranks": 5, "length": 5},
}
"""Where two ranks and 13 positions do not show it."""


@pytest.mark.parametrize("name", CASES)
def test_same_as_one_device(name: str) -> None:
    check(CASES[name], **SETTINGS.get(name, {}))


def test_data_is_cut_like_samples_merged_with_positions() -> None:
    """The merged dimension's size follows the length, though samples are cut, not positions."""

    def body(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        y = x.cumsum(0).flatten(0, 1)
        return (y * torch.arange(y.shape[0]).double().cos()[:, None]).square().mean()

    check(body, length=17, batch=3, sequence_dim=0, num_ranks=3)


def test_a_graph_without_tensors_among_its_inputs() -> None:
    """Dynamo has described what it makes; to describe it with other means does not mix."""

    def places(rows: int, columns: int) -> Tensor:
        found = []
        for _ in range(3):
            first, second = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            first, second = (one.reshape(rows // 2, 2, -1).transpose(0, 1).flatten() for one in (first, second))
            found.append(torch.stack([first, second], -1).repeat(2, 1))
        return torch.cat(found)

    compiled = torch.compile(places, backend=lambda gm, _: capture(gm, {}).owner and gm.forward, fullgraph=True, dynamic=True)
    assert compiled(4, 3).shape == (72, 2)
