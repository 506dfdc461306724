"""Models that LangChain writes down: what a dump makes again, what cannot be dumped, and keys of caches beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.load import dumpd, dumps, load, loads
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnableSequence
from test_tools import tool

from langchain_packllm import ChatPackLLM, PackLLM
from packllm import LoadError, Pack

PROMPT = "once upon a time"
MINE = {"valid_namespaces": ["langchain_packllm"], "allowed_objects": [ChatPackLLM, PackLLM]}
ADAPTERS = pytest.mark.parametrize("adapter", [ChatPackLLM, PackLLM])


class Started(BaseCallbackHandler):
    """What tracers are told of the model."""

    def on_llm_start(self, serialized: dict[str, Any], *_: Any, **__: Any) -> None:
        self.told = serialized

    def on_chat_model_start(self, serialized: dict[str, Any], *_: Any, **__: Any) -> None:
        self.told = serialized


@pytest.fixture(scope="module")
def folders(make_member, byte_tokenizer, tmp_path_factory) -> list[Path]:
    """Two models on disk."""
    parent = tmp_path_factory.mktemp("models")
    for seed in range(2):
        make_member("llama", seed).model.save_pretrained(parent / f"m{seed}")
        byte_tokenizer.save_pretrained(parent / f"m{seed}")
    return [parent / f"m{seed}" for seed in range(2)]


@ADAPTERS
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"dtype": "float32", "device_map": "cpu"},
        {"dtype": torch.float32, "device_map": {"": torch.device("cpu")}, "trust_remote_code": True},
        {"temperature": 0.9, "seed": 3, "stop": ["the", "日"], "weighting": {"a": 0.75, "m1": 0.25}},
        {"tools": [tool("find", {"type": "object", "properties": {"lc": {"type": "string"}}})], "tool_choice": "none"},
        {"name": "mine", "unit": "byte", "align": False, "prefix_cache_mb": 0},
    ],
)
def test_a_dump_makes_the_same_model_again(adapter, folders, words):
    llm = adapter(models=[f"a={folders[0]}", folders[1]], max_tokens=6, **words)
    dumped = json.loads(json.dumps(dumpd(llm)))
    assert dumped["id"] == adapter.lc_id()
    again = load(dumped, **MINE)
    assert type(again) is adapter
    assert again.asdict() == llm.asdict()
    assert again.name == llm.name
    assert dumpd(again) == dumped
    assert StrOutputParser().invoke(again.invoke(PROMPT)) == StrOutputParser().invoke(llm.invoke(PROMPT))


@ADAPTERS
def test_a_pack_that_was_loaded_is_written_down_with_the_options_in_force(adapter, folders):
    pack = Pack.load(folders, temperature=0.9, seed=1, max_tokens=6, top_k=4)
    llm = adapter(pack=pack, temperature=0.0)
    assert load(dumpd(llm), **MINE).asdict() == llm.asdict()


@ADAPTERS
def test_chains_are_written_down_whole(adapter, folders):
    chain = PromptTemplate.from_template("{a}") | adapter(models=folders, max_tokens=6) | StrOutputParser()
    chained = [RunnableSequence, PromptTemplate, StrOutputParser, adapter]
    again = loads(dumps(chain), valid_namespaces=["langchain_packllm"], allowed_objects=chained)
    assert again.invoke({"a": PROMPT}) == chain.invoke({"a": PROMPT})


@ADAPTERS
def test_a_folder_that_is_gone_is_said_when_the_dump_is_loaded(adapter, folders):
    dumped = dumpd(adapter(models=folders))
    dumped["kwargs"]["models"][1] = "./gone"
    with pytest.raises(LoadError, match="gone"):
        load(dumped, **MINE)


@ADAPTERS
def test_member_objects_cannot_be_written_down_but_their_model_can_be_traced(adapter, pack):
    llm, started = adapter(pack=pack, name="mine", max_tokens=3), Started()
    dumped = dumpd(llm)
    assert (dumped["type"], dumped["id"][-1], dumped["name"]) == ("not_implemented", adapter.__name__, "mine")
    llm.invoke(PROMPT, config={"callbacks": [started]})
    assert started.told == dumped
    with pytest.raises(NotImplementedError, match="doesn't implement serialization"):
        load(dumped, **MINE)


@ADAPTERS
def test_tracers_are_told_what_the_models_were_loaded_from(adapter, folders):
    started = Started()
    adapter(models=folders, max_tokens=3).invoke(PROMPT, config={"callbacks": [started]})
    assert started.told["kwargs"]["models"] == [str(folder) for folder in folders]


@ADAPTERS
def test_caches_tell_contents_apart_that_a_dump_does_not(adapter, make_member, byte_tokenizer, tmp_path):
    """Two packs of Member objects of one name; a folder with one model, then with another."""
    cache = InMemoryCache()
    packs = [Pack([make_member("llama", seed, name="same")]) for seed in range(2)]
    byte_tokenizer.save_pretrained(tmp_path)
    for member in (pack.members[0] for pack in packs[:]):
        member.model.save_pretrained(tmp_path)
        packs.append(Pack.load([tmp_path]))
    for llm in [adapter(pack=pack, cache=cache, max_tokens=3) for pack in packs]:
        llm.invoke(PROMPT)
        llm.temperature, llm.seed = 1.0, 7  # after a run, for which LangChain keeps what it dumped
        llm.invoke(PROMPT)
    assert len(cache._cache) == 2 * len(packs)
