"""Metrics: closed forms and invariances first, then the extractors and the records."""

import json
import math
import sys
import types
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.metrics import (
    Extractor,
    FrechetReference,
    Moments,
    Record,
    Reference,
    better,
    frechet_distance,
    kernel_distance,
    load_extractor,
    measure,
    prdc,
    precision_recall,
    rank,
)
from fewstep.metrics.extractor import tensors_sha256
from fewstep.metrics.kernel import KernelReference, kernel_slope
from fewstep.types import FewstepError


def draw(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(mean: Tensor, cov: Tensor, n: int = 100) -> Moments:
    """The moments of a sample whose mean and covariance are exactly these."""
    return Moments(n, mean.double(), cov.double() * (n - 1))


def close(a: Moments, b: Moments, tolerance: float = 1e-10) -> bool:
    same = torch.allclose(a.mean, b.mean, rtol=tolerance, atol=tolerance)
    return a.n == b.n and same and torch.allclose(a.cov, b.cov, rtol=tolerance, atol=tolerance)


# --- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_do_not_depend_on_cuts_or_merges(offset: float) -> None:
    x = (draw(203, 7) + offset).float()
    whole = Moments.empty(7).add(x)
    for cuts in ([1] * 203, [200, 3], [2, 0, 100, 101]):
        parts = x.split(cuts)
        streamed = merged = Moments.empty(7)
        for part in parts:
            streamed = streamed.add(part)
        for part in reversed(parts):
            merged = Moments.of(part) + merged
        assert close(whole, streamed)
        assert close(whole, merged)
    assert torch.allclose(whole.cov, x.double().T.cov(), rtol=1e-10, atol=1e-10)


def test_moments_know_their_limits() -> None:
    with pytest.raises(FewstepError, match="at least 2"):
        _ = Moments.of(draw(1, 3)).cov
    with pytest.raises(FewstepError, match="one extractor"):
        Moments.empty(3).merge(Moments.empty(4))
    assert not Moments.of(torch.tensor([[math.inf], [0.0]])).finite


# --- Frechet distance ------------------------------------------------------------------------------------------------


def test_frechet_closed_form_for_commuting_covariances() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2 where the covariances share their axes."""
    turn = torch.linalg.qr(draw(6, 6)).Q
    s1, s2 = draw(6, 1, 1)[:, 0].abs(), draw(6, 1, 2)[:, 0].abs()
    m1, m2 = draw(2, 6, 3)
    a, b = gaussian(m1, turn * s1**2 @ turn.T), gaussian(m2, turn * s2**2 @ turn.T)
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_is_symmetric_and_zero_on_itself() -> None:
    a, b = Moments.of(draw(50, 5)), Moments.of(draw(60, 5, 1) @ draw(5, 5, 2))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert 0 <= frechet_distance(b, b) < 1e-9
    reference = FrechetReference(a)
    assert [reference.distance(b), reference.distance(a)] == [frechet_distance(a, b), frechet_distance(a, a)]


@pytest.mark.parametrize("n", [200, 12])  # 12 < 20 dimensions: both covariances are singular
def test_frechet_equals_the_matrix_square_root(n: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    x, y = draw(n, 20), draw(n + 1, 20, 1) * 1.3 + 0.2
    a, b = Moments.of(x), Moments.of(y)
    if n > 20:
        cross = linalg.sqrtm(a.cov.numpy() @ b.cov.numpy()).trace().real
    else:  # sqrtm is inaccurate on singular matrices; tr (C1 C2)^(1/2) is the nuclear norm of the data's product
        cross = np.linalg.svd((x - a.mean).numpy() @ (y - b.mean).numpy().T, compute_uv=False).sum()
        cross /= math.sqrt((a.n - 1) * (b.n - 1))
    expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_equals_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = Moments.of(draw(90, 8)), Moments.of(draw(80, 8, 1) @ draw(8, 8, 2) + 1)
    theirs = float(fid._compute_fid(a.mean, a.cov, b.mean, b.cov))
    assert frechet_distance(a, b) == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e200])
def test_frechet_is_infinite_where_anything_is_not_finite(bad: float) -> None:
    x = draw(10, 3)
    x[4, 1] = bad
    assert frechet_distance(Moments.of(x), Moments.of(draw(10, 3))) == math.inf
    assert frechet_distance(Moments.of(draw(10, 3)), Moments.of(x)) == math.inf


def test_frechet_refuses_what_it_cannot_compare() -> None:
    with pytest.raises(FewstepError, match="one extractor"):
        frechet_distance(Moments.of(draw(9, 3)), Moments.of(draw(9, 4)))
    for few, many in ((1, 9), (9, 1), (0, 9)):
        with pytest.raises(FewstepError, match="at least 2"):
            frechet_distance(Moments.of(draw(few, 3)), Moments.of(draw(many, 3)))


# --- kernel distance -------------------------------------------------------------------------------------------------


def test_kernel_distance_equals_the_double_loop() -> None:
    x, y = draw(5, 3), draw(4, 3, 1) + 0.5

    def mean(a: Tensor, b: Tensor, same: bool) -> float:
        pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (same and i == j)]
        return sum(float((p @ q / 3 + 1) ** 3) for p, q in pairs) / len(pairs)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)
    assert kernel_distance(y, x) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_does_not_depend_on_blocks() -> None:
    x, y = draw(101, 16), draw(77, 16, 1)
    assert kernel_distance(x, y, block=10) == pytest.approx(kernel_distance(x, y), rel=1e-10)


def test_kernel_distance_is_unbiased() -> None:
    """For one distribution its mean over many draws is 0 within three standard errors, even at ten samples."""
    values = torch.tensor([kernel_distance(draw(10, 4, 2 * s), draw(14, 4, 2 * s + 1)) for s in range(400)])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert values.min() < 0
    assert kernel_distance(draw(100, 4), draw(100, 4, 1) + 1) > 10 * values.std()


@pytest.mark.parametrize("n", [12, 3])
def test_slopes_are_the_derivatives_of_the_distances(n: int) -> None:
    """Against central differences of every feature; fewer features than dimensions leave the covariance singular."""
    real, fake = draw(60, 4, 1) + 0.3, draw(n, 4, 2) * 1.4
    reference, step = FrechetReference(Moments.of(real)), 1e-4
    for slope, distance in (
        (reference.slope, lambda y: reference.distance(Moments.of(y))),
        (lambda y: kernel_slope(real, y), lambda y: kernel_distance(real, y)),
    ):
        value, gradient = slope(fake)
        assert value == pytest.approx(distance(fake), rel=1e-9)
        for i in range(n):
            for j in range(4):
                moved = torch.zeros_like(fake)
                moved[i, j] = step
                difference = (distance(fake + moved) - distance(fake - moved)) / (2 * step)
                assert float(gradient[i, j]) == pytest.approx(
                    difference, rel=1e-3, abs=1e-3 * float(gradient.abs().max())
                )


def test_kernel_distance_limits() -> None:
    assert kernel_distance(torch.tensor([[1.0], [math.nan]]), torch.ones(2, 1)) == math.inf
    with pytest.raises(FewstepError, match="at least 2"):
        kernel_distance(draw(1, 2), draw(5, 2))


def test_the_reference_is_compared_with_itself_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every further distance, slope and prdc costs what has to do with the new features; all values stay the same."""
    real, fakes = draw(90, 4).float(), [draw(60, 4, s).float() * 1.2 for s in (1, 2, 3)]
    alone = [(kernel_distance(real, fake), prdc(real, fake), kernel_slope(real, fake)) for fake in fakes]
    reference, pairs = Reference(real, Moments.of(real), "normal", ""), []
    total, radii = KernelReference._total, precision_recall._radii

    def counted(self: KernelReference, a: Tensor, b: Tensor) -> float:
        pairs.append((len(a), len(b)))
        return total(self, a, b)

    def counted_radii(x: Tensor, k: int, block: int) -> Tensor:
        pairs.append(len(x))
        return radii(x, k, block)

    monkeypatch.setattr(KernelReference, "_total", counted)
    monkeypatch.setattr(precision_recall, "_radii", counted_radii)
    for k, (fake, (kid, four, slope)) in enumerate(zip(fakes, alone, strict=True)):
        pairs.clear()
        assert measure(reference, fake, ["kid", "prdc"]) == {"kid": kid, **four}
        assert pairs == [(90, 90)] * (k == 0) + [(60, 60), (90, 60)] + [90] * (k == 0) + [60]
        pairs.clear()
        value, gradient = reference.kernel.slope(fake)
        assert (value, gradient.tolist()) == (slope[0], slope[1].tolist())
        assert pairs == [(60, 60), (90, 60)]


# --- precision, recall, density, coverage ----------------------------------------------------------------------------


def naive_prdc(real: np.ndarray, fake: np.ndarray, k_pr: int, k_dc: int) -> dict[str, float]:
    """The papers' definitions, point by point."""

    def gap(a: np.ndarray, b: np.ndarray) -> float:
        return math.sqrt(((a - b) ** 2).sum())

    def radius(points: np.ndarray, i: int, k: int) -> float:
        return sorted(gap(points[i], q) for j, q in enumerate(points) if j != i)[k - 1]

    r_pr = [radius(real, i, k_pr) for i in range(len(real))]
    r_dc = [radius(real, i, k_dc) for i in range(len(real))]
    f_pr = [radius(fake, j, k_pr) for j in range(len(fake))]
    held = [[gap(x, y) <= r for x, r in zip(real, r_dc, strict=True)] for y in fake]
    return {
        "precision": np.mean([any(gap(x, y) <= r for x, r in zip(real, r_pr, strict=True)) for y in fake]),
        "recall": np.mean([any(gap(x, y) <= r for y, r in zip(fake, f_pr, strict=True)) for x in real]),
        "density": np.sum(held) / (k_dc * len(fake)),
        "coverage": np.mean(np.any(held, 0)),
    }


@pytest.mark.parametrize(("k_pr", "k_dc"), [(3, 5), (4, 2)])
def test_prdc_equals_the_naive_loops(k_pr: int, k_dc: int) -> None:
    real, fake = draw(40, 3), draw(31, 3, 1) * 0.8 + 0.6
    expected = naive_prdc(real.numpy(), fake.numpy(), k_pr, k_dc)
    assert 0.1 < expected["recall"] < 1
    for block in (512, 7):
        assert prdc(real, fake, k_pr, k_dc, block=block) == pytest.approx(expected, abs=1e-12)


def test_prdc_of_identical_and_of_distant_sets() -> None:
    x = draw(60, 4).float()
    same = prdc(x, x[torch.randperm(60, generator=torch.Generator().manual_seed(0))], block=13)
    assert (same["precision"], same["recall"], same["coverage"]) == (1.0, 1.0, 1.0)
    assert same["density"] == pytest.approx((5 + 1) / 5)  # each real's ball holds its five neighbours and its copy
    assert set(prdc(x, x + 100).values()) == {0.0}


def test_prdc_tells_fidelity_from_diversity() -> None:
    real = draw(300, 2)
    narrow, wide = prdc(real, draw(300, 2, 1) * 0.1), prdc(real, draw(300, 2, 1) * 5)
    assert narrow["precision"] == 1.0
    assert narrow["recall"] < 0.2
    assert wide["precision"] < 0.5
    assert wide["recall"] > 0.8


def test_prdc_limits() -> None:
    with pytest.raises(FewstepError, match="more than 5"):
        prdc(draw(5, 2), draw(50, 2))
    assert all(math.isnan(v) for v in prdc(draw(9, 2), draw(9, 2) * math.inf).values())


# --- extractors ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """All the bundled digits as uint8 [1797, 1, 8, 8] and their labels."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = np.round(data.images * 255 / 16).astype(np.uint8)[:, None]
    return torch.from_numpy(images), torch.from_numpy(data.target).long()


@pytest.fixture(scope="module")
def held_out(digits: tuple[Tensor, Tensor]) -> Tensor:
    hashes = [blake2b(str(row).encode(), digest_size=8).digest() for row in range(len(digits[0]))]
    return torch.tensor([int.from_bytes(h, "big") / 2**64 < 0.1 for h in hashes])


def test_digits_features_do_not_depend_on_the_batch(digits: tuple[Tensor, Tensor]) -> None:
    images, extractor = digits[0][:100], load_extractor("digits")
    whole = extractor(images)
    assert isinstance(extractor, Extractor)
    assert (whole.shape, whole.dtype, extractor.dim) == ((100, 64), torch.float32, 64)
    assert not whole.requires_grad
    for batch in (1, 7):
        assert torch.allclose(torch.cat([extractor(part) for part in images.split(batch)]), whole, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(extractor(images), whole, atol=1e-5)
    assert extractor.sha256 == load_extractor("digits").sha256


def test_digits_accuracy_is_as_stated(digits: tuple[Tensor, Tensor], held_out: Tensor) -> None:
    images, labels = digits
    extractor = load_extractor("digits")
    right = (extractor.classify(images[held_out]) == labels[held_out]).double().mean()
    stated = float(extractor.metadata["accuracy"])
    assert stated >= 0.97
    assert right >= stated - 0.005
    assert int(held_out.sum()) == int(extractor.metadata["held_out"])
    assert f"{stated:.1%}".replace("%", " %") in type(extractor).__doc__


def test_digits_features_span_their_space(digits: tuple[Tensor, Tensor], held_out: Tensor) -> None:
    """No dead feature, unit variances, no direction without variance, and the distance sees what it should."""
    images, labels = digits
    train, labels, extractor = images[~held_out], labels[~held_out], load_extractor("digits")
    features = Moments.of(extractor(train))
    spectrum = torch.linalg.eigvalsh(features.cov)
    assert torch.allclose(features.cov.diagonal(), torch.ones(64, dtype=torch.float64), atol=1e-3)
    assert spectrum.min() > 0.02
    assert spectrum.sum() ** 2 / spectrum.square().sum() > 20

    reference = FrechetReference(features)
    noise = torch.randn(train.shape, generator=torch.Generator().manual_seed(0))

    def distance(x: Tensor) -> float:
        return reference.distance(Moments.of(extractor(x.clamp(0, 255).round().to(torch.uint8))))

    noisy = [distance(train + level * noise) for level in (0, 8, 16, 32, 64)]
    assert noisy == sorted(noisy)
    means = torch.stack([train[labels == k].float().mean(0) for k in range(10)])[labels]
    averaged = [distance(torch.lerp(train.float(), means, share)) for share in (0.0, 0.1, 0.25, 0.5, 1.0)]
    assert averaged == sorted(averaged)  # every class alive, less and less variety within it
    assert averaged[-1] > 32  # of 64
    assert distance(train[labels != 9].float()) > 1


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 28, 28)])
def test_digits_name_the_extractor_for_other_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(FewstepError, match="inception"):
        load_extractor("digits")(torch.zeros(shape, dtype=torch.uint8))


def test_pixels() -> None:
    extractor = load_extractor("pixels")
    assert isinstance(extractor, Extractor)
    images = torch.randint(0, 256, (3, 2, 4, 5), dtype=torch.uint8)
    assert torch.equal(extractor(images), images.flatten(1) / 255)
    assert extractor.dim == 40
    with pytest.raises(FewstepError, match="one size"):
        extractor(images[:, :1])


def test_errors_of_load_extractor(tmp_path: Path) -> None:
    with pytest.raises(FewstepError, match="digits, pixels, inception, dinov2"):
        load_extractor("vgg")
    for weights in (tmp_path / "absent", Path(__file__)):
        with pytest.raises(FewstepError, match="does not hold the weights"):
            load_extractor("digits", weights=weights)


@pytest.mark.parametrize(("name", "package"), [("inception", "torch_fidelity"), ("dinov2", "transformers")])
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FewstepError, match=rf"pip install 'fewstep\[{name}\]'"):
        load_extractor(name)


class FakeInception(torch.nn.Conv2d):
    """What the inception extractor uses of torch-fidelity's class."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        super().__init__(3, 2048, 1, bias=False)
        self.load_state_dict(torch.load(feature_extractor_weights_path))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        return (super().forward(x.float()).mean((2, 3)),)


def fake_package(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    for part in (name.split(".")[0], name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].__dict__.update(members)


class Explosive:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a weights file ran code",))


def test_inception(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = "torch_fidelity.feature_extractor_inceptionv3"
    fake_package(monkeypatch, module, FeatureExtractorInceptionV3=FakeInception)

    def offline(*args: object, **options: object) -> None:
        raise OSError("name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(FewstepError, match=r"weights-inception-2015-12-05-6726825d\.pth.*weights="):
        load_extractor("inception")
    torch.save({"weight": Explosive()}, tmp_path / "evil.pth")
    with pytest.raises(FewstepError, match=r"no inception weights"):
        load_extractor("inception", weights=tmp_path / "evil.pth")

    weights = {"weight": torch.ones(2048, 3, 1, 1)}
    torch.save(weights, tmp_path / "ones.pth")
    extractor = load_extractor("inception", weights=tmp_path / "ones.pth")
    assert isinstance(extractor, Extractor)
    assert extractor.sha256 == tensors_sha256(weights)
    grey = torch.full((2, 1, 4, 4), 7, dtype=torch.uint8)
    assert torch.equal(extractor(grey), torch.full((2, 2048), 21.0))
    with pytest.raises(FewstepError, match="not 4 channels"):
        extractor(grey.expand(-1, 4, -1, -1))


class FakeDinov2(torch.nn.Linear):
    """What the dinov2 extractor uses of transformers' class: its features are the mean colour."""

    config = types.SimpleNamespace(hidden_size=3)

    @classmethod
    def from_pretrained(cls, source: str, use_safetensors: bool) -> "FakeDinov2":
        if source == "facebook/dinov2-large":
            raise OSError("We couldn't connect to the hub\nand more")
        return cls(3, 3)

    def forward(self, pixel_values: Tensor) -> types.SimpleNamespace:
        assert pixel_values.shape[1:] == (3, 224, 224)
        return types.SimpleNamespace(pooler_output=pixel_values.mean((2, 3)))


def test_dinov2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_package(monkeypatch, "transformers", Dinov2Model=FakeDinov2)
    with pytest.raises(FewstepError, match=r"model\.safetensors.*weights= \[We couldn't connect to the hub\]$"):
        load_extractor("dinov2")
    extractor = load_extractor("dinov2", weights=tmp_path)
    assert isinstance(extractor, Extractor)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    white = torch.full((2, 3, 9, 12), 255, dtype=torch.uint8)
    assert torch.allclose(extractor(white), ((1 - mean) / std).expand(2, 3), atol=1e-4)


def test_tensors_sha256_knows_names_types_shapes_and_bytes() -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.tensor(1)}
    others = [
        {"c": torch.zeros(2, 3), "b": torch.tensor(1)},
        {"a": torch.zeros(3, 2), "b": torch.tensor(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.tensor(1)},
        {"a": torch.zeros(2, 3), "b": torch.tensor(2)},
        {"a": torch.zeros(2, 3)},
    ]
    assert len({tensors_sha256(t) for t in [base, *others]}) == 6
    assert tensors_sha256(base) == tensors_sha256({"b": torch.tensor(1), "a": torch.zeros(3, 2).T})


# --- reference and measure -------------------------------------------------------------------------------------------


def test_reference_does_not_depend_on_batches_or_order(digits: tuple[Tensor, Tensor]) -> None:
    images, extractor = digits[0][:90], load_extractor("digits")
    whole = Reference.of(extractor, [images], "digits[some]")
    cut = Reference.of(extractor, iter(images.flip(0).split(13)), "digits[some]")
    assert whole.sha256 == cut.sha256
    assert whole.n == cut.n == 90
    assert close(whole.moments, cut.moments, 1e-5)
    assert (whole.extractor, whole.extractor_sha256) == ("digits", extractor.sha256)
    assert Reference.of(extractor, [images[:89]], "fewer").sha256 != whole.sha256
    assert Reference.of(load_extractor("pixels"), [images.mT], "turned").sha256 != whole.sha256
    with pytest.raises(FewstepError, match="no images"):
        Reference.of(extractor, [], "nothing")


def test_measure_is_the_metrics_one_by_one() -> None:
    real, fake = draw(40, 3).float(), draw(30, 3, 1).float()
    reference = Reference(real, Moments.of(real), "normal", "")
    values = measure(reference, fake, ["fd", "kid", "prdc"])
    assert values.pop("fd") == frechet_distance(Moments.of(real), Moments.of(fake))
    assert values.pop("kid") == kernel_distance(real, fake)
    assert values == prdc(real, fake)
    assert measure(reference, fake, ()) == {}
    with pytest.raises(FewstepError, match="choose from fd, kid, prdc"):
        measure(reference, fake, ["fd", "is"])
    with pytest.raises(FewstepError, match="one extractor"):
        measure(reference, draw(30, 4), ["fd"])


# --- records ---------------------------------------------------------------------------------------------------------


def record(metric: str = "fd", values: tuple[float, ...] = (6.7, 6.83, 6.96), **changes: object) -> Record:
    fields = {
        "n": 5000,
        "extractor": "digits",
        "extractor_sha256": "e",
        "reference": "digits[train]",
        "reference_n": 1617,
        "reference_sha256": "r",
        "sampler": "FewStep",
        "sigmas": (80.0,),
        "nfe": 1,
        "model": "run/7",
        "model_sha256": "m",
    }
    return Record.of(metric, values, range(len(values)), **{**fields, **changes})


def test_record_states_mean_and_spread() -> None:
    r = record()
    assert (r.value, r.std) == (pytest.approx(np.mean(r.values)), pytest.approx(np.std(r.values, ddof=1)))
    assert str(r) == "fd 6.83 ± 0.13 (n=5000 x 3 seeds, digits, ref digits[train] 1617, 1 NFE)"
    one = record(values=(1234.5,))
    assert one.std == 0.0
    assert str(one).startswith("fd 1234 ± 0 (n=5000 x 1 seed,")
    with pytest.raises(FewstepError, match="one for each"):
        Record.of("fd", (1.0, 2.0), (0,))


@pytest.mark.parametrize("values", [(6.7, 6.9), (2.0,), (math.inf, 1.0), (math.nan,)])
def test_record_survives_strict_json(values: tuple[float, ...]) -> None:
    r = record(values=values)
    text = json.dumps(r.to_json(), allow_nan=False)
    again = Record.from_json(json.loads(text))
    assert repr(again) == repr(r)  # nan != nan
    assert json.dumps(again.to_json()) == text


def test_record_refuses_other_keys() -> None:
    data = record().to_json()
    with pytest.raises(FewstepError, match=r"unknown keys \['colour'\]"):
        Record.from_json({**data, "colour": 1})
    with pytest.raises(FewstepError, match=r"missing keys \['n'\]"):
        Record.from_json({k: v for k, v in data.items() if k != "n"})


@pytest.mark.parametrize(("metric", "best"), [("fd", 1.0), ("kid", 1.0), ("precision", 3.0), ("accuracy", 3.0)])
def test_rank_knows_the_direction_and_puts_the_broken_last(metric: str, best: float) -> None:
    records = [record(metric, (v,)) for v in (math.nan, 2.0, 3.0, math.inf, 1.0)]
    ranked = rank(records)
    assert [r.value for r in ranked[:3]] == sorted((1.0, 2.0, 3.0), reverse=best == 3.0)
    assert not any(math.isfinite(r.value) for r in ranked[3:])
    assert better(ranked[0], ranked[1])
    assert not better(ranked[1], ranked[0])
    assert not better(ranked[0], ranked[0])
    assert better(ranked[2], ranked[3])
    assert rank([]) == []


@pytest.mark.parametrize(
    "change",
    [{"metric": "kid"}, {"n": 2000}, {"extractor_sha256": "x"}, {"reference_sha256": "x"}, {"reference_n": 100}],
)
def test_unlike_stamps_are_never_ranked(change: dict[str, object]) -> None:
    a = record()
    b = replace(a, **change)
    assert a.stamp() != b.stamp()
    for refuse in (lambda: rank([a, a, b]), lambda: better(a, b)):
        with pytest.raises(FewstepError, match=next(iter(change))):
            refuse()


def test_models_samplers_and_seeds_may_differ() -> None:
    a = record()
    b = replace(record(values=(1.0,)), model="other", sampler="Heun", sigmas=(80.0, 0.8), nfe=2, seeds=(9,))
    assert a.stamp() == b.stamp()
    assert rank([a, b]) == [b, a]
