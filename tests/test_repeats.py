"""Repeated layers are traced once, and the captured graph is the one that tracing everything gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from simulated import assert_exact
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from lightning_autosp import _compat
from lightning_autosp.compiler import capture as capture_module
from lightning_autosp.compiler.capture import Captured, capture, is_size

DIM = 8


class Layer(nn.Module):
    """A block, with something in it that repetitions have to get right."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.norm, self.up, self.down = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = F.gelu(self.up(self.norm(x)))
        if self.what == "update of its own":
            h += 1
        h = self.down(h).transpose(1, 2)
        if self.what == "update of a view":
            h.mul_(2)
        h = h.transpose(1, 2)
        if self.what == "update of a buffer":
            self.count += 1
            h = h + self.count
        if self.what == "no_grad":
            with torch.no_grad():
                mean = h.mean(-1, keepdim=True)
            h = h - mean
        if self.what == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                h = h @ torch.ones(DIM, DIM)
            h = h.to(x.dtype)
        if self.what == "constant":
            h = h * torch.tensor(3.0)
        if self.what == "tuple":
            first, second = h.chunk(2, -1)
            h = torch.cat([second, first], -1)
        if self.what == "sizes":
            h = h.view(h.shape[0] * h.shape[1], DIM).sin().view(*x.shape)
        if self.what == "update of its input":
            x += h * gate
            return x
        return x + h * gate


class Net(nn.Module):
    """Layers one after the other, and something done with their results."""

    def __init__(self, num_layers: int = 4, layer: str = "", end: str = "") -> None:
        super().__init__()
        self.end = end
        self.embed = nn.Linear(DIM, DIM)
        self.layers = nn.ModuleList(Layer(layer) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        gates = [x.detach().mean(-1, keepdim=True).sigmoid(), x.detach().amax(-1, keepdim=True).sigmoid()]
        results = []
        for index, layer in enumerate(self.layers):
            gate = gates[index % 2 if self.end == "alternating inputs" else 0]
            x = checkpoint(layer, x, gate, use_reentrant=False) if self.end == "checkpoints" else layer(x, gate)
            results.append(x)
        if self.end == "update of the last":
            x += 1
        if self.end == "update of one between":
            results[2] += 1
            x = x + results[2]
        if self.end == "update of a view":
            x[..., 0] = 0
        if self.end == "all results":
            return x.sum() + torch.stack(results).pow(2).sum()
        return x.pow(2).sum()


LAYERS = ["", "update of its own", "update of a view", "no_grad", "autocast", "constant", "tuple", "sizes"]
ENDS = ["", "all results", "alternating inputs", "checkpoints"]
UPDATES = [("update of a buffer", ""), ("update of its input", "")]
UPDATES += [("", end) for end in ("update of the last", "update of one between", "update of a view")]


def captured(net: nn.Module) -> Captured:
    found: list[Captured] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        found.append(capture(gm, names))
        return gm.forward

    torch._dynamo.reset()
    x = torch.randn(2, 12, DIM)
    _compat.mark_dynamic(x, 1)
    torch.compile(net, backend=backend, fullgraph=True)(x)
    return found[0]


def rows(found: Captured) -> list[Any]:
    """Return all there is to know of a captured graph; numbers by their expressions, constants by their values."""
    numbers: dict[fx.Node, int] = {}

    def number(node: fx.Node) -> Any:
        return str(node.meta["val"].node.expr) if is_size(node) else numbers[node]

    def value(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.dtype, leaf.requires_grad, found.shape(leaf), [found.expr(stride) for stride in leaf.stride()]
        return str(leaf.node.expr) if isinstance(leaf, (torch.SymInt, torch.SymFloat)) else leaf

    result = []
    for node in found.graph.nodes:
        if is_size(node) and node.op != "placeholder":
            continue
        numbers[node] = len(numbers)
        target = str(getattr(found.owner, node.target)) if node.op == "get_attr" else node.target
        values = [value(leaf) for leaf in pytree.tree_leaves(node.meta.get("val"))]
        said = [str(node.meta.get(key)) for key in ("stack_trace", "nn_module_stack", "recompute")]
        result.append((node.op, target, str(fx.map_arg((node.args, node.kwargs), number)), values, said))
    return [*result, [found.placeholders.index(node) for node in found.mutated]]


@pytest.mark.parametrize(("layer", "end"), [*((layer, "") for layer in LAYERS), *(("", end) for end in ENDS[1:]), *UPDATES])
def test_capture_is_that_of_tracing_everything(layer: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(layer=layer, end=end)
    found = captured(net)
    monkeypatch.setattr(capture_module, "find_repeats", lambda graph: [])
    plain = captured(net)
    assert rows(found) == rows(plain)
    assert (found.num_traced < 0.7 * plain.num_traced) == ((layer, end) not in UPDATES)


@pytest.mark.parametrize(
    ("layer", "end"), [("", "all results"), ("update of a view", ""), ("no_grad", ""), ("", "update of the last")]
)
def test_repeated_layers_are_exact(layer: str, end: str) -> None:
    torch.manual_seed(0)
    net = Net(4, layer, end).double()
    assert_exact(net, (torch.randn(2, 7, DIM, dtype=torch.float64),), net, num_ranks=3)


@pytest.mark.parametrize("layer", ["", "update of its own"])
def test_repeated_layers_cost_once(layer: str) -> None:
    few, many = (captured(Net(num_layers, layer)) for num_layers in (4, 24))
    assert many.num_traced == few.num_traced
    assert len(many.graph.nodes) > 4 * len(few.graph.nodes)


def test_what_differs_between_layers_is_traced() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for power in (1.0, 1.0, 0.0, -0.0, 2.0):
                x = (x.sin().cos().exp().tanh().sigmoid().relu().abs().sqrt() + power).neg()
            return x.sum()

    found = captured(Scaled())
    constants = [node.args[1] for node in found.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    assert [str(constant) for constant in constants] == ["1.0", "1.0", "0.0", "-0.0", "2.0"]


def test_every_layer_keeps_its_own_lines() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.sin().cos().exp().tanh().sigmoid().relu().abs().sqrt()
            x = x.sin().cos().exp().tanh().sigmoid().relu().abs().sqrt()
            return x.sum()

    found = captured(Twice())
    assert found.num_traced < 12
    lines = [node.meta["stack_trace"].strip() for node in found.graph.nodes if node.target is torch.ops.aten.sin.default]
    assert len(set(lines)) == 2


def test_a_layer_of_other_sizes_is_traced() -> None:
    class Narrowing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x.sin().cos().exp().tanh().sigmoid().relu().abs().sqrt()[:, 1:]
            return x.sum()

    found = captured(Narrowing())
    shapes = [node.meta["val"].shape[1] for node in found.graph.nodes if node.target is torch.ops.aten.sin.default]
    assert len({str(size) for size in shapes}) == 3
