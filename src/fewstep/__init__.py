"""fewstep turns a diffusion model into a one- or two-step image generator.

import fewstep
model = fewstep.load("runs/ect")                           # a run directory or a snapshot
images = fewstep.sample(model, steps=2, num=64, seed=0)    # uint8 [64, C, H, W]
losses = fewstep.loss(model, fewstep.get_recipe("ect").objective, x, labels)
records = fewstep.evaluate(model, "digits", steps=1)       # stamped numbers
result = fewstep.combine("runs/ect", "runs/lcsc", steps=1) # LCSC over the run's snapshots
told = fewstep.import_model("edm.pkl", "models/edm")       # other people's models; load() takes them, too
told = fewstep.export("runs/ect", "out", to="diffusers")   # a folder for stock diffusers, with a model card
"""

from typing import TYPE_CHECKING, Any

from fewstep._version import __version__

if TYPE_CHECKING:
    from fewstep.api import Function, Plan, average, combine, evaluate, get_recipe, loss, sample, train
    from fewstep.exporting import export
    from fewstep.importing import import_model
    from fewstep.model import Model, load
    from fewstep.types import Denoiser, FewstepError

__all__ = [
    "Denoiser", "FewstepError", "Function", "Model", "Plan", "__version__", "average", "combine", "evaluate",
    "export", "get_recipe", "import_model", "load", "loss", "sample", "train",
]  # fmt: skip

_HOMES = {
    "Denoiser": "types", "FewstepError": "types", "Model": "model", "load": "model",
    "Function": "api", "Plan": "api", "average": "api", "combine": "api", "evaluate": "api", "get_recipe": "api",
    "export": "exporting", "import_model": "importing",
    "loss": "api", "sample": "api", "train": "api",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: `import fewstep` itself costs nothing."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fewstep.{_HOMES[name]}"), name)
