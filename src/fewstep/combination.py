"""LCSC: search the coefficients of a run's checkpoints (arXiv:2404.02241), with held-out scoring built in.

Three kinds of noise never meet: candidates are searched on one seed, the best few re-ranked on another with more
samples, and what is reported is measured on seeds 0, 1, 2, ... against real images that the search did not see, beside
the last snapshot, the uniform average and the best EMAs, all chosen with at least as much care.
"""

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep import codec, distributed
from fewstep._version import __version__
from fewstep.console import ProgressLine
from fewstep.data import to_uint8
from fewstep.environment import environment
from fewstep.evaluation import CANDIDATE_SEED, GRID_SEED, RERANK_SEED, evaluate
from fewstep.files import append_jsonl, atomic_write, read_json, read_jsonl, write_json
from fewstep.fitness import MEASURE, Fitness, Metric, generator
from fewstep.interrupts import Interrupted
from fewstep.metrics import Record
from fewstep.model import Model, save_model
from fewstep.outcome import LABELS, Choice, Found, Plan, cost, number, spread, verdict
from fewstep.pictures import grid, save
from fewstep.rundir import RunDir
from fewstep.scoring import ROWS, Gate, Scorer, Wearer
from fewstep.snapshots import Bank, weights_hash, write
from fewstep.snapshots.search import DETERMINISTIC, Search, Space, Vector, searches
from fewstep.snapshots.span import Span
from fewstep.types import FewstepError


def combine(
    bank: Bank, model: Model | None, fitness: Fitness, heldout: Fitness, out: str | Path, plan: Plan | None = None, *,
    run: str = "", resume: bool = False, overwrite: bool = False, quiet: bool = False, directory: RunDir | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Search, re-rank, measure; writes OUT/combined.safetensors and returns what OUT/result.json holds.

    fitness: what is minimised; heldout: the same against other real images, for the report. model: the network that wears
    the weights (None: they go to a user's function as tensors). resume: go on where a killed search stopped, with the same
    result. directory: OUT, if it is locked already. FewstepError for bad input, altered snapshots, a full disk;
    Interrupted on Ctrl-C: nothing is lost.
    """
    directory = directory or RunDir(out)
    try:
        task = Combination(bank, model, fitness, heldout, Path(out), plan or Plan(), run, quiet)
        task.check_budget()
        distributed.on_first_rank(lambda: task.claim(directory, resume, overwrite))
        return task.carry_out()
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, f"every score is kept; continue with --resume --out {out}") from None
    finally:
        directory.release()


@dataclass
class Combination:
    """One search of LCSC in its folder."""

    bank: Bank
    model: Model | None
    fitness: Fitness
    heldout: Fitness
    out: Path
    plan: Plan
    run: str
    quiet: bool

    def __post_init__(self) -> None:
        self.main, self.file = distributed.rank() == 0, self.out / "evaluations.jsonl"
        self.wearer = Wearer(self.bank, self.model)
        self.space = Space(self.bank.nimg, self.bank.batch, self.bank.gram().numpy())

    def claim(self, directory: RunDir, resume: bool, overwrite: bool) -> None:
        """Own the folder: begin, or continue the same search. Never by guess."""
        file = self.out / "search.json"
        if (self.file.exists() or file.exists()) and not (resume or overwrite):
            raise FewstepError(f"{self.out} holds a search: give --resume or --overwrite, or choose another --out")
        if resume and not file.exists():
            raise FewstepError(f"{self.out} holds no search to resume: leave out --resume to start one there")
        self.out.mkdir(parents=True, exist_ok=True)
        if not directory.lock:
            directory.take_lock()
        for folder in directory.leftovers():
            shutil.rmtree(folder, ignore_errors=True)
        if resume and read_json(file) != self.identity():
            raise FewstepError(
                f"{self.out} was begun with other snapshots, data, metric or options: repeat them, or choose another --out"
            )
        if resume:  # without the half row that a full disk or a kill has left
            atomic_write(self.file, "".join(json.dumps(row) + "\n" for row in read_jsonl(self.file)))
        else:
            for name in ("evaluations.jsonl", "result.json", "combined.safetensors", "report.html", "best.png"):
                (self.out / name).unlink(missing_ok=True)
            shutil.rmtree(self.out / "features", ignore_errors=True)
            write_json(file, self.identity())

    def identity(self) -> dict[str, Any]:
        """What a resumed search must share with the one that was begun; time limits and report may change."""
        judges = [
            [j.sampler.sigmas, type(j.sampler).__name__, j.extractor.sha256, j.reference.sha256]
            for j in (self.fitness, self.heldout)
            if isinstance(j, Metric)
        ]
        same = replace(self.plan, minutes=None, report_num=1000, seeds=1, second=())
        sources = [source.sha256 for source in self.bank.sources]
        return codec.encode(
            {"plan": same, "metric": self.fitness.name, "judges": judges, "sources": sources, "storage": self.bank.storage}
        )  # fmt: skip

    def searches(self) -> tuple[list[str], list[str]]:
        """The main searches, one for each seed, and those of the baselines, of as many: span/0, span/1; ema/0, random/0, ..."""

        def seeds(name: str) -> list[str]:
            return [f"{name}/{k}" for k in range(1 if name in DETERMINISTIC else self.plan.search_seeds)]

        others = (name for name in self.plan.baselines if name != self.plan.search)
        return seeds(self.plan.search), [name for kind in others for name in seeds(kind)]

    def check_budget(self) -> None:
        """FewstepError if a search could not even begin."""
        for name in (name for names in self.searches() for name in names):
            if self.plan.budget < self.search(name).minimum:
                raise FewstepError(
                    f"--budget {self.plan.budget} is less than the {self.search(name).minimum} evaluations with which "
                    f"{name.partition('/')[0]} begins: raise it, or choose other searches"
                )

    def carry_out(self) -> dict[str, Any]:
        """The phases in order."""
        plan, began = self.plan, time.monotonic()
        mains, others = self.searches()
        found, names = {}, [*mains, *others]
        for i, name in enumerate(names):
            found[name] = self.run_search(name, name in mains, began, (i + 1) / len(names))
        choices = self.choose(found, mains)
        chosen = choices["lcsc"]
        tensors = self.bank.exact(torch.from_numpy(chosen.coefficients)) if self.main else {}
        results = {name: c for name in mains if len(mains) > 1 and (c := found[name].choice)}
        records = self.measure({**choices, **results}, tensors)
        result = {
            "fewstep": __version__, "version": 1, "run": self.run,
            "snapshots": [vars(source) for source in self.bank.sources], "storage": self.bank.storage,
            "batch": self.bank.batch, "coefficients": chosen.coefficients.tolist(),
            "weights_sha256": self.save(chosen, tensors, records["lcsc"]), "chosen": chosen.origin,
            **self.judged(), "candidates": {name: choice.to_json() for name, choice in choices.items()},
            "records": {name: [r.to_json() for r in records[name]] for name in choices},
            "traces": {name: [[n, number(cost)] for n, cost in f.trace] for name, f in found.items()},
            "searches": {name: found[name].to_json(records.get(name, [])) for name in mains},
            "seed_spread": spread(self.space, list(results.values())) if results else None,
            **verdict({name: records[name] for name in choices}, self.fitness.name, chosen.label),
            "cost": cost(found.values(), read_jsonl(self.file)) | {"budget": plan.budget},
            "noise": {"search": CANDIDATE_SEED, "rerank": RERANK_SEED, "report": list(range(plan.seeds))},
            "num": {"search": plan.num, "rerank": plan.rerank_num, "report": plan.report_num},
            "environment": environment(str(self.bank.base.device)),
        }  # fmt: skip
        if self.main:
            write_json(self.out / "result.json", result)
            shutil.rmtree(self.out / "features", ignore_errors=True)
        distributed.barrier()
        return result

    def search(self, name: str) -> Search:
        """A fresh search by its name and seed, e.g. evolution/0."""
        kind, _, seed = name.partition("/")
        made = searches()[kind](self.space, int(seed))
        if isinstance(made, Span) and isinstance(self.fitness, Metric):
            made.slope = self.fitness.slope()
        return made

    def run_search(self, name: str, main: bool, began: float, share: float) -> Found:
        """Until its budget, or this share of the time, is spent; scores that are on the disk are taken from there."""
        plan, search, found, drawn = self.plan, self.search(name), Found(name), math.inf
        gate = Gate(search.keep) if search.races else None
        features = isinstance(search, Span) and search.slope is not None
        with ProgressLine(f"search {name}", plan.budget, unit="eval", quiet=self.quiet or not self.main) as line:
            scorer = Scorer(self.wearer, self.fitness, plan.num, CANDIDATE_SEED, self.file, lambda _: line.advance(1))
            while found.evaluations < plan.budget and not (found.evaluations and self.late(began, share)):
                vectors = search.ask(min(ROWS, plan.budget - found.evaluations))
                if not len(vectors):
                    break
                scores = scorer(vectors, name, gate, features)
                search.tell(np.array([s.cost for s in scores]), [s.features for s in scores] if features else ())
                for vector, score in zip(vectors, scores, strict=True):
                    found.evaluations += 1
                    found.dropped += score.dropped
                    found.failed += not math.isfinite(score.cost)
                    if not score.dropped and math.isfinite(score.cost):
                        found.tried[vector.tobytes()] = (score.cost, vector)
                    found.names[vector.tobytes()] = search.name_of(vector)
                    found.trace.append((found.evaluations, found.best))
                line.note(f"best {self.fitness.name} {found.best:.4g}")
                if main and found.best < drawn:
                    drawn = found.best
                    self.draw(found.top(1)[0][1])
            line.finish()
        return found

    def late(self, began: float, share: float) -> bool:
        """Whether this share of the time is spent; all processes go by the clock of the first."""
        if self.plan.minutes is None:
            return False
        spent = torch.tensor([time.monotonic() - began if self.main else 0.0], device=self.bank.base.device)
        distributed.sum_over_ranks([spent])
        return bool(spent.item() > 60 * self.plan.minutes * share)

    def tensors(self, vector: Vector) -> dict[str, torch.Tensor]:
        """The weights of one vector, by the bank."""
        return self.bank.tensors(self.bank.combine(torch.from_numpy(vector)[None])[0])

    def draw(self, vector: Vector) -> None:
        """OUT/best.png: samples of the best so far, from the same noise each time."""
        if not (self.main and self.model and isinstance(self.fitness, Metric)):
            return
        arch = self.model.info.architecture
        labels = list(range(min(arch.num_classes, 10))) or None
        columns = len(labels) if labels else 8
        self.wearer.wear(self.tensors(vector))
        images = torch.cat(list(generator(self.model)(self.fitness.sampler, 8 * columns, GRID_SEED, labels)))
        save(self.out / "best.png", grid(to_uint8(images), columns))

    def choose(self, found: Mapping[str, Found], mains: Sequence[str]) -> dict[str, Choice]:
        """Re-rank the best few of each search on fresh noise; LCSC is the best of the main ones."""
        plan, tops = self.plan, {name: f.top(self.plan.rerank) for name, f in found.items()}
        fixed = {"uniform": np.full(len(self.bank), 1 / len(self.bank)), "last": np.eye(len(self.bank))[-1]}
        total = sum(map(len, tops.values())) + len(fixed)
        with ProgressLine("re-rank", total, unit="eval", quiet=self.quiet or not self.main) as line:
            scorer = Scorer(
                self.wearer, self.fitness, plan.rerank_num, RERANK_SEED, self.file, lambda _: line.advance(1)
            )
            for name, top in tops.items():
                vectors = [vector for _, vector in top]
                scores = [s for i in range(0, len(top), ROWS) for s in scorer(np.stack(vectors[i : i + ROWS]), name)]
                if top:
                    k = min(range(len(top)), key=lambda k: scores[k].cost)
                    label = LABELS.get(name.partition("/")[0], name.replace("/", ", seed "))
                    profile = found[name].names[vectors[k].tobytes()]
                    found[name].choice = Choice(label, name, vectors[k], top[k][0], scores[k].cost, profile)
            known = {key: cost for f in found.values() for key, (cost, _) in f.tried.items()}
            rest = {
                name: Choice(LABELS[name], name, v, known.get(v.tobytes(), math.inf), scorer(v[None], name)[0].cost)
                for name, v in fixed.items()
            }
        able = [c for name in mains if (c := found[name].choice) and math.isfinite(c.rerank)]
        if not able:
            raise FewstepError(
                f"no candidate of {plan.search} has a finite {self.fitness.name}: is the metric right for these weights?"
            )
        best = min(able, key=lambda choice: choice.rerank)
        choices = {"lcsc": best if plan.search in ("ema", "power", "soup") else replace(best, label="LCSC")}
        for name, f in found.items():
            kind = name.partition("/")[0]
            if name not in mains and f.choice and (kind not in choices or f.choice.rerank < choices[kind].rerank):
                choices[kind] = f.choice
        return choices | rest

    def measure(self, choices: Mapping[str, Choice], exact: dict[str, torch.Tensor]) -> dict[str, list[Record]]:
        """Held-out records of every choice; each process measures its share, the first keeps them all.

        exact: LCSC's weights from the snapshots themselves, which are saved, on the first process; the others wear the
        bank's. A search whose result LCSC is was measured with it.
        """
        plan, lcsc, world = self.plan, choices["lcsc"], distributed.world()
        twins = [name for name, choice in choices.items() if "/" in name and choice.origin == lcsc.origin]
        keys = {name: self.report_key(name, choice) for name, choice in choices.items() if name not in twins}
        rows = read_jsonl(self.file) if self.main else []
        kept = distributed.gather({row["report"]: row["records"] for row in rows if "report" in row})[0]
        todo, images = [name for name, key in keys.items() if key not in kept], plan.report_num * plan.seeds
        assert "lcsc" not in todo[1:]  # the first process has its weights
        total, quiet = images * len(keys), self.quiet or not self.main
        with ProgressLine("held-out numbers", total, total - images * len(todo), quiet=quiet) as line:
            for start in range(0, len(todo), world):
                together = todo[start : start + world]
                records: list[dict[str, Any]] = []
                if distributed.rank() < len(together):
                    name = together[distributed.rank()]
                    weights = exact if name == "lcsc" else self.tensors(choices[name].coefficients)
                    records = [record.to_json() for record in self.records(name, weights, line.advance)]
                for name, found in zip(together, distributed.gather(records), strict=False):
                    kept[keys[name]] = found
                    if self.main:
                        append_jsonl(self.file, {"report": keys[name], "records": found})
                line.advance(images * (len(together) - 1))
        distributed.barrier()  # the first process has written its last row
        told = {name: [Record.from_json(row) for row in kept[key]] for name, key in keys.items()}
        return told | {name: told["lcsc"] for name in twins}

    def report_key(self, name: str, choice: Choice) -> str:
        """Of held-out records: whose they are, and how they were measured."""
        plan, digest = self.plan, weights_hash({"c": torch.from_numpy(choice.coefficients)})[:24]
        return f"{name}|{digest}|{plan.report_num}|{plan.seeds}|{','.join(plan.second)}"

    def records(self, name: str, tensors: dict[str, torch.Tensor], tick: Callable[[int], None]) -> list[Record]:
        """The searched metric first, then the second ones."""
        plan, judge, worn = self.plan, self.heldout, self.wearer.wear(tensors)
        digest, seeds = weights_hash(tensors), range(plan.seeds)
        if isinstance(judge, Metric):
            assert self.model is not None
            first, make = MEASURE[judge.name], generator(self.model, judge.batch)
            metrics = (first, *(metric for metric in plan.second if metric != first))
            found = evaluate(
                make, judge.sampler, judge.reference, judge.extractor, plan.report_num, seeds, metrics, name, digest, tick
            )  # fmt: skip
            return sorted(found, key=lambda record: record.metric != judge.name)
        costs = [judge.cost(worn, None, seed) for seed in seeds]
        tick(plan.report_num * plan.seeds)
        return [
            Record.of(
                judge.name, costs, list(seeds), n=0, extractor="", extractor_sha256="", reference="", reference_n=0,
                reference_sha256="", sampler="", sigmas=(), nfe=0, model=name, model_sha256=digest,
            )
        ]  # fmt: skip

    def save(self, chosen: Choice, tensors: dict[str, torch.Tensor], records: Sequence[Record]) -> str:
        """OUT/combined.safetensors, from the snapshots themselves; returns the SHA-256 of its weights."""
        if not self.main:
            return ""
        file = self.out / "combined.safetensors"
        if self.model is None:
            return write(file, tensors, {"coefficients": chosen.coefficients.tolist()})
        row = {"nimg": self.model.info.nimg, "weights": "lcsc", "record": records[0].to_json()}
        return save_model(file, tensors, replace(self.model.info, weights="lcsc", best=row))

    def judged(self) -> dict[str, Any]:
        """What was measured, and against what."""
        a, b = self.fitness, self.heldout
        if not (isinstance(a, Metric) and isinstance(b, Metric)):
            return {"metric": a.name, "sampler": None, "extractor": "", "reference": None}
        reference = {
            f"{which}{suffix}": value
            for which, r in (("search", a.reference), ("report", b.reference))
            for suffix, value in (("", r.name), ("_n", r.n), ("_sha256", r.sha256))
        }
        sampler = {"name": type(a.sampler).__name__, "sigmas": list(a.sampler.sigmas), "nfe": a.sampler.nfe}
        return {"metric": a.name, "sampler": sampler, "extractor": a.extractor.name, "reference": reference}


__all__ = ["Combination", "Plan", "combine"]
