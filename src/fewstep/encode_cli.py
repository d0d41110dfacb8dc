"""fewstep encode: images to latents."""

from pathlib import Path
from typing import Any, Literal

import tyro


def encode(
    source: tyro.conf.Positional[str], out: tyro.conf.Positional[Path], *, vae: str = "stabilityai/sd-vae-ft-ema",
    resolution: int = 256, flip: bool = True, single_sample: bool = False, statistics: str = "channel",
    sigma_data: float = 0.5, dtype: Literal["fp16", "fp32"] = "fp16", use_labels: bool = True, seed: int = 0,
    shard_size: int = 1024, batch: int = 16, device: str = "auto", overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Encode images with a VAE, once: OUT is then a --data source, and models trained on it decode by themselves.

    Stopped at any moment, the same command goes on. Repeated with other --statistics it encodes nothing again.

    Args:
        source: Images, as for --data: digits, a folder, FILE.zip, FILE.parquet, FILE.npz or hf:NAME.
        out: Folder for the latents.
        vae: A diffusers AutoencoderKL: hub name (OWNER/NAME, OWNER/NAME/SUBFOLDER) or local folder.
        resolution: Center-crop to a square and resize to this many pixels.
        flip: Encode every image mirrored, too, for --data.flip in training; doubles time and disk.
        single_sample: Keep one posterior sample of each, in place of mean and log variance, which give each epoch its own.
        statistics: What latents are normalised with: mean and std of each channel, of each element, or a .safetensors
            file of mean and std. Measured over all posteriors: std^2 is the mean of their variances plus the variance
            of their means. Or a MODEL of latents (an imported DiT, say): what it was trained on, to tune it.
        sigma_data: Standard deviation of the normalised latents; training needs the same --sigma-data.
        dtype: fp16 or fp32 on the disk.
        use_labels: Keep the class labels if the source has them.
        seed: Of single samples.
        shard_size: Images in a file; a kill loses one file's work.
        batch: Images encoded at a time; affects memory and, in their last digits, values.
        device: auto, cpu, cuda, cuda:1 or mps.
        overwrite: Replace other latents in OUT.
    """
    from fewstep.data import DataSpec
    from fewstep.encoding import Encoding
    from fewstep.encoding import encode as carry_out

    how = Encoding(flip=flip, single_sample=single_sample, dtype=dtype, shard_size=shard_size, seed=seed)
    return carry_out(
        DataSpec(source, resolution=resolution, use_labels=use_labels), out, vae, how, statistics=statistics,
        sigma_data=sigma_data, device=device, batch=batch, overwrite=overwrite,
    )  # fmt: skip
