"""The demo's figures over several training seeds, as README quotes them.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --out benchmarks/results/2026-11-21-demo.json

Each seed is one run of `fewstep demo --seed S` in a temporary folder, with its own weights, data order and noise.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

NAMES = ("diffusion_many", "diffusion_1", "ect_1", "ect_2")
HELD_OUT = ("last_1", "best_ema_1", "lcsc_1", "lcsc_2")


@dataclass(frozen=True)
class Arguments:
    out: Path
    seeds: tuple[int, ...] = (0, 1, 2)


def demo(seed: int) -> dict:
    """summary.json of one demo."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fewstep", "demo", "--out", f"{folder}/demo", "--seed", str(seed)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(Path(folder, "demo", "summary.json").read_text())


def spread(values: list[float]) -> dict[str, float | list[float]]:
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": values,
    }


def main(arguments: Arguments) -> None:
    summaries = [demo(seed) for seed in arguments.seeds]
    result = {
        "what": "fewstep demo: Frechet distance (digits features) over training seeds",
        "command": "python benchmarks/demo_seeds.py --seeds " + " ".join(map(str, arguments.seeds)),
        "seeds": arguments.seeds,
        "environment": summaries[0]["environment"],
        "seconds": spread([s["seconds"]["total"] for s in summaries]),
        "second_sigma": [s["second_sigma"] for s in summaries],
        **{name: spread([s[name]["value"] for s in summaries]) for name in (*NAMES, *HELD_OUT)},
        "gain_over_best_ema": spread([s["gain"]["ema"]["fraction"] for s in summaries]),
        "phases": [s["seconds"] for s in summaries],
        "ratio_to_diffusion_1": {name: spread([s["ratio_to_diffusion_1"][name] for s in summaries]) for name in NAMES},
        "stamp": {
            k: summaries[0]["ect_1"][k]
            for k in ("n", "seeds", "extractor", "extractor_sha256", "reference", "reference_n")
        },
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
