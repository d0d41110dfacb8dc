"""What a recipe will cost, before it runs: parameters, memory, disk, floating-point operations."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fewstep import codec
from fewstep.networks import Architecture
from fewstep.recipe import Recipe
from fewstep.snapshots import estimate_bytes

# Forward passes that one image costs, a backward pass counted as two: forward + backward, the target's, a teacher's Heun step.
PASSES = {"diffusion": 3, "consistency": 4, "distillation": 6}


def forward_flops(architecture: Architecture) -> int:
    """Floating-point operations (2 per multiply-add) of one evaluation of the network on one image."""
    denoiser = architecture.skeleton().eval()
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        label = torch.zeros(1, dtype=torch.int64) if architecture.num_classes else None
        denoiser(torch.zeros(1, *architecture.shape), torch.ones(1), label)
    return counter.get_total_flops()


def estimate(recipe: Recipe, architecture: Architecture) -> dict[str, Any]:
    """JSON-able: the resolved recipe, its parameter count, bytes of memory (without activations) and disk, its cost."""
    skeleton = architecture.skeleton()
    parameters = sum(p.numel() for p in skeleton.parameters())
    stored = sum(t.numel() for t in skeleton.state_dict().values())  # TCM's frozen half is not a parameter
    copies = 4 + len(recipe.averages) + bool(recipe.target_decay)  # weights, gradient, two moments
    snapshots = min(recipe.snapshots, recipe.snapshot_keep or recipe.snapshots)
    passes = PASSES["distillation" if recipe.teacher else recipe.kind]
    flops = forward_flops(architecture) * passes
    return {
        "recipe": codec.encode(recipe),
        "shape": list(architecture.shape),
        "num_classes": architecture.num_classes,
        "parameters": parameters,
        "memory_bytes": 4 * (parameters * copies + stored - parameters + recipe.teacher * stored),
        "disk_bytes": recipe.disk_bytes(stored),
        "snapshots": snapshots,
        "bank_bytes": estimate_bytes(snapshots, stored, "bf16"),
        "images": recipe.total_nimg,
        "steps": -(-recipe.total_nimg // recipe.batch_size),
        "flops_per_image": flops,
        "flops": flops * recipe.total_nimg,
        "published": recipe.published,
    }


def summary(cost: dict[str, Any]) -> str:
    """The estimate in a few lines for a person."""
    shape = "x".join(map(str, cost["shape"]))
    averages = "as many of each average, " * cost["recipe"]["snapshot_averages"] + "the averages"
    classes = f", {cost['num_classes']} classes" if cost["num_classes"] else ""
    lines = [
        f"{cost['recipe']['name']} on {shape} images{classes}: {cost['parameters'] / 1e6:.1f}M parameters",
        f"cost    {cost['images']:,} images in {cost['steps']:,} steps, {cost['flops_per_image'] / 1e9:.3g} GFLOPs an image, "
        f"{cost['flops']:.2g} FLOPs in all",
        f"memory  {size(cost['memory_bytes'])} for weights, gradient, optimizer and averages, plus activations",
        f"disk    {size(cost['disk_bytes'])} at most, for {cost['snapshots']:,} snapshots, {averages} and the training state",
    ]
    if cost["snapshots"] > 1:
        lines.append(f"bank    {size(cost['bank_bytes'])} more for a search over these snapshots, in bf16")
    if cost["published"]:
        lines.append(f"paper   {cost['published']}")
    return "\n".join(lines)


def size(count: int | float) -> str:
    """Bytes for a person: 1.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
