"""The model card of an export: what it is, how to use it, what it was made of, how good it is, whose licence it is under."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from fewstep._version import __version__
from fewstep.console import say
from fewstep.files import read_json
from fewstep.metrics import Record
from fewstep.model import Model
from fewstep.types import FewstepError

NON_COMMERCIAL: Final = "CC BY-NC-SA 4.0"
SNIPPET: Final = "<!-- snippet -->"


def card(
    model: Model, pipeline: str, needs: str, because: str, repo: str, records: Sequence[str | Path] = (),
    licence: str = "", title: str = "",
) -> str:  # fmt: skip
    """README.md of the folder, with the front matter that the hub reads.

    records: files of what `fewstep evaluate` printed; those of other weights are refused.
    """
    inherited = any(NON_COMMERCIAL in line for line in model.info.lineage)
    if inherited and licence and "nc-sa" not in licence.lower():
        say(
            f"WARNING: these weights descend from weights under {NON_COMMERCIAL}: {licence} cannot be given to them alone"
        )
    licence = licence or ("cc-by-nc-sa-4.0" if inherited else "unknown")
    info, arch = model.info, model.info.architecture
    parts = [
        front_matter(model, licence, pipeline), f"# {title or repo.rpartition('/')[2]}", "", sentence(model), "",
        "![samples](samples.png)", "", "## Use", "", SNIPPET, "```python", *snippet(model, pipeline, needs, repo), "```", "",
    ]  # fmt: skip
    if because:
        parts += [f"Not a stock pipeline of stock parts: {because}. `pip install fewstep` brings what it needs.", ""]
    size, decoded = " x ".join(map(str, arch.shape)), " x ".join(map(str, info.image_shape))
    rows = [
        ("samples", size + f", decoded to {decoded}" * bool(info.latents)),
        ("classes", f"{arch.num_classes}" if arch.num_classes else "none"),
        ("parameters", f"{sum(p.numel() for p in model.denoiser.parameters()):,}"),
        ("data", f"{info.data or 'not told'}" + (f", {info.heldout:.0%} held out" if info.heldout else "")),
        ("recipe", info.recipe or "not trained by fewstep"), ("weights", info.weights),
        ("images seen", f"{info.nimg:,}" if info.nimg else "not told"), ("sigma_data", f"{arch.sigma_data:g}"),
        ("second step's sigma", f"{info.second_sigma:g}" if info.kind == "consistency" else "-"),
        ("began with the weights", info.initialised_from or "random"), ("weights' SHA-256", model.sha256),
        ("VAE", vae_name(info.latents.vae) if info.latents else "none"), *settings(model),
    ]  # fmt: skip
    parts += ["## Made of", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    parts += measured(model, records)
    parts += combined(model)
    parts += ["## Licence", "", *lineage(model, licence), "", f"Exported by fewstep {__version__}.", ""]
    return "\n".join(parts)


def vae_name(vae: str) -> str:
    """A hub name as it is; of a folder, which lies beside the card, its last part."""
    return f"{Path(vae).name} (in this folder)" if Path(vae).is_absolute() else vae


def front_matter(model: Model, licence: str, pipeline: str) -> str:
    """The YAML that the hub reads."""
    tags = ("fewstep", f"{model.info.kind}-model", f"diffusers:{pipeline}", "image-generation")
    lines = [f"license: {licence}", "library_name: diffusers"]
    if not model.info.architecture.num_classes:
        lines.append("pipeline_tag: unconditional-image-generation")
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""])


def sentence(model: Model) -> str:
    """What the model is."""
    info, arch = model.info, model.info.architecture
    size = f"{info.image_shape[1]} x {info.image_shape[2]}"
    classes = f" of {arch.num_classes} classes" if arch.num_classes else ""
    how = (
        "makes an image in one or two evaluations of its network: a consistency model"
        if info.kind == "consistency"
        else "is a diffusion model: it makes an image in many evaluations of its network"
    )
    return f"For {size} images{classes}; it {how}."


def snippet(model: Model, pipeline: str, needs: str, repo: str) -> list[str]:
    """Lines of Python that make an image."""
    labels = "class_labels=[0], " if model.info.architecture.num_classes else ""
    steps = 1 if model.info.kind == "consistency" else 18
    load = [f"import {needs}  # the parts that diffusers does not have"] if needs else []
    module = "diffusers" if pipeline != "FewstepPipeline" else "fewstep.component"
    load = [] if module == needs else load
    lines = ["import torch", *load, f"from {module} import {pipeline}", ""]
    lines += [f'pipe = {pipeline}.from_pretrained("{repo}")']
    call = f"pipe(batch_size=1, {labels}num_inference_steps={steps}, generator=torch.Generator().manual_seed(0))"
    return [*lines, f"image = {call}.images[0]", 'image.save("sample.png")']


def home(model: Model) -> Path | None:
    """The run directory, or the search's folder, that the weights lie in."""
    for folder in list(model.path.parents)[:3] if model.path else ():
        if any((folder / name).is_file() for name in ("recipe.json", "result.json", "import.json")):
            return folder
    return None


def settings(model: Model) -> list[tuple[str, str]]:
    """From the run's recipe: seed, batch, rate, optimizer."""
    folder = home(model)
    if folder is None or not (folder / "recipe.json").is_file():
        return []
    told = read_json(folder / "recipe.json")
    optimizer = {key: value for key, value in told.get("optimizer", {}).items() if key != "is"}
    return [
        ("seed", str(told.get("seed"))), ("batch size", str(told.get("batch_size"))),
        ("learning rate", json.dumps({k: v for k, v in told.get("lr", {}).items() if k != "is"})),
        ("optimizer", json.dumps(optimizer)), ("precision", str(told.get("precision"))),
    ]  # fmt: skip


def measured(model: Model, files: Sequence[str | Path]) -> list[str]:
    """The stamped records: of the files, and the one that made the weights a run's best."""
    records = [Record.from_json(row) for file in files for row in rows_of(Path(file))]
    foreign = [record for record in records if record.model_sha256 != model.sha256]
    if foreign:
        raise FewstepError(
            f"the records of {foreign[0].model} are of other weights ({foreign[0].model_sha256[:12]}..., these are "
            f"{model.sha256[:12]}...): repeat `fewstep evaluate` with the model that is exported"
        )
    if not records:
        return [
            "## Measured",
            "",
            "Nothing was given. `fewstep evaluate MODEL --data ... > r.json`, then `--records r.json`.",
            "",
        ]
    lines = [
        "## Measured",
        "",
        "| metric | value | n | NFE | sigmas | features | reference | noise seeds |",
        "|" + "---|" * 8,
    ]
    for record in records:
        spread = f" ± {record.std:.2g}" if len(record.seeds) > 1 else ""
        sigmas = ", ".join(f"{sigma:.4g}" for sigma in record.sigmas[:4]) + ", ..." * (len(record.sigmas) > 4)
        lines.append(
            f"| {record.metric} | {record.value:.4g}{spread} | {record.n} | {record.nfe} | {sigmas} | {record.extractor} "
            f"({record.extractor_sha256[:8]}) | {record.reference}, {record.reference_n} ({record.reference_sha256[:8]}) | "
            f"{', '.join(map(str, record.seeds))} |"
        )
    return [*lines, "", "± is the standard deviation over noise seeds; numbers of other stamps cannot be compared.", ""]


def rows_of(file: Path) -> list[dict[str, Any]]:
    """What `fewstep evaluate` printed into a file."""
    content = read_json(file)
    rows = content if isinstance(content, list) else [content]
    if not all(isinstance(row, dict) and "metric" in row for row in rows):
        raise FewstepError(f"{file} holds no records: give a file of what `fewstep evaluate` printed")
    return rows


def combined(model: Model) -> list[str]:
    """The coefficients of a linear combination of checkpoints, and what was found with them."""
    folder = home(model)
    file = folder / "result.json" if folder else None
    told = read_json(file) if file and file.is_file() else {}
    if told.get("weights_sha256") != model.sha256:
        return []
    rows = zip(told["snapshots"], told["coefficients"], strict=True)
    lines = ["## A linear combination of checkpoints (LCSC, arXiv:2404.02241)", "", str(told["verdict"]), ""]
    lines += ["| images seen | weights' SHA-256 | coefficient |", "|---|---|---|"]
    return [*lines, *(f"| {s['nimg']:,} | {s['sha256'][:16]} | {c:.6g} |" for s, c in rows), ""]


def lineage(model: Model, licence: str) -> list[str]:
    """Where the weights come from."""
    own = f"Licence as given by whoever exported it: {licence}." if licence != "unknown" else "No licence was given."
    if not model.info.lineage:
        return [own + (" Trained from random weights." if not model.info.initialised_from else "")]
    lines = [own, "", "It descends from:", "", *(f"- {line}" for line in model.info.lineage)]
    if any(NON_COMMERCIAL in line for line in model.info.lineage):
        lines += [
            "",
            f"**A student of weights under {NON_COMMERCIAL} inherits that licence: no commercial use, share alike.**",
        ]
    return lines
