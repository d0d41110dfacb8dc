"""Weights on disk: safetensors that say what they are and prove that they are whole; banks of them, to be combined."""

from fewstep.snapshots.bank import Bank, Entry, Storage, estimate_bytes, exact
from fewstep.snapshots.format import Stored, read, read_header, weights_hash, write
from fewstep.snapshots.sources import Source, checkpoint_files, read_checkpoint

__all__ = [
    "Bank",
    "Entry",
    "Source",
    "Storage",
    "Stored",
    "checkpoint_files",
    "estimate_bytes",
    "exact",
    "read",
    "read_checkpoint",
    "read_header",
    "weights_hash",
    "write",
]
