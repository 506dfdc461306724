"""The subjects of the benchmarks: members, text, the machine."""

from __future__ import annotations

import copy
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from packllm import starter
from packllm.engines.load import Loader
from packllm.engines.member import Member
from packllm.errors import LoadError

NOISE = 0.05
"""Noise in the weights of copies that complete a pack, relative to a matrix's standard deviation."""


def build(models: Sequence[str] | None, count: int, quick: bool = False) -> tuple[list[Member], list[str]]:
    """`count` members, and notes on their origin."""
    notes = []
    if not models and starter_is_here():
        models = starter.specs()
    if models:
        members = Loader().members(models)[:count]
    else:
        notes.append("neither --model nor the starter pack: small members with random weights")
        members = [random_member(quick)]
    originals = len(members)
    for at in range(originals, count):
        members.append(noisy_copy(members[at % originals], seed=at))
    if originals < count and models:
        notes.append(f"{originals} given, {count - originals} more are copies of them with noise in their weights")
    return members, notes


def starter_is_here() -> bool:
    """Whether Pack.starter() works without a model hub."""
    folder = Path(starter.__file__).parent
    return starter.base_model() != starter.HUB_ID and all((folder / name).is_dir() for name in starter.EXPERTS)


def noisy_copy(member: Member, seed: int, noise: float = NOISE) -> Member:
    """A copy of a member with slightly different weights, which predicts almost the same.

    Args:
        noise: standard deviation of the noise in a matrix, relative to the matrix's own.
    """
    model = copy.deepcopy(member.merged())
    generator = torch.Generator(device=member.model.device).manual_seed(seed)
    with torch.inference_mode():
        for weight in model.parameters():
            if weight.dim() > 1:
                noise_ = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=torch.float32)
                weight.add_((noise_ * weight.float().std() * noise).to(weight.dtype))
    return Member(model, member.tokenizer, f"{member.name}-noise{seed}", member.encoder)


def random_member(quick: bool) -> Member:
    """A small Llama with random weights and a byte-level tokenizer, made in memory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 if quick else 8192, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([prose()], trainer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32 if quick else 256,
        intermediate_size=64 if quick else 768,
        num_hidden_layers=2 if quick else 8,
        num_attention_heads=4,
        max_position_embeddings=8192,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Member(LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer), "random")


def prose() -> str:
    """English text that comes with Python: its language reference, without long runs of spaces and rules."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise LoadError("the bench reads its text from pydoc_data, which this Python lacks") from None
    return re.sub(r"([*=~\-.])\1{3,}|[ \t]{2,}", " ", "\n\n".join(topics.values()))


def text_of(members: Sequence[Member], tokens: int) -> str:
    """A text of at most `tokens` tokens, and close to that, for every member."""
    text = prose()[: 8 * tokens]
    while (longest := max(len(member.encoder.encode(text).ids) for member in members)) > tokens:
        text = text[: min(len(text) - 1, len(text) * tokens // longest)]
    return text


def machine() -> dict[str, Any]:
    """The facts about the machine that the figures depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": cores,
        "threads": torch.get_num_threads(),
        "load": None if load is None else round(load, 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
