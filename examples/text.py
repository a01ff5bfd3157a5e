"""Real text that every machine has: the bytes of the Python standard library's own sources."""

import sysconfig
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

VOCABULARY = 256


class StandardLibrary(Dataset[Tensor]):
    """Non-overlapping windows of `length + 1` bytes over all `.py` files, in the order of their names.

    Items have shape `(length + 1,)`, dtype int64: inputs are the first `length` bytes, targets the last.
    """

    def __init__(self, length: int, num_windows: int) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        text, wanted = bytearray(), num_windows * length + 1
        for file in sorted(folder.glob("*.py")):
            text += file.read_bytes()
            if len(text) >= wanted:
                break
        if len(text) < wanted:
            raise ValueError(f"num_windows={num_windows} of {length} bytes need {wanted} bytes; {folder} has {len(text)}")
        self.bytes, self.length, self.num_windows = torch.frombuffer(text, dtype=torch.uint8), length, num_windows

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> Tensor:
        return self.bytes[index * self.length : (index + 1) * self.length + 1].long()


class TextData(LightningDataModule):
    """Windows of the standard library's sources in random order.

    Args:
        length: Tokens of a sequence.
        num_windows: Sequences of an epoch.
        batch_size: Sequences of a batch.
    """

    def __init__(self, length: int = 8192, num_windows: int = 40, batch_size: int = 1) -> None:
        super().__init__()
        self.length, self.num_windows, self.batch_size = length, num_windows, batch_size

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(StandardLibrary(self.length, self.num_windows), batch_size=self.batch_size, shuffle=True)
