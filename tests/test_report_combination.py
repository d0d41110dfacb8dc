"""The page of a combination: true to its result.json and weights, honest about noise, whole whatever is missing."""

import base64
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.cli import main
from fewstep.metrics import Record
from fewstep.model import Model, ModelInfo, load, save_model
from fewstep.networks import Architecture, UNet
from fewstep.report import build
from fewstep.report.grids import sampled
from fewstep.report.result import ResultView
from fewstep.report.searched import coefficients, traces
from fewstep.snapshots import Bank, write
from fewstep.types import FewstepError
from test_report import Page  # an HTML parser that fails on what is not closed

K = 5
LCSC = [0.125, -0.5, 0.25, 0.125, 1.0]
VECTORS = {
    "lcsc": LCSC, "ema": [0.0, 0.0, 0.25, 0.25, 0.5], "power": [0.0, 0.125, 0.125, 0.25, 0.5], "random": [0.2] * 5,
    "uniform": [0.2] * 5, "last": [0.0, 0.0, 0.0, 0.0, 1.0],
}  # fmt: skip
LABELS = {"lcsc": "LCSC", "ema": "best EMA", "power": "best power EMA", "random": "random <0>"}
FD = {"lcsc": 2.0, "ema": 2.5, "power": 2.6, "random": 2.04, "uniform": 8.0, "last": 4.0}
Change = Callable[[dict[str, Any]], object]


def record(metric: str, value: float, seeds: int, **other: Any) -> dict[str, Any]:
    stamp = dict(n=300, extractor="digits", extractor_sha256="5e9a2f88", reference="digits[report]", reference_n=989)
    stamp |= dict(reference_sha256="bb", sampler="FewStep", sigmas=(80.0,), nfe=1)
    values = [value + 0.1 * s for s in range(seeds)]
    return Record.of(metric, values, range(seeds), **{**stamp, **other}).to_json()


def result(snapshots: list[dict[str, Any]], sha256: str) -> dict[str, Any]:
    """What `fewstep combine` writes, with numbers that are easy to follow."""
    found = {"search": "span", "seed": 0, "coefficients": LCSC, "search_score": 1.8, "rerank_score": 1.9, "records": []}
    gains = {
        name: {
            "fraction": 1 - 2 / value, "paired_mean": value - 2, "paired_std": 0.03, "within_noise": value - 2 <= 0.06,
        }
        for name, value in FD.items() if name != "lcsc"
    }  # fmt: skip
    return {
        "fewstep": "0.1.0", "version": 1, "run": "/runs/<ect>", "snapshots": snapshots, "storage": "fp32", "batch": 32,
        "coefficients": LCSC, "weights_sha256": sha256, "chosen": "span/0", "metric": "fd", "extractor": "digits",
        "sampler": {"name": "FewStep", "sigmas": [80.0], "nfe": 1},
        "candidates": {
            name: {"label": LABELS.get(name, name), "from": name, "coefficients": vector, "search": FD[name], "rerank": None}
            for name, vector in VECTORS.items()
        },
        "records": {name: [record("fd", v, 3), record("recall", v / 10, 3)] for name, v in FD.items()},
        "traces": {"span/0": [[1, "inf"], [2, 3.0], [3, 1.8]], "random/0": [[1, None], [2, 2.9]], "ema/0": [[1, 2.4]]},
        "searches": {"span/0": found | {"evaluations": 3}}, "seed_spread": None, "gains": gains,
        "verdict": "LCSC improves <fd> on the best EMA.",
        "cost": {"evaluations": 6, "raced_out": 1, "failed": 2, "images": 7000, "seconds": 31.2, "budget": 3},
        "noise": {"search": 30000, "rerank": 40000, "report": [0, 1, 2]},
        "reference": {
            "search": "digits[search]", "search_n": 808, "search_sha256": "aa",
            "report": "digits[report]", "report_n": 989, "report_sha256": "bb",
        },
        "num": {"search": 100, "rerank": 200, "report": 300}, "environment": {},
    }  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of K snapshots, and the folder OUT of their combination."""
    home = tmp_path_factory.mktemp("combination")
    network = UNet(channels=8, multipliers=(1,), layers=1, attention=(), head_dim=8, norm_groups=4)
    info = ModelInfo(Architecture(network, (1, 8, 8), 10), "consistency", class_names=tuple("0123456789"))
    torch.manual_seed(0)
    tensors = info.architecture.build().state_dict()
    files = [home / f"{i}.safetensors" for i in range(K)]
    for i, file in enumerate(files):
        tensors = {name: t + 0.1 * torch.randn_like(t) for name, t in tensors.items()}
        save_model(file, tensors, replace(info, nimg=100 * (i + 1)))
    out = home / "out"
    bank = Bank.build(files, out / "bank.safetensors", "fp32", quiet=True)
    sha256 = save_model(out / "combined.safetensors", bank.exact(torch.tensor(LCSC, dtype=torch.float64)), info)
    data = result([vars(source) for source in bank.sources], sha256)
    (out / "result.json").write_text(json.dumps(data))
    return out, data


@pytest.fixture
def changed(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """A result with something changed in its JSON, and only those of its files."""

    def copy(change: Change = lambda data: None, files: tuple[str, ...] = ()) -> Path:
        data = json.loads(json.dumps(made[1]))
        change(data)
        (tmp_path / "result.json").write_text(json.dumps(data))
        for name in files:
            (tmp_path / name).symlink_to(made[0] / name)
        return tmp_path

    return copy


def page(folder: Path, *more: Path) -> Page:
    return Page(build([], folder / "report.html", results=[folder, *more]))


def rows(table: str) -> list[str]:
    return re.findall(r"<tr[ >].*?</tr>", table)[1:]


def test_page_is_whole_escaped_and_loads_nothing(made: tuple[Path, dict[str, Any]]) -> None:
    made_page = page(made[0])
    assert all(reference.startswith(("#", "data:")) for reference in made_page.references)
    ids = re.findall(r'\bid="([^"]*)"', made_page.html)
    assert all(name[1:] in ids for name in made_page.references if name.startswith("#"))
    for given in ("LCSC improves <fd> on the best EMA.", "random <0>", "/runs/<ect>", "LCSC on digits, 1 step"):
        assert given in made_page.text
    for heading in ("Held out", "The coefficients", "The search", "Samples from the same noise", "How it was searched"):
        assert f"<h3>{heading}</h3>" in made_page.html
    places = [
        made_page.html.index(mark) for mark in ('class="verdict', "<table", "Coefficient of", "Lowest cost", "<img")
    ]
    assert places == sorted(places)
    assert "fewstep average" in made_page.text
    assert "--steps 1" in made_page.text


def test_tables_are_of_one_stamp_best_first_with_the_gain_against_each(made: tuple[Path, dict[str, Any]]) -> None:
    html = page(made[0]).html
    fd, recall = re.findall(r"<table>.*?</table>", html)
    assert "Recall" not in fd
    assert "distance" not in recall
    order = [
        next(label for label in ("power", "EMA", "random", "uniform", "last", "LCSC") if label in r) for r in rows(fd)
    ]
    assert order == ["LCSC", "random", "EMA", "power", "last", "uniform"]
    assert [row.split("<td>")[1].partition("<")[0] for row in rows(recall)][:2] == ["uniform", "last"]  # more is better
    assert "20 % better" in rows(fd)[2]
    assert "0.5 <small>± 0.03" in rows(fd)[2]
    assert [i for i, row in enumerate(rows(fd)) if "within the noise" in row] == [1]
    assert "LCSC is the best in 0 of 1" in html


def test_what_is_held_out_and_what_is_not_is_said(changed: Callable[..., Path]) -> None:
    text = page(changed()).text
    assert "noise and reference images that the search never saw" in text
    assert "not held out" in text
    same = page(changed(lambda data: data["reference"].update(search_sha256="bb"))).text
    assert "noise (but not reference images) that the search never saw" in same


@pytest.mark.parametrize(
    ("mean", "std", "told", "tag", "css"),
    [
        (0.5, 0.03, False, "Held out, beyond the noise", "verdict"),
        (0.05, 0.03, True, "Held out, within the noise", "verdict unsure"),
        (-0.5, 0.03, False, "Held out, worse", "verdict unsure"),
        (0.5, None, True, "Held out, within the noise", "verdict unsure"),  # one noise seed: no spread
    ],
)
def test_the_verdict_stands_first_whichever_it_is(
    changed: Callable[..., Path], mean: float, std: float | None, told: bool, tag: str, css: str
) -> None:
    gain = {"fraction": mean / 2.5, "paired_mean": mean, "paired_std": std, "within_noise": told}
    html = page(changed(lambda data: data["gains"].update(ema=gain))).html
    assert f'<div class="{css}"><b>{tag}</b><p>LCSC improves &lt;fd&gt; on the best EMA.</p>' in html
    assert "Within the noise of LCSC: random &lt;0&gt;." in html


def test_stems_are_the_coefficients(made: tuple[Path, dict[str, Any]]) -> None:
    """Heights from the zero line, signed, are proportional to the vector; EMA and power EMA are lines on the same axis."""
    paths = re.findall(r'd="([^"]*)"', coefficients(ResultView.open(made[0], "cpu")))
    points = [
        [tuple(map(float, p)) for p in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths if "z" not in path
    ]
    stems = sorted(p for p in points if len(p) == 2 and p[0][0] == p[1][0] and p[0][1] != p[1][1])
    zero = stems[0][0][1]
    heights = [zero - tip for _, (_, tip) in stems]
    assert len(stems) == K
    np.testing.assert_allclose(np.array(heights) / heights[-1], np.array(LCSC) / LCSC[-1], atol=1e-5)
    lines = [[(zero - y) / heights[-1] for _, y in p] for p in points if len(p) == K]
    for name in ("ema", "power"):
        assert any(np.allclose(line, VECTORS[name], atol=1e-5) for line in lines), name


@pytest.mark.parametrize("k", [2, 10, 400])
def test_any_number_of_checkpoints_is_drawn(changed: Callable[..., Path], k: int) -> None:
    def grow(data: dict[str, Any]) -> None:
        data["snapshots"] = [{"path": "", "sha256": "", "nimg": 512 * (i + 1), "weights": ""} for i in range(k)]
        vector = [6.0 * (-1) ** i for i in range(k - 1)]
        data["coefficients"] = [*vector, 1 - sum(vector)]
        for held in data["candidates"].values():
            held["coefficients"] = [1 / k] * k

    text = page(changed(grow)).text
    assert f"{k} checkpoints of one training run" in text
    assert f"{k}, 512 to {512 * k:,} images seen" in text


def test_costs_that_are_not_finite_are_left_out(changed: Callable[..., Path]) -> None:
    found = traces(ResultView.open(changed(), "cpu"))
    assert [(t.kind, t.costs) for t in found] == [("span", (3.0, 1.8)), ("random", (2.9,)), ("ema", (2.4,))]
    assert all(math.isfinite(cost) for trace in found for cost in trace.costs)
    none = page(changed(lambda data: data.update(traces={"span/0": [[1, "nan"], [2, None]]})))
    assert "No candidate of the search had a finite cost" in none.text


def shown(html: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", html)]


def test_grids_are_of_the_rebuilt_weights(made: tuple[Path, dict[str, Any]]) -> None:
    """Pixel for pixel those of the last snapshot's file and of the combined file; the EMA's weights are the naive sum."""
    out, data = made
    snapshots = [load(told["path"]) for told in data["snapshots"]]
    models, problem = ResultView.open(out, "cpu").rebuilt(("last", "ema"))
    assert problem == ""
    for name, tensor in models["ema"].denoiser.state_dict().items():
        parts = [c * s.denoiser.state_dict()[name].double() for c, s in zip(VECTORS["ema"], snapshots, strict=True)]
        torch.testing.assert_close(tensor.double(), sum(parts), atol=1e-6, rtol=1e-6)

    def picture(model: Model) -> bytes:
        return shown(sampled("", model, model.info.sampler(1), [], 4))[0]

    drawn = [snapshots[-1], models["ema"], load(out / "combined.safetensors")]
    assert shown(page(out).html) == [picture(model) for model in drawn]
    assert len(set(map(picture, drawn))) == 3


def test_what_cannot_be_shown_is_said(changed: Callable[..., Path], made: tuple[Path, dict[str, Any]]) -> None:
    gone = page(changed(files=("combined.safetensors",)))
    assert "Only LCSC can be shown, the others cannot be rebuilt: bank.safetensors is gone" in gone.text
    assert gone.tags.count("img") == 1
    bare = changed()
    (bare / "combined.safetensors").unlink()
    assert "There are none to show: combined.safetensors is gone" in page(bare).text


def test_files_of_another_result_are_not_shown(changed: Callable[..., Path]) -> None:
    def other_bank(data: dict[str, Any]) -> None:
        data["snapshots"][0]["sha256"] = "0" * 64

    folder = changed(other_bank, files=("combined.safetensors", "bank.safetensors"))
    assert "bank.safetensors is of other checkpoints" in page(folder).text
    other = page(changed(lambda data: data.update(weights_sha256="0" * 64)))
    assert "combined.safetensors holds other weights than this result" in other.text
    assert "img" not in other.tags


def test_foreign_checkpoints_and_a_function_of_the_users(changed: Callable[..., Path]) -> None:
    """No network, no images seen, no sampler, no reference: a cost is lower the better, whatever its name."""

    def foreign(data: dict[str, Any]) -> None:
        data |= {"sampler": None, "reference": None, "metric": "/tmp/f.py:recall", "extractor": "", "run": ""}
        for i, snapshot in enumerate(data["snapshots"]):
            snapshot |= {"nimg": i, "weights": ""}
        blank = dict(n=0, extractor="", extractor_sha256="", reference="", reference_n=0, reference_sha256="")
        blank |= dict(sampler="", sigmas=(), nfe=0)
        data["records"] = {name: [record("/tmp/f.py:recall", v, 3, **blank)] for name, v in FD.items()}

    folder = changed(foreign)
    write(folder / "combined.safetensors", {"w": torch.zeros(2)}, {"coefficients": LCSC})
    made_page = page(folder)
    for part in (
        "LCSC of 5 checkpoints",
        "recall, lower is better",
        "seeds that the search never saw",
        "fewstep knows no network for these weights",
        "of checkpoint 4",
    ):
        assert part in made_page.text, part
    (table,) = re.findall(r"<table>.*?</table>", made_page.html)
    assert "LCSC" in rows(table)[0]
    assert "uniform" in rows(table)[-1]
    assert "images seen</text>" not in made_page.html
    assert "fewstep sample" not in made_page.text


def test_candidates_and_metrics_may_be_absent(changed: Callable[..., Path]) -> None:
    def fewer(data: dict[str, Any]) -> None:
        for part in ("candidates", "records", "gains"):
            del data[part]["random"], data[part]["power"]
        data["traces"] = {"span/0": [[1, 1.8]]}
        data["records"] = {name: found[:1] for name, found in data["records"].items()}

    made_page = page(changed(fewer))
    assert "random" not in made_page.text
    assert "Second opinions" not in made_page.text
    none = page(changed(lambda data: data.update(records={}, gains={})))
    assert "Nothing was measured held out" in none.text


def test_search_seeds_are_compared_where_there_are_several(changed: Callable[..., Path]) -> None:
    assert "One: how much the outcome depends on it was not measured" in page(changed()).text

    def three(data: dict[str, Any]) -> None:
        one = data["searches"]["span/0"]
        data["searches"] = {f"span/{s}": one | {"seed": s, "records": [record("fd", 2 + s, 3)]} for s in range(3)}
        data["traces"] |= {"span/1": [[1, 4.0], [3, 1.9]], "span/2": [[3, 1.85]]}
        data["seed_spread"] = {"distance": [[0, 0.31, 0.32]] * 3, "cosine": [[1, 0.91, 0.92]] * 3}

    text = page(changed(three)).text
    for part in ("span, 3 seeds 1.8 to 1.9", "other search seeds", "0.31", "0.92", "3.1 ± 0.1"):
        assert part in text, part
    assert "was not measured" not in text


def test_results_stand_among_the_runs_and_beside_each_other(
    made: tuple[Path, dict[str, Any]], changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    two_steps = changed(lambda data: data["sampler"].update(sigmas=[80.0, 0.8], nfe=2))
    both = Page(build([made[0]], two_steps / "both.html", results=[two_steps / "result.json"]))
    assert re.findall(r"<h2>(.*?)</h2>", both.html) == ["LCSC on digits, 1 step", "LCSC on digits, 2 steps"]
    assert main(["report", str(two_steps / "result.json")]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(two_steps / "report.html")}
    assert "LCSC on digits, 2 steps" in Page(two_steps / "report.html").text


def test_what_is_no_result_is_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed(lambda data: data.update(version=2))
    for path in (folder, folder / "missing.json", folder / "nothing"):
        with pytest.raises(FewstepError, match=r"fewstep combine|fewstep run"):
            build([], tmp_path / "report.html", results=[path])
    assert not (tmp_path / "report.html").exists()
