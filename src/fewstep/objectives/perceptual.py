"""LPIPS (Zhang et al. 2018, arXiv:1801.03924) as a distance: CT's and CD's best published figures use it.

The weights are not ours to ship. Put two files into one folder and name it:

    vgg16-397923af.pth    https://download.pytorch.org/models/vgg16-397923af.pth   (torchvision's VGG16, ImageNet)
    vgg.pth               of richzhang/PerceptualSimilarity, lpips/weights/v0.1    (the linear heads)
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.progress import Progress
from fewstep.types import FewstepError, PerSample, Sample

BACKBONE, HEADS = "vgg16-397923af.pth", "vgg.pth"
WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # VGG16's five blocks
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's mean and std for images in [-1, 1]


@dataclass(frozen=True)
class LPIPS:
    """Weighted squared distance of VGG16 features of images in [-1, 1], upsampled to `size` (arXiv:2303.01469, app. C: 224)."""

    weights: str = "lpips"
    """the folder with vgg16-397923af.pth and vgg.pth"""
    size: int = 224
    """side to which smaller images are resized, bilinear"""

    def __call__(self, a: Sample, b: Sample, progress: Progress | None = None, /) -> PerSample:
        if a.ndim != 4 or a.shape[1] not in (1, 3):
            raise FewstepError(
                f"LPIPS compares images of 1 or 3 channels, got {tuple(a.shape)}: choose another distance"
            )
        network = vgg(str(Path(self.weights).expanduser()), str(a.device))
        return network(self.fit(a), self.fit(b))

    def fit(self, x: Tensor) -> Tensor:
        """Three channels, at least `size` pixels a side, float32 [n, 3, h, w]."""
        x = x.float().expand(-1, 3, -1, -1)
        if x.shape[-1] >= self.size:
            return x
        return F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)


class VGG(nn.Module):
    """VGG16's convolutions and LPIPS' five heads, frozen."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps, width = [], 3  # of the last activation of each block
        for k, block in enumerate(WIDTHS):
            layers += [nn.MaxPool2d(2)] if k else []
            for out in block:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
                width = out
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList([torch.zeros(1, block[-1], 1, 1) for block in WIDTHS])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance [n] of images [n, 3, h, w] (eq. 1): the mean over places, summed over the blocks."""
        x, n = torch.cat([a, b]), len(a)
        x = (x - x.new_tensor(SHIFT)[:, None, None]) / x.new_tensor(SCALE)[:, None, None]
        total = x.new_zeros(n)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)
                square = (unit[:n] - unit[n:]).square()
                total = total + (square * self.heads[self.taps.index(i)]).sum(1).mean((1, 2))
        return total


@lru_cache(maxsize=2)
def vgg(folder: str, device: str) -> VGG:
    """The network with its weights; FewstepError when a file is missing or another."""
    network, where = VGG(), Path(folder)
    backbone = {name: t for name, t in read(where / BACKBONE).items() if name.startswith("features.")}
    heads = {f"heads.{name[3]}": t for name, t in read(where / HEADS).items() if name[:3] == "lin"}
    try:
        network.load_state_dict({**backbone, **heads})
    except RuntimeError as error:
        first = " ".join(str(error).split())[:160]
        raise FewstepError(f"{where} does not hold LPIPS' weights ({first}): download both files again") from None
    return network.to(device).eval().requires_grad_(False)


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, nothing in it executed."""
    if not file.is_file():
        raise FewstepError(f"LPIPS needs {file}: see `fewstep.objectives.perceptual` for where to download it")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # anything but a clean state dict
        raise FewstepError(
            f"{file} cannot be read as PyTorch weights ({type(error).__name__}): download it again"
        ) from None
    if not isinstance(found, dict):
        raise FewstepError(f"{file} does not hold PyTorch weights: download it again")
    return found
