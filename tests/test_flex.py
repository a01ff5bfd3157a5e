"""`flex_attention`: exact, in tiles, heads and positions counted over all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from simulated import assert_exact, assert_step_exact, run_step
from test_attention import no_pairs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lightning_autosp.attention import tiles

HEADS, WIDTH, LENGTH = 4, 4, 13


@pytest.fixture(autouse=True, params=[False, True], ids=["one_tile", "many_tiles"])
def many_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    if request.param:
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", 2 * LENGTH * 3)
    # It refuses gradients on the CPU, for want of a fast kernel there: the reference implementation has them.
    monkeypatch.setattr(flex_module, "_validate_device", lambda *args: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow where it is not compiled
        yield request.param


class Net(nn.Module):
    def __init__(self, mask: Any = None, score: Any = None, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.mask, self.score, self.kv_heads = mask, score, kv_heads
        self.q = nn.Linear(8, HEADS * WIDTH)
        self.kv = nn.Linear(8, 2 * kv_heads * WIDTH)
        self.slopes = nn.Parameter(torch.rand(HEADS))
        self.double()

    def forward(self, x: Tensor, documents: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (self.kv_heads, 2 * WIDTH)).transpose(1, 2).chunk(2, -1)
        mask = None
        if self.mask is not None:
            mask_mod = self.mask(documents)
            mask = create_block_mask(mask_mod, x.shape[0], None, x.shape[1], x.shape[1], device="cpu")
        score = self.score(self) if self.score else None
        out = flex_attention(q, k, v, score_mod=score, block_mask=mask, enable_gqa=self.kv_heads != HEADS)
        assert isinstance(out, Tensor)
        return out.square().mean(), out


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, LENGTH, 8).double(), torch.tensor([0] * 4 + [1] * 6 + [2] * 3).expand(2, -1).contiguous()


MASKS: dict[str, Callable[[Tensor], Any]] = {
    "causal": lambda documents: lambda b, h, i, j: j <= i,
    "window": lambda documents: lambda b, h, i, j: (j <= i) & (i - j < 4),
    "documents": lambda documents: lambda b, h, i, j: (j <= i) & (documents[b, i] == documents[b, j]),
    "heads_differ": lambda documents: lambda b, h, i, j: (j <= i) | (h == 1),
    "first_rows_attend_to_nothing": lambda documents: lambda b, h, i, j: (j <= i) & (j >= 3),
}
SCORES: dict[str, Callable[[Net], Any]] = {
    "softcap": lambda net: lambda s, b, h, i, j: torch.tanh(s / 3) * 3,
    "alibi": lambda net: lambda s, b, h, i, j: s - net.slopes[h] * (i - j).abs(),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, many_tiles: bool) -> None:
    net = Net(MASKS[name], kv_heads=2 if many_tiles else HEADS)
    lowered = assert_exact(net, inputs(), net)
    (call,) = lowered.report.attention
    assert call.method == "ulysses"
    assert (call.mask == "proven causal, dropped for the kernel's own flag") == (name == "causal")
    assert no_pairs(lowered)


@pytest.mark.parametrize("mask", [None, "causal", "first_rows_attend_to_nothing"])
@pytest.mark.parametrize("name", SCORES)
def test_scores(name: str, mask: str | None) -> None:
    net = Net(MASKS.get(mask) if mask else None, SCORES[name], kv_heads=2)
    lowered = assert_exact(net, inputs(), net, num_ranks=3)
    assert [call.method for call in lowered.report.attention] == ["parts of heads, in tiles"]
    assert no_pairs(lowered)


class Outside(LightningModule):
    """Block masks made before the step: from the same functions, or given."""

    def __init__(self, mask: BlockMask | None = None, name: str = "documents", kv_heads: int = HEADS) -> None:
        super().__init__()
        self.net = Net(kv_heads=kv_heads)
        function = MASKS[name](inputs()[1])
        sizes = (2, HEADS) if "differ" in name else (2, None) if "documents" in name else (None, None)
        self.masks = [create_block_mask(function, *sizes, LENGTH, LENGTH, device="cpu", BLOCK_SIZE=4) if mask is None else mask]

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        q = self.net.q(batch).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        k, v = self.net.kv(batch).unflatten(-1, (self.net.kv_heads, 2 * WIDTH)).transpose(1, 2).chunk(2, -1)
        out = flex_attention(q, k, v, block_mask=self.masks[0], enable_gqa=self.net.kv_heads != HEADS)
        return out.square().mean()


@pytest.mark.parametrize("name", MASKS)
def test_block_masks_made_before_the_step(name: str, many_tiles: bool) -> None:
    module = Outside(name=name, kv_heads=2 if many_tiles else HEADS)
    report = assert_step_exact(module, [inputs()[0], inputs()[0]])
    (step,) = report.steps
    assert not step.in_full
    assert not step.gathered
    assert [call.method for call in step.attention] == ["gather_kv"]  # at this size; see `attention/select.py`
    assert step.attention[0].mask_bytes == 0
    assert module.masks[0].seq_lengths == (LENGTH, LENGTH)


def test_a_block_mask_that_lists_other_blocks_than_its_function_attends_to() -> None:
    """Kernels ask the function in blocks of the first list only; the reference of PyTorch asks it everywhere."""
    in_part, in_full = torch.zeros(1, 1, 4, 4, dtype=torch.bool), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    in_part[..., 0] = in_part[..., 2, 1] = in_part[..., 3, 3] = True
    in_full[..., 0, 1] = in_full[..., 3, 2] = True
    lists = [x for one in (in_part, in_full) for x in (one.sum(-1).int(), one.int().argsort(-1, descending=True).int())]
    sizes = {"BLOCK_SIZE": 4, "seq_lengths": (LENGTH, LENGTH)}
    mask = BlockMask.from_kv_blocks(*lists, mask_mod=lambda b, h, i, j: j <= i, **sizes)
    module = Outside(mask)
    (results, _, report) = run_step(module, [inputs()[0]])
    assert not report.steps[0].in_full

    position = torch.arange(LENGTH)
    wide_part, wide_full = (one[0, 0][position[:, None] // 4, position // 4] for one in (in_part, in_full))
    attended = wide_part & (position <= position[:, None]) | wide_full
    batch = inputs()[0]
    q = module.net.q(batch).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
    k, v = module.net.kv(batch).unflatten(-1, (HEADS, 2 * WIDTH)).transpose(1, 2).chunk(2, -1)
    want = F.scaled_dot_product_attention(q, k, v, attended).square().mean()
    for result in results:
        assert torch.allclose(result[0], want, rtol=1e-10)
