"""ChatPackLLM before LangChain's own standard tests, offline, with a pack of two tiny real models.

Some of these tests ask for sense (magic_function(3) is to be called with 3), so the two models have learnt the
questions of the tests by heart, in seconds: a dialogue at a time, through the prompts that the pack itself makes.
What stays skipped is what the members cannot read: images, sound, PDF.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import chdir
from copy import deepcopy
from typing import Any

import pytest
import torch
from conftest import byte_level_tokenizer
from langchain_core.language_models import BaseChatModel
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.integration_tests.chat_models import magic_function, unicode_customer
from langchain_tests.unit_tests import ChatModelUnitTests
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from langchain_packllm import ChatPackLLM
from packllm import Pack
from packllm.chat.prompt import Encoder


@tool
def get_weather(location: str) -> str:
    """Get the weather at a location."""
    return "It's sunny."


GREETING = {
    "type": "function",
    "function": {
        "name": "greeting_generator",
        "description": "Generate a greeting in a particular style of speaking.",
        "parameters": {
            "type": "object",
            "properties": {"answer_style": {"type": "string"}},
            "required": ["answer_style"],
        },
    },
}
DIALOGUES: list[tuple[str, Any, str]] = [
    ("Hello", None, "Hello! How are you?"),
    ("hi", None, "Hi there."),
    ("how are you", None, "I am well, thank you."),
    (
        "What is the value of magic_function(3)? Use the tool.",
        magic_function,
        '{"name": "magic_function", "arguments": {"input": 3}}',
    ),
    (
        "What is the weather in San Francisco, CA?",
        get_weather,
        '{"name": "get_weather", "arguments": {"location": "San Francisco, CA"}}',
    ),
    (
        "Using the tool, generate a Pirate greeting.",
        GREETING,
        '{"name": "greeting_generator", "arguments": {"answer_style": "Pirate"}}',
    ),
    (
        "Create a customer named '你好啊集团' (Hello Group) - a Chinese technology company",
        unicode_customer,
        '{"name": "unicode_customer", "arguments": '
        '{"customer_name": "你好啊集团", "description": "a Chinese technology company"}}',
    ),
    (
        "Create a customer named 'こんにちは株式会社' (Hello Corporation) - a Japanese company",
        unicode_customer,
        '{"name": "unicode_customer", "arguments": '
        '{"customer_name": "こんにちは株式会社", "description": "a Japanese company"}}',
    ),
]


def _untaught(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _teach(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int) -> LlamaForCausalLM:
    """The model, able to answer DIALOGUES as they stand; the loss is on the answers alone."""
    encoder = Encoder(tokenizer)
    rows = []
    for question, offered, answer in DIALOGUES:
        tools = [] if offered is None else [convert_to_openai_tool(offered)]
        prompt = encoder.encode([{"role": "user", "content": question}], tools=tools).ids
        rows.append((prompt, [*encoder.continuation(answer), tokenizer.eos_token_id]))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        whole = torch.tensor([*prompt, *answer])
        ids[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimiser.step()
    assert loss < 0.1, f"the models of these tests did not learn their dialogues: loss {loss:.2f}"
    return model.eval()


@pytest.fixture(scope="module")
def learnt_pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    offered = [convert_to_openai_tool(offered) for _, offered, _ in DIALOGUES if offered is not None]
    corpus = [str(offered), *(question + "\n" + answer for question, _, answer in DIALOGUES)]
    tokenizer = byte_level_tokenizer(900, corpus * 4)
    first = _teach(_untaught(tokenizer), tokenizer, steps=80)
    second = _teach(deepcopy(first), tokenizer, steps=8)
    with chdir(tmp_path_factory.mktemp("models")):  # names that are the same everywhere, for the snapshot
        for name, model in (("learnt-0", first), ("learnt-1", second)):
            model.save_pretrained(name)
            tokenizer.save_pretrained(name)
        yield Pack.load(["learnt-0", "learnt-1"])


class _OnePack:
    """What the two suites are told of ChatPackLLM."""

    @pytest.fixture(autouse=True)
    def _loaded(self, learnt_pack: Pack) -> None:
        self.pack = learnt_pack

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatPackLLM

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"pack": self.pack}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "learnt-1"


class TestUnit(_OnePack, ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _listed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """test_serdes loads "all" classes, by which LangChain means those of a list of its own. For the test we are on
        it; users name the class: `load(dump, allowed_objects=[ChatPackLLM], valid_namespaces=["langchain_packllm"])`.
        """
        path = tuple(ChatPackLLM.lc_id())
        module = importlib.import_module("langchain_core.load.load")
        monkeypatch.setitem(module.ALL_SERIALIZABLE_MAPPINGS, path, path)
        monkeypatch.setattr(module, "_default_class_paths_cache", {})

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return {"LC_OUTPUT_VERSION": "v1"}, self.chat_model_params, {"output_version": "v1"}


class TestIntegration(_OnePack, ChatModelIntegrationTests):
    @property
    def enable_vcr_tests(self) -> bool:
        return True  # there is nothing to record: the test runs without cassettes
