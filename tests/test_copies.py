"""Copies of adapters share their pack; pickled ones load it again from what it was loaded from."""

from __future__ import annotations

import copy
import pickle

import pytest
from saying import saying

from langchain_packllm import ChatPackLLM, PackLLM
from llama_index.llms.packllm import PackLLM as LlamaIndexPackLLM
from packllm import Pack, PackError

PROMPT = "once upon a time"
ASKS = {
    ChatPackLLM: lambda llm: llm.invoke(PROMPT).content,
    PackLLM: lambda llm: llm.invoke(PROMPT),
    LlamaIndexPackLLM: lambda llm: llm.complete(PROMPT).text,
}
ADAPTERS = pytest.mark.parametrize("adapter", list(ASKS))


@pytest.fixture(scope="module")
def loaded(make_member, byte_tokenizer, tmp_path_factory) -> Pack:
    folder = tmp_path_factory.mktemp("model")
    make_member("llama", 0).model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return Pack.load([f"a={folder}"], dtype="float32", max_tokens=5, top_k=7)


@ADAPTERS
def test_deep_copies_share_the_pack_and_nothing_else(adapter, loaded):
    for pack in (loaded, saying("hello")):
        llm = adapter(pack=pack, temperature=0.5, seed=1)
        copied = copy.deepcopy(llm)
        assert copied.pack is pack
        copied.temperature = 0.0
        assert llm.temperature == 0.5
        assert ASKS[adapter](copy.copy(llm)) == ASKS[adapter](llm)


@ADAPTERS
def test_a_pickle_loads_the_same_pack_again(adapter, loaded):
    llm = adapter(pack=loaded, stop=["e"])
    again = pickle.loads(pickle.dumps(llm))
    assert again.pack is not loaded
    assert again.pack.fingerprint == loaded.fingerprint
    assert (again.stop, again.max_tokens, again.top_k) == (("e",), 5, 7)
    assert ASKS[adapter](again) == ASKS[adapter](llm)
    assert ASKS[adapter](llm)  # the pickled object goes on working


def test_packs_are_copied_and_pickled_so_too(loaded):
    assert copy.deepcopy(loaded) is copy.copy(loaded) is loaded
    again = pickle.loads(pickle.dumps(loaded))
    assert again.options == loaded.options
    assert again.generate(PROMPT).text == loaded.generate(PROMPT).text


@ADAPTERS
def test_member_objects_cannot_be_pickled_and_the_error_says_what_can(adapter):
    for thing in (saying("hello"), adapter(pack=saying("hello"))):
        with pytest.raises(PackError, match="load it by names or folders"):
            pickle.dumps(thing)
