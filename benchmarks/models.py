"""Small language models from configurations, as LightningModules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 256
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
}


class LanguageModel(LightningModule):
    """Trains a Transformers model on its own loss; batches are `{"ids": (B, S) int64}`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(input_ids=batch["ids"], labels=batch["ids"]).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


def _gpt2(sizes: dict[str, Any]) -> nn.Module:
    config = GPT2Config(
        n_embd=sizes["hidden_size"],
        n_inner=sizes["intermediate_size"],
        n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"],
        vocab_size=sizes["vocab_size"],
        n_positions=sizes["max_position_embeddings"],
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


MODELS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "gpt2": _gpt2,
    "llama": lambda sizes: LlamaForCausalLM(LlamaConfig(**{"num_key_value_heads": 2, **sizes})),
    "mistral": lambda sizes: MistralForCausalLM(MistralConfig(**{"num_key_value_heads": 2, "sliding_window": 32, **sizes})),
    "mixtral": lambda sizes: MixtralForCausalLM(MixtralConfig(**{"num_key_value_heads": 2, "num_local_experts": 4, **sizes})),
    "bert": lambda sizes: BertForMaskedLM(BertConfig(attention_probs_dropout_prob=0.0, **sizes)),
}


def make(name: str, **options: Any) -> LanguageModel:
    """Return a model of that name, the same every time.

    Args:
        name: One of `MODELS`.
        options: Configuration entries other than `SIZES`.
    """
    torch.manual_seed(0)
    return LanguageModel(MODELS[name]({**SIZES, **options}))


def batch_of(length: int) -> dict[str, Tensor]:
    """Return one sample of random tokens, the same every time."""
    return {"ids": torch.randint(0, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))}


def _decoder(width: int, inner: int, layers: int, heads: str, head_dim: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    queries, keys = heads.split(":")
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": int(queries),
        "num_key_value_heads": int(keys),
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 2**24,
    }


SHAPES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "toy": (LlamaConfig, LlamaForCausalLM, _decoder(64, 128, 2, "4:2", 16, VOCABULARY, False)),
    "llama-1b": (LlamaConfig, LlamaForCausalLM, _decoder(2048, 8192, 16, "32:8", 64, 128256, True)),
    "llama-8b": (LlamaConfig, LlamaForCausalLM, _decoder(4096, 14336, 32, "32:8", 128, 128256, False)),
    "qwen3-32b": (Qwen3Config, Qwen3ForCausalLM, _decoder(5120, 25600, 64, "64:8", 128, 151936, False)),
}
"""Decoders of the sizes of Llama-3.2-1B, Llama-3.1-8B and Qwen3-32B, and one that any machine runs."""


def decoder(shape: str, **options: Any) -> LanguageModel:
    """Return a decoder of random weights, the same every time.

    Args:
        shape: One of `SHAPES`.
        options: Configuration entries that are others.
    """
    config, model, sizes = SHAPES[shape]
    torch.manual_seed(0)
    return LanguageModel(model(config(**{**sizes, **options})))
