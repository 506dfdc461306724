"""ChatPackLLM.batch decodes together, and each input stays a run of its own."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_openai_tool
from saying import saying

from langchain_packllm import ChatPackLLM
from packllm import ContextOverflowError, MemberError, OptionError, Pack

QUESTIONS = ["What is insulin?", "Once upon a time", "SELECT 1", "日本", "The court shall order"]


class Watched(Pack):
    """A pack that notes how many answers were asked for, and how many were under way at most."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lock, self.asked, self.open, self.most = threading.Lock(), 0, 0, 0

    def stream_batch(self, prompts: Any, **options: Any) -> Any:
        return self._counted(super().stream_batch(prompts, **options))

    def stream(self, prompt: Any, **options: Any) -> Any:
        return self._counted(super().stream(prompt, **options))

    def _counted(self, pieces: Any) -> Any:
        with self.lock:
            self.asked, self.open = self.asked + 1, self.open + 1
            self.most = max(self.most, self.open)
        try:
            yield from pieces
        finally:
            with self.lock:
                self.open -= 1

    @property
    def passes(self) -> int:
        return sum(member.engine.forwards for member in self.members)


@pytest.fixture
def pack(members) -> Watched:
    return Watched(members[:2], max_tokens=6, prefix_cache_mb=0)


class Runs(BaseCallbackHandler):
    """Which input each run was of, and what it was answered."""

    def __init__(self) -> None:
        self.asked: dict[Any, str] = {}
        self.told: dict[Any, str] = {}

    def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.asked[run_id] = messages[0][0].content

    def on_llm_end(self, response: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.told[run_id] = response.generations[0][0].text


class AsyncRuns(Runs, AsyncCallbackHandler):
    async def on_chat_model_start(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        Runs.on_chat_model_start(self, *args, **kwargs)

    async def on_llm_end(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        Runs.on_llm_end(self, *args, **kwargs)


def batched(llm: Any, way: str, inputs: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
    return llm.batch(inputs, *args, **kwargs) if way == "sync" else asyncio.run(llm.abatch(inputs, *args, **kwargs))


WAYS = pytest.mark.parametrize("way", ["sync", "async"])


@WAYS
def test_a_batch_is_decoded_together_and_says_what_each_alone_would(pack, way):
    llm = ChatPackLLM(pack=pack)
    start = pack.passes
    alone = [llm.invoke(question).content for question in QUESTIONS]
    middle = pack.passes
    answers = batched(llm, way, QUESTIONS)
    assert pack.passes - middle < (middle - start) / 2
    assert [answer.content for answer in answers] == alone
    assert len(set(alone)) > 1
    assert all(answer.usage_metadata["output_tokens"] for answer in answers)
    assert batched(llm, way, []) == []
    assert [a.content for a in batched(llm.bind(max_tokens=2), way, QUESTIONS[:2])] == [
        llm.invoke(question, max_tokens=2).content for question in QUESTIONS[:2]
    ]


@WAYS
def test_sampled_answers_of_a_batch_are_those_of_each_alone(pack, way):
    llm = ChatPackLLM(pack=pack, temperature=1.0, seed=5)
    alone = [llm.invoke(question).content for question in QUESTIONS]
    assert [answer.content for answer in batched(llm, way, QUESTIONS)] == alone


@WAYS
def test_max_concurrency_and_batch_size_bound_what_is_decoded_together(pack, way):
    llm = ChatPackLLM(pack=pack)
    batched(llm, way, QUESTIONS)
    assert pack.most > 3
    pack.most = 0
    batched(llm, way, QUESTIONS, {"max_concurrency": 2})
    assert pack.most == 2
    pack.most = 0
    batched(ChatPackLLM(pack=pack, batch_size=3), way, QUESTIONS)
    assert pack.most == 3
    pack.most = 0
    batched(llm, way, QUESTIONS, batch_size=1)
    assert pack.most == 1


@WAYS
def test_each_run_has_its_callbacks(pack, way):
    runs = [Runs() if way == "sync" else AsyncRuns() for _ in QUESTIONS]
    answers = batched(ChatPackLLM(pack=pack), way, QUESTIONS, [{"callbacks": [run]} for run in runs])
    for run, question, answer in zip(runs, QUESTIONS, answers, strict=True):
        assert list(run.asked.values()) == [question]
        assert run.told == {next(iter(run.asked)): answer.content}


@WAYS
def test_one_bad_input_is_its_own_error(pack, way):
    inputs = [QUESTIONS[0], "too long " * 2000, QUESTIONS[1]]
    llm = ChatPackLLM(pack=pack)
    first, failed, last = batched(llm, way, inputs, return_exceptions=True)
    assert isinstance(failed, ContextOverflowError)
    assert [first.content, last.content] == [llm.invoke(inputs[0]).content, llm.invoke(inputs[2]).content]
    with pytest.raises(ContextOverflowError):
        batched(llm, way, inputs)
    with pytest.raises(OptionError, match="temperature"):
        batched(llm, way, QUESTIONS, temperature=-1)


@WAYS
def test_a_member_that_fails_fails_every_input(way, pack, monkeypatch):
    monkeypatch.setattr(pack.members[0].model.get_decoder(), "forward", lambda *_, **__: 1 / 0)
    answers = batched(ChatPackLLM(pack=pack), way, QUESTIONS[:2], return_exceptions=True)
    assert [isinstance(answer, MemberError) for answer in answers] == [True, True]


@WAYS
def test_what_the_cache_holds_is_not_asked_again(pack, way):
    llm = ChatPackLLM(pack=pack, cache=InMemoryCache())
    known = llm.invoke(QUESTIONS[1]).content
    pack.asked = 0
    answers = batched(llm, way, QUESTIONS)
    assert answers[1].content == known
    assert pack.asked == 4


@WAYS
def test_a_model_that_streams_batches_one_by_one(pack, way):
    llm = ChatPackLLM(pack=pack)
    answers = batched(ChatPackLLM(pack=pack, streaming=True), way, QUESTIONS[:3])
    assert [answer.content for answer in answers] == [llm.invoke(question).content for question in QUESTIONS[:3]]


def test_a_handler_that_asks_the_same_model_is_answered(pack):
    llm = ChatPackLLM(pack=pack)

    class Curious(BaseCallbackHandler):
        def __init__(self) -> None:
            self.said: list[str] = []

        def on_llm_end(self, response: Any, **kwargs: Any) -> None:
            self.said.append(llm.invoke("And?").content)

    assert len(llm.batch(QUESTIONS[:3], {"callbacks": [curious := Curious()]})) == 3
    assert curious.said == [llm.invoke("And?").content] * 3


# Counting


def test_tokens_of_messages_are_those_of_the_prompt_with_its_tools(pack):
    @tool
    def look_up(term: str) -> str:
        """Look a term up."""
        return term

    llm = ChatPackLLM(pack=Pack(pack.members[:1], max_tokens=1))
    messages = [SystemMessage("Be brief."), HumanMessage("a"), AIMessage("b"), HumanMessage("What is insulin?")]
    for offered in (None, [look_up]):
        told = llm.bind_tools(offered).invoke(messages) if offered else llm.invoke(messages)
        count = llm.get_num_tokens_from_messages(messages, tools=offered)
        assert count == told.usage_metadata["input_tokens"]
    fields = ChatPackLLM(pack=llm.pack, tools=[convert_to_openai_tool(look_up)])
    assert fields.get_num_tokens_from_messages(messages) == count
    assert llm.get_num_tokens("What is insulin?") < llm.get_num_tokens_from_messages([HumanMessage("What is insulin?")])


def test_parallel_tool_calls_false_gives_one_call_whole_and_streamed():
    @tool
    def now() -> str:
        """The time."""
        return "noon"

    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    llm = ChatPackLLM(pack=saying(call * 2))
    assert len(llm.bind_tools([now]).invoke("x").tool_calls) == 2
    one = llm.bind_tools([now], parallel_tool_calls=False)
    streamed = sum(list(one.stream("x"))[1:], start=next(iter(one.stream("x"))))
    assert len(one.invoke("x").tool_calls) == len(streamed.tool_calls) == 1
