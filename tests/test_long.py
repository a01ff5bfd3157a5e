"""At 131,072 tokens no value of order `S x S` exists anywhere in a lowered step: shapes are computed, nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from simulated import lower
from test_attention import no_pairs
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from lightning_autosp.attention import tiles
from lightning_autosp.collectives import Group

LENGTH, NUM_RANKS = 131_072, 8
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 4,
    "vocab_size": 96,
    "pad_token_id": None,
    "max_position_embeddings": LENGTH,
}


def packed(length: int) -> dict[str, Tensor]:
    """Documents behind each other, told apart by positions that start again."""
    positions = torch.cat([torch.arange(5), torch.arange(length - 5)])
    return {"position_ids": positions[None]}


CASES: dict[str, tuple[str, dict[str, Any], Callable[[int], dict[str, Tensor]]]] = {
    "llama": ("llama", {}, lambda length: {}),
    "llama_eager": ("llama", {"attn_implementation": "eager"}, lambda length: {}),
    "llama_padded": ("llama", {}, lambda length: {"attention_mask": torch.ones(1, length, dtype=torch.long)}),
    "llama_packed": ("llama", {}, packed),
    "mistral_window": ("mistral", {"sliding_window": 4096}, lambda length: {}),
    "gemma3_alternating": (
        "gemma3_text",
        {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]},
        lambda length: {},
    ),
    "gemma2_softcapped_eager": (
        "gemma2",
        {"sliding_window": 512, "attn_implementation": "eager", "layer_types": ["sliding_attention", "full_attention"]},
        lambda length: {},
    ),
}


class Model(nn.Module):
    def __init__(self, model_type: str, settings: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        implementation = settings.get("attn_implementation", "sdpa")
        settings = {key: value for key, value in settings.items() if key != "attn_implementation"}
        config = AutoConfig.for_model(model_type, **{**SMALL, **settings}, use_cache=False)
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)

    def forward(self, ids: Tensor, **others: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False, **others).loss


class Largest(fx.Interpreter):
    """Finds the value with the most elements."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.numel, self.node = 0, ""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor) and value.numel() > self.numel:
                self.numel, self.node = value.numel(), f"{n.target} {tuple(value.shape)}"
        return result


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_order_s_squared(name: str) -> None:
    model_type, settings, batch = CASES[name]
    net = Model(model_type, settings)
    names = list(batch(13))

    def step(ids: Tensor, *others: Tensor) -> Tensor:
        return net(ids, **dict(zip(names, others, strict=True)))

    lowered = lower(step, (torch.randint(0, 96, (1, 13)), *batch(13).values()), net, backward=False)
    assert no_pairs(lowered)
    assert not lowered.report.gathered
    assert not lowered.report.in_full

    before = set(tiles._PROGRAMS)
    captured = lowered.step.captured
    sizes = dict.fromkeys(captured.symbols, LENGTH)
    emitter, program = lowered.step.emit(sizes, Group("simulated", NUM_RANKS, 0), None)
    limit = LENGTH * 96  # the logits, whole
    with FakeTensorMode(), torch.no_grad():
        inputs = []
        for index in program.inputs:
            value = captured.placeholders[index].meta["val"]
            inputs.append(torch.empty([emitter.integer(size) for size in captured.shape(value)], dtype=value.dtype))
        largest = Largest(program.module)
        largest.run(*inputs)
        assert largest.numel <= limit, largest.node
    of_losses = emitter.tile_programs.values()
    written = [tiles._PROGRAMS[handle] for handle in set(tiles._PROGRAMS) - before if tiles._PROGRAMS[handle] not in of_losses]
    assert bool(written) == any("in tiles" in call.mask + call.method for call in lowered.report.attention)
    for one in written:
        assert one.num_tiles > 1
        for start, stop, low, high in one.tiles():
            assert (stop - start) * (high - low) <= tiles.TILE_ELEMENTS
            if "sliding_window" in settings and one.columns is not None:
                assert high - low < settings["sliding_window"] + one.tile_rows
