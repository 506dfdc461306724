"""Whatever is handed in as a prompt, a message, a call or an option: an answer, or a typed error."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, HumanMessage
from llama_index.core.base.llms.types import CacheControl, CachePoint, ChatMessage, ImageBlock, TextBlock, ToolCallBlock
from saying import saying

from langchain_packllm import ChatPackLLM
from llama_index.llms.packllm import PackLLM
from packllm import OptionError, Pack, PackError, PromptError, parse_tool_calls
from packllm.options import Options

FUZZ = settings(max_examples=150, deadline=None, derandomize=True)
HI = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "sqrt", "arguments": "{}"}}


class Sullen:
    """Says nothing of itself."""

    def __repr__(self) -> str:
        raise RuntimeError("no")

    __eq__ = __bool__ = __len__ = __str__ = __repr__  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


PLAIN = [None, True, 0, -1, 1.5, float("nan"), float("inf"), 2**70, (), [], {}, [[[]]], "\ud800"]
BUILT_IN = [b"x", bytearray(b"x"), memoryview(b"x"), {1, 2}, frozenset(), object(), object, len, range(3)]
NUMPY = [np.array([1, 2]), np.array(["a"]), np.array([]), np.float32(1.5), np.int64(3), np.str_("a"), np.bool_(True)]
OTHERS = [Decimal("1.5"), Path("x"), deque(["x"]), MappingProxyType({"a": 1}), {"a": {1}}, {(1, 2): 3}]
ODD = st.sampled_from([*PLAIN, *BUILT_IN, *NUMPY, *OTHERS, {"type": []}, {"type": "image_url"}]) | st.builds(
    lambda: (letter for letter in "ab")
)
TEXT = st.sampled_from(["", "hi", "<think>", "{}", '{"a": 1}'])
KEYS = [
    "role",
    "content",
    "tool_calls",
    "tool_call_id",
    "name",
    "reasoning_content",
    "refusal",
    "id",
    "type",
    "function",
]
NESTED = st.recursive(
    ODD | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYS, "arguments", "text", "thinking", "summary"]), inner, max_size=4)
    ),
    max_leaves=5,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": TEXT | ODD, "arguments": NESTED}) | ODD},
        optional={"id": TEXT | ODD},
    )
    | NESTED,
    max_size=2,
)
PARTS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["text", "input_text", "thinking", "reasoning", "text-plain", "server_tool_call"])
            | ODD
        },
        optional={"text": TEXT | ODD, "thinking": NESTED, "reasoning": NESTED, "summary": NESTED},
    )
    | NESTED,
    max_size=3,
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "developer"]) | ODD},
    optional={
        "content": TEXT | PARTS | NESTED,
        "tool_calls": CALLS | NESTED,
        "tool_call_id": TEXT | ODD,
        "reasoning_content": TEXT | ODD,
        "refusal": TEXT | ODD,
        "extra": NESTED,
    },
)
PROMPTS = st.lists(MESSAGES, max_size=3) | NESTED


@pytest.fixture(scope="module")
def short() -> Pack:
    return saying("ok", max_tokens=1)


@contextmanager
def only_typed_errors(*frameworks: str) -> Iterator[None]:
    """Lets packllm's errors pass, and those that a framework itself raises."""
    try:
        yield
    except PackError:
        pass
    except Exception as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not any(f"/{name}/" in raised_in for name in (*frameworks, "pydantic")):
            raise


FRAMEWORKS = ("langchain_core", "llama_index/core")


@FUZZ
@given(prompt=PROMPTS)
def test_odd_prompts(short, prompt):
    for ask in (short.generate, short.weigh, short.count_tokens, lambda prompt: list(short.stream(prompt))):
        with only_typed_errors():
            ask(prompt)


@FUZZ
@given(name=st.sampled_from(sorted(Options.model_fields)), value=NESTED)
def test_odd_options(short, name, value):
    for ask in (short.generate, ChatPackLLM(pack=short).invoke, PackLLM(pack=short).complete):
        with only_typed_errors(*FRAMEWORKS):
            ask("hi", **{name: value})


@FUZZ
@given(value=NESTED)
def test_odd_batches_continuations_and_tools(short, value):
    asks = [short.generate_batch, lambda odd: short.score("hi", odd), lambda odd: short.rerank("hi", odd)]
    for ask in [*asks, lambda odd: parse_tool_calls("hi", odd)]:
        with only_typed_errors():
            ask(value)


@FUZZ
@given(content=TEXT | PARTS, extra=st.dictionaries(st.sampled_from(KEYS), NESTED, max_size=2), given=NESTED)
def test_odd_messages_of_frameworks(short, content, extra, given):
    def of_langchain() -> None:
        ChatPackLLM(pack=short).invoke(
            [HumanMessage("a"), AIMessage(content, additional_kwargs=extra), HumanMessage("b")]
        )

    def of_llama_index() -> None:
        block = ToolCallBlock(tool_call_id="c", tool_name="sqrt", tool_kwargs=given)
        answer = ChatMessage(role="assistant", blocks=[TextBlock(text="x"), block], additional_kwargs=extra)
        PackLLM(pack=short).chat([ChatMessage("a"), answer, ChatMessage(str(content), additional_kwargs=extra)])

    asks = [of_langchain, of_llama_index, lambda: ChatPackLLM(pack=short).invoke(given)]
    for ask in [*asks, lambda: PackLLM(pack=short).chat(given), lambda: PackLLM(pack=short).chat([given])]:
        with only_typed_errors(*FRAMEWORKS):
            ask()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"hi", "not b'hi'"),
        ((letter for letter in "hi"), "must be text or a non-empty list of messages"),
        ([{"role": np.array(["user"]), "content": "hi"}], "has role array"),
        ([HI, {"role": "assistant", "tool_calls": [{**CALL, "id": ["c1"]}]}], "an id is text"),
        ([HI, {"role": "assistant", "tool_calls": CALL}], "give a list of calls"),
        ([HI, {"role": "assistant", "tool_calls": np.array([CALL])}], "give a list of calls"),
        ([HI, {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": {1, 2}}}]}], "not JSON"),
        ([HI, {"role": "assistant", "content": "a", "reasoning_content": ["b"]}], "reasoning is text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x" * 9999}]}], "'image_url'"),
        ([{"role": "user", "content": [{"type": "text-plain", "url": "http://a"}]}], "without its words"),
        (["x" * 9999], "must be a mapping"),
    ],
)
def test_errors_say_what_is_odd_in_few_words(short, prompt, said):
    with pytest.raises(PromptError) as caught:
        short.generate(prompt)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [np.array([0.1, 0.2]), Sullen(), {1}])
def test_numpy_and_other_odd_options_are_named(short, value):
    for name in ("temperature", "stop", "tools", "tool_choice", "weighting"):
        with pytest.raises(OptionError, match=name):
            short.generate("hi", **{name: value})


SAID = {
    "text": {"role": "user", "content": "hi"},
    "developer": {"role": "developer", "content": "hi"},
    "input_text": {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    "text-plain": {"role": "user", "content": [{"type": "text-plain", "text": "hi", "mime_type": "text/plain"}]},
    "cache mark": {"role": "user", "content": [{"type": "text", "text": "hi"}, {"cachePoint": {"type": "default"}}]},
}


@pytest.mark.parametrize("kind", SAID)
def test_everyday_messages_are_read_as_their_text(short, kind):
    role = {"developer": "system"}.get(SAID[kind]["role"], "user")
    plain = short.generate([{"role": role, "content": "hi"}, HI]).usage.prompt_tokens
    assert short.generate([SAID[kind], HI]).usage.prompt_tokens == plain


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "content": "b"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}], "refusal": None, "audio": None},
        {"role": "assistant", "content": None, "refusal": "b"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "reasoning", "summary": [{"text": "hm"}]}, "b"]},
        {"role": "assistant", "content": [{"type": "server_tool_call", "id": "1", "name": "web", "args": {}}, "b"]},
        {"role": "assistant", "content": [{"type": "web_search_tool_result", "content": []}, "b"], "tool_calls": None},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
    ],
)
def test_everyday_answers_in_history_are_read_as_their_text(short, answer):
    plain = short.generate([HI, {"role": "assistant", "content": "b"}, HI]).usage.prompt_tokens
    assert short.generate([HI, answer, HI]).usage.prompt_tokens == plain
    if isinstance(answer["content"], list):
        usage = ChatPackLLM(pack=short).invoke([HumanMessage("hi"), AIMessage(answer["content"]), HumanMessage("hi")])
        assert usage.usage_metadata["input_tokens"] == plain


def test_assistants_that_only_call_need_no_content(short):
    result = {"role": "tool", "tool_call_id": "c1", "content": "3"}
    counts = {
        short.generate([HI, {"role": "assistant", **content, "tool_calls": [CALL]}, result]).usage.prompt_tokens
        for content in ({}, {"content": None}, {"content": ""})
    }
    assert len(counts) == 1


def test_cache_points_say_nothing_and_images_are_refused_by_name(short):
    llm = PackLLM(pack=short)
    mark = CachePoint(cache_control=CacheControl(type="ephemeral"))
    marked, plain = ChatMessage(blocks=[TextBlock(text="a"), mark]), ChatMessage("a")
    assert llm.chat([marked]).raw["usage"] == llm.chat([plain]).raw["usage"]
    with pytest.raises(PromptError, match="ImageBlock"):
        llm.chat([ChatMessage(blocks=[ImageBlock(url="http://a/b.png")])])
    with pytest.raises(PromptError, match="image_url"):
        ChatPackLLM(pack=short).invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "x"}}])])
