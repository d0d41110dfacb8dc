"""Records of several contenders as tables: one for each stamp, best first, with what is within the noise."""

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fewstep.metrics import Record
from fewstep.metrics.record import LOWER_IS_BETTER, STAMP
from fewstep.outcome import within_noise
from fewstep.report.contenders import Contender, Measured
from fewstep.report.details import duration

FACTS = ("recipe", "parameters", "images seen", "with its start", "training", "images/s")


@dataclass(frozen=True)
class Cell:
    """The best of a row's records at one number of network evaluations."""

    best: Measured
    of: int
    """records that it is the best of"""
    standing: str
    """best, within the noise, worse; one seed: the noise is unknown; alone: nothing to compare with"""

    def to_json(self) -> dict[str, Any]:
        record = self.best.record.to_json()
        said = {name: record[name] for name in ("value", "std", "seeds", "sampler", "sigmas", "nfe", "model_sha256")}
        return {
            **said,
            "weights": self.best.weights,
            "nimg": self.best.nimg,
            "best_of": self.of,
            "standing": self.standing,
        }


@dataclass(frozen=True)
class Row:
    """One line of a table: cells by network evaluations."""

    name: str
    contender: Contender
    cells: dict[int, Cell]


@dataclass(frozen=True)
class Table:
    """The records of one stamp; columns are numbers of network evaluations."""

    stamp: Record
    rows: tuple[Row, ...]
    columns: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "name": row.name,
                "run": row.contender.label,
                "values": {str(n): c.to_json() for n, c in row.cells.items()},
            }
            for row in self.rows
        ]
        return {
            "stamp": {**dict(zip(STAMP, self.stamp.stamp(), strict=True)), "reference": self.stamp.reference},
            "rows": rows,
        }


def cost(record: Record) -> float:
    """Less is better; what is not finite is worst. A user's own function is a cost."""
    if not math.isfinite(record.value):
        return math.inf
    return record.value if record.metric in LOWER_IS_BETTER or not record.extractor else -record.value


def standing(best: Record, record: Record) -> str:
    """How a record stands to the best of its column."""
    if record is best:
        return "best"
    if min(len(best.seeds), len(record.seeds)) < 2:
        return "one seed"
    if not math.isfinite(record.value):
        return "worse"
    return "within the noise" if within_noise(best, record) else "worse"


def tables(contenders: Iterable[Contender]) -> list[Table]:
    """A table for each stamp; Frechet distances first, of them those with the most runs, then noise seeds."""
    groups: dict[tuple[str | int, ...], dict[str, tuple[Contender, list[Measured]]]] = {}
    for contender in contenders:
        for measured in contender.measured:
            rows = groups.setdefault(measured.record.stamp(), {})
            rows.setdefault(measured.row, (contender, []))[1].append(measured)
    found = [table(rows) for rows in groups.values()]

    def place(table: Table) -> tuple[bool, int, int, int]:
        cells = [cell for row in table.rows for cell in row.cells.values()]
        seeds = max(len(cell.best.record.seeds) for cell in cells)
        return table.stamp.metric != "fd", -len({row.contender.label for row in table.rows}), -seeds, -len(table.rows)

    return sorted(found, key=place)


def table(rows: dict[str, tuple[Contender, list[Measured]]]) -> Table:
    """The rows of one stamp, best first by the fewest network evaluations that they have."""
    columns = tuple(sorted({m.record.nfe for _, measured in rows.values() for m in measured}))
    best: dict[str, dict[int, Cell]] = {name: {} for name in rows}
    for nfe in columns:
        here = {name: [m for m in measured if m.record.nfe == nfe] for name, (_, measured) in rows.items()}
        tops = {name: min(found, key=lambda m: cost(m.record)) for name, found in here.items() if found}
        first = min((m.record for m in tops.values()), key=cost)
        for name, top in tops.items():
            how = standing(first, top.record) if len(tops) > 1 else "alone"
            best[name][nfe] = Cell(top, len(here[name]), how)
    order = sorted(
        rows, key=lambda name: [cost(c.best.record) if (c := best[name].get(n)) else math.inf for n in columns]
    )
    some = next(iter(rows.values()))[1][0].record
    return Table(some, tuple(Row(name, rows[name][0], best[name]) for name in order), columns)


def why_apart(table: Table, first: Table) -> str:
    """What was measured unlike in two tables."""
    a, b = first.stamp, table.stamp
    said = [f"metric ({a.metric} there, {b.metric} here)"] * (a.metric != b.metric)
    said += [f"images ({a.n:,} there, {b.n:,} here)"] * (a.n != b.n)
    if (a.extractor, a.extractor_sha256) != (b.extractor, b.extractor_sha256):
        said.append(
            f"features ({a.extractor} there, {b.extractor} here{', of other weights' * (a.extractor == b.extractor)})"
        )
    if (a.reference_sha256, a.reference_n) != (b.reference_sha256, b.reference_n):
        there, here = (f"{of.reference}, {of.reference_n:,} images" for of in (a, b))
        said.append(f"reference ({there} there, {here} here{', not the same ones' * (there == here)})")
    return f"Not to be ranked with the first table; unlike: {'; '.join(said)}."


def remedy(contenders: Sequence[Contender]) -> str:
    """The commands that get numbers for runs which have none."""
    lines, files = [], []
    for contender in contenders:
        source = contender.recipe.data.source if contender.recipe else "DATA"
        files.append(shlex.quote(contender.label.replace("/", "-") + ".json"))
        lines.append(
            f"fewstep evaluate {shlex.quote(str(contender.path))} --data {shlex.quote(source)} --steps 1,2 > {files[-1]}"
        )
    return "\n".join([*lines, f"fewstep compare ... --records {' '.join(files)}"])


def facts(contender: Contender) -> list[str]:
    """Method, parameters, images seen, those before included, time, images/s: the columns FACTS as text."""
    spent, every, rate = contender.spent, contender.in_all, contender.rate
    time = duration(spent.seconds) if spent and math.isfinite(spent.seconds) else ""
    search = f"{duration(contender.search_seconds)} search" if contender.search_seconds is not None else ""
    return [
        contender.method or "?",
        f"{contender.parameters:,}" if contender.parameters else "?",
        f"{spent.nimg:,}" if spent else "?",
        f"{every.nimg:,}" if every else "?",
        " + ".join(part for part in (time, search) if part) or "?",
        f"{rate:,.0f}" if rate else "?",
    ]


def shown(cell: Cell | None) -> str:
    """A cell as text."""
    if cell is None:
        return "-"
    record, mark = cell.best.record, {"best": " *", "within the noise": " ~"}.get(cell.standing, "")
    text = f"{record.value:.0f}" if 1000 <= abs(record.value) < math.inf else f"{record.value:.3g}"
    return text + f" ± {record.std:.2g}" * (len(record.seeds) > 1) + mark


def text(found: Sequence[Table], contenders: Sequence[Contender]) -> str:
    """All tables for a terminal."""
    parts = []
    for table in found:
        whole = table.stamp.metric == found[0].stamp.metric
        heads = ["", *(f"{table.stamp.metric}, {n} NFE" if n else table.stamp.metric for n in table.columns)]
        rows = [[row.name, *(shown(row.cells.get(n)) for n in table.columns)] for row in table.rows]
        if whole:
            heads, rows = [*heads, *FACTS], [row + facts(r.contender) for row, r in zip(rows, table.rows, strict=True)]
        stamp = table.stamp
        told = (
            f"{stamp.metric}: {stamp.extractor}, n = {stamp.n:,}, reference {stamp.reference} ({stamp.reference_n:,})"
        )
        apart = [why_apart(table, found[0])] * (table is not found[0])
        parts.append("\n".join([told, *apart, aligned([heads, *rows])]))
    bare = [contender for contender in contenders if not contender.measured]
    if bare:
        heads = ["not measured", *FACTS]
        parts.append(aligned([heads, *([c.label, *facts(c)] for c in bare)]))
        parts.append(f"to measure them:\n{remedy(bare)}")
    marks = "* best   ~ within the noise: the difference is not beyond Student's 95 % over the noise seeds"
    return "\n\n".join([*parts, *[marks] * bool(found)])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        f"  {row[0]:{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )
