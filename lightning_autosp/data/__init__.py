"""What ranks load, and whether they agree on it."""

from lightning_autosp.data.collates import pack_collate, pad_collate
from lightning_autosp.data.stores import documents_path
from lightning_autosp.data.tokens import SequenceShard, TokenDataset
from lightning_autosp.data.write import WriteError, find_documents, write_tokens

__all__ = [
    "SequenceShard",
    "TokenDataset",
    "WriteError",
    "documents_path",
    "find_documents",
    "pack_collate",
    "pad_collate",
    "write_tokens",
]
