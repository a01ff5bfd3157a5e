"""What is predicted against what is counted; policies against one device and against every other choice."""

from __future__ import annotations

import copy
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autosp import AutoSPStrategy
from lightning_autosp.attention.select import AttentionMethod
from lightning_autosp.memory.costs import Roofline
from lightning_autosp.memory.devices import device_kind, limit_bytes, parse_bytes
from lightning_autosp.memory.estimate import MemoryLimitError, optimizer_memory
from lightning_autosp.memory.joint import Joint
from lightning_autosp.memory.meter import LiveBytes
from lightning_autosp.memory.partition import MemoryOptions, Partitioner
from lightning_autosp.memory.policy import LEAST, SPARSER, Limits, Recomputation, candidates, choose, evaluate, keep_for
from lightning_autosp.plan import PlanError, Planner, plan_target

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from models import batch_of, make
from one_rank import fake_ranks, measure_step

ROOFLINE = Roofline(1e12, 1e11, 1e10, 1e10)


class TestMeter:
    def test_counts_what_is_alive(self) -> None:
        with LiveBytes() as meter:
            x = torch.zeros(1000)
            y = x + 1
            view = y.view(10, 100)
            assert (meter.live, meter.peak) == (8000, 8000)
            del x, y
            assert meter.live == 4000
            del view
            assert (meter.live, meter.peak) == (0, 8000)

    def test_leaves_out_what_is_known(self) -> None:
        x = torch.zeros(1000)
        with LiveBytes([x]) as meter:
            x.add_(1)
            assert meter.live == 0


@pytest.mark.parametrize(
    ("world", "name", "policy", "length"),
    [
        (1, "llama", "none", 128),
        (1, "mixtral", "attention", 96),
        (1, "mistral", "none", 200),  # a window: attention in tiles, whose result is laid out otherwise than the operator's
        (2, "gpt2", "full", 128),
        (1, "bert", "full", 128),
        (2, "llama", "none", 128),
        (2, "mistral", "attention", 100),
        (4, "llama", "full", 128),
        (4, "bert", "none", 130),
    ],
)
def test_prediction_is_what_is_counted(world: int, name: str, policy: str, length: int) -> None:
    with fake_ranks(world) as mesh:
        found = measure_step(make(name), batch_of(length), mesh, policy)
    assert found.estimate.policy == policy
    assert found.estimate.saved == pytest.approx(found.saved, rel=0.01)
    assert found.predicted_peak == pytest.approx(found.peak, rel=0.02)


@pytest.mark.parametrize(
    ("method", "policy"),
    [
        ("ulysses", "full"),
        ("gather_kv", "none"),
        ("gather_kv", "attention"),
        ("ring", "none"),
        ("ring", "full"),
        ("hybrid", "attention"),
    ],
)
def test_methods_of_attention_take_what_is_predicted(method: AttentionMethod, policy: str) -> None:
    with fake_ranks(4) as mesh:
        found = measure_step(make("bert"), batch_of(130), mesh, policy, attention=method)
    assert found.estimate.saved == pytest.approx(found.saved, rel=0.01)
    assert found.predicted_peak == pytest.approx(found.peak, rel=0.02)


@pytest.mark.parametrize(("name", "policy"), [("gpt2", "full"), ("llama", "nested/2")])
def test_tiles_and_chunks_of_heads_take_what_is_predicted(name: str, policy: str) -> None:
    """Of norms, MLPs and, of a GPT-2, whose ranks have two heads of keys each, of what Ulysses exchanges."""
    with fake_ranks(2) as mesh:
        whole, found = (measure_step(make(name), batch_of(512), mesh, policy, tile_local=rows) for rows in (None, 64))
    assert found.saved == found.estimate.saved == whole.saved
    assert found.predicted_peak == found.peak < 0.9 * whole.peak


@pytest.mark.parametrize("policy", ["none", "attention", "full", "auto"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_policies_are_exact(name: str, policy: str) -> None:
    """One rank, so that nothing but the policy differs; dropout draws what it draws without one."""
    module = make(name)
    reference = copy.deepcopy(module)
    batch = batch_of(96)
    torch.manual_seed(1)
    expected = reference.training_step(batch, 0)
    expected.backward()
    torch.manual_seed(1)
    with fake_ranks(1) as mesh:
        found = measure_step(module, batch, mesh, policy, limit=2**20 if policy == "auto" else None)
    torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-6, atol=0)
    for (key, one), other in zip(reference.named_parameters(), module.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        error = float((one.grad - other.grad).norm())
        assert error <= 1e-5 * float(one.grad.norm()) + 1e-8, key


# Choosing.


class Chain(nn.Module):
    """Few enough operators to try every choice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.square().mean()


class _Divided(Exception):
    pass


def joint_of(module: nn.Module, *inputs: Tensor) -> tuple[Joint, set[Any]]:
    """Return the joint graph of a module and what PyTorch's partitioner keeps."""
    found: list[tuple[Joint, set[Any]]] = []

    def divide(gm: torch.fx.GraphModule, joint_inputs: Any, **options: Any) -> Any:
        joint = Partitioner.read(gm, options["num_fwd_outputs"], range(len(list(module.parameters()))))
        found.append((joint, Partitioner.default(gm, joint, joint_inputs, **options)))
        raise _Divided

    from torch._dynamo.backends.common import aot_autograd

    names = [name for name, _ in module.named_parameters()]
    count = len(names)

    def functional(*values: Tensor) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(module, dict(zip(names, values[:count], strict=True)), values[count:])
        return out if isinstance(out, tuple) else (out,)

    leaves = [parameter.detach().requires_grad_() for parameter in module.parameters()]
    traced = torch.fx.experimental.proxy_tensor.make_fx(functional, tracing_mode="real", pre_dispatch=True)(*leaves, *inputs)
    with pytest.raises(_Divided):
        aot_autograd(fw_compiler=lambda g, i: g, bw_compiler=lambda g, i: g, partition_fn=divide)(traced, [*leaves, *inputs])
    return found[0]


@pytest.fixture(scope="module")
def chain() -> tuple[Joint, set[Any]]:
    return joint_of(Chain(), torch.randn(64, 32))


def test_auto_is_as_good_as_every_choice(chain: tuple[Joint, set[Any]]) -> None:
    joint, default = chain
    again = Recomputation(joint, ROOFLINE)
    base = keep_for(joint, "full")
    found = candidates(joint, again, base)
    assert 3 <= len(found) <= 10
    every = [
        evaluate(joint, "", base | set(subset), again, Limits(None))
        for size in range(len(found) + 1)
        for subset in itertools.combinations(found, size)
    ]
    named = [choose(joint, policy, ROOFLINE, Limits(None), default) for policy in ("none", "full", "attention")]
    smallest = min(one.peak for one in every)
    for limit in (smallest, smallest + 4096, smallest + 12288, smallest + 2**20):
        chosen = choose(joint, "auto", ROOFLINE, Limits(limit), default)
        assert chosen.fits
        assert chosen.peak <= limit
        assert chosen.seconds == pytest.approx(min(one.seconds for one in (*every, *named) if one.peak <= limit))


def test_auto_says_that_nothing_fits(chain: tuple[Joint, set[Any]]) -> None:
    joint, default = chain
    chosen = choose(joint, "auto", ROOFLINE, Limits(1000), default)
    assert not chosen.fits
    assert chosen.peak <= min(
        choose(joint, policy, ROOFLINE, Limits(None), default).peak for policy in ("none", "full", "attention")
    )


def test_auto_spends_what_it_is_given() -> None:
    """Less memory, more computing again, never more than the limit."""
    counted = []
    with fake_ranks(1) as mesh:
        most = measure_step(make("llama", num_hidden_layers=4), batch_of(128), mesh, "none")
        least = measure_step(make("llama", num_hidden_layers=4), batch_of(128), mesh, "full")
        assert least.peak < most.peak
        for share in (1.0, 0.6, 0.3):
            limit = int(least.peak + share * (most.peak - least.peak))
            found = measure_step(make("llama", num_hidden_layers=4), batch_of(128), mesh, "auto", limit)
            assert found.peak <= limit
            counted.append(found.estimate.seconds_again)
    assert counted == sorted(counted)
    assert counted[-1] < least.estimate.seconds_again


def test_what_is_kept_a_token_and_layer() -> None:
    """Of a Llama-3.1-8B layer on one rank: its input; with "attention" also attention's result and log-sum-exp."""
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "vocab_size": 1024}

    def kept(layers: int) -> dict[str, int]:
        with torch.device("meta"):
            module = make("llama", **sizes, num_hidden_layers=layers)
        planner = Planner(module, batch_of(256), world=1, device=device_kind("h200"), precision="bf16-true", backend="aot_eager")
        return {name: one.saved for name, one in planner.at(8192, ("attention", "full")).estimates.items()}

    two, three = kept(2), kept(3)
    hidden, log_sum_exp = 4096 * 2, 32 * 4
    assert (three["full"] - two["full"]) / 8192 == pytest.approx(hidden, rel=0.02)
    assert (three["attention"] - two["attention"]) / 8192 == pytest.approx(2 * hidden + log_sum_exp, rel=0.02)


def test_parameters_are_gathered_again() -> None:
    """Whole parameters are not among what is kept, whatever the policy."""
    with fake_ranks(4) as mesh:
        module = make("llama", vocab_size=4096)
        found = measure_step(module, batch_of(64), mesh, "none")
    assert found.saved < 4096 * 64 * 4 / 2


def test_cheap_values_are_computed_once_more() -> None:
    """Where the smallest choice does not fit as it is, norms are not kept while the rest of their layer is differentiated."""
    with fake_ranks(2) as mesh:
        plain = measure_step(make("llama", num_hidden_layers=4), batch_of(512), mesh, "full")
        module = make("llama", num_hidden_layers=4)
        fresh = measure_step(module, batch_of(512), mesh, "full", limit=plain.peak - 1)
    assert fresh.peak < 0.95 * plain.peak
    assert fresh.predicted_peak == pytest.approx(fresh.peak, rel=0.02)
    assert fresh.saved == plain.saved
    assert fresh.estimate.flops_again == plain.estimate.flops_again
    assert fresh.estimate.seconds_again > plain.estimate.seconds_again


def test_cheap_values_computed_once_more_are_exact() -> None:
    module = make("llama", num_hidden_layers=3)
    reference = copy.deepcopy(module)
    reference.training_step(batch_of(256), 0).backward()
    with fake_ranks(1) as mesh:
        found = measure_step(module, batch_of(256), mesh, "full", limit=1)
    assert not found.estimate.fits
    for one, other in zip(reference.parameters(), module.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert float((one.grad - other.grad).norm()) <= 1e-5 * float(one.grad.norm())


@pytest.mark.parametrize(
    ("name", "policy", "limit"), [("llama", "full/2", None), ("llama", "nested/2", 1), ("bert", "nested/3", None)]
)
def test_fewer_layers_than_all_are_exact(name: str, policy: str, limit: int | None) -> None:
    """The inputs of some are kept; those between are computed again at once, or one after the other, with the same dropout."""
    module = make(name, num_hidden_layers=4)
    reference = copy.deepcopy(module)
    torch.manual_seed(1)
    with fake_ranks(1) as mesh:
        found = measure_step(module, batch_of(128), mesh, policy, limit)
    assert found.saved == found.estimate.saved
    assert found.peak == found.predicted_peak
    torch.manual_seed(1)
    reference.training_step(batch_of(128), 0).backward()
    for one, other in zip(reference.parameters(), module.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert float((one.grad - other.grad).norm()) <= 1e-5 * float(one.grad.norm()) + 1e-8


def test_nested_backward_has_one_layer_at_a_time() -> None:
    """It takes less than "full", which keeps the inputs of all, and computes three of four layers once more."""
    with fake_ranks(2) as mesh:
        found = {
            policy: measure_step(make("llama", num_hidden_layers=8), batch_of(512), mesh, policy)
            for policy in ("full", "full/4", "nested/4")
        }
    full, sparse, nested = found.values()
    assert sparse.saved == nested.saved
    assert nested.peak == nested.predicted_peak
    assert nested.peak < full.peak < sparse.peak
    assert full.estimate.flops_again < nested.estimate.flops_again < 2 * full.estimate.flops_again


def test_less_is_kept_where_full_does_not_fit() -> None:
    chain = Chain()
    chain.layers.extend(nn.Linear(32, 32) for _ in range(60))
    joint, default = joint_of(chain, torch.randn(4096, 32))
    peaks = {name: choose(joint, name, ROOFLINE, Limits(1), default).peak for name in ("full", *SPARSER)}
    saved = {name: len(keep_for(joint, name)) for name in peaks}
    assert [saved[name] for name in ("full", "full/2", "full/3", "full/4")] == sorted(set(saved.values()), reverse=True)
    for limit in peaks.values():
        found = choose(joint, LEAST, ROOFLINE, Limits(limit), default)
        assert found.fits
        assert found.policy == next(name for name, peak in peaks.items() if peak <= limit)
        assert choose(joint, "auto", ROOFLINE, Limits(limit), default).fits


def test_auto_tiles_what_does_not_fit_otherwise() -> None:
    """An MLP far wider than the rest: kept or not, its inside does not fit at once."""
    wide = {"intermediate_size": 2048, "num_hidden_layers": 1}
    with fake_ranks(1) as mesh:
        least = measure_step(make("llama", **wide), batch_of(8192), mesh, "full")
        module = make("llama", **wide)
        found = measure_step(module, batch_of(8192), mesh, "auto", limit=int(0.7 * least.peak))
    assert found.estimate.fits
    assert found.peak < 0.75 * least.peak


# Optimizers, limits.


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.RMSprop(p),
    ],
)
def test_optimizers_take_what_is_predicted(make_optimizer: Any) -> None:
    module = nn.Linear(100, 50)
    optimizer = make_optimizer(module.parameters())
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    predicted = optimizer_memory(optimizer, lambda parameter: parameter)
    assert not optimizer.state
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes([*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]) as meter:
        optimizer.step()
        state = meter.live
        meter.reset()
        optimizer.step()
    assert predicted == (state, meter.peak - state)


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * 2**30), ("96 GB", 96 * 10**9), ("1.5KiB", 1536), (123, 123), ("512mib", 2**29)]
)
def test_bytes(text: Any, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80 apples", "", "-1GiB", 0, -5, True, None])
def test_no_bytes(text: Any) -> None:
    with pytest.raises(ValueError, match="memory_limit"):
        parse_bytes(text)


def test_fractions() -> None:
    assert limit_bytes(0.5, 1000) == 500
    with pytest.raises(ValueError, match="between 0 and 1"):
        limit_bytes(1.5, 1000)


@pytest.mark.parametrize(
    ("option", "value"),
    [("memory_limit", value) for value in ("much", "80 apples", 0, -1, 2.0, -0.5, 0.0, True, "-1GiB")]
    + [("checkpoint_policy", "some"), ("checkpoint_policy", None)],
)
def test_options_that_are_not_known(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option}={value!r} is .*(Use|fraction)"):
        AutoSPStrategy(**{option: value})


def test_a_step_that_does_not_fit_is_refused_before_it_runs(chain: tuple[Joint, set[Any]]) -> None:
    joint, default = chain
    from lightning_autosp.memory.estimate import States

    options = MemoryOptions("auto", 20_000, True, ROOFLINE)
    partitioner = Partitioner(options, States(parameters=10_000), [])
    partitioner.decide(joint, default)
    with pytest.raises(MemoryLimitError, match=r"predicted to take .* memory_limit is 19\.5 KiB .*parameters 9\.8 KiB"):
        partitioner._refuse()


# Plans.


class TestPlan:
    def planner(self, **options: Any) -> Planner:
        with torch.device("meta"):
            module = make("llama")
        arguments: dict[str, Any] = {"world": 4, "device": device_kind("h100"), "backend": "aot_eager", **options}
        return Planner(module, batch_of(64), **arguments)

    def test_is_what_a_rank_takes(self) -> None:
        plan = self.planner().at(256)
        with fake_ranks(4) as mesh:
            found = measure_step(make("llama"), batch_of(256), mesh, "full")
        estimate = plan.estimates["full"]
        parts = ("gradients", "saved", "gathered", "collectives", "transient", "workspace")
        assert sum(estimate.categories[name] for name in parts) == found.peak
        assert estimate.saved == found.saved
        parameters = sum(-(-p.shape[0] // 4) * p[0].numel() * 4 for p in make("llama").parameters())
        assert estimate.categories["optimizer"] == pytest.approx(2 * parameters, rel=0.01)

    def test_longest(self) -> None:
        fits, fails = self.planner(limit=3 * 2**30).longest()
        assert fits.best[1].fits
        assert fails is not None
        assert not fails.best[1].fits
        assert fails.length - fits.length <= max(4 * 128, 0.01 * fits.length)

    def test_json_has_what_scripts_want(self) -> None:
        found = self.planner().at(64).to_dict()
        assert {"length", "fits", "policy", "peak_bytes", "host_bytes", "categories", "step_seconds"} <= found.keys()

    def test_nothing_fits(self) -> None:
        with pytest.raises(PlanError, match="Not even"):
            self.planner(limit=2**20).longest()

    def test_unknown_device(self) -> None:
        with pytest.raises(ValueError, match=r"'h9000' is not known.*h100"):
            plan_target("nothing.py:Nothing", world=2, device="h9000")

    @pytest.mark.parametrize("options", [{"device_memory": "80 apples"}, {"world": 0}])
    def test_unknown_numbers(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"80 apples.*Use an integer|world=0 is not known"):
            plan_target("nothing.py:Nothing", **{"world": 2, **options})

    @pytest.mark.parametrize("length", [0, -5])
    def test_no_length(self, length: int) -> None:
        with pytest.raises(ValueError, match=f"length={length} is not known. Use a number of positions"):
            self.planner().fitting(length)

    def test_unknown_precision(self) -> None:
        with pytest.raises(PlanError, match="'int8' cannot be planned"):
            self.planner(precision="int8")

    def test_the_module_stays_as_it_is(self) -> None:
        module = make("llama")
        before = {name: (id(parameter), parameter.clone()) for name, parameter in module.named_parameters()}
        Planner(module, batch_of(64), world=2, device=device_kind("h100")).at(128, ("full",))
        for name, parameter in module.named_parameters():
            assert id(parameter) == before[name][0]
            assert torch.equal(parameter, before[name][1])
