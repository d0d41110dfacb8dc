"""Comparison of runs: like with like only, best first, honest about noise, and true to logs and weights."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep import codec
from fewstep.cli import main
from fewstep.files import append_jsonl, write_json
from fewstep.metrics import Record
from fewstep.model import ModelInfo, save_model
from fewstep.networks import MLP, Architecture
from fewstep.recipes import recipe
from fewstep.report.compare import compare, flat
from fewstep.report.contenders import Contender, Measured, Spent, open_all, seconds_at, short_names
from fewstep.report.races import Line, hardware, races
from fewstep.report.standings import cost, standing, tables
from fewstep.types import FewstepError
from test_report import Page  # an HTML parser that fails on what is not closed
from test_report_combination import result

SMALL = Architecture(MLP(width=4, depth=1), (1, 8, 8))


def record(value: float, std: float = 0.0, seeds: int = 1, nfe: int = 1, **other: Any) -> Record:
    values = {1: [value], 2: [value - std / math.sqrt(2), value + std / math.sqrt(2)]}[seeds]
    stamp = dict(
        n=2000, extractor="digits", extractor_sha256="5e9a", reference="digits[train]", reference_n=1617,
        reference_sha256="1c28", sampler="FewStep", sigmas=(80.0, 0.8)[:nfe], nfe=nfe,
    )  # fmt: skip
    return Record.of(other.pop("metric", "fd"), values, range(seeds), **{**stamp, **other})


def weights(file: Path, nimg: int, number: float, initialised_from: str = "") -> str:
    """Save a model whose weights are all `number`; returns its hash."""
    info = ModelInfo(
        SMALL, "consistency", file.stem, nimg, recipe="ect", data="digits", initialised_from=initialised_from
    )
    tensors = {name: torch.full_like(tensor, number) for name, tensor in SMALL.build().state_dict().items()}
    return save_model(file, tensors, info)


def run(
    path: Path, nimg: int, number: float, evaluations: Sequence[tuple[int, str, Record]] = (), *, name: str = "ect",
    start: str = "", rate: float = 100.0, **changes: Any,
) -> str:  # fmt: skip
    """A run directory with two rows of log; returns the hash of its weights."""
    path.mkdir(parents=True)
    write_json(path / "recipe.json", codec.encode(replace(recipe(name, "digits"), **changes)))
    write_json(path / "environment.json", {"processor": "abacus", "cores": 2, "threads": 1, "gpu": None})
    for seen in (nimg // 2, nimg):
        losses = {term: 1.0 + seen for term in recipe(name, "digits").objective.terms}
        append_jsonl(path / "log.jsonl", {"nimg": seen, "images_per_second": rate, "losses": losses, "seconds": 1e6})
    for seen, which, found in evaluations:
        append_jsonl(path / "metrics.jsonl", {"nimg": seen, "weights": which, "record": found.to_json()})
    return weights(path / "averages" / "ema-0.99.safetensors", nimg, number, start)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A diffusion run, and two of ECT that began from it; the second is faster and worse."""
    start = run(tmp_path / "diffusion", 1000, 0.1, name="edm")
    a = [
        (500, "online", record(9.0)),
        (500, "ema", record(8.0)),
        (2000, "online", record(3.0)),
        (2000, "ema", record(4.0)),
    ]
    run(tmp_path / "a <b>" / "ect", 2000, 0.2, a, start=start)
    run(tmp_path / "b" / "ect", 2000, 0.3, [(2000, "ema", record(5.0))], start=start, rate=200.0, seed=7)
    return tmp_path / "diffusion", tmp_path / "a <b>" / "ect", tmp_path / "b" / "ect"


def test_time_is_of_training_alone() -> None:
    log = [{"nimg": 100, "images_per_second": 10.0}, {"nimg": 400, "images_per_second": 30.0}]
    assert [seconds_at(log, n) for n in (0, 50, 100, 250, 400, 700)] == [0, 5, 10, 15, 20, 30]
    assert math.isnan(seconds_at([], 100))


def test_what_went_before_counts_where_it_is_known(runs: tuple[Path, Path, Path]) -> None:
    diffusion, a, b = open_all(runs)
    assert (diffusion.before, diffusion.in_all) == (Spent(0, 0.0), Spent(1000, 10.0))
    assert (a.before, a.in_all, a.origin) == (Spent(1000, 10.0), Spent(3000, 30.0), "diffusion")
    assert b.in_all == Spent(3000, 20.0)
    alone = open_all(runs[1:])[0]
    assert (alone.spent, alone.before, alone.in_all) == (Spent(2000, 20.0), None, None)
    assert a.parameters == sum(p.numel() for p in SMALL.build().parameters())


def test_a_chain_of_runs_adds_up(tmp_path: Path) -> None:
    first = run(tmp_path / "one", 100, 0.1, name="edm")
    second = run(tmp_path / "two", 1000, 0.2, start=first)
    run(tmp_path / "three", 10000, 0.3, start=second)
    three, *_ = open_all([tmp_path / name for name in ("three", "two", "one")])
    assert three.in_all == Spent(11100, 111.0)
    three, _ = open_all([tmp_path / name for name in ("three", "two")])
    assert three.in_all is None


def test_a_run_stands_with_the_best_of_its_evaluations(runs: tuple[Path, Path, Path]) -> None:
    for order in (runs, runs[::-1]):
        (table,) = tables(open_all(order))
        assert [row.name for row in table.rows] == ["a <b>/ect", "b/ect"]
        first, second = (row.cells[1] for row in table.rows)
        assert (first.best.record.value, first.best.weights, first.best.nimg, first.of) == (3.0, "online", 2000, 4)
        assert (first.standing, second.standing) == ("best", "one seed")


@pytest.mark.parametrize(("gap", "how"), [(0.9, "within the noise"), (1.1, "worse")])
def test_the_noise_is_students_of_the_differences_seed_by_seed(gap: float, how: str) -> None:
    a, far = record(10.0, std=0.3, seeds=2), 12.706 / math.sqrt(2) * 0.1  # t of 97.5 % at one degree of freedom
    assert standing(a, a) == "best"
    assert standing(a, record(10 + gap * far, std=0.4, seeds=2)) == how  # the differences have std 0.1
    assert standing(a, record(10 + gap * far)) == "one seed"
    assert standing(a, record(math.inf, std=0.4, seeds=2)) == "worse"


def test_values_of_other_noise_seeds_are_not_paired() -> None:
    a = record(10.0, std=0.3, seeds=2)
    near, far = (replace(record(10 + gap, std=0.3, seeds=2), seeds=(7, 8)) for gap in (1.0, 3.0))
    assert standing(a, near) == "within the noise"  # Welch: t = 3.3 at two degrees of freedom, the limit is 4.3
    assert standing(a, far) == "worse"


def contender(label: str, *records: Record) -> Contender:
    return Contender(label, measured=tuple(Measured(record, label) for record in records))


numbers = st.floats(0.1, 9, allow_nan=False) | st.sampled_from([math.inf, math.nan])
some = st.builds(
    record, numbers, metric=st.sampled_from(["fd", "recall"]), n=st.sampled_from([100, 2000]), nfe=st.sampled_from([1, 2]),
    reference_sha256=st.sampled_from(["aa", "bb"]),
)  # fmt: skip


@given(st.lists(st.lists(some, max_size=3), max_size=4))
def test_like_stands_with_like_best_first_and_nothing_is_lost(found: list[list[Record]]) -> None:
    made = tables([contender(str(i), *records) for i, records in enumerate(found)])
    assert len({table.stamp.stamp() for table in made}) == len(made)
    for table in made:
        assert all(cell.best.record.stamp() == table.stamp.stamp() for row in table.rows for cell in row.cells.values())
        for nfe in table.columns:
            costs = [cost(row.cells[nfe].best.record) for row in table.rows if nfe in row.cells]
            assert sum(row.cells[nfe].standing == "best" for row in table.rows if nfe in row.cells) == (len(costs) > 1)
            if nfe == table.columns[0]:
                assert costs == sorted(costs)
    assert sum(c.of for t in made for row in t.rows for c in row.cells.values()) == sum(map(len, found))
    assert [table.stamp.metric for table in made] == sorted(table.stamp.metric for table in made)  # fd comes first


def test_more_is_better_of_recall_and_infinity_is_last() -> None:
    (table,) = tables([contender("a", record(0.2, metric="recall")), contender("b", record(0.6, metric="recall"))])
    assert [row.name for row in table.rows] == ["b", "a"]
    (table,) = tables([contender("a", record(math.inf)), contender("b", record(1e9))])
    assert [row.name for row in table.rows] == ["b", "a"]


def test_names_are_as_long_as_they_must_be() -> None:
    paths = [Path(p) for p in ("/x/one/ect", "/x/two/ect", "/x/two", "/x/three/lcsc", "/y/two")]
    assert list(short_names(paths).values()) == ["one/ect", "two/ect", "x/two", "lcsc", "y/two"]


def test_records_stand_with_the_run_of_their_weights(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    sha = weights(tmp_path / "other" / "averages" / "best.safetensors", 4000, 0.9)
    mine = json.loads(
        json.dumps([record(2.5, 0.1, 2, nfe, model="/gone/best.safetensors").to_json() for nfe in (1, 2)])
    )
    files = {"a.json": open_hash(runs[1]), "b.json": open_hash(runs[2]), "other.json": sha}
    for i, (name, digest) in enumerate(files.items()):
        path = str(tmp_path / "other" / "averages" / "best.safetensors") if digest == sha else "/gone/best.safetensors"
        rows = [{**row, "model_sha256": digest, "model": path, "value": 2.5 + i} for row in mine]
        write_json(tmp_path / name, [*rows, rows[0]])
    found = open_all(runs, [tmp_path / name for name in files])
    assert [c.label for c in found] == ["diffusion", "a <b>/ect", "b/ect", "other"]
    assert (found[3].spent.nimg if found[3].spent else 0, found[3].parameters) == (4000, found[0].parameters)
    assert len(found[3].measured) == 2  # the same record twice is one
    first = next(table for table in tables(found) if 2 in table.columns)
    assert [row.name for row in first.rows] == ["a <b>/ect", "b/ect", "other"]
    assert len(first.columns) == 2


def open_hash(path: Path) -> str:
    from fewstep.snapshots.format import read_header

    return str(read_header(path / "averages" / "ema-0.99.safetensors")["weights_sha256"])


def test_several_weights_of_one_run_are_rows_of_their_own(tmp_path: Path) -> None:
    rows = []
    for name, number in (("ema-0.9", 0.1), ("online", 0.2)):
        file = tmp_path / "run" / "averages" / f"{name}.safetensors"
        rows.append(record(number, model=str(file), model_sha256=weights(file, 300, number)).to_json())
    write_json(tmp_path / "found.json", rows)
    found = open_all([], [tmp_path / "found.json"])
    assert [c.label for c in found] == ["run"]
    assert [row.name for row in tables(found)[0].rows] == ["run, ema-0.9 at 300", "run, online at 300"]


def test_a_search_stands_with_its_candidates_and_counts_its_run(tmp_path: Path) -> None:
    sha = run(tmp_path / "ect", 1000, 0.1)
    snapshots = [
        {"path": "", "sha256": sha if n == 4 else "x", "nimg": 200 * (n + 1), "weights": "online"} for n in range(5)
    ]
    (tmp_path / "lcsc").mkdir()
    write_json(tmp_path / "lcsc" / "result.json", result(snapshots, "none"))
    _, lcsc = open_all([tmp_path / "ect", tmp_path / "lcsc"])
    assert (lcsc.in_all, lcsc.origin, lcsc.search_seconds) == (Spent(1000, 10.0), "ect", 31.2)
    first, second = tables([lcsc])
    assert [row.name for row in first.rows][:3] == ["lcsc", "lcsc: random <0>", "lcsc: best EMA"]
    assert (first.stamp.metric, second.stamp.metric) == ("fd", "recall")
    assert [row.cells[1].standing for row in first.rows][:3] == [
        "best",
        "worse",
        "worse",
    ]  # by the same gap at every seed
    (alone,) = open_all([tmp_path / "lcsc"])
    assert alone.in_all is None


def test_the_page_is_whole_escaped_and_has_every_evaluation(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    found = compare(runs, tmp_path / "new" / "page.html")
    page = Page(found.page)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert "b" in page.tags
    assert "a <b>/ect" in page.text
    for word in (
        "2,000",
        "3,000",
        "Not measured",
        "fewstep evaluate",
        "one noise seed",
        "What differs",
        "seed",
        "abacus",
    ):
        assert word in page.text, word
    for axis in ("images", "time"):
        assert f"Fréchet distance (digits), 1 NFE, n = 2,000, by {axis}" in page.text


def test_curves_are_the_best_weights_after_what_went_before(
    runs: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Line] = []
    monkeypatch.setattr("fewstep.report.races.figure", lambda title, lines, time=False: drawn.extend(lines) or "")
    races(open_all(runs))
    a, b, a_time, b_time = drawn[:4]
    assert (a.name, a.x, a.y) == ("a <b>/ect", [1500, 3000], [8.0, 3.0])
    assert (a_time.x, a_time.y) == ([15.0, 30.0], [8.0, 3.0])
    assert (b.x, b.y, b_time.x) == ([3000], [5.0], [20.0])
    assert len({line.color for line in drawn[:2]}) == 2
    drawn.clear()
    assert "each run alone" in races(open_all(runs[1:]))  # where they began is not known: each from its own beginning
    assert (drawn[0].x, drawn[2].x) == ([500, 2000], [5.0, 20.0])


def test_times_of_different_machines_are_not_compared(tmp_path: Path) -> None:
    for name, gpu in (("a", None), ("b", "H200")):
        run(tmp_path / name, 100, 0.1, [(100, "ema", record(1.0))])
        write_json(tmp_path / name / "environment.json", {"processor": "abacus", "threads": 2, "gpu": gpu})
    assert "a: abacus, 2 threads; b: H200" in hardware(open_all([tmp_path / "a", tmp_path / "b"]))
    assert hardware(open_all([tmp_path / "a"])) == "All times: abacus, 2 threads."


def test_losses_are_drawn_together_where_they_mean_the_same(runs: tuple[Path, Path, Path], tmp_path: Path) -> None:
    html = Page(compare(runs, tmp_path / "page.html").page).html
    assert "Loss of ect: consistency" in html
    assert "Loss of edm" not in html  # there is one such run
    run(tmp_path / "other", 2000, 0.7, sigma_data=0.4)
    html = Page(compare([runs[1], tmp_path / "other"], tmp_path / "page.html").page).html
    assert "Loss of ect" not in html


def test_tables_of_unlike_stamps_say_why(tmp_path: Path) -> None:
    run(tmp_path / "a", 100, 0.1, [(100, "ema", record(1.0))])
    run(tmp_path / "b", 100, 0.2, [(100, "ema", record(2.0, n=500))])
    run(tmp_path / "c", 100, 0.3, [(100, "ema", record(3.0, reference_sha256="ff"))])
    run(tmp_path / "d", 100, 0.4, [(100, "ema", record(4.0, extractor="pixels", extractor_sha256=""))])
    text = Page(compare([tmp_path / name for name in "abcd"], tmp_path / "page.html").page).text
    assert text.count("Not to be ranked with the first table") == 3
    for why in ("images (2,000 there, 500 here)", "not the same ones", "features (digits there, pixels here)"):
        assert why in text


def test_what_differs_is_told_field_by_field() -> None:
    made = flat(codec.encode(recipe("ect", "digits")))
    assert made["objective.terms.consistency.distance"] == "PseudoHuber"
    assert made["optimizer.betas"] == [0.9, 0.999]
    other = flat(codec.encode(replace(recipe("ect", "digits"), seed=3)))
    assert {name for name in made if made[name] != other[name]} == {"seed"}


def test_the_verb_prints_a_table_and_json(
    runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [row["name"] for row in found["tables"][0]["rows"]] == ["a <b>/ect", "b/ect"]
    assert found["tables"][0]["rows"][0]["values"]["1"]["value"] == 3.0
    assert found["runs"][1]["with_its_start"] == {"nimg": 3000, "seconds": 30.0}
    assert found["runs"][0]["measured"] == 0
    assert f"fewstep evaluate {runs[0]} --data digits" in said.err
    assert out.exists()


def test_bad_input(runs: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(runs[0])
    (tmp_path / "empty").mkdir()
    for name, content in {"text": "not json", "dict": "{}", "list": "[]", "rows": '[{"metric": "fd"}]'}.items():
        (tmp_path / f"{name}.json").write_text(content)
    cases = {
        "nothing": ([], "nothing to compare"), "twice": ([runs[0], tmp_path / "link"], "given twice"),
        "no run": ([tmp_path / "empty"], "is its folder a fewstep run"), "missing": ([tmp_path / "x"], "does not exist"),
        "no result": ([tmp_path / "dict.json"], "no result"),
    }  # fmt: skip
    for args, word in cases.values():
        assert main(["compare", *map(str, args), "--out", str(tmp_path / "page.html")]) == 2
        assert word in capsys.readouterr().err
    for name, word in {"text": "not valid JSON", "dict": "no list", "list": "no list", "rows": "not a record"}.items():
        with pytest.raises(FewstepError, match=word):
            open_all([], [tmp_path / f"{name}.json"])
    assert not (tmp_path / "page.html").exists()
    run(tmp_path / "young", 100, 0.5)  # it has logged, but saved nothing yet
    (tmp_path / "young" / "averages" / "ema-0.99.safetensors").unlink()
    (tmp_path / "young" / "log.jsonl").unlink()
    assert (
        "None of these runs has been evaluated" in Page(compare([tmp_path / "young"], tmp_path / "page.html").page).text
    )
