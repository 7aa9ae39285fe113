"""Every option that is read has a type and a range; errors give the option, its value and what is expected."""

from __future__ import annotations

import math

import pytest

from mllm_jax.checkpoints.config_json import read_grid, read_square
from mllm_jax.checkpoints.config_options import IDLE, LARGEST, ConfigOptions, named_as
from mllm_jax.errors import ConfigError

NAN, INF = math.nan, math.inf
FIT = {
    "size": [1, 7, LARGEST],
    "count": [0, 1],
    "number": [0, 1, -2.5, 1e-12, 10_000],
    "flag": [True, False],
    "text": ["", "gelu"],
    "part": [{}, {"a": 1}],
    "id": [0, 5],
    "resolutions": [],
}
WRONG = {
    "size": [0, -1, "4", 2.0, True, 10**12, 2**31, NAN, [], [[]], {}],
    "count": [-1, 2.0, False, "0", 2**31],
    "number": ["1", True, NAN, INF, -INF, 1e308, 10**400, [], {}],
    "flag": [0, 1, "true", [], 1.0],
    "text": [1, True, ["gelu"], {}],
    "part": [1, "a", [], [{}], True],
    "id": [-2, 1.0, "1", True, [1], [[]]],
    "sizes": [0, [0], ["4"], [[4]], {}, [2.0], True],
    "counts": [-1, "1", [-1], [1.5], [[0]], {}, True],
    "integers": ["1", [1.5], [[1]], {}, [None], True],
    "numbers": [[NAN], "1", [[0.5]], {}],
    "ids": [[[]], "1", [-1], [True], {}, 1.5],
    "texts": ["a", [1], [["a"]], {"a": 1}],
    "resolutions": [[1], [[1]], [[1, 0]], [[1, 2, 3]], "1", [[1, "2"]]],
}


@pytest.mark.parametrize("kind,value", [(kind, value) for kind, values in FIT.items() for value in values])
def test_what_fits_is_given_back(kind, value):
    assert getattr(ConfigOptions({"x": value}, "it"), kind)("x") == value


def test_one_or_several():
    options = ConfigOptions(dict(one=3, several=[3, 4], floats=[1, 0.5], pairs=[[1, 2]], names=["a"]), "it")
    assert options.sizes("one") == options.integers("one") == options.counts("one") == options.ids("one") == (3,)
    assert options.sizes("several") == options.integers("several") == options.ids("several") == (3, 4)
    assert options.numbers("floats") == (1, 0.5) and options.texts("names") == ("a",)
    assert options.resolutions("pairs") == ([1, 2],)


@pytest.mark.parametrize("kind,value", [(kind, value) for kind, values in WRONG.items() for value in values])
def test_what_does_not_fit_is_named(kind, value):
    with pytest.raises(ConfigError) as refusal:
        getattr(ConfigOptions({"x": value}, "it"), kind)("x")
    given, expected, todo = refusal.value.given, refusal.value.expected, refusal.value.todo
    assert given.startswith("it: x=") and expected.startswith("x to be") and todo


def test_values_are_shown_short():
    with pytest.raises(ConfigError) as refusal:
        ConfigOptions({"x": ["y" * 10**6] * 10**5}, "it").size("x")
    assert len(refusal.value.given) < 2000


def test_absent_and_null():
    options = ConfigOptions({"x": None}, "it")
    assert "x" not in options and options.size("x", None) is None and options.ids("x") == () and options.id("x") is None
    assert ConfigOptions({"x": -1}, "it").id("x") is None, "early LLaMAs spell null so"
    for kind in WRONG.keys() - {"id", "ids"}:
        with pytest.raises(ConfigError, match="it without 'x'"):
            getattr(options, kind)("x")


@pytest.mark.parametrize("value,allowed", [(True, (1,)), (1, (True,)), (0, (False,)), ([[]], ("a",)), ({}, (None,))])
def test_a_flag_is_no_number(value, allowed):
    with pytest.raises(ConfigError, match="x="):
        ConfigOptions({"x": value}, "it").only("x", *allowed)


def test_an_unknown_option_is_refused_and_an_idle_one_is_not():
    ConfigOptions(dict.fromkeys(IDLE, 3), "it").done()
    ConfigOptions({"pruned_heads": {}, "surprise": None}, "it").done()
    with pytest.raises(ConfigError, match=r"it with surprise=\[3\]"):
        ConfigOptions({"surprise": [3], "num_beams": 1}, "it").done()
    with pytest.raises(ConfigError, match="pruned_heads="):
        ConfigOptions({"pruned_heads": {"0": [1]}}, "it").done()


def test_heads_that_do_not_divide():
    options = ConfigOptions({"hidden_size": 10, "heads": 3}, "it")
    with pytest.raises(ConfigError, match="heads=3"):
        options.divided("hidden_size", "heads")
    ConfigOptions({"hidden_size": 9, "heads": 3}, "it").divided("hidden_size", "heads")


@pytest.mark.parametrize("value,side", [(4, 4), ([4, 4], 4), ([4], 4), ([4, 3], None), ([4, 4, 4], None), ([], None)])
def test_squares(value, side):
    options = ConfigOptions({"x": value}, "it")
    if side is None:
        with pytest.raises(ConfigError, match="x="):
            read_square(options, "x")
    else:
        assert read_square(options, "x") == side


@pytest.mark.parametrize("image,patch", [(16, 32), (16_384, 1), (10**6, 14)])
def test_grids_that_no_tower_has(image, patch):
    with pytest.raises(ConfigError, match="image_size="):
        read_grid(ConfigOptions(dict(image_size=image, patch_size=patch), "it"))


@pytest.mark.parametrize(
    "values", [{"architectures": [[]]}, {"architectures": "A"}, {"architectures": 7}, {"model_type": []}]
)
def test_what_a_file_says_that_it_is(values):
    with pytest.raises(ConfigError, match="architectures=|model_type="):
        named_as(values)
    assert named_as({"architectures": ["A"], "model_type": "a"}) == (("A",), "a") and named_as({}) == ((), None)
