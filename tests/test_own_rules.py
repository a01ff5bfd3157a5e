"""Rules from outside of the package, for operators that PyTorch knows nothing of either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated import assert_exact
from torch import Tensor, nn

from lightning_autosp import check, rules
from lightning_autosp.collectives import Group, stack_across
from lightning_autosp.compiler import rules as registered


@torch.library.custom_op("autosp_tests::decayed_sum", mutates_args=())
def decayed_sum(x: Tensor, decay: float) -> Tensor:
    """`y[t] = decay * y[t - 1] + x[t]` along dimension 1."""
    rows = [x[:, 0]]
    for t in range(1, x.shape[1]):
        rows.append(decay * rows[-1] + x[:, t])
    return torch.stack(rows, 1)


@decayed_sum.register_fake
def _(x: Tensor, decay: float) -> Tensor:
    return torch.empty_like(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return decayed_sum(grad.flip(1), ctx.decay).flip(1), None


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.decay = inputs[1]


decayed_sum.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.autosp_tests.decayed_sum.default


def go_on(x: Tensor, decay: float, lengths: tuple[int, ...], group: Group) -> Tensor:
    """Scan this rank's part, and add what the parts before it come to."""
    own, rank = decayed_sum(x, decay), group.rank
    ends = stack_across(own[:, -1], group)[:rank]  # of no rank before the first, which takes part in the exchange all the same
    faded = [decay ** sum(lengths[other + 1 : rank]) for other in range(rank)]
    before = (ends * x.new_tensor(faded)[:, None, None]).sum(0)
    powers = decay ** torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return own + before[:, None] * powers[:, None]


def rule(facts: rules.Facts, node: Any) -> rules.Sharding | None:
    given = rules.bound(node)
    layout = facts.layout(given["x"])
    if layout is None or layout.dim != 1 or layout.merged:
        return None

    def emit(em: rules.Emitter, node: Any) -> Any:
        return em.call(go_on, (em.get(given["x"], layout), given["decay"], em.lengths(layout), em.group))

    return rules.Sharding({given["x"]: layout}, layout, emit, kind="exchange")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(decayed_sum(self.table(ids), 0.9)).square().mean()


IDS = torch.arange(2 * 13).reshape(2, 13) % 11


@pytest.fixture
def _nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "_families", dict(registered._families))


@pytest.mark.usefixtures("_nothing_registered")
def test_exact_and_sharded_with_the_rule_and_in_full_without() -> None:
    net = Net()
    without = assert_exact(net, (IDS,), net)
    assert [one.name for one in without.report.in_full] == ["autosp_tests.decayed_sum.default"]
    assert rules.register(OPERATOR)(rule) is rule
    for num_ranks in (2, 3):
        lowered = assert_exact(net, (IDS,), net, num_ranks=num_ranks, sharded=True)
        assert not lowered.report.in_full
        assert not lowered.report.gathered
    assert check(net, {"ids": IDS}, step="forward", num_ranks=3, strict=True).ok


def layout_of(facts: rules.Facts, node: Any) -> rules.Layout | None:
    return facts.layout(node.args[0])


@pytest.mark.usefixtures("_nothing_registered")
def test_a_wrong_rule_is_found() -> None:
    rules.register(OPERATOR)(lambda facts, node: rules.Sharding({node.args[0]: layout_of(facts, node)}, layout_of(facts, node)))
    result = check(Net(), {"ids": IDS}, step="forward")
    assert result.exit_code == 1, str(result)


torch.library.define("autosp_tests::squash", "(Tensor x, float width) -> Tensor", tags=(torch.Tag.pointwise,))
torch.library.impl("autosp_tests::squash", "cpu", lambda x, width: x / (width + x.abs()))
torch.library.register_fake("autosp_tests::squash", lambda x, width: torch.empty_like(x))
torch.library.register_autograd(
    "autosp_tests::squash",
    lambda ctx, grad: (grad * ctx.width / (ctx.width + ctx.saved_tensors[0].abs()) ** 2, None),
    setup_context=lambda ctx, inputs, output: (ctx.save_for_backward(inputs[0]), setattr(ctx, "width", inputs[1])),
)


def test_operators_that_are_tagged_pointwise_need_no_rule() -> None:
    net = Net()

    def squashed(ids: Tensor) -> Tensor:
        return net.head(torch.ops.autosp_tests.squash(net.table(ids), 2.0)).square().mean()

    lowered = assert_exact(squashed, (IDS,), net, num_ranks=3)
    assert not lowered.report.in_full


@pytest.mark.parametrize(
    ("operator", "error", "says"),
    [
        (torch.ops.aten.cumsum.default, ValueError, "aten.cumsum.default.: the package has a rule for it"),
        (torch.ops.autosp_tests.decayed_sum, TypeError, "Name one of its overloads: autosp_tests.decayed_sum.default"),
        (torch.relu, TypeError, "this is a builtin_function_or_method"),
    ],
)
def test_what_has_no_use_is_refused(operator: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        rules.register(operator)
