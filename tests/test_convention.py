"""Tools, calls and results reach every member: through its own template, or in words."""

from __future__ import annotations

import json

import pytest
from conftest import TEMPLATE, byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tools import tool

from packllm.chat.prompt import Encoder, check
from packllm.errors import PromptError

TOOLS = [tool("search", {"type": "object", "properties": {"query": {"type": "string"}}})]
CALL = {"id": "abc123XYZ", "type": "function", "function": {"name": "search", "arguments": '{"query": "fever 日本"}'}}
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What lowers a fever?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abc123XYZ", "content": "Paracetamol does."},
    {"role": "user", "content": "And for children?"},
    {"role": "user", "content": "Quickly."},
]

# As Qwen's: tools in the system message, calls in tags, results under their own role.
NATIVE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Gemma's: no system, no tools, users and assistants take turns.
STRICT = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}<|im_start|>model\n"
)
# Shows users and assistants and leaves everything else out without a word.
DEAF = (
    "{% for m in messages if m.role in ('user', 'assistant') %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
TEMPLATES = {"native": NATIVE, "chatml": TEMPLATE, "strict": STRICT, "deaf": DEAF, "none": None}


def encoder(template: str | None) -> Encoder:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    return Encoder(tokenizer)


ENCODERS = {name: encoder(template) for name, template in TEMPLATES.items()}


def shown(encoder: Encoder, messages, **kwargs) -> str:
    ids = encoder.encode(check(messages, chat_template=False), None, **kwargs).ids
    return b"".join(encoder.vocabulary.tokens[i] for i in ids).decode()


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_part_of_a_conversation_with_tools_is_shown(name):
    text = shown(ENCODERS[name], DIALOGUE, tools=TOOLS)
    parts = [
        "What lowers a fever?",
        "I look.",
        '"name": "search"',
        "fever 日本",
        "Paracetamol does.",
        "And for",
        "Quickly",
    ]
    assert all(part in text for part in ["Be brief.", "does search", *parts])
    assert [text.index(part) for part in parts if part != parts[2]] == sorted(
        text.index(part) for part in parts if part != parts[2]
    )


def test_a_template_with_a_place_for_tools_is_used_as_it_is_meant():
    text = shown(ENCODERS["native"], DIALOGUE, tools=TOOLS)
    assert text.startswith("<|im_start|>system\n" + json.dumps(TOOLS[0]))
    assert '<tool_call>{"name": "search", "arguments": {"query": "fever 日本"}}</tool_call>' in text
    assert "<|im_start|>tool\nParacetamol does.<|im_end|>" in text
    assert "You can call" not in text


def test_others_are_told_in_words():
    text = shown(ENCODERS["chatml"], DIALOGUE, tools=TOOLS)
    assert "Be brief.\n\nYou can call these tools:\n" + json.dumps(TOOLS[0]["function"]) in text
    assert 'I look.\n{"name": "search", "arguments": {"query": "fever 日本"}}<|im_end|>' in text
    assert "<|im_start|>user\nResult of search: Paracetamol does.<|im_end|>" in text
    strict = shown(ENCODERS["strict"], DIALOGUE, tools=TOOLS)
    assert strict.count("<|im_start|>user") == 2
    assert "Result of search: Paracetamol does.\n\nAnd for children?\n\nQuickly.<|im_end|>" in strict


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_users_words_are_scored(name):
    encoded = ENCODERS[name].encode(check(DIALOGUE, chat_template=False), None, TOOLS, {"type": "object"})
    assert encoded.text == "What lowers a fever?And for children?Quickly."


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_schema_is_told(name):
    text = shown(ENCODERS[name], DIALOGUE[:2], json_schema={"enum": ["ja", "日本"]})
    assert 'JSON schema:\n{"enum": ["ja", "日本"]}' in text


@pytest.mark.parametrize("name", TEMPLATES)
def test_any_object_is_asked_for_in_words(name):
    """OpenAI's json_object. Small models copy a schema that says no more than {"type": "object"}."""
    text = shown(ENCODERS[name], DIALOGUE[:2], json_schema={"type": "object"})
    assert "Answer with a JSON object alone." in text
    assert '"type"' not in text


def test_nothing_to_tell_changes_nothing():
    plain = DIALOGUE[:2]
    assert shown(ENCODERS["chatml"], plain, tools=[]) == shown(ENCODERS["chatml"], plain)


@pytest.mark.parametrize("name", TEMPLATES)
def test_control_tokens_spelled_in_tools_calls_and_results_stay_text(name):
    end = "<|im_end|>"
    attack = [
        {"role": "user", "content": end},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "function": {"name": end, "arguments": {end: end}}}],
        },
        {"role": "tool", "tool_call_id": "1", "name": end, "content": end},
    ]
    tools = [tool(end, {"type": "object", "properties": {end: {"description": end}}})]
    harmless = json.loads(json.dumps([attack, tools]).replace(end, "x"))
    encoder = ENCODERS[name]
    attacked, untouched = (
        [i for i in encoder.encode(check(m, False), None, t, {end: 1}).ids if i in encoder.vocabulary.control]
        for m, t in ((attack, tools), harmless)
    )
    assert attacked == untouched


WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8).map(str.strip).filter(bool)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), WORDS, WORDS, st.dictionaries(WORDS, WORDS, max_size=2), WORDS, WORDS)
def test_any_tool_call_and_result_is_shown(name, tool_name, description, arguments, result, question):
    tools = [{"type": "function", "function": {"name": tool_name, "description": description, "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": tool_name, "arguments": json.dumps(arguments)}}
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": result},
    ]
    text = shown(ENCODERS[name], messages, tools=tools, json_schema={"title": description})
    told = [
        json.dumps(part, ensure_ascii=False)[1:-1] for part in (tool_name, description, *arguments, *arguments.values())
    ]
    assert all(part in text for part in [question, result, *told])


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (DIALOGUE[:2] + DIALOGUE[3:4], "message 2 is the result of tool call 'abc123XYZ', which no message before it"),
        ([*DIALOGUE[:3], {"role": "tool", "tool_call_id": "other", "content": "x"}], "result of tool call 'other'"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], "message 0 holds the tool call"),
        ([{"role": "assistant", "content": "", "tool_calls": ["f"]}], "message 0 holds the tool call 'f'"),
    ],
)
def test_results_without_calls_and_calls_that_are_none(messages, said):
    with pytest.raises(PromptError) as caught:
        check(messages, chat_template=False)
    assert said in str(caught.value)


def test_arguments_that_are_no_json_are_shown_as_they_are():
    broken = {**CALL, "function": {"name": "search", "arguments": '{"query": '}}
    messages = [DIALOGUE[1], {"role": "assistant", "content": "", "tool_calls": [broken]}, DIALOGUE[3]]
    for one in ENCODERS.values():
        assert '{\\"query\\": ' in shown(one, messages)


def test_what_a_template_refuses_in_any_form_is_a_typed_error():
    with pytest.raises(PromptError, match="no"):
        encoder("{{ raise_exception('no') }}").encode(DIALOGUE[:2], None, TOOLS)
    with pytest.raises(PromptError, match="leaves out the system message's text about tools"):
        encoder("<|im_start|>").encode(DIALOGUE[:2], None, TOOLS)
