"""The report: one page, whole, self-contained, escaped, and true to the records and logs it is made of."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fewstep.metrics import Record
from fewstep.model import load
from fewstep.networks import UNet
from fewstep.recipe import Recipe
from fewstep.recipes import recipe
from fewstep.report import build
from fewstep.report.numbers import last_and_best, ranked, table
from fewstep.report.view import RunView
from fewstep.run import train
from fewstep.types import FewstepError

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Checks that every element is closed in order; collects references, text and paths of drawings."""

    def __init__(self, page: Path):
        super().__init__()
        self.html = page.read_text("utf-8")
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.paths: list[str] = []
        self.text = ""
        self.feed(self.html)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text += data

    def note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        self.paths += [value or "" for name, value in attrs if name == "d"]


def short(name: str) -> Recipe:
    plan = recipe(name, "digits")
    network = UNet(channels=8, multipliers=(1,), layers=1, attention=(), head_dim=8, norm_groups=4)
    evaluation = replace(plan.evaluation, every_nimg=128 if name == "ect" else 0, num=64)
    return replace(
        plan, network=network, total_nimg=256, batch_size=32, log_nimg=64, snapshot_nimg=128, grid_nimg=128,
        evaluation=evaluation,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("runs")
    train(short("edm"), home / "diffusion", device="cpu", quiet=True)
    train(short("ect"), home / "ect", init=load(home / "diffusion"), device="cpu", quiet=True)
    return home / "diffusion", home / "ect"


@pytest.fixture(scope="module")
def records(runs: tuple[Path, Path]) -> dict[str, Record]:
    diffusion, ect = load(runs[0]).sha256, load(runs[1]).sha256

    def record(values: tuple[float, ...], steps: int, model: str, n: int = 2000, nfe: int = 0) -> Record:
        return Record.of(
            "fd", values, range(len(values)), n=n, extractor="digits",
            extractor_sha256="5e9a2f88b73d", reference="digits[train]",
            reference_n=1617, reference_sha256="1c28", sampler="FewStep", sigmas=(80.0, 0.821)[:steps], nfe=nfe or steps,
            model_sha256=model,
        )  # fmt: skip

    return {
        "diffusion_many": record((1.81, 1.83), 2, "", nfe=35),
        "diffusion_1": record((32.1, 32.7), 1, diffusion),
        "ect_1": record((4.04, 4.06), 1, ect),
        "ect_2 <b>": record((3.21, 3.23), 2, ect),
        "elsewhere": record((0.77,), 1, "", n=50),
    }


@pytest.fixture(scope="module")
def page(runs: tuple[Path, Path], records: Mapping[str, Record], tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "new" / "report.html"
    title, timings = "<script>alert(1)</script> & co", {"train <a>": 70.0, "search": 0.0}
    made = build(runs, out, records=records, title=title, lead="5 < 6", timings=timings)
    assert made == out
    return Page(out)


def test_page_is_whole_and_loads_nothing(page: Page) -> None:
    assert page.references
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert not re.search(r"@import|url\((?!#)|https?:", page.html)
    ids = re.findall(r'\bid="([^"]*)"', page.html)
    assert all(name[1:] in ids for name in page.references if name.startswith("#"))
    assert all(name in ids for name in re.findall(r"url\(#([^)]*)\)", page.html))


def test_everything_given_is_escaped(page: Page) -> None:
    assert "script" not in page.tags
    assert "<script>alert(1)</script> & co" in page.text
    for given in ("5 < 6", "train <a>", "ect_2 <b>"):
        assert given in page.text


def test_every_number_stands_there_with_its_stamp(page: Page, records: Mapping[str, Record]) -> None:
    for name, record in records.items():
        assert f"{record.value:.3g}" in page.text
        assert name in page.text
    for part in (
        "± 0.42",
        "5e9a2f88",
        "digits[train], 1,617 images",
        "2,000 × 2",
        "50 × 1",
        "10.1× lower",
        "80, 0.821",
    ):
        assert part in page.text, part
    assert page.tags.count("table") == 3  # two stamps and the timings


def test_only_like_stamps_are_ranked_and_one_is_best(records: Mapping[str, Record]) -> None:
    first, second = ranked(records)
    assert [name for name, _ in first] == ["diffusion_many", "ect_2 <b>", "ect_1", "diffusion_1"]
    assert [name for name, _ in second] == ["elsewhere"]
    assert table(dict(first), ["diffusion_1"]).count("<em>best</em>") == 1
    assert "best</em>" not in table(dict(second), ["diffusion_1"])


def test_four_grids_from_the_same_noise(page: Page) -> None:
    for caption in (
        "Diffusion (EDM), 18 Heun steps",
        "Diffusion (EDM), 1 step (before tuning)",
        "ECT, 1 step",
        "ECT, 2 steps",
    ):
        assert caption in page.text
    assert "35 evaluations" in page.text
    assert "1 evaluation · FD 4.05" in page.text
    assert "128 images seen" in page.text
    assert page.tags.count("img") == 4 + 2 * 2


def test_curves_have_a_point_for_every_row(page: Page, runs: tuple[Path, Path]) -> None:
    rows = len(RunView.open(runs[0], "cpu").log)
    assert rows == 4
    lines = [path for path in page.paths if len(re.findall("[ML]", path)) == rows and "z" not in path]
    assert len(lines) >= 5  # loss and learning rate of two runs, gradient norm of one
    assert page.tags.count("svg") == 8
    assert "images seen" in page.text
    assert "stage 1" in page.text


def test_without_records_the_runs_own_last_and_best_are_shown(runs: tuple[Path, Path], tmp_path: Path) -> None:
    view = RunView.open(runs[1], "cpu")
    found = last_and_best([view])
    assert {"ECT online, 256 images", "ECT ema-0.99, 256 images"} <= found.keys()
    best = min(row["record"]["value"] for row in view.metrics)
    assert best in [record.value for record in found.values()]
    text = Page(build([runs[1]], tmp_path / "one.html")).text
    assert "ECT, 2 steps" in text
    assert "18 Heun steps" not in text
    assert f"{best:.3g}" in text


def test_two_runs_of_one_method_are_told_apart(runs: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "again")
    text = Page(build([runs[0], tmp_path / "again"], tmp_path / "two.html", per_class=1)).text
    assert "EDM diffusion" in text
    assert "EDM again" in text
    assert "before tuning" not in text


def test_an_interrupted_run_without_a_model(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run, ignore=shutil.ignore_patterns("averages", "snapshots", "samples", "metrics.jsonl"))
    first = (run / "log.jsonl").read_text().splitlines()[0]
    (run / "log.jsonl").write_text(first + "\n")
    (run / "problems.jsonl").write_text('{"nimg": 32, "problem": "the <denoising> term is nan"}\n')
    text = Page(build([run], run / "report.html")).text
    for part in ("no weights are saved yet", "stopped at 64 of 256 images", "the <denoising> term is nan"):
        assert part in text
    (run / "log.jsonl").unlink()
    assert "Nothing is logged yet" in Page(build([run], run / "report.html")).text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="fewstep run"):
        build([tmp_path], tmp_path / "report.html")
    with pytest.raises(FewstepError, match="at least one"):
        build([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
