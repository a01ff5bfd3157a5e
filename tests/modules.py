"""The LightningModules the end-to-end tests train: what users write, with nothing of ours in them."""

from __future__ import annotations

import sys
from typing import Any

import flash_stand_in
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.text import Perplexity

VOCABULARY, WIDTH, HEADS = 31, 32, 4


class Tokens(Dataset[dict[str, Tensor]]):
    """Seeded random samples: token ids, labels with ignored spans, a class and per-token targets."""

    def __init__(self, num_samples: int, length: int, *, ignore_half: bool = False) -> None:
        random = torch.Generator().manual_seed(num_samples * 1009 + length)
        self.ids = torch.randint(0, VOCABULARY, (num_samples, length), generator=random)
        self.labels = self.ids.clone()
        self.labels[:, length // 4 : length // 3] = -100
        if ignore_half:
            self.labels[:, : length // 2 + 3] = -100
        self.targets = torch.randn(num_samples, length, generator=random)
        self.classes = torch.randint(0, 3, (num_samples,), generator=random)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: getattr(self, name)[index] for name in ("ids", "labels", "targets", "classes")}


def loader(num_samples: int, length: int, batch_size: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(Tokens(num_samples, length, **options), batch_size=batch_size)


class Block(nn.Module):
    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.dropout(self.out(a.transpose(1, 2).reshape(batch, length, WIDTH)))
        return x + self.mlp(self.norm2(x))


class Base(LightningModule):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class GPT(Base):
    """Fused qkv and `chunk`, learned positions, tied weights, labels shifted by slicing; logs in every way."""

    def __init__(self, lr: float = 1e-2, causal: bool = True, layers: int = 2) -> None:
        super().__init__(lr)
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(512, WIDTH)
        self.blocks = nn.ModuleList(Block(causal) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        self.accuracy = MulticlassAccuracy(VOCABULARY, average="micro", ignore_index=-100)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = self(batch["ids"][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()), logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, logits = self.loss(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, sync_dist=True)
        right = (logits.argmax(-1) == batch["labels"][:, 1:]).sum()
        self.log("right", right.float(), reduce_fx="sum", on_step=False, on_epoch=True, sync_dist=True)
        self.log_dict({"largest": logits.amax(), "mean": logits.mean()}, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, logits = self.loss(batch)
        self.accuracy.update(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        self.log("val_loss", loss, sync_dist=True)
        self.log("val_accuracy", self.accuracy)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch)[0], sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(batch["ids"])


class FlashBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        import flash_attn

        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        x = x + self.out(flash_attn.flash_attn_func(q, k, v, causal=self.causal).flatten(2))
        return x + self.mlp(self.norm2(x))


class FlashGPT(GPT):
    """Attention by flash-attn, or what stands in for it."""

    def __init__(self, lr: float = 1e-2) -> None:
        sys.modules.update(flash_stand_in.packages())
        super().__init__(lr)
        self.blocks = nn.ModuleList(FlashBlock(True) for _ in range(2))


class LargeVocabulary(GPT):
    """More logits than features."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.head = nn.Linear(WIDTH, 3 * VOCABULARY)


class Encoder(GPT):
    """Bidirectional, classifies the whole sequence by the mean over positions."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr, causal=False)
        self.classify = nn.Linear(WIDTH, 3)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = self.tokens(batch["ids"])
        for block in self.blocks:
            x = block(x)
        loss = F.cross_entropy(self.classify(self.norm(x).mean(1)), batch["classes"])
        self.log("loss", loss)
        return loss


class Regression(GPT):
    """A number for every token."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.value = nn.Linear(WIDTH, 1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = self.tokens(batch["ids"])
        for block in self.blocks:
            x = block(x)
        loss = F.mse_loss(self.value(x).squeeze(-1), batch["targets"])
        self.log("loss", loss)
        return loss


class Tables(GPT):
    """Works with one length only: tables of as many positions, one of them a buffer, are added whole."""

    def __init__(self, lr: float = 1e-2, length: int = 61) -> None:
        super().__init__(lr, causal=False)
        self.first, self.second = nn.Parameter(torch.randn(1, length, WIDTH)), nn.Parameter(torch.randn(length, WIDTH))
        self.register_buffer("third", torch.randn(length, 1))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.first
        for block in self.blocks:
            x = block(x + self.second) * self.third
        return self.head(self.norm(x))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = self(batch["ids"])[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()), logits


class Shallow(GPT):
    """One layer, where what is tested has nothing to do with layers: it compiles in half the time."""

    def __init__(self, lr: float = 1e-2, causal: bool = True) -> None:
        super().__init__(lr, causal, layers=1)


class MetricsInEveryWay(Shallow):
    """`update`, a collection, and in training `forward`, whose value is logged and returned."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.train_accuracy = MulticlassAccuracy(VOCABULARY, average="micro", ignore_index=-100)
        self.perplexity, self.mean, self.tokens_seen = Perplexity(ignore_index=-100), MeanMetric(), SumMetric()
        self.several = MetricCollection(
            [MulticlassAccuracy(VOCABULARY, average="macro", ignore_index=-100), MulticlassF1Score(VOCABULARY, ignore_index=-100)]
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, logits = self.loss(batch)
        self.log("loss", loss)
        accuracy = self.train_accuracy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        self.log("train_accuracy", accuracy)
        self.perplexity(logits / 8, batch["labels"][:, 1:])
        self.mean.update(loss, 2.0)
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log_dict({"tokens": self.tokens_seen((batch["labels"] != -100).sum()), "perplexity": self.perplexity})
        return {"loss": loss, "accuracy": accuracy}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("returned", outputs["accuracy"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss, logits = self.loss(batch)
        self.several.update(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        self.log_dict(self.several)


class MetricOfTheLoss(Shallow):
    """A metric's value is computed with, which only a cut can give."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr)
        self.accuracy = MulticlassAccuracy(VOCABULARY, average="micro", ignore_index=-100)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, logits = self.loss(batch)
        accuracy = self.accuracy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        self.log_dict({"loss": loss, "errors": 1 - accuracy})
        return loss * (2 - accuracy)


class HFLlama(Base):
    """A Hugging Face Llama from a config, unmodified."""

    def __init__(self, lr: float = 1e-2, layers: int = 2, heads: int = 8, kv_heads: int = 4) -> None:
        super().__init__(lr)
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=8 * heads,
                intermediate_size=96,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                max_position_embeddings=512,
            )
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch["ids"], labels=batch["labels"]).loss
        self.log("loss", loss)
        return loss


WINDOWED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 16,
    "max_position_embeddings": 512,
}


class HFGemma2(HFLlama):
    """Attention written out: soft-capped, a sliding window in every second layer, dropout in none."""

    def __init__(self, lr: float = 1e-2) -> None:
        Base.__init__(self, lr)
        from transformers import AutoModelForCausalLM, Gemma2Config

        config = Gemma2Config(**WINDOWED, head_dim=16, layer_types=["sliding_attention", "full_attention"])
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")


class HFMistral(HFLlama):
    """A sliding window, as a mask for `scaled_dot_product_attention`."""

    def __init__(self, lr: float = 1e-2) -> None:
        Base.__init__(self, lr)
        from transformers import AutoModelForCausalLM, MistralConfig

        self.model = AutoModelForCausalLM.from_config(MistralConfig(**WINDOWED))


class Broken(GPT):
    """Python looks at a tensor in the middle of the step."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        x = self.tokens(batch["ids"])
        x = self.blocks[0](x)
        if x.detach().abs().max().item() > 1e6:
            x = x / 2
        logits = self.head(self.norm(self.blocks[1](x)))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        self.log("loss", loss)
        return loss
