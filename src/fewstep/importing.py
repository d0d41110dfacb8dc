"""Other people's models in: read without executing anything, written as a snapshot of ours, and looked at."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from fewstep import hub
from fewstep.console import ProgressLine, say
from fewstep.data import DataSpec, open_images, preparation
from fewstep.environment import pick_device
from fewstep.evaluation import GRID_SEED
from fewstep.files import whole_folder, write_json
from fewstep.hub.foreign import table
from fewstep.model import Model, ModelInfo, load, read_info, save_model
from fewstep.noise import NoiseStream
from fewstep.pictures import save
from fewstep.selfcheck import COUNT, Check, check, picture, samplers
from fewstep.types import FewstepError

WEIGHTS, TOLD, DRAWN = "model.safetensors", "import.json", "check.png"
SHOWN: Final = 512  # images of --data that are denoised


def import_model(
    source: str | Path, out: str | Path, *, kind: Literal["diffusion", "consistency"] | None = None, strict: bool = True,
    resolution: int | None = None, data: str | DataSpec = "", look: bool = True, device: str = "auto",
    overwrite: bool = False, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Read an EDM, ECT, TCM or EDM2 pickle, a diffusers pipeline (folder or hub name), OpenAI's .pt or FastGen's .pth into
    the folder `out`, which is then a MODEL anywhere.

    Writes OUT/model.safetensors, import.json (what became of every key, notes, lineage, the check) and check.png (16 images
    by the model's own sampler). resolution: pixels along a side, where an archive does not tell it. data: images whose
    denoising loss is measured; none: the model's own samples. look=False: neither picture nor loss. Returns what import.json
    holds. FewstepError for whatever cannot be read safely and exactly.
    """
    place, out = pick_device(device), Path(out)
    path = hub.resolve(source)
    if not path.exists():
        raise FewstepError(f"{source} does not exist: give a .pkl, .pt or .pth file, a diffusers folder or a hub name")
    foreign = hub.read(path, strict, kind, resolution)
    if foreign is None:
        raise FewstepError(
            f"{source} does not say what its weights predict: give a whole diffusers pipeline (with model_index.json and its "
            "scheduler), an EDM, ECT or TCM pickle, or OpenAI's or FastGen's archive; fewstep's own snapshots need no import"
        )
    info = read_info(foreign.header(), path)
    if data:
        clean_samples(info, data)  # what cannot be opened is told of now
    told: dict[str, Any] = {
        "source": str(source), "what": foreign.source, "kind": info.kind, "weights_sha256": "",
        "lineage": list(info.lineage), "notes": list(foreign.notes), "keys": [asdict(key) for key in foreign.keys],
    }  # fmt: skip

    def fill(folder: Path) -> None:
        told["weights_sha256"] = save_model(folder / WEIGHTS, foreign.tensors, info)
        tell(foreign, info, out / TOLD)
        if look:
            found = inspect_model(load(folder / WEIGHTS, place), folder / DRAWN, data, quiet)
            told.update({"picture": str(out / DRAWN), "check": found.to_json()})
            say(
                f"denoising loss of {found.n} images ({found.of}), per element, and over that of a network that says nothing:"
            )
            say(found.table())
            say(f"WARNING: {found.verdict}" if found.verdict else f"it denoises as it should; look at {out / DRAWN}")
        write_json(folder / TOLD, told)

    whole_folder(out, (WEIGHTS, TOLD, DRAWN), TOLD, overwrite, fill)
    return told


def tell(foreign: hub.Foreign, info: ModelInfo, report: Path) -> None:
    """What became of the keys, and what the user should know."""
    odd = [key for key in foreign.keys if key.remark]
    say(f"{foreign.source}: {len(foreign.keys) - len(odd)} tensors taken as they are" + (":" * bool(odd)))
    if odd:
        say(table(odd[:40]) + (f"\n  ... and {len(odd) - 40} more in {report}" if len(odd) > 40 else ""))
    for line in (*foreign.notes, *info.lineage):
        say(f"note: {line}")


def inspect_model(model: Model, drawn: Path, data: str | DataSpec = "", quiet: bool = False) -> Check:
    """Draw 16 images by the model's own sampler into the file `drawn`, and denoise images of `data`, or those."""
    with ProgressLine("check", COUNT * len(samplers(model)), quiet=quiet) as line:
        image, samples = picture(model, line.advance)
    save(drawn, image)
    classes = model.info.architecture.num_classes
    if not data:
        label = NoiseStream(GRID_SEED).labels(range(COUNT), classes) if classes else None
        return check(model, samples.cpu(), label)
    x, label, name = clean_samples(model.info, data)
    return check(model, x, label if classes else None, name)


def clean_samples(info: ModelInfo, data: str | DataSpec) -> tuple[Tensor, Tensor | None, str]:
    """Up to 512 samples x [n, C, H, W] of a source as the model takes them, their labels, and the source's name."""
    spec = DataSpec(data, resolution=info.image_shape[-1]) if isinstance(data, str) else data
    images = open_images(spec)
    if images.shape != info.architecture.shape:
        raise FewstepError(
            f"{images.name} has samples of {' x '.join(map(str, images.shape))}, the model makes "
            f"{' x '.join(map(str, info.architecture.shape))}: give --data of its own kind"
            + (", latents that `fewstep encode` made" if info.latents else "")
        )
    if info.latents and not (images.space and info.latents.same_as(images.space)):
        raise FewstepError(
            f"{images.name} has latents of another VAE or scale than the model's: use fewstep encode --statistics MODEL"
        )
    if info.architecture.num_classes and (
        images.labels is None or int(images.labels.max()) >= info.architecture.num_classes
    ):
        raise FewstepError(
            f"{images.name} has not the model's {info.architecture.num_classes} classes: give labelled data"
        )
    rows = torch.linspace(0, len(images) - 1, min(SHOWN, len(images))).long()
    x = preparation(images)(images.pixels(rows), 0, 0)
    return x, None if images.labels is None else images.labels[rows], images.name
