"""Pictures: grids from the same noise, and how a run's samples changed while it trained."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

import torch

from fewstep.api import generator
from fewstep.data import to_uint8
from fewstep.evaluation import GRID_SEED
from fewstep.metrics import Record
from fewstep.model import Model
from fewstep.pictures import grid, png
from fewstep.report.numbers import value
from fewstep.report.view import RunView
from fewstep.samplers import Heun, Sampler, few_step

COLUMNS = 10
SOLVER_NAMES = {"Heun": "Heun", "DPMSolver": "DPM-Solver"}


def same_noise(views: Sequence[RunView], records: Mapping[str, Record], rows: int) -> str:
    """The section of grids: diffusion runs first, each model sampled in two ways, all from one seed."""
    figures, names = "", tuple[str, ...]()
    for view in sorted(views, key=lambda view: view.recipe.kind == "consistency"):
        if view.model and makes_pictures(view.model):
            sampler, title = view.model.info.sampler, view.label
            ways: dict[str, Sampler] = {"1 step": sampler(1), "2 steps": sampler(2)}
            if view.recipe.kind == "diffusion":
                before = " (before tuning)" if any(other.origin(views) is view for other in views) else ""
                many = measured_sampler(view.model, records)
                steps = f"{len(many.sigmas)} {SOLVER_NAMES[type(many).__name__]} steps"
                ways = {steps: many, f"1 step{before}": few_step(1)}
                title = f"Diffusion ({title})"
            figures += "".join(drawn(f"{title}, {way}", view.model, ways[way], records, rows) for way in ways)
            names = names or view.model.info.class_names * view.recipe.conditional
    if not figures:
        why = "these models do not make pictures" if any(view.model for view in views) else "no weights are saved yet"
        return f"<section><h2>Samples</h2><p>There are none to show: {why}.</p></section>"
    return f'<section><h2>The same noise</h2>{told(names)}<div class="pair">{figures}</div></section>'


def measured_sampler(model: Model, records: Mapping[str, Record]) -> Sampler:
    """The solver and steps at which the diffusion model was measured, else EDM's 18 of Heun's."""
    known = next((r for r in records.values() if r.model_sha256 == model.sha256 and r.nfe > 1), None)
    return (
        model.info.sampler(len(known.sigmas), "dpm" if known.sampler == "DPMSolver" else None)
        if known
        else Heun.karras(18)
    )


def drawn(name: str, model: Model, sampler: Sampler, records: Mapping[str, Record], rows: int) -> str:
    """The samples of a model that way, with its Frechet distance where it is known."""
    what = ("fd", model.sha256, type(sampler).__name__, sampler.sigmas)
    known = [r for r in records.values() if (r.metric, r.model_sha256, r.sampler, r.sigmas) == what]
    return sampled(name, model, sampler, known[:1], rows)


def sampled(name: str, model: Model, sampler: Sampler, known: Sequence[Record], rows: int) -> str:
    """A grid with a column for each of the first classes (ten without), its evaluations and what is known of it."""
    classes = model.info.architecture.num_classes
    columns = min(classes or COLUMNS, COLUMNS)
    labels = list(range(columns)) if classes else None
    samples = torch.cat(list(generator(model)(sampler, rows * columns, GRID_SEED, labels)))
    text = f"{sampler.nfe} evaluation{'s' * (sampler.nfe != 1)}" + "".join(
        f" &middot; {r.metric.upper()} {value(r)}" for r in known
    )
    picture = embedded(png(grid(to_uint8(samples), columns, cell=64)), name, samples.shape[-1] <= 32)
    return f"<figure><figcaption><b>{escape(name)}</b><br>{text}</figcaption>{picture}</figure>"


def makes_pictures(model: Model) -> bool:
    """Whether its samples are grey or colour images."""
    return len(shape := model.info.image_shape) == 3 and shape[0] in (1, 3)


def told(names: Sequence[str]) -> str:
    """What every grid of a page has in common."""
    columns = f" The columns are the classes {escape(', '.join(names[:COLUMNS]))}." if names else ""
    return f"<p>Every grid starts from the same noise, image by image; nothing is picked.{columns}</p>"


def embedded(image: bytes, alt: str, tiny: bool = False) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(image).decode()
    return f'<img{" class=tiny" * tiny} alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def progression(view: RunView) -> str:
    """The first, middle and last of a run's own sample grids."""
    files = sorted(file for file in view.path.glob("samples/*.png") if file.stem.isdecimal())
    texts = {files[i]: f"{int(files[i].stem):,} images seen" for i in (0, (len(files) - 1) // 2, -1) if files}
    pictures = [f"{embedded(file.read_bytes(), text)}<figcaption>{text}</figcaption>" for file, text in texts.items()]
    figures = "".join(f"<figure>{picture}</figure>" for picture in pictures)
    ways = ": 18 Heun steps" if view.recipe.kind == "diffusion" else ": 1 step and 2 steps"
    return f'<h3>Samples while training{ways}</h3><div class="three">{figures}</div>' if figures else ""
