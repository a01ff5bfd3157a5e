"""LightningCLI: `python examples/cli.py fit --config examples/config.yaml`."""

from lightning.pytorch.cli import LightningCLI
from text import TextData
from train_text import TextLM

if __name__ == "__main__":
    LightningCLI(TextLM, TextData, save_config_callback=None)
