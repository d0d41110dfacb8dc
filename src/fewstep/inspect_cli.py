"""fewstep inspect: what data look like to a network, and the options that follow."""

import shlex
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from fewstep.advice import Advice
    from fewstep.inspection import Statistics

HEADS = (
    "mean", "std", "robust", "skew", "ex.kurt", "min", "0.1 %", "median", "99.9 %", "max", "> 4 std", "> 6 std", "> 10 std",
)  # fmt: skip


def inspect(
    source: tyro.conf.Positional[str], *, num: int = 10_000, resolution: int | None = None,
    out: Path = Path("inspect.png"),
) -> dict[str, Any]:  # fmt: skip
    """Moments, quantiles and outliers of a data set per channel, a picture of them, and the options to train on it with.

    Args:
        source: Images or latents, as for --data: digits, a folder, FILE.zip, FILE.parquet, FILE.npz or hf:NAME.
        num: Images to look at, drawn once and for all from the set; all if there are fewer.
        resolution: Center-crop to a square and resize to this many pixels, as --data.resolution of the training will.
        out: The picture (.png): a histogram per channel, logarithmic, with the normal density beside it.
    """
    from fewstep.advice import recommend
    from fewstep.console import ProgressLine, say
    from fewstep.data import DataSpec, open_images
    from fewstep.inspection import inspect as look
    from fewstep.report.histograms import histograms
    from fewstep.types import FewstepError

    if out.suffix.lower() != ".png":
        raise FewstepError(f"--out {out}: give a .png file")
    images = open_images(DataSpec(source, resolution=resolution, streamed=True))  # decoded once, where it is read
    n = min(max(num, 1), len(images))
    with ProgressLine("inspect", n) as line:
        seen = look(images, num, tick=line.advance)
    *_, last = seen.values()
    advice, data = recommend(last, images.space), f"--data {shlex.quote(source)}"
    data += f" --data.resolution {resolution}" * (resolution is not None)
    size = " x ".join(map(str, last.shape))
    title = f"{images.name}: {n:,} of {len(images):,} images" if n < len(images) else f"{images.name}: {n:,} images"
    out.parent.mkdir(parents=True, exist_ok=True)
    histograms(out, f"{title} of {size}".replace(" x ", " × "), seen)
    say(f"{title} of {size}\n\n{table(seen)}\n\n{told(advice, data)}\n\npicture: {out}")
    recommended = {
        "sigma_data": advice.sigma_data, "distance": advice.distance, "c": advice.c, "method": advice.method,
        "options": advice.options, "reasons": advice.reasons, "commands": advice.commands(data),
    }  # fmt: skip
    return {
        "source": source, "name": images.name, "images": n, "of": len(images), "shape": list(last.shape), "out": str(out),
        "quantiles_from": "a histogram over all numbers of half precision (bins 0.05 % wide); min and max are exact",
        "statistics": {name: found.to_json() for name, found in seen.items()}, "recommended": recommended,
    }  # fmt: skip


def table(seen: "Mapping[str, Statistics]") -> str:
    """The numbers of every channel, and of all values."""
    lines = []
    for name, found in seen.items():
        rows = {f"  channel {c}": row for c, row in enumerate(found.channels)} if len(found.channels) > 1 else {}
        lines.append(f"{name:14}" + "".join(f"{head:>9}" for head in HEADS))
        lines += [f"{label:14}" + "".join(f"{cell:>9}" for cell in cells(row)) for label, row in rows.items()]
        lines.append(f"{'  all':14}" + "".join(f"{cell:>9}" for cell in cells(found.whole)))
        elements = found.to_json()["elements"]
        lines.append(
            f"  std of single elements: {elements['std_min']:.3g} to {elements['std_max']:.3g}, half below "
            f"{elements['std_median']:.3g}"
        )
    lines.append("  robust: interquartile range / 1.349; quantiles and shares from a histogram with bins 0.05 % wide")
    return "\n".join(lines)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A summary as text, in the order of HEADS."""
    plain = [row[name] for name in ("mean", "std", "robust_std", "skewness", "excess_kurtosis", "min")]
    plain += [row["quantiles"][q] for q in ("0.001", "0.5", "0.999")] + [row["max"]]
    shares = [row["beyond_std"][k] for k in ("4", "6", "10")]
    return ["-" if value is None else f"{value:.3g}" for value in plain] + [f"{s:.1e}" if s else "0" for s in shares]


def told(advice: "Advice", data: str) -> str:
    """The recommendations, each with its options and reason, and whole commands."""
    values = {"sigma_data": f"{advice.sigma_data:g}", "distance": advice.distance, "c": advice.c}
    lines = ["recommended"]
    for name, value in values.items():
        options = advice.options[name] or f"fewstep train {advice.method}"
        lines.append(f"  {name:11}{value:24}{options}")
        lines += textwrap.wrap(advice.reasons[name], 118, initial_indent=" " * 13, subsequent_indent=" " * 13)
    return "\n".join([*lines, "", *(f"  {command}" for command in advice.commands(data))])
