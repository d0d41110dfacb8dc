"""Stamped records as tables: ranked within one stamp, never across."""

import math
from collections.abc import Mapping, Sequence
from html import escape

from fewstep.metrics import Record, rank
from fewstep.metrics.record import LOWER_IS_BETTER
from fewstep.report.view import RunView

NAMES = {"fd": "Fréchet distance", "kid": "Kernel distance"}
Records = Mapping[str, Record]


def last_and_best(views: Sequence[RunView]) -> Records:
    """The last evaluation in each run's metrics.jsonl, and its best row under each stamp."""
    found: dict[str, Record] = {}
    for view in views:
        named = {f"{view.label} {row['weights']}, {row['nimg']:,} images": row for row in view.metrics}
        records = {name: Record.from_json(row["record"]) for name, row in named.items()}
        found |= {name: records[name] for name, row in named.items() if row["nimg"] == view.metrics[-1]["nimg"]}
        found |= dict(group[0] for group in ranked(records))
    return found


def ranked(records: Records) -> list[list[tuple[str, Record]]]:
    """Records of one stamp together, best first."""
    groups: dict[tuple[str | int, ...], list[tuple[str, Record]]] = {}
    for name, record in records.items():
        groups.setdefault(record.stamp(), []).append((name, record))
    orders = [rank([record for _, record in group]) for group in groups.values()]
    return [sorted(g, key=lambda item: o.index(item[1])) for g, o in zip(groups.values(), orders, strict=True)]


def value(record: Record) -> str:
    """The value as Record's own text gives it, ± std where there is more than one seed."""
    text = f"{record.value:.0f}" if 1000 <= abs(record.value) < math.inf else f"{record.value:.3g}"
    return text + f" <small>± {record.std:.2g}</small>" * (len(record.seeds) > 1)


def headline(groups: Sequence[Sequence[tuple[str, Record]]]) -> str:
    """The first stamp's best numbers, large."""
    tiles = "".join(
        f"<li{' class=best' * (i == 0)}><strong>{value(r)}</strong><b>{escape(name)}</b><br>"
        f"{escape(NAMES.get(r.metric, r.metric.rpartition(':')[2]))}{f', {r.nfe} NFE' * bool(r.nfe)}</li>"
        for group in groups[:1]
        for i, (name, r) in enumerate(group[:4])
    )
    return f'<ul class="tiles">{tiles}</ul>' if tiles else ""


def tables(records: Records, diffusion: frozenset[str]) -> str:
    """The section of numbers, a table for each stamp; `diffusion` are the hashes of diffusion models."""
    groups = ranked(records)
    more = " Different tables were not measured alike and must not be compared." if len(groups) > 1 else ""
    one_step = [
        n for n, r in records.items() if r.nfe == 1 and (n.startswith("diffusion") or r.model_sha256 in diffusion)
    ]
    return (
        "<section><h2>Numbers</h2><p>Best first. Rows of a table share metric, sample count, feature extractor and "
        f"reference; ± is the standard deviation over noise seeds; NFE are network evaluations per image.{more}</p>"
        f"{''.join(table(dict(group), one_step) for group in groups)}</section>"
    ) * bool(groups)


def caption(stamp: Record, short: bool = False) -> str:
    """What the numbers of one stamp are; short: without extractor and reference. A user's own function is a cost."""
    own = not stamp.extractor
    direction = "lower" if own or stamp.metric in LOWER_IS_BETTER else "higher"
    name = stamp.metric.rpartition(":")[2] if own else NAMES.get(stamp.metric, stamp.metric.capitalize())
    text = f"<b>{escape(name)}</b>, {direction} is better"
    return text + (
        f" &middot; extractor {escape(stamp.extractor)} <code>{escape(stamp.extractor_sha256[:8])}</code> &middot; "
        f"reference {escape(stamp.reference)}, {stamp.reference_n:,} images"
    ) * (not (short or own))


def table(group: Records, one_step: Sequence[str]) -> str:
    """Records of one stamp, best first, each against the first of `one_step` among them."""
    stamp, base = next(iter(group.values())), next((name for name in one_step if name in group), "")
    rows = "".join(
        f"<th>{head}</th>" for head in ("", stamp.metric.upper(), "NFE", "noise levels σ", "samples × seeds")
    )
    rows += f"<th>against {escape(base)}</th>" * bool(base)
    for i, (name, r) in enumerate(group.items()):
        best = i == 0 and len(group) > 1 and math.isfinite(r.value)
        levels = [f"{sigma:.4g}" for sigma in r.sigmas]
        noise = ", ".join(levels) if len(levels) < 4 else f"{levels[0]} … {levels[-1]}"
        cells = [escape(name) + "<em>best</em>" * best, value(r), str(r.nfe), noise, f"{r.n:,} × {len(r.seeds)}"]
        if base:
            times = r.value / (group[base].value or math.nan)
            against = f"{1 / times:.3g}× lower" if 0 < times < 1 else f"{times:.3g}× higher"
            cells.append("–" if name == base else against)
        rows += f"<tr{' class=best' * best}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f'<div class="scroll"><table><caption>{caption(stamp)}</caption>{rows}</table></div>'
