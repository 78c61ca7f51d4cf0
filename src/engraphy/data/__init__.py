"""Text: where it comes from, and how it becomes batches of token ids."""

from .documents import Documents, load_documents, split_documents
from .packing import IGNORED, Batch, Batches, Rows, pack

__all__ = [
    "IGNORED",
    "Batch",
    "Batches",
    "Documents",
    "Rows",
    "load_documents",
    "pack",
    "split_documents",
]
