"""Values on the host between forward and backward: exact, counted to the byte, and moved only where that helps."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_autosp import AutoSPStrategy
from lightning_autosp.memory import host, offload
from lightning_autosp.memory.costs import Roofline
from lightning_autosp.memory.devices import device_kind
from lightning_autosp.memory.estimate import MemoryLimitError, States
from lightning_autosp.memory.joint import Joint, Transfer
from lightning_autosp.memory.partition import MemoryOptions, Partitioner
from lightning_autosp.memory.policy import Limits, choose, keep_for
from lightning_autosp.plan import Planner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from models import batch_of, make
from one_rank import fake_ranks, measure_step
from pool import Pool
from test_fit import assert_same, fit, reference
from test_memory import ROOFLINE, Chain, joint_of


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have values of small models moved, too."""
    monkeypatch.setattr(offload, "SMALLEST", 1024)


def assert_exact(module: Any, reference: Any, loss: Any, batch: Any) -> None:
    torch.manual_seed(1)
    expected = reference.training_step(batch, 0)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    for (key, one), other in zip(reference.named_parameters(), module.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        error = float((one.grad - other.grad).norm())
        assert error <= 1e-5 * float(one.grad.norm()) + 1e-8, key


@pytest.mark.parametrize(
    ("world", "name", "length"),
    [(1, "llama", 128), (1, "mistral", 200), (2, "gpt2", 128), (2, "bert", 130)],
)
@pytest.mark.usefixtures("small")
def test_prediction_is_what_is_counted(world: int, name: str, length: int) -> None:
    """On the device and on the host."""
    with fake_ranks(world) as mesh:
        found = measure_step(make(name), batch_of(length), mesh, "offload")
    assert found.host == found.estimate.host > 0
    assert found.saved == found.estimate.saved
    assert found.peak == found.predicted_peak


@pytest.mark.parametrize(("name", "backend"), [("bert", "aot_eager"), ("llama", "inductor")])
@pytest.mark.usefixtures("small")
def test_is_exact(name: str, backend: Any) -> None:
    module = make(name)
    reference = copy.deepcopy(module)
    batch = batch_of(96)
    torch.manual_seed(1)
    with fake_ranks(1) as mesh:
        found = measure_step(module, batch, mesh, "offload", backend=backend)
    assert found.estimate.host > 0
    assert_exact(module, reference, found.loss, batch)


# What is moved, where copies begin and are waited for.


class Returned(nn.Module):
    """Values that share memory, that are returned, that are results of one operator, that are small."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.layers[0](x)
        second = torch.tanh(self.layers[1](first.view(32, 64).view(64, 32)))
        values, _ = second.sort(dim=0)
        third = torch.sigmoid(self.layers[2](values))
        return self.layers[3](third).square().mean(), third


@pytest.fixture(scope="module")
def chain() -> tuple[Joint, set[Any]]:
    return joint_of(Chain(), torch.randn(64, 32))


@pytest.mark.usefixtures("small")
def test_what_may_be_moved() -> None:
    joint, default = joint_of(Returned(), torch.randn(64, 32))
    schedule = joint.schedule(default)
    values = offload.movable(schedule)
    returned = {key for node in joint.outputs for key in joint.memory.made[node]}
    assert values
    for value in values:
        assert value not in joint.primals
        assert not returned & joint.memory.made[value].keys()
        assert value.meta["val"].nbytes >= 1024


@pytest.mark.usefixtures("small")
def test_values_that_share_memory_stay(chain: tuple[Joint, set[Any]]) -> None:
    joint, default = chain
    schedule = joint.schedule(default)
    value = offload.movable(schedule)[0]
    shares = next(iter(joint.memory.made[value]))
    other = next(node for node in joint.nodes if node is not value and shares in joint.memory.made[node])
    schedule.saved.append(other)
    assert value not in offload.movable(schedule)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("host_link", [1e6, 1e10, 1e13])
def test_memory_is_given_back_and_taken(chain: tuple[Joint, set[Any]], host_link: float) -> None:
    """Each copy begins before it is waited for, that before its use; never more than two are ahead."""
    joint, default = chain
    schedule = joint.schedule(default)
    values = offload.movable(schedule)
    assert len(values) >= 3
    moved = offload.move_to_host(schedule, values, Roofline(1e12, 1e11, 1e10, host_link))
    forward, backward = list(moved.forward), list(moved.backward)
    ahead = 0
    for value in values:
        start, wait = (forward.index(Transfer(value, step)) for step in ("offload", "offloaded"))
        assert forward.index(value) < start < wait
        assert all(value not in node.all_input_nodes for node in forward[wait + 1 :])
        start, wait = (backward.index(Transfer(value, step)) for step in ("fetch", "fetched"))
        assert start < wait
        assert all(value not in node.all_input_nodes for node in backward[:wait] if not isinstance(node, Transfer))
    for node in backward:
        if isinstance(node, Transfer):
            ahead += 1 if node.starts else -1
            assert ahead <= offload.AHEAD + 1
    assert moved.saved_storages().keys().isdisjoint(moved.host_storages())
    assert sum(moved.host_storages().values()) == sum(value.meta["val"].nbytes for value in values)


@pytest.mark.usefixtures("small")
def test_only_what_is_not_hidden_costs_time(chain: tuple[Joint, set[Any]]) -> None:
    joint, default = chain
    schedule = joint.schedule(default)
    values = offload.movable(schedule)
    size = sum(value.meta["val"].nbytes for value in values)
    assert offload.move_to_host(schedule, values, Roofline(1e12, 1e11, 1e10, 1e15)).stalled < 1e-9
    slow = offload.move_to_host(schedule, values, Roofline(1e12, 1e11, 1e10, 1e3)).stalled
    assert slow == pytest.approx(2 * size / 1e3, rel=1e-3)


# Choosing.


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("host_link", "moves"), [(1e13, True), (1e3, False)])
def test_auto_moves_what_costs_less_than_computing_again(chain: tuple[Joint, set[Any]], host_link: float, moves: bool) -> None:
    """Where the link is fast; as little as it takes to fit."""
    joint, default = chain
    roofline = Roofline(1e10, 1e9, 1e10, host_link)
    most = choose(joint, "none", roofline, Limits(None), default)
    limit = most.peak - 1
    without = choose(joint, "auto", roofline, Limits(limit), default)
    found = choose(joint, "auto", roofline, Limits(limit, None), default)
    assert not without.schedule.offloaded
    assert found.fits
    assert found.peak <= limit
    assert bool(found.schedule.offloaded) == moves
    assert found.seconds < without.seconds if moves else found.seconds == without.seconds


@pytest.mark.usefixtures("small")
def test_auto_keeps_to_the_limit_of_the_host(chain: tuple[Joint, set[Any]]) -> None:
    joint, default = chain
    roofline = Roofline(1e10, 1e9, 1e10, 1e13)
    smallest = choose(joint, "auto", roofline, Limits(1, None), default)
    assert not smallest.fits
    assert smallest.schedule.offloaded
    for host_limit in (0, 8192, 16384):
        found = choose(joint, "auto", roofline, Limits(smallest.peak, host_limit), default)
        assert sum(found.schedule.host_storages().values()) <= host_limit


@pytest.mark.usefixtures("small")
def test_ranks_follow_one_decision(chain: tuple[Joint, set[Any]]) -> None:
    joint, default = chain
    roofline = Roofline(1e10, 1e9, 1e10, 1e13)
    limit = choose(joint, "none", roofline, Limits(None), default).peak - 1
    first = Partitioner(MemoryOptions("auto", limit, False, roofline, host_limit=None), States(), [])
    decided = first.decide(joint, default)
    assert first.decided is not None
    assert first.decided.offloaded
    other = Partitioner(MemoryOptions("auto", limit // 2, False, roofline), States(), [], first.decided)
    followed = other.decide(joint, default)
    assert followed.schedule.offloaded == decided.schedule.offloaded
    assert list(followed.schedule.backward) == list(decided.schedule.backward)
    saved = first.decided._replace(kept=(), offloaded=())  # a plan from another process has numbers, not lines
    later = Partitioner(MemoryOptions("auto", limit, False, roofline), States(), [], saved)
    assert later.decide(joint, default).schedule.offloaded == decided.schedule.offloaded


@pytest.mark.usefixtures("small")
def test_auto_is_exact_and_counted_with_a_part_on_the_host() -> None:
    module = make("llama", num_hidden_layers=4)
    reference = copy.deepcopy(module)
    batch = batch_of(256)
    torch.manual_seed(1)
    with fake_ranks(1) as mesh:
        full = measure_step(copy.deepcopy(module), batch, mesh, "full")
        found = measure_step(module, batch, mesh, "auto", limit=int(0.9 * full.peak), host_limit=2**30)
    assert found.estimate.fits
    assert found.host == found.estimate.host > 0
    assert found.saved == found.estimate.saved > 0
    assert found.peak == found.predicted_peak
    assert_exact(module, reference, found.loss, batch)


# Limits.


@pytest.mark.usefixtures("small")
def test_a_host_that_is_too_small_is_refused(chain: tuple[Joint, set[Any]]) -> None:
    joint, default = chain
    partitioner = Partitioner(MemoryOptions("offload", None, False, ROOFLINE, host_limit=1000), States(), [])
    partitioner.decide(joint, default)
    size = sum(joint.memory.bytes_made(node) for node in keep_for(joint, "offload")) // 1024
    with pytest.raises(MemoryLimitError, match=rf"keeps {size}\.0 KiB on the host .* host_memory_limit is 1000 B"):
        partitioner._refuse()


def test_devices_that_cannot_pin() -> None:
    host.require_pinning(torch.device("cpu"))
    with pytest.raises(host.PinningError, match="the device is mps"):
        host.require_pinning(torch.device("mps"))
    if not torch.cuda.is_available():
        with pytest.raises(host.PinningError, match="none can be pinned"):
            host.require_pinning(torch.device("cuda", 0))


def test_limits_that_are_none() -> None:
    for limit in ("some", 0, 1.5):
        with pytest.raises(ValueError, match="host_memory_limit"):
            AutoSPStrategy(host_memory_limit=limit)


def test_plans_keep_to_the_host() -> None:
    with torch.device("meta"):
        module = make("llama")

    def plan(host_limit: int) -> Any:
        planner = Planner(module, batch_of(64), world=2, device=device_kind("h100"), backend="aot_eager", host_limit=host_limit)
        return planner.at(65536, ("full", "offload"))

    without, with_host = plan(0), plan(2**30)
    assert without.best[0] == "full"
    assert not without.estimates["offload"].fits
    assert with_host.estimates["offload"].fits
    assert with_host.estimates["offload"].host > 0
    assert "1.00 GiB of the host" in str(with_host)


@pytest.mark.dist
@pytest.mark.usefixtures("small")
def test_two_ranks_train_with_it(pool: Pool) -> None:
    run = fit(pool, "HFLlama", {"checkpoint_policy": "offload"}, 2, length=128, smallest_moved=1024)
    assert_same(run, reference(pool, "HFLlama", length=128))
    assert run["report"]["steps"][0]["memory"]["host"] > 0
