"""Parts of a recipe by name."""

import pytest

from fewstep import codec, recipes
from fewstep.choices import CHOICES, choose
from fewstep.networks import DiT
from fewstep.objectives import LPIPS, Cauchy, DimensionScale, IntervalScale, MinibatchOT, PseudoHuber, ResidualScale
from fewstep.timesteps import Learned
from fewstep.train_cli import parse_train, train
from fewstep.types import FewstepError


def distance(recipe):
    return recipe.objective.terms["consistency"].distance


@pytest.mark.parametrize(("option", "name"), [(option, name) for option, names in CHOICES.items() for name in names])
def test_every_choice_makes_a_recipe_that_can_be_stored(option, name):
    recipe = choose(recipes.recipe("slct"), option, name)
    assert codec.decode(codec.encode(recipe)) == recipe


def test_choices_reach_their_part_and_keep_the_rest():
    ict = recipes.recipe("ict")
    assert isinstance(choose(ict, "coupling", "ot").objective.coupling, MinibatchOT)
    assert choose(choose(ict, "coupling", "ot"), "coupling", "independent") == ict
    assert isinstance(choose(ict, "times", "learned").timesteps, Learned)
    assert isinstance(choose(ict, "network", "dit-s").network, DiT)
    assert distance(choose(ict, "distance", "cauchy")) == Cauchy(DimensionScale(0.00054), over="sum")
    slct = recipes.recipe("slct")
    assert distance(choose(slct, "distance", "pseudo-huber")) == PseudoHuber(distance(slct).c, over="mean")
    assert distance(choose(slct, "c", "residual")) == Cauchy(ResidualScale(), over="mean")
    assert distance(choose(ict, "c", "intervals")).c == IntervalScale(ict.objective.pairs.grid.intervals)
    assert isinstance(distance(choose(ict, "distance", "lpips")), LPIPS)
    assert isinstance(distance(choose(recipes.recipe("ect"), "distance", "cauchy")).c, DimensionScale)
    assert "denoising" in choose(slct, "distance", "l2").objective.terms


def test_what_does_not_go_together_is_refused():
    with pytest.raises(FewstepError, match="choose from independent, ot"):
        choose(recipes.recipe("ect"), "coupling", "sinkhorn")
    with pytest.raises(FewstepError, match="doubling grid"):
        choose(recipes.recipe("ect"), "c", "intervals")
    with pytest.raises(FewstepError, match="denoising term only"):
        choose(recipes.recipe("edm"), "distance", "cauchy")
    with pytest.raises(FewstepError, match="--distance cauchy"):
        choose(recipes.recipe("ct"), "c", "residual")
    with pytest.raises(FewstepError, match="leave out --coupling"):
        train(["ect", "--resume", "--out", "nowhere", "--coupling", "ot"])


def test_the_fields_of_a_choice_are_options_after_it(capsys):
    recipe = choose(choose(recipes.recipe("edm", "digits"), "times", "variance"), "coupling", "ot")
    _, parsed = parse_train("edm", ["--timesteps.bins", "16", "--objective.coupling.by-class", "never"], recipe)
    assert parsed.timesteps.bins == 16
    assert parsed.objective.coupling.by_class == "never"
    train(["edm", "--preset", "digits", "--times", "variance", "--timesteps.bins", "64", "--dry-run"])
    train(["slct", "--preset", "digits", "--c", "residual", "--without", "ot", "nsln", "--dry-run"])
