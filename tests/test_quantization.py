"""Weights in fewer bits: refused on CPUs with the reason; checkpoints that need a package say which."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

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


def by_transformers(settings: Callable[[], Any]) -> Callable[[Path, Path], None]:
    """Writes a model as transformers quantises it."""

    def write(full: Path, folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(full, quantization_config=settings(), device_map="cpu")
        model.save_pretrained(folder)

    return write


def eight_bits() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def packed(full: Path, folder: Path) -> None:
    """As llm-compressor writes it: weights of linear layers in 8 bits, a scale a row."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    written = {}
    for name, weight in load_file(full / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            written[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True) / 127
        written[f"{name}_packed"] = pack_to_int32((weight / scale).round().to(torch.int8), 8)
        written |= {f"{name}_scale": scale, f"{name}_shape": torch.tensor(weight.shape)}
    folder.mkdir()
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((full / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


WRITTEN = {
    "torchao": ("torchao", by_transformers(eight_bits), 0.6),
    "bitsandbytes in 8 bits": ("bitsandbytes", by_transformers(lambda: BitsAndBytesConfig(load_in_8bit=True)), 0.6),
    "bitsandbytes in 4 bits": ("bitsandbytes", by_transformers(lambda: BitsAndBytesConfig(load_in_4bit=True)), 0.5),
    "compressed-tensors": ("compressed_tensors", packed, 1.01),  # held in full
}


@pytest.mark.parametrize("method", WRITTEN)
def test_a_quantised_checkpoint_runs_beside_the_full_one(method, tmp_path):
    """Token by token, near its numbers, in the memory that was told."""
    module, write, most = WRITTEN[method]
    pytest.importorskip(module, reason=f"{module} is not installed")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1,
        vocab_size=len(byte_tokenizer()), bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    full, folder = tmp_path / "full", tmp_path / "less"
    LlamaForCausalLM(config).save_pretrained(full)
    write(full, folder)
    for path in (full, folder):
        byte_tokenizer().save_pretrained(path)
    pack = Pack.load([full, folder], weighting="uniform", max_tokens=6)
    answer = pack.generate("Once upon a time")
    assert (answer.decoding, answer.usage.completion_tokens) == ("tokens", 6)
    right, found = pack.weigh("Once upon a time there was a dog").nll
    assert 0 < abs(found - right) < 0.2
    (_, whole, _), (_, held, _) = pack.memory()
    assert held < most * whole
    assert packllm.estimate(folder).weights == pytest.approx(held, rel=0.1)


def test_eight_bit_floats_are_held_in_full_where_they_cannot_be_run(folder):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    found = packllm.estimate(folder(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[128, 128]))
    assert found.members[0].dtype == "float32"
    assert "dequantized here" in found.members[0].note
