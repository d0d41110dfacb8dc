"""Weights on disk: safetensors that say what they are and prove that they are whole."""

from fewstep.snapshots.format import Stored, read, read_header, weights_hash, write

__all__ = ["Stored", "read", "read_header", "weights_hash", "write"]
