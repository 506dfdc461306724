"""Adapters of every kind against peft's own output: merged or attached alike, or refused with a tensor's name."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from conftest import _config, byte_level_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from packllm import LoadError
from packllm.engines.load import Loader

IDS = torch.arange(1, 9)[None]

EACH = {"target_modules": ["q_proj", "down_proj"]}
KINDS = {
    "adalora": lambda: peft.AdaLoraConfig(total_step=10, **EACH),
    "boft": lambda: peft.BOFTConfig(**EACH),
    "c3a": lambda: peft.C3AConfig(block_size=16, **EACH),
    "fourier": lambda: peft.FourierFTConfig(**EACH),
    "hra": lambda: peft.HRAConfig(**EACH),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3 and head": lambda: peft.IA3Config(feedforward_modules=["down_proj"], modules_to_save=["lm_head"], **EACH),
    "norms": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "loha": lambda: peft.LoHaConfig(**EACH),
    "lokr": lambda: peft.LoKrConfig(**EACH),
    "oft": lambda: peft.OFTConfig(**EACH),
    "vblora": lambda: peft.VBLoRAConfig(vector_length=16, num_vectors=20, **EACH),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj", "o_proj"]),
    "lora's own bias": lambda: peft.LoraConfig(lora_bias=True, **EACH),
    "a parameter": lambda: peft.LoraConfig(target_parameters=["mlp.up_proj.weight"], **EACH),
    "some tokens": lambda: peft.LoraConfig(trainable_token_indices=[3, 5], **EACH),
    "pissa": lambda: peft.LoraConfig(init_lora_weights="pissa", **EACH),
}
REFUSED = {
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "replicated layers": lambda: peft.LoraConfig(layer_replication=[(0, 2), (1, 3)], **EACH),
    "tied by setting": lambda: peft.LoraConfig(modules_to_save=["embed_tokens"], ensure_weight_tying=True, **EACH),
    "activated": lambda: peft.LoraConfig(alora_invocation_tokens=[3], **EACH),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[tuple[str, bool], Path]:
    """Tiny bases, with and without a head of their own."""
    tokenizer, found = byte_level_tokenizer(), {}
    for architecture in ("llama", "gpt2"):
        for tied in (False, True):
            config = _config(architecture, len(tokenizer) + 8)
            config.tie_word_embeddings, config.num_hidden_layers = tied, 3
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("bases")
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            found[architecture, tied] = folder
    return found


def trained(base: Path, config: peft.PeftConfig, folder: Path) -> torch.Tensor:
    """Save an adapter whose numbers are at random; peft's logits with it as it is loaded again."""
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    tuned.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        return loaded(input_ids=IDS).logits


def ours(specs: list[str]) -> torch.Tensor:
    """The last member's logits."""
    member = Loader().members(specs)[-1]
    with torch.inference_mode():
        if member.adapter is None:
            return member.model(input_ids=IDS).logits
        with member.engine.adapters.use([member.adapter] * IDS.shape[1]):
            return member.model(input_ids=IDS).logits


def check_alike(base: Path, config: peft.PeftConfig, folder: Path) -> None:
    """Alone, where it is merged, and beside its base, where it may be attached."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = trained(base, config, folder)
    with torch.inference_mode():
        untouched = AutoModelForCausalLM.from_pretrained(base)(input_ids=IDS).logits
    assert (expected - untouched).abs().max() > 0.02  # the adapter does something
    for specs in ([f"{base}+{folder}"], [str(base), f"{base}+{folder}"]):
        assert torch.allclose(ours(specs), expected, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_computes_what_peft_does(kind, tied, bases, tmp_path):
    check_alike(bases["llama", tied], KINDS[kind](), tmp_path)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(kind, bases, tmp_path):
    base, config = bases["llama", False], REFUSED[kind]()
    trained(base, config, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as opened:
        tensors = set(opened.keys())
    for specs in ([f"{base}+{tmp_path}"], [str(base), f"{base}+{tmp_path}"]):
        with pytest.raises(LoadError) as caught:
            Loader().members(specs)
        said = str(caught.value)
        assert any(f"{name} is of the kind" in said for name in tensors) or "it sets " in said


@st.composite
def configs(draw) -> tuple[str, bool, peft.LoraConfig]:
    """LoRA in any of its forms that fit together."""
    architecture = draw(st.sampled_from(["llama", "gpt2"]))
    llama = architecture == "llama"
    linear = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"] if llama else ["c_attn", "c_fc", "c_proj"]
    special = ["embed_tokens", "lm_head"] if llama else ["wte"]
    names = draw(st.lists(st.sampled_from(linear), min_size=1, unique=True))
    extra = draw(st.lists(st.sampled_from(special), max_size=1))
    saved = draw(st.lists(st.sampled_from([*special, "norm" if llama else "ln_f"]), max_size=1))
    dora = draw(st.booleans())
    layers = draw(st.sampled_from([None, 1, [0, 2]])) if not extra else None
    one = draw(st.sampled_from(names))
    patterns = {one: 2, rf"{'layers' if llama else 'h'}\.1\..*{one}": 3}
    # One: peft sorts several by name when it saves them, and then cannot read its own.
    chosen = {pattern: patterns[pattern] for pattern in draw(st.lists(st.sampled_from(list(patterns)), max_size=1))}
    config = peft.LoraConfig(
        r=draw(st.integers(1, 5)),
        lora_alpha=draw(st.integers(1, 9)),
        target_modules=[*names, *extra],
        use_rslora=draw(st.booleans()),
        use_dora=dora,
        bias=draw(st.sampled_from(["none", "all", "lora_only"])),
        rank_pattern=chosen,
        alpha_pattern=draw(st.sampled_from([{}, {one: 7}, chosen])),
        modules_to_save=[name for name in saved if name not in extra] or None,
        layers_to_transform=layers,
        fan_in_fan_out=not llama and draw(st.booleans()),
        init_lora_weights=False,
    )
    return architecture, draw(st.booleans()), config


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(configs())
def test_lora_of_any_form_computes_what_peft_does(bases, tmp_path_factory, drawn):
    architecture, tied, config = drawn
    check_alike(bases[architecture, tied], config, tmp_path_factory.mktemp("adapter"))
