"""Weights in fewer bits: refused on CPUs with the reason; checkpoints that need a package say which."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from transformers import BitsAndBytesConfig

import packllm
from packllm import LoadError, OptionError, Pack
from packllm.engines.transformers import quantization
from packllm_eval.tiny import byte_tokenizer, tiny_model

on_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")

CHECKPOINTS = {
    "gptq": ({"bits": 4, "group_size": 128, "desc_act": False, "sym": True}, "optimum", "optimum"),
    "awq": ({"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, "gptqmodel", "gptqmodel"),
    "bitsandbytes": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes", "bitsandbytes"),
    "compressed-tensors": (
        {"format": "pack-quantized", "config_groups": {}},
        "compressed_tensors",
        "compressed-tensors",
    ),
    "torchao": ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}, "torchao", "torchao"),
    "hqq": ({"quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}, "hqq", "hqq"),
    "quanto": ({"weights": "int8"}, "optimum.quanto", "optimum-quanto"),
    "aqlm": ({}, "aqlm", "aqlm"),
    "auto-round": ({"bits": 4, "group_size": 128}, "auto_round", "auto-round"),
}


@pytest.fixture
def folder(tmp_path):
    """A tiny model, whose config may claim to be quantised."""
    tiny_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)

    def make(**settings) -> str:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        return str(tmp_path)

    return make


@pytest.mark.parametrize("method", CHECKPOINTS)
def test_a_checkpoint_names_the_package_that_it_needs(method, folder):
    settings, module, package = CHECKPOINTS[method]
    if find_spec(module.partition(".")[0]):
        pytest.skip(f"{module} is installed")
    spec = folder(quant_method=method, **settings)
    with pytest.raises(LoadError, match=package) as caught:
        Pack.load(spec)
    assert "\n" not in str(caught.value)
    found = packllm.estimate(spec)
    assert package in found.members[0].note
    assert found.members[0].dtype == method


@on_cpu
@pytest.mark.parametrize("wanted", ["int8", "int4", BitsAndBytesConfig(load_in_8bit=True), {"quant_method": "hqq"}])
def test_on_a_cpu_it_is_refused_with_the_reason(wanted, folder):
    with pytest.raises(LoadError, match=r"for accelerators: .* 66 ms a token against 59 .*\.gguf"):
        Pack.load("nobody/nothing", quantization=wanted)
    with pytest.raises(LoadError, match=r"\.gguf"):
        packllm.estimate("nobody/nothing", quantization=wanted)


@pytest.mark.parametrize("wrong", ["int3", "", 8, True, ["int8"]])
def test_a_misspelt_one_names_the_valid(wrong):
    with pytest.raises(OptionError, match=r"quantization=.* is unknown; valid: int8, int4"):
        Pack.load("nobody/nothing", quantization=wrong)


def test_with_an_accelerator_the_names_stand_for_what_is_installed(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(quantization, "find_spec", lambda name: name == "bitsandbytes")
    eight, four = (quantization.config_of(name, "auto") for name in ("int8", "int4"))
    assert (eight.load_in_8bit, four.load_in_4bit, four.bnb_4bit_quant_type) == (True, True, "nf4")
    assert (quantization.bits_of(eight), quantization.bits_of(four)) == (8, 4.5)
    assert quantization.config_of(four, "auto") is four
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match="needs bitsandbytes or torchao"):
        quantization.config_of("int8", "auto")
    with pytest.raises(LoadError, match="for accelerators"):
        quantization.config_of("int8", "cpu")


def test_eight_bit_floats_are_held_in_full_where_they_cannot_be_run(folder):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    found = packllm.estimate(folder(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128]))
    assert found.members[0].dtype == "float32"
    assert "dequantized here" in found.members[0].note
