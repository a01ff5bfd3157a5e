"""Trainer runs on real ranks against the same module on one device."""

from __future__ import annotations

import functools
from typing import Any

import jobs
import numpy as np
import pytest
from pool import Pool

pytestmark = pytest.mark.dist
FULL, REPLICATE = {"parameter_sharding": "full"}, {"parameter_sharding": "replicate"}


@functools.cache
def _reference(pool: Pool, module: str, options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return pool.run(jobs.fit, 1, module, None, 1, **dict(options))[0]


def reference(pool: Pool, module: str, **options: Any) -> dict[str, Any]:
    return _reference(pool, module, tuple(sorted(options.items())))


def assert_same(run: dict[str, Any], one: dict[str, Any], *, gradient_rtol: float = 1e-5, digits: int = 6) -> None:
    """Loss within 1e-6 relative, gradients within 1e-5 relative norm, the curve and logged values to 6 decimals."""
    assert len(run["curve"]) == len(one["curve"]) > 0
    tolerance = 0.5 * 10**-digits
    for step, (got, want) in enumerate(zip(run["curve"], one["curve"], strict=True)):
        assert got.keys() == want.keys()
        for name, value in want.items():
            # six decimals of numbers near one; of larger ones, six significant digits: float32 has no more
            assert abs(got[name] - value) <= 2 * tolerance * max(1.0, abs(value)), (step, name, got[name], value)
    assert run["logged"].keys() == one["logged"].keys()
    for name, value in one["logged"].items():
        assert abs(run["logged"][name] - value) <= 2 * tolerance * max(1.0, abs(value)), (name, run["logged"][name], value)
    first, want = run["curve"][0]["loss"], one["curve"][0]["loss"]
    assert abs(first - want) <= max(1e-6, 2 * tolerance) * abs(want)
    assert_same_gradients(run, one, gradient_rtol)
    assert run["plain"]


def assert_same_gradients(run: dict[str, Any], one: dict[str, Any], rtol: float = 1e-5) -> None:
    assert run["gradients"].keys() == one["gradients"].keys()
    for name, gradient in one["gradients"].items():
        error = np.linalg.norm(run["gradients"][name] - gradient) / max(np.linalg.norm(gradient), 1e-12)
        # a gradient that is zero but for rounding (the key bias) has no relative error worth the name
        assert error <= rtol or np.linalg.norm(gradient) < 1e-6, (name, error)


def fit(pool: Pool, module: str, strategy: dict[str, Any], world_size: int, **options: Any) -> dict[str, Any]:
    """Fit on ranks, assert that all of them saw the same, and return the first's result."""
    runs = pool.run(jobs.fit, world_size, module, strategy, world_size, **options)
    for run in runs[1:]:
        assert run["logged"] == runs[0]["logged"]
        assert all(np.array_equal(run["weights"][name], value) for name, value in runs[0]["weights"].items())
    return runs[0]


@pytest.mark.parametrize(
    ("module", "sharding"),
    [("GPT", "full"), ("GPT", "replicate"), ("HFLlama", "full"), ("Encoder", "full"), ("Regression", "replicate")],
)
def test_two_ranks(pool: Pool, module: str, sharding: str) -> None:
    options = {"ignore_half": module in ("GPT", "HFLlama"), "length": 256}
    run = fit(pool, module, {"parameter_sharding": sharding}, 2, **options)
    assert_same(run, reference(pool, module, **options))
    step = run["report"]["steps"][0]
    assert step["in_full"] == []
    assert step["gathered"] == []
    assert len(step["attention"]) == 2
    assert run["report"]["graph_breaks"] == []
    assert run["report"]["num_graphs"] == {"training_step": 1}


@pytest.mark.parametrize("policy", ["attention", "full"])
def test_checkpoint_policies(pool: Pool, policy: str) -> None:
    """What is computed again is what was computed, collectives included, and there is less in between than without."""
    run = fit(pool, "HFLlama", {"checkpoint_policy": policy}, 2, length=128)
    assert_same(run, reference(pool, "HFLlama", length=128))
    memory = run["report"]["steps"][0]["memory"]
    assert memory["policy"] == policy
    assert memory["flops_again"] > 0
    assert memory["peak"] > memory["saved"] > 0


@pytest.mark.parametrize(("module", "length"), [("GPT", 250), ("HFLlama", 257)])
def test_any_length(pool: Pool, module: str, length: int) -> None:
    assert_same(fit(pool, module, FULL, 2, length=length), reference(pool, module, length=length))


@pytest.mark.parametrize("module", ["GPT", "HFLlama"])
def test_four_ranks(pool: Pool, module: str) -> None:
    options = {"length": 250, "ignore_half": True}
    assert_same(fit(pool, module, FULL, 4, **options), reference(pool, module, **options))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "method"),
    [(6, 2, "auto"), (6, 2, "ring"), (2, 2, "ulysses"), (2, 1, "hybrid")],
)
def test_methods_of_attention(pool: Pool, heads: int, kv_heads: int, method: str) -> None:
    options = {"module_options": {"heads": heads, "kv_heads": kv_heads}, "length": 250, "ignore_half": True}
    one = pool.run(jobs.fit, 1, "HFLlama", None, 1, **options)[0]
    run = fit(pool, "HFLlama", {"attention": method}, 4, **options)
    assert_same(run, one)
    step = run["report"]["steps"][0]
    assert step["in_full"] == step["gathered"] == []
    calls = step["attention"]
    assert all(method == "auto" or call["method"].startswith(method) for call in calls)
    assert all(call["sent"] > 0 and call["flops"] > 0 and "ulysses" in call["chosen"] for call in calls)
    within = sum(size for name, (_, size) in step["collectives"].items() if "across_ranks" in name)
    assert (within > 0) == any(call["method"].startswith(("ring", "gather_kv", "hybrid")) for call in calls)
    assert step["memory"]["peak"] > 0


def test_a_ring_is_gone_around_again_in_backward(pool: Pool) -> None:
    options = {"checkpoint_policy": "full", "compile_backend": "inductor", "attention": "ring"}
    run = fit(pool, "HFLlama", options, 2, length=128)
    assert_same(run, reference(pool, "HFLlama", length=128), digits=5)
    assert run["report"]["steps"][0]["memory"]["flops_again"] > 0


@pytest.mark.parametrize("method", ["gather_kv", "ring"])
def test_windows_fetch_from_neighbours(pool: Pool, method: str) -> None:
    run = fit(pool, "HFMistral", {"attention": method}, 4, length=250)
    assert_same(run, reference(pool, "HFMistral", length=250))
    assert {call["method"] for call in run["report"]["steps"][0]["attention"]} == {method}


def test_tables_of_positions_that_are_added_whole(pool: Pool) -> None:
    """Parameters have no memory while the step is captured for the second time, too."""
    run = fit(pool, "Tables", FULL, 3, length=61, validate=True)
    assert_same(run, reference(pool, "Tables", length=61, validate=True))
    assert run["report"]["num_graphs"] == {"training_step": 1, "validation_step": 1}
    for step in run["report"]["steps"]:
        assert step["in_full"] == []
        assert all("returned, logged" in whole["reason"] for whole in step["gathered"])
        assert len(step["attention"]) == 2


@pytest.mark.parametrize("sharding", ["full", "replicate"])
def test_data_times_sequence(pool: Pool, sharding: str) -> None:
    """Two groups with batch 1 against one device with batch 2, in the order the distributed sampler deals them."""
    strategy = {"parameter_sharding": sharding, "data_parallel_size": 2}
    runs = pool.run(jobs.fit, 4, "Regression", strategy, 4, batch_size=1)
    one = pool.run(jobs.fit_dealt, 1, "Regression", 2)[0]
    losses = [[step["loss"] for step in run["curve"]] for run in runs]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3]
    np.testing.assert_allclose(np.mean([losses[0], losses[2]], axis=0), one["losses"], rtol=2e-6)
    for run in runs:
        assert_same_gradients(run, one)


def test_logged_values_with_data_parallelism(pool: Pool) -> None:
    """`sync_dist` means and sums count every sample once."""
    run = pool.run(jobs.fit, 4, "Shallow", {"data_parallel_size": 2}, 4, batch_size=1, max_steps=1, limit_val_batches=0)
    assert {r["logged"]["loss"] for r in run} == {run[0]["logged"]["loss"]}
    assert run[0]["logged"]["right"] <= 2 * 63


@pytest.mark.parametrize(
    ("options", "sharding"),
    [
        ({"accumulate_grad_batches": 2}, "full"),
        ({"gradient_clip_val": 0.5}, "full"),
        ({"gradient_clip_val": 0.5}, "replicate"),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, "full"),
    ],
    ids=["accumulate", "clip_norm", "clip_norm_replicated", "clip_value"],
)
def test_trainer_options(pool: Pool, options: dict[str, Any], sharding: str) -> None:
    run = fit(pool, "Shallow", {"parameter_sharding": sharding}, 2, **options)
    assert_same(run, reference(pool, "Shallow", **options))


def test_bf16_mixed(pool: Pool) -> None:
    """Within the spread of bf16: the difference between one bf16 device and one fp32 device."""
    one = reference(pool, "Shallow", precision="bf16-mixed")
    exact = reference(pool, "Shallow")
    run = fit(pool, "Shallow", FULL, 2, precision="bf16-mixed")
    for got, low, high in zip(run["curve"], one["curve"], exact["curve"], strict=True):
        spread = max(abs(low["loss"] - high["loss"]), 2e-3 * abs(low["loss"]))
        assert abs(got["loss"] - low["loss"]) <= spread
    assert run["report"]["steps"][0]["in_full"] == []


def test_validation_with_a_torchmetric(pool: Pool) -> None:
    run = fit(pool, "Shallow", FULL, 2, validate=True)
    assert_same(run, reference(pool, "Shallow", validate=True))
    assert "val_accuracy" in run["logged"]
    assert run["report"]["graph_breaks"] == []


def test_metrics_in_every_way(pool: Pool) -> None:
    """Metrics that are updated, called, logged and returned do not cut the step."""
    run = fit(pool, "MetricsInEveryWay", FULL, 2, validate=True)
    assert_same(run, reference(pool, "MetricsInEveryWay", validate=True))
    names = {"train_accuracy", "returned", "mean", "tokens", "perplexity", "MulticlassAccuracy", "MulticlassF1Score"}
    assert names <= run["logged"].keys()
    assert run["report"]["graph_breaks"] == []


def test_a_metric_that_the_step_computes_with(pool: Pool) -> None:
    run = fit(pool, "MetricOfTheLoss", FULL, 2)
    assert_same(run, reference(pool, "MetricOfTheLoss"))
    assert ["a metric's value is wanted" in one["reason"] for one in run["report"]["graph_breaks"]] == [True]


@pytest.mark.parametrize("world_size", [1, 2])
def test_validate_test_predict(pool: Pool, world_size: int) -> None:
    one = pool.run(jobs.evaluate, 1, "Shallow", None, 1)[0]
    for run in pool.run(jobs.evaluate, world_size, "Shallow", {}, world_size):
        for stage in ("validated", "tested"):
            assert run[stage][0] == pytest.approx(one[stage][0], rel=1e-5)
        assert [p.shape for p in run["predicted"]] == [p.shape for p in one["predicted"]]
        for got, want in zip(run["predicted"], one["predicted"], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_one_device(pool: Pool) -> None:
    assert_same(fit(pool, "Shallow", {}, 1), reference(pool, "Shallow"))


def test_flash_attention(pool: Pool) -> None:
    run = fit(pool, "FlashGPT", {**FULL, "compile_backend": "inductor"}, 2, num_samples=8)
    assert_same(run, reference(pool, "FlashGPT", num_samples=8))
    step = run["report"]["steps"][0]
    assert [call["method"] for call in step["attention"]] == ["ulysses, flash_attn_func"] * 2
    assert not step["in_full"]
    assert not step["gathered"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_logits_in_tiles(pool: Pool, world_size: int) -> None:
    """Loss, accuracy, the largest and the mean of the logits are computed of a few positions at a time."""
    run = fit(pool, "LargeVocabulary", FULL, world_size, num_samples=8, tile_elements=4000)
    assert_same(run, reference(pool, "LargeVocabulary", num_samples=8))
    step = run["report"]["steps"][0]
    (tiled,) = step["tiled"]
    assert tiled["num_tiles"] > 1
    assert not step["kept"]


def test_inductor(pool: Pool) -> None:
    run = fit(pool, "Shallow", {**FULL, "compile_backend": "inductor"}, 2, num_samples=8)
    assert_same(run, reference(pool, "Shallow", num_samples=8), digits=5)  # other kernels, other rounding
    # Queries, keys and values in one exchange, and the result; forward and backward.
    assert run["report"]["steps"][0]["collectives"]["all_to_all_single"][0] == 2 * 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_attention_in_tiles(pool: Pool, backend: str) -> None:
    options = {"num_samples": 4, "length": 61}
    strategy = {**FULL, "compile_backend": backend}
    run = fit(pool, "HFGemma2", strategy, 2, **options, tile_elements=2 * 61 * 16)
    assert_same(run, reference(pool, "HFGemma2", **options), digits=5 if backend == "inductor" else 6)
    step = run["report"]["steps"][0]
    assert not step["in_full"]
    assert not step["gathered"]
    assert all("in tiles" in call["method"] + call["mask"] for call in step["attention"])


def test_attention_in_tiles_under_autocast(pool: Pool) -> None:
    options = {"num_samples": 4, "length": 61, "precision": "bf16-mixed"}
    run = fit(pool, "HFGemma2", FULL, 2, **options, tile_elements=2 * 61 * 16)
    one = reference(pool, "HFGemma2", **options)
    for got, want in zip(run["curve"], one["curve"], strict=True):
        assert abs(got["loss"] - want["loss"]) < 2e-2 * want["loss"]


def test_batch_sizes_that_change(pool: Pool) -> None:
    options = {"num_samples": 9, "batch_size": 4, "max_epochs": 2}
    assert_same(fit(pool, "Shallow", FULL, 2, **options), reference(pool, "Shallow", **options))


def test_graph_break_is_exact_and_named(pool: Pool) -> None:
    run = fit(pool, "Broken", FULL, 2)
    assert_same(run, reference(pool, "Broken"))
    assert len(run["report"]["graph_breaks"]) == 1
    assert "modules.py:" in run["report"]["graph_breaks"][0]["where"]
    assert run["report"]["num_graphs"]["training_step"] >= 2
    steps = run["report"]["steps"]
    assert [crossing["gathers"] for step in steps for crossing in step["crossings"]] == [[]]
    assert [step["gathered"] + step["in_full"] for step in steps] == [[] for _ in steps]
    assert all(step["in_full"] == [] for step in run["report"]["steps"])
