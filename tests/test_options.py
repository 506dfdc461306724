"""Options: what is refused, and what the error says."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from packllm.errors import OptionError, PackError
from packllm.options import Options, make_options

BAD = [
    ("max_tokens", 0, "greater than or equal to 1"),
    ("max_tokens", 2.5, "integer"),
    ("max_tokens", "many", "integer"),
    ("max_tokens", True, "not a boolean"),
    ("temperature", -0.1, "greater than or equal to 0"),
    ("temperature", math.nan, "finite"),
    ("temperature", math.inf, "finite"),
    ("temperature", None, "number"),
    ("temperature", False, "not a boolean"),
    ("top_p", 0, "greater than 0"),
    ("top_p", 1.01, "less than or equal to 1"),
    ("top_p", True, "not a boolean"),
    ("top_k", 0, "greater than or equal to 1"),
    ("top_k", True, "not a boolean"),
    ("seed", -1, "greater than or equal to 0"),
    ("seed", 2**64, "less than 18446744073709"),
    ("seed", True, "not a boolean"),
    ("min_weight", 1.0, "less than 1"),
    ("min_weight", -0.5, "greater than or equal to 0"),
    ("tau", 0.0, "greater than 0"),
    ("alpha", -1, "greater than or equal to 0"),
    ("beta", -1, "greater than or equal to 0"),
    ("batch_size", 0, "greater than or equal to 1"),
    ("pool", "cubic", "'linear' or 'log'"),
    ("unit", "word", "'token' or 'byte'"),
    ("on_member_error", "ignore", "'raise' or 'drop'"),
    ("chat_template", "perhaps", "boolean"),
    ("score_on", "", "at least 1 character"),
    ("score_on", 5, "string"),
]


@pytest.mark.parametrize(("name", "value", "valid"), BAD)
def test_bad_value_is_named_with_its_range(name, value, valid):
    with pytest.raises(OptionError) as caught:
        make_options({name: value})
    assert str(caught.value).startswith(f"{name}={value!r}: ")
    assert valid in str(caught.value)
    assert isinstance(caught.value, PackError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("value", "shown"),
    [("", "stop=''"), (["a", ""], "stop=''"), (5, "stop=5"), (["a", 3], "stop=3"), (b"a", "stop=b'a'")],
)
def test_bad_stop(value, shown):
    with pytest.raises(OptionError, match="non-empty strings") as caught:
        make_options({"stop": value})
    assert str(caught.value).startswith(shown + ":")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(5, "5"), ({"a": "x"}, "'x'"), ({"a": True}, "True"), ({"a": math.nan}, "nan"), (["em"], "['em']")],
)
def test_bad_weighting(value, shown):
    with pytest.raises(OptionError, match="takes a name or numbers") as caught:
        make_options({"weighting": value})
    assert str(caught.value).startswith(f"weighting={shown}:")


def test_the_first_of_several_bad_options_is_reported():
    with pytest.raises(OptionError, match=r"^top_p=2"):
        make_options({"temperature": 1.0, "seed": -1, "top_p": 2})


@pytest.mark.parametrize(
    ("misspelt", "near"), [("temprature", "temperature"), ("max_token", "max_tokens"), ("TopK", None)]
)
def test_unknown_option_lists_the_valid_names(misspelt, near):
    with pytest.raises(OptionError) as caught:
        make_options({misspelt: 1})
    text = str(caught.value)
    assert repr(misspelt) in text
    listed = text.partition("Valid options: ")[2].split(", ")
    assert listed == list(Options.model_fields)
    assert (f"did you mean {near!r}?" in text) if near else ("did you mean" not in text)


def test_bounds_themselves_are_valid():
    options = make_options(
        {"max_tokens": 1, "temperature": 0, "top_p": 1, "top_k": 1, "seed": 2**64 - 1, "min_weight": 0, "alpha": 0}
    )
    assert (options.max_tokens, options.temperature, options.top_p, options.seed) == (1, 0.0, 1.0, 2**64 - 1)


def test_every_valid_seed_can_seed_a_sampler():
    import torch

    from packllm.decode.sampling import make_sampler

    for seed in (0, 2**63, 2**64 - 1):
        assert make_sampler(1.0, 1.0, None, make_options({"seed": seed}).seed)(torch.zeros(3)) in (0, 1, 2)


@pytest.mark.parametrize(
    ("given", "stored"), [("END", ("END",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ()), (None, ())]
)
def test_stop_takes_one_string_or_several(given, stored):
    assert make_options({"stop": given}).stop == stored


def test_override_keeps_the_rest_and_validates():
    base = make_options({"temperature": 0.5, "stop": "x", "weighting": {"a": 1}})
    changed = base.override({"temperature": 1, "stop": None})
    assert (changed.temperature, changed.stop, changed.weighting) == (1.0, (), {"a": 1.0})
    assert (base.temperature, base.stop) == (0.5, ("x",))
    assert base.override({}) is base
    with pytest.raises(OptionError, match="top_p=7"):
        base.override({"top_p": 7})
    with pytest.raises(OptionError, match="unknown option 'best_of'"):
        base.override({"best_of": 2})


def test_options_are_frozen():
    options = make_options({})
    with pytest.raises(ValidationError, match="frozen"):
        options.temperature = 1.0
    assert options.temperature == 0.0


def test_the_callers_objects_are_not_kept():
    weighting, stop = {"a": 1.0}, ["x"]
    options = make_options({"weighting": weighting, "stop": stop})
    weighting["b"] = 2.0
    stop.append("y")
    assert options.weighting == {"a": 1.0}
    assert options.stop == ("x",)
