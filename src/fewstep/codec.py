"""Components to JSON and back: frozen dataclasses of fewstep or a trusted package, numbers, strings, tuples, dicts."""

import dataclasses
import importlib
from typing import Any

from fewstep.types import FewstepError

_trusted = {"fewstep"}


def trust(package: str) -> None:
    """Let components of this package be read back from run directories and snapshots (your own recipes)."""
    _trusted.add(package)


def encode(value: Any) -> Any:
    """JSON-able form; a dataclass becomes {"is": "module:Class", field: ...}. FewstepError for lambdas and other objects."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: encode(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        check_trusted(kind.__module__)
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": f"{kind.__module__}:{kind.__qualname__}", **fields}
    raise FewstepError(f"{value!r} cannot be stored in a recipe: use a frozen dataclass of numbers, strings and tuples")


def decode(value: Any) -> Any:
    """The inverse of encode (lists become tuples). FewstepError for foreign modules and unknown classes or fields."""
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {key: decode(item) for key, item in value.items() if key != "is"}
    if "is" not in value:
        return fields
    module, _, name = str(value["is"]).partition(":")
    check_trusted(module)
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise FewstepError(
            f"{value['is']} is unknown to this version of fewstep: install the version it was made with"
        ) from None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise FewstepError(f"{value['is']} is not a component")
    try:
        return kind(**fields)
    except TypeError as error:
        raise FewstepError(f"{value['is']} does not fit this version of fewstep ({error})") from None


def check_trusted(module: str) -> None:
    """FewstepError unless it is a module of fewstep's or of a trusted package; never one that is run, not imported."""
    if any(part.startswith("_") for part in module.split(".")):
        raise FewstepError(f"{module} holds no components")
    if module.partition(".")[0] not in _trusted:
        raise FewstepError(
            f"{module} is not part of fewstep: call fewstep.codec.trust({module.partition('.')[0]!r}) first"
        )
