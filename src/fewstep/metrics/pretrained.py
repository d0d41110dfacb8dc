"""Extractors whose package and weights come from elsewhere; both are asked for only when one is loaded."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from jaxtyping import Float32, UInt8
from torch import Tensor

from fewstep.metrics.extractor import full_precision, tensors_sha256
from fewstep.types import FewstepError

INCEPTION_FILE: Final = "weights-inception-2015-12-05-6726825d.pth"  # ends in the first digits of its sha256
INCEPTION_URL: Final = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
DINOV2_REPO: Final = "facebook/dinov2-large"


@dataclass
class PretrainedExtractor:
    """A network somebody else trained, from RGB images uint8 [n, 3, h, w] to features; grey images are tripled."""

    name: str
    sha256: str
    dim: int
    device: torch.device
    network: Callable[[Tensor], Tensor]

    def __call__(self, images: UInt8[Tensor, "n c h w"], /) -> Float32[Tensor, "n d"]:
        if images.shape[1] not in (1, 3):
            raise FewstepError(f"the {self.name} extractor takes grey or RGB images, not {images.shape[1]} channels")
        with full_precision(self.device):
            return self.network(images.to(self.device).expand(-1, 3, -1, -1)).float()


def inception(device: torch.device, weights: Path | None = None) -> PretrainedExtractor:
    """InceptionV3 of 2015 as FID is defined on it (arXiv:1706.08500): 2048 features, through torch-fidelity."""
    note = " (it brings torchvision, which may replace your torch)"
    network = _needed("torch_fidelity.feature_extractor_inceptionv3", "FeatureExtractorInceptionV3", "inception", note)
    path = weights or Path(torch.hub.get_dir(), "checkpoints", INCEPTION_FILE)
    try:
        if weights is None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix="6726825d", progress=False)
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity may unpickle: refuse code before it
        net = network("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).to(device).eval()
    except Exception as error:
        raise FewstepError(
            f"no inception weights at {path}: put {INCEPTION_URL} there or give weights= [{_line(error)}]"
        ) from error
    return PretrainedExtractor("inception", tensors_sha256(net.state_dict()), 2048, device, lambda x: net(x)[0])


def dinov2(device: torch.device, weights: Path | None = None) -> PretrainedExtractor:
    """The class token of DINOv2 ViT-L/14 (arXiv:2306.04675 recommends it): 1024 features, through transformers."""
    source = str(weights or DINOV2_REPO)
    model = _needed("transformers", "Dinov2Model", "dinov2")
    try:
        net = model.from_pretrained(source, use_safetensors=True).to(device).eval()
    except Exception as error:
        files = f"config.json and model.safetensors of huggingface.co/{DINOV2_REPO}"
        raise FewstepError(
            f"no DINOv2 weights at {source}: put {files} in a folder and give it as weights= [{_line(error)}]"
        ) from error
    mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1)  # of ImageNet
    std = torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1)

    def network(images: Tensor) -> Tensor:
        """Resized to 224 x 224, still in 8 bits, standardised."""
        resized = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True).clamp(0, 255).round()
        return net(pixel_values=(resized / 255 - mean) / std).pooler_output

    return PretrainedExtractor("dinov2", tensors_sha256(net.state_dict()), net.config.hidden_size, device, network)


def _needed(module: str, name: str, extra: str, note: str = "") -> Any:
    """A class of an optional package. (A torchvision made for another torch raises RuntimeError, in both packages.)"""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError) as error:
        raise FewstepError(f"the {extra} extractor: pip install 'fewstep[{extra}]'{note} [{_line(error)}]") from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
