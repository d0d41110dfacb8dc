"""Inspection: moments and quantiles are numpy's, whatever the cut into batches; tails decide the distance."""

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from fewstep.advice import recommend
from fewstep.cli import main
from fewstep.data import DataSpec, Images, LatentSpace, open_images, to_float
from fewstep.inspection import (
    BEYOND,
    CODES,
    QUANTILES,
    CentralMoments,
    Histogram,
    Statistics,
    codes_of,
    inspect,
    values_of,
)
from fewstep.objectives import Cauchy, DimensionScale, IntervalScale, PseudoHuber
from fewstep.recipes import recipe
from fewstep.report.histograms import bars
from fewstep.train_cli import parse_train
from fewstep.types import FewstepError


def skewed(n: int = 61, seed: int = 0) -> torch.Tensor:
    """Channels of different laws, one of them far from 0, and elements of different means. [n, 3, 4, 5]"""
    g = np.random.default_rng(seed)
    x = np.stack(
        [g.gamma(2.0, 1.5, (n, 4, 5)), 1000 + 0.1 * g.standard_normal((n, 4, 5)), g.standard_t(5, (n, 4, 5))], 1
    )
    return torch.from_numpy((x + g.standard_normal((1, 3, 4, 5))).astype(np.float32))


def same(a: object, b: object) -> bool:
    """Equal numbers all over, to rounding."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == pytest.approx(b, rel=1e-9, abs=1e-9)


def test_moments_are_numpys() -> None:
    x = skewed()
    found = Statistics.of(x.split(7)).to_json()
    for values, row in [*((x[:, c], found["channels"][c]) for c in range(3)), (x, found["all"])]:
        flat = values.double().numpy().ravel()
        names = ("mean", "std", "skewness", "excess_kurtosis", "min", "max")
        expected = [flat.mean(), flat.std(), stats.skew(flat), stats.kurtosis(flat), flat.min(), flat.max()]
        assert [row[name] for name in names] == pytest.approx(expected, rel=1e-9)
        for k in BEYOND:
            beyond = float((np.abs(flat - flat.mean()) > k * flat.std()).mean())
            assert row["beyond_std"][str(k)] == pytest.approx(beyond, abs=1e-3)
    std = x.double().numpy().std(0)
    assert list(found["elements"].values()) == pytest.approx(
        [std.min(), float(torch.tensor(std).median()), std.max()], rel=1e-9
    )


def test_quantiles_are_numpys_of_the_rounded_values() -> None:
    x = skewed(301)
    rounded = x[:, 2].half().double().numpy().ravel()
    found = Statistics.of(x.split(50)).channels[2]
    expected = np.quantile(rounded, QUANTILES, method="inverted_cdf")
    assert list(found["quantiles"].values()) == expected.tolist()
    iqr = np.subtract(*np.quantile(rounded, (0.75, 0.25), method="inverted_cdf"))
    assert found["robust_std"] == pytest.approx(iqr / (2 * stats.norm.ppf(0.75)), rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 13, 61])
def test_the_cut_into_batches_does_not_matter(size: int) -> None:
    x = skewed()
    assert same(Statistics.of(x.split(size)).to_json(), Statistics.of([x]).to_json())


def test_groups_pool_to_the_moments_of_their_union() -> None:
    x = skewed()
    parts = [CentralMoments.of(part) for part in x.split([1, 40, 20])]
    left, right = parts[0].merge(parts[1]).merge(parts[2]), parts[0].merge(parts[1].merge(parts[2]))
    whole = CentralMoments.of(x)
    for a, b, c in zip(left.sums, right.sums, whole.sums, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(b, c, rtol=1e-9, atol=1e-9)


def test_codes_are_the_numbers_of_half_precision_in_their_order() -> None:
    codes = torch.arange(CODES)
    values = values_of(codes)
    finite = values.isfinite()
    assert int(finite.sum()) == CODES - 2 * 1024  # infinities and NaNs
    assert bool((values[finite].diff() >= 0).all())
    assert torch.equal(codes_of(values[finite]), codes[finite])
    assert values_of(codes_of(torch.tensor([1e9, -1e9]))).tolist() == [65504.0, -65504.0]


def normal(n: int = 2000) -> torch.Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def student(nu: float, n: int = 2000) -> torch.Tensor:
    """With variance 1, as a normalised latent has."""
    x = np.random.default_rng(1).standard_t(nu, (n, 4, 8, 8)) * math.sqrt((nu - 2) / nu)
    return torch.from_numpy(x.astype(np.float32))


def test_a_normal_has_no_excess_kurtosis_and_gets_pseudo_huber() -> None:
    found = Statistics.of(normal().split(500))
    assert found.whole["excess_kurtosis"] == pytest.approx(0, abs=5 * math.sqrt(24 / (2000 * 256)))
    assert found.whole["beyond_std"]["4"] == pytest.approx(2 * stats.norm.sf(4), rel=0.6)
    advice = recommend(found)
    assert (advice.sigma_data, advice.distance, advice.method) == (1.0, "pseudo-huber", "ict")


def test_heavy_tails_have_their_kurtosis_and_get_cauchy() -> None:
    found = Statistics.of(student(9).split(500))
    assert found.whole["excess_kurtosis"] == pytest.approx(6 / (9 - 4), rel=0.15)
    share = 2 * stats.t.sf(6 * math.sqrt(9 / 7), 9)
    assert found.whole["beyond_std"]["6"] == pytest.approx(share, rel=0.4)
    advice = recommend(found)
    assert (advice.distance, advice.method) == ("cauchy", "slct")


def test_one_heavy_channel_is_enough_and_both_limits_count() -> None:
    x = normal(500)
    x[:, 3] = student(5, 500)[:, 3]
    advice = recommend(Statistics.of([x]))
    assert advice.distance == "cauchy"
    assert advice.reasons["distance"].startswith("channel 3 ")
    peaked = torch.where(torch.rand(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.1, 1.0, -1.0)
    found = Statistics.of([peaked])  # strokes on black: a kurtosis without outliers
    assert found.whole["excess_kurtosis"] > 3
    assert recommend(found).distance == "pseudo-huber"


@pytest.mark.parametrize("x", [normal(200) * 0.31, student(5, 200) * 0.31], ids=["normal", "student"])
def test_the_options_are_taken_and_say_what_was_recommended(x: torch.Tensor) -> None:
    advice = recommend(Statistics.of([x]))
    for command in advice.commands("--data digits"):
        _, _, method, *args = shlex.split(command)
        _, plan = parse_train(method, ["--data.source", *args[1:]], recipe(method, None))
        if method != "ect":  # inherits it from its --init
            assert plan.sigma_data == advice.sigma_data == pytest.approx(0.31, abs=0.01)
        for term in plan.objective.terms.values():
            assert method == "ect" or getattr(term.weighting, "sigma_data", advice.sigma_data) == advice.sigma_data
        if method == advice.method:
            distance = plan.objective.terms["consistency"].distance
            if advice.distance == "cauchy":
                assert isinstance(distance, Cauchy)
                assert isinstance(distance.c, IntervalScale)
                assert (distance.c.power, distance.c.offset, distance.over) == (1.15, 0.85, "mean")
            else:
                assert distance == PseudoHuber(DimensionScale(0.00054), over="sum")


def test_images_are_read_as_the_network_sees_them() -> None:
    images = open_images(DataSpec("digits", streamed=True))
    seen = inspect(images, batch=100)
    assert list(seen) == ["pixels"]
    x = to_float(images.pixels(range(len(images))))
    assert same(seen["pixels"].to_json(), Statistics.of([x]).to_json())
    some, more = (inspect(images, 50, batch)["pixels"].to_json() for batch in (7, None))
    assert same(some, more)
    assert some["all"]["mean"] != seen["pixels"].whole["mean"]


def latents(n: int = 600) -> Images:
    """Posteriors of two channels: means of std 3 about 2, one in 100 of them 50 times as far; log variance 0."""
    g = np.random.default_rng(5)
    means = 2 + 3 * g.standard_normal((n, 2, 4, 4)) * np.where(g.random((n, 2, 4, 4)) < 0.01, 50, 1)
    stored = torch.from_numpy(np.concatenate([means, np.zeros_like(means)], 1)[:, None].astype(np.float16))
    scale = float(np.sqrt(stored[:, 0, :2].double().var(correction=0) + 1))
    space = LatentSpace("vae", "", 32, (2, 4, 4), (2.0, 2.0), (scale, scale), sigma_data=0.5)
    return Images("faces", (2, 4, 4), [str(i) for i in range(n)], None, (), torch.arange(n), stored.__getitem__, space)


def test_latents_are_shown_raw_and_as_they_are_trained_on() -> None:
    images = latents()
    seen = inspect(images, batch=7)
    assert list(seen) == ["latents", "normalised"]
    raw = images.pixels(range(600))[:, 0, :2]
    assert same(seen["latents"].to_json(), Statistics.of([raw]).to_json())
    assert same(seen["normalised"].to_json(), inspect(images, batch=600)["normalised"].to_json())
    assert seen["normalised"].whole["std"] == pytest.approx(0.5, rel=0.01)
    assert seen["normalised"].channels[0]["std"] != seen["latents"].channels[0]["std"]
    advice = recommend(seen["normalised"], images.space)
    assert (advice.sigma_data, advice.distance) == (0.5, "cauchy")


@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_what_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch, bad: float, word: str) -> None:
    def read(stored: torch.Tensor, nimg: int) -> torch.Tensor:
        x = to_float(stored)
        if nimg <= 1234 < nimg + len(x):
            x[1234 - nimg, 0, 3, 3] = bad
        return x

    monkeypatch.setattr("fewstep.inspection.readings", lambda images: {"latents": read})
    with pytest.raises(FewstepError, match=f"latents of 1234 hold {word} in channel 0"):
        inspect(open_images(DataSpec("digits")))


def test_the_verb_prints_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "picture.png"
    assert main(["inspect", "digits", "--num", "300", "--out", str(out)]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["images"], found["of"], found["shape"]) == (300, 1797, [1, 8, 8])
    std = found["statistics"]["pixels"]["all"]["std"]
    assert found["recommended"]["sigma_data"] == pytest.approx(std, rel=0.02)
    assert all(command in said.err for command in found["recommended"]["commands"])
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert (colours == (0x8F, 0xBF, 0xDC)).all(1).mean() > 0.05  # the bars


def test_bars_count_every_value_and_discrete_values_have_one_each() -> None:
    images = open_images(DataSpec("digits"))
    found = inspect(images)["pixels"]
    edges, counts = bars(Histogram.of(found.counts[0]))
    assert (len(counts), counts.sum()) == (17, 1797 * 64)
    assert (counts > 0).all()
    edges, counts = bars(Histogram.of(Statistics.of([torch.full((3, 1, 2, 2), 7.0)]).counts[0]))
    assert counts.tolist() == [12]
    assert edges[0] < 7 < edges[1]


def constant(images: Images) -> Images:
    return replace(images, fetch=lambda rows: torch.full((len(rows), *images.shape), 255, dtype=torch.uint8))


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "nowhere": (["nowhere"], "does not exist"),
        "not a picture": (["digits", "--out", "page.html"], ".png"),
        "no images": (["digits", "--num", "0"], "--num must be 1 or more"),
    }
    for args, word in cases.values():
        assert main(["inspect", *args]) == 2
        assert word in capsys.readouterr().err
    with pytest.raises(FewstepError, match="all pixels are 1"):
        inspect(constant(open_images(DataSpec("digits"))))
    with pytest.raises(FewstepError, match="no images"):
        Statistics.of([])
