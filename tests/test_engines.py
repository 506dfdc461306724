"""The contract of engines, over models of eight architectures, adapters of a base, and no model at all."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from elsewhere import pretended
from engines.bytes import ByteEngine, ByteSequence
from engines.contract import *  # noqa: F403
from engines.contract import Subject
from test_batches import saved_experts
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache, GPTNeoConfig, MambaConfig, MixtralConfig

from packllm import Member
from packllm.engines.load import Loader

TEXT = (
    "The court shall order relief. What is the capital of France? Once upon a time there was a planner, and it "
    "chose an index scan."
)


def config_of(kind: str, size: int):
    common = {"vocab_size": size, "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None}
    if kind == "gpt-neo":
        layers = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
        return GPTNeoConfig(**common, **layers, hidden_size=32, max_position_embeddings=512)
    if kind == "bloom":
        return BloomConfig(**common, hidden_size=32, n_layer=2, n_head=4, pad_token_id=None)
    if kind == "mamba":
        return MambaConfig(**common, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=None)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    experts_ = {"num_local_experts": 4, "num_experts_per_tok": 2}
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 512}
    return MixtralConfig(**common, **shape, **heads, **experts_)


@cache
def own_model(kind: str, size: int):
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config_of(kind, size)).eval()


def caches() -> int:
    return sum(isinstance(thing, DynamicCache) for thing in gc.get_objects())


def torch_subject(members: Sequence[Member], models: Sequence[object] = ()) -> Subject:
    """Members of one engine, and models that say the same as each."""
    engine, models = members[0].engine, models or [members[0].model]
    of_adapter = {member.adapter: model for member, model in zip(members, models, strict=True)}

    def truth(ids: Sequence[int], adapter: int | None) -> Tensor:
        with torch.inference_mode():
            model = of_adapter[adapter]
            logits = model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False).logits[0]
        return logits[:, : engine.vocabulary_size].float().log_softmax(-1).cpu()

    @contextmanager
    def poisoned(token: int) -> Iterator[None]:
        def check(module, args) -> None:
            if token in args[0].flatten().tolist():
                raise RuntimeError("out of memory")

        hook = engine.model.get_input_embeddings().register_forward_pre_hook(check)
        try:
            yield
        finally:
            hook.remove()

    ids = members[0].encoder.encode(TEXT).ids[:44]
    lose = lambda sequence: sequence.lose()  # noqa: E731
    return Subject(engine, truth, ids, poisoned, lose, caches, tuple(of_adapter))


KINDS = ["llama", "gpt2", "qwen", "gemma", "gpt-neo", "bloom", "mamba", "mixtral"]


GPU = pytest.param("gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.fixture(params=[*KINDS, "adapters", "bytes", "pretended gpu", GPU])
def subject(request, make_member, byte_tokenizer, tmp_path, monkeypatch) -> Iterator[Subject]:
    if request.param != "pretended gpu":
        yield subject_of(request.param, make_member, byte_tokenizer, tmp_path)
        return
    found = subject_of("qwen", make_member, byte_tokenizer, tmp_path)
    with pretended(monkeypatch, found.engine):
        yield found


def subject_of(kind: str, make_member, byte_tokenizer, tmp_path) -> Subject:
    if kind == "bytes":
        return byte_subject()
    if kind == "adapters":
        members = Loader().members(saved_experts(make_member("llama", 5), tmp_path))
        return torch_subject(members, [member.merged() for member in members])
    if kind in ("llama", "gpt2", "qwen", "gemma"):
        return torch_subject([make_member(kind)])
    if kind == "gpu":
        return torch_subject([Member(copy.deepcopy(make_member("qwen").model).cuda(), byte_tokenizer, kind)])
    return torch_subject([Member(own_model(kind, len(byte_tokenizer)), byte_tokenizer, kind)])


def byte_subject() -> Subject:
    engine = ByteEngine(TEXT.encode() * 3)

    @contextmanager
    def poisoned(token: int) -> Iterator[None]:
        engine.poison = token
        yield
        engine.poison = None

    def truth(ids: Sequence[int], adapter: int | None) -> Tensor:
        return torch.stack([torch.from_numpy(engine.row(list(ids[: n + 1]))) for n in range(len(ids))])

    def held() -> int:
        return sum(isinstance(thing, ByteSequence) and thing.counts is not None for thing in gc.get_objects())

    return Subject(engine, truth, list(TEXT.encode()[:44]), poisoned, ByteSequence.lose, held)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed(kind, make_member, byte_tokenizer):
    """Several sequences are one pass where the attention can be replaced; elsewhere each has its own."""
    if kind in ("llama", "gpt2", "qwen", "gemma"):
        engine = make_member(kind).engine
    else:
        engine = Member(own_model(kind, len(byte_tokenizer)), byte_tokenizer, kind).engine
    assert engine.packs == (kind in ("llama", "gpt2", "qwen", "gemma", "mixtral"))
    assert engine.rewinds == (kind != "mamba")
