"""The page of `fewstep serve`: what it draws is what `fewstep.sample` makes, and it keeps to this machine."""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import fewstep
from fewstep import codec
from fewstep.cli import main
from fewstep.ema import ConstantEMA
from fewstep.files import write_json
from fewstep.model import ModelInfo, load, save_model
from fewstep.networks import MLP, Architecture
from fewstep.pictures import grid
from fewstep.recipes import recipe
from fewstep.samplers import FewStep
from fewstep.serve import EACH, MOST, Request, Studio, caption, controls, details, saved
from fewstep.serve_cli import check_free, loopback, page, serve, serving
from fewstep.types import FewstepError

NAMES = ("cat", "1", "0")  # by number, class 1 is called 1 and class 2 is called 0
SMALL = Architecture(MLP(width=16, depth=1), (1, 8, 8), num_classes=3)
INFO = ModelInfo(SMALL, "consistency", nimg=500, class_names=NAMES, second_sigma=0.5)


def weights(file: Path, seed: int, info: ModelInfo = INFO) -> str:
    """A model of random weights, no layer zero; returns its hash."""
    chance, tensors = torch.Generator().manual_seed(seed), info.architecture.build().state_dict()
    noisy = {
        k: v + 0.3 * torch.randn(v.shape, generator=chance) if v.is_floating_point() else v for k, v in tensors.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    return save_model(file, noisy, info)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A consistency run, whose ema-0.9 is its best, a search over its snapshots, a diffusion run, other networks."""
    weights(tmp_path / "ect/snapshots/000000000250.safetensors", 1)
    weights(tmp_path / "ect/snapshots/000000000500.safetensors", 2)
    for name in ("ema-0.9", "best"):
        weights(tmp_path / f"ect/averages/{name}.safetensors", 3, replace(INFO, weights="ema-0.9"))
    weights(tmp_path / "ect/averages/ema-0.7-snapshots.safetensors", 4, replace(INFO, weights="ema-0.7-snapshots"))
    weights(tmp_path / "lcsc/combined.safetensors", 5, replace(INFO, weights="lcsc"))
    sources = [{"path": str(tmp_path / f"ect/snapshots/{n:012d}.safetensors"), "nimg": n} for n in (250, 500)]
    candidates = {
        "ema": {"profile": "ema:0.7"},
        "power": {"profile": "power:0.1"},
        "uniform": {},
        "last": {"profile": ""},
    }
    told = {"run": str(tmp_path / "ect"), "snapshots": sources, "candidates": candidates}
    write_json(tmp_path / "lcsc/result.json", told)
    weights(tmp_path / "edm/snapshots/000000000500.safetensors", 6, replace(INFO, kind="diffusion"))
    plain = replace(INFO, architecture=replace(SMALL, num_classes=0), class_names=())
    weights(tmp_path / "plain.safetensors", 7, plain)
    weights(
        tmp_path / "large.safetensors", 8, replace(plain, architecture=replace(plain.architecture, shape=(1, 16, 16)))
    )
    return tmp_path


@pytest.fixture
def studio(runs: Path) -> Studio:
    models = ("ect", "lcsc", "edm", "plain.safetensors", "large.safetensors")
    return Studio([str(runs / name) for name in models])


def pixels(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


# --- which weights -----------------------------------------------------------------------------------------------------


def test_every_set_of_weights_has_a_name_and_the_best_comes_first(studio: Studio) -> None:
    ect = ["ect:best", "ect:ema-0.7-snapshots", "ect:ema-0.9", "ect:online"]
    assert studio.weights() == [*ect, "lcsc", "edm:online", "plain.safetensors", "large.safetensors"]
    assert studio.info("ect:best").weights == "ema-0.9"
    assert studio.file("ect:online").name == "000000000500.safetensors"


def test_averages_are_in_the_recipes_order(runs: Path) -> None:
    plan = replace(recipe("ect", "digits"), averages=(ConstantEMA(0.9), ConstantEMA(0.7)))
    write_json(runs / "ect/recipe.json", codec.encode(plan))
    weights(runs / "ect/averages/ema-0.7.safetensors", 11)
    names = ["best", "ema-0.9", "ema-0.7", "ema-0.7-snapshots", "online"]
    assert Studio([str(runs / "ect")]).weights() == [f"ect:{name}" for name in names]


def test_a_search_brings_what_it_was_compared_with(runs: Path) -> None:
    alone = Studio([str(runs / "lcsc")])
    assert alone.weights() == ["lcsc", "lcsc, best EMA", "lcsc, last snapshot"]  # no average power-0.1 was made
    assert alone.file("lcsc, best EMA").name == "ema-0.7-snapshots.safetensors"
    assert alone.file("lcsc, last snapshot").name == "000000000500.safetensors"
    shutil.rmtree(runs / "ect")
    assert Studio([str(runs / "lcsc")]).weights() == ["lcsc"]


def test_one_set_by_its_name_and_equal_last_parts_told_apart(runs: Path) -> None:
    shutil.copytree(runs / "ect", runs / "other/ect")
    both = Studio([f"{runs / 'ect'}:online", f"{runs / 'other/ect'}:online"])
    assert both.weights() == [f"{runs.name}/ect:online", "other/ect:online"]


@pytest.mark.parametrize("model", ["nowhere", "ect:ema-0.5", "empty", "lcsc/result.json"])
def test_what_holds_no_model_is_refused_at_once(runs: Path, model: str) -> None:
    (runs / "empty").mkdir()
    with pytest.raises(FewstepError):
        Studio([str(runs / "ect"), str(runs / model)])


def test_weights_written_anew_are_drawn_anew_and_few_are_kept(studio: Studio, runs: Path) -> None:
    studio.kept = 2
    before = studio.draw(Request(weights="ect:online"))
    assert studio.model("ect:online") is studio.model("ect:online")
    digest = weights(runs / "ect/snapshots/000000000750.safetensors", 9)
    after = studio.draw(Request(weights="ect:online"))
    assert after.told["panels"][0]["model_sha256"] == digest != before.told["panels"][0]["model_sha256"]
    digest = weights(runs / "ect/snapshots/000000000750.safetensors", 10, replace(INFO, second_sigma=0.7))  # in place
    (anew,) = studio.draw(Request(weights="ect:online", steps=2)).told["panels"]
    assert (anew["model_sha256"], anew["sigmas"]) == (digest, [80.0, 0.7])
    for name in studio.weights():
        studio.model(name)
        assert len(studio.loaded) <= 2


# --- what is drawn -----------------------------------------------------------------------------------------------------


def test_a_seed_is_a_picture(studio: Studio) -> None:
    first, again, other = (studio.draw(Request(weights="lcsc", seed=seed)) for seed in (1, 1, 2))
    assert pixels(first.image) == pixels(again.image) != pixels(other.image)


def test_side_by_side_is_the_same_noise_and_labels(studio: Studio) -> None:
    drawing = studio.draw(Request(weights="ect:best", compare="ect:ema-0.9", steps=2, label=EACH))
    image, (a, b) = drawing.image, drawing.told["panels"]
    left, right = (image.crop((x, 34, x + (image.width - 60) // 2, image.height)) for x in (20, image.width // 2 + 10))
    assert a["model_sha256"] == b["model_sha256"]
    assert pixels(left) == pixels(right)
    assert len(set(left.convert("L").getdata())) > 10
    differs = studio.draw(Request(weights="ect:best", compare="lcsc", steps=2, label=EACH)).image
    assert pixels(differs.crop((0, 34, image.width // 2, image.height))) == pixels(
        image.crop((0, 34, image.width // 2, image.height))
    )
    assert pixels(differs) != pixels(image)


def test_sigma_is_of_the_second_step_and_the_models_own_unless_given(studio: Studio) -> None:
    def drawn(steps: int, sigma: float | None) -> bytes:
        return pixels(studio.draw(Request(weights="lcsc", steps=steps, second_sigma=sigma)).image)

    assert drawn(1, 0.2) == drawn(1, 5.0)
    assert drawn(2, 0.2) != drawn(2, 5.0)
    assert drawn(2, 0.5) == drawn(2, None)
    assert drawn(3, 0.5) != drawn(2, 0.5)


def test_each_kind_is_sampled_in_its_own_way(studio: Studio) -> None:
    ticks: list[tuple[int, int]] = []
    request = Request(weights="lcsc", compare="edm:online", steps=3, solver_steps=4)
    few, solver = studio.draw(request, lambda done, total: ticks.append((done, total))).told["panels"]
    assert (few["sampler"], few["nfe"], few["sigmas"][-1]) == ("FewStep", 3, 0.5)
    assert (solver["sampler"], solver["nfe"], len(solver["sigmas"])) == ("Heun", 7, 4)
    assert ticks == [(k, 10) for k in range(1, 11)]


def test_a_column_is_a_class(studio: Studio) -> None:
    each = studio.draw(Request(weights="lcsc", label=EACH, num=16, seed=4))
    assert (each.told["num"], each.told["columns"], each.told["label"]) == (15, 3, [0, 1, 2])
    model = load(studio.file("lcsc"))
    for k, name in enumerate(NAMES):
        images = fewstep.sample(model, num=15, seed=4, label=name)[k::3]
        column = grid(images, 1, cell=160)
        x = k * (column.width + 2)
        assert pixels(each.image.crop((x, 0, x + column.width, column.height))) == pixels(column)
        assert pixels(studio.draw(Request(weights="lcsc", label=name)).image) == pixels(
            grid(fewstep.sample(model, num=16, label=name), 4, cell=160)
        )


def test_latents_are_decoded(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = studio.draw(Request(weights="lcsc"))
    monkeypatch.setattr("fewstep.fitness.decoder", lambda space, device: torch.nn.Upsample(scale_factor=4))
    decoded = studio.draw(Request(weights="lcsc"))
    assert pixels(decoded.image) == pixels(grid(fewstep.sample(load(studio.file("lcsc")), num=16), 4, cell=160))
    assert pixels(decoded.image) != pixels(plain.image)


@pytest.mark.parametrize(
    "request_",
    [
        Request(weights="lcsc", label=EACH), Request(weights="lcsc", label="0", steps=2, second_sigma=0.3),
        Request(weights="plain.safetensors", num=5, seed=3), Request(weights="edm:online", label="cat", solver_steps=3),
        Request(weights="lcsc", compare="plain.safetensors", label="1"),
    ],
)  # fmt: skip
def test_what_is_told_makes_the_same_pixels(studio: Studio, request_: Request) -> None:
    drawing = studio.draw(request_)
    told, grids = json.loads(json.dumps(drawing.told)), []
    for one in told["panels"]:
        made: dict[str, Any] = {}
        exec(one["python"], made)
        assert made["images"].shape == (told["num"], 1, 8, 8)
        grids.append(grid(made["images"], told["columns"], cell=160 if len(told["panels"]) == 1 else 110))
        assert made["model"].sha256 == one["model_sha256"]
    if len(grids) == 1:
        assert pixels(grids[0]) == pixels(drawing.image)
    for k, picture in enumerate(grids if len(grids) > 1 else []):
        x = 20 + k * (picture.width + 20)
        assert pixels(drawing.image.crop((x, 34, x + picture.width, 34 + picture.height))) == pixels(picture)


def test_the_command_makes_the_same_images_where_there_is_one(
    studio: Studio, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (one,) = studio.draw(Request(weights="lcsc", label="0", steps=2, num=5, seed=2)).told["panels"]
    assert main([*shlex.split(one["command"])[1:], "--out", str(tmp_path / "out.png")]) == 0
    capsys.readouterr()
    images = fewstep.sample(load(studio.file("lcsc")), steps=2, num=5, seed=2, label="0")
    assert pixels(Image.open(tmp_path / "out.png")) == pixels(grid(images, 5))
    for request in (Request(weights="lcsc", label=EACH), Request(weights="lcsc", steps=2, second_sigma=0.3)):
        assert studio.draw(request).told["panels"][0]["command"] is None


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(weights="nowhere"), "unknown weights"), (Request(weights=""), "unknown weights"),
        (Request(weights="lcsc", compare="nowhere"), "lcsc"), (Request(weights="lcsc", label="dog"), "cat, 1, 0"),
        (Request(weights="plain.safetensors", label="cat"), "unconditional"),
        (Request(weights="plain.safetensors", label=EACH), "unconditional"),
        (Request(weights="lcsc", compare="large.safetensors"), "other sizes"),
        (Request(weights="lcsc", seed=-1), "seed"), (Request(weights="lcsc", steps=0), "--steps"),
        (Request(weights="lcsc", steps=2, second_sigma=90.0), "decreasing"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_says_why(studio: Studio, request_: Request, words: str) -> None:
    with pytest.raises(FewstepError, match=words):
        studio.draw(request_)


@pytest.mark.parametrize("wrong", [{"num": 0}, {"num": MOST + 1}, {"steps": 1001}, {"solver_steps": 1001}])
def test_too_many_or_none_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(FewstepError):
        Request(weights="lcsc", **wrong)


# --- the page's values -------------------------------------------------------------------------------------------------


def test_controls_follow_the_weights(studio: Studio) -> None:
    def visible(*values: Any) -> set[str]:
        return {name for name, change in controls(studio, *values).items() if change.get("visible")}

    always = {"compare"}
    assert visible("lcsc", "", EACH, 1, None) == always | {"label", "steps"}
    assert visible("lcsc", "", EACH, 2, None) == always | {"label", "steps", "sigma", "log_sigma"}
    assert visible("edm:online", "", EACH, 2, None) == always | {"label", "solver_steps"}
    assert visible("plain.safetensors", "edm:online", "", 1, None) == always | {"label", "steps", "solver_steps"}
    assert visible("plain.safetensors", "", EACH, 1, None) == always | {"steps"}
    fresh, moved = controls(studio, "lcsc", "lcsc", "dog", 2, None), controls(studio, "lcsc", "", "cat", 2, 3.0)
    assert (fresh["sigma"]["value"], moved["sigma"]["value"]) == (0.5, 3.0)
    assert (fresh["label"]["value"], moved["label"]["value"]) == (EACH, "cat")
    assert fresh["compare"]["value"] == ""
    assert controls(studio, "plain.safetensors", "", "cat", 1, None)["label"]["value"] == ""


def test_captions_fit() -> None:
    assert caption("short", 100) == "short"
    cut = caption("A  a/very/long/path/to/some/run:ema-0.999, NFE 2", 200)
    assert len(cut) == 22
    assert cut.startswith("A  a")
    assert cut.endswith(", NFE 2")


def test_files_and_details(studio: Studio, tmp_path: Path) -> None:
    drawing = studio.draw(Request(weights="lcsc", compare="edm:online", seed=7))
    picture, told = map(Path, saved(drawing, tmp_path / "files"))
    assert picture.name == "lcsc-edm-online-seed-7.png"
    assert pixels(Image.open(picture)) == pixels(drawing.image)
    assert json.loads(told.read_text()) == drawing.told
    text = details(drawing.told)
    assert "16 images of seed 7" in text
    assert "NFE 35 at σ 80, " in text
    assert drawing.told["panels"][0]["model_sha256"][:12] in text


# --- the server --------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server sets in it is undone."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_TEMP_DIR", "no_proxy"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a cluster's: nothing that we ask for may go there


@pytest.fixture
def url(studio: Studio, environment: None) -> Iterator[str]:
    pytest.importorskip("gradio")
    with serving(studio, "127.0.0.1", free_port(), num=6) as address:
        yield address


def get(url: str) -> Any:
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20)


def test_the_page_is_there_keeps_to_itself_and_draws(url: str, studio: Studio) -> None:
    answer = get(url)
    text = answer.read().decode()
    assert answer.status == 200
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert "fonts.googleapis" not in text
    assert "6 images of seed 0" in text  # drawn before anybody asked

    from gradio_client import Client

    client = Client(url, verbose=False)
    image, told, program, *files = client.predict(
        "lcsc", "ect:best", 5, "cat", 2, 18, 0.3, 9, api_name="/draw"
    )  # fmt: skip
    drawing = studio.draw(
        Request(weights="lcsc", compare="ect:best", seed=5, label="cat", steps=2, second_sigma=0.3, num=9)
    )
    assert pixels(Image.open(image)) == pixels(Image.open(files[0])) == pixels(drawing.image)
    assert "9 images of seed 5" in told
    assert repr(FewStep((80.0, 0.3))) in program
    assert json.loads(Path(files[1]).read_text())["panels"][1]["weights"] == "ect:best"
    with pytest.raises(Exception, match="this model knows cat"):
        client.predict("lcsc", "", 5, "dog", 2, 18, 0.3, 9, api_name="/draw")


def test_closed_is_closed(studio: Studio, environment: None) -> None:
    pytest.importorskip("gradio")
    port = free_port()
    with serving(studio, "127.0.0.1", port), pytest.raises(FewstepError, match=rf"{port}.*--port {port % 65535 + 1}"):
        check_free("127.0.0.1", port)
    check_free("127.0.0.1", port)
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()


def test_the_page_builds_for_one_unconditional_model(runs: Path, tmp_path: Path, environment: None) -> None:
    pytest.importorskip("gradio")
    blocks = page(Studio([str(runs / "plain.safetensors")]), tmp_path / "files", 4)
    shown = {c["props"].get("label"): c["props"].get("visible") for c in blocks.config["components"]}
    assert shown["Class"] is shown["Beside them, from the same noise"] is shown["Heun steps"] is False
    assert shown["Consistency steps"] is shown["Images"] is True


def test_missing_gradio_says_how_to_get_it(studio: Studio, monkeypatch: pytest.MonkeyPatch, environment: None) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with (
        pytest.raises(FewstepError, match=r"pip install 'fewstep\[serve\]'"),
        serving(studio, "127.0.0.1", free_port()),
    ):
        pass


def test_hosts_and_ports() -> None:
    assert all(map(loopback, ("127.0.0.1", "127.1.2.3", "localhost", "::1")))
    assert not any(map(loopback, ("0.0.0.0", "192.168.0.5", "example.org")))
    for host, port in (("127.0.0.1", 0), ("127.0.0.1", 65536), ("203.0.113.7", 7860), ("no.such.host.invalid", 7860)):
        with pytest.raises(FewstepError, match="--port"):
            check_free(host, port)


def test_options_are_checked_first(runs: Path) -> None:
    with pytest.raises(FewstepError, match="fewstep serve RUN"):
        serve()
    with pytest.raises(FewstepError, match="--num"):
        serve(str(runs / "ect"), num=MOST + 1)


def test_importing_costs_no_gradio() -> None:
    told = "print(*(name in sys.modules for name in ('torch', 'gradio')))"
    program = f"import sys, fewstep.serve_cli; {told}; import fewstep.serve; {told}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "True", "False"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_as_it_ends_other_verbs(runs: Path, number: signal.Signals, code: int) -> None:
    pytest.importorskip("gradio")
    program = (
        "import sys; from fewstep import cli, serve_cli; cli.VERBS['serve'] = serve_cli.serve; sys.exit(cli.main())"
    )
    command = [sys.executable, "-c", program, "serve", str(runs / "ect"), "--port", str(free_port()), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        address = process.stderr.readline().split()[0]
        assert get(address).status == 200
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    assert err.strip() == "fewstep: the page is closed"


@pytest.mark.slow
def test_a_browser_shows_a_picture_at_once(url: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no chromium")
    began = time.monotonic()
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=15000", "--enable-logging=stderr", "--dump-dom",
            url,
        ], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "6 images of seed 0" in done.stdout, f"{time.monotonic() - began:.0f} s: {done.stderr[-2000:]}"
    assert "<img" in done.stdout
    assert "Content Security Policy" not in done.stderr
