"""The feature extractors by name, and the two that need nothing but this package."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float, Float32, Int64, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.metrics.extractor import Extractor, full_precision, tensors_sha256
from fewstep.metrics.pretrained import dinov2, inception
from fewstep.types import FewstepError


def load_extractor(name: str, device: torch.device | str = "cpu", weights: Path | None = None) -> Extractor:
    """The extractor "digits", "pixels", "inception" or "dinov2"; `weights`: a file (dinov2: a folder) of your own."""
    if name not in EXTRACTORS:
        raise FewstepError(f"unknown extractor {name}: choose from {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](torch.device(device), weights)


class PixelExtractor:
    """The pixels themselves, in [0, 1]: the baseline without weights. `dim` is 0 until the first images fix it."""

    def __init__(self, device: torch.device) -> None:
        self.name, self.sha256, self.dim, self.device = "pixels", tensors_sha256({}), 0, device

    def __call__(self, images: UInt8[Tensor, "n c h w"], /) -> Float32[Tensor, "n d"]:
        features = images.to(self.device).flatten(1) / 255
        self.dim = self.dim or features.shape[1]
        if features.shape[1] != self.dim:
            raise FewstepError(f"images of {features.shape[1]} pixels after images of {self.dim}: measure one size")
        return features


class DigitsNet(nn.Module):
    """Images [n, 1, 8, 8] in 0..255 -> features [n, 64]; head: features -> 10 logits. Smooth, so no feature is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.SiLU()),
            *(nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(48, 48, 3, padding=1), nn.SiLU()),
            *(nn.AvgPool2d(2), nn.Flatten()),
        )
        self.features = nn.Linear(192, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: UInt8[Tensor, "n 1 8 8"] | Float[Tensor, "n 1 8 8"]) -> Float[Tensor, "n 64"]:
        return self.features(self.trunk(images.float() / 127.5 - 1))


class DigitsExtractor:
    """64 features of 8 x 8 grey digits, and the class by `classify`; bundled (57 k weights, 230 kB).

    Trained by scripts/train_digits_extractor.py on the 1617 bundled digits outside a fixed tenth, to classify them
    (99.4 % of the 180 held out; the number is in `metadata`), to reconstruct them linearly, and for a covariance near
    the identity, so that a distance sees the handwriting as well as the class. Over the 1617 each feature has mean 0
    and variance 1, so the trace is 64; 25 dimensions are effective, (sum of eigenvalues)^2 / sum of squares.
    """

    def __init__(self, device: torch.device, weights: Path | None = None) -> None:
        path = weights or Path(__file__).with_name("digits.safetensors")
        self.net = DigitsNet()
        try:
            with safe_open(path, framework="pt") as file:
                self.metadata: dict[str, str] = file.metadata() or {}
                self.net.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, RuntimeError) as error:
            raise FewstepError(f"{path} does not hold the weights of the digits extractor [{error}]") from error
        self.net.to(device).eval().requires_grad_(False)
        self.name, self.sha256, self.dim, self.device = "digits", tensors_sha256(self.net.state_dict()), 64, device

    def __call__(self, images: UInt8[Tensor, "n c h w"], /) -> Float32[Tensor, "n d"]:
        if images.shape[1:] != (1, 8, 8):
            size = " x ".join(map(str, images.shape[1:]))
            raise FewstepError(f'the digits extractor takes 1 x 8 x 8 images, not {size}: use "inception" or "dinov2"')
        with full_precision(self.device):
            return self.net(images.to(self.device))

    def classify(self, images: UInt8[Tensor, "n c h w"]) -> Int64[Tensor, " n"]:
        """The digit 0..9 that each image shows."""
        features = self(images)
        with full_precision(self.device):
            return self.net.head(features).argmax(1)


EXTRACTORS: Final[dict[str, Callable[[torch.device, Path | None], Extractor]]] = {
    "digits": DigitsExtractor,
    "pixels": lambda device, _: PixelExtractor(device),
    "inception": inception,
    "dinov2": dinov2,
}
