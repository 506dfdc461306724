"""Any conversation, in LangChain's messages or LlamaIndex's, reaches every member whole or is refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import byte_level_tokenizer
from faces import CHATTING
from hypothesis import given, settings
from hypothesis import strategies as st
from test_convention import TEMPLATES
from transformers import AutoModelForCausalLM, LlamaConfig

from packllm import Member, Pack, PromptError
from packllm.decode.request import Request

CONTROL = ["<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "<|endoftext|>", "<tool_call>"]
FRAGMENTS = st.sampled_from(
    [*CONTROL, "\n", " ", "Hello", "{", "日本", "😀", "é", "e\u0301", "\x00", "{{ x }}", "\ue000"]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=4), max_size=4).map("".join)
CONTENTS = TEXTS | st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), max_size=3)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
CALLS = st.tuples(TEXTS, st.dictionaries(TEXTS, JSON, max_size=2))
ENUMS = st.lists(TEXTS, min_size=1, max_size=2).map(lambda values: {"enum": values})
PARAMETERS = st.recursive(
    st.dictionaries(TEXTS, st.just({"type": "integer"}) | ENUMS, max_size=2).map(
        lambda p: {"type": "object", "properties": p}
    ),
    lambda inner: st.dictionaries(TEXTS, inner, max_size=2).map(lambda p: {"type": "object", "properties": p}),
    max_leaves=3,
)


class Overheard(Pack):
    """A pack that keeps what its members were last given to read."""

    def _request(self, *args: Any) -> Request:
        self.heard = super()._request(*args)
        return self.heard

    def read(self) -> dict[str, tuple[str, int]]:
        """Each member's prompt with control tokens spelled out, and how many of those there are."""
        found = {}
        for k, prompt in self.heard.encoded[0].items():
            name, vocabulary = self.members[k].name, self.members[k].encoder.vocabulary
            text = b"".join(vocabulary.tokens[i] for i in prompt.ids).decode()
            found[name] = text, sum(i in vocabulary.control for i in prompt.ids)
        return found


@pytest.fixture(scope="module")
def overheard() -> Overheard:
    """One tiny model with each kind of chat template; that which leaves roles out in silence stays out."""
    config = LlamaConfig(
        vocab_size=len(byte_level_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    model, members = AutoModelForCausalLM.from_config(config).eval(), []
    for name in ("native", "chatml", "strict", "none"):
        tokenizer = byte_level_tokenizer()
        tokenizer.chat_template = TEMPLATES[name]
        members.append(Member(model, tokenizer, name))
    return Overheard(members, decoding="tokens", max_tokens=1)


KINDS = st.sampled_from([*2 * ["system", "user", "assistant", "calls and results"], "late or stray result"])


@st.composite
def conversations(draw) -> list[dict[str, Any]]:
    """Messages in any order."""
    messages: list[dict[str, Any]] = []
    made: list[str] = []
    for kind in draw(st.lists(KINDS, min_size=1, max_size=4)):
        if kind == "calls and results":
            calls = draw(st.lists(CALLS, min_size=1, max_size=2))
            ids = [f"call{len(made) + at}" for at in range(len(calls))]
            functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
            told = [{"id": i, "type": "function", "function": f} for i, f in zip(ids, functions, strict=True)]
            messages.append({"role": "assistant", "content": draw(CONTENTS), "tool_calls": told})
            made += ids
            answered = draw(st.lists(st.sampled_from(ids), unique=True))
        elif kind == "late or stray result":
            answered = [draw(st.sampled_from(made or ["call0"]))]
        else:
            answered = []
            messages.append({"role": kind, "content": draw(CONTENTS)})
        messages += [{"role": "tool", "content": draw(CONTENTS), "tool_call_id": id} for id in answered]
    return messages


@st.composite
def tools(draw) -> list[dict[str, Any]]:
    names = draw(st.lists(TEXTS.filter(bool), max_size=2, unique=True))
    described = [{"name": name, "description": draw(TEXTS), "parameters": draw(PARAMETERS)} for name in names]
    return [{"type": "function", "function": function} for function in described]


def refusal(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str | None:
    """Why not every member can be asked this: its template wants the user to speak first (of tools, the user tells)."""
    made: set[str] = set()
    for message in messages:
        made |= {call["id"] for call in message.get("tool_calls", ())}
        if message["role"] == "tool" and message["tool_call_id"] not in made:
            return "which no message before it makes"
    return "roles must alternate" if messages[0]["role"] == "assistant" and not tools else None


def told(message: dict[str, Any]) -> list[str]:
    """The texts of a message that a prompt must show, in this order."""
    content = message["content"]
    texts = [content] if isinstance(content, str) else [part["text"] for part in content]
    for call in message.get("tool_calls", ()):
        texts += [json.dumps(call["function"][name], ensure_ascii=False) for name in ("name", "arguments")]
    return texts


@pytest.mark.parametrize("face", CHATTING, ids=lambda face: face.name)
@settings(max_examples=100, deadline=None)
@given(messages=conversations(), tools=tools())
def test_every_text_is_in_every_prompt(overheard, face, messages, tools):
    adapter = face(overheard)
    if reason := refusal(messages, tools):
        with pytest.raises(PromptError, match=reason):
            adapter.converse(messages, tools)
        return
    adapter.converse(messages, tools)
    for name, (prompt, controls) in overheard.read().items():
        at = 0
        for text in (text for message in messages for text in told(message)):
            text = text.strip() if name == "strict" else text  # what its template does
            assert text in prompt[at:], (name, prompt)
            at = prompt.index(text, at) + len(text)
        for tool in tools:
            assert json.dumps(tool["function"], ensure_ascii=False) in prompt
        # Control tokens are the template's own: a turn begins and ends, and the answer begins.
        turns = len(messages) + bool(tools and messages[0]["role"] != "system")
        assert controls == {"none": 0, "chatml": 2 * turns + 1}.get(name, controls)
