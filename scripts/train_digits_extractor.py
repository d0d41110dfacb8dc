"""Trains the bundled digits extractor: python scripts/train_digits_extractor.py [OUT.safetensors]   (10 s, one core)

A classifier alone would keep ten points and forget the handwriting; a Frechet distance on its features would miss a
generator without variety. So the 64 features serve three terms:

    cross-entropy of the class + mean squared error of a linear reconstruction of the image
        + 0.5/64 * |covariance of the features - identity|^2         (cf. VICReg, arXiv:2105.04906)

At the end each feature is scaled to mean 0 and variance 1 over the training images (folded into the linear layers):
a Frechet distance of 64 is then a whole total variance.
"""

import sys
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fewstep.metrics
from fewstep.metrics.features import DigitsExtractor, DigitsNet

STEPS, BATCH, PEAK_RATE, WEIGHT_DECAY, PIXEL_NOISE, SEED = 1000, 128, 3e-3, 0.05, 8.0, 0


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Images uint8 [1797, 1, 8, 8], labels [1797], and which are held out [1797]: a fixed tenth, by hash of the row."""
    data = load_digits()
    images = torch.from_numpy(np.round(data.images * 255 / 16).astype(np.uint8))[:, None]
    hashes = [blake2b(str(row).encode(), digest_size=8).digest() for row in range(len(images))]
    held_out = torch.tensor([int.from_bytes(h, "big") / 2**64 < 0.1 for h in hashes])
    return images, torch.from_numpy(data.target).long(), held_out


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [n, 1, 8, 8] moved by -1, 0 or 1 pixels along each axis, zeros moving in."""
    top, left = torch.randint(0, 3, (2, len(images), 1), generator=generator)
    rows, columns = (top + torch.arange(8))[:, :, None], (left + torch.arange(8))[:, None, :]
    return F.pad(images, (1, 1, 1, 1))[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


def train(images: Tensor, labels: Tensor) -> DigitsNet:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    net, reconstruct = DigitsNet(), nn.Linear(64, 64)
    weights = [*net.parameters(), *reconstruct.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=STEPS, pct_start=0.2)
    for _ in range(STEPS):
        rows = torch.randint(0, len(images), (BATCH,), generator=generator)
        x = shifted(images[rows].float(), generator)
        x = x + PIXEL_NOISE * torch.randn(x.shape, generator=generator)
        features = net(x)
        loss = F.cross_entropy(net.head(features), labels[rows], label_smoothing=0.1)
        loss = loss + F.mse_loss(reconstruct(features), x.flatten(1) / 127.5 - 1)
        loss = loss + 0.5 / 64 * (features.T.cov() - torch.eye(64)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def standardise(net: DigitsNet, images: Tensor) -> None:
    """Features of mean 0 and variance 1 over these images; the logits stay what they were."""
    features = net(images)
    std, mean = torch.std_mean(features, 0)
    net.head.bias += net.head.weight @ mean
    net.head.weight *= std
    net.features.bias.copy_((net.features.bias - mean) / std)
    net.features.weight /= std[:, None]


def main() -> None:
    default = Path(fewstep.metrics.__file__).with_name("digits.safetensors")
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    images, labels, held_out = digits()
    net = train(images[~held_out], labels[~held_out])
    standardise(net, images[~held_out])
    with torch.no_grad():
        features = net(images)
        correct = net.head(features).argmax(1) == labels
    spectrum = torch.linalg.eigvalsh(features[~held_out].double().T.cov())
    metadata = {
        "accuracy": f"{correct[held_out].double().mean():.4f}",
        "accuracy_train": f"{correct[~held_out].double().mean():.4f}",
        "held_out": str(int(held_out.sum())),
        "effective_dim": f"{spectrum.sum() ** 2 / spectrum.square().sum():.1f}",
        "data": "sklearn.datasets.load_digits, uint8 = round(255/16 v), held out where blake2b(row) < 0.1",
    }
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path, metadata)
    print(f"{path}: {path.stat().st_size} bytes, sha256 {DigitsExtractor(torch.device('cpu'), path).sha256}")
    print(f"covariance eigenvalues {spectrum[0]:.3g} .. {spectrum[-1]:.3g}", metadata)


if __name__ == "__main__":
    main()
