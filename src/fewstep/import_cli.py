"""fewstep import: other people's models."""

from pathlib import Path
from typing import Any, Literal

import tyro


def import_(
    source: tyro.conf.Positional[str], out: tyro.conf.Positional[Path], *,
    kind: Literal["diffusion", "consistency"] | None = None, strict: bool = True, resolution: int | None = None,
    data: str = "", check: bool = True,
    device: str = "auto", overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Read another program's model, without executing anything in it; OUT is then a MODEL for every verb, --init included.

    EDM, ECT, TCM and EDM2 pickles (.pkl); diffusers pipelines of a UNet2DModel or DiTTransformer2DModel with epsilon, v,
    sample, flow or consistency parametrisation (folder or hub name); OpenAI's consistency_models (.pt); FastGen (.pth).

    Args:
        source: The file, folder or hub name (OWNER/NAME).
        out: Folder for model.safetensors, import.json (what became of every key) and check.png (16 samples).
        kind: diffusion (many steps) or consistency (one or a few), where the source does not tell or is wrong.
        strict: Refuse a source with missing, left-over or misshapen tensors; --no-strict takes what fits.
        resolution: Pixels along a side, where an archive (.pt, .pth) does not tell it.
        data: Images of its kind to measure the denoising loss with; none: its own samples.
        check: Draw the picture and measure the denoising loss by noise level.
        device: auto, cpu, cuda, cuda:1 or mps; for the check.
        overwrite: Replace the model in OUT.
    """
    from fewstep.importing import import_model

    told = import_model(
        source,
        out,
        kind=kind,
        strict=strict,
        resolution=resolution,
        data=data,
        look=check,
        device=device,
        overwrite=overwrite,
    )
    return {key: value for key, value in told.items() if key != "keys"} | {"keys": len(told["keys"]), "out": str(out)}
