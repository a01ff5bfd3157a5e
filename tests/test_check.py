"""`check`: finds what is wrong, says what it could not compare, and leaves everything as it was."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import modules
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_autosp import AutoSPStrategy, CheckError, check, collectives
from lightning_autosp.__main__ import main
from lightning_autosp.compiler import rules

aten = torch.ops.aten
LENGTH = 33


def batch(length: int = LENGTH) -> dict[str, Tensor]:
    return next(iter(modules.loader(2, length)))


class Small(LightningModule):
    """One causal attention over tokens; returns a loss and what it is made of."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(modules.VOCABULARY, width), nn.Linear(width, modules.VOCABULARY)
        self.example_input_array = torch.arange(14).view(2, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)[:, None]
        return self.head(x + F.scaled_dot_product_attention(x, x, x, is_causal=True)).squeeze(1)

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self(batch["ids"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        self.log_dict({"accuracy": (logits.argmax(-1) == batch["labels"]).float().mean(), "cost": loss.item()})
        return {"loss": loss, "logits": logits}


class KeyBias(LightningModule):
    """The gradient of a key's bias is zero but for rounding, and nothing that is returned has positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.norm = nn.LayerNorm(16)

    def training_step(self, batch: Tensor, batch_idx: int = 0) -> Tensor:
        q, k, v = (project(batch).unflatten(-1, (4, 4)).transpose(1, 2) for project in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.norm(self.out(attended) + batch).square().mean()


def test_the_method_of_attention_is_said_and_can_be_asked_for() -> None:
    x = torch.randn(2, 12, 16)
    said = "chosen for 12 positions; training chooses by its own length and device"
    assert said in str(AutoSPStrategy.check(KeyBias(), x))
    asked = AutoSPStrategy(attention="ring").check(KeyBias(), x)
    assert (asked.ok, asked.methods) == (True, ["ring"])
    assert "ring, as asked" in str(asked)


def test_rounding_of_gradients_that_are_zero_is_no_change() -> None:
    torch.manual_seed(0)
    result = check(KeyBias(), torch.randn(2, 12, 16))
    assert result.ok, str(result)
    assert all(probe.num_changed for probe in result.probes)


@pytest.mark.parametrize("make", [modules.GPT, functools.partial(modules.HFLlama, layers=1)], ids=["GPT", "HFLlama"])
def test_equal_and_everything_left_as_it_was(make: Callable[[], LightningModule]) -> None:
    module, data = make(), batch()
    first = next(module.parameters())
    first.grad = torch.ones_like(first)
    module.eval()
    before, random, group = copy.deepcopy(module.state_dict()), torch.get_rng_state(), dist.is_initialized()
    result = AutoSPStrategy.check(module, data)
    assert result.ok, str(result)
    assert result.exit_code == 0
    assert result.traced
    assert result.precision.startswith("float64")
    names = {one.name for one in result.comparisons}
    assert {"loss", "logged loss"} | {f"gradient of {n}" for n, _ in module.named_parameters()} <= names
    assert [probe.position for probe in result.probes] == [0, 16, 17, 32]
    assert all(probe.num_changed for probe in result.probes)
    assert result.report.num_graphs == {"training_step": 1}
    assert "equal to one device" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["ok"]

    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in module.parameters() if p is not first)
    assert not module.training
    assert "log" not in vars(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert dist.is_initialized() == group
    assert all(torch.equal(value, batch()[key]) for key, value in data.items())


def test_a_process_group_of_the_users_stays(tmp_path: Path) -> None:
    if not dist.is_initialized():  # else it is one that does nothing, which other tests share
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    before = dist.group.WORLD, dist.get_world_size(), dist.get_backend()
    assert check(Small(), batch(), num_ranks=3).ok
    assert before == (dist.group.WORLD, dist.get_world_size(), dist.get_backend())


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_tokens_changed_on_either_side_of_a_cut(num_ranks: int) -> None:
    """Under a causal mask, a token changes the positions from its own on."""
    result = check(Small(), batch(11)["ids"], step="forward", num_ranks=num_ranks)
    assert result.ok, str(result)
    cut = -(-11 // num_ranks)
    assert [(probe.position, probe.num_changed) for probe in result.probes] == [(p, 11 - p) for p in (0, cut - 1, cut, 10)]


def wrong(monkeypatch: pytest.MonkeyPatch, target: Any, change: Callable[[Any], Any]) -> None:
    """Replace what the rule for `target` says."""
    find = rules.find

    def found(facts: Any, node: Any) -> Any:
        sharding = find(facts, node)
        return change(sharding) if node.target is target and sharding is not None else sharding

    monkeypatch.setattr(rules, "find", found)


def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every position see the one at the same place of the other ranks' parts."""

    def change(sharding: Any) -> Any:
        def emit(em: Any, node: Any) -> Any:
            return em.call(collectives.all_reduce_sum, (sharding.emit(em, node), em.group))

        return dataclasses.replace(sharding, emit=emit)

    wrong(monkeypatch, aten.scaled_dot_product_attention.default, change)


def test_attention_that_leaks_across_ranks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    leak(monkeypatch)
    result = check(Small(), batch(12))
    assert result.exit_code == 1
    last = result.probes[-1]
    assert last.position == 11
    assert last.leaked == ["logits[5]"]  # the same place of the first rank's part
    assert any("token 11 changed: logits[5] changes too" in one for one in result.differences)


def test_attention_within_ranks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, aten.scaled_dot_product_attention.default, lambda sharding: dataclasses.replace(sharding, emit=None))
    result = check(Small(), batch(12))
    assert result.exit_code == 1
    assert result.probes[0].lost == [f"logits[{position}]" for position in range(6, 12)]


def test_loss_averaged_by_rank_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong(monkeypatch, aten.cross_entropy_loss.default, lambda sharding: dataclasses.replace(sharding, emit=None))
    result = check(Small(), batch(12))
    assert result.exit_code == 1
    assert {"loss", "logged cost"} <= {one.name for one in result.comparisons if one.problem}
    assert next(one for one in result.comparisons if one.name == "loss").problem.startswith("rank 0 has relative error")


def test_a_lowered_step_that_fails_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(em: Any, node: Any) -> Any:
        raise ZeroDivisionError("wrong rule")

    wrong(monkeypatch, aten.cross_entropy_loss.default, lambda sharding: dataclasses.replace(sharding, emit=fail))
    result = check(Small(), batch(12))
    assert result.exit_code == 1
    assert result.differences == ["the lowered step fails where one device does not: ZeroDivisionError: wrong rule"]


class Noisy(nn.Module):
    """Dropout by module and by number, batch statistics, and (asked for) noise."""

    def __init__(self, noise: bool) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout, self.drop_rate = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), 0.25
        self.noise = noise

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)
        z = F.dropout(self.dropout(y), self.drop_rate, self.training)
        return {"clean": y, "loss": (z + torch.rand_like(z) if self.noise else z).pow(3).mean()}


def test_dropout_is_off_and_buffers_are_compared() -> None:
    module = Noisy(noise=False)
    result = check(module, torch.randn(2, 9, 3))
    assert result.ok, str(result)
    assert result.notes == ["dropout is 0 here: 2 setting(s) changed in the copies"]
    assert "buffer norm.running_mean" in {one.name for one in result.comparisons}
    assert (module.dropout.p, module.drop_rate) == (0.5, 0.25)
    assert not module.norm.running_mean.any()


def test_random_numbers_are_not_compared() -> None:
    result = check(Noisy(noise=True), torch.randn(2, 9, 3))
    assert result.exit_code == 2
    assert {one.name for one in result.comparisons} >= {"clean", "buffer norm.running_mean"}
    assert "loss" not in {one.name for one in result.comparisons}
    (skipped,) = result.skipped
    assert skipped.startswith("loss, gradients, and tokens changed: random numbers are drawn at ")
    assert "test_check.py:" in skipped


class Deciding(nn.Linear):
    """Python looks at a tensor's value."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.detach().max().item() > 1e6:
            y = y / 2
        return y.mean()


class CutBehindTheBlock(modules.Shallow):
    """Python looks at the data; what it then does is wrong on simulated ranks only, if asked for."""

    def __init__(self, wrong: bool = False) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, ids: Tensor) -> Tensor:
        x = self.blocks[0](self.tokens(ids))
        if self.goes_wrong():
            x = x * 1.01
        return self.head(self.norm(x))

    @torch.compiler.disable
    def goes_wrong(self) -> bool:
        return self.wrong and threading.current_thread() is not threading.main_thread()


def test_a_step_in_pieces() -> None:
    batch = next(iter(modules.loader(2, 13, 2)))
    result = check(CutBehindTheBlock(), batch)
    assert not result.traced
    assert result.ok, str(result)
    assert {"loss", "logged mean", "gradient of tokens.weight"} <= {one.name for one in result.comparisons}
    assert len(result.probes) == 4
    assert all(probe.num_changed for probe in result.probes)
    assert len(result.report.breaks) == 1
    assert sum(len(step.attention) for step in result.report.steps) == 1
    assert not any(step.gathered or step.in_full for step in result.report.steps)
    wrong = check(CutBehindTheBlock(wrong=True), batch)
    assert wrong.exit_code == 1
    assert "DIFFERENCE" in str(wrong)


def test_a_step_in_pieces_that_draws_random_numbers() -> None:
    class Noisy(Deciding):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(())

    result = check(Noisy(3, 3), torch.randn(2, 8, 3))
    assert result.exit_code == 2
    assert result.skipped[0].startswith("loss, gradients, and tokens changed: random numbers are drawn at ")


def test_strict() -> None:
    class Unruled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean((0, 2)).logcumsumexp(0).sum()

    x = torch.randn(2, 8, 3)
    assert check(Unruled(3, 3), x).ok
    found = AutoSPStrategy(strict=True).check(Unruled(3, 3), x)
    assert found.exit_code == 1
    assert "in full. The first is aten.logcumsumexp" in found.differences[0]
    cut = AutoSPStrategy(strict=True).check(Deciding(3, 3), x)
    assert cut.exit_code == 1
    assert cut.differences[0].startswith("strict=True: not one graph. At ")


def test_a_function_with_parameters_is_refused() -> None:
    net = nn.Linear(3, 3)
    with pytest.raises(CheckError, match="has no trainable parameters, but computes with some"):
        check(lambda x: net(x).mean(), torch.randn(2, 8, 3))
    assert net.weight.grad is None


def test_float32_where_float64_fails() -> None:
    class Single(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) @ torch.ones(3, 3)

    result = check(Single(3, 3), torch.randn(2, 9, 3))
    assert result.ok, str(result)
    assert result.precision == "float32"
    assert result.notes[0].startswith("not in float64, where one device fails: RuntimeError")


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        (batch(1), {}, r"1 position\(s\), fewer than sequence_parallel_size=2"),
        (batch(), {"sequence_dim": 3}, r"sequence_dim=3 but no tensor of the batch has such a dimension"),
        (batch(), {"num_ranks": 1}, "num_ranks=1 leaves nothing to compare"),
        (batch(), {"step": "validation_step"}, "step='validation_step': Small has no such method"),
        (batch()["ids"], {}, "Small.training_step fails on one device: IndexError"),
        ({"ids": batch()["ids"]}, {}, "Small.training_step fails on one device: KeyError: 'labels'"),
    ],
)
def test_what_cannot_be_checked_is_said(data: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckError, match=says):
        check(Small(), data, **options)


class TestCommand:
    """`python -m lightning_autosp check`, by its function."""

    DATA = """
import modules
from lightning.pytorch import LightningDataModule

class Data(LightningDataModule):
    def __init__(self, length: int = 20):
        super().__init__()
        self.length = length
    def train_dataloader(self):
        return modules.loader(2, self.length)

class Empty(LightningDataModule):
    def train_dataloader(self):
        return []

def small():
    from test_check import Small
    return Small()

def batch():
    return next(iter(modules.loader(2, 20)))

def number():
    return 3
"""

    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [*sys.path])
        Path("written.py").write_text(self.DATA)
        Path("model.yaml").write_text(
            "model: {class_path: test_check.Small, init_args: {width: 4}}\n"
            "data: {class_path: written.Data, init_args: {length: 21}}\n"
            "trainer: {strategy: {class_path: lightning_autosp.AutoSPStrategy, init_args: {sequence_parallel_size: 3}}}\n"
        )
        Path("arguments.yaml").write_text("model: {width: 4}\ndata: {length: 18}\n")
        Path("other.yaml").write_text("optimizer: 3\n")
        yield
        sys.modules.pop("written", None)

    def test_configuration(self, capsys: pytest.CaptureFixture[str]) -> None:
        sys.path.insert(0, "")
        assert main(["check", "model.yaml", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["ok"], found["length"], found["num_ranks"], found["name"]) == (True, 21, 3, "Small.training_step")

    def test_file_with_arguments_and_data(self, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["check", f"{__file__}:Small", "--config", "arguments.yaml", "--batch", "written.py:Data", "--ranks", "2"]
        assert main(command) == 0
        assert "Small.training_step, length 18, 2 simulated ranks" in capsys.readouterr().out

    def test_factory_batch_and_length(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "written.py:small", "--batch", "written.py:batch", "--length", "9"]) == 0
        assert "length 9" in capsys.readouterr().out

    def test_example_input_array(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "test_check:Small"]) == 0
        assert "Small, length 7" in capsys.readouterr().out

    def test_difference_exits_with_one(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        leak(monkeypatch)
        assert main(["check", "test_check:Small", "--batch", "written.py:batch"]) == 1
        assert "NOT equal to one device" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["test_check"], "'test_check' names nothing. Use package.module:Name"),
            (["absent:Small"], "absent cannot be imported: ModuleNotFoundError"),
            (["absent.py:Small"], "there is no file 'absent.py'"),
            (["written.py:Absent"], "written.py has no 'Absent'. It has: Data, Empty, small, batch, number."),
            (["written.py:number"], "'written.py:number' gave a int. Name a module class"),
            (["absent.yaml"], "'absent.yaml' cannot be read as YAML: FileNotFoundError"),
            (["other.yaml"], "'other.yaml' has no 'model' section"),
            (["arguments.yaml"], "'model' has no 'class_path', so its class is not known. Name it: path/to/file.py:Name --config"),
            (["torch.nn:Linear"], "'torch.nn:Linear', called without arguments, raises TypeError"),
            (["torch.nn:ReLU"], "ReLU has no train_dataloader and no example_input_array: there is no batch. Name"),
            (["written.py:small", "--batch", "written.py:Empty"], "Empty.train_dataloader is empty"),
            (["written.py:small", "--batch", "written.py:batch", "--length", "99"], "--length 99: the batch has 20 position(s)"),
            (["written.py:small", "--batch", "written.py:number"], "the shapes are none"),
        ],
    )
    def test_errors_exit_with_two(self, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", *arguments]) == 2
        assert says in capsys.readouterr().err
