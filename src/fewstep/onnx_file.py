"""The one-step generator as an ONNX file, compared with PyTorch before it is kept."""

import copy
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from fewstep.files import atomic_write
from fewstep.latents import vae_of
from fewstep.model import Model
from fewstep.networks import Preconditioned, Spliced
from fewstep.noise import NoiseStream
from fewstep.ode import SIGMA_MAX
from fewstep.types import FewstepError

TOLERANCE: Final = 1e-3  # of pixels in [-1, 1]: 1/8 of a step of 8-bit colour
OPSET: Final = 18
LARGEST: Final = 2**31  # bytes in one ONNX file


class OneStep(nn.Module):
    """noise [n, C, H, W] ~ N(0, 1) (and label [n]) -> image [n, C, H, W], in [-1, 1] or nearly; latents are decoded."""

    def __init__(self, model: Model):
        super().__init__()
        arch, denoiser = model.info.architecture, copy.deepcopy(model.denoiser).to("cpu")
        if isinstance(arch.network, Spliced):  # at sigma = 80 its trained half answers
            raw: Any = denoiser.network
            denoiser = Preconditioned(raw.trained, arch.sigma_data, arch.sigma_min)
        self.denoiser, self.space, self.clip = denoiser, model.info.latents, model.info.clip_denoised
        self.vae = vae_of(self.space).network if self.space else None

    def forward(self, noise: Tensor, label: Tensor | None = None) -> Tensor:
        x = self.denoiser(noise * SIGMA_MAX, torch.full_like(noise[:, 0, 0, 0], SIGMA_MAX), label)
        x = x.clamp(-1, 1) if self.clip else x
        if self.space is None or self.vae is None:
            return x
        image = self.vae.decode(self.space.denormalise(x)).sample
        return image.mean(1, keepdim=True) if self.space.channels == 1 else image


def write_onnx(model: Model, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Write OUT.onnx: inputs `noise` [n, C, H, W] and, of conditional models, `label` [n] int64; output `image`.

    The file is run by onnxruntime on three noises and compared with PyTorch; one that differs by more than 1e-3 is not
    kept. FewstepError without the packages, for diffusion models, and for what the exporter cannot translate.
    """
    info, arch = model.info, model.info.architecture
    if info.kind != "consistency":
        raise FewstepError(
            "only a consistency model is a one-step generator: tune it first, with fewstep train ect --init"
        )
    if out.suffix != ".onnx":
        raise FewstepError(f"{out}: give OUT a name that ends in .onnx")
    if out.exists() and not overwrite:
        raise FewstepError(f"{out} exists: choose another OUT, or give --overwrite")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (what torch.onnx writes with)
    except ImportError as error:
        raise FewstepError(f"ONNX needs more packages ({error.name}): pip install 'fewstep[onnx]'") from None
    generator = OneStep(model).eval()
    if sum(p.nbytes for p in generator.state_dict().values()) > LARGEST:
        raise FewstepError("the weights are larger than one ONNX file can hold (2 GB): export to diffusers instead")
    stream = NoiseStream(0)
    noise = stream.normal(range(3), arch.shape)
    label = stream.labels(range(3), arch.num_classes) if arch.num_classes else None
    given = {"noise": noise} | ({} if label is None else {"label": label})
    count = torch.export.Dim("n", min=1, max=4096)
    with torch.no_grad():
        expected = info.sampler(1)(copy.deepcopy(model.denoiser).to("cpu"), lambda k: noise, label)
        if generator.vae is not None:
            expected = generator(**given)
        try:
            program = torch.onnx.export(
                generator, (), kwargs=given, input_names=list(given), output_names=["image"], opset_version=OPSET,
                dynamo=True, dynamic_shapes={name: {0: count} for name in given}, verbose=False,
            )  # fmt: skip
        except Exception as error:  # torch's own text is pages long
            said = " ".join(str(error).split())[:200]
            raise FewstepError(f"torch.onnx could not translate the {type(arch.network).__name__} ({said})") from error
    found: dict[str, float] = {}

    def fill(new: Path) -> None:
        assert program is not None
        program.save(str(new), external_data=False)
        session = onnxruntime.InferenceSession(str(new), providers=["CPUExecutionProvider"])
        for n in (3, 1):
            inputs = {name: tensor[:n].numpy() for name, tensor in given.items()}
            image = torch.from_numpy(session.run(["image"], inputs)[0])
            found[f"n = {n}"] = float((image - expected[:n]).abs().max())
        if not max(found.values()) <= TOLERANCE:
            raise FewstepError(
                f"onnxruntime's images differ from PyTorch's by {max(found.values()):.2g}: nothing was written"
            )

    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, fill)
    return {
        "out": str(out), "bytes": out.stat().st_size, "inputs": list(given), "opset": OPSET, "sigma": SIGMA_MAX,
        "difference": max(found.values()), "weights_sha256": model.sha256, "lineage": list(info.lineage),
    }  # fmt: skip
