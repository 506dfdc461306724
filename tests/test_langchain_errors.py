"""Errors that LangChain's own middleware knows, as far as the installed core has their kinds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from langchain_core import exceptions
from langchain_core.messages import AIMessage, HumanMessage

import packllm
from langchain_packllm import ChatPackLLM, PackLLM
from langchain_packllm.errors import typed
from packllm import Member, Pack

agents = pytest.importorskip("langchain.agents")
middleware = pytest.importorskip("langchain.agents.middleware")

LONG = "a query planner chooses an index scan or a sequential scan. " * 40
KINDS = {
    "ContextOverflowError": (LONG, {}),
    "ModelInvalidRequestError": ("a", {"temperature": -1}),
    "ModelTimeoutError": ("a", {"timeout": 1e-9}),
    "ModelAPIError": ("a", {}),
}


class Told(Pack):
    """Notes what each answer ended with: its text, or its error's name."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.told: list[str] = []

    def generate(self, *args: Any, **options: Any) -> Any:
        try:
            answer = super().generate(*args, **options)
        except packllm.PackError as error:
            self.told.append(type(error).__name__)
            raise
        self.told.append(answer.text)
        return answer


@pytest.fixture
def llm(make_member: Any) -> ChatPackLLM:
    return ChatPackLLM(pack=Told([make_member("llama", 0)]), max_tokens=12)


def failing(make_member: Any, times: int) -> Told:
    """A pack whose member fails so often, then works."""
    member = make_member("llama", 0)
    member, left = Member(copy.deepcopy(member.model), member.tokenizer, "frail"), times

    def fail(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise RuntimeError("out of memory")

    member.model.get_decoder().register_forward_pre_hook(fail)
    return Told([member], max_tokens=4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", [PackLLM, ChatPackLLM])
async def test_every_way_raises_the_packs_error_as_langchains(adapter: Any, kind: str, make_member: Any) -> None:
    theirs = getattr(exceptions, kind, None) or pytest.skip(f"this langchain-core has no {kind}")
    prompt, options = KINDS[kind]
    times = 1000 if kind == "ModelAPIError" else 0
    llm = adapter(pack=failing(make_member, times))

    async def drain() -> None:
        async for _ in llm.astream(prompt, **options):
            pass

    for ask in (
        lambda: llm.invoke(prompt, **options),
        lambda: list(llm.stream(prompt, **options)),
        lambda: llm.batch([prompt, prompt], **options),
    ):
        with pytest.raises(packllm.PackError) as sync:
            ask()
        assert isinstance(sync.value, theirs)
    for work in (llm.ainvoke(prompt, **options), drain(), llm.abatch([prompt, prompt], **options)):
        with pytest.raises(packllm.PackError) as raised:
            await work
        assert isinstance(raised.value, theirs)
        own = {"ContextOverflowError": "ContextOverflowError", "ModelTimeoutError": "AnswerTimeout"}
        assert type(raised.value).__name__ == {**own, "ModelAPIError": "MemberError"}.get(kind, "OptionError")
    if kind == "ContextOverflowError":
        assert isinstance(raised.value, packllm.ContextOverflowError)
        assert raised.value.limit == 512
    if kind == "ModelAPIError":
        assert raised.value.is_retryable
        assert isinstance(raised.value.__cause__, RuntimeError)


def test_an_error_stays_the_same_object() -> None:
    error = packllm.CancelledError("nobody waits")
    with pytest.raises(packllm.CancelledError) as raised, typed():
        raise error
    assert raised.value is error
    assert not isinstance(error, TimeoutError)
    assert isinstance(error, getattr(exceptions, "ModelError", Exception))
    with pytest.raises(KeyError), typed():
        raise KeyError("not ours")


def test_a_summary_of_what_is_too_long_is_tried_again_shorter(llm: ChatPackLLM) -> None:
    summary = middleware.SummarizationMiddleware(
        llm,
        trigger=("messages", 3),
        keep=("messages", 1),
        summary_prompt="Say it shorter: {messages}",
        trim_tokens_to_summarize=None,
    )
    agent = agents.create_agent(llm, [], middleware=[summary])
    history = [HumanMessage(LONG), AIMessage("yes"), HumanMessage("And?")]
    messages = agent.invoke({"messages": history})["messages"]
    assert llm.pack.told[0] == "ContextOverflowError"
    assert len(llm.pack.told) == 3  # too long; shorter; the answer
    assert llm.pack.told[1] in messages[0].content
    assert LONG not in messages[0].content
    assert messages[-1].content == llm.pack.told[2]


def test_a_fallback_answers_for_a_member_that_fails(llm: ChatPackLLM, make_member: Any) -> None:
    frail = ChatPackLLM(pack=failing(make_member, 1000))
    agent = agents.create_agent(frail, [], middleware=[middleware.ModelFallbackMiddleware(llm)])
    assert agent.invoke({"messages": [HumanMessage("a")]})["messages"][-1].content == llm.pack.told[-1]
    assert frail.pack.told == ["MemberError"]
    handled = frail.with_fallbacks([llm], exceptions_to_handle=(exceptions.ModelError,))
    assert handled.invoke("a").content == llm.pack.told[-1]


def test_a_retry_for_what_may_pass_and_none_for_what_will_not(llm: ChatPackLLM, make_member: Any) -> None:
    retry = middleware.ModelRetryMiddleware(max_retries=2, initial_delay=0, jitter=False, on_failure="error")
    frail = ChatPackLLM(pack=failing(make_member, 2))  # a pass that fails is tried again once by itself
    agent = agents.create_agent(frail, [], middleware=[retry])
    answer = agent.invoke({"messages": [HumanMessage("a")]})["messages"][-1]
    assert frail.pack.told[-1] == answer.content
    assert "MemberError" in frail.pack.told
    agent = agents.create_agent(llm, [], middleware=[retry])
    with pytest.raises(packllm.ContextOverflowError):
        agent.invoke({"messages": [HumanMessage(LONG)]})
    assert llm.pack.told == ["ContextOverflowError"]
