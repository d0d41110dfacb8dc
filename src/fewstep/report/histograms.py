"""A picture of what `fewstep inspect` found: one histogram per channel against a normal density, heavy tails in colour."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.files import atomic_write
from fewstep.inspection import Histogram, Statistics
from fewstep.report.curves import PALETTE, STYLE, plain

INK, SOFT, LINE, PAPER = "#1d2025", "#666c75", "#e5e4de", "#fdfdfb"  # page.css
NEAR, FAR = "#8fbfdc", PALETTE[1]
COLUMNS, ROWS = 4, 4  # of panels for one reading; what is more is in the JSON
LEFT, HIGH, HEAD = 0.55, 2.7, 0.8  # inches: margin, a row, title and key
BARS = 128
LOOK: dict[Any, Any] = {
    "figure.facecolor": PAPER, "axes.facecolor": PAPER, "text.color": INK, "axes.edgecolor": LINE, "axes.labelcolor": SOFT,
    "grid.color": LINE, "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": SOFT, "ytick.labelcolor": SOFT,
    "font.sans-serif": ["Liberation Sans", "Helvetica", "Arial", "DejaVu Sans"],
}  # fmt: skip


def histograms(path: Path, title: str, seen: Mapping[str, Statistics]) -> None:
    """Write the picture (PNG) of each reading's channels, a row or more for each."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {name: min(len(found.channels), COLUMNS * ROWS) for name, found in seen.items()}
    columns = min(max(panels.values()), COLUMNS)
    rows = sum(-(-count // columns) for count in panels.values())
    wide = {1: 6.4, 2: 4.8}.get(columns, 3.6)
    width, height = wide * columns + 0.3, HIGH * rows + HEAD
    with matplotlib.rc_context({**STYLE, **LOOK}):
        drawing = Figure(figsize=(width, height), dpi=160)
        FigureCanvasAgg(drawing)
        drawing.text(LEFT / width, 1 - 0.36 / height, title, fontsize=13, fontweight="bold", va="center")
        keys(drawing, LEFT / width, 1 - 0.58 / height)
        top = height - HEAD
        for name, found in seen.items():
            for channel in range(panels[name]):
                down, across = divmod(channel, columns)
                left, bottom = LEFT + wide * across, top - HIGH * (down + 1) + 0.4
                axes = drawing.add_axes((left / width, bottom / height, (wide - 0.5) / width, (HIGH - 0.95) / height))
                label = f"{name}, channel {channel}" if len(found.channels) > 1 else name
                panel(axes, label, found.channels[channel], Histogram.of(found.counts[channel]))
            top -= HIGH * -(-panels[name] // columns)
        atomic_write(path, lambda file: drawing.savefig(file, format="png"))


def keys(drawing: Any, left: float, top: float) -> None:
    """What the colours mean, in a line under the title."""
    from matplotlib.lines import Line2D

    entries = {
        "density, logarithmic": Line2D([], [], color=NEAR, lw=5, solid_capstyle="butt"),
        "beyond 4 std": Line2D([], [], color=FAR, lw=5, solid_capstyle="butt"),
        "normal of that mean and std": Line2D([], [], color=INK, lw=1, ls=(0, (4, 2))),
    }
    drawing.legend(
        list(entries.values()), list(entries), loc="upper left", bbox_to_anchor=(left, top), ncols=3, frameon=False,
        fontsize=8, labelcolor=SOFT, handlelength=1.6, columnspacing=1.8, borderpad=0, borderaxespad=0,
    )  # fmt: skip


def panel(axes: Any, label: str, found: Mapping[str, Any], histogram: Histogram) -> None:
    """One channel: density on a logarithmic axis, down to half of what one value is worth where there are tails."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    edges, counts = bars(histogram)
    mean, std, step = found["mean"], found["std"], float(edges[1] - edges[0])
    axes.set_title(label, loc="left", fontsize=9, fontweight="bold", pad=17)
    axes.text(0, 1.035, described(found), transform=axes.transAxes, fontsize=7.5, color=SOFT)
    density = counts / (counts.sum() * step)
    middles = (edges[:-1] + edges[1:]) / 2
    far = np.abs(middles - mean) > 4 * std
    for chosen, color in ((~far, NEAR), (far, FAR)):
        some = chosen & (counts > 0)
        axes.bar(middles[some], density[some], step, color=color, lw=0)
    low, high = float(density[counts > 0].min()), float(density.max())
    if std > 0:
        x = np.linspace(edges[0], edges[-1], 801)
        normal = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        axes.plot(x, normal, color=INK, lw=1, ls=(0, (4, 2)))
        low, high = min(low, float(normal.min())), max(high, float(normal.max()))
    axes.set_yscale("log")
    low, high = max(low / 3, 0.5 / (counts.sum() * step)), high * 2
    axes.set(xlim=(edges[0], edges[-1]), ylim=(low, high))
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: minus(f"{value:g}")))
    if high / low < 300:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
    else:
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_minor_formatter(NullFormatter())


def described(found: Mapping[str, Any]) -> str:
    """A channel's numbers in a line."""
    kurtosis, share = found["excess_kurtosis"], 100 * found["beyond_std"]["6"]
    if kurtosis is None:
        return f"constant, {found['mean']:.3g}"
    return minus(f"std {found['std']:.3g} · excess kurtosis {kurtosis:.2f} · ") + (
        f"{np.format_float_positional(share, precision=1, fractional=False, trim='-')} % beyond 6 std"
        if share
        else "none beyond 6 std"
    )


def minus(text: str) -> str:
    """With the sign that a number has in print."""
    return text.replace("-", "−")


def bars(histogram: Histogram) -> tuple[np.ndarray, np.ndarray]:
    """Edges and counts of even bars over the whole range; a few discrete values get a bar each."""
    values, counts = histogram.values.numpy(), histogram.counts.numpy()
    low, high = float(values[0]), float(values[-1])
    number = max(1, min(len(values), BARS))
    step = (high - low) / max(len(values) - 1, 1) if len(values) <= 256 else 0.0
    margin = step / 2 or 1e-3 * max(abs(low), 1.0) * (low == high)
    number_of, edges = np.histogram(values, number, (low - margin, high + margin), weights=counts)
    return edges, number_of
