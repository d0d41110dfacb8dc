"""The command line: every verb, and for bad input one clear line, exit code 2, nothing lost."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fewstep
from fewstep.cli import VERBS, main
from fewstep.networks import UNet
from fewstep.recipes import recipe
from fewstep.run import train

TINY = UNet(channels=8, multipliers=(1,), layers=1, attention=(), norm_groups=4, head_dim=8)
SMALL = [
    "--network.channels", "8", "--network.multipliers", "1", "--network.layers", "1", "--network.norm-groups", "4",
    "--total-nimg", "128", "--batch-size", "32", "--log-nimg", "64", "--snapshot-nimg", "64", "--grid-nimg", "0",
    "--averages", "ema-0.9", "power-0.1", "--evaluation.every-nimg", "0", "--device", "cpu",
]  # fmt: skip
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """main(arguments) -> (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion run and a consistency run tuned from it, both tiny and class-conditional."""
    folder = tmp_path_factory.mktemp("runs")
    short = {"network": TINY, "total_nimg": 128, "batch_size": 32, "log_nimg": 64, "snapshot_nimg": 64, "grid_nimg": 0}
    train(replace(recipe("edm", "digits"), **short), folder / "edm", device="cpu", quiet=True)
    ect = recipe("ect", "digits")
    ect = replace(ect, **short, evaluation=replace(ect.evaluation, every_nimg=128, num=50))
    train(ect, folder / "ect", init=fewstep.load(folder / "edm"), device="cpu", quiet=True)
    return folder


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that holds the words."""
    code, out, err = result
    errors = [line for line in err.splitlines() if line.startswith("fewstep: error:")]
    assert code == 2, err
    assert out == ""
    assert len(errors) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in errors[0], errors[0]


# --- the verbs ---------------------------------------------------------------------------------------------------------


def test_help_needs_neither_torch_nor_a_second() -> None:
    program = (
        "import sys, fewstep.cli; code = fewstep.cli.main(['--help']); sys.exit(code or 3 * ('torch' in sys.modules))"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert time.monotonic() - began < 20  # torch's import is what must not happen; the second itself is in benchmarks/


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "train"])
def test_every_verb_explains_every_option(call: Call, verb: str) -> None:
    code, out, _ = call(verb, "--help")
    assert code == 0
    assert f"usage: fewstep {verb}" in out


def test_train_help_lists_recipes_and_every_field_of_one(call: Call) -> None:
    code, out, _ = call("train", "--help")
    assert code == 0
    assert "cifar10-1hour" in out
    code, out, _ = call("train", "ect", "--help")
    assert code == 0
    for option in ("--objective.pairs.q", "--network.channels", "--lr.peak", "--averages", "--data.resolution"):
        assert option in out


def test_train_writes_a_run_and_prints_its_result_as_json(call: Call, tmp_path: Path) -> None:
    code, out, err = call("train", "edm", "--preset", "digits", "--data", "digits", "--out", tmp_path / "run", *SMALL)
    assert code == 0, err
    assert json.loads(out)["nimg"] == 128
    stored = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert stored["network"]["channels"] == 8
    assert stored["data"]["source"] == "digits"
    code, out, err = call("train", "edm", "--out", tmp_path / "run", "--resume")
    assert code == 0, err  # already complete: nothing to do, nothing lost


def test_ect_inherits_network_and_classes_from_its_start(call: Call, runs: Path, tmp_path: Path) -> None:
    arguments = SMALL[SMALL.index("--total-nimg") :]
    code, _, err = call(
        "train", "ect", "--data", "digits", "--init", runs / "edm", "--out", tmp_path / "ect", *arguments
    )
    assert code == 0, err
    model = fewstep.load(tmp_path / "ect")
    assert model.info.architecture.num_classes == 10
    assert model.info.initialised_from == fewstep.load(runs / "edm").sha256


def test_dry_run_tells_the_published_size_and_cost(call: Call) -> None:
    code, out, err = call("train", "ect", "--preset", "cifar10-200k", "--dry-run")
    assert code == 0, err
    cost = json.loads(out)
    assert cost["parameters"] == 55_733_891
    assert cost["steps"] == 200_000
    assert "55.7M parameters" in err
    assert "3.86 / 2.15" in err


def test_sample_makes_a_grid_or_a_folder_of_the_same_images(call: Call, runs: Path, tmp_path: Path) -> None:
    code, out, err = call("sample", runs / "ect", "--steps", 2, "--num", 5, "--label", 3, "--out", tmp_path / "g.png")
    assert code == 0, err
    told = json.loads(out)
    assert told["nfe"] == 2
    assert told["label"] == 3
    assert Image.open(tmp_path / "g.png").width > 5 * 30
    for batch in (2, 5):
        call("sample", runs / "ect", "--num", 5, "--out", tmp_path / f"b{batch}", "--batch", batch)
    names = [f"{i:06d}.png" for i in range(5)]
    assert sorted(p.name for p in (tmp_path / "b2").iterdir()) == names
    for name in names:
        pair = [Image.open(tmp_path / folder / name) for folder in ("b2", "b5")]
        assert pair[0].size == (8, 8)
        low, high = (torch.tensor(list(p.convert("L").tobytes())).float() for p in pair)
        assert (low - high).abs().max() <= 1


def test_evaluate_prints_stamped_records_and_stores_the_sigma_it_found(call: Call, runs: Path) -> None:
    code, out, err = call(
        "evaluate", runs / "ect", "--data", "digits", "--steps", "1,2", "--metrics", "fd,kid", "--num", 60, "--seeds", 2,
        "--search-sigma",
    )  # fmt: skip
    assert code == 0, err
    records = json.loads(out)
    assert [(r["metric"], r["nfe"]) for r in records] == [("fd", 1), ("kid", 1), ("fd", 2), ("kid", 2)]
    assert all(len(r["values"]) == 2 and r["reference"] == "digits[train]" for r in records)
    found = fewstep.load(runs / "ect").info.second_sigma
    assert records[-1]["sigmas"] == [80.0, found]
    assert 0.05 < found < 9


def test_a_diffusion_models_solver_can_be_chosen(call: Call, runs: Path, tmp_path: Path) -> None:
    pictures = {}
    for solver, name, nfe in ((None, "Heun", 7), ("heun", "Heun", 7), ("dpm", "DPMSolver", 4)):
        choice = ("--solver", solver) if solver else ()
        out = tmp_path / f"{solver}.png"
        code, told, err = call("sample", runs / "edm", "--steps", 4, "--num", 4, "--out", out, *choice)
        assert code == 0, err
        assert (json.loads(told)["sampler"], json.loads(told)["nfe"]) == (name, nfe)
        pictures[solver] = out.read_bytes()
        measure = ("evaluate", runs / "edm", "--data", "digits", "--steps", 4, "--num", 50, "--seeds", 1)
        record = json.loads(call(*measure, *choice)[1])[0]
        assert (record["sampler"], record["nfe"]) == (name, nfe)
    assert pictures[None] == pictures["heun"] != pictures["dpm"]


def test_a_solver_that_cannot_be_is_refused(call: Call, runs: Path) -> None:
    refused(call("sample", runs / "ect", "--solver", "dpm"), "--solver", "diffusion")
    refused(call("evaluate", runs / "ect", "--data", "digits", "--solver", "heun"), "--solver", "diffusion")
    assert call("sample", runs / "edm", "--solver", "rk45")[0] == 2
    info = fewstep.load(runs / "edm").info
    assert info.sampler(3, "") == info.sampler(3, None) == info.sampler(3, "heun") == info.sampler(3)
    with pytest.raises(fewstep.FewstepError, match="use heun or dpm"):
        info.sampler(3, "rk45")


def test_report_is_written_beside_the_run(call: Call, runs: Path) -> None:
    code, out, err = call("report", runs / "edm", runs / "ect")
    assert code == 0, err
    assert "<html" in Path(json.loads(out)["report"]).read_text()


def test_doctor_examines(call: Call) -> None:
    code, out, err = call("doctor")
    assert code in (0, 1), err
    assert {finding["name"] for finding in json.loads(out)} >= {"python", "torch", "disk"}


def test_python_api_of_the_readme(runs: Path) -> None:
    model = fewstep.load(runs / "ect")
    images = fewstep.sample(model, steps=2, num=3, label=7, seed=0)
    assert images.shape == (3, 1, 8, 8)
    assert images.dtype == torch.uint8
    x, label = torch.zeros(4, 1, 8, 8), torch.arange(4)
    losses = fewstep.loss(model, fewstep.get_recipe("ect").objective, x, label)
    assert losses["consistency"].isfinite()
    assert fewstep.evaluate(model, "digits", num=50, seeds=1)[0].metric == "fd"


# --- bad input ---------------------------------------------------------------------------------------------------------


def test_unknown_verbs_recipes_and_presets_name_the_known_ones(call: Call) -> None:
    refused(call("tarin"), "unknown verb 'tarin'", "train")
    refused(call("train", "etc"), "unknown recipe 'etc'", "ect")
    refused(call("train", "ect", "--preset", "x"), "no preset 'x'", "cifar10-1hour")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "RUN"], ["--data"]),
        (["--data", "digits"], ["--out"]),
        (["--data", "missing/", "--out", "RUN"], ["missing/ does not exist"]),
        (["--data", "EMPTY", "--out", "RUN"], ["no images"]),
        (["--data", "MIXED", "--out", "RUN"], ["--data.resolution"]),
        (["--data", "PLAIN", "--conditional", "--out", "RUN"], ["no labels"]),
        (["--data", "digits", "--out", "RUN", "--batch-size", "0"], ["--batch-size"]),
        (["--data", "digits", "--out", "RUN", "--device", "cuda"], ["--device cpu"]),
        (["--data", "digits", "--out", "RUN", "--resume"], ["does not exist"]),
        (["--data", "digits", "--out", "EMPTY", "--init", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_training_input(call: Call, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for name in ("EMPTY", "MIXED", "PLAIN"):
        (tmp_path / name).mkdir()
    for size in (8, 16):
        Image.new("L", (size, size)).save(tmp_path / "MIXED" / f"{size}.png")
        for i in range(20):
            Image.new("L", (8, 8), size).save(tmp_path / "PLAIN" / f"{size}-{i}.png")
    places = {name: str(tmp_path / name) for name in ("RUN", "EMPTY", "MIXED", "PLAIN")}
    refused(call("train", "edm", *(places.get(a, a) for a in arguments)), *words)
    assert not (tmp_path / "RUN" / "snapshots").exists()


def test_a_used_run_directory_is_refused_and_left_alone(call: Call, runs: Path) -> None:
    before = {p: p.read_bytes() for p in (runs / "edm").rglob("*.safetensors")}
    refused(call("train", "edm", "--preset", "digits", "--out", runs / "edm", *SMALL), "--resume", "--overwrite")
    refused(call("train", "ect", "--out", runs / "edm", "--resume"), "is a run of edm")
    refused(call("train", "edm", "--out", runs / "edm", "--resume", "--lr.peak", "1"), "lr", "--init")
    assert {p: p.read_bytes() for p in (runs / "edm").rglob("*.safetensors")} == before


def test_starting_from_another_architecture_says_what_differs(call: Call, runs: Path, tmp_path: Path) -> None:
    arguments = ["--data", "digits", "--init", runs / "edm", "--network.layers", "2", "--out", tmp_path / "x"]
    refused(call("train", "ect", *arguments), "another architecture", "--network")


def test_a_run_that_cannot_begin_does_not_cost_the_one_it_would_replace(call: Call, runs: Path, tmp_path: Path) -> None:
    code, _, err = call("train", "edm", "--preset", "digits", "--out", tmp_path / "old", *SMALL)
    assert code == 0, err
    before = {p: p.read_bytes() for p in (tmp_path / "old").rglob("*.safetensors")}
    again = ("--out", tmp_path / "old", "--overwrite", "--data", "digits")
    refused(call("train", "ect", "--init", runs / "edm", "--network.layers", "2", *again), "another architecture")
    refused(call("train", "edm", "--network.norm-groups", "7", *again), "norm-groups")
    every = ("--evaluation.every-nimg", "64")
    refused(call("train", "edm", *every, "--evaluation.extractor", "vgg", *again), "vgg")
    assert {p: p.read_bytes() for p in (tmp_path / "old").rglob("*.safetensors")} == before


def test_resume_refuses_what_would_not_be_the_same_run(call: Call, tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "run"
    folder.mkdir()
    for i in range(24):
        Image.new("L", (8, 8), 10 * i).save(folder / f"{i}.png")
    code, _, err = call(
        "train", "edm", "--data", folder, "--data.heldout", 0, "--out", out, "--network.head-dim", 8, *SMALL
    )
    assert code == 0, err
    resume = ("train", "edm", "--out", out, "--resume")
    refused(call(*resume, "--preset", "digits"), "--preset")
    refused(call(*resume, "--init", out), "leave out --init")
    Image.new("L", (8, 8)).save(folder / "new.png")
    refused(call(*resume), "the data are not those")
    (folder / "new.png").unlink()
    code, _, err = call(*resume)
    assert code == 0, err


def test_training_images_are_never_called_held_out(call: Call, runs: Path) -> None:
    measure = (
        "evaluate",
        runs / "edm",
        "--data",
        "digits",
        "--reference",
        "heldout",
        "--num",
        50,
        "--seeds",
        1,
        "--steps",
        1,
    )
    refused(call(*measure, "--heldout", "0.3"), "trained with 0.1 held out")
    code, out, err = call(*measure)
    assert code == 0, err
    assert json.loads(out)[0]["reference_n"] == 180


def test_published_figures_are_not_quoted_for_another_recipe(call: Call) -> None:
    changed = json.loads(call("train", "ect", "--preset", "cifar10-200k", "--total-nimg", "4000", "--dry-run")[1])
    assert changed["published"] == ""


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seed", "-1"), ("--network.dropout", "2"), ("--lr.peak", "-1"), ("--sigma-data", "0"), ("--sigma-data", "0.25"),
     ("--second-sigma", "0"), ("--evaluation.steps", "0"), ("--optimizer.betas", "2 2")],
)  # fmt: skip
def test_impossible_values_are_refused_before_anything_is_made(
    call: Call, tmp_path: Path, option: str, value: str
) -> None:
    code, out, err = call("train", "edm", "--data", "digits", "--out", tmp_path / "x", option, *value.split())
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert option.split(".")[-1].strip("-") in err or "--optimizer" in err, err
    assert not (tmp_path / "x").exists()


def test_images_are_not_mixed_into_a_used_folder(call: Call, runs: Path, tmp_path: Path) -> None:
    sample = ("sample", runs / "ect", "--num", 2, "--out", tmp_path / "s")
    assert call(*sample)[0] == 0
    refused(call(*sample, "--seed", 1), "--overwrite")
    assert call(*sample, "--overwrite")[0] == 0


def test_bad_models(call: Call, runs: Path, tmp_path: Path) -> None:
    whole = next((runs / "ect" / "snapshots").iterdir()).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    flipped = bytearray(whole)
    flipped[-50] ^= 4
    (tmp_path / "flipped.safetensors").write_bytes(flipped)
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    save_file({"a": torch.zeros(1)}, str(tmp_path / "foreign.safetensors"))
    refused(call("sample", tmp_path / "cut.safetensors"), "damaged")
    refused(call("sample", tmp_path / "flipped.safetensors"), "damaged")
    refused(call("sample", tmp_path / "model.pt"), "pickle")
    refused(call("sample", tmp_path / "foreign.safetensors"), "not a fewstep")
    refused(call("sample", tmp_path / "nothing"), "does not exist")
    refused(call("sample", f"{runs / 'ect'}:ema-0.5"), "ema-0.98")


def test_bad_sampling_input(call: Call, runs: Path, tmp_path: Path) -> None:
    refused(call("sample", runs / "ect", "--steps", 0), "--steps")
    refused(call("sample", runs / "ect", "--num", 0), "--num")
    refused(call("sample", runs / "ect", "--label", "cat"), "unknown label 'cat'", "0, 1, 2")
    refused(call("sample", runs / "ect", "--num", 5000), "--out FOLDER")
    refused(call("sample", runs / "ect", "--out", tmp_path / "x.gif"), ".png")
    refused(call("sample", runs / "ect", "--device", "gpu7"), "unknown device")


def test_bad_evaluation_input(call: Call, runs: Path) -> None:
    data = ("--data", "digits")
    refused(call("evaluate", runs / "ect", *data, "--steps", "0"), "--steps")
    refused(call("evaluate", runs / "ect", *data, "--metrics", "fid", "--num", 50), "unknown metric fid")
    refused(call("evaluate", runs / "ect", *data, "--extractor", "vgg"), "vgg")
    refused(call("evaluate", runs / "ect", *data, "--seeds", "0"), "--seeds")
    refused(call("evaluate", runs / "edm", *data, "--search-sigma", "--num", 50), "consistency")
    refused(call("report"), "RUN")
    refused(call("report", runs), "not exist")


def test_demo_does_not_overwrite_unasked(call: Call, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(call("demo", "--out", tmp_path), "--overwrite")
    assert (tmp_path / "thesis.txt").exists()


def test_the_quick_demo_makes_everything(call: Call, tmp_path: Path) -> None:
    code, _, err = call("demo", "--out", tmp_path / "demo", "--quick")
    assert code == 0, err
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    for name in ("diffusion_many", "diffusion_1", "ect_1", "ect_2"):
        assert summary[name]["metric"] == "fd"
        assert len(summary[name]["values"]) == 3
    assert summary["seconds"]["total"] > 0
    assert Image.open(tmp_path / "demo" / "samples.png").width > 1000
    assert "<html" in (tmp_path / "demo" / "report.html").read_text()
