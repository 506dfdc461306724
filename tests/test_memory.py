"""Memory before loading, against what loading then takes."""

from __future__ import annotations

import json
import os
import struct

import peft
import pytest
import torch
from conftest import TEMPLATE, byte_level_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import packllm
from packllm import LoadError, OptionError, Pack
from packllm.cli import app
from packllm.engines.base import Read
from packllm.engines.load import Loader
from packllm.engines.memory import bytes_of
from packllm.engines.transformers import kv
from packllm.machine import free_memory
from packllm_eval.tiny import byte_tokenizer, tiny_model

FAMILIES = {
    "llama": "float32",
    "gpt2": "float32",
    "mistral": "bfloat16",  # looks back a few tokens, and is packed: all are kept
    "qwen3_next": "float32",  # recurrent states beside attention
    "deepseek_v3": "bfloat16",  # MLA, mixture of experts
    "gemma3_text": "float16",  # windows in some layers, tied embeddings
    "gemma3n_text": "float32",
    "gemma4_text": "float32",  # sizes that differ between layers
    "falcon_h1": "float32",
    "bloom": "bfloat16",
    "gpt_oss": "bfloat16",

    "mamba2": "float32",
    "exaone4": "float32",
    "phi3": "float16",
    "aya_vision": "float32",  # what reads images is left out
}
TOKENS = 96


def save(model, folder, dtype="float32", tokenizer=None) -> str:
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return str(folder)


def taken(member) -> tuple[int, int]:
    """Bytes of a loaded member's weights, and of its cache after TOKENS tokens."""
    tensors = {tensor.data_ptr(): tensor for tensor in [*member.model.parameters(), *member.model.buffers()]}
    sequence = member.open()
    (answer,) = member.engine.read([Read(sequence, [at % 200 for at in range(TOKENS)], "none")])
    assert not isinstance(answer, Exception)
    cache = sum(tensor.numel() * tensor.element_size() for tensor in kv.tensors(sequence.cache))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), cache


@pytest.mark.parametrize("family", FAMILIES)
def test_an_estimate_is_what_loading_takes(family, tmp_path):
    folder = save(tiny_model(family), tmp_path / "model", FAMILIES[family])
    loader = Loader()
    footprint = loader.footprint(loader.spec(folder))
    found = packllm.estimate(folder)
    pack = Pack.load(folder)
    weights, cache = taken(pack.members[0])
    assert found[0] == ("model", footprint.weights, footprint.cache.token_bytes)
    assert found.weights == pytest.approx(weights, rel=0.02)
    assert footprint.cache.after(TOKENS) == pytest.approx(cache, rel=0.02)
    assert footprint.parameters == sum(parameter.numel() for parameter in pack.members[0].model.parameters())
    assert pack.memory() == list(found)
