"""Calls of flash-attn, by what stands in for it on the CPU: on whole sequences and own heads, with the user's arguments."""

from __future__ import annotations

import sys
from typing import Any

import flash_stand_in
import pytest
import torch
from simulated import assert_exact
from torch import Tensor, nn

LENGTH, WIDTH = 13, 4


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, package in flash_stand_in.packages().items():
        monkeypatch.setitem(sys.modules, name, package)


class Net(nn.Module):
    def __init__(self, heads: int = 4, kv_heads: int | None = None, function: str = "flash_attn_func", **options: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads or heads
        self.function, self.options = function, options
        self.q = nn.Linear(8, heads * WIDTH)
        self.kv = nn.Linear(8, 2 * self.kv_heads * WIDTH)
        self.double()

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        import flash_attn

        q = self.q(x).unflatten(-1, (self.heads, WIDTH))
        kv = self.kv(x).unflatten(-1, (2, self.kv_heads, WIDTH))
        k, v = kv.unbind(2)
        function = getattr(flash_attn, self.function)
        if self.function == "flash_attn_qkvpacked_func":
            out = function(torch.stack((q, k, v), 2), **self.options)
        elif self.function == "flash_attn_kvpacked_func":
            out = function(q, kv, **self.options)
        elif self.function == "flash_attn_varlen_func":
            (cu_seqlens,) = others
            lengths = (cu_seqlens, cu_seqlens, LENGTH, LENGTH)
            out = function(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), *lengths, **self.options).unflatten(0, x.shape[:2])
        else:
            slopes = {"alibi_slopes": torch.arange(1, self.heads + 1) * 0.1} if self.options.get("alibi_slopes") else {}
            out = function(q, k, v, **{**self.options, **slopes})
        if isinstance(out, tuple):
            out = out[0]
        return out.square().mean(), out


def inputs(batch: int = 2) -> tuple[Tensor]:
    return (torch.randn(batch, LENGTH, 8).double(),)


def assert_sharded(net: Net, given: tuple[Tensor, ...], num_ranks: int = 2) -> None:
    report = assert_exact(net, given, net, num_ranks=num_ranks).report
    assert [call.method for call in report.attention] == [f"ulysses, {net.function}"]
    assert not report.in_full
    assert all(one.reason.startswith("returned") for one in report.gathered)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 2), (7, 1), (1, 1)])
def test_every_head_count(heads: int, kv_heads: int, ranks: int) -> None:
    assert_sharded(Net(heads, kv_heads, causal=True), inputs(), ranks)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"causal": True, "window_size": (3, 0)},
        {"window_size": (2, 4)},
        {"softcap": 2.0, "softmax_scale": 0.3},
        {"causal": True, "alibi_slopes": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("heads", [4, 3])
def test_arguments_are_kept(options: dict[str, Any], heads: int) -> None:
    assert_sharded(Net(heads, **options), inputs())


@pytest.mark.parametrize("function", ["flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"])
def test_packed_arguments(function: str) -> None:
    assert_sharded(Net(3, function=function, causal=True), inputs())


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_of_one_long_sequence(heads: int, kv_heads: int, causal: bool) -> None:
    net = Net(heads, kv_heads, function="flash_attn_varlen_func", causal=causal)
    assert_sharded(net, (*inputs(1), torch.tensor([0, 4, 5, 11, LENGTH], dtype=torch.int32)), 3)


def test_layers_that_repeat() -> None:
    layers = [Net(causal=True) for _ in range(3)]

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(layers)
            self.out = nn.Linear(4 * WIDTH, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + self.out(layer(x)[1].flatten(2))
            return x.square().mean()

    net = Stack()
    report = assert_exact(net, inputs(), net).report
    assert len(report.attention) == 3
    assert not report.gathered


def test_weights_that_are_returned_are_computed_in_full() -> None:
    net = Net(causal=True, return_attn_probs=True)
    report = assert_exact(net, inputs(), net).report
    assert not report.attention
    assert any("flash_attn_func" in one.name for one in report.in_full)


@pytest.mark.parametrize("documents", [False, True])
def test_transformers_calls_it(documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`flash_attention_2`, which Transformers grants where there is a GPU; with documents as its flattening collator gives them."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers import modeling_flash_attention_utils as utils

    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda **options: True)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_process_flash_kwargs_fn"):
        monkeypatch.setattr(utils, name, None)
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).double()
    model.config._attn_implementation = "flash_attention_2"

    def step(ids: Tensor, positions: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        given = {}
        if lengths is not None:
            given = {"position_ids": positions, "cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
            given |= {"max_length_q": 9, "max_length_k": 9}
        return model(input_ids=ids, labels=ids, use_cache=False, **given).loss

    batch = [torch.randint(0, 31, (1 if documents else 2, LENGTH))]
    if documents:
        batch += [torch.tensor([[*range(4), *range(9)]]), torch.tensor([0, 4, 13], dtype=torch.int32)]
    report = assert_exact(step, batch, model, rtol=1e-5).report  # its loss is float32
    assert [call.method for call in report.attention] == [f"ulysses, flash_attn_{'varlen_' if documents else ''}func"] * 2
    assert not report.in_full
    assert not report.gathered
