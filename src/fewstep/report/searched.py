"""Figures of a search: its coefficients, and its cost as it went."""

import math
from itertools import pairwise
from typing import Any, NamedTuple

from fewstep.report.curves import PALETTE, STYLE, TEXT, divide, framed, inline, key, plain
from fewstep.report.result import ResultView, number

COLORS = {"lcsc": PALETTE[0], "ema": PALETTE[1], "power": PALETTE[2], "random": PALETTE[3]}
NAMES = {"ema": "grid of EMAs", "power": "grid of power EMAs", "random": "random vectors"}
LIGHT = "73"  # alpha of the other search seeds
DOTS = (0, (1, 2))
MANY = 150  # checkpoints, from which on they are drawn finer
WIDTH = 694  # of the axes in points


def wide(xlabel: str) -> tuple[Any, Any]:
    """A figure over the page's whole width, and its axes."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10.2, 3.3))
    axes = drawing.add_axes((0.045, 0.15, 0.945, 0.82))
    axes.set_xlabel(xlabel, labelpad=9)
    return drawing, axes


def coefficients(view: ResultView) -> str:
    """The coefficient of every checkpoint: LCSC's as stems, those of other search seeds and of averages as lines."""
    import matplotlib
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    seen, chosen = view.nimg, view.data["coefficients"]
    others = [held["coefficients"] for name, held in view.searches.items() if name != view.data.get("chosen")]
    averages = [name for name in ("ema", "power") if name in view.data["candidates"]]
    gap = min(b - a for a, b in pairwise(seen))
    stem = max(0.7, min(3.0, 0.5 * WIDTH * gap / (seen[-1] - seen[0] + gap)))
    with matplotlib.rc_context(STYLE):
        drawing, axes = wide("images seen" if view.counted else "checkpoint")
        axes.axhline(0, color=TEXT, lw=0.7)
        for name in reversed(averages):
            axes.plot(seen, view.data["candidates"][name]["coefficients"], color=COLORS[name], lw=1.6)
        for vector in others:
            axes.plot(seen, vector, color=COLORS["lcsc"] + LIGHT, lw=0.9 if len(seen) <= MANY else 0.35)
        axes.vlines(seen, 0, chosen, color=COLORS["lcsc"], lw=stem, zorder=3)
        if len(seen) <= MANY:
            axes.plot(seen, chosen, "o", color=COLORS["lcsc"], ms=min(1.5 + stem, 4.2), mew=0, zorder=3)
        divide(axes, [])
        axes.set_xlim(seen[0] - gap, seen[-1] + gap)
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if view.counted else FuncFormatter(plain))
        picture = inline(drawing, "Coefficient of each checkpoint")
    keys = key("LCSC", COLORS["lcsc"]) + "".join(key(view.name(name), COLORS[name]) for name in averages)
    keys += key("other search seeds", COLORS["lcsc"] + LIGHT) if others else ""
    return framed("Coefficient of each checkpoint", keys, picture, wide=True)


class Trace(NamedTuple):
    """The best cost so far of one search."""

    kind: str
    evaluations: tuple[int, ...]
    costs: tuple[float, ...]
    """finite"""


def traces(view: ResultView) -> list[Trace]:
    """Those that found something finite, the result's own searcher first and in it the chosen one."""
    found = []
    for name, points in view.data.get("traces", {}).items():
        finite = [(int(n), number(cost)) for n, cost in points if math.isfinite(number(cost))]
        if finite:
            kind, (evaluations, costs) = name.partition("/")[0], zip(*finite, strict=True)
            found.append((kind != view.kind, name != view.data.get("chosen"), Trace(kind, evaluations, costs)))
    return [trace for *_, trace in sorted(found, key=lambda item: item[:2])]


def costs(view: ResultView) -> str:
    """The best cost so far of every search, dotted on where it has ended; "" where nothing finite was found."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter

    found = traces(view)
    if not found:
        return ""
    kinds, spare = list(dict.fromkeys(trace.kind for trace in found)), iter(PALETTE[4:] * len(found))
    colors = {k: COLORS["lcsc"] if k == view.kind else COLORS.get(k) or next(spare) for k in kinds}
    firsts = {kind: next(trace for trace in found if trace.kind == kind) for kind in kinds}
    ends = [trace.evaluations[-1] for trace in found]
    far, long = max(ends), max(ends) > 15 * min(ends)
    last = number(view.data["candidates"].get("last", {}).get("search"))
    low, high = window(found, last)
    with matplotlib.rc_context(STYLE):
        drawing, axes = wide("evaluations")
        if low < last < high:
            axes.axhline(last, color=TEXT, lw=1, ls=DOTS)
        for trace in reversed(found):
            first = trace is firsts[trace.kind]
            n, cost, color = trace.evaluations[-1], trace.costs[-1], colors[trace.kind] + LIGHT * (not first)
            axes.step(*trace[1:], where="post", color=color, lw=1.9 if first and trace.kind == view.kind else 1.3)
            axes.plot([n, far], [cost, cost], color=color, lw=1, ls=DOTS)
            axes.plot(n, cost, "o", color=color, ms=3.6, mew=0, clip_on=False)
        divide(axes, [low, high])
        axes.set(ylim=(low, high), xscale="log" if long else "linear")
        axes.set_xlim(1 if long else 0, far)
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
        picture = inline(drawing, "Lowest cost so far")
    keys = "".join(key(*told(kind, [t.costs[-1] for t in found if t.kind == kind], colors[kind])) for kind in kinds)
    keys += key(view.name("last"), "var(--soft)", f"{last:.3g}") if math.isfinite(last) else ""
    return framed("Lowest cost so far", keys, picture, wide=True)


def window(found: list[Trace], last: float) -> tuple[float, float]:
    """The costs to show: where the searches ended, with room above for how they came there, and `last` if it is near."""
    ends, first = [trace.costs[-1] for trace in found], max(trace.costs[0] for trace in found)
    low, high = min(ends), max(ends)
    if last - low <= 4 * (high - low):
        high = max(high, last)
    room = 0.15 * (high - low) or 0.05 * abs(low) or 1.0
    bottom = max(low - room, 0.8 * low) if low > 0 else low - room
    return bottom, max(high + room, min(first + room / 2, high + 3 * room))


def told(kind: str, ends: list[float], color: str) -> tuple[str, str, str]:
    """The key's entry of one searcher: its lowest costs, from the best to the worst of its seeds."""
    name = NAMES.get(kind, kind) + f", {len(ends)} seeds" * (len(ends) > 1)
    least, most = f"{min(ends):.3g}", f"{max(ends):.3g}"
    return name, color, least if least == most else f"{least} to {most}"
