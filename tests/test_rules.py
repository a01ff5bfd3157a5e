"""Every rule: the lowered program on simulated ranks against one device, in float64, and what it keeps sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import assert_exact, lower
from torch import Tensor, nn
from torch.nn import functional as F

B, D, V = 2, 8, 11


class Net(nn.Module):
    """A token model around a function of its activations: `body(net, x, ids)` returns a scalar, or `(scalar, ...)`."""

    def __init__(self, body: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.head = nn.Linear(D, V)
        self.token = nn.Parameter(torch.randn(1, 1, D))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.positions = nn.Parameter(torch.randn(64, D))
        for name, part in parts.items():
            self.add_module(name, part)
        self.body = body
        self.double()

    def forward(self, ids: Tensor) -> Any:
        return self.body(self, self.embedding(ids) * self.scale, ids)


def ids_of(length: int) -> Tensor:
    return torch.randint(0, V, (B, length))


def check(body: Callable[..., Any], length: int = 13, **options: Any) -> Any:
    parts = options.pop("parts", {})
    net = Net(body, **parts)
    return assert_exact(net, (ids_of(length),), net, **options)


SHARDED: dict[str, Callable[..., Any]] = {
    "linear": lambda n, x, i: n.head(x).square().sum(),
    "vmap_over_samples": lambda n, x, i: torch.vmap(lambda a: n.head(a).tanh() * a.shape[0])(x).square().sum(),
    "vmap_over_positions": lambda n, x, i: torch.vmap(lambda a: (a * n.scale).softmax(-1), 1, 1)(x).square().sum(),
    "vmap_of_vmap": lambda n, x, i: torch.vmap(torch.vmap(lambda a, b: a.sin() * b, (0, None)))(x, x[:, 0]).square().sum(),
    "einsum_over_positions": lambda n, x, i: torch.einsum("bsd,bse->bde", x, n.head(x)).square().sum(),
    "einsum_of_features": lambda n, x, i: torch.einsum("bsd, vd -> sbv", x, n.head.weight).tanh().sum(),
    "einsum_of_three": lambda n, x, i: torch.einsum("bsd,b,sd->bs", x, x[:, 0, 0], n.positions[: x.shape[1]]).sin().sum(),
    "merge_and_split": lambda n, x, i: n.head(x.view(-1, D)).view(B, -1, V).tanh().sum(),
    "merge_inner": lambda n, x, i: (x.transpose(1, 2).reshape(B, -1, 1) * 2).pow(3).sum(),
    "seq_first_merge": lambda n, x, i: n.head(x.transpose(0, 1).reshape(-1, D)).sin().sum(),
    "chunk": lambda n, x, i: torch.mul(*n.head(x)[..., :10].chunk(2, -1)).sum(),
    "split_unbind": lambda n, x, i: sum(t.cos().sum() for t in x.view(B, -1, 2, 4).unbind(2)),
    "topk_other_dim": lambda n, x, i: x.topk(3, -1).values.sum(),
    "learned_positions": lambda n, x, i: (x + n.positions[: x.shape[1]]).square().sum(),
    "arange_embedding": lambda n, x, i: (x + F.embedding(torch.arange(x.shape[1]), n.positions)).square().sum(),
    "mask_multiply": lambda n, x, i: (x * (i != 3).unsqueeze(-1)).square().sum(),
    "where_positions": lambda n, x, i: torch.where(torch.arange(x.shape[1])[None, :, None] % 2 == 0, x, x * 3).square().sum(),
    "zeros": lambda n, x, i: (torch.zeros(B, x.shape[1], D, dtype=x.dtype) + x).square().sum(),
    "new_zeros": lambda n, x, i: (x.new_zeros(B, x.shape[1], D) + x * x.new_ones(3).sum()).square().sum(),
    "full_like": lambda n, x, i: (torch.full_like(x, 2.0) * x).square().sum(),
    "expand": lambda n, x, i: (n.token.expand(B, x.shape[1], D) * x).square().sum(),
    "expand_heads": lambda n, x, i: (x[:, :, None].expand(B, x.shape[1], 3, D).reshape(B, -1, 3 * D)).square().sum(),
    "sum": lambda n, x, i: x.sum(1).square().sum(),
    "mean": lambda n, x, i: x.mean(1).square().sum(),
    "mean_all": lambda n, x, i: x.square().mean(),
    "mean_merged": lambda n, x, i: x.reshape(-1, D).square().mean(0).sum(),
    "amax": lambda n, x, i: x.amax(1).square().sum(),
    "amin_keepdim": lambda n, x, i: x.amin((1, 2), keepdim=True).square().sum(),
    "max_all": lambda n, x, i: x.max() * x.min(),
    "max_dim": lambda n, x, i: (x.max(1).values.square().sum(), x.max(1).indices, x.min(1)[1]),
    "any_all": lambda n, x, i: ((x > 1).any(1).sum() + (x > -5).all() + x.sum(), (x > 2).any()),
    "contraction": lambda n, x, i: (x.transpose(1, 2) @ x.square()).square().sum(),
    "drop_last": lambda n, x, i: x[:, :-1].square().sum(),
    "drop_first": lambda n, x, i: n.head(x[:, 1:]).square().sum(),
    "class_token": lambda n, x, i: n.head(torch.cat([n.token.expand(B, 1, D), x], 1)).square()[:, 1:].sum(),
    "append": lambda n, x, i: torch.cat([x, n.token.expand(B, 2, D)], 1).square().mean(),
    "first_position": lambda n, x, i: n.head(x[:, 0]).square().sum(),
    "last_position": lambda n, x, i: n.head(x[:, -1]).square().sum(),
    "last_three": lambda n, x, i: n.head(x[:, -3:]).square().sum(),
    "middle": lambda n, x, i: n.head(x[:, 5:8]).square().sum(),
    "pad_right": lambda n, x, i: n.head(F.pad(x, (0, 0, 0, 3))).square().sum(),
    "pad_both": lambda n, x, i: n.head(F.pad(x, (0, 0, 2, 1), value=1.0)).square().mean(),
    "stack": lambda n, x, i: torch.stack([x, x.square()], 2).prod(2).sum(),
    "cat_features": lambda n, x, i: torch.cat([x, x.sin()], -1).square().sum(),
    "layer_norm": lambda n, x, i: F.layer_norm(x, (D,)).pow(3).sum(),
    "softmax_features": lambda n, x, i: (x.softmax(-1) * x).sum(),
    "parameter_returned": lambda n, x, i: (x.sum(), n.token * 1, n.positions.square()),
    "no_grad_inside": lambda n, x, i: (x * _mean_without_grad(n, x)).square().sum(),
    "inplace": lambda n, x, i: _inplace(x).square().sum(),
    "one_hot": lambda n, x, i: (F.one_hot(i, V).to(x.dtype) * n.head(x)).sum(),
    "convolution_of_samples": lambda n, x, i: (
        F.conv1d(x.reshape(-1, 2, 4), n.positions[:6].reshape(3, 2, 8)[..., :3]).square().sum()
    ),
    "label_shift": lambda n, x, i: F.cross_entropy(n.head(x)[:, :-1].reshape(-1, V), i[:, 1:].reshape(-1)),
    "label_pad": lambda n, x, i: F.cross_entropy(n.head(x).view(-1, V), F.pad(i, (0, 1), value=-100)[:, 1:].reshape(-1)),
    "channels_second": lambda n, x, i: F.cross_entropy(n.head(x).transpose(1, 2), i, ignore_index=3),
    "mse": lambda n, x, i: F.mse_loss(x, i.to(x.dtype).unsqueeze(-1).expand_as(x)),
    "l1_sum": lambda n, x, i: F.l1_loss(x, torch.zeros_like(x), reduction="sum"),
    "smooth_l1_none": lambda n, x, i: F.smooth_l1_loss(x, torch.ones_like(x), reduction="none").sum(),
    "bce": lambda n, x, i: F.binary_cross_entropy_with_logits(
        x[..., 0], (i > 4).to(x.dtype), pos_weight=torch.tensor(2.0).double()
    ),
    "kl": lambda n, x, i: F.kl_div(x.log_softmax(-1), torch.ones_like(x) / D, reduction="mean"),
    "nll": lambda n, x, i: F.nll_loss(n.head(x).log_softmax(-1).view(-1, V), i.view(-1), ignore_index=2),
}


def _mean_without_grad(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.head(x).mean() + 1


def _inplace(x: Tensor) -> Tensor:
    y = x + 1
    y += x.sin()
    y.masked_fill_(y > 2, 0.5)
    return y


@pytest.mark.parametrize("name", SHARDED)
def test_stays_sharded_and_exact(name: str) -> None:
    lowered = check(SHARDED[name])
    assert not lowered.report.in_full, lowered.report.in_full
    assert not lowered.report.gathered, lowered.report.gathered


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.parametrize(
    "name", ["class_token", "drop_first", "label_pad", "max_dim", "mean", "last_three", "merge_inner", "middle"]
)
def test_stays_exact_on_more_ranks(name: str, ranks: int) -> None:
    check(SHARDED[name], length=9, num_ranks=ranks)


EXCHANGED: dict[str, Callable[..., Any]] = {
    "softmax_over_sequence": lambda n, x, i: (x.softmax(1) * x).sum(),
    "cumsum": lambda n, x, i: x.cumsum(1).square().sum(),
    "sort_over_sequence": lambda n, x, i: (x.sort(1).values * torch.arange(x.shape[1])[None, :, None]).sum(),
    "flip": lambda n, x, i: (x.flip(1) * x).sum(),
    "roll": lambda n, x, i: (x.roll(1, 1) * x).sum(),
    "difference": lambda n, x, i: (x[:, 1:] - x[:, :-1]).square().sum(),
    "every_second": lambda n, x, i: n.head(x[:, ::2]).square().sum(),
    "outer": lambda n, x, i: torch.einsum("bsd,btd->bst", x, x).square().mean(),
    "across_then_linear": lambda n, x, i: n.head(x.cumsum(1)).tanh().sum(),
    "added_to_what_was_before": lambda n, x, i: n.head(x + x.roll(2, 1)).square().mean(),
    "attention_written_out": lambda n, x, i: n.head(((x @ x.transpose(1, 2) * 0.3).softmax(-1) @ x).tanh()).square().mean(),
    "attention_with_heads": lambda n, x, i: n.head(_written_attention(x)).square().mean(),
}
"""Positions meet: parts are exchanged for parts of another dimension, or of other positions; nothing is made whole."""


def _written_attention(x: Tensor) -> Tensor:
    q = x.view(B, -1, 4, 2).transpose(1, 2)
    scores = torch.tanh(q @ q.transpose(2, 3) / 3) * 3
    causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    out = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ q
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", EXCHANGED)
def test_parts_are_exchanged(name: str, ranks: int) -> None:
    lowered = check(EXCHANGED[name], length=14, num_ranks=ranks)
    assert not lowered.report.in_full, lowered.report.in_full
    # Without heads, a part of the scores' rows needs all keys.
    assert name in ("outer", "attention_written_out") or not lowered.report.gathered, lowered.report.gathered


WHOLE: dict[str, Callable[..., Any]] = {
    "argmax": lambda n, x, i: (x.sum(), x.argmax(1)),
    "std": lambda n, x, i: x.std(1).sum(),
    "split_sequence": lambda n, x, i: x.chunk(2, 1)[0].square().sum(),
    "weights_by_position": lambda n, x, i: (n.positions[i.cumsum(1) % 60] * x).sum(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_unknown_operators_are_exact(name: str) -> None:
    check(WHOLE[name], length=14)


def test_unknown_operator_is_reported_with_the_users_line() -> None:
    report = check(lambda n, x, i: x.mean((0, 2)).logcumsumexp(0).sum()).report
    assert [whole.name for whole in report.in_full] == ["aten.logcumsumexp.default"]
    assert "test_rules.py:" in report.in_full[0].where
    assert "logcumsumexp" in report.in_full[0].source
    assert len(report.gathered) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("probabilities", [False, True])
def test_cross_entropy_forms(reduction: str, smoothing: float, weighted: bool, probabilities: bool) -> None:
    weight = torch.rand(V).double() if weighted else None

    def body(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        logits = net.head(x).flatten(0, 1)
        target = F.one_hot(ids, V).flatten(0, 1).to(x.dtype) * 0.7 + 0.3 / V if probabilities else ids.flatten()
        extra = {} if probabilities else {"ignore_index": 4}
        loss = F.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=smoothing, **extra)
        return loss.square().sum()

    assert not check(body).report.in_full


def test_cross_entropy_with_one_shard_ignored() -> None:
    def body(net: Net, x: Tensor, ids: Tensor) -> Tensor:
        labels = torch.where(torch.arange(ids.shape[1]) < 8, -100, ids)
        return F.cross_entropy(net.head(x).view(-1, V), labels.view(-1))

    check(body, length=16)
    check(body, length=16, num_ranks=4)


def test_cross_entropy_with_everything_ignored_is_nan_as_on_one_device() -> None:
    def body(net: Net, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return x.sum(), F.cross_entropy(net.head(x).view(-1, V), torch.full_like(ids, -100).view(-1))

    check(body)


def test_ties_share_the_gradient_as_on_one_device() -> None:
    check(lambda n, x, i: (x * 0 + n.scale).amax(1).square().sum())


def test_parameters_sharded_over_the_ranks() -> None:
    lowered = check(SHARDED["label_shift"], num_ranks=3, sharded=True)
    assert not lowered.report.in_full


def test_two_sequences_of_one_batch_are_followed_apart() -> None:
    net = Net(lambda n, x, i: x)

    def function(ids: Tensor, other: Tensor) -> Tensor:
        return net(ids).square().mean() + net.embedding(other).mean()

    lowered = assert_exact(function, (ids_of(13), ids_of(9)), net)
    assert not lowered.report.in_full


def test_buffer_updates_happen_once() -> None:
    net = Net(lambda n, x, i: n.norm(x.transpose(1, 2)).square().sum(), norm=nn.BatchNorm1d(D))
    reference = Net(net.body, norm=nn.BatchNorm1d(D))
    reference.load_state_dict(net.state_dict())
    ids = ids_of(12)
    reference(ids)
    lowered = lower(net, (ids,), net, backward=False)
    assert lowered.step.captured.mutated
    assert torch.allclose(lowered.outputs[0][0], reference(ids).detach(), rtol=1e-3)


def test_dropout_is_independent_on_each_rank_and_scaled() -> None:
    net = Net(lambda n, x, i: (F.dropout(torch.ones_like(x) * n.scale, 0.5).sum(), F.dropout(torch.ones_like(x), 0.5)))
    lowered = lower(net, (ids_of(4000),), net)
    mask = lowered.outputs[0][1]
    assert abs(mask.mean().item() - 1) < 0.05
    assert not torch.equal(mask[:, :2000], mask[:, 2000:])
    assert torch.equal(mask, lowered.outputs[1][1])


def test_whole_random_value_is_the_same_on_all_ranks() -> None:
    net = Net(lambda n, x, i: ((x.mean(1) * torch.rand(B, D)).sum() + F.dropout(x, 0.3).mean(), torch.rand(5)))
    lowered = lower(net, (ids_of(16),), net)
    assert torch.equal(lowered.outputs[0][1], lowered.outputs[1][1])
    assert torch.equal(lowered.outputs[0][0], lowered.outputs[1][0])


class Doubled(torch.autograd.Function):
    """Forward x*x, backward 7*x: only right if its own backward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 7 * ctx.saved_tensors[0]


class Centred(torch.autograd.Function):
    """Elementwise forward, a backward that mixes positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(1, keepdim=True)


class Reversed(torch.autograd.Function):
    """A forward that mixes positions, an elementwise backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Scaled(torch.autograd.Function):
    """A factor for each feature, whose gradient is a sum over positions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum((0, 1))


class Rounded(torch.autograd.Function):
    """Two results, one of them not to be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(y)
        return x.round() * y, x > 0

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor]:
        (y,) = ctx.saved_tensors
        return grad * y, grad.clone()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_elementwise_autograd_function_runs_on_parts(num_ranks: int) -> None:
    """With its own backward."""

    def compute(n: Net, x: Tensor, i: Tensor) -> Tensor:
        y, positive = Rounded.apply(x, x.sin())
        return n.head(Doubled.apply(x) + y.where(positive, 0)).sum()

    report = check(compute, num_ranks=num_ranks).report
    assert not report.in_full
    assert not report.gathered


@pytest.mark.parametrize(
    "apply", [lambda n, x: Centred.apply(x), lambda n, x: Reversed.apply(x), lambda n, x: Scaled.apply(x, n.head.weight[0])]
)
def test_other_autograd_functions_run_in_full(apply: Any) -> None:
    lowered = check(lambda n, x, i: n.head(apply(n, x)).sin().sum())
    assert lowered.report.in_full


def test_activation_checkpoint_is_followed() -> None:
    from torch.utils.checkpoint import checkpoint

    lowered = check(lambda n, x, i: checkpoint(lambda t: n.head(t).sin(), x, use_reentrant=False).sum())
    assert not lowered.report.in_full


def test_sequence_first() -> None:
    net = Net(lambda n, x, i: n.head(x).square().mean())
    lowered = assert_exact(net, (torch.randint(0, V, (13, B)),), net, sequence_dim=0)
    assert not lowered.report.in_full


def test_length_shorter_than_the_ranks_runs_in_full() -> None:
    report = check(SHARDED["mean"], length=3, num_ranks=4).report
    assert "3 leaves some of 4 ranks" in report.in_full[0].reason


def test_logged_item_stays_in_the_graph() -> None:
    lowered = check(lambda n, x, i: (x.sum(), torch.scalar_tensor(x.mean().item(), dtype=torch.float64)))
    assert not lowered.report.in_full


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, b: x * b,
        lambda x, b: (x.mean() * (1 - b) + b * 2) / (b + 1) + x,
        lambda x, b: x.to(torch.bfloat16) * b,
        lambda x, b: x + x.mean().item() * b,
        lambda x, b: x / (x > 0).sum().item(),
    ],
    ids=["factor", "schedule", "bf16", "item", "count"],
)
def test_python_numbers_that_change_stay_in_the_graph(compute: Any) -> None:
    net = Net(lambda n, x, i: x)
    ids = ids_of(13)
    for beta in (0.25, 0.5, 0.75):  # Dynamo gives up on constants at the second value
        reference = compute(net(ids).float(), beta)
        lowered = lower_with_number(net, compute, ids, beta)
        for outputs in lowered.outputs:
            assert outputs[1].dtype == reference.dtype
            torch.testing.assert_close(outputs[1], reference, rtol=2e-6 if reference.dtype is torch.float32 else 1e-2, atol=1e-6)
    assert not lowered.report.in_full


@pytest.mark.parametrize(
    "claim",
    [
        lambda i, limit: torch._check_tensor_all(i < limit),
        lambda i, limit: torch._check(i.max().item() < limit),
        lambda i, limit: torch._assert_async((i < limit).all()),
    ],
    ids=["tensor", "number", "asynchronous"],
)
def test_checks_of_values_stay_in_the_graph(claim: Any) -> None:
    def body(limit: int) -> Any:
        def checked(net: Net, x: Tensor, ids: Tensor) -> Tensor:
            claim(ids, limit)
            return net.head(x).square().sum()

        return checked

    assert not check(body(V)).report.in_full
    net, ids = Net(body(3)), ids_of(13)
    ids[1, -1] = 4
    with pytest.raises(RuntimeError, match="A check of a tensor's values failed"):
        lower(net, (ids,), net, num_ranks=3)


def test_a_failed_check_names_its_line() -> None:
    net = Net(lambda n, x, i: (torch._check_tensor_all(i < 3), x.sum())[1])
    with pytest.raises(RuntimeError, match=r"A check of a tensor's values failed, at .*test_rules\.py:\d+, called at"):
        lower(net, (ids_of(40),), net)


def lower_with_number(net: Net, compute: Any, ids: Tensor, beta: float) -> Any:
    holder = type("Holder", (), {"beta": torch.tensor(beta, dtype=torch.float64)})

    def function(ids: Tensor) -> tuple[Tensor, Tensor]:
        x = compute(net(ids).float(), holder.beta.item())
        return x.float().mean(), x

    return lower(function, (ids,), net, backward=False)
