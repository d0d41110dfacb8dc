"""Recipes as JSON: there and back, and nothing but components of trusted packages."""

import json
from dataclasses import dataclass, make_dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import codec, recipes
from fewstep.codec import decode, encode, trust
from fewstep.ema import ConstantEMA, PowerEMA
from fewstep.networks import UNet
from fewstep.objectives import Below, LogNormal
from fewstep.types import FewstepError


@dataclass(frozen=True)
class Mine:
    """A component outside fewstep."""

    sigma: float = 1.0
    parts: tuple = ()


@pytest.fixture
def _own_trust(monkeypatch):
    monkeypatch.setattr(codec, "_trusted", set(codec._trusted))


def there_and_back(value):
    return decode(json.loads(json.dumps(encode(value), allow_nan=False)))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner).map(tuple) | st.dictionaries(st.text().filter(lambda key: key != "is"), inner),
    max_leaves=10,
)


@settings(deadline=None)
@given(plain)
def test_plain_values_come_back_equal(value):
    assert there_and_back(value) == value


@settings(deadline=None)
@given(st.floats(-5, 5), st.floats(0.1, 5), st.floats(0, 0.9999), st.lists(st.integers(1, 8), min_size=1, max_size=4))
def test_components_come_back_equal_inside_tuples_and_dicts(mean, std, decay, multipliers):
    value = {
        "times": LogNormal(mean, std),
        "averages": (ConstantEMA(decay), PowerEMA(0.1)),
        "network": UNet(multipliers=tuple(multipliers), dropout_max_resolution=None),
    }
    assert there_and_back(value) == value


def test_the_form_is_module_class_and_fields():
    assert encode(LogNormal(-1.1, 2.0)) == {"is": "fewstep.objectives.pairs:LogNormal", "mean": -1.1, "std": 2.0}
    assert decode({"is": "fewstep.objectives.pairs:LogNormal", "mean": -1.1}) == LogNormal(-1.1)  # others: defaults


def test_a_changed_recipe_differs_after_the_round_trip_too():
    ect = recipes.recipe("ect", "digits")
    assert there_and_back(ect) == ect
    assert there_and_back(replace(ect, seed=1)) != ect
    assert there_and_back(replace(ect, averages=(ConstantEMA(0.5),))).averages == (ConstantEMA(0.5),)


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "value",
    [lambda x: x, print, object(), {1, 2}, {1: 2}, b"bytes", 1j, LogNormal, (1, [lambda: 0]), {"a": range(3)}],
)
def test_what_json_cannot_rebuild_is_refused(value):
    with pytest.raises(FewstepError, match="cannot be stored"):
        encode(value)
    with pytest.raises(FewstepError, match="cannot be stored"):
        encode({"deep": (value,)})


@pytest.mark.parametrize(
    "name", ["os:system", "subprocess:Popen", "builtins:eval", "pathlib:Path", "fewsteps.evil:X", "", ":x", "posix"]
)
def test_foreign_modules_are_refused_before_they_are_imported(name, monkeypatch):
    monkeypatch.setattr(codec.importlib, "import_module", lambda module: pytest.fail(f"imported {module}"))
    for value in (
        {"is": name},
        [{"is": name, "args": ["ls"]}],
        {"is": "fewstep.ema:ConstantEMA", "decay": {"is": name}},
    ):
        with pytest.raises(FewstepError, match="not part of fewstep"):
            decode(value)


@pytest.mark.parametrize(
    "name",
    ["fewstep.codec:importlib", "fewstep.codec:trust", "fewstep.noise:np", "fewstep.noise:PURPOSE", "fewstep.run:torch",
     "fewstep.networks.unet:_UNet", "fewstep.types:Denoiser", "fewstep.types:FewstepError", "fewstep.files:Path"],
)  # fmt: skip
def test_what_is_in_fewstep_but_no_component_is_refused(name):
    with pytest.raises(FewstepError):
        decode({"is": name})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"is": "fewstep.ema:NoSuchEMA"}, "unknown to this version"),
        ({"is": "fewstep.no_such_module:X"}, "unknown to this version"),
        ({"is": "fewstep.ema"}, "unknown to this version"),
        ({"is": "fewstep.ema:ConstantEMA", "decay": 0.9, "typo": 1}, "does not fit this version.*typo"),
        ({"is": "fewstep.networks:Architecture"}, "does not fit this version.*network"),
        ({"is": "fewstep.ema:ConstantEMA", "decay": 1.5}, "decay must be"),
    ],
)
def test_unknown_classes_and_fields_are_refused_with_the_reason(value, message):
    with pytest.raises(FewstepError, match=message):
        decode(value)


# --------------------------------------------------------------------------------------------------------------- trust


@pytest.mark.usefixtures("_own_trust")
def test_a_users_component_is_refused_until_its_package_is_trusted():
    value = {"component": Mine(2.0, (LogNormal(),))}
    stored = {"component": {"is": f"{__name__}:Mine", "sigma": 2.0}}
    with pytest.raises(FewstepError, match=r"fewstep\.codec\.trust\('" + __name__.partition(".")[0]):
        encode(value)
    with pytest.raises(FewstepError, match="trust"):
        decode(stored)
    trust(__name__.partition(".")[0])
    assert there_and_back(value) == value
    assert decode(stored) == {"component": Mine(2.0)}
    with pytest.raises(FewstepError):
        decode({"is": "os:system"})


@pytest.mark.usefixtures("_own_trust")
def test_trust_covers_a_package_with_its_submodules_and_no_namesakes():
    trust("shop")
    codec.check_trusted("shop")
    codec.check_trusted("shop.recipes.mine")
    for other in ("shopping", "shop2.recipes", "my.shop", "sho"):
        with pytest.raises(FewstepError):
            codec.check_trusted(other)


def test_an_impostor_with_a_foreign_module_name_is_refused():
    impostor = make_dataclass("Below", [("sigma", float)])
    impostor.__module__ = "os"
    with pytest.raises(FewstepError, match="not part of fewstep"):
        encode(impostor(1.0))
    assert there_and_back(Below(1.0)) == Below(1.0)
