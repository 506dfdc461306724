"""Reasoning comes apart from the answer, in the core and in both frameworks, whole and while it streams."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from conftest import TEMPLATE
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage
from llama_index.core.base.llms.types import ChatMessage, TextBlock, ThinkingBlock
from saying import saying
from test_tools import tool

from langchain_packllm import ChatPackLLM
from llama_index.llms.packllm import PackLLM
from packllm import Pack, parse_tool_calls
from packllm.chat.reasoning import THOUGHTS, ReasoningStream

ASK = [{"role": "user", "content": "Why?"}]
OPENS = TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
SEARCH = tool("search", {"type": "object", "properties": {"q": {"type": "string"}}})
CALL = '<tool_call>\n{"name": "search", "arguments": {"q": "%s"}}\n</tool_call>'
SPECIAL = ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]")
KNOWS_MARKS = "{# [THINK][/THINK][TOOL_CALLS][ARGS] #}" + TEMPLATE
PACKS = {
    "written": lambda text: saying(f"<think>\nhm\n</think>\n\n{text}"),
    "opened by the prompt": lambda text: saying(f"hm\n</think>\n\n{text}", OPENS),
    "control tokens": lambda text: saying(f"[THINK]hm[/THINK]{text}", KNOWS_MARKS, SPECIAL),
}
assert OPENS != TEMPLATE


@pytest.fixture(params=PACKS)
def thinker(request) -> Pack:
    return PACKS[request.param]("Because.")


def test_the_core_gives_reasoning_apart(thinker):
    answer = thinker.generate(ASK)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("Because.", "hm", "stop")
    assert answer.as_dict()["reasoning"] == "hm"
    chunks = list(thinker.stream(ASK))
    assert "".join(chunk.text for chunk in chunks) == "Because."
    assert "".join(chunk.reasoning for chunk in chunks) == "hm"
    assert len(chunks) > 5  # it streams
    assert answer.usage.completion_tokens == chunks[-1].usage.completion_tokens


def test_langchain_gives_reasoning_apart(thinker):
    llm = ChatPackLLM(pack=thinker)
    streamed = None
    for chunk in llm.stream("Why?"):
        streamed = chunk if streamed is None else streamed + chunk
    for message in (llm.invoke("Why?"), asyncio.run(llm.ainvoke("Why?")), streamed):
        assert message.content == "Because."
        assert message.additional_kwargs["reasoning_content"] == "hm"
        assert [block["type"] for block in message.content_blocks] == ["reasoning", "text"]
        assert message.content_blocks[0]["reasoning"] == "hm"
    versioned = ChatPackLLM(pack=thinker, output_version="v1").invoke("Why?")
    assert [block["type"] for block in versioned.content] == ["reasoning", "text"]


def test_llama_index_gives_reasoning_apart(thinker):
    llm = PackLLM(pack=thinker)
    steps = list(llm.stream_chat([ChatMessage("Why?")]))
    assert "".join(step.delta for step in steps) == "Because."
    assert "".join(step.additional_kwargs.get("thinking_delta", "") for step in steps) == "hm"
    for answer in (llm.chat([ChatMessage("Why?")]), steps[-1]):
        thought, said = answer.message.blocks
        assert isinstance(thought, ThinkingBlock)
        assert (thought.content, said.text) == ("hm", "Because.")
        assert answer.message.content == "Because."


@pytest.mark.parametrize("call", [CALL % "real", '{"name": "search", "arguments": {"q": "real"}}'])
@pytest.mark.parametrize("opened", [False, True])
def test_what_is_only_thought_of_is_not_called(call, opened):
    thought = f"I could say {CALL % 'draft'}\nor\n" + call.replace("real", "draft") + "\nbut no.\n</think>\n\n"
    pack = saying(thought + call if opened else "<think>\n" + thought + call, OPENS if opened else TEMPLATE)
    llm = ChatPackLLM(pack=pack).bind_tools([SEARCH])
    message = llm.invoke("Why?")
    assert [one["args"] for one in message.tool_calls] == [{"q": "real"}]
    assert not message.invalid_tool_calls
    assert "draft" in message.additional_kwargs["reasoning_content"]
    answer = PackLLM(pack=pack).chat([ChatMessage("Why?")], tools=[SEARCH])
    calls = PackLLM(pack=pack).get_tool_calls_from_response(answer)
    assert [one.tool_kwargs for one in calls] == [{"q": "real"}]


def test_calls_that_control_tokens_mark_are_read_where_tools_are_offered():
    pack = saying('[THINK]hm[/THINK][TOOL_CALLS]search[ARGS]{"q": "a"}', KNOWS_MARKS, SPECIAL)
    message = ChatPackLLM(pack=pack).bind_tools([SEARCH]).invoke("Why?")
    assert [(one["name"], one["args"]) for one in message.tool_calls] == [("search", {"q": "a"})]
    assert message.additional_kwargs["reasoning_content"] == "hm"
    assert pack.generate(ASK).text == 'search{"q": "a"}'  # control tokens are no text


def test_what_is_no_conversation_has_no_reasoning():
    assert saying("<think>hm</think>a", chat_template=False).generate("Why").text == "<think>hm</think>a"


COUNTED = {  # one token a byte, or a control token
    "<think>\nhé\n</think>|\n\nBecause.": TEMPLATE,
    "hm\n</think>|\n\nBecause <think>, he said.": OPENS,
    "[THINK]hm[/THINK]|Because.": KNOWS_MARKS,
    "<think>a</think><thought>b</thought>|c": TEMPLATE,
    "|Because <think>hm</think>.": TEMPLATE,
    "|<thin ice": TEMPLATE,
    "<think>\nnever ends|": TEMPLATE,
}


@pytest.mark.parametrize("options", [{}, {"stop": ["</th", ", he", "\n\nx"]}, {"decoding": "cool"}])
@pytest.mark.parametrize("script", COUNTED)
def test_the_tokens_of_reasoning_are_counted(script, options):
    thought, said = script.split("|")
    pack = saying(thought + said, COUNTED[script], SPECIAL if "[THINK]" in thought else (), **options)
    if SPECIAL[0] in thought and "decoding" in options:
        pytest.skip("control tokens are no text of segments")
    tokens = 2 + len("hm") if SPECIAL[0] in thought else len(thought.encode())
    answer, last = pack.generate(ASK), [*pack.stream(ASK)][-1]
    if "</th" in options.get("stop", ()) and "</think>" in thought + said:  # ends within the reasoning
        tokens = min(tokens, len((thought + said).partition("</th")[0].encode()) + len("</th"))
    assert (answer.usage.reasoning_tokens, last.usage.reasoning_tokens) == (tokens, tokens)
    assert answer.usage.as_dict()["reasoning_tokens"] == tokens <= answer.usage.completion_tokens
    usage = ChatPackLLM(pack=pack).invoke("Why?").usage_metadata
    assert usage["output_token_details"] == {"reasoning": tokens}


@pytest.mark.parametrize(("limit", "said"), [(3, "hm\n"), (30, "Because.")])
def test_reasoning_that_is_cut_leaves_no_text(limit, said):
    answer = saying("hm\n</think>\n\nBecause.", OPENS, max_tokens=limit).generate(ASK)
    assert (answer.text or answer.reasoning + "\n") == said


def test_earlier_reasoning_reaches_templates_that_ask_for_it_and_no_other():
    asks = TEMPLATE.replace(
        "{{ message['content'] }}", "({{ message.reasoning_content or '' }}){{ message['content'] }}"
    )
    history = [HumanMessage("a"), AIMessage("b", additional_kwargs={"reasoning_content": "hm"}), HumanMessage("c")]
    blocks = [HumanMessage("a"), AIMessage([{"type": "reasoning", "reasoning": "hm"}, "b"]), HumanMessage("c")]
    thinking = ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"), TextBlock(text="b")])
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for template, more in ((TEMPLATE, 0), (asks, len("()") * 3 + len("hm"))):
        pack = saying("x", template, max_tokens=1)
        alone = saying("x", max_tokens=1).generate(plain).usage.prompt_tokens
        for messages in (history, blocks):
            usage = ChatPackLLM(pack=pack).invoke(messages).usage_metadata
            assert usage["input_tokens"] == alone + more
        raw = PackLLM(pack=pack).chat([ChatMessage("a"), thinking, ChatMessage("c")]).raw
        assert raw["usage"]["prompt_tokens"] == alone + more


PIECES = st.sampled_from([*THOUGHTS, *THOUGHTS.values(), "<", "</", "think", "[", "\n", " ", "a", "é", ">"])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(PIECES, max_size=10), st.sampled_from([None, "</think>", "[/THINK]"]), st.data())
def test_reasoning_does_not_depend_on_how_the_answer_is_cut(pieces, close, data):
    text = "".join(pieces)
    whole = ReasoningStream(close).feed(text, last=True)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5))), len(text)]
    stream, parts = ReasoningStream(close), []
    for start, end in pairwise(cuts):
        parts.append(stream.feed(text[start:end], last=False))
    parts.append(stream.feed("", last=True))
    assert tuple("".join(side) for side in zip(*parts, strict=True)) == whole
    if close is None and not any(text.lstrip().startswith(mark) for mark in THOUGHTS) and "channel" not in text:
        assert whole == ("", text)
        assert parse_tool_calls(text.replace("\n", " "), []).content == text.replace("\n", " ")
