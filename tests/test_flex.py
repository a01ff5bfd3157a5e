"""`flex_attention`: exact, in tiles, heads and positions counted over all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from simulated import assert_exact
from test_attention import no_pairs
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lightning_autosp.attention import tiles
from lightning_autosp.compiler.flex import write_out_flex_attention

HEADS, WIDTH, LENGTH = 4, 4, 13


@pytest.fixture(autouse=True, params=[None, 2 * LENGTH * 3], ids=["one_tile", "many_tiles"])
def _tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param is not None:
        monkeypatch.setattr(tiles, "TILE_ELEMENTS", request.param)
    # It refuses gradients on the CPU, for want of a fast kernel there: the reference implementation has them.
    monkeypatch.setattr(flex_module, "_validate_device", lambda *args: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow where it is not compiled
        yield


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


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, kv_heads: int) -> None:
    net = Net(MASKS[name], kv_heads=kv_heads)
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


def test_a_block_mask_that_hides_more_than_its_function_is_not_replaced() -> None:
    one = torch.ones(1, 1, 1, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(0 * one, (0 * one)[..., None], BLOCK_SIZE=128, seq_lengths=(LENGTH, LENGTH))
    targets = []

    def backend(gm: torch.fx.GraphModule, examples: Any) -> Any:
        write_out_flex_attention(gm, detect_fake_mode([node.meta.get("example_value") for node in gm.graph.nodes]))
        targets.extend(node.target for node in gm.graph.nodes)
        return gm.forward

    @torch.compile(backend=backend, fullgraph=True)
    def step(q: Tensor, mask: BlockMask) -> Any:
        return flex_attention(q, q, q + 1, block_mask=mask)

    step(torch.randn(2, HEADS, LENGTH, WIDTH), mask)
    assert torch.ops.higher_order.flex_attention in targets
