"""Other people's models in: the conversion to D(x, sigma) is exact, a wrong one is named, and nothing foreign is run."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import hub, load
from fewstep.cli import main
from fewstep.data import DataSpec, open_images
from fewstep.encoding import Encoding, encode
from fewstep.evaluation import Generator
from fewstep.files import read_json
from fewstep.importing import import_model
from fewstep.latents import load_vae
from fewstep.model import Model, ModelInfo, check_latents, save_model
from fewstep.networks import Architecture, Preconditioned, Stock, UNet
from fewstep.networks.stock import Flow, Scaled, VariancePreserving, log_sigmas
from fewstep.recipe import Evaluation
from fewstep.recipes import recipe
from fewstep.run import train
from fewstep.samplers import Heun
from fewstep.selfcheck import check
from fewstep.types import FewstepError

SIZE, WIDTHS = 8, (8, 16)


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def unet(classes: int | None = None, seed: int = 0):
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet2DModel(
            sample_size=SIZE, in_channels=3, out_channels=3, block_out_channels=WIDTHS, layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=4, num_class_embeds=classes,
        ).eval()  # fmt: skip


def transformer(seed: int = 0):
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=SIZE,
            num_embeds_ada_norm=10, norm_num_groups=4,
        )  # fmt: skip
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return net.eval()


def folder_of(path: Path, net, scheduler, name: str = "unet", pipeline: str = "DDPMPipeline") -> Path:
    """A pipeline's folder, of this network and scheduler."""
    net.save_pretrained(path / name)
    scheduler.save_pretrained(path / "scheduler")
    index = {
        "_class_name": pipeline, "_diffusers_version": "0.42.1", name: ["diffusers", type(net).__name__],
        "scheduler": ["diffusers", type(scheduler).__name__],
    }  # fmt: skip
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def tensor_of(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ D(x, sigma), exactly


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_a_variance_preserving_model_is_its_own_estimate_of_the_clean_image(tmp_path, prediction, schedule):
    from diffusers import DDIMScheduler

    scheduler, net = DDIMScheduler(prediction_type=prediction, beta_schedule=schedule, clip_sample=False), unet()
    model = load(folder_of(tmp_path / "m", net, scheduler))
    assert (model.info.kind, model.info.architecture.sigma_data) == ("diffusion", 1.0)
    x0, eps = tensor_of(0, 5, 3, SIZE, SIZE), tensor_of(1, 5, 3, SIZE, SIZE)
    scheduler.set_timesteps(1000)
    for t in (0, 1, 300, 700, 998):
        abar = scheduler.alphas_cumprod[t].double()
        x_t = (abar.sqrt() * x0 + (1 - abar).sqrt() * eps).float()
        with torch.inference_mode():
            theirs = scheduler.step(net(x_t, t).sample, t, x_t).pred_original_sample
            sigma = ((1 - abar) / abar).sqrt()
            ours = model((x_t / abar.sqrt()).float(), sigma.float().expand(5))
        assert float((ours - theirs).abs().max()) <= 2e-4 * max(1.0, float(theirs.abs().max())), t


def test_in_double_precision_the_conversion_is_exact_to_rounding():
    """The identity, apart from the rounding of single precision: D = x - sigma eps, and so on."""
    x, c_noise = tensor_of(0, 4, 3, 2, 2).double(), torch.tensor([0.01, 0.5, 3.0, 70.0]).double().log() / 4
    sigma = (4 * c_noise).exp()[:, None, None, None]
    for prediction in ("epsilon", "v_prediction", "sample"):
        speaks, out = VariancePreserving(prediction), tensor_of(1, 4, 3, 2, 2).double()
        alpha, s = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        expected = {"epsilon": x - sigma * out, "v_prediction": alpha * (alpha * x) - s * out, "sample": out}[
            prediction
        ]
        found = assembled(speaks.raw(out, x / (1 + sigma**2).sqrt(), c_noise), x, sigma)
        assert float((found - expected).abs().max()) < 1e-12 * 80
    t = sigma / (1 + sigma)
    out = tensor_of(1, 4, 3, 2, 2).double()
    found = assembled(Flow().raw(out, x / (1 + sigma**2).sqrt(), c_noise), x, sigma)
    assert float((found - ((1 - t) * x - t * out)).abs().max()) < 1e-12


def assembled(raw: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """D = c_skip x + c_out F (EDM, table 1) with sigma_data = 1, in double precision."""
    return x / (1 + sigma**2) + sigma / (1 + sigma**2).sqrt() * raw


@pytest.mark.parametrize("betas", [VariancePreserving(), VariancePreserving(schedule="scaled_linear"),
                                   VariancePreserving(schedule="squaredcos_cap_v2", zero_snr=True, steps=50)])  # fmt: skip
def test_the_time_grid_is_met_at_its_steps_and_linear_in_ln_sigma_between(betas):
    levels = log_sigmas(betas)
    steps = torch.arange(len(levels))
    _, t = betas.inputs(torch.zeros(1), levels / 4)
    assert torch.allclose(t, steps.double(), atol=1e-9)
    _, t = betas.inputs(torch.zeros(1), (levels[:-1] + levels[1:]) / 8)
    assert torch.allclose(t, steps[:-1].double() + 0.5, atol=1e-6)
    _, t = betas.inputs(torch.zeros(1), torch.tensor([-9.0, 9.0]))
    assert t.tolist() == [0, len(levels) - 1]


def test_a_flow_model_of_latents_with_learned_variances_and_labels(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    net = transformer()
    model = load(folder_of(tmp_path / "m", net, FlowMatchEulerDiscreteScheduler(), "transformer", "DiTPipeline"))
    assert model.info.architecture.num_classes == 10
    x, sigma, label = tensor_of(0, 6, 4, SIZE, SIZE), torch.tensor([0.01, 0.2, 1, 5, 30, 80.0]), torch.arange(6)
    t = (sigma / (1 + sigma))[:, None, None, None]
    x_t = x / (1 + sigma[:, None, None, None])
    with torch.inference_mode():
        velocity = net(x_t, timestep=1000 * t[:, 0, 0, 0], class_labels=label).sample[:, :4]
        assert torch.allclose(model(x, sigma, label), x_t - t * velocity, atol=1e-4)


def test_a_dit_of_epsilon_and_its_classes_names(tmp_path):
    from diffusers import DDIMScheduler

    net = transformer()
    folder = folder_of(tmp_path / "m", net, DDIMScheduler(clip_sample=False), "transformer", "DiTPipeline")
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): f"class {i}, also called {i}" for i in range(10)}
    (folder / "model_index.json").write_text(json.dumps(index))
    model = load(folder)
    assert model.info.class_names[3] == "class 3"
    x, t = tensor_of(0, 3, 4, SIZE, SIZE), 500
    sigma = float(log_sigmas(VariancePreserving())[t].exp())
    with torch.inference_mode():
        eps = net(x / math.sqrt(1 + sigma**2), timestep=torch.tensor([t] * 3), class_labels=torch.arange(3)).sample
        ours = model(x, torch.full((3,), sigma), torch.arange(3))
    assert torch.allclose(ours, x - sigma * eps[:, :4], atol=2e-4)


def test_the_ode_ends_where_diffusers_own_deterministic_sampler_ends(tmp_path):
    """DDIM at 1000 steps against Heun at 400: they agree within DDIM's own error, which 500 of its steps tell."""
    from diffusers import DDIMScheduler

    net = unet()
    with torch.no_grad():  # an untrained network's ODE is tame
        net.conv_out.weight *= 0.3
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    model = load(folder_of(tmp_path / "m", net, scheduler))
    noise = tensor_of(5, 4, 3, SIZE, SIZE)

    def ddim(steps: int) -> Tensor:
        scheduler.set_timesteps(steps)
        x = noise
        with torch.inference_mode():
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t).sample, t, x).prev_sample
        return x

    levels = log_sigmas(VariancePreserving())
    low, high = float(levels[0]), float(levels[-1])
    sigmas = torch.linspace(high, low, 400).double().exp().tolist()
    scale = math.sqrt(1 + math.exp(2 * high)) / math.exp(high)  # x_T has variance 1 in their units

    def heun(sigmas: list[float]) -> Tensor:
        with torch.inference_mode():
            return Heun(tuple(sigmas))(model, lambda k: noise * scale)

    fine, coarse = ddim(1000), ddim(500)
    error = float((coarse - fine).abs().max())
    apart = float((heun(sigmas) - fine).abs().max())
    assert apart <= 2 * error + 0.02, (apart, error)
    assert float((heun(sigmas) - heun(sigmas[::4])).abs().max()) < apart + error  # Heun's own error is smaller
    assert float(fine.abs().max()) > 10 * apart  # and the samples are not all alike


# --------------------------------------------------------------------------------------------- import, check, and use


def trained_like(path: Path, prediction: str, told: str | None = None) -> Path:
    """A UNet2DModel that predicts, for Gaussian data of standard deviation 0.5, exactly what it should; its scheduler says
    `told`. It is one linear layer: a 1x1 network would do, but the class must be stock, so it is trained for a moment."""
    from diffusers import DDPMScheduler

    net, levels = unet(), log_sigmas(VariancePreserving())
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(160):
        t = torch.randint(0, 1000, (64,), generator=g)
        sigma = levels[t].exp().float()[:, None, None, None]
        alpha, s = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        x0, eps = 0.5 * torch.randn(64, 3, SIZE, SIZE, generator=g), torch.randn(64, 3, SIZE, SIZE, generator=g)
        target = {"epsilon": eps, "v_prediction": alpha * eps - s * x0, "sample": x0}[prediction]
        loss = (net(alpha * x0 + s * eps, t).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return folder_of(path, net.eval(), DDPMScheduler(prediction_type=told or prediction))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {p: trained_like(tmp_path_factory.mktemp(p), p) for p in ("epsilon", "v_prediction")}


def told_as(folder: Path, to: Path, prediction: str) -> Path:
    """The same weights, said to predict something else."""
    shutil.copytree(folder, to)
    file = to / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": prediction}))
    return to


@pytest.fixture
def gaussian(tmp_path) -> str:
    g = np.random.default_rng(0)
    images = (127.5 + 127.5 * 0.5 * g.standard_normal((200, SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)
    np.savez(tmp_path / "gaussian.npz", images=images)
    return str(tmp_path / "gaussian.npz")


def test_an_import_writes_a_model_a_report_of_every_key_and_a_picture(folders, tmp_path, gaussian, capsys):
    told = import_model(folders["epsilon"], tmp_path / "out", data=gaussian)
    said = capsys.readouterr().err
    assert "it denoises as it should" in said
    assert "between two steps t is linear in ln sigma" in said
    model, report = load(tmp_path / "out"), read_json(tmp_path / "out" / "import.json")
    assert report == json.loads(json.dumps(told))
    assert {key["ours"] for key in told["keys"]} == set(model.denoiser.state_dict())
    assert (tmp_path / "out" / "check.png").read_bytes()[:4] == b"\x89PNG"
    assert told["check"]["verdict"] == ""
    assert max(at["silent"] for at in told["check"]["levels"]) <= 1.1
    assert model.info.weights == "imported"
    with pytest.raises(FewstepError, match="--overwrite"):
        import_model(folders["epsilon"], tmp_path / "out")


@pytest.mark.parametrize(("true", "claimed"), [("epsilon", "v_prediction"), ("v_prediction", "epsilon"),
                                               ("epsilon", "sample")])  # fmt: skip
@pytest.mark.parametrize("with_data", [True, False])
def test_a_wrong_parametrisation_is_seen_and_named(folders, tmp_path, gaussian, capsys, true, claimed, with_data):
    folder = told_as(folders[true], tmp_path / "wrong", claimed)
    told = import_model(folder, tmp_path / "out", data=gaussian if with_data else "")
    verdict = told["check"]["verdict"]
    assert "WARNING" in capsys.readouterr().err
    assert f"as prediction_type {true!r}" in verdict


def test_a_consistency_model_may_be_worse_than_a_filter_by_a_factor_of_two():
    """Its samples have the data's variance, so its error is twice that of the average: no false alarm."""

    class Exact(Preconditioned):
        def forward(self, x, t, label=None):
            return x * (0.5 / (0.25 + t.square()).sqrt())[:, None, None, None]

    class Blind(Preconditioned):
        def forward(self, x, t, label=None):
            return x

    info = ModelInfo(
        Architecture(UNet(16, (1,), layers=1, attention=(), head_dim=8, norm_groups=8), (3, 8, 8)), "consistency"
    )
    for kind, fine in ((Exact, True), (Blind, False)):
        model = Model(kind(torch.nn.Linear(1, 1)), info)
        found = check(model, 0.5 * tensor_of(0, 256, 3, 8, 8), None, "gaussian")
        assert (found.verdict == "") == fine
        if fine:
            assert max(at.silent for at in found.levels) == pytest.approx(2, abs=0.1)


def test_tuning_starts_from_a_foreign_model_and_keeps_its_lineage(folders, tmp_path, gaussian):
    model = load(folders["v_prediction"])
    assert model.info.lineage
    base = recipe("ect", "digits")
    from fewstep.train_cli import inherit

    tuned = replace(
        inherit(base, model), total_nimg=256, batch_size=32, snapshot_nimg=128, grid_nimg=0,
        data=replace(base.data, source=gaussian, resolution=SIZE), evaluation=Evaluation(), conditional=False,
    )  # fmt: skip
    assert tuned.sigma_data == 1.0
    assert isinstance(tuned.network, Stock)
    run = train(tuned, tmp_path / "run", init=model, device="cpu", quiet=True)
    assert load(run.path).info.lineage == model.info.lineage
    longer = train(tuned, tmp_path / "run", resume=True, device="cpu", quiet=True)
    assert load(longer.path).info.lineage == model.info.lineage


def test_an_epsilon_network_is_bounded_for_tuning_and_nowhere_else(folders):
    from fewstep.train_cli import inherit

    eps, v = load(folders["epsilon"]), load(folders["v_prediction"])
    ect, edm = recipe("ect", "digits"), recipe("edm", "digits")
    assert inherit(ect, eps).network.parametrisation == replace(
        eps.info.architecture.network.parametrisation, bound=1.0
    )
    assert inherit(edm, eps).network.parametrisation.bound is None  # a diffusion model goes on as it was
    assert inherit(ect, v).network.parametrisation.bound is None  # v is F already
    speaks, out, x = VariancePreserving(bound=1.0), tensor_of(1, 4, 3, 2, 2), tensor_of(0, 4, 3, 2, 2)
    c_noise = torch.tensor([1e-4, 0.5, 3.0, 80.0]).double().log() / 4
    exact = VariancePreserving().raw(out, x, c_noise)
    assert torch.allclose(speaks.raw(out, x, c_noise)[0], exact[0], atol=1e-6)  # nothing changes where sigma -> 0
    sigma = (4 * c_noise).exp().float()[:, None, None, None]
    assert torch.allclose(speaks.raw(out, x, c_noise), exact / (sigma**2 + 1).sqrt(), atol=1e-5)


def test_folders_are_combined_as_they_are(folders, tmp_path):
    first, second = load(folders["epsilon"]), load(folders["v_prediction"])
    from fewstep.api import average

    told = average(list(folders.values()), "uniform", tmp_path / "mean.safetensors")
    assert told["snapshots"] == 2
    mean, name = load(tmp_path / "mean.safetensors"), "network.unet.conv_in.weight"
    expected = (first.denoiser.state_dict()[name] + second.denoiser.state_dict()[name]) / 2
    assert torch.allclose(mean.denoiser.state_dict()[name], expected, atol=1e-7)


def test_the_latents_of_a_pipelines_vae_are_known(tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler

    folder = folder_of(tmp_path / "m", transformer(), DDIMScheduler(clip_sample=False), "transformer", "DiTPipeline")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.2,
        ).save_pretrained(folder / "vae")  # fmt: skip
    index = json.loads((folder / "model_index.json").read_text()) | {"vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    import_model(folder, tmp_path / "out", look=False)
    space = load(tmp_path / "out").info.latents
    assert load(folder).info.latents == space == replace(space, vae_sha256=load_vae(str(folder / "vae")).sha256)
    assert (space.resolution, space.shape, space.sigma_data) == (16, (4, 8, 8), 1.0)
    z = tensor_of(0, 2, 4, 8, 8)
    assert torch.allclose(space.normalise(z), 0.2 * z, atol=1e-6)  # as diffusers scales them
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "pictures.npz", images=pixels, labels=np.arange(12) % 10)
    told = {"vae": str(folder / "vae"), "encoding": Encoding(flip=False)}
    encode(
        DataSpec(str(tmp_path / "pictures.npz"), resolution=16),
        tmp_path / "z",
        **told,
        statistics=str(tmp_path / "out"),
    )
    images = open_images(DataSpec(str(tmp_path / "z")))  # on the model's scale, whatever these data's is
    check_latents(images, 1.0, load(folder).info)
    assert images.space.same_as(space)
    encode(DataSpec(str(tmp_path / "pictures.npz"), resolution=16), tmp_path / "own", **told, sigma_data=1.0)
    with pytest.raises(FewstepError, match="another VAE, size or statistics"):
        check_latents(open_images(DataSpec(str(tmp_path / "own"))), 1.0, load(folder).info)
    pixels_only = Architecture(UNet(16, (1,), layers=1, attention=(), head_dim=8, norm_groups=8), (3, 16, 16))
    save_model(tmp_path / "p.safetensors", pixels_only.build().state_dict(), ModelInfo(pixels_only, "diffusion"))
    with pytest.raises(FewstepError, match="is a model of images"):
        encode(
            DataSpec(str(tmp_path / "pictures.npz"), resolution=16),
            tmp_path / "no",
            **told,
            statistics=str(tmp_path / "p.safetensors"),
        )


# ---------------------------------------------------------------------------------------------------------- bad input


def refused(folder: Path, words: str) -> None:
    with pytest.raises(FewstepError, match=words):
        hub.read(folder)


def altered(folder: Path, file: str, **changes) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def plain(tmp_path) -> Path:
    from diffusers import DDPMScheduler

    return folder_of(tmp_path / "plain", unet(), DDPMScheduler())


def test_unknown_predictions_schedules_schedulers_and_networks_are_named(plain):
    scheduler = "scheduler/scheduler_config.json"
    altered(plain, scheduler, prediction_type="score")
    refused(plain, "unknown prediction type 'score'")
    altered(plain, scheduler, prediction_type="epsilon", beta_schedule="wavy")
    refused(plain, "unknown noise schedule 'wavy'")
    altered(plain, scheduler, beta_schedule="linear", _class_name="VQDiffusionScheduler")
    refused(plain, "VQDiffusionScheduler is unknown")
    altered(plain, scheduler, _class_name="DDPMScheduler")
    altered(plain, "unet/config.json", _class_name="UNet2DConditionModel")
    refused(plain, "is a UNet2DConditionModel")
    altered(plain, "unet/config.json", _class_name="UNet2DModel", layers_per_block=2)
    refused(plain, r"tensors do not fit(.|\n)*missing in the source")
    altered(plain, "unet/config.json", layers_per_block=1, down_block_types=["Nonsense", "AttnDownBlock2D"])
    refused(plain, "cannot build the UNet2DModel")


def test_names_of_before_2023_are_read_as_diffusers_reads_them(plain, tmp_path):
    from safetensors.torch import load_file, save_file

    file, before = plain / "unet" / "diffusion_pytorch_model.safetensors", load(plain)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def former(name: str) -> str:
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.") if ".attentions." in name else name
        return name

    tensors = {former(name): t.clone() for name, t in load_file(file).items()}
    assert any(".query." in name for name in tensors)
    save_file(tensors, file)
    altered(plain, "unet/config.json", some_old_option=3)
    assert load(plain).sha256 == before.sha256
    assert any("some_old_option" in note for note in hub.read(plain).notes)


def test_dits_by_their_former_class_name(tmp_path):
    from diffusers import DDIMScheduler

    folder = folder_of(tmp_path / "m", transformer(), DDIMScheduler(), "transformer", "DiTPipeline")
    before = load(folder)
    altered(folder, "transformer/config.json", _class_name="Transformer2DModel", num_vector_embeds=None)
    assert load(folder).sha256 == before.sha256
    assert not any(getattr(m, "dropout_prob", 0) for m in before.denoiser.modules())  # labels are never dropped


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out_channels": 1}, "makes 1 channels of 3"), ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"), ({"norm_num_groups": 0}, "cannot build"),
        ({"sample_size": None}, "no sample_size"), ({"in_channels": "x"}, "no sample_size"), ({"sample_size": [8]}, "damaged"),
    ],
)  # fmt: skip
def test_networks_that_mean_something_else_are_refused(plain, changes, words):
    altered(plain, "unet/config.json", **changes)
    refused(plain, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type='continuous'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        ({"_class_name": "CMStochasticIterativeScheduler", "sigma_min": 90}, "sigma_min 90"),
        ({"_class_name": "CMStochasticIterativeScheduler", "s_noise": 1.1}, "s_noise 1.1"),
        ({"num_train_timesteps": "abc"}, "damaged"), ({"beta_start": None}, "damaged"), ({"trained_betas": "abc"}, "damaged"),
    ],
)  # fmt: skip
def test_schedulers_that_mean_something_else_are_refused(plain, changes, words):
    altered(plain, "scheduler/scheduler_config.json", **changes)
    refused(plain, words)


def test_what_a_scheduler_leaves_out_is_its_own_default(plain):
    (plain / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "HeunDiscreteScheduler"}))
    speaks = hub.read(plain).architecture.network.parametrisation
    assert (speaks.beta_start, speaks.beta_end) == (0.00085, 0.012)


def test_variants_and_shards(plain, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, before = plain / "unet", load(plain).sha256
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    save_file({name: t.half() for name, t in tensors.items()}, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert load(plain).sha256 == before  # the full one
    file.unlink()
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert load(plain).sha256 == before
    for wrong in (
        {"weight_map": {"x": "../../secret.safetensors"}},
        {"weight_map": {"x": "/etc/passwd"}},
        {},
        [],
        {"weight_map": [1]},
    ):
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(wrong))
        refused(plain, "names no shards")


def test_unknown_models_are_still_combined_under_their_own_names(plain, tmp_path):
    from fewstep.snapshots import read_checkpoint

    altered(plain, "scheduler/scheduler_config.json", _class_name="ScoreSdeVeScheduler")
    stored = read_checkpoint(plain / "unet")
    assert stored.header == {}
    assert "conv_in.weight" in stored.tensors


def test_a_description_cannot_run_or_build_anything_else(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["notebook", "doctor"])
    arch = {
        "is": "fewstep.networks:Architecture",
        "shape": [3, 8, 8],
        "num_classes": 0,
        "sigma_data": 0.5,
        "sigma_min": 0.0,
    }
    for network in (
        {"is": "fewstep.__main__:Foo"},
        {"is": "fewstep.networks.stock:Stock", "model": "DiffusionPipeline", "config": "{}"},
        {"is": "os:system"},
    ):
        (plain / "fewstep.json").write_text(
            json.dumps({"architecture": {**arch, "network": network}, "kind": "diffusion"})
        )
        refused(plain, "does not fit this version")
    good = {"is": "fewstep.networks.unet:UNet"}
    for wrong in ({"kind": 7}, {"second_sigma": "no"}, {"latents": "x"}, {"architecture": 3}):
        told = {"architecture": {**arch, "network": good}, "kind": "diffusion"} | wrong
        (plain / "fewstep.json").write_text(json.dumps(told))
        refused(plain, "does not fit this version")


def test_an_import_never_hides_or_mixes_with_what_is_there(plain, tmp_path, gaussian):
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.json").write_text("{}")
    with pytest.raises(FewstepError, match="not empty"):
        import_model(plain, run, look=False)
    with pytest.raises(FewstepError, match="not empty"):
        import_model(plain, plain, look=False, overwrite=True)
    with pytest.raises(FewstepError, match="does not exist"):
        import_model(plain, tmp_path / "out", data=str(tmp_path / "nothing"))
    assert not (tmp_path / "out").exists()
    import_model(plain, tmp_path / "out")
    assert (tmp_path / "out" / "check.png").exists()
    import_model(plain, tmp_path / "out", look=False, overwrite=True)
    assert not (tmp_path / "out" / "check.png").exists()  # it was the former model's


def test_a_second_sigma_is_not_said_to_be_stored_in_anothers_file(plain, capsys):
    altered(plain, "scheduler/scheduler_config.json", _class_name="CMStochasticIterativeScheduler", sigma_min=0.002)
    args = ["evaluate", str(plain), "--data", "digits", "--search-sigma", "--num", "4"]
    assert main(args) == 2
    assert "`fewstep import` it first" in capsys.readouterr().err


def test_a_part_in_the_hubs_cache_is_not_the_whole(plain, tmp_path, monkeypatch):
    asked = []

    def snapshot(name, **options):
        asked.append(options.get("local_files_only", False))
        if options.get("local_files_only"):
            (tmp_path / "part" / "vae").mkdir(parents=True, exist_ok=True)
            return str(tmp_path / "part")
        return str(plain)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: ["unet/x.safetensors"])
    assert load("somebody/ddpm-tiny").info.kind == "diffusion"
    assert asked == [True, False]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(FewstepError, match="does not exist"):
        load("runs/etc")  # a mistyped path is not looked for on the hub
    assert len(asked) == 2


def test_code_that_comes_with_a_folder_is_refused_and_never_run(plain, tmp_path):
    (plain / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    (plain / "unet" / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    altered(plain, "model_index.json", unet=["evil", "UNet2DModel"])
    refused(plain, "needs code of its own for its unet")
    altered(plain, "model_index.json", unet=["diffusers", "UNet2DModel"], _class_name=["evil", "Pipeline"])
    refused(plain, "needs code of its own")
    altered(plain, "model_index.json", _class_name="DDPMPipeline", safety_checker=["os", "system"])
    refused(plain, "safety_checker")
    assert not (tmp_path / "sprung").exists()


def test_missing_and_extra_keys_make_a_table_and_strict_is_the_default(plain, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    file = plain / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(file).items()}
    lost = tensors.pop("conv_in.weight")
    save_file(tensors | {"surplus": torch.ones(2), "conv_in.bias": torch.ones(3)}, file)
    assert main(["import", str(plain), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    for words in ("conv_in.weight", "surplus", "unknown here", "here (8,)", "--no-strict"):
        assert words in said
    assert not (tmp_path / "out").exists()
    assert main(["import", str(plain), str(tmp_path / "out"), "--no-strict", "--no-check"]) == 0
    keys = {key["ours"] or key["theirs"]: key["remark"] for key in read_json(tmp_path / "out" / "import.json")["keys"]}
    assert keys["surplus"] == "unknown here: dropped"
    assert "initial values" in keys["network.unet.conv_in.weight"]
    assert load(tmp_path / "out").denoiser.network.unet.conv_in.weight.shape == lost.shape


def test_a_network_without_its_scheduler_says_nothing(plain, tmp_path):
    shutil.rmtree(plain / "scheduler")
    assert hub.read(plain / "unet") is None
    with pytest.raises(FewstepError, match="does not say what its weights predict"):
        import_model(plain / "unet", tmp_path / "out")
    with pytest.raises(FewstepError, match="does not say what network"):
        load(plain / "unet")


def test_a_hub_name_offline_says_how_to_get_it(tmp_path, capsys):
    assert main(["import", "nobody/ddpm-nothing", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "hf download nobody/ddpm-nothing" in said
    assert main(["train", "ect", "--init", "nobody/ddpm-nothing", "--dry-run"]) == 2
    assert "hf download nobody/ddpm-nothing" in capsys.readouterr().err


def test_a_copy_in_the_hubs_cache_is_found_without_a_network(plain, tmp_path, monkeypatch):
    asked = []

    def snapshot(name, **options):
        asked.append((name, options.get("local_files_only")))
        return str(plain)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert load("somebody/ddpm-tiny").info.kind == "diffusion"
    assert asked == [("somebody/ddpm-tiny", True)]


def test_a_model_of_ours_is_none_of_others(tmp_path):
    arch = Architecture(UNet(16, (1,), layers=1, attention=(), head_dim=8, norm_groups=8), (3, 8, 8))
    save_model(tmp_path / "m.safetensors", arch.build().state_dict(), ModelInfo(arch, "consistency"))
    assert hub.read(tmp_path / "m.safetensors") is None
    with pytest.raises(FewstepError, match="does not say what its weights predict"):
        import_model(tmp_path / "m.safetensors", tmp_path / "out")


def test_a_stock_network_draws_and_takes_dropout(folders):
    model = load(folders["epsilon"])
    arch = model.info.architecture
    images = next(iter(Generator(model.denoiser, arch.shape)(Heun.karras(3), 2)))
    assert images.shape == (2, 3, SIZE, SIZE)
    wet = replace(arch, network=replace(arch.network, dropout=0.5)).build()
    assert any(isinstance(m, torch.nn.Dropout) and m.p == 0.5 for m in wet.modules())
    assert Scaled().raw(images, images, torch.zeros(2)) is images
