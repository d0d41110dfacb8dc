"""Curves of a run as inline SVG: text stays text, and ink, grid and labels take the page's colours."""

import io
import math
import re
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

from fewstep.metrics import Record
from fewstep.report.view import RunView
from fewstep.run import SIGMA_EDGES

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
TEXT, RULE = "#010101", "#020202"  # stand-ins for colours of the page
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "fewstep", "path.simplify": False, "font.size": 8, "text.color": TEXT,
    "axes.edgecolor": RULE, "axes.labelcolor": TEXT, "axes.labelpad": 5, "axes.grid": True, "axes.grid.axis": "y",
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.ymargin": 0.1,
    "axes.axisbelow": True, "axes.xmargin": 0.015, "grid.color": RULE, "grid.linewidth": 0.6,
    "xtick.color": RULE, "xtick.labelcolor": TEXT, "xtick.major.size": 0, "xtick.minor.size": 0, "xtick.major.pad": 6,
    "ytick.color": RULE, "ytick.labelcolor": TEXT, "ytick.major.size": 0, "ytick.minor.size": 0, "ytick.major.pad": 6,
    "lines.linewidth": 1.5, "lines.markersize": 2.6, "lines.solid_joinstyle": "round",
}  # fmt: skip


class Curve(NamedTuple):
    """One line and its name in the key."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str


def curves(view: RunView) -> str:
    """The run's figures: loss by term, metrics, loss by noise level, learning rate; and one more if they are odd."""
    log, seen = view.log, [row["nimg"] for row in view.log]
    if not log:
        return "<p>Nothing is logged yet.</p>"
    terms = {term: [row["losses"][term] for row in log] for term in log[0]["losses"]}
    losses = [Curve(term, seen, values, color) for (term, values), color in zip(terms.items(), PALETTE, strict=False)]
    stages = [(a["nimg"], b["stage"]) for a, b in pairwise(log) if a["stage"] != b["stage"]]
    ratio = math.sqrt(SIGMA_EDGES[1] / SIGMA_EDGES[0])
    centres = [SIGMA_EDGES[0] / ratio, *(edge * ratio for edge in SIGMA_EDGES)]  # the two open bins included
    moments = {row["nimg"]: row["loss_by_sigma"] for row in (log[0], log[len(log) // 2], log[-1])}
    levels = [
        Curve(f"{nimg:,}", centres, [math.nan if v is None else v for v in bins], PALETTE[0] + shade)
        for (nimg, bins), shade in zip(moments.items(), ("4d", "99", "ff")[-len(moments) :], strict=True)
    ]
    metrics: dict[str, dict[str, Curve]] = {}
    for row in view.metrics:
        record, name = Record.from_json(row["record"]), row["weights"]
        lines = metrics.setdefault(
            f"{record.metric.upper()} ({record.extractor}), {record.nfe} NFE, n = {record.n:,}", {}
        )
        line = lines.setdefault(name, Curve(name, [], [], PALETTE[len(lines) % 6]))
        lines[name] = line._replace(x=[*line.x, row["nimg"]], y=[*line.y, record.value])
    figures = [figure("Loss", losses, stages=stages), *(figure(title, [*metrics[title].values()]) for title in metrics)]
    figures.append(figure("Loss by noise level, after images", levels, by_noise=True))
    figures.append(figure("Learning rate", [Curve("", seen, [row["lr"] for row in log], PALETTE[2])], linear=True))
    if len(figures) % 2:
        figures.append(figure("Gradient norm", [Curve("", seen, [row["gradient_norm"] for row in log], PALETTE[3])]))
    return f'<div class="pair">{"".join(figures)}</div>'


def figure(
    title: str,
    lines: Sequence[Curve],
    by_noise: bool = False,
    linear: bool = False,
    stages: Sequence[tuple[int, int]] = (),
) -> str:
    """A titled figure with its key; over images seen the key gives the last values."""
    keys = "".join(key(line.name, line.color, "" if by_noise else f"{line.y[-1]:.3g}") for line in lines)
    return framed(title, keys, svg(title, lines, by_noise, linear, stages))


def key(name: str, color: str, value: str = "") -> str:
    """One entry of a figure's key."""
    value = f" <b>{value}</b>" * bool(value)
    return f'<span class="key"><i style="background:{color}"></i>{escape(name)}{value}</span>'


def framed(title: str, keys: str, drawing: str, wide: bool = False) -> str:
    """A drawing under its title and key."""
    what = " class=wide" * wide
    return f"<figure{what}><figcaption><b>{escape(title)}</b>{keys}</figcaption>{drawing}</figure>"


def svg(title: str, lines: Sequence[Curve], by_noise: bool, linear: bool, stages: Sequence[tuple[int, int]]) -> str:
    """The drawing: y is logarithmic when it spans more than a decade, unless linear; every point is kept."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, FuncFormatter

    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(5.2, 2.35))
        axes = drawing.add_axes((0.095, 0.19, 0.89, 0.74), xlabel="noise level σ" if by_noise else "images seen")
        for line in lines:
            axes.plot(line.x, line.y, color=line.color, marker="o" if len(line.x) <= 24 else "")
        divide(axes, [] if linear else [y for line in lines for y in line.y])
        axes.set(xscale="log") if by_noise else axes.set_xlim(left=0)
        if linear:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(FuncFormatter(plain) if by_noise else EngFormatter(sep=""))
        for i, (at, stage) in enumerate(stages):
            axes.axvline(at, color=TEXT, lw=0.7, ls=(0, (2, 3)))
            name = str(stage) if i and len(stages) > 4 else f"stage {stage}"
            axes.annotate(name, (at, 1), (3, -1), ("data", "axes fraction"), "offset points", va="top", fontsize=7)
        return inline(drawing, title)


def plain(value: float, _: int = 0) -> str:
    """A tick's label."""
    return f"{value:g}"


def divide(axes: Any, values: Sequence[float]) -> None:
    """The y axis for these values: logarithmic if they are positive and span more than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values = [y for y in values if math.isfinite(y)] or [1.0]
    decades = 0.0 if min(values) <= 0 else math.log10(max(values) / min(values))
    if decades > 1:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))


def inline(drawing: Any, title: str) -> str:
    """A matplotlib Figure as an element of the page: no prologue, metadata, sizes, nor ids found twice."""
    buffer = io.StringIO()
    drawing.savefig(buffer, format="svg", transparent=True)
    (viewbox,) = re.findall(r' viewBox="[^"]*"', buffer.getvalue())
    body = re.sub(
        r'<metadata>.*?</metadata>| id="\w+_\d+"', "", buffer.getvalue().partition("<svg")[2], flags=re.DOTALL
    )
    body = body.partition(">")[2].replace(TEXT, "var(--soft)").replace(RULE, "var(--line)")
    return f'<svg{viewbox} role="img" aria-label="{escape(title)}">{body}'
