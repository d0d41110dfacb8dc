"""Curves of several runs in one figure: Frechet distance by images and by time, losses where they mean the same."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from fewstep import codec
from fewstep.report.contenders import Contender, Measured
from fewstep.report.curves import PALETTE, STYLE, framed, inline, key, plain
from fewstep.report.numbers import NAMES
from fewstep.report.standings import cost

DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (1, 1.5)))
UNITS = ((10_800.0, 3600.0, "h"), (180.0, 60.0, "min"), (0.0, 1.0, "s"))  # from so many seconds on


class Line(NamedTuple):
    """One run in a figure; place: its number on the page, which gives its colour."""

    name: str
    place: int
    x: list[float]
    y: list[float]

    @property
    def color(self) -> str:
        return PALETTE[self.place % len(PALETTE)]

    @property
    def dash(self) -> Any:
        return DASHES[self.place // len(PALETTE) % len(DASHES)]


def races(contenders: Sequence[Contender]) -> str:
    """The section of curves; "" where no run was evaluated or logged."""
    contenders = sorted(contenders, key=lambda c: (not c.curve, not c.log))  # colours are dealt in this order
    figures = "".join(pair(group, contenders) for group in evaluated(contenders))
    alike = losses(contenders)
    if not figures and not alike:
        return ""
    told = "Each point is the best weights of one evaluation. "
    unknown = [c.label for c in contenders if c.curve and c.before is None]
    begun = [
        f"{c.label} ({c.before.nimg:,} of {c.origin})" for c in contenders if c.curve and c.before and c.before.nimg
    ]
    if unknown:
        told += f"Images and time are those of each run alone: what {', '.join(unknown)} began from is not given here. "
    elif begun:
        told += f"What a run began from counts: {', '.join(begun)}. "
    text = f"<p>{escape(told + hardware(contenders))}</p>" if figures else ""
    return f"<section><h2>Curves</h2>{text}{figures}{alike}</section>"


def hardware(contenders: Sequence[Contender]) -> str:
    """What the times were measured on, where they can be compared and where not."""
    machines = {c.label: machine(c.machine) for c in contenders if c.log and c.machine}
    if len(set(machines.values())) > 1:
        told = "; ".join(f"{label}: {name}" for label, name in machines.items())
        return f"The times are of different machines and must not be compared: {told}."
    return f"All times: {next(iter(machines.values()))}." if machines else ""


def machine(found: Mapping[str, Any]) -> str:
    """The processor, or the GPU, and the threads."""
    threads = found.get("threads")
    return str(found.get("gpu") or f"{found.get('processor')}, {threads} thread{'s' * (threads != 1)}")


def evaluated(contenders: Sequence[Contender]) -> list[dict[str, list[Measured]]]:
    """The evaluations in training by what must agree (stamp, sampler, noise levels), then by run; most runs first."""
    groups: dict[Any, dict[str, list[Measured]]] = {}
    for contender in contenders:
        for measured in contender.curve:
            record = measured.record
            same = (record.stamp(), record.sampler, len(record.sigmas))
            groups.setdefault(same, {}).setdefault(contender.label, []).append(measured)
    return sorted(groups.values(), key=lambda group: -len(group))


def pair(group: Mapping[str, Sequence[Measured]], contenders: Sequence[Contender]) -> str:
    """One metric of one stamp against images seen, and against training time."""
    record = next(iter(group.values()))[0].record
    title = f"{NAMES.get(record.metric, record.metric)} ({record.extractor}), {record.nfe} NFE, n = {record.n:,}"
    by_images, by_time = [], []
    alone = any(contender.curve and contender.before is None for contender in contenders)
    for place, contender in enumerate(contenders):
        found = group.get(contender.label, [])
        if not found:
            continue
        best = {
            nimg: min((m.record for m in found if m.nimg == nimg), key=cost) for nimg in sorted({m.nimg for m in found})
        }
        seen, seconds = (0, 0.0) if alone or contender.before is None else contender.before
        values = [record.value for record in best.values()]
        by_images.append(Line(contender.label, place, [seen + nimg for nimg in best], values))
        by_time.append(Line(contender.label, place, [seconds + contender.seconds_at(n) for n in best], values))
    shown = [figure(f"{title}, by images", by_images), figure(f"{title}, by time", by_time, time=True)]
    return f'<div class="pair">{"".join(shown)}</div>'


def losses(contenders: Sequence[Contender]) -> str:
    """The losses of runs whose objective, data and sigma_data are the same, term by term."""
    groups: dict[str, list[tuple[int, Contender]]] = {}
    for place, contender in enumerate(contenders):
        if contender.recipe and contender.log:
            recipe = contender.recipe
            same = [codec.encode(recipe.objective), recipe.sigma_data, recipe.data.source, recipe.data.resolution]
            groups.setdefault(json.dumps(same), []).append((place, contender))
    figures = []
    for group in groups.values():
        names = ", ".join(dict.fromkeys(contender.method for _, contender in group))
        for term in group[0][1].log[0]["losses"] if len(group) > 1 else ():
            lines = [
                Line(
                    c.label, place, [row["nimg"] for row in c.log], [row["losses"].get(term, math.nan) for row in c.log]
                )
                for place, c in group
            ]
            figures.append(figure(f"Loss of {names}: {term}", lines))
    text = "<p>Of runs with the same objective and data; over the images of the run itself.</p>"
    return f'<h3>Losses</h3>{text}<div class="pair">{"".join(figures)}</div>' if figures else ""


def figure(title: str, lines: Sequence[Line], time: bool = False) -> str:
    """A titled figure, logarithmic, with the last value of each run in its key."""
    keys = ""
    for line in lines:
        gaps = {0: line.color, 1: f"repeating-linear-gradient(90deg,{line.color} 0 7px,transparent 7px 10px)"}
        dots = f"repeating-linear-gradient(90deg,{line.color} 0 2px,transparent 2px 4px)"
        keys += key(line.name, gaps.get(DASHES.index(line.dash), dots), f"{line.y[-1]:.3g}")
    return framed(title, keys, svg(title, lines, time))


def svg(title: str, lines: Sequence[Line], time: bool) -> str:
    """The drawing."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    longest = max(max(line.x) for line in lines)
    unit, name = next((size, name) for least, size, name in UNITS if longest >= least) if time else (1.0, "")
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(5.2, 2.6))
        label = "seconds of training" if name == "s" else f"training, {name}"
        axes = drawing.add_axes((0.095, 0.17, 0.89, 0.78), xlabel=label if time else "images seen")
        for line in lines:
            x = [value / unit for value in line.x]
            axes.plot(x, line.y, color=line.color, ls=line.dash, marker="o" if len(x) <= 24 else "", clip_on=False)
        values = [y for line in lines for y in line.y if math.isfinite(y)]
        if values and min(values) > 0:
            axes.set_yscale("log")
            decades = math.log10(max(values) / min(values))
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=7))
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(FuncFormatter(plain) if time else EngFormatter(sep=""))
        return inline(drawing, title)
