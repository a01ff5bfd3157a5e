"""What ranks load, and whether they agree on it."""

from lightning_autosp.data.tokens import SequenceShard, TokenDataset, documents_path

__all__ = ["SequenceShard", "TokenDataset", "documents_path"]
