"""Parts of a recipe chosen by name: `fewstep train RECIPE --coupling ot --distance cauchy`, before its fields are read."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from fewstep.networks import NAMED, named
from fewstep.objectives import (
    LPIPS,
    Cauchy,
    DimensionScale,
    Distance,
    GemanMcClure,
    Independent,
    IntervalScale,
    MinibatchOT,
    PseudoHuber,
    ResidualScale,
    SquaredL2,
)
from fewstep.progress import Doubling
from fewstep.recipe import Recipe
from fewstep.timesteps import Learned, LossVariance
from fewstep.types import FewstepError

Change = Callable[[Recipe], Recipe]


def with_network(name: str) -> Change:
    return lambda recipe: replace(recipe, network=named(name))


def with_coupling(coupling: Any) -> Change:
    return lambda recipe: replace(recipe, objective=replace(recipe.objective, coupling=coupling))


def with_times(law: Any) -> Change:
    return lambda recipe: replace(recipe, timesteps=law)


def with_distance(make: Callable[..., Distance]) -> Change:
    """The distance of every consistency term, with the reduction, and the constant c, of the one before where it has them."""

    def change(recipe: Recipe) -> Recipe:
        return replace(recipe, objective=replace(recipe.objective, terms={**recipe.objective.terms, **{
            name: replace(term, distance=make(**kept(term.distance, make)))
            for name, term in consistency_terms(recipe, "--distance").items()
        }}))  # fmt: skip

    return change


def kept(old: Distance, make: Any) -> dict[str, Any]:
    """The fields of a distance that another one has too; c = 0, the plain norm's, is left to the new one."""
    names = {field.name for field in fields(make)} & {field.name for field in fields(old)}  # type: ignore[arg-type]
    return {name: getattr(old, name) for name in names if (name, getattr(old, name)) != ("c", 0.0)}


def with_scale(kind: str) -> Change:
    """The constant c of every consistency term's distance."""

    def change(recipe: Recipe) -> Recipe:
        terms = dict(recipe.objective.terms)
        for name, term in consistency_terms(recipe, "--c").items():
            if not hasattr(term.distance, "c"):
                raise FewstepError(
                    f"--c {kind}: the distance of the {name} term has no constant c; give --distance cauchy too"
                )
            terms[name] = replace(term, distance=replace(term.distance, c=scale_of(kind, recipe)))
        return replace(recipe, objective=replace(recipe.objective, terms=terms))

    return change


def scale_of(kind: str, recipe: Recipe) -> Any:
    """A scale by name; the closed form in N needs a recipe with a doubling grid."""
    if kind == "dimension":
        return DimensionScale()
    if kind == "residual":
        return ResidualScale()
    intervals = getattr(getattr(recipe.objective.pairs, "grid", None), "intervals", None)
    if not isinstance(intervals, Doubling):
        raise FewstepError(
            f"--c intervals is a function of the grid's intervals, and {recipe.name} has no doubling grid"
        )
    return IntervalScale(intervals)


def consistency_terms(recipe: Recipe, option: str) -> dict[str, Any]:
    """The recipe's terms but the denoising one; FewstepError where that is all there is."""
    terms = {name: term for name, term in recipe.objective.terms.items() if name != "denoising"}
    if not terms:
        raise FewstepError(f"{option} is for consistency training: {recipe.name} has a denoising term only")
    return terms


CHOICES: dict[str, dict[str, Change]] = {
    "network": {name: with_network(name) for name in NAMED},
    "coupling": {"independent": with_coupling(Independent()), "ot": with_coupling(MinibatchOT())},
    "times": {"own": with_times(None), "variance": with_times(LossVariance()), "learned": with_times(Learned())},
    "distance": {
        "l2": with_distance(SquaredL2), "pseudo-huber": with_distance(PseudoHuber), "cauchy": with_distance(Cauchy),
        "geman-mcclure": with_distance(GemanMcClure), "lpips": with_distance(LPIPS),
    },
    "c": {kind: with_scale(kind) for kind in ("dimension", "intervals", "residual")},
}  # fmt: skip


def choose(recipe: Recipe, option: str, name: str) -> Recipe:
    """The recipe with one of its parts chosen by name."""
    known = CHOICES[option]
    if name not in known:
        raise FewstepError(f"--{option} {name}: choose from {', '.join(known)}")
    return known[name](recipe)
