"""A step that Python cuts in pieces: exact, and what crosses a cut stays a part until Python looks at it."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import modules
import numpy as np
import pytest
import torch
from simulated import assert_step_exact, run_step
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_autosp import _compat
from lightning_autosp.compiler.crossing import PartTensor
from lightning_autosp.compiler.report import Report

# The ranks are simulated by a dispatch mode, under which older versions compile nothing.
pytestmark = pytest.mark.skipif(not _compat.DYNAMO_IGNORES_MODES, reason="this torch compiles nothing under a dispatch mode")

cut = torch._dynamo.graph_break
logger = logging.getLogger("model")


@torch.compiler.disable
def uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class Model(nn.Module):
    """Two blocks and what happens between them; `seen` is what it leaves behind."""

    def __init__(self, between: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tokens = nn.Embedding(modules.VOCABULARY, modules.WIDTH)
        self.first, self.second = modules.Block(causal=True), modules.Block(causal=False)
        self.head = nn.Linear(modules.WIDTH, modules.VOCABULARY)
        self.between = between
        self.logged: dict[str, Any] = {}
        self.seen: list[Any] = []
        self.double()

    def log(self, name: str, value: Any) -> None:
        self.logged[name] = value

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        x = self.first(self.tokens(batch["ids"]))
        return self.loss(self.head(self.second(self.between(self, x))), batch)

    def loss(self, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def batch(length: int = 13, batch_size: int = 2) -> dict[str, Tensor]:
    return next(iter(modules.loader(batch_size, length, batch_size)))


def gathers(report: Report) -> list[str]:
    """Return what made values whole, of all that crossed a break and of what pieces did to their inputs."""
    by_python = [what for step in report.steps for crossing in step.crossings for what in crossing.gathers]
    return by_python + [whole.name for step in report.steps for whole in step.gathered]


def num_crossings(report: Report) -> int:
    return sum(len(step.crossings) for step in report.steps)


def just_a_break(model: Model, x: Tensor) -> Tensor:
    cut()
    return x


def prints(model: Model, x: Tensor) -> Tensor:
    print("between")  # noqa: T201
    return x


def decides_on_a_number(model: Model, x: Tensor) -> Tensor:
    return x / 2 if float(x.detach().abs().max()) > 1e-3 else x


def uses_it_twice(model: Model, x: Tensor) -> Tensor:
    cut()
    y = torch.tanh(x)
    cut()
    return x + y


def several(model: Model, x: Tensor) -> Tensor:
    cut()
    x = x * 2
    cut()
    x = x + 1
    cut()
    return x


def crosses_in_containers(model: Model, x: Tensor) -> Tensor:
    found = {"a": (x, x.mean(-1)), "b": [x[:, :-1]]}
    cut()
    x, mean = found["a"]
    return x + mean[..., None] + F.pad(found["b"][0], (0, 0, 1, 0))


def integers(model: Model, x: Tensor) -> Tensor:
    best = x.argmax(-1)
    cut()
    return x + best[..., None]


def merged_dimensions(model: Model, x: Tensor) -> Tensor:
    batch_size = x.shape[0]
    flat = x.flatten(0, 1)
    cut()
    return torch.tanh(flat).unflatten(0, (batch_size, -1))


def parts_of_heads(model: Model, x: Tensor) -> Tensor:
    """Crosses cut along heads, because nothing is known of the sequence there."""
    scores = x.unflatten(-1, (4, -1)).transpose(1, 2).logcumsumexp(2)
    cut()
    return scores.transpose(1, 2).flatten(2)


def without_gradients(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x * 3
        cut()
        y = y + 1
    return x + y


@pytest.mark.parametrize(
    ("between", "num_ranks"),
    [
        (just_a_break, 3),
        (prints, 2),
        (decides_on_a_number, 2),
        (uses_it_twice, 2),
        (several, 2),
        (crosses_in_containers, 3),
        (integers, 2),
        (merged_dimensions, 2),
        (parts_of_heads, 2),
        (without_gradients, 2),
    ],
)
def test_a_break_gathers_nothing(between: Any, num_ranks: int) -> None:
    report = assert_step_exact(Model(between), [batch()], num_ranks=num_ranks)
    assert len(report.breaks) == 1
    assert num_crossings(report) > 0
    assert gathers(report) == []
    assert [step.in_full for step in report.steps] == [[] for _ in report.steps]


def says_something(model: Model, x: Tensor) -> Tensor:
    logger.warning("the sum is %s", x.sum())
    logger.warning_once("a library's own method")  # type: ignore[attr-defined]
    logging.info("between")
    warnings.warn("an unusual choice", stacklevel=1)
    return x


def test_messages_cut_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.Logger, "warning_once", functools.cache(logging.Logger.warning), raising=False)
    config = torch._dynamo.config.get_config_copy()
    module = Model(says_something)
    with pytest.warns(UserWarning, match="an unusual choice"):
        report = assert_step_exact(module, [batch(), batch(8)])
    assert report.breaks == []
    assert report.num_graphs == {"training_step": 1}
    assert torch._dynamo.config.get_config_copy() == config


def test_a_size_that_a_tensor_holds_cuts_the_step() -> None:
    """Dynamo gives up on it in the middle of the trace."""

    def between(model: Model, x: Tensor) -> Tensor:
        sizes = torch.repeat_interleave(torch.tensor([4, modules.VOCABULARY - 4]), torch.tensor([1, 1]))
        return sum((rows.mean() for rows in model.head.weight.split(sizes.tolist())), x)

    report = assert_step_exact(Model(between), [batch()])
    assert len(report.breaks) == 1
    assert "test_breaks.py" in report.breaks[0].where
    assert gathers(report) == []


class Pictures(Model):
    """Texts with features of pictures, longer than the text; positions are made by eager code, for the break in the loop."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        x = self.tokens(batch["ids"]).masked_scatter((batch["ids"] == 3)[..., None], batch["features"].flatten())
        x = self.first(x + self.placed(batch["ids"])[..., None])
        return self.loss(self.head(self.second(x)), batch)

    def placed(self, ids: Tensor) -> Tensor:
        positions = torch.zeros(ids.shape, dtype=torch.double)
        for sample in range(len(ids)):
            cut()
            positions[sample] = torch.arange(ids.shape[1]) / len(ids)
        return positions


def test_every_long_sequence_of_the_batch_is_known_again_behind_eager_code() -> None:
    text = batch(20)
    text["features"] = torch.randn(2, 20 * modules.WIDTH, dtype=torch.double)
    report = assert_step_exact(Pictures(just_a_break), [text])
    blocks = [step for step in report.steps if step.attention]
    assert [step.length for step in blocks]
    assert all(step.attention[0].method == "ulysses" and not step.gathered and not step.in_full for step in blocks)


def test_one_capture_of_every_piece_for_all_lengths() -> None:
    report = assert_step_exact(Model(just_a_break), [batch(13), batch(8), batch(13)])
    assert report.num_graphs == {"training_step": 2}
    assert [step.length for step in report.steps] == [13, 13, 8, 8]
    assert gathers(report) == []


def item(x: Tensor) -> None:
    x.sum().item()


def tolist(x: Tensor) -> None:
    x.tolist()


def numpy(x: Tensor) -> None:
    assert np.isfinite(x.detach().numpy()).all()


def array(x: Tensor) -> None:
    with torch.no_grad():
        assert np.isfinite(np.asarray(x.detach())).all()


def index(x: Tensor) -> None:
    assert x[0, -1].shape == (modules.WIDTH,)


def shown(x: Tensor) -> None:
    assert str(x).startswith("tensor([[[")


def pickled(x: Tensor) -> None:
    assert pickle.loads(pickle.dumps(x.detach())).shape == x.shape


def copied(x: Tensor) -> None:
    assert type(copy.deepcopy(x.detach())) is Tensor


def iterated(x: Tensor) -> None:
    assert len([row.sum() for row in x]) == 2


def test_python_that_looks_gathers_once() -> None:
    looks = [item, tolist, numpy, array, index, shown, pickled, copied, iterated]

    def twice(*values: Tensor) -> None:
        for look, value in zip(looks, values, strict=True):
            look(value)
            look(value)

    def between(model: Model, x: Tensor) -> Tensor:
        values = [x + number for number in range(len(looks))]
        uncompiled(twice, *values)
        return sum(values, x)

    report = assert_step_exact(Model(between), [batch()])
    assert len(gathers(report)) == len(looks)
    for what in gathers(report):
        assert "test_breaks.py:" in what
        assert f"gathered by {what}" in str(report)


def changes(x: Tensor) -> Tensor:
    x.mul_(2)
    x[:, 3] = 0.5
    return x


def assigns(x: Tensor) -> Tensor:
    x.data = x.data * 2
    return x


def derives(x: Tensor) -> Tensor:
    return x[:, ::2].mean(1, keepdim=True) + x


def hooks(x: Tensor) -> Tensor:
    x.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    return x


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


@pytest.mark.parametrize("look", [changes, assigns, derives, hooks, Function.apply])
def test_what_python_makes_of_it_is_exact(look: Any) -> None:
    def between(model: Model, x: Tensor) -> Tensor:
        y: Tensor = uncompiled(look, x * 1)
        return y + x.mean()

    report = assert_step_exact(Model(between), [batch()])
    assert len(gathers(report)) == (look is not hooks)


def test_updates_in_place_by_a_piece() -> None:
    def between(model: Model, x: Tensor) -> Tensor:
        y = x + 1
        cut()
        y.mul_(2)
        cut()
        return x + y

    assert_step_exact(Model(between), [batch()])


def test_views_that_are_changed_after_a_break_are_refused() -> None:
    """On one device both would change."""

    def between(model: Model, x: Tensor) -> Tensor:
        y = x.exp()
        z = y.transpose(1, 2)
        uncompiled(z.mul_, 2)
        return y

    with pytest.raises(RuntimeError, match=r"aten.mul_.Tensor at .*test_breaks.py:.* shares its memory"):
        run_step(Model(between), [batch()])


def test_a_new_shape_in_place_is_refused() -> None:
    def between(model: Model, x: Tensor) -> Tensor:
        uncompiled(x.transpose_, 0, 1)
        return x

    with pytest.raises(RuntimeError, match=r"aten.transpose_.default at .*test_breaks.py:.* changes the shape of a tensor"):
        run_step(Model(between), [batch()])


def test_hooks_see_the_gradient_of_all_uses() -> None:
    def between(model: Model, x: Tensor) -> Tensor:
        cut()
        y = x * 2
        uncompiled(x.register_hook, lambda gradient: gradient.clamp(-1e-3, 1e-3))
        y = y + uncompiled(torch.tanh, x)
        x.register_hook(torch.sin)
        return x + y

    assert_step_exact(Model(between), [batch()])


def test_retaining_a_gradient_after_the_first_use_is_refused() -> None:
    def between(model: Model, x: Tensor) -> Tensor:
        cut()
        y = x * 2
        uncompiled(lambda value: value.retain_grad(), x)
        return x + y

    with pytest.raises(RuntimeError, match=r"retain_grad at .*test_breaks.py:.* Call it before the first use"):
        run_step(Model(between), [batch()])


def test_code_that_reads_memory_past_the_operators_is_refused() -> None:
    def kernel(x: Tensor) -> None:
        with torch._C._DisableTorchDispatch():  # as an extension in C++ does
            x.zero_()

    def between(model: Model, x: Tensor) -> Tensor:
        uncompiled(kernel, x)
        return x

    with pytest.raises(RuntimeError, match=r"training_step: a function that is no PyTorch operator .* x.clone\(\)"):
        run_step(Model(between), [batch()])


class Layers(Model):
    """Dynamo compiles no function with a break inside a loop: embedding and head are left to eager code."""

    def __init__(self) -> None:
        super().__init__(just_a_break)
        self.positions = nn.Embedding(64, modules.WIDTH).double()
        self.layers = nn.ModuleList([self.first, self.second, modules.Block(causal=True).double()])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        ids = batch["ids"]
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
            cut()
        return self.loss(self.head(x), batch)


def test_breaks_in_a_loop() -> None:
    report = assert_step_exact(Layers(), [batch(), batch(16)])
    blocks = [step for step in report.steps if step.attention]
    assert [step.length for step in blocks] == [13, 13, 13, 16, 16, 16]
    assert all(len(step.crossings) == 1 and not step.gathered and not step.in_full for step in blocks)
    assert [step.crossings[0].gathers for step in blocks[:2]] == [[], []]
    assert "aten.view.default at" in blocks[2].crossings[0].gathers[0]


class Leaves(Model):
    """Returns, logs and keeps what crossed a break."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        x = self.first(self.tokens(batch["ids"]))
        cut()
        self.log("x", x)
        self.seen.append({"x": (x,)})
        loss = self.loss(self.head(x), batch)
        cut()
        return {"loss": loss, "x": x, "more": [x.sum(-1), batch["ids"]]}

    validation_step = training_step


def test_what_leaves_the_step_is_whole() -> None:
    assert_step_exact(Leaves(just_a_break), [batch()])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation(mode: Any) -> None:
    with mode():
        assert_step_exact(Leaves(just_a_break), [batch()], "validation_step")
        report = assert_step_exact(Model(several), [batch()])
    assert gathers(report) == []


class GPT2(Model):
    """Hugging Face's says something in its forward."""

    def __init__(self) -> None:
        super().__init__(just_a_break)
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(vocab_size=modules.VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1)
        self.model = GPT2LMHeadModel(config).double().eval()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.model(input_ids=batch["ids"], labels=batch["labels"]).loss


def test_hugging_face_gpt2() -> None:
    report = assert_step_exact(GPT2(), [batch()])
    assert report.breaks == []
    assert gathers(report) == []


def test_only_what_passes_by_the_dispatcher_is_overridden() -> None:
    """Any other name of `Tensor` would be shadowed."""
    own = {name for name in vars(PartTensor) if hasattr(Tensor, name)} - set(vars(type("Plain", (Tensor,), {})))
    hooks = {"__torch_function__", "__torch_dispatch__", "register_hook", "retain_grad", "data"}
    memory = {"numpy", "tolist", "data_ptr", "__array__", "__dlpack__", "__reduce_ex__", "__repr__", "__deepcopy__"}
    assert own - {"__annotations__"} == memory | hooks
