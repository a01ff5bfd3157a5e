"""A Hugging Face Llama, unmodified, from a config.

pip install lightning-autosp[hf]
python examples/llama_hf.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from text import VOCABULARY, TextData
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_autosp  # noqa: F401 -- registers strategy="autosp"


class Llama(LightningModule):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    seed_everything(0, verbose=False)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=65536,
    )
    trainer = Trainer(accelerator="cpu", devices=2, strategy="autosp", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(Llama(config), datamodule=TextData(length=2048, num_windows=20))
