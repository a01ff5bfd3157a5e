"""Logits and the inside of an MLP, in tiles: exact, and no value of their size outside of a tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from simulated import Lowered, assert_exact, lower
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightning_autosp import _compat
from lightning_autosp.attention import tiles
from lightning_autosp.check import Simulation
from lightning_autosp.collectives import Group
from lightning_autosp.compiler import rules
from lightning_autosp.compiler.backend import CompileBackend
from lightning_autosp.compiler.report import Report
from lightning_autosp.compiler.rowwise import local_regions
from lightning_autosp.compiler.specialise import Compiler
from lightning_autosp.memory.costs import cost, workspace_bytes
from lightning_autosp.memory.meter import LiveBytes

BATCH, LENGTH, WIDTH, VOCABULARY = 2, 13, 16, 37
Step = Callable[["Net", Tensor, Tensor], Any]


class Net(nn.Module):
    """Hidden states of a small model, and what a step makes of them and the labels."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.step = step
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.teacher = nn.Linear(WIDTH, VOCABULARY).requires_grad_(requires_grad=False)
        self.up, self.gate, self.down = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(5 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("weights", torch.rand(VOCABULARY))
        self.double()

    def forward(self, ids: Tensor, labels: Tensor) -> Any:
        return self.step(self, self.mix(self.tokens(ids)).cumsum(1), labels)


def batch(length: int = LENGTH, ignored: slice = slice(3, 6)) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (BATCH, length), generator=random)
    labels = torch.randint(0, VOCABULARY, (BATCH, length), generator=random)
    labels[:, ignored] = -100
    return ids, labels


def flat(logits: Tensor) -> Tensor:
    return logits.view(-1, VOCABULARY)


def causal_lm(net: Net, x: Tensor, labels: Tensor) -> Tensor:
    """As in Transformers: labels are shifted by padding, logits are made float."""
    logits = net.head(x)[:, slice(-0, None), :].to(torch.float64)
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    return F.cross_entropy(flat(logits), shifted, ignore_index=-100, reduction="mean")


def sliced(net: Net, x: Tensor, labels: Tensor) -> Tensor:
    """As Transformers once did: logits of the last position are dropped."""
    logits = torch.tanh(net.head(x))
    logits = logits[..., :-1, :].contiguous()
    return F.cross_entropy(flat(logits), labels[..., 1:].contiguous().view(-1))


def with_accuracy(net: Net, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    logits = net.head(x)
    loss = F.cross_entropy(flat(logits), labels.view(-1))
    with torch.no_grad():
        accuracy = (logits.argmax(-1) == labels).double().mean()
        confident = logits.softmax(-1).max(dim=-1).values
    return loss, accuracy, confident.mean(), logits.amax(), logits.detach().mean(), logits.topk(3).indices[..., 0].sum()


def accuracy_first(net: Net, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = net.head(x)
    right = logits.argmax(-1)[:, :-1] == labels[:, 1:]
    valid = labels[:, 1:] != -100
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), shifted), (right & valid).sum() / valid.sum()


def z_loss(net: Net, x: Tensor, labels: Tensor) -> Tensor:
    logits = net.head(x)
    return F.cross_entropy(flat(logits), labels.view(-1)) + 1e-2 * (logits.logsumexp(-1) ** 2).mean()


def by_hand(net: Net, x: Tensor, labels: Tensor) -> Tensor:
    logits = net.head(x)
    labels = labels.expand(x.shape[:2])  # says that there are as many labels as positions
    valid = labels != -100
    logits = logits - logits.max(-1, keepdim=True).values
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -(picked * valid).sum() / valid.sum()


def distilled(net: Net, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        teacher = net.teacher(x)
    student = net.head(x)
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum") / BATCH + F.cross_entropy(
        flat(student), labels.view(-1)
    )


def probabilities(net: Net, x: Tensor, labels: Tensor) -> Tensor:
    target = F.one_hot(labels.clamp(min=0), VOCABULARY).double() * 0.8 + 0.2 / VOCABULARY
    return F.cross_entropy(net.head(x).transpose(1, 2), target.transpose(1, 2))


def penalised(net: Net, x: Tensor, labels: Tensor) -> Tensor:
    logits = net.head(x)
    return F.cross_entropy(flat(logits), labels.view(-1)) + 1e-3 * logits.square().mean() + 1e-4 * logits.sum()


def cross_entropy(**options: Any) -> Step:
    def step(net: Net, x: Tensor, labels: Tensor) -> Tensor:
        chosen = {name: net.weights if name == "weight" else value for name, value in options.items()}
        return F.cross_entropy(flat(net.head(x)), labels.view(-1), **chosen)

    return step


LOSSES: dict[str, Step] = {
    "mean": cross_entropy(),
    "sum": cross_entropy(reduction="sum"),
    "none": lambda n, x, y: (loss := F.cross_entropy(n.head(x).mT, y, reduction="none")).square().mean() + 0 * loss[0, 0],
    "weights": cross_entropy(weight=True),
    "smoothed": cross_entropy(label_smoothing=0.1),
    "smoothed_with_weights": cross_entropy(label_smoothing=0.1, weight=True),
    "smoothed_sum": cross_entropy(label_smoothing=0.1, reduction="sum"),
    "other_ignored": lambda n, x, y: F.cross_entropy(flat(n.head(x)), y.clamp(min=-1).view(-1), ignore_index=-1),
    "classes_second": lambda n, x, y: F.cross_entropy(n.head(x).transpose(1, 2), y),
    "tied": lambda n, x, y: F.cross_entropy(flat(x @ n.tokens.weight.T), y.view(-1)),
    "einsum": lambda n, x, y: F.cross_entropy(flat(torch.einsum("bsd,vd->bsv", x, n.tokens.weight)), y.view(-1)),
    "merged_before": lambda n, x, y: F.cross_entropy(n.head(x.view(-1, WIDTH)), y.view(-1)),
    "log_softmax": lambda n, x, y: F.nll_loss(F.log_softmax(flat(n.head(x)), -1), y.view(-1)),
    "log_softmax_weights": lambda n, x, y: F.nll_loss(F.log_softmax(n.head(x).mT, 1), y, n.weights, reduction="sum"),
    "softcapped": lambda n, x, y: F.cross_entropy(flat(torch.tanh(n.head(x) * 0.3 / 2.0) * 2.0), y.view(-1)),
    "part_of_vocabulary": lambda n, x, y: F.cross_entropy(n.head(x)[..., :31].flatten(0, 1), y.clamp(max=30).view(-1)),
    "answers_only": lambda n, x, y: F.cross_entropy(n.head(x)[:, 1:-1].mT, y[:, 2:]),
    "causal_lm": causal_lm,
    "sliced": sliced,
    "with_accuracy": with_accuracy,
    "accuracy_first": accuracy_first,
    "z_loss": z_loss,
    "by_hand": by_hand,
    "distilled": distilled,
    "probabilities": probabilities,
    "penalised": penalised,
    "largest": lambda n, x, y: F.cross_entropy(flat(n.head(x).round()), y.view(-1)) + n.head(x.round() * 0 + 1).amax(),
    "twice": lambda n, x, y: F.cross_entropy(flat(n.head(x)), y.view(-1)) + F.cross_entropy(flat(n.teacher(x)), y.view(-1)),
}


@pytest.fixture(params=[200, 2**25], ids=["tiles", "at_once"])
def tile_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of a few positions, and one tile."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", request.param)
    return int(request.param)


def assert_tiled(lowered: Lowered, *, tiled: bool = True) -> None:
    report = lowered.report
    assert report.tiled
    assert not report.kept
    assert not report.gathered
    assert not report.in_full
    assert all((one.num_tiles > 1) == tiled for one in report.tiled)


def holds_logits(node: fx.Node) -> bool:
    value = node.meta.get("val")
    made = isinstance(value, Tensor) and node.op == "call_function" and VOCABULARY in value.shape
    return made and any(isinstance(size, torch.SymInt) for size in value.shape)


@pytest.mark.parametrize(("num_ranks", "elements"), [(1, 200), (2, 2**25), (3, 200)], ids=["1", "2_at_once", "3"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_in_tiles(name: str, num_ranks: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", elements)
    net = Net(LOSSES[name])
    lowered = assert_exact(net, batch(), net, num_ranks=num_ranks)
    assert_tiled(lowered, tiled=elements == 200)
    assert not any(map(holds_logits, lowered.step.captured.graph.nodes))


def test_results_of_the_same_logits_are_one_region(tile_elements: int) -> None:
    net = Net(with_accuracy)
    (one,) = assert_exact(net, batch(), net).report.tiled
    assert [name.split(".")[1] for name in one.results] == ["cross_entropy_loss", "argmax", "max", "amax", "sum", "mean", "topk"]
    assert one.bytes == BATCH * LENGTH * VOCABULARY * 8


@pytest.mark.parametrize("name", ["mean", "weights", "with_accuracy", "tied"])
def test_sharded_parameters(name: str, tile_elements: int) -> None:
    net = Net(LOSSES[name])
    assert_tiled(assert_exact(net, batch(length=16), net, sharded=True), tiled=tile_elements == 200)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counts(reduction: str, tile_elements: int) -> None:
    """A mean of nothing is not a number, on one device and on several."""
    net = Net(cross_entropy(reduction=reduction))
    ids, labels = batch(ignored=slice(None))
    lowered = lower(net, (ids, labels), net, backward=False)
    want = net(ids, labels)
    for outputs in lowered.outputs:
        assert torch.equal(outputs[0].isnan(), want.isnan())
        assert torch.equal(outputs[0].nan_to_num(), want.nan_to_num())


def test_ties_share_the_gradient(tile_elements: int) -> None:
    """The largest element is there once in some rows, twice in others."""

    def step(net: Net, x: Tensor, labels: Tensor) -> Tensor:
        logits = net.head(x)
        tied = (logits - logits.detach()) + logits.detach().clamp(max=0.5)
        return F.cross_entropy(flat(logits), labels.view(-1)) + tied.amax() - 2 * (-tied).min()

    net = Net(step)
    lowered = assert_exact(net, batch(), net)
    assert lowered.report.tiled


KEPT: dict[str, Step] = {
    "returned": lambda n, x, y: (F.cross_entropy(flat(logits := n.head(x)), y.view(-1)), logits),
    "over_the_sequence": lambda n, x, y: F.cross_entropy(flat(logits := n.head(x)), y.view(-1)) + logits.std(),
    "another_product": lambda n, x, y: F.cross_entropy(flat(logits := n.head(x)), y.view(-1)) + (logits @ n.tokens.weight).mean(),
    "scanned": lambda n, x, y: F.cross_entropy(flat(logits := n.head(x)), y.view(-1)) + logits.cumsum(1).mean(),
}


@pytest.mark.parametrize("name", KEPT)
def test_logits_that_are_used_otherwise_are_kept(name: str) -> None:
    net = Net(KEPT[name])
    for ranks in (1, 2):
        report = assert_exact(net, batch(), net, num_ranks=ranks).report
        assert not report.tiled
        if name != "another_product":
            (kept,) = report.kept
            assert kept.bytes == BATCH * LENGTH * VOCABULARY * 8
            assert ("returned" if name == "returned" else "test_rowwise.py") in kept.reason


def test_an_autocast_of_the_steps_own_is_no_part_of_tiles() -> None:
    def step(net: Net, x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = net.head(x)
        return F.cross_entropy(flat(logits).double(), labels.view(-1))

    net = Net(step)
    report = assert_exact(net, batch(), net, rtol=5e-2).report
    assert not report.tiled
    (kept,) = report.kept
    assert kept.reason.startswith("computed under the autocast that the step enters at")


def test_ranks_agree_on_what_compilers_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven positions take two tiles, six of another rank one: still, neither is part of the compiled graph."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 6 * BATCH * VOCABULARY)
    net = Net(cross_entropy())
    step = assert_exact(net, batch(), net).step
    sizes = dict.fromkeys(step.captured.symbols, LENGTH)
    programs = [list(step.emit(sizes, Group("simulated", 2, rank), None)[0].tile_programs.values()) for rank in range(2)]
    assert [(one.num_tiles, one.inlined) for (one,) in programs] == [(2, False), (1, False)]


def test_a_narrow_head_is_left_alone() -> None:
    net = Net(lambda n, x, y: F.cross_entropy(n.mix(x).flatten(0, 1), y.clamp(min=0, max=WIDTH - 1).view(-1)))
    report = assert_exact(net, batch(), net).report
    assert not report.tiled
    assert not report.kept


# Compiled: what is held, and in which precision.


def compiled(
    net: Net, backend: CompileBackend = "aot_eager", tile_local: int | None = None
) -> tuple[Any, list[fx.GraphModule], Report]:
    """Return the net compiled for one rank, with the graphs of forward and backward."""
    graphs: list[fx.GraphModule] = []

    class Seen(Compiler):
        def compile(self, module: fx.GraphModule, inputs: Any, on_graph: Any, partition: Any = None) -> Any:
            def see(gm: fx.GraphModule) -> None:
                graphs.append(gm)
                on_graph(gm)

            return super().compile(module, inputs, see, partition)

    report = Report()
    compiler = Seen(_compat.mesh_without_group(1), Group("none", 1, 0), backend, report, "step", tile_local=tile_local)
    torch._dynamo.reset()
    return torch.compile(net, backend=compiler, fullgraph=True), graphs, report


def marked(*tensors: Tensor) -> tuple[Tensor, ...]:
    for tensor in tensors:
        _compat.mark_dynamic(tensor, 1)
    return tensors


def largest_values(graphs: list[fx.GraphModule]) -> int:
    values = [leaf for gm in graphs for node in gm.graph.nodes for leaf in pytree.tree_leaves(node.meta.get("val"))]
    return max(value.numel() for value in values if isinstance(value, Tensor))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_nothing_of_the_size_of_the_logits(backend: CompileBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 4 * BATCH * VOCABULARY)
    seen: list[int] = []

    def compute(program: tiles.TileProgram, tile: Any, values: Any) -> Any:
        class Largest(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                seen.extend(leaf.numel() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
                return result

        with Largest():
            return original(program, tile, values)

    original = tiles.TileProgram.compute
    monkeypatch.setattr(tiles.TileProgram, "compute", compute)
    net = Net(with_accuracy)
    inputs = batch(length=64)
    want = [value.detach() for value in net(*inputs)]
    net(*inputs)[0].backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    run, graphs, report = compiled(net, backend)
    got = run(*marked(*inputs))
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left.detach(), right, rtol=1e-10, atol=1e-12)
    got[0].backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(net.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-11)
    assert len(graphs) == 2
    assert report.steps[0].tiled[0].num_tiles == 16
    assert largest_values(graphs) < BATCH * 64 * VOCABULARY
    assert max(seen) <= max(tiles.TILE_ELEMENTS, net.head.weight.numel())


def test_costs_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspace to the byte, and the operations of all tiles, found from two of them without running any."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 16 * BATCH * VOCABULARY)
    net = Net(with_accuracy)
    run, graphs, _ = compiled(net)
    inputs = batch(length=64)
    run(*marked(*inputs))[0].backward()
    found = [node for gm in graphs for node in gm.graph.nodes if str(node.target).startswith("autosp.tiles")]
    assert [str(node.target) for node in found] == ["autosp.tiles.default", "autosp.tiles_backward.default"]
    # Products of the size of the logits': themselves; in backward again, and gradients of hidden states and weight.
    for node, kernel, products in zip(found, (tiles._forward, tiles._backward), (1, 3), strict=True):
        fakes = fx.map_arg(node.args, lambda one: one.meta["val"])
        *args, handle = pytree.tree_map_only(Tensor, lambda fake: torch.ones(fake.shape, dtype=fake.dtype), fakes)
        program = tiles._PROGRAMS[handle]
        known = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
        with torch.no_grad(), LiveBytes(known) as live:
            results = kernel(program, *args, program.tiles())
        assert workspace_bytes(node) == live.peak - sum(value.nbytes for value in results) > 0
        assert cost(node).flops == products * 2 * BATCH * 64 * WIDTH * VOCABULARY


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bfloat16_sums_in_float32(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 2048 positions in bfloat16: the loss is rounded once, not summed in it."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 2**12)
    step = cross_entropy(reduction=reduction)
    net = Net(step).bfloat16()
    inputs = batch(length=1024)
    one = net(*inputs)
    one.backward()
    gradient, net.head.weight.grad = net.head.weight.grad, None
    exact = Net(step)
    exact.load_state_dict({name: value.double() for name, value in net.state_dict().items()})
    truth = exact(*inputs)
    truth.backward()
    run, _, report = compiled(net)
    got = run(*marked(*inputs))
    got.backward()
    assert report.steps[0].tiled[0].num_tiles > 1
    assert got.dtype is one.dtype is torch.bfloat16
    assert (got.double() - truth).abs() <= 1.01 * (one.double() - truth).abs() + 2**-9 * truth
    wanted = exact.head.weight.grad

    def error(value: Tensor) -> float:
        return ((value.double() - wanted).norm() / wanted.norm()).item()

    assert error(net.head.weight.grad) <= 1.25 * error(gradient)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_autocast(backend: CompileBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The region runs under the autocast that is in force, forward and backward."""
    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 2**10)
    net = Net(lambda n, x, y: F.cross_entropy(flat(n.head(x).float()), y.view(-1))).float()
    inputs = batch(length=64)
    with torch.autocast("cpu", torch.bfloat16):
        want = net(*inputs)
    want.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    run, _, report = compiled(net, backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(*marked(*inputs))
    got.backward()
    assert report.steps[0].tiled[0].num_tiles > 1
    assert got.dtype is want.dtype
    assert abs(got.item() - want.item()) < 1e-4 * want.item()
    for name, gradient in gradients.items():
        own = net.get_parameter(name).grad
        assert own is not None
        assert (own - gradient).norm() <= 2e-2 * gradient.norm()


# The inside of an MLP.

MLPS: dict[str, Step] = {
    "gelu": lambda n, x, y: (x + n.down(F.gelu(n.up(n.norm(x))))).square().mean(),
    "gated": lambda n, x, y: (x + n.down(F.silu(n.gate(n.norm(x))) * n.up(n.norm(x)))).square().mean(),
    "merged": lambda n, x, y: n.down(F.relu(n.up(x.view(-1, WIDTH))).square()).view_as(x).square().mean(),
    "chunked": lambda n, x, y: n.down(torch.cat([u.tanh() for u in n.up(x).chunk(2, dim=-1)], -1)).square().mean(),
    "normed_inside": lambda n, x, y: n.down((u := n.up(x)) * (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).square().mean(),
    "twice": lambda n, x, y: n.down(F.gelu(n.up(x + n.down(F.gelu(n.up(x)))))).square().mean(),
}


def in_tiles_of(rows: int | None, original: Any = Simulation.compiler) -> Any:
    """Return `Simulation.compiler` with that many positions a tile."""

    def compiler(self: Simulation, report: Report, kind: str) -> Compiler:
        return dataclasses.replace(original(self, report, kind), tile_local=rows)

    return compiler


@pytest.fixture
def tile_local(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have local regions run in tiles of three positions."""
    monkeypatch.setattr(Simulation, "compiler", in_tiles_of(3))


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("name", MLPS)
def test_mlp_in_tiles(name: str, num_ranks: int, tile_local: None) -> None:
    net = Net(MLPS[name])
    lowered = assert_exact(net, batch(), net, num_ranks=num_ranks)
    assert_tiled(lowered)
    assert len(lowered.report.tiled) == (2 if name == "twice" else 1)
    values = [node.meta.get("val") for node in lowered.step.captured.graph.nodes if node.op == "call_function"]
    assert not any(isinstance(value, Tensor) and value.shape[-1:] == (5 * WIDTH,) and value.ndim == 3 for value in values)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_transformers(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama of Transformers: its loss and, if wanted, its MLPs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(tiles, "TILE_ELEMENTS", 1000)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).double()

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return model(input_ids=ids, labels=labels).loss

    for rows, number in [(None, 1), (4, 3)]:
        monkeypatch.setattr(Simulation, "compiler", in_tiles_of(rows))
        lowered = assert_exact(step, batch(length=24), model, num_ranks=num_ranks, rtol=1e-5)  # norms are in float32
        assert_tiled(lowered)
        assert len(lowered.report.tiled) == number


def test_dropout_within_tiles_is_the_same_in_backward(tile_local: None) -> None:
    """The gradient of a scale in front of the dropout is, for each value, what was dropped in forward."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(VOCABULARY, WIDTH).double()
            self.up = nn.Linear(WIDTH, 64 * WIDTH, bias=False).double()
            self.down = nn.Linear(64 * WIDTH, WIDTH, bias=False).double()

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            out = self.down(F.dropout(self.up(self.tokens(ids)), 0.5))
            return out.sum(), out

    torch.manual_seed(0)
    net = Dropped()
    (ids, _) = batch(length=12)
    lowered = lower(net, (ids,), net)
    assert lowered.report.tiled[0].num_tiles == 2
    for outputs, gradients in zip(lowered.outputs, lowered.gradients, strict=True):
        for name in ("up.weight", "down.weight", "tokens.weight"):  # the result is linear in each
            gradient, value = gradients[name], net.get_parameter(name)
            assert gradient is not None
            assert torch.allclose((gradient * value).sum(), outputs[0])
        assert not torch.allclose(outputs[1][:, :3], outputs[1][:, 3:6])


def test_local_regions_are_found_in_order() -> None:
    """The widest first, with the norm before it; what is no wider than its results, and what is read elsewhere, is none."""

    def step(net: Net, x: Tensor, labels: Tensor) -> Tensor:
        x = x + net.down(F.gelu(net.up(net.norm(x))))
        queries, keys = (net.head(x)[..., :32]).chunk(2, dim=-1)
        inner = F.relu(net.gate(x))
        return (queries * keys).sum() + net.down(inner).sum() + inner[:, 0].sum()

    net = Net(step)
    lowered = lower(net, batch(), net, backward=False)
    captured = lowered.step.captured
    found = local_regions(captured, rules.find)
    assert [[str(node.target) for node in region.nodes] for region in found] == [
        ["aten.layer_norm.default", "aten.linear.default", "aten.gelu.default", "aten.linear.default"]
    ]
    (symbol,) = captured.symbols
    assert found[0].transient.xreplace({symbol: sympy.Integer(LENGTH)}) == BATCH * LENGTH * (2 * 5 + 1) * WIDTH * 8
    assert found[0].boundary.xreplace({symbol: sympy.Integer(LENGTH)}) == 2 * BATCH * LENGTH * WIDTH * 8
