"""An answer that takes longer than it may ends with a typed error, wherever it is asked for."""

# The clock of these tests counts passes.

from __future__ import annotations

import asyncio
import time

import pytest
from llama_index.core.base.llms.types import ChatMessage
from saying import saying

from langchain_packllm import ChatPackLLM, PackLLM
from llama_index.llms.packllm import PackLLM as LlamaIndexPackLLM
from packllm import AnswerTimeout, Pack, PackError

LONG = "This answer is longer than any of these tests has time for, and so it goes on and on. " * 3


@pytest.fixture
def pack(monkeypatch) -> Pack:
    """Two members, each pass of either taking a second."""
    members = [saying(LONG).members[0], saying(LONG).members[0]]
    members[1].name = "other"
    monkeypatch.setattr(time, "perf_counter", lambda: float(passes(pack)))
    pack = Pack(members, prefix_cache_mb=0, max_tokens=200)
    return pack


def passes(pack: Pack) -> int:
    return sum(member.model.passes for member in pack.members)


ASKS = {
    "generate": lambda pack: pack.generate("a", timeout=9),
    "the pack's own": lambda pack: Pack(pack.members, prefix_cache_mb=0, timeout=9, max_tokens=200).generate("a"),
    "batch": lambda pack: pack.generate_batch(["a", "b"], timeout=9),
    "lazy": lambda pack: pack.generate("a", timeout=9, decoding="lazy", temperature=1.0, seed=1),
    "cool": lambda pack: pack.generate("a", timeout=9, decoding="cool"),
    "cool+rerank": lambda pack: pack.generate("a", timeout=9, decoding="cool+rerank"),
    "mined": lambda pack: pack.generate("a", timeout=9, decoding="mined"),
    "no drafts": lambda pack: pack.generate("a", timeout=9, draft_tokens=1),
    "langchain": lambda pack: PackLLM(pack=pack, timeout=9).invoke("a"),
    "langchain-chat": lambda pack: ChatPackLLM(pack=pack, timeout=9).invoke("a"),
    "langchain-chat, at the call": lambda pack: ChatPackLLM(pack=pack).invoke("a", timeout=9),
    "langchain-chat, batch": lambda pack: ChatPackLLM(pack=pack, timeout=9).batch(["a", "b"]),
    "langchain-chat, async": lambda pack: asyncio.run(ChatPackLLM(pack=pack, timeout=9).ainvoke("a")),
    "llama-index": lambda pack: LlamaIndexPackLLM(pack=pack, timeout=9).complete("a"),
    "llama-index-chat": lambda pack: LlamaIndexPackLLM(pack=pack).chat([ChatMessage("a")], timeout=9),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_an_answer_ends_in_time_with_a_typed_error(pack, ask):
    with pytest.raises(AnswerTimeout, match="timeout=9 seconds") as caught:
        ask(pack)
    assert isinstance(caught.value, PackError)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.seconds == 9
    assert 9 < passes(pack) <= 9 + 24  # what was under way, a block of drafts at most, is finished


def test_a_stream_gives_what_there_is_before(pack):
    said: list[str] = []
    chunks = pack.stream("a", timeout=20)
    with pytest.raises(AnswerTimeout):
        said.extend(chunk.text for chunk in chunks)
    assert LONG.startswith("".join(said))
    assert len("".join(said)) > 3


def test_enough_time_changes_nothing(pack):
    assert pack.generate("a", timeout=10_000, max_tokens=20).text == LONG[:20]
    assert passes(pack) > 9


def test_retries_and_keys_are_accepted_and_never_written_down():
    for adapter in (PackLLM, ChatPackLLM):
        llm = adapter(pack=saying("a"), max_retries=2, api_key="secret-key", timeout=5)
        assert llm.invoke("b")
        assert llm.api_key.get_secret_value() == "secret-key"
        written = [repr(llm), str(llm), llm.model_dump_json(), str(llm.to_json()), str(llm._identifying_params)]
        assert not any("secret-key" in text for text in written)
