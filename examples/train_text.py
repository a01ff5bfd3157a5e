"""Train a small decoder on real text, every sequence split over the ranks.

python examples/train_text.py               # 2 CPU processes, 8,192-token sequences
python examples/train_text.py --devices 1   # the same curve on one
"""

import argparse
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from text import VOCABULARY, TextData
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_autosp  # noqa: F401 -- registers strategy="autosp"


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class TextLM(LightningModule):
    """A decoder over bytes, written for one device.

    Args:
        width: Size of an embedding.
        depth: Number of blocks.
        heads: Attention heads.
        max_length: Longest sequence.
        lr: Learning rate.
    """

    def __init__(self, width: int = 96, depth: int = 2, heads: int = 4, max_length: int = 16384, lr: float = 4e-3) -> None:
        super().__init__()
        self.lr = lr
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(max_length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        ids, targets = batch[:, :-1], batch[:, 1:]
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("loss", loss, prog_bar=True)
        self.log("accuracy", (logits.argmax(-1) == targets).float().mean(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class Throughput(Callback):
    """Logs the tokens a second of the last step, all ranks together, and keeps the loss curve."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Tensor, batch_idx: int) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        pl_module.log("tokens/s", (batch.numel() - len(batch)) / (time.perf_counter() - self.start), prog_bar=True)
        self.losses.append(float(trainer.callback_metrics["loss"]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()

    seed_everything(0, verbose=False)
    throughput = Throughput()
    trainer = Trainer(
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        strategy="autosp",
        max_epochs=1,
        callbacks=[throughput],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(TextLM(), datamodule=TextData(arguments.length, arguments.steps))
    if trainer.is_global_zero:
        print("loss curve:", " ".join(f"{loss:.6f}" for loss in throughput.losses))


if __name__ == "__main__":
    main()
