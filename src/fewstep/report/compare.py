"""One page over several runs: a table for each stamp, curves by images seen and by time, and what differs in the recipes."""

import math
from collections.abc import Sequence
from datetime import date
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from fewstep import codec
from fewstep._version import __version__
from fewstep.files import atomic_write
from fewstep.report.contenders import Contender, Spent, open_all
from fewstep.report.numbers import NAMES, caption, headline, value
from fewstep.report.races import machine, races
from fewstep.report.standings import FACTS, Cell, Row, Table, cost, facts, remedy, tables, why_apart

FOLD = 14  # fields, from which on the table of differences is folded away
HOW = {"best": "<em>best</em>", "within the noise": "<em class=unsure>within the noise</em>"}


def compare(runs: Sequence[str | Path], out: str | Path, records: Sequence[str | Path] = ()) -> "Comparison":
    """Write the page of several runs, results of searches and files of records; returns what is on it.

    FewstepError for what is no run and for one that is given twice. Numbers of unlike stamps stand in tables of their own.
    """
    contenders = open_all(runs, records)
    found = Comparison(contenders, tables(contenders), Path(out))
    data = {contender.data for contender in contenders if contender.data}
    title = f"{len(contenders)} {'runs' if len(runs) > 1 else 'models'}" + f" on {next(iter(data))}" * (len(data) == 1)
    page = Template(files("fewstep.report").joinpath("page.html").read_text("utf-8")).substitute(
        title=escape(title), lead=escape(found.verdict()), headline=tiles(found.tables),
        style=files("fewstep.report").joinpath("page.css").read_text("utf-8"),
        body=numbers(found) + races(contenders) + differences(contenders), version=__version__, date=date.today().isoformat(),
    )  # fmt: skip
    atomic_write(found.page, page)
    return found


class Comparison(NamedTuple):
    """What was compared, its tables and its page."""

    contenders: list[Contender]
    tables: list[Table]
    page: Path

    def verdict(self) -> str:
        """The best of the first table in a sentence, and who is within the noise of it."""
        if not self.tables:
            return "None of these runs has been evaluated, so nothing can be ranked."
        table = self.tables[0]
        nfe = next((n for n in table.columns if sum(n in row.cells for row in table.rows) > 1), table.columns[0])
        rows = sorted((row for row in table.rows if nfe in row.cells), key=lambda row: cost(row.cells[nfe].best.record))
        names = {
            how: [row.name for row in rows if row.cells[nfe].standing == how]
            for how in ("within the noise", "one seed")
        }
        record = rows[0].cells[nfe].best.record
        metric, at = NAMES.get(record.metric, record.metric), f" at {nfe} NFE" * bool(nfe)
        text = f"{rows[0].name} has the best {metric}{at}: {record.value:.3g}."
        if names["within the noise"]:
            text += f" Within the noise of it: {', '.join(names['within the noise'])}."
        if names["one seed"]:
            text += " These are numbers of one noise seed: how far they scatter is not known, so small differences say nothing."
        return text

    def to_json(self) -> dict[str, Any]:
        """Everything on the page, as plain values."""
        return {
            "page": str(self.page),
            "verdict": self.verdict(),
            "runs": [described(contender) for contender in self.contenders],
            "tables": [table.to_json() for table in self.tables],
        }


def described(contender: Contender) -> dict[str, Any]:
    """A contender's facts as plain values; what is unknown is null."""

    def told(spent: Spent | None) -> dict[str, Any]:
        seconds = round(spent.seconds, 1) if spent and math.isfinite(spent.seconds) else None
        return {"nimg": spent.nimg if spent else None, "seconds": seconds}

    return {
        "label": contender.label, "path": str(contender.path) if contender.path else None, "recipe": contender.method,
        "data": contender.data, "parameters": contender.parameters, **told(contender.spent),
        "with_its_start": told(contender.in_all), "origin": contender.origin, "images_per_second": contender.rate,
        "search_seconds": contender.search_seconds, "measured": len(contender.measured),
    }  # fmt: skip


def tiles(found: Sequence[Table]) -> str:
    """The first table's best numbers, large."""
    table = found[0] if found else None
    nfe = table.columns[0] if table else 0
    rows = [row for row in table.rows if nfe in row.cells] if table else []
    return headline([[(row.name, row.cells[nfe].best.record) for row in rows]]) if rows else ""


def numbers(found: Comparison) -> str:
    """The section of tables: those of the first metric whole, those of others small."""
    if not found.tables:
        return f"<section><h2>Numbers</h2>{bare(found.contenders)}</section>"
    first = found.tables[0]
    main = [table for table in found.tables if table.stamp.metric == first.stamp.metric]
    others = [table for table in found.tables if table.stamp.metric != first.stamp.metric]
    parts = [
        "<section><h2>Numbers</h2><p>Best first. Rows of a table share metric, number of images, features and reference; ± is "
        "the standard deviation over noise seeds; NFE are network evaluations per image. Within the noise: the difference "
        "is not beyond Student's 95 % over the noise seeds, paired by seed. A run's own evaluations are the best of several, "
        "picked by these same numbers. Training is the time of the steps alone, without evaluations, pictures and files.</p>"
    ]
    for table in main:
        parts.append(f"<p>{escape(why_apart(table, first))}</p>" * (table is not first) + whole(table))
    parts.append(bare(found.contenders))
    if others:
        small = "".join(whole(table, small=True) for table in others)
        parts.append(
            "<h3>Second opinions</h3><p>Other metrics; different tables must not be compared.</p>"
            f'<div class="pair">{small}</div>'
        )
    return "".join([*parts, "</section>"])


def whole(table: Table, small: bool = False) -> str:
    """A table of one stamp; small: the numbers alone."""
    named = not small and any(cell.best.weights for row in table.rows for cell in row.cells.values())
    columns = [f"{n} NFE" if n else "cost" for n in table.columns]
    heads = ["", *columns, *["weights"] * named, *([] if small else FACTS)]
    rows = "".join(f"<th>{escape(head)}</th>" for head in heads)
    for row in table.rows:
        first = row.cells.get(table.columns[0])
        cells = [escape(row.name), *(shown(row.cells.get(n)) for n in table.columns), *[weights(row)] * named]
        cells += [] if small else [escape(fact).replace("?", "–") for fact in facts(row.contender)]
        best = " class=best" * bool(first and first.standing == "best")
        rows += f"<tr{best}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    kind, stamp = "second" if small else "runs", f"{caption(table.stamp, short=small)}, n = {table.stamp.n:,}"
    return f'<div class="scroll {kind}"><table><caption>{stamp}</caption>{rows}</table></div>'


def shown(cell: Cell | None) -> str:
    """A cell's value and how it stands."""
    return value(cell.best.record) + HOW.get(cell.standing, "") if cell else "–"


def weights(row: Row) -> str:
    """Which of a run's weights its first number is of, and of how many it is the best."""
    cell = next(iter(row.cells.values()))
    if cell.best.weights in row.name:
        return ""
    name, nimg = cell.best.weights, cell.best.nimg
    at = f" at {nimg:,}" * (nimg > 0 and " at " not in name)
    return escape(name) + at + f" <small>best of {cell.of}</small>" * (cell.of > 1)


def bare(contenders: Sequence[Contender]) -> str:
    """The runs without numbers, and how to get some."""
    found = [contender for contender in contenders if not contender.measured]
    if not found:
        return ""
    rows = "".join(f"<th>{escape(head)}</th>" for head in ("", *FACTS))
    for contender in found:
        rows += f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in (contender.label, *facts(contender)))}</tr>"
    return (
        f'<div class="scroll runs"><table><caption><b>Not measured</b></caption>{rows}</table></div>'
        f"<pre>{escape(remedy(found))}</pre>"
    )


def differences(contenders: Sequence[Contender]) -> str:
    """The section of what the runs are made of, as far as they differ."""
    runs = [contender for contender in contenders if contender.recipe]
    if not runs:
        return ""
    columns = [
        {**flat(codec.encode(run.recipe)), "machine": machine(run.machine) if run.machine else ""} for run in runs
    ]
    names = [name for name in dict.fromkeys(n for column in columns for n in column) if name not in ("published", "is")]
    unlike = [name for name in names if len({str(column.get(name)) for column in columns}) > 1]
    text = (
        "The recipes, where they differ; all else is the same."
        if unlike
        else "The recipes and machines are all the same."
    )
    rows = "".join(f"<th>{escape(head)}</th>" for head in ("", *(run.label for run in runs)))
    rows += f"<tr><td>run</td>{''.join(f'<td><code>{escape(str(run.path))}</code></td>' for run in runs)}</tr>"
    for name in unlike if len(runs) > 1 else ():
        texts = ["–" if name not in column else str(column[name]) for column in columns]
        rows += f"<tr><td><code>{escape(name)}</code></td>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>"
    shown = f'<div class="scroll second"><table>{rows}</table></div>'
    if len(unlike) > FOLD and len(runs) > 1:
        shown = f"<details><summary>{len(unlike)} fields</summary>{shown}</details>"
    lead = f"<p>{text}</p>" * (len(runs) > 1)
    return f"<section><h2>What differs</h2>{lead}{shown}</section>"


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Encoded JSON as field -> value: parts by dotted names, their class under the part's own, short lists whole."""
    if isinstance(value, dict):
        found = {name: str(value["is"]).rpartition(":")[2]} if name and "is" in value else {}
        for field, part in value.items():
            if field != "is":
                found |= flat(part, f"{name}.{field}" if name else field)
        return found
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {field: v for i, part in enumerate(value) for field, v in flat(part, f"{name}.{i}").items()}
    return {name: value}
