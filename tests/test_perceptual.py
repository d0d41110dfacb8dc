"""LPIPS with random weights: its formula, its laws and its refusals (the real weights are not ours to ship)."""

import pytest
import torch

from fewstep import codec
from fewstep.objectives.perceptual import BACKBONE, HEADS, LPIPS, SCALE, SHIFT, VGG, vgg
from fewstep.types import FewstepError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("lpips")
    torch.manual_seed(0)
    network = VGG()
    torch.save({f"features.{k}": t for k, t in network.features.state_dict().items()} | {"classifier.0.bias": torch.ones(3)},
               where / BACKBONE)  # fmt: skip
    torch.save({f"lin{k}.model.1.weight": torch.rand_like(h) for k, h in enumerate(network.heads)}, where / HEADS)
    return where


def images(n=3, channels=3, seed=0):
    return torch.rand(n, channels, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_zero_for_equal_images_positive_and_symmetric_for_others(folder):
    d = LPIPS(str(folder), size=32)
    a, b = images(), images(seed=1)
    assert d(a, a).tolist() == [0, 0, 0]
    assert (d(a, b) > 0).all()
    torch.testing.assert_close(d(a, b), d(b, a))
    torch.testing.assert_close(d(a, b)[1:2], d(a[1:2], b[1:2]))


def test_it_is_the_papers_formula(folder):
    d, network = LPIPS(str(folder), size=16), vgg(str(folder), "cpu")
    a, b = images(2), images(2, seed=1)

    def activations(x):
        x, found = (x - torch.tensor(SHIFT)[:, None, None]) / torch.tensor(SCALE)[:, None, None], []
        for layer in network.features:
            if isinstance(layer, torch.nn.MaxPool2d):
                found.append(x)
            x = layer(x)
        return [*found, x]

    expected = 0
    for p, q, w in zip(activations(a), activations(b), network.heads, strict=True):
        unit = [f / f.square().sum(1, keepdim=True).sqrt() for f in (p, q)]
        expected = expected + ((unit[0] - unit[1]) ** 2 * w).sum(1).mean((1, 2))
    torch.testing.assert_close(d(a, b), expected, rtol=1e-4, atol=1e-7)


def test_its_gradient_reaches_the_image_and_not_the_network(folder):
    a = images().requires_grad_()
    LPIPS(str(folder), size=32)(a, images(seed=1)).sum().backward()
    assert a.grad.abs().sum() > 0
    assert all(p.grad is None for p in vgg(str(folder), "cpu").parameters())


def test_grey_images_are_three_equal_channels(folder):
    d = LPIPS(str(folder), size=32)
    a, b = images(channels=1), images(channels=1, seed=1)
    torch.testing.assert_close(d(a, b), d(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_missing_foreign_and_broken_weights_are_refused(folder, tmp_path):
    with pytest.raises(FewstepError, match=BACKBONE):
        LPIPS(str(tmp_path))(images(), images())
    (tmp_path / BACKBONE).write_bytes(b"not a file of PyTorch")
    with pytest.raises(FewstepError, match="download it again"):
        LPIPS(str(tmp_path))(images(), images())
    torch.save({"features.0.weight": torch.ones(1)}, tmp_path / BACKBONE)
    torch.save({"lin0.model.1.weight": torch.ones(1)}, tmp_path / HEADS)
    with pytest.raises(FewstepError, match="does not hold LPIPS"):
        LPIPS(str(tmp_path))(images(), images())
    with pytest.raises(FewstepError, match="channels"):
        LPIPS(str(folder))(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8))


def test_it_can_be_stored_in_a_recipe():
    assert codec.decode(codec.encode(LPIPS("here", 64))) == LPIPS("here", 64)
