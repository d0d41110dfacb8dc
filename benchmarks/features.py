"""A feature extractor for CIFAR-10's Frechet distance without a download: a small classifier, minutes on one core.

    python benchmarks/features.py --data ../shared/data/cifar10

Inception's weights are not in this package and its FID means little at 16x16, so the benchmarks measure with this one; its
distances compare with each other only. As for the bundled digits extractor (scripts/train_digits_extractor.py) the 64
features, linear in the last hidden layer, serve three terms,

    cross-entropy of the class + mean squared error of a linear reconstruction of the image at 8x8
        + 0.5/64 * |covariance of the features - identity|^2

so that a distance sees more than the class, and are scaled to mean 0 and variance 1 over the training images: a distance
of 64 is a whole total variance. In training half of the batches are shrunk to 16x16 and enlarged again, for 16x16 images
are measured too (any other size is resized to 32x32). Written to ~/.cache/fewstep/benchmarks: cifar10-features.safetensors
and .json (accuracy on the held-out tenth, and how the distance orders known corruptions). Use:

    from features import load_cifar_extractor, cached_reference
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Float32, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.console import ProgressLine
from fewstep.data import BatchOrder, DataSpec, Images, batches, open_images
from fewstep.environment import environment
from fewstep.evaluation import reference_to
from fewstep.files import atomic_write, write_json
from fewstep.metrics import Extractor, Moments, Reference
from fewstep.metrics.extractor import full_precision, tensors_sha256
from fewstep.types import FewstepError
from tasks import CACHE

WEIGHTS = CACHE / "cifar10-features.safetensors"
DIM = 64


class CifarNet(nn.Module):
    """Images [n, 3, 32, 32] in 0..255 -> features [n, 64]; head: features -> 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 24, 48, 48, 96, 96, 96), (1, 2, 1, 2, 1, 2)
        layers: list[nn.Module] = []
        for i, stride in enumerate(strides):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1, bias=False), nn.BatchNorm2d(widths[i + 1])]
            layers += [nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        self.features = nn.Linear(96 * 4 * 4, DIM)
        self.head = nn.Linear(DIM, 10)

    def forward(self, images: UInt8[Tensor, "n 3 32 32"] | Float[Tensor, "n 3 32 32"]) -> Float[Tensor, "n 64"]:
        x = (images.float() / 127.5 - 1).to(memory_format=torch.channels_last)
        return self.features(self.trunk(x))


class CifarExtractor:
    """The trained network as fewstep.metrics.Extractor; `classify` gives the class."""

    def __init__(self, path: Path = WEIGHTS) -> None:
        if not path.exists():
            raise FewstepError(f"{path} is missing: run python benchmarks/features.py first")
        self.net = CifarNet()
        with safe_open(path, framework="pt") as file:
            self.net.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        self.net.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.name, self.dim, self.device = "cifar10-cnn", DIM, torch.device("cpu")
        self.sha256 = tensors_sha256(self.net.state_dict())

    def __call__(self, images: UInt8[Tensor, "n c h w"], /) -> Float32[Tensor, "n d"]:
        with full_precision(self.device):
            return torch.cat([self.net(resized(part)) for part in images.split(500)])

    def classify(self, images: UInt8[Tensor, "n c h w"]) -> Tensor:
        """The class 0..9 of each image [n]."""
        features = self(images)
        with full_precision(self.device):
            return self.net.head(features).argmax(1)


def load_cifar_extractor(path: Path = WEIGHTS) -> Extractor:
    """The extractor; FewstepError when it was not trained yet."""
    return CifarExtractor(path)


def resized(images: Tensor, size: int = 32) -> Tensor:
    """Images [n, 3, h, w] in 0..255 as float [n, 3, size, size]."""
    x = images.float()
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bilinear", antialias=True)


def cached_reference(images: Images, extractor: Extractor, name: str) -> Reference:
    """The reference of these images, its features kept in the cache: every benchmark process needs the same one."""
    key = f"{name}-{len(images)}-{images.fingerprint[:8]}-{extractor.sha256[:8]}".replace("[", "-").replace("]", "")
    file = CACHE / "references" / f"{key}.safetensors"
    if not file.exists():
        made = reference_to(images, extractor, name)
        atomic_write(file, lambda path: save_file({"features": made.features}, path, {"sha256": made.sha256}))
    with safe_open(file, framework="pt") as stored:
        features, sha256 = stored.get_tensor("features"), stored.metadata()["sha256"]
    return Reference(features, Moments.of(features), name, sha256, extractor.name, extractor.sha256)


@dataclass(frozen=True)
class Arguments:
    data: str = "../shared/data/cifar10"
    """CIFAR-10 at 32x32: a folder of parquet files, images, ..."""
    out: Path = WEIGHTS
    total_nimg: int = 250_000
    """images seen in training"""
    batch_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 0
    overwrite: bool = False


def train(images: Images, arguments: Arguments) -> CifarNet:
    """AdamW, one cycle, flips and shifts of up to 3 pixels, half of the batches at 16x16; bf16 autocast."""
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    net, reconstruct = CifarNet().to(memory_format=torch.channels_last), nn.Linear(DIM, 3 * 8 * 8)
    optimizer = torch.optim.AdamW([*net.parameters(), *reconstruct.parameters()], weight_decay=arguments.weight_decay)
    steps = -(-arguments.total_nimg // arguments.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, arguments.lr, total_steps=steps, pct_start=0.2)
    feed = batches(images, BatchOrder(len(images), arguments.seed), 0, arguments.batch_size)
    with ProgressLine("features", steps * arguments.batch_size) as line:
        for step in range(steps):
            pixels, labels = next(feed)
            x = augmented(pixels.float(), generator)
            x = resized(resized(x, 16)) if step % 2 else x
            with torch.autocast("cpu", torch.bfloat16):
                features = net(x)
                logits, thumbnail = net.head(features).float(), reconstruct(features).float()
            f = features.float()
            entropy = F.cross_entropy(logits, labels, label_smoothing=0.1)
            loss = entropy + F.mse_loss(thumbnail, resized(x, 8).flatten(1) / 127.5 - 1)
            loss = loss + 0.5 / DIM * (f.T.cov() - torch.eye(DIM)).square().sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            line.note(f"{float(entropy):.3f}")
            line.advance(len(x))
    feed.close()
    return net.eval()


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [n, 3, 32, 32] mirrored at random and shifted by up to 3 pixels, edges repeated."""
    n, width = len(x), x.shape[-1]
    x = torch.where((torch.rand(n, generator=generator) < 0.5)[:, None, None, None], x.flip(-1), x)
    top, left = torch.randint(0, 7, (2, n, 1), generator=generator)
    rows, columns = (top + torch.arange(width))[:, None, :, None], (left + torch.arange(width))[:, None, None, :]
    picked = torch.arange(n)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns
    return F.pad(x, (3, 3, 3, 3), mode="replicate")[picked]


@torch.no_grad()
def standardise(net: CifarNet, features: Tensor) -> None:
    """Make the features of mean 0 and variance 1 where they were these [n, 64]; the logits stay what they were."""
    std, mean = torch.std_mean(features, 0)
    net.head.bias += net.head.weight @ mean
    net.head.weight *= std
    net.features.bias.copy_((net.features.bias - mean) / std)
    net.features.weight /= std[:, None]


def sanity(extractor: Extractor, shown: Images, held: Images, num: int = 4000) -> dict[str, float]:
    """The Frechet distance of known corruptions of `num` held-out images to as many training images, in rising dose."""
    reference = reference_to(shown.split("heldout", 0.2), extractor, "train")
    real = held.pixels(range(num)).float()
    generator = torch.Generator().manual_seed(0)
    cases = {"held out": real, "8x8": resized(resized(real, 8)), "16x16": resized(resized(real, 16))}
    cases |= {f"noise {s}": real + s * torch.randn(real.shape, generator=generator) for s in (4, 8, 16, 32, 64)}
    cases |= {"one class": real[held.labels[:num] == 0] if held.labels is not None else real}
    cases |= {
        "grey": real.mean(1, keepdim=True).expand_as(real),
        "constant": real.mean((2, 3), keepdim=True) + 0 * real,
    }
    found = {}
    for name, images in cases.items():
        features = extractor(images.round().clamp(0, 255).to(torch.uint8))
        found[name] = reference.frechet.distance(Moments.of(features))
    return found


def main(arguments: Arguments) -> None:
    """Train, measure, save."""
    how = arguments.out.with_suffix(".json")
    if how.exists() and not arguments.overwrite:
        print(how.read_text())
        return
    torch.set_num_threads(1)
    images = open_images(DataSpec(arguments.data))
    shown, held = images.split("train", 0.1), images.split("heldout", 0.1)
    began, cpu = time.monotonic(), time.process_time()
    net = train(shown, arguments)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    with torch.no_grad():
        pixels = shown.pixels(range(10_000))
        features = torch.cat([net(part) for part in pixels.split(500)])
    standardise(net, features)
    spectrum = torch.linalg.eigvalsh((features / features.std(0)).double().T.cov())
    tensors = {key: value.contiguous() for key, value in net.state_dict().items()}
    atomic_write(arguments.out, lambda path: save_file(tensors, path))
    extractor, labels = CifarExtractor(arguments.out), held.labels
    assert labels is not None
    truth, full = labels, held.pixels(range(len(held)))
    small = resized(full, 16).round().to(torch.uint8)
    result: dict[str, Any] = {
        "what": "features of a small CIFAR-10 classifier, for Frechet distances of the benchmarks",
        "command": "python benchmarks/features.py",
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(arguments).items()},
        "sha256": extractor.sha256, "parameters": sum(p.numel() for p in net.parameters()), "dim": DIM,
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "heldout_n": len(held),
        "accuracy_heldout": {
            "32x32": float((extractor.classify(full) == truth).double().mean()),
            "16x16": float((extractor.classify(small) == truth).double().mean()),
        },
        "effective_dim": float(spectrum.sum() ** 2 / spectrum.square().sum()),
        "distance_to_training_images": sanity(extractor, shown, held),
        "environment": environment(),
    }  # fmt: skip
    write_json(how, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
