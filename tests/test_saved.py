"""Plans that are made on one process and given to training on several."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jobs
import modules
import pytest
from pool import Pool
from test_fit import assert_same, fit, reference
from test_refusals import refused

from lightning_autosp import AutoSPStrategy
from lightning_autosp.__main__ import main
from lightning_autosp.compiler.backend import CompileBackend
from lightning_autosp.memory.devices import device_kind
from lightning_autosp.plan import Plan, PlanError, Planner
from lightning_autosp.saved import ProgramFacts, SavedPlan, SavedPlanError

CONTEXT = device_kind("h100").overhead
LENGTH = 96


def plan_of(
    module: str,
    world: int,
    *,
    above: float | None = None,
    length: int = LENGTH,
    precision: Any = None,
    backend: CompileBackend = "aot_eager",
    **options: Any,
) -> Plan:
    """Plan as on a laptop, on a batch of another length; within a limit that lies between what "full" and "none" take."""
    batch = next(iter(modules.loader(2, 48, 2)))
    own = getattr(modules, module)(**options)

    def planner(limit: int | None) -> Planner:
        return Planner(own, batch, world=world, device=device_kind("h100"), limit=limit, backend=backend, precision=precision)

    plan = planner(None).at(length)
    if above is None:
        return plan
    least, most = (plan.estimates[name].peak for name in ("full", "none"))
    return planner(int(least + above * (most - least))).at(length)


@pytest.mark.dist
@pytest.mark.parametrize(("world", "above", "policy"), [(2, None, "none"), (1, 0.4, "mixture"), (2, 0.4, "mixture")])
def test_training_does_what_was_planned(pool: Pool, world: int, above: float | None, policy: str, tmp_path: Path) -> None:
    plan = plan_of("HFLlama", world, above=above)
    assert plan.best[1].policy == policy
    plan.save(tmp_path / "plan.json")
    run = fit(pool, "HFLlama", {"plan": str(tmp_path / "plan.json")}, world, length=LENGTH, num_samples=5)
    assert_same(run, reference(pool, "HFLlama", length=LENGTH, num_samples=5))
    first, last = (step["memory"] for step in run["report"]["steps"])
    assert first["policy"] == policy
    assert last["policy"] == "none"  # one sample instead of two: planned as without
    assert first["peak"] - first["categories"]["overhead"] == plan.best[1].peak - CONTEXT
    assert first["saved"] == plan.best[1].saved


def test_inductor_runs_a_mixture_that_was_planned_for_it(tmp_path: Path) -> None:
    """Its joint graph has other operators, and those are what was planned."""
    plan = plan_of("HFLlama", 1, above=0.4, backend="inductor")
    assert plan.best[1].policy == "mixture"
    plan.save(tmp_path / "plan.json")
    strategy = AutoSPStrategy(plan=tmp_path / "plan.json", compile_backend="inductor")
    trainer = jobs.Trainer(**jobs.QUIET, devices=1, strategy=strategy, max_steps=1)
    trainer.fit(modules.HFLlama(), modules.loader(2, LENGTH, 2))
    memory = strategy.report.steps[0].memory
    assert memory is not None
    assert memory.policy == "mixture"
    assert memory.saved == plan.best[1].saved
    assert memory.peak - memory.categories["overhead"] == plan.best[1].peak - CONTEXT


@pytest.mark.dist
def test_a_plan_in_tiles(pool: Pool, tmp_path: Path) -> None:
    """Norms among what is in tiles, and layers computed again one after the other."""
    batch = next(iter(modules.loader(2, 48, 2)))
    planner = Planner(modules.HFLlama(), batch, world=2, device=device_kind("h100"), limit=1, backend="aot_eager")
    assert planner.fitting(LENGTH).saved["auto"].decision.tiled
    planner.at(LENGTH, ("nested/2",)).save(tmp_path / "plan.json")
    run = fit(pool, "HFLlama", {"plan": str(tmp_path / "plan.json")}, 2, length=LENGTH, num_samples=4)
    assert run["report"]["steps"][0]["memory"]["policy"] == "nested/2"
    assert_same(run, reference(pool, "HFLlama", length=LENGTH, num_samples=4))


@pytest.mark.parametrize(
    ("planned", "trained", "difference"),
    [
        ({}, {"length": 64}, r"for sequences of 96 positions, and these have 64"),
        ({}, {"module_name": "HFLlama"}, r"it is for Shallow, and this is HFLlama"),
        ({"causal": False}, {}, r"operators of its program have other arguments"),
        ({}, {"batch_size": 1}, r"its program takes int64\[2, 96\] where this one takes int64\[1, 96\]"),
        ({}, {"precision": "bf16-true"}, r"its program takes float32\[.*where this one takes bfloat16\["),
        ({}, {"precision": "bf16-mixed"}, r"it is for no autocast, and here is torch.bfloat16 \(precision\)"),
        ({"precision": "bf16-mixed"}, {}, r"it is for torch.bfloat16 autocast, and here is none"),
        ({"world": 4}, {}, r"for 4 rank\(s\) that share each sequence, and here are 1"),
    ],
)
def test_the_plan_of_another_step(planned: dict[str, Any], trained: dict[str, Any], difference: str, tmp_path: Path) -> None:
    plan_of("Shallow", **{"world": 1, **planned}).save(tmp_path / "plan.json")
    options = {"module_name": "Shallow", "length": LENGTH, "max_steps": 1, **trained}
    with pytest.raises(SavedPlanError, match=rf"{difference}.*plan \.\.\. --save FILE"):
        jobs.fit(options.pop("module_name"), {"plan": str(tmp_path / "plan.json")}, 1, **options)


@pytest.mark.dist
def test_all_ranks_refuse_alike(pool: Pool, tmp_path: Path) -> None:
    """Parts of 49 and 48 positions: only the first rank's program is the one that was planned."""
    plan_of("Shallow", 2, length=98).save(tmp_path / "plan.json")
    plan = {"plan": str(tmp_path / "plan.json")}
    message = refused(pool, functools.partial(jobs.fit, length=97), "Shallow", plan, 2)
    assert "for sequences of 98 positions, and these have 97" in message


@pytest.mark.dist
def test_sharded_otherwise(pool: Pool, tmp_path: Path) -> None:
    plan_of("Shallow", 2).save(tmp_path / "plan.json")
    message = refused(pool, jobs.fit, "Shallow", {"plan": str(tmp_path / "plan.json"), "parameter_sharding": "replicate"}, 2)
    assert "for sharded parameters, and here they are replicated" in message


def test_another_version_of_torch(tmp_path: Path) -> None:
    plan_of("Shallow", 1).save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    data["saved"]["torch"] = "1.0.0"
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(SavedPlanError, match=r"made with torch 1\.0\.0, and this is "):
        SavedPlan.load(tmp_path / "plan.json").refuse_run("Shallow", 1, 1, sharded=False)


def test_operators_of_another_backend(tmp_path: Path) -> None:
    """A mixture names single operators, which have to be the same."""
    plan = plan_of("HFLlama", 1, above=0.4)
    saved = plan.saved["auto"]
    assert saved.decision.places
    plan.saved["auto"] = saved.__class__(**{**vars(saved), "decision": saved.decision._replace(operators="other")})
    plan.save(tmp_path / "plan.json")
    trainer = jobs.Trainer(**jobs.QUIET, devices=1, strategy=AutoSPStrategy(plan=tmp_path / "plan.json"), max_steps=1)
    with pytest.raises(SavedPlanError, match="compile_backend forward has others"):
        trainer.fit(modules.HFLlama(), modules.loader(2, LENGTH, 2))


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"saved": null}', '{"saved": {"module": "GPT"}}'])
def test_no_plan(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SavedPlanError, match=r"plan='.*plan.json' (cannot be read|holds no plan).*--save FILE"):
        AutoSPStrategy(plan=path)


def test_two_decisions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both say what is kept"):
        AutoSPStrategy(plan=tmp_path / "plan.json", checkpoint_policy="full")


def test_a_step_without_backward_decides_nothing(tmp_path: Path) -> None:
    batch = next(iter(modules.loader(2, 48, 2)))
    plan = AutoSPStrategy.plan(modules.Regression().requires_grad_(False), batch, world=2)
    with pytest.raises(PlanError, match="no backward"):
        plan.save(tmp_path / "plan.json")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "planned.py").write_text(
        "import modules\ndef model(): return modules.GPT()\ndef batch(): return next(iter(modules.loader(2, 48, 2)))\n"
    )
    path = tmp_path / "plan.json"
    target, batch = f"{tmp_path}/planned.py:model", f"{tmp_path}/planned.py:batch"
    arguments = ["plan", target, "--batch", batch, "--world", "2", "--backend", "aot_eager", "--save", str(path), "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(path.read_text())
    assert SavedPlan.load(path).world == 2
    assert main([*arguments[:-2], str(tmp_path / "missing" / "plan.json")]) == 2


def test_facts_do_not_depend_on_the_process() -> None:
    """Tile programs are numbered as they are made, groups named as they are opened."""
    first, second = (plan_of("HFMistral", 2, length=61).saved["none"].program for _ in range(2))
    assert first == second
    assert isinstance(first, ProgramFacts)
    assert not first.differences(second)
