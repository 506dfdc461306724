"""ChatPackLLM says what Pack says, with calls, structured output, caching and traces that LangChain understands."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import pytest
import torch
from conftest import _config
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage, ChatMessage, HumanMessage, RemoveMessage, SystemMessage, ToolMessage
from pydantic import BaseModel, ValidationError
from test_tools import tool
from transformers import AutoModelForCausalLM
from typing_extensions import TypedDict

from langchain_packllm import ChatPackLLM
from langchain_packllm.messages import pack_messages
from packllm import Member, OptionError, Pack, PromptError

TOKENS = 8
WINDOW = 1024
QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
SEARCH = tool("search", {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]})
NOW = tool("now")
UNKEEPABLE = tool("f", {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]})


class Weather(BaseModel):
    """Weather of a city."""

    sky: Literal["sun", "rain"]
    degrees: int


class WeatherDict(TypedDict):
    """Weather of a city."""

    sky: Literal["sun", "rain"]
    degrees: int


class Recorder(BaseCallbackHandler):
    def __init__(self) -> None:
        self.starts, self.tokens, self.ends, self.errors = 0, [], [], 0

    def on_chat_model_start(self, *_: Any, **__: Any) -> None:
        self.starts += 1

    def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.tokens.append(token)

    def on_llm_end(self, response: Any, **_: Any) -> None:
        self.ends.append(response)

    def on_llm_error(self, *_: Any, **__: Any) -> None:
        self.errors += 1


@pytest.fixture(scope="module")
def pack(byte_tokenizer) -> Pack:
    """Three tiny members as everywhere, with room for tools in the prompt."""
    members = []
    for seed, architecture in enumerate(("llama", "gpt2", "qwen")):
        torch.manual_seed(seed)
        config = _config(architecture, len(byte_tokenizer) + 24)
        config.max_position_embeddings = WINDOW
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        members.append(Member(model, byte_tokenizer, f"{architecture}-{seed}"))
    return Pack(members, max_tokens=12)


@pytest.fixture
def chat(pack: Pack) -> ChatPackLLM:
    return ChatPackLLM(pack=pack, max_tokens=TOKENS)


def joined(chunks: list[Any]) -> Any:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


async def test_every_way_gives_the_text_of_generate(pack, chat):
    expected = pack.generate(MESSAGES, max_tokens=TOKENS).text
    answers = {
        "invoke": chat.invoke(QUESTION),
        "stream": joined(list(chat.stream(QUESTION))),
        "batch": chat.batch([QUESTION, QUESTION])[1],
        "ainvoke": await chat.ainvoke(QUESTION),
        "astream": joined([chunk async for chunk in chat.astream(QUESTION)]),
        "streaming": ChatPackLLM(pack=pack, max_tokens=TOKENS, streaming=True).invoke(QUESTION),
    }
    assert {name: answer.content for name, answer in answers.items()} == dict.fromkeys(answers, expected)
    for answer in answers.values():
        metadata = answer.response_metadata
        assert answer.usage_metadata["output_tokens"] <= TOKENS
        assert metadata["model_name"] == pack.name
        assert metadata["finish_reason"] in ("stop", "length")
        assert metadata["packllm"]["names"] == [member.name for member in pack.members]
        assert metadata["timings"]["total"] > 0
        json.dumps(metadata)


@pytest.mark.parametrize("options", [{"temperature": 0.9, "seed": 3}, {"stop": ["e"]}, {"max_tokens": 3}])
async def test_options_of_a_call(pack, chat, options):
    expected = pack.generate(MESSAGES, **{"max_tokens": TOKENS, **options}).text
    assert chat.invoke(QUESTION, **options).content == expected
    assert joined(list(chat.stream(QUESTION, **options))).content == expected
    assert (await chat.ainvoke(QUESTION, **options)).content == expected


def test_one_member_answers_where_the_call_names_it(pack, chat):
    name = pack.members[1].name
    answer = chat.invoke(QUESTION, model=name)
    assert answer.content == pack.generate(MESSAGES, max_tokens=TOKENS, weighting={name: 1.0}).text
    assert answer.response_metadata["model_name"] == name


def test_messages_of_every_kind():
    messages = [
        SystemMessage("Be brief."),
        HumanMessage([{"type": "text", "text": "a"}, "b"], name="Ann"),
        AIMessage(
            [{"type": "text", "text": "c"}, {"type": "tool_use", "id": "1", "name": "f", "input": {}}],
            tool_calls=[{"name": "f", "args": {"x": 1}, "id": "1"}],
            invalid_tool_calls=[{"name": "g", "args": "{", "id": "2", "error": "no JSON"}],
        ),
        ToolMessage("d", tool_call_id="1", name="f"),
        ChatMessage("e", role="user"),
    ]
    packed = pack_messages(messages)
    assert [message["role"] for message in packed] == ["system", "user", "assistant", "tool", "user"]
    assert packed[1]["name"] == "Ann"
    assert packed[2]["content"] == [{"type": "text", "text": "c"}]
    assert [call["function"] for call in packed[2]["tool_calls"]] == [
        {"name": "f", "arguments": {"x": 1}},
        {"name": "g", "arguments": "{"},
    ]
    assert packed[3]["tool_call_id"] == "1"


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([ChatMessage("a", role="robot")], "role 'robot'; valid roles"),
        ([HumanMessage("a"), ToolMessage("b", tool_call_id="1")], "result of tool call '1'"),
        ([HumanMessage([{"type": "image_url", "image_url": "x"}])], "'image_url'; the members read text only"),
        ([RemoveMessage(id="1")], "RemoveMessage cannot be sent"),
    ],
)
def test_what_cannot_be_sent(chat, messages, said):
    for ask in (chat.invoke, lambda sent: list(chat.stream(sent))):
        with pytest.raises(PromptError) as caught:
            ask(messages)
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "choice", "said"),
    [
        ([SEARCH, SEARCH], "any", "2 tools of the name 'search'"),
        ([SEARCH], "find", "none of 'auto', 'none', 'any', 'search'"),
        ([], "search", "without tools"),
        (
            [tool("f", {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]})],
            "f",
            "cannot be guaranteed",
        ),
    ],
)
def test_contradictory_tools(chat, tools, choice, said):
    with pytest.raises(OptionError) as caught:
        chat.bind_tools(tools, tool_choice=choice).invoke(QUESTION)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("any", {"search", "now"}),
        ("required", {"search", "now"}),
        (True, {"search", "now"}),
        ("now", {"now"}),
        ({"type": "function", "function": {"name": "search"}}, {"search"}),
    ],
)
def test_a_demanded_call_is_made_whole_and_streamed(chat, choice, names):
    bound = chat.bind_tools([SEARCH, NOW], tool_choice=choice, max_tokens=40)
    answer, streamed = bound.invoke(QUESTION), joined(list(bound.stream(QUESTION)))
    (call,) = answer.tool_calls
    assert call["name"] in names
    assert len(call["id"]) == 9
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], call["args"])]
    assert answer.content == streamed.content == ""
    assert answer.invalid_tool_calls == []


@pytest.mark.parametrize("choice", ["none", False])
def test_without_a_choice_of_tools_the_members_are_not_told_of_them(pack, chat, choice):
    answer = chat.bind_tools([SEARCH], tool_choice=choice).invoke(QUESTION)
    assert answer.content == pack.generate(MESSAGES, max_tokens=TOKENS).text
    assert answer.tool_calls == []


def test_chunks_end_once_and_calls_stream_in_pieces(chat):
    chunks = list(chat.bind_tools([SEARCH], tool_choice="any", max_tokens=40).stream(QUESTION))
    assert [chunk.chunk_position for chunk in chunks] == [*[None] * (len(chunks) - 1), "last"]
    assert sum(len(chunk.tool_call_chunks) for chunk in chunks) > 2
    assert [bool(chunk.usage_metadata) for chunk in chunks] == [*[False] * (len(chunks) - 1), True]


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
@pytest.mark.parametrize("schema", [Weather, WeatherDict, Weather.model_json_schema()], ids=["class", "typed", "json"])
def test_structured_output_always_parses(chat, schema, method):
    structured = chat.with_structured_output(schema, method=method, max_tokens=90)
    answer = structured.invoke(QUESTION)
    assert isinstance(answer, Weather if schema is Weather else dict)
    fields = answer.model_dump() if schema is Weather else answer
    assert fields["sky"] in ("sun", "rain")
    assert isinstance(fields["degrees"], int)
    raw = chat.with_structured_output(schema, method=method, include_raw=True, max_tokens=90).invoke(QUESTION)
    assert isinstance(raw["raw"], AIMessage)
    assert raw["parsed"] == answer
    assert raw["parsing_error"] is None


def test_a_limit_below_the_shortest_answer_is_an_error_before_decoding(chat):
    with pytest.raises(OptionError, match=r"max_tokens=3 is too few .* the shortest takes \d+ tokens"):
        chat.with_structured_output(Weather, include_raw=True, max_tokens=3).invoke(QUESTION)


def test_an_unknown_method_is_refused(chat):
    with pytest.raises(OptionError, match="json_schema, function_calling, json_mode"):
        chat.with_structured_output(Weather, method="magic")


def test_openais_response_format(chat):
    given = {"type": "json_schema", "json_schema": {"name": "w", "schema": Weather.model_json_schema()}}
    Weather.model_validate_json(chat.bind_tools([], response_format=given, max_tokens=50).invoke(QUESTION).content)
    free = chat.bind_tools([], response_format={"type": "json_object"}, max_tokens=50).invoke(QUESTION)
    assert isinstance(json.loads(free.content), dict)


def test_profile_and_tracing_words(pack, chat):
    assert chat.profile["max_input_tokens"] == WINDOW
    assert chat.profile["tool_calling"] is chat.profile["structured_output"] is True
    assert chat.profile["image_inputs"] is False
    words = chat._get_ls_params(stop=["x"])
    assert (words["ls_provider"], words["ls_model_name"], words["ls_model_type"]) == ("packllm", pack.name, "chat")
    assert (words["ls_stop"], words["ls_max_tokens"]) == (["x"], TOKENS)
    assert chat.get_num_tokens(QUESTION) == pack.count_tokens(QUESTION)


def test_misspelt_fields_and_options_are_refused(pack, chat):
    with pytest.raises(ValidationError, match="temprature"):
        ChatPackLLM(pack=pack, temprature=1)
    with pytest.raises(OptionError, match="ChatPackLLM takes exactly one"):
        ChatPackLLM()
    with pytest.raises(OptionError, match="did you mean 'temperature'"):
        chat.invoke(QUESTION, temprature=1)


def test_the_cache_tells_options_tools_stop_and_packs_apart(pack, make_member):
    chat = ChatPackLLM(pack=pack, max_tokens=TOKENS, cache=InMemoryCache())
    other = Pack([make_member("llama", 5)], max_tokens=TOKENS)
    asked = [
        lambda: chat.invoke(QUESTION),
        lambda: chat.invoke(QUESTION, temperature=1.0, seed=1),
        lambda: chat.invoke(QUESTION, stop=["e"]),
        lambda: chat.bind_tools([NOW], tool_choice="any", max_tokens=40).invoke(QUESTION),
        lambda: chat.model_copy(update={"stop": ("e", "a")}).invoke(QUESTION),
        lambda: ChatPackLLM(pack=other, max_tokens=TOKENS, cache=chat.cache).invoke(QUESTION),
    ]
    for ask in asked:
        ask()
    assert len(chat.cache._cache) == len(asked)
    recorder = Recorder()
    again = chat.invoke(QUESTION, config={"callbacks": [recorder]})
    assert len(chat.cache._cache) == len(asked)
    assert again.content == pack.generate(MESSAGES, max_tokens=TOKENS).text


async def test_callbacks_fire_once_and_carry_weights_tokens_and_seconds(chat):
    for ask in (chat.invoke, chat.ainvoke):
        recorder, usage = Recorder(), UsageMetadataCallbackHandler()
        answer = ask(QUESTION, config={"callbacks": [recorder, usage]})
        answer = await answer if asyncio.iscoroutine(answer) else answer
        assert (recorder.starts, len(recorder.ends), recorder.errors) == (1, 1, 0)
        info = recorder.ends[0].generations[0][0].generation_info
        assert len(info["packllm"]["weights"]) == len(info["packllm"]["perplexity"]) == 3
        assert info["timings"]["total"] > 0
        assert usage.usage_metadata[chat.model_name]["output_tokens"] == answer.usage_metadata["output_tokens"]
    recorder = Recorder()
    chunks = list(chat.stream(QUESTION, config={"callbacks": [recorder]}))
    assert (recorder.starts, len(recorder.ends), len(recorder.tokens)) == (1, 1, len(chunks))
    assert recorder.ends[0].generations[0][0].message.response_metadata["packllm"]["weights"]


async def test_a_cancelled_task_stops_the_work(pack, chat, monkeypatch):
    closed = asyncio.Event()
    loop = asyncio.get_running_loop()
    stream = pack.stream

    def watched(*args, **kwargs):
        def steps():
            try:
                yield from stream(*args, **kwargs)
            finally:
                loop.call_soon_threadsafe(closed.set)

        return steps()

    monkeypatch.setattr(pack, "stream", watched)
    task = asyncio.create_task(chat.ainvoke(QUESTION, max_tokens=250))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(closed.wait(), 30)


def test_an_agent_runs_tools_and_answers(pack):
    agents = pytest.importorskip("langchain.agents")

    def now() -> str:
        """Tell the time."""
        return "noon"

    calls = []

    @agents.middleware.wrap_model_call
    def call_once(request, handler):
        calls.append(request)
        return handler(request.override(tool_choice="any" if len(calls) == 1 else "none"))

    agent = agents.create_agent(ChatPackLLM(pack=pack, max_tokens=40), [now], middleware=[call_once])
    messages = agent.invoke({"messages": [HumanMessage("time?")]})["messages"]
    assert [type(message).__name__ for message in messages] == ["HumanMessage", "AIMessage", "ToolMessage", "AIMessage"]
    assert messages[2].content == "noon"
    structured = agents.create_agent(ChatPackLLM(pack=pack, max_tokens=50), [], response_format=Weather)
    assert isinstance(structured.invoke({"messages": [HumanMessage("sky?")]})["structured_response"], Weather)
