"""Other people's models in, ours out. Nothing that is read is ever executed."""

from fewstep.hub.foreign import Foreign, Key, UnknownModel
from fewstep.hub.names import resolve
from fewstep.hub.read import read
from fewstep.hub.weights import ARCHIVES, load_archive, mapped, weight_files, weights_hash

__all__ = [
    "ARCHIVES",
    "Foreign",
    "Key",
    "UnknownModel",
    "load_archive",
    "mapped",
    "read",
    "resolve",
    "weight_files",
    "weights_hash",
]
