"""The section of a combination of checkpoints: what it reached held out, what it is, and how it was searched."""

import json
import math
import shlex
from collections.abc import Sequence
from html import escape

from fewstep.metrics import Record
from fewstep.report.details import duration, folded, hardware, listed
from fewstep.report.grids import makes_pictures, sampled, told
from fewstep.report.numbers import NAMES, caption, headline, value
from fewstep.report.result import ResultView, number
from fewstep.report.searched import coefficients, costs
from fewstep.samplers import DPMSolver

STAGES = {
    "Searched on": ("search", "search"),
    "Re-ranked on": ("rerank", "search"),
    "Reported on": ("report", "report"),
}


def about(view: ResultView, rows: int, alone: bool) -> str:
    """All about one result; alone: on a page of its own, whose top says the verdict."""
    top = "" if alone else f"<h2>{escape(view.label)}</h2><p>{escape(summary(view))}</p>{verdict(view)}"
    return (
        f"<section>{top}<h3>Held out</h3>{held_out(view)}<h3>The coefficients</h3>{signs(view)}{coefficients(view)}"
        f"<h3>The search</h3>{searching(view)}<h3>Samples from the same noise</h3>{pictures(view, rows)}"
        f"<h3>How it was searched</h3>{listed(facts(view))}{seeds(view)}"
        f"<h3>Use it</h3><pre>{escape(use(view))}</pre>{small_print(view)}</section>"
    )


def opening(views: Sequence[ResultView]) -> str:
    """The top of a page about one result: its verdict, and its numbers large. Of several, each section has its own."""
    if len(views) != 1:
        return ""
    view = views[0]
    return verdict(view) + headline([[(view.name(name), record) for name, record in group] for group in view.ordered()])


def summary(view: ResultView) -> str:
    """What a combination is, in a sentence or two."""
    how = f" at {view.way}" * bool(view.way)
    return (
        f"{len(view.nimg)} checkpoints of one training run, summed into one set of weights. The coefficients were searched "
        f"for the best {NAMES.get(view.metric, view.metric)}{how}; nothing was trained."
    )


def verdict(view: ResultView) -> str:
    """The verdict, as large within the noise as beyond it, and whom else LCSC does not beat."""
    standing = view.standing(rival := view.rival())
    tag = {"better": ", beyond the noise", "worse": ", worse", "": ""}.get(standing, f", {standing}")
    others = {name: view.standing(name) for name in view.data["candidates"] if name != rival}
    also = " ".join(
        f"{text}: {', '.join(view.name(name) for name, how in others.items() if how == kind)}."
        for kind, text in {"within the noise": "Within the noise of LCSC", "worse": "Better than LCSC"}.items()
        if kind in others.values()
    )
    return (
        f'<div class="verdict{" unsure" * (standing in ("within the noise", "worse"))}"><b>Held out{tag}</b>'
        f"<p>{escape(view.data['verdict'])}</p>{f'<small>{escape(also)}</small>' * bool(also)}</div>"
    )


def held_out(view: ResultView) -> str:
    """A table for every metric, the searched one with the gain against each candidate."""
    groups = view.ordered()
    if not groups:
        return "<p>Nothing was measured held out, so nothing is known beyond the search's own cost.</p>"
    some, reference = groups[0][0][1], view.data.get("reference") or {}
    new = reference.get("search_sha256") != reference.get("report_sha256")
    unseen = "noise and reference images" if new else "noise (but not reference images)"
    images = f"{some.n:,} images for each of " * bool(some.n)
    intro = (
        f"<p>Measured on {unseen if reference else 'seeds'} that the search never saw: {images}{len(some.seeds)} noise "
        f"seed{'s' * (len(some.seeds) != 1)}, the same for all candidates. Best first; ± is the standard deviation over "
        "the seeds; differences are taken seed by seed.</p>"
    )
    first, *rest = [table(view, dict(group), second=i > 0) for i, group in enumerate(groups)]
    wins = sum(group[0][0] == "lcsc" for group in groups[1:])
    beside = (
        f"<p>The same images by metrics that were not searched for, against the same reference; LCSC is the best in {wins} "
        f"of {len(rest)}. Different tables must not be compared.</p>"
    )
    return intro + first + (f'<h3>Second opinions</h3>{beside}<div class="three">{"".join(rest)}</div>' if rest else "")


def table(view: ResultView, group: dict[str, Record], second: bool) -> str:
    """The candidates under one stamp, best first; of the searched metric with what LCSC gains against each."""
    some = next(iter(group.values()))
    heads = ["", "cost" if not some.extractor else some.metric.upper()] + ["LCSC is", "difference"] * (not second)
    rows = f"<tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"
    for i, (name, record) in enumerate(group.items()):
        best = i == 0 and len(group) > 1 and math.isfinite(record.value)
        label = view.data["candidates"][name]["label"] if second else view.name(name)
        cells = [escape(label) + "<em>best</em>" * best, value(record)] + ([] if second else gain(view, name))
        marks = " ".join(["best"] * best + ["own"] * (name == "lcsc"))
        rows += f'<tr class="{marks}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    kind = "second" if second else "held"
    return f'<div class="scroll {kind}"><table><caption>{caption(some, short=second)}</caption>{rows}</table></div>'


def gain(view: ResultView, name: str) -> list[str]:
    """What LCSC gains against a candidate, and the differences seed by seed, as two cells."""
    found = (view.data.get("gains") or {}).get(name, {})
    share, mean, std = (number(found.get(part)) for part in ("fraction", "paired_mean", "paired_std"))
    if not math.isfinite(share):
        return ["–", "–"]
    amount = f"{abs(100 * share):.0f}" if abs(share) >= 0.1 else f"{abs(100 * share):.2g}"
    text = f"{amount} % {'better' if share > 0 else 'worse'}"
    spread = f" <small>± {std:.2g}</small>" * math.isfinite(std)
    noise = "<em class=unsure>within the noise</em>" * (view.standing(name) == "within the noise")
    return [text + noise, f"{abs(mean):.3g}{spread}"]


def signs(view: ResultView) -> str:
    """The coefficients in a sentence."""
    vector = [number(c) for c in view.data["coefficients"]]
    parts = {"positive": [c for c in vector if c > 0], "negative": [c for c in vector if c < 0]}
    texts = [f"{len(part):,} {sign}, together {sum(part):.3g}" for sign, part in parts.items() if part]
    top = max(range(len(vector)), key=lambda i: abs(vector[i]))
    place = f"after {view.nimg[top]:,} images" if view.counted else f"of checkpoint {top}"
    return (
        f"<p>They sum to 1: {'; '.join(texts)}. The largest in size is {vector[top]:.3g}, {place}.</p>".replace("-", "−")
    )  # fmt: skip


def searching(view: ResultView) -> str:
    """The costs of the search, with what they are not."""
    figure = costs(view)
    if not figure:
        return "<p>No candidate of the search had a finite cost, or none was kept.</p>"
    return (
        "<p>What the search saw: costs on its own noise and reference images, which it was chosen by. They are "
        "<b>not held out</b> and not comparable with the tables above. Dotted lines go on where a search has ended.</p>"
    ) + figure


def pictures(view: ResultView, rows: int) -> str:
    """Last checkpoint, best EMA and LCSC side by side; what cannot be shown is said."""
    if not view.model or not view.sampler or not makes_pictures(view.model):
        why = view.problem or ("these models make no pictures" if view.sampler else "the metric samples in its own way")
        return f"<p>There are none to show: {escape(why)}.</p>"
    models, problem = view.rebuilt(("last", "ema"))
    missing = f"<p>Only LCSC can be shown, the others cannot be rebuilt: {escape(problem)}.</p>" if problem else ""
    figures = "".join(
        sampled(view.name(name), model, view.sampler, view.records.get(name, [])[:1], rows)
        for name, model in {**models, "lcsc": view.model}.items()
    )
    names = view.model.info.class_names if view.model.info.architecture.num_classes else ()
    return f'{told(names)}{missing}<div class="three">{figures}</div>'


def facts(view: ResultView) -> dict[str, str]:
    """Name -> HTML."""
    data, found = view.data, {}
    cost = {name: number(amount) for name, amount in (data.get("cost") or {}).items()}
    span = f"{view.nimg[0]:,} to {view.nimg[-1]:,} images seen" if view.counted else "their images seen unknown"
    found["Checkpoints"] = f"{len(view.nimg)}, {span}, kept as {escape(str(data.get('storage')))} for the search"
    if view.sampler:
        levels = [f"{sigma:.4g}" for sigma in view.sampler.sigmas]
        levels = levels if len(levels) < 5 else [*levels[:2], "…", levels[-1]]
        found["Sampler"] = f"{escape(view.way)}, σ = {', '.join(levels)}; {view.sampler.nfe} NFE"
    if data.get("run"):
        found["Run"] = f"<code>{escape(data['run'])}</code>"
    found |= {name: text for name, of in STAGES.items() if (text := stage(view, *of))}
    if cost:
        found["Evaluations"] = (
            f"{cost['evaluations']:,.0f}, of which {cost['raced_out']:,.0f} stopped early and {cost['failed']:,.0f} failed"
            f"; at most {cost['budget']:,.0f} a search"
        )
        found["Work"] = f"{cost['images']:,.0f} images made, {duration(cost['seconds']).replace(' ', '&nbsp;')}"
    lcsc = data["candidates"]["lcsc"]
    found["Chosen"] = (
        f"{escape(data.get('chosen', ''))}: search cost {number(lcsc.get('search')):.3g}, re-ranked "
        f"{number(lcsc.get('rerank')):.3g}"
    )
    if len(view.searches) < 2:
        found["Search seeds"] = "One: how much the outcome depends on it was not measured"
    return found | hardware(data.get("environment") or {})


def stage(view: ResultView, name: str, reference: str) -> str:
    """The images, noise and reference of one stage; "" where it is not told."""
    num, noise, real = (view.data.get(part) or {} for part in ("num", "noise", "reference"))
    if name not in num or name not in noise:
        return ""
    seeds = noise[name] if isinstance(noise[name], list) else [noise[name]]
    text = f"noise seed{'s' * (len(seeds) != 1)} {', '.join(map(str, seeds))}"
    if not real:
        return text
    return f"{num[name]:,} images, {text}, against {escape(real[reference])} ({real[f'{reference}_n']:,})"


def seeds(view: ResultView) -> str:
    """What the outcome owes to the search's own random numbers."""
    names, spread = list(view.searches), view.data.get("seed_spread")
    if len(names) < 2 or not spread or view.data["chosen"] not in names:
        return ""
    heads = ("search", "search cost", "re-ranked", "held out", "distance", "cosine")
    rows = f"<tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>"
    at = names.index(view.data["chosen"])
    for i, (name, held) in enumerate(view.searches.items()):
        found = [Record.from_json(r) for r in held.get("records") or [] if r["metric"] == view.data["metric"]]
        cells = [
            escape(name) + "<em>chosen</em>" * (i == at),
            *(f"{number(held.get(score)):.3g}" for score in ("search_score", "rerank_score")),
            value(found[0]) if found else "–",
            *("–" if i == at else f"{number(spread[of][at][i]):.2g}" for of in ("distance", "cosine")),
        ]  # fmt: skip
        rows += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    text = (
        "<b>Search seeds</b> &middot; distance: of the combined weights to the chosen ones, in units of how far the "
        "checkpoints lie apart &middot; cosine: of the coefficients with the chosen ones"
    )
    return f'<div class="scroll"><table><caption>{text}</caption>{rows}</table></div>'


def use(view: ResultView) -> str:
    """Commands."""
    folder, file = str(view.file.parent), shlex.quote(str(view.file))
    again = (
        f"# the same weights again, bit for bit, from the checkpoints\nfewstep average {file} --out again.safetensors"
    )
    if not view.model:
        return again
    steps = len(view.sampler.sigmas) if view.sampler else 1
    solver = " --solver dpm" * isinstance(view.sampler, DPMSolver)
    return (
        f"fewstep sample {shlex.quote(folder)} --steps {steps}{solver} --num 64 --out grid.png\n\n{again}\n\n# in Python\n"
        f"import fewstep\nmodel = fewstep.load({folder!r})"
    )


def small_print(view: ResultView) -> str:
    """Hashes, every coefficient with its checkpoint, and the environment, folded away."""
    data, reference = view.data, view.data.get("reference") or {}
    hashes = {"combined weights": data.get("weights_sha256")}
    hashes |= {f"{name} reference": reference.get(f"{name}_sha256") for name in ("search", "report")}
    hashes |= {f"extractor {r.extractor}": r.extractor_sha256 for found in view.records.values() for r in found[:1]}
    rows = [f"{name:20} {sha256}" for name, sha256 in hashes.items() if sha256]
    listing = [
        f"{snapshot['nimg']:>13,} {number(c):>12.6f}  {snapshot['sha256'][:12]}  {snapshot['path']}"
        for snapshot, c in zip(data["snapshots"], data["coefficients"], strict=True)
    ]
    head = f"{'images seen' if view.counted else 'position':>13} {'coefficient':>12}  sha256        path"
    return (
        f"<h3>What made it</h3>{folded('Hashes', chr(10).join(rows))}"
        f"{folded('Checkpoints and coefficients', chr(10).join([head, *listing]))}"
        f"{folded('Environment', json.dumps(data.get('environment') or {}, indent=2))}"
    )
