"""Models out and back: stock diffusers makes our samples, and what it loads comes home to the bit."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep
import fewstep.component  # (diffusers loads only what is imported)
from fewstep import load
from fewstep.cli import main
from fewstep.data import LatentSpace
from fewstep.exporting import export, form_of, grid_of
from fewstep.importing import import_model
from fewstep.latents import load_vae
from fewstep.model import Model, ModelInfo, save_model
from fewstep.networks import MLP, Architecture, DiT, EDM2UNet, EDMUNet, Spliced, Stock, UNet
from fewstep.networks.stock import Flow, Scaled, VariancePreserving
from fewstep.samplers import FewStep, Heun
from fewstep.types import FewstepError

SMALL = UNet(16, (1, 2), layers=1, attention=(4,), head_dim=8, norm_groups=8)
EDM_SMALL = EDMUNet(channels=16, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0)
PLAIN = json.dumps({
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": [8, 16], "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1, "attention_head_dim": 4,
})  # fmt: skip
TOKENS = json.dumps({
    "sample_size": 8, "in_channels": 4, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8,
    "num_layers": 1, "num_embeds_ada_norm": 10, "norm_num_groups": 4,
})  # fmt: skip
FAMILIES: dict[str, Architecture] = {
    "unet": Architecture(SMALL, (3, 8, 8)),
    "unet, classes": Architecture(SMALL, (1, 8, 8), 10),
    "unet, shifted boundary": Architecture(replace(SMALL, low_frequency_time=False), (3, 8, 8), sigma_min=0.002),
    "unet, norms of sLCT": Architecture(replace(SMALL, norm="nonscaling-layer"), (3, 8, 8), 10),
    "unet, EDM's time": Architecture(replace(SMALL, time_scale=1.0, low_frequency_time=False), (3, 8, 8)),
    "ddpm++": Architecture(EDM_SMALL, (3, 8, 8), 10),
    "ncsn++": Architecture(replace(EDM_SMALL, style="ncsn++"), (3, 8, 8)),
    "dit": Architecture(DiT(width=32, depth=2, heads=2), (3, 8, 8), 10),
    "truncated": Architecture(Spliced(SMALL, 1.0), (3, 8, 8)),
    "edm2": Architecture(EDM2UNet(16, (1, 2), blocks=1, attention=(4,), head_dim=8), (3, 8, 8), 10),
    "a network of diffusers": Architecture(Stock("UNet2DModel", PLAIN, Scaled()), (3, 8, 8)),
    "tuned from a ddpm": Architecture(
        Stock("UNet2DModel", PLAIN, VariancePreserving("v_prediction")), (3, 8, 8), 0, 1.0
    ),
    "tuned from a dit": Architecture(Stock("DiTTransformer2DModel", TOKENS, Flow()), (4, 8, 8), 10, 1.0),
}
STOCK = {"unet", "unet, classes", "unet, shifted boundary", "a network of diffusers"}


def model_of(arch: Architecture, path: Path, scale: float = 0.05, **told) -> Model:
    """A snapshot with weights that all matter, loaded."""
    denoiser, g = arch.build(), torch.Generator().manual_seed(1)
    tensors = {
        name: t + scale * torch.randn(t.shape, generator=g) if t.is_floating_point() else t
        for name, t in denoiser.state_dict().items()
    }
    for name, t in tensors.items():  # what low_frequency_time keeps at zero stays there
        if name.endswith("time_embedding.linear_1.weight") and getattr(arch.network, "low_frequency_time", False):
            tensors[name] = torch.where(denoiser.state_dict()[name] == 0, 0.0, t)
    save_model(path, tensors, ModelInfo(arch, **{"kind": "consistency", "second_sigma": 0.5, "data": "toy", **told}))
    return load(path)


def draws(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=g) for _ in range(steps)]


def to_unit(x: Tensor) -> Tensor:
    return (x / 2 + 0.5).clamp(0, 1)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_diffusers_makes_our_samples_and_the_folder_comes_back(family, tmp_path):
    from diffusers import ConsistencyModelPipeline

    model = model_of(FAMILIES[family], tmp_path / "m.safetensors")
    arch = model.info.architecture
    told = export(model, tmp_path / "out")
    assert told["pipeline"] == "ConsistencyModelPipeline"
    assert (told["network"] == "UNet2DModel") == (family in STOCK) == (told["needs"] == "")
    pipe = quiet(ConsistencyModelPipeline.from_pretrained(tmp_path / "out"))
    labels = list(range(4)) if arch.num_classes else None
    for steps in (1, 2, 4):
        images = pipe(
            batch_size=4, class_labels=labels, num_inference_steps=steps, output_type="pt",
            generator=torch.Generator().manual_seed(3),
        ).images  # fmt: skip
        sigmas = tuple(pipe.scheduler.sigmas[:-1].tolist())
        if steps <= 2:
            assert sigmas == pytest.approx(model.info.sampler(steps).sigmas, rel=1e-6)
        sampler, noise = replace(model.info.sampler(steps), sigmas=sigmas), draws((4, *arch.shape), steps)
        x = sampler(model, noise.__getitem__, torch.arange(4) if labels else None)
        assert float((images - to_unit(x)).abs().max()) <= 1e-5, steps
    home = load(tmp_path / "out")
    assert home.sha256 == model.sha256
    assert replace(home.info, best={}) == replace(model.info, best={})
    (x,), label = draws((4, *arch.shape), 1), torch.arange(4) if labels else None
    c_skip = arch.sigma_data**2 / ((1 - arch.sigma_min) ** 2 + arch.sigma_data**2)
    assert float((model(x, torch.ones(4), label) - c_skip * x).abs().max()) > 1e-3  # the network says something


def test_the_stock_unet_is_exact_to_the_bit_in_one_step(tmp_path):
    from diffusers import ConsistencyModelPipeline

    model = model_of(FAMILIES["unet, classes"], tmp_path / "m.safetensors")
    export(model, tmp_path / "out")
    pipe = quiet(ConsistencyModelPipeline.from_pretrained(tmp_path / "out"))
    generator = torch.Generator().manual_seed(3)
    images = pipe(batch_size=4, class_labels=[0, 1, 2, 3], generator=generator, output_type="pt").images
    x = model.info.sampler(1)(model, draws((4, 1, 8, 8), 1).__getitem__, torch.arange(4))
    assert torch.equal(images, to_unit(x))


@pytest.mark.parametrize("family", ["unet", "unet, classes", "unet, shifted boundary", "a network of diffusers"])
def test_a_folder_without_our_description_is_read_like_any_other(family, tmp_path):
    model = model_of(FAMILIES[family], tmp_path / "m.safetensors")
    export(model, tmp_path / "out")
    (tmp_path / "out" / "fewstep.json").unlink()
    home = load(tmp_path / "out")
    if family != "a network of diffusers":  # whose config.json now tells the defaults too
        assert home.info.architecture == model.info.architecture  # our UNet, its frequency cut included, is recognised
    assert home.sha256 == model.sha256
    assert home.info.second_sigma == pytest.approx(model.info.second_sigma, rel=1e-6)
    assert home.info.kind == "consistency"


def test_clipping_goes_along(tmp_path):
    from diffusers import ConsistencyModelPipeline

    model = model_of(FAMILIES["unet"], tmp_path / "m.safetensors", 0.3, clip_denoised=True)
    export(model, tmp_path / "out")
    pipe = quiet(ConsistencyModelPipeline.from_pretrained(tmp_path / "out"))
    generator = torch.Generator().manual_seed(3)
    images = pipe(batch_size=4, num_inference_steps=2, generator=generator, output_type="pt").images
    noise = draws((4, 3, 8, 8), 2)
    clipped, plain = (FewStep((80.0, 0.5), clip)(model, noise.__getitem__) for clip in (True, False))
    assert (
        float((images - to_unit(clipped)).abs().max()) <= 1e-5 < float((to_unit(clipped) - to_unit(plain)).abs().max())
    )
    assert load(tmp_path / "out").info.sampler(2) == FewStep((80.0, 0.5), True)


def test_a_diffusion_model_and_its_solver(tmp_path):
    from fewstep.component import FewstepPipeline

    model = model_of(FAMILIES["ddpm++"], tmp_path / "m.safetensors", kind="diffusion")
    told = export(model, tmp_path / "out")
    assert (told["pipeline"], told["needs"]) == ("FewstepPipeline", "fewstep.component")
    assert "diffusion model" in told["because"]
    pipe = FewstepPipeline.from_pretrained(tmp_path / "out")
    generator = torch.Generator().manual_seed(3)
    x = pipe(4, [0, 1, 2, 3], 3, generator=generator, output_type="latent").images
    expected = Heun.karras(3)(model, draws((4, 3, 8, 8), 1).__getitem__, torch.arange(4))
    assert float((x - expected).abs().max()) <= 1e-5
    assert len(pipe(2, 7, 2).images) == 2  # PIL


# ---------------------------------------------------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    from diffusers import AutoencoderKL

    path = tmp_path_factory.mktemp("vae")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
        ).save_pretrained(path)  # fmt: skip
    return str(path)


def test_a_latent_models_vae_comes_along_and_no_path_of_this_machine(vae, tmp_path):
    from diffusers import LDMPipeline

    for count, pipeline in ((4, "LDMPipeline"), (256, "FewstepPipeline")):
        here = tmp_path / f"vae-{count}"
        shutil.copytree(vae, here)
        model = model_of(Architecture(SMALL, (4, 8, 8)), tmp_path / "m.safetensors", latents=space_of(str(here), count))
        out = tmp_path / f"out-{count}"
        assert export(model, out)["pipeline"] == pipeline
        expected = fewstep.sample(model, steps=2, num=3)
        here.rename(tmp_path / f"gone-{count}")
        out.rename(tmp_path / f"elsewhere-{count}")
        out = tmp_path / f"elsewhere-{count}"
        assert str(tmp_path) not in (out / "fewstep.json").read_text() + (out / "README.md").read_text()
        assert torch.equal(fewstep.sample(load(out), steps=2, num=3), expected)
        told = import_model(out, tmp_path / f"back-{count}")
        assert told["picture"]
    assert len(quiet(LDMPipeline.from_pretrained(tmp_path / "elsewhere-4"))(2, num_inference_steps=1).images) == 2


def space_of(vae: str, count: int, channels: int = 3) -> LatentSpace:
    g = torch.Generator().manual_seed(2)
    mean, std = torch.randn(count, generator=g), 1 + torch.rand(count, generator=g)
    return LatentSpace(
        vae, load_vae(vae).sha256, 16, (4, 8, 8), tuple(mean.tolist()), tuple(std.tolist()), 0.5, channels
    )


def test_latents_with_statistics_of_channels_are_a_stock_pipeline(vae, tmp_path):
    from diffusers import LDMPipeline

    space = space_of(vae, 4)
    model = model_of(Architecture(SMALL, (4, 8, 8)), tmp_path / "m.safetensors", latents=space)
    told = export(model, tmp_path / "out")
    assert (told["pipeline"], told["needs"]) == ("LDMPipeline", "")
    pipe = quiet(LDMPipeline.from_pretrained(tmp_path / "out"))
    for steps in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(9)  # of the noise between the steps, which LDMPipeline draws from the global generator
            between = torch.randn(4, 4, 8, 8)
            torch.manual_seed(9)
            generator = torch.Generator().manual_seed(3)
            images = pipe(4, num_inference_steps=steps, generator=generator, output_type="np").images
        noise = [draws((4, 4, 8, 8), 1)[0], between]
        x = model.info.sampler(steps)(model, noise.__getitem__)
        expected = to_unit(load_vae(vae).decode(space.denormalise(x))).permute(0, 2, 3, 1)
        assert float((torch.from_numpy(images) - expected).abs().max()) <= 1e-5, steps
    home = load(tmp_path / "out")
    assert home.sha256 == model.sha256
    assert home.info.latents.same_as(space)
    assert home.info.latents.vae == str((tmp_path / "out" / "vae").resolve())


@pytest.mark.parametrize(("classes", "count", "channels"), [(10, 4, 3), (0, 256, 3), (0, 4, 1)])
def test_other_latents_use_our_pipeline_and_say_why(vae, tmp_path, classes, count, channels):
    from fewstep.component import FewstepPipeline

    space = space_of(vae, count, channels)
    model = model_of(Architecture(SMALL, (4, 8, 8), classes), tmp_path / "m.safetensors", latents=space)
    told = export(model, tmp_path / "out")
    assert told["pipeline"] == "FewstepPipeline"
    assert ("labels" in told["because"]) == (classes > 0)
    assert ("each element" in told["because"]) == (count == 256)
    assert ("grey" in told["because"]) == (channels == 1)
    pipe = FewstepPipeline.from_pretrained(tmp_path / "out")
    labels = [0, 1, 2, 3] if classes else None
    generator = torch.Generator().manual_seed(3)
    images = pipe(4, labels, num_inference_steps=2, generator=generator, output_type="pt").images
    label = torch.arange(4) if classes else None
    x = model.info.sampler(2)(model, draws((4, 4, 8, 8), 2).__getitem__, label)
    expected = load_vae(vae).decode(space.denormalise(x))
    expected = expected.mean(1, keepdim=True) if channels == 1 else expected
    assert float((images - to_unit(expected)).abs().max()) <= 1e-5
    assert load(tmp_path / "out").sha256 == model.sha256


# ------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("sigma_min", [0.0, 0.002])
@pytest.mark.parametrize("second", [0.05, 0.1, 0.3, 0.821, 3.0, 20.0])
def test_the_schedulers_grid_holds_the_second_sigma(second, sigma_min):
    from diffusers import CMStochasticIterativeScheduler

    n, rho = grid_of(second, sigma_min)
    if rho is None:
        assert (second, sigma_min) == (0.05, 0.002)
        return
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=n, sigma_min=sigma_min, rho=rho)
    scheduler.set_timesteps(2)
    assert scheduler.sigmas[:2].tolist() == pytest.approx([80, second], rel=1e-6)


def test_rho_is_the_closed_form_of_the_trial():
    assert grid_of(0.821, 0.0)[1] == pytest.approx(6.367841, abs=1e-6)


def test_a_second_sigma_that_no_grid_holds_uses_our_pipeline(tmp_path):
    info = ModelInfo(FAMILIES["unet, shifted boundary"], "consistency", second_sigma=0.05)
    assert form_of(info).pipeline == "FewstepPipeline"
    assert "no grid" in form_of(info).because


# -------------------------------------------------------------------------------------------------------------- card


@pytest.mark.parametrize("family", ["unet, classes", "ddpm++"])
def test_the_cards_snippet_runs(family, tmp_path, monkeypatch):
    model = model_of(FAMILIES[family], tmp_path / "m.safetensors")
    folder = tmp_path / family.replace(", ", "-")
    export(model, folder)
    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"<!-- snippet -->\n```python\n(.*?)```", text, re.DOTALL)
    assert ("import fewstep.component" in code) == (family == "ddpm++")
    if family == "ddpm++":  # as a reader runs it: nothing is imported before
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    else:
        monkeypatch.chdir(tmp_path)
        exec(code, {})
    assert (tmp_path / "sample.png").read_bytes()[:4] == b"\x89PNG"


def test_the_card_tells_records_lineage_and_refuses_numbers_of_other_weights(tmp_path, capsys):
    lineage = ("EDM weights (NVIDIA), CC BY-NC-SA 4.0: non-commercial, share alike",)
    model = model_of(FAMILIES["unet"], tmp_path / "m.safetensors", lineage=lineage, nimg=1234)
    record = {
        "metric": "fd", "value": 2.5, "std": 0.25, "values": [2.25, 2.75], "seeds": [0, 1], "n": 100,
        "extractor": "pixels", "extractor_sha256": "a" * 64, "reference": "toy[train]", "reference_n": 50,
        "reference_sha256": "b" * 64, "sampler": "FewStep", "sigmas": [80.0], "nfe": 1, "model": "x",
        "model_sha256": model.sha256,
    }  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps([record]))
    export(model, tmp_path / "out", records=[tmp_path / "r.json"], licence="apache-2.0")
    said, text = capsys.readouterr().err, (tmp_path / "out" / "README.md").read_text()
    assert "WARNING: these weights descend from weights under CC BY-NC-SA" in said
    assert "| fd | 2.5 ± 0.25 | 100 | 1 | 80 |" in text
    assert "inherits that licence: no commercial use" in text
    assert "1,234" in text
    assert load(tmp_path / "out").info.lineage == lineage
    export(model, tmp_path / "other")
    assert "license: cc-by-nc-sa-4.0" in (tmp_path / "other" / "README.md").read_text()
    (tmp_path / "r.json").write_text(json.dumps([record | {"model_sha256": "c" * 64}]))
    with pytest.raises(FewstepError, match="of other weights"):
        export(model, tmp_path / "third", records=[tmp_path / "r.json"])
    assert not (tmp_path / "third").exists()


def test_a_combinations_coefficients_stand_on_its_card(tmp_path):
    folder = tmp_path / "lcsc"
    folder.mkdir()
    model = model_of(FAMILIES["unet"], folder / "combined.safetensors")
    told = {
        "weights_sha256": model.sha256, "verdict": "LCSC improves fd.", "coefficients": [-0.5, 1.5],
        "snapshots": [{"nimg": 100, "sha256": "d" * 64}, {"nimg": 200, "sha256": "e" * 64}],
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(told))
    export(folder, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "LCSC improves fd." in text
    assert "| 200 | eeeeeeeeeeeeeeee | 1.5 |" in text


# ---------------------------------------------------------------------------------------------------------- bad input


def test_nothing_is_overwritten_by_accident_and_nothing_half_written(tmp_path, monkeypatch):
    model = model_of(FAMILIES["unet"], tmp_path / "m.safetensors")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(FewstepError, match="not empty"):
            export(model, tmp_path / "mine", overwrite=overwrite)
    export(model, tmp_path / "out")
    with pytest.raises(FewstepError, match="--overwrite"):
        export(model, tmp_path / "out")
    before = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fewstep.exporting.draw", full)
        with pytest.raises(FewstepError, match="was not written"):
            export(model, tmp_path / "out", overwrite=True)
    after = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    (tmp_path / "out" / ".git").mkdir()  # of a cloned repository of the hub
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    export(model, tmp_path / "link", overwrite=True)
    assert (tmp_path / "out" / ".git").is_dir()
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    (tmp_path / "link").unlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "mine", "out"]


def test_what_is_no_image_is_refused(tmp_path):
    model = model_of(Architecture(MLP(width=8, depth=2), (2,)), tmp_path / "m.safetensors")
    with pytest.raises(FewstepError, match="no square images"):
        export(model, tmp_path / "out")


def test_damaged_exports_are_told_by_name(tmp_path):
    model = model_of(FAMILIES["unet"], tmp_path / "m.safetensors")
    export(model, tmp_path / "out")
    file = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    tensors = {name: t.clone() for name, t in load_file(file).items()}  # not maps of what is overwritten
    first = next(iter(tensors))
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FewstepError, match="damaged"):
        load(tmp_path / "out")
    save_file({name: t for name, t in tensors.items() if name != first}, file)
    with pytest.raises(FewstepError, match=rf"1 of \d+ tensors do not fit(.|\n)*{re.escape(first)}"):
        load(tmp_path / "out")
    (tmp_path / "out" / "fewstep.json").write_text("{")
    with pytest.raises(FewstepError, match="no valid JSON"):
        load(tmp_path / "out")


def test_pushing_uploads_the_whole_folder_or_says_what_to_do(tmp_path, monkeypatch):
    model, calls = model_of(FAMILIES["unet"], tmp_path / "m.safetensors"), []

    class Api:
        def create_repo(self, repo, private, exist_ok):
            calls.append((repo, private))

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(sorted(p.name for p in Path(folder_path).iterdir()))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    told = export(model, tmp_path / "out", push_to_hub="me/digits")
    assert told["pushed_to"] == "me/digits"
    assert calls == [
        ("me/digits", True), ["README.md", "fewstep.json", "model_index.json", "samples.png", "scheduler", "unet"]
    ]  # fmt: skip
    assert 'from_pretrained("me/digits")' in (tmp_path / "out" / "README.md").read_text()

    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(Api, "create_repo", refuse)
    with pytest.raises(FewstepError, match="hf auth login"):
        export(model, tmp_path / "again", push_to_hub="me/digits")
    assert (tmp_path / "again" / "model_index.json").exists()


def test_the_command_line(tmp_path, capsys):
    model_of(FAMILIES["unet"], tmp_path / "m.safetensors")
    assert main(["export", str(tmp_path / "m.safetensors"), str(tmp_path / "out"), "--to", "diffusers"]) == 0
    assert json.loads(capsys.readouterr().out)["pipeline"] == "ConsistencyModelPipeline"
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "o2")]) == 2
    assert "does not exist" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize("family", ["unet, classes", "dit"])
def test_onnx_makes_the_same_images(family, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = model_of(FAMILIES[family], tmp_path / "m.safetensors")
    told = export(model, tmp_path / "one.onnx", to="onnx")
    assert told["difference"] <= 1e-4
    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"), providers=["CPUExecutionProvider"])
    (noise,), label = draws((5, *model.info.architecture.shape), 1), torch.arange(5)
    (image,) = session.run(["image"], {"noise": noise.numpy(), "label": label.numpy()})
    x = model.info.sampler(1)(model, lambda k: noise, label)
    assert float((torch.from_numpy(image) - x).abs().max()) <= 1e-4
    with pytest.raises(FewstepError, match="exists"):
        export(model, tmp_path / "one.onnx", to="onnx")


@pytest.mark.parametrize(("family", "told"), [("truncated", {}), ("unet", {"clip_denoised": True})])
def test_onnx_of_models_with_two_halves_or_clipping(family, told, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = model_of(FAMILIES[family], tmp_path / "m.safetensors", 0.3, **told)
    export(model, tmp_path / "one.onnx", to="onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"), providers=["CPUExecutionProvider"])
    (noise,) = draws((5, 3, 8, 8), 1)
    (image,) = session.run(["image"], {"noise": noise.numpy()})
    x = model.info.sampler(1)(model, lambda k: noise)
    assert float((torch.from_numpy(image) - x).abs().max()) <= 1e-4
    assert (float(x.abs().max()) <= 1) == bool(told)


def test_onnx_is_for_one_step_generators(tmp_path):
    model = model_of(FAMILIES["unet"], tmp_path / "m.safetensors", kind="diffusion")
    with pytest.raises(FewstepError, match="tune it first"):
        export(model, tmp_path / "one.onnx", to="onnx")
