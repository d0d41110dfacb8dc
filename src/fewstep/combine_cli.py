"""fewstep combine and fewstep average: the verbs over a run's checkpoints."""

from pathlib import Path
from typing import Any, Literal

import tyro


def combine(
    *sources: tyro.conf.Positional[str], out: Path, steps: int = 1, metric: str = "fd", budget: int = 60,
    search: Literal["span", "evolution", "cmaes", "random", "soup", "ema", "power"] = "span", search_seeds: int = 1,
    minutes: float | None = None, num: int = 2000, rerank: int = 5, rerank_num: int = 4000, report_num: int = 5000,
    seeds: int = 3, second: str = "kid,prdc", baselines: str = "ema,power,random", data: str = "", extractor: str = "",
    share: float = 0.5, solver: Literal["heun", "dpm"] | None = None, second_sigma: float | None = None,
    storage: Literal["bf16", "fp32", "int8"] = "bf16", first_nimg: int = 0, last_nimg: int | None = None, every: int = 1,
    like: str = "", extractor_weights: Path | None = None, resume: bool = False, overwrite: bool = False,
    device: str = "auto", batch: int = 500,
) -> dict[str, Any]:  # fmt: skip
    """LCSC: search the best linear combination of a run's snapshots for one way of sampling (arXiv:2404.02241).

    Args:
        sources: A run directory, or checkpoint files of one network in the order of training (.safetensors, .pt, diffusers).
        out: Folder for the bank, the scores, combined.safetensors (a model for every verb), result.json and report.html.
        steps: Sampling steps to search for. The coefficients are specialised to them.
        metric: fd, kid, precision, recall, density, coverage, or FILE.py:FUNCTION of (model, seed), lower is better.
        budget: Candidates that each search, the baselines' too, may evaluate.
        search: span (ours: few evaluations), evolution (the paper's), cmaes, random, soup, ema, power.
        search_seeds: Search so many times, and tell how far the results differ.
        minutes: Time limit of the searches.
        num: Images per candidate, on common noise.
        rerank: The best few of each search, measured again on fresh noise.
        rerank_num: Images for each of them.
        report_num: Images per noise seed of the reported, held-out numbers.
        seeds: Noise seeds of the report.
        second: Metrics that are reported and were not searched, separated by commas: fd, kid, prdc.
        baselines: Searches to compare with at the same budget, separated by commas; empty: last and uniform alone.
        data: Real images; default: the run's own.
        extractor: digits, pixels, inception, dinov2; default: that of the run's evaluations.
        share: Share of the training images that are searched on; the rest are held out for the report.
        solver: Of a diffusion model: heun (2 steps - 1 network evaluations) or dpm (as many as steps).
        second_sigma: EDM noise level of the second step; default: the snapshots' own.
        storage: How the bank keeps the snapshots' differences: bf16, fp32, int8.
        first_nimg: Only snapshots from so many images seen on.
        last_nimg: Only snapshots up to so many images seen.
        every: Only every so-many-th snapshot, counted back from the last.
        like: A model whose network takes the weights, where the files do not say what they are.
        extractor_weights: Local weights of the extractor, for machines without network.
        resume: Go on where a killed search stopped; the result is the same. Repeat the options.
        overwrite: Replace an earlier search in OUT.
        device: auto, cpu, cuda, cuda:1 or mps.
        batch: Images made at a time; affects memory only.
    """
    from fewstep import distributed
    from fewstep.api import Plan
    from fewstep.api import combine as carry_out
    from fewstep.console import say
    from fewstep.report import build

    plan = Plan(
        search=search, budget=budget, minutes=minutes, search_seeds=search_seeds, num=num, rerank=rerank,
        rerank_num=rerank_num, report_num=report_num, seeds=seeds, second=names(second), baselines=names(baselines),
    )  # fmt: skip
    result = carry_out(
        list(sources), out, plan, steps=steps, metric=metric, data=data, extractor=extractor, share=share, solver=solver,
        second_sigma=second_sigma, first_nimg=first_nimg, last_nimg=last_nimg, every=every, storage=storage, like=like,
        weights=extractor_weights, batch=batch, device=device, resume=resume, overwrite=overwrite,
    )  # fmt: skip
    page = str(build([], out / "report.html", results=[out])) if distributed.rank() == 0 else ""
    if distributed.rank() == 0:
        say(result["verdict"])
    brief = {key: result[key] for key in ("weights_sha256", "chosen", "verdict", "gains", "cost", "seed_spread")}
    return {"out": str(out / "combined.safetensors"), **brief, "report": page}


def average(
    *sources: tyro.conf.Positional[str], profile: str = "", out: Path | None = None, first_nimg: int = 0,
    last_nimg: int | None = None, every: int = 1, batch: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """An average of a run's snapshots, at any rate, after training; or a search's result.json made weights again.

    Args:
        sources: A run directory, checkpoint files in the order of training, folders of stored power-function averages
            (post-hoc reconstruction, EDM2), or OUT/result.json of a search.
        profile: ema:0.999 (decay per optimizer step), power:0.1 (relative width), uniform or last.
        out: The file to write; default, for a run: averages/PROFILE-snapshots.safetensors in it.
        first_nimg: Only snapshots from so many images seen on.
        last_nimg: Only snapshots up to so many images seen.
        every: Only every so-many-th snapshot, counted back from the last.
        batch: Images per optimizer step; default: the run's own, else 1 (a decay per checkpoint).
    """
    from fewstep.api import average as carry_out

    return carry_out(
        list(sources), profile, out, first_nimg=first_nimg, last_nimg=last_nimg, every=every, batch=batch
    )  # fmt: skip


def names(text: str) -> tuple[str, ...]:
    """Comma-separated words."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
