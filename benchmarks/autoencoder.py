"""A small KL autoencoder for CIFAR-10, 32x32 -> latents [4, 8, 8], as benchmarks/slct.py needs one: minutes on one core.

    python benchmarks/autoencoder.py --data ../shared/data/cifar10

Stable Diffusion's AutoencoderKL (diffusers) in small, trained as its first stage without the adversarial and perceptual
terms: per image, sum over pixels of |x - decoded| + 1e-6 * sum over latents of KL(posterior | N(0, 1)). One posterior
sample in training; reconstructions are measured from the posterior's mean. Written with save_pretrained to
~/.cache/fewstep/benchmarks/cifar10-vae: config.json, the weights as safetensors, how.json (how it was made, PSNR, the
latents' moments and outliers) and reconstructions.png (above: held-out images, below: their reconstructions).
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from fewstep.console import ProgressLine
from fewstep.data import BatchOrder, DataSpec, Images, batches, open_images, to_float, to_uint8
from fewstep.environment import environment
from fewstep.files import write_json
from fewstep.pictures import grid, save
from tasks import CACHE

VAE = CACHE / "cifar10-vae"
OUTLIERS = (4.0, 6.0, 8.0)  # in robust standard deviations


@dataclass(frozen=True)
class Arguments:
    data: str = "../shared/data/cifar10"
    """CIFAR-10 at 32x32: a folder of parquet files, images, ..."""
    out: Path = VAE
    total_nimg: int = 60_000
    """images seen in training"""
    batch_size: int = 16
    widths: tuple[int, ...] = (16, 32, 64)
    """channels of each level; every further level halves the resolution"""
    layers: int = 1
    """residual blocks per level of the encoder (the decoder has one more)"""
    lr: float = 2e-3
    """peak of Adam's learning rate: 2 % warm-up, then a cosine to 0"""
    kl: float = 1e-6
    """weight of the KL divergence, per latent, against the error per pixel"""
    precision: str = "bf16"
    """bf16 (autocast, fp32 weights) or fp32"""
    seed: int = 0
    overwrite: bool = False
    """train again where a finished autoencoder lies"""


def build(arguments: Arguments) -> Any:
    """The untrained network."""
    from diffusers import AutoencoderKL

    levels = len(arguments.widths)
    torch.manual_seed(arguments.seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=arguments.widths, layers_per_block=arguments.layers, latent_channels=4, norm_num_groups=8,
        sample_size=32, scaling_factor=1.0,
    )  # fmt: skip


def train(vae: Any, images: Images, arguments: Arguments) -> None:
    """Adam on the loss above, over all images in a random order; deterministic on one machine."""
    torch.manual_seed(arguments.seed + 1)
    optimizer = torch.optim.Adam(vae.parameters(), betas=(0.9, 0.99))
    total, size = arguments.total_nimg, arguments.batch_size
    feed = batches(images, BatchOrder(len(images), arguments.seed), 0, size)
    with ProgressLine("autoencoder", total) as line:
        for nimg in range(0, total, size):
            x = to_float(next(feed)[0])
            part = nimg / total
            rate = arguments.lr * min(part / 0.02, (1 + math.cos(math.pi * part)) / 2)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16"):
                posterior = vae.encode(x).latent_dist
                decoded = vae.decode(posterior.sample()).sample
            error, kl = (decoded.float() - x).abs().sum(), posterior.kl().float().sum()
            optimizer.zero_grad(set_to_none=True)
            ((error + arguments.kl * kl) / x.numel()).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            line.note(f"l1 {float(error) / x.numel():.4f} kl {float(kl) / len(x):.0f}")
            line.advance(size)
    feed.close()


@torch.inference_mode()
def encode(vae: Any, images: Images, num: int) -> tuple[Tensor, Tensor]:
    """Posterior means and samples [num, 4, 8, 8] of the first `num` images; one sample each, from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    means, samples = [], []
    for first in range(0, num, 500):
        posterior = vae.encode(to_float(images.pixels(range(first, min(first + 500, num))))).latent_dist
        means.append(posterior.mean)
        samples.append(posterior.sample(generator))
    return torch.cat(means), torch.cat(samples)


@torch.inference_mode()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """uint8 images [n, 3, 32, 32] of raw latents [n, 4, 8, 8]."""
    return torch.cat([to_uint8(vae.decode(z).sample) for z in latents.split(250)])


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over images of 10 log10(255^2 / mean squared error), in dB, of uint8 images."""
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return float((10 * torch.log10(255**2 / error.clamp(min=1e-9))).mean())


def tails(latents: Tensor) -> dict[str, Any]:
    """Of latents [n, c, h, w], per channel: mean, std, excess kurtosis (0: Gaussian), shares of outliers, largest |value|.

    The moments are taken per element [c, h, w] over the data set and averaged over the elements of a channel, as sLCT
    normalises. An outlier lies more than 4, 6, 8 robust standard deviations (1.4826 median |x - median|) from the median.
    """
    x = latents.double()
    z = (x - x.mean(0)) / x.std(0)
    kurtosis = z.pow(4).mean(0).mean((1, 2)) - 3
    centred = x - x.median(0).values
    spread = 1.4826 * centred.abs().median(0).values
    far = (centred / spread).abs()
    gaussian = {f"{k:g}": math.erfc(k / math.sqrt(2)) for k in OUTLIERS}
    return {
        "n": len(x),
        "mean": x.mean((0, 2, 3)).tolist(), "std": x.std(0).mean((1, 2)).tolist(),
        "excess_kurtosis": kurtosis.tolist(), "excess_kurtosis_mean": float(kurtosis.mean()),
        "excess_kurtosis_largest_element": float((z.pow(4).mean(0) - 3).max()),
        "outliers": {f"{k:g}": (far > k).double().mean((0, 2, 3)).tolist() for k in OUTLIERS},
        "outliers_all": {f"{k:g}": float((far > k).double().mean()) for k in OUTLIERS},
        "outliers_of_a_gaussian": gaussian,
        "largest_in_robust_std": far.amax((0, 2, 3)).tolist(),
        "largest_in_std": z.abs().amax((0, 2, 3)).tolist(),
    }  # fmt: skip


def main(arguments: Arguments) -> None:
    """Train, measure, save."""
    how = arguments.out / "how.json"
    if how.exists() and not arguments.overwrite:
        print(how.read_text())
        return
    torch.set_num_threads(1)
    images = open_images(DataSpec(arguments.data))
    shown, held = images.split("train", 0.1), images.split("heldout", 0.1)
    vae = build(arguments)
    began, cpu = time.monotonic(), time.process_time()
    train(vae.train(), shown, arguments)
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    vae.eval().requires_grad_(False)
    vae.save_pretrained(arguments.out, safe_serialization=True)  # before anything else can fail
    mean, sample = encode(vae, held, 2000)
    real = held.pixels(range(2000))
    result = {
        "what": "AutoencoderKL on CIFAR-10, 32x32 -> [4, 8, 8]",
        "command": "python benchmarks/autoencoder.py",
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(arguments).items()},
        "parameters": sum(p.numel() for p in vae.parameters()),
        "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
        "data": {"name": images.name, "fingerprint": images.fingerprint, "heldout": 0.1},
        "psnr_heldout": {"from_mean": psnr(real, decode(vae, mean)), "from_sample": psnr(real, decode(vae, sample))},
        "posterior_std": float((sample - mean).std()),
        "latents_of_training_images": tails(encode(vae, shown, 10_000)[1]),
        "environment": environment(),
    }  # fmt: skip
    pictures = torch.stack([real[:32], decode(vae, mean[:32])]).unflatten(1, (2, 16)).transpose(0, 1).flatten(0, 2)
    save(arguments.out / "reconstructions.png", grid(pictures, 16))
    write_json(how, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
