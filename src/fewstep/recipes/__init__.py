"""One file per method: functions that return a complete Recipe. A new method is a new file here and no edit elsewhere.

Each module describes its method (its docstring is the page a user reads), and names its presets in PRESETS: a dict from
preset name to a function of no argument; the first is the default.
"""

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType

from fewstep.recipe import Recipe
from fewstep.types import FewstepError


def names() -> list[str]:
    """The methods there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """A method's module; FewstepError listing the known ones."""
    if name not in names():
        raise FewstepError(f"unknown recipe {name!r}: choose from {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def presets(name: str) -> dict[str, Callable[[], Recipe]]:
    """A method's presets by name, the default first."""
    return module(name).PRESETS


def recipe(name: str, preset: str | None = None) -> Recipe:
    """A method's recipe, e.g. recipe("ect", "cifar10-1hour")."""
    known = presets(name)
    if preset is not None and preset not in known:
        raise FewstepError(f"{name} has no preset {preset!r}: choose from {', '.join(known)}")
    return known[preset or next(iter(known))]()


def without(name: str, recipe: Recipe, part: str) -> Recipe:
    """The recipe less a part of its method, for ablations; FewstepError where the method has no such part."""
    undo = getattr(module(name), "without", None)
    if undo is None:
        raise FewstepError(f"{name} has no parts to leave out: --without is for slct")
    return undo(recipe, part)
