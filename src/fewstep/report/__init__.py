"""One self-contained HTML page: numbers with their stamps, pictures from the same noise, curves, and what made them."""

import json
import pprint
import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from fewstep._version import __version__
from fewstep.files import atomic_write, read_json, read_jsonl
from fewstep.metrics import Record
from fewstep.report.combination import about, opening, summary
from fewstep.report.curves import curves
from fewstep.report.details import code, duration, folded, hardware, listed
from fewstep.report.grids import progression, same_noise
from fewstep.report.numbers import headline, last_and_best, ranked, tables
from fewstep.report.result import ResultView, result_file
from fewstep.report.view import RunView
from fewstep.types import FewstepError

__all__ = ["build"]


def build(
    runs: Sequence[str | Path], out: str | Path, *, records: Mapping[str, Record] | None = None, title: str = "",
    lead: str = "", timings: Mapping[str, float] | None = None, device: str = "cpu", per_class: int = 4,
    results: Sequence[str | Path] = (),
) -> Path:  # fmt: skip
    """Write the page of one or several runs, e.g. a diffusion run and the consistency run tuned from it.

    records: measured numbers by name; None: the last and the best of each run's own evaluations. timings: seconds by
    phase. per_class: rows of the sample grids. results: folders of `fewstep combine`, which may stand among the runs too.
    Returns the page's path; FewstepError for a path that is neither.
    """
    combined = [ResultView.open(path, device) for path in [*filter(result_file, runs), *results]]
    views = [RunView.open(run, device) for run in runs if not result_file(run)]
    if not (views or combined) or per_class < 1:
        raise FewstepError("a report needs at least one run directory, and per_class of 1 or more")
    methods = Counter(view.label for view in views)
    views = [replace(v, label=f"{v.label} {v.path.name}") if methods[v.label] > 1 else v for v in views]
    numbers = last_and_best(views) if records is None else records
    diffusion = frozenset[str]().union(*(view.hashes for view in views if view.recipe.kind == "diffusion"))
    sections = [same_noise(views, numbers, per_class), tables(numbers, diffusion)] if views else []
    sections += [about(result, per_class, alone=[result] == combined and not views) for result in combined]
    titles = [f"{view.label} on {Path(view.recipe.data.source).name}" for view in views] or [r.label for r in combined]
    stories = [f"{story(view, views)}." for view in views] or [summary(combined[0])]
    page = Template(files(__name__).joinpath("page.html").read_text("utf-8")).substitute(
        title=escape(title or ", ".join(titles)),
        lead=escape(lead or " ".join(stories)),
        style=files(__name__).joinpath("page.css").read_text("utf-8"),
        headline=headline(ranked(numbers)) if views else opening(combined),
        body="".join([*sections, phases(timings or {}), *(section(view, views) for view in views)]),
        version=__version__,
        date=date.today().isoformat(),
    )
    atomic_write(Path(out), page)
    return Path(out)


def story(view: RunView, views: Sequence[RunView]) -> str:
    """What a run is, in a few words."""
    origin, seen, total = view.origin(views), view.nimg, view.recipe.total_nimg
    kind = "A diffusion model" if view.recipe.kind == "diffusion" else "A few-step generator"
    images = f"{seen:,} images seen" if seen >= total else f"stopped at {seen:,} of {total:,} images"
    return f"{kind}{f' tuned from {origin.label}' if origin else ''}, {images}"


def phases(timings: Mapping[str, float]) -> str:
    """Where the time went."""
    widths = {name: 100 * seconds / max([*timings.values(), 1e-9]) for name, seconds in timings.items()}
    bars = {name: f'<td class="bar"><i style="width:{width:.1f}%"></i></td>' for name, width in widths.items()}
    rows = "".join(f"<tr><td>{escape(name)}</td>{bars[name]}<td>{duration(timings[name])}</td></tr>" for name in bars)
    return f'<section><h2>Time</h2><div class="scroll"><table>{rows}</table></div></section>' if rows else ""


def section(view: RunView, views: Sequence[RunView]) -> str:
    """All about one run."""
    machine = read_json(file) if (file := view.path / "environment.json").exists() else {}
    bad = [escape(str(row.get("problem"))) for row in read_jsonl(view.path / "problems.jsonl")]
    problems = f'<div class="problems">Steps that were not finite<br>{"<br>".join(bad)}</div>' * bool(bad)
    path, steps = str(view.path), 18 if view.recipe.kind == "diffusion" else 2
    use = (
        f"fewstep sample {shlex.quote(path)} --steps {steps} --num 64 --out grid.png\n\n# or in Python\nimport fewstep\n"
        f"model = fewstep.load({path!r})\nimages = fewstep.sample(model, steps={steps}, num=64)"
        if view.model
        else "No weights are saved yet, so there is nothing to sample from."
    )
    recipe = pprint.pformat(view.recipe, width=100, sort_dicts=False, underscore_numbers=True)
    return (
        f"<section><h2>{escape(view.label)}</h2><p>{escape(story(view, views))}.</p>"
        f"{listed(facts(view, views, machine))}{problems}<h3>Curves</h3>{curves(view)}{progression(view)}"
        f"<h3>Use it</h3><pre>{escape(use)}</pre>"
        f"<h3>What made it</h3>{folded('Recipe', recipe)}"
        f"{folded('Environment', json.dumps(machine, indent=2))}</section>"
    )


def facts(view: RunView, views: Sequence[RunView], machine: Mapping[str, Any]) -> dict[str, str]:
    """Name -> HTML."""
    recipe, found = view.recipe, {"Run": f"<code>{escape(str(view.path))}</code>"}
    if view.model:
        info, arch, origin = view.model.info, view.model.info.architecture, view.origin(views)
        parameters = sum(p.numel() for p in view.model.denoiser.parameters())
        classes = f", {arch.num_classes} classes" if arch.num_classes else ""
        found["Model"] = f"{type(arch.network).__name__}, {parameters:,} parameters"
        found["Data"] = f"{escape(info.data)}, {' × '.join(map(str, arch.shape))}{classes}"
        found["Weights"] = f"{escape(info.weights)} at {info.nimg:,} images, {code(view.model.sha256)}"
        began = code(info.initialised_from) if info.initialised_from else "random weights"
        found["Began from"] = f"{escape(origin.label)}, {began}" if origin else began
        if info.kind == "consistency":
            found["Second step at"] = f"σ = {info.second_sigma:g}"
    found["Training"] = (
        f"batches of {recipe.batch_size}, {recipe.optimizer.name}, {recipe.precision}, seed {recipe.seed}"
    )
    if view.log:
        speed = statistics.median(row["images_per_second"] for row in view.log)
        found["Time"] = f"{duration(view.log[-1]['seconds'])}, {speed:,.0f} images/s"
    found |= hardware(machine)
    return found | ({"Published": escape(recipe.published)} if recipe.published else {})
