"""sLCT, improved latent consistency training (Dao et al. 2025, arXiv:2502.01441): iCT made fit for heavy-tailed latents.

Pairs as iCT's, on a grid of N(k) intervals, N doubling from 10 to 640. Five changes, each of which --without NAME undoes:

cauchy      d = ln(1 + m/(2 c^2)), m the mean over C, H, W, w = 1/(t - r); without: pseudo-Huber, sqrt(m + c^2) - c
denoising   + 5 * mean over the lowest quarter of the grid (t <= 0.17 at N = 640) of w mean (D(x_t, t) - x)^2,
            w = 1/t^2 + 1/sigma_data^2
ot          noise is assigned to the images of a batch at the least squared distance; without: independent noise
adaptive-c  c = exp(-1.15 ln N - 0.85) after the first stage; without: c = 0.00054 sqrt(C H W)
nsln        every norm is LayerNorm over C, H, W with a shift but no scale; without: group norm

    fewstep encode my_photos/ latents/ --resolution 256
    fewstep train slct --data latents/ --out runs/slct
    fewstep train slct --data latents/ --without ot nsln --out runs/ablation
"""

from collections.abc import Callable
from dataclasses import replace

from fewstep.networks import DiT, UNet
from fewstep.objectives import (
    EDM,
    Cauchy,
    Consistency,
    Denoising,
    DimensionScale,
    Distance,
    GridPairs,
    Independent,
    IntervalScale,
    InverseGap,
    KarrasGrid,
    LogNormal,
    LowestOf,
    MinibatchOT,
    PairObjective,
    PseudoHuber,
    SquaredL2,
)
from fewstep.progress import Doubling
from fewstep.recipe import Recipe
from fewstep.recipes.ilct import celebahq256 as ilct_celebahq256
from fewstep.recipes.ilct import digits as ilct_digits
from fewstep.recipes.ilct import ilct
from fewstep.types import FewstepError


def objective(s0: int = 10, s1: int = 640, sigma_data: float = 0.5) -> PairObjective:
    """sLCT's loss: Cauchy with adaptive c over OT pairs, and the diffusion loss at early timesteps."""
    intervals = Doubling(s0, s1)
    grid = KarrasGrid(intervals)
    return PairObjective(
        pairs=GridPairs(grid, density=LogNormal(-1.1, 2.0)),
        coupling=MinibatchOT(),
        terms={
            "consistency": Consistency(distance=Cauchy(IntervalScale(intervals), over="mean"), weighting=InverseGap()),
            "denoising": Denoising(
                distance=SquaredL2(over="mean"), weighting=EDM(sigma_data), where=LowestOf(grid, 0.25), scale=5.0
            ),
        },
    )


def slct(base: Recipe | None = None, s1: int = 640) -> Recipe:
    """For your own images as latents (fewstep encode), one GPU: 12.8M images, an ADM of 128 channels. iLCT, changed."""
    base = base or ilct("mean")
    assert isinstance(base.network, UNet)
    network = replace(base.network, norm="nonscaling-layer")
    return replace(base, name="slct", objective=objective(s1=s1), network=network)


def celebahq256() -> Recipe:
    """The paper's CelebA-HQ at 256x256: latents [4, 32, 32] of sd-vae-ft-ema, 294k iterations of 128."""
    return replace(
        slct(ilct_celebahq256()),
        second_sigma=0.42,
        published="FID 1 step / 2 steps: 7.27 / 6.93, recall 0.50 / 0.52 (iLCT 37.15 / 16.84)",
    )


def digits() -> Recipe:
    """Bundled 8x8 handwritten digits as pixels, class-conditional, on two CPU cores."""
    return slct(ilct_digits("mean"), s1=160)


def with_distance(recipe: Recipe, distance: Distance) -> Recipe:
    """The recipe with another distance in its consistency term."""
    terms = recipe.objective.terms
    new = {**terms, "consistency": replace(terms["consistency"], distance=distance)}
    return replace(recipe, objective=replace(recipe.objective, terms=new))


def without_cauchy(recipe: Recipe) -> Recipe:
    d = recipe.objective.terms["consistency"].distance
    return with_distance(recipe, PseudoHuber(d.c, over=d.over)) if isinstance(d, Cauchy) else recipe


def without_denoising(recipe: Recipe) -> Recipe:
    terms = {name: term for name, term in recipe.objective.terms.items() if name != "denoising"}
    return replace(recipe, objective=replace(recipe.objective, terms=terms))


def without_ot(recipe: Recipe) -> Recipe:
    return replace(recipe, objective=replace(recipe.objective, coupling=Independent()))


def without_adaptive_c(recipe: Recipe) -> Recipe:
    d = recipe.objective.terms["consistency"].distance
    return with_distance(recipe, replace(d, c=DimensionScale())) if hasattr(d, "c") else recipe  # type: ignore[type-var]


def without_nsln(recipe: Recipe) -> Recipe:
    if not hasattr(recipe.network, "norm"):
        return recipe
    plain = "plain" if isinstance(recipe.network, DiT) else "group"
    return replace(recipe, network=replace(recipe.network, norm=plain))  # type: ignore[type-var]


PARTS: dict[str, Callable[[Recipe], Recipe]] = {
    "cauchy": without_cauchy, "denoising": without_denoising, "ot": without_ot, "adaptive-c": without_adaptive_c,
    "nsln": without_nsln,
}  # fmt: skip


def without(recipe: Recipe, part: str) -> Recipe:
    """The recipe with one of the five changes undone; without all five it is iLCT with c applied to a mean."""
    if part not in PARTS:
        raise FewstepError(f"--without {part}: choose from {', '.join(PARTS)}")
    return PARTS[part](recipe)


PRESETS = {"default": slct, "celebahq256": celebahq256, "digits": digits}
