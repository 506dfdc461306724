"""LangChain's own middleware around agents whose model was taught what to answer (see taught.py)."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from taught import asked, taught_pack

from langchain_packllm import ChatPackLLM
from packllm import ContextOverflowError, Pack

agents = pytest.importorskip("langchain.agents")
middleware = pytest.importorskip("langchain.agents.middleware")

WAYS = ["invoke", "astream"]
QUESTION = "How many beds has ward 3?"
ran: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_ran() -> None:
    ran.clear()


def _tool(name: str, said: str) -> Any:
    @tool(name, description=f"Tells the {name} of a ward.")
    def look_up(ward: int) -> str:
        ran.append(f"{name}({ward})")
        return said.format(ward)

    return look_up


BEDS, NURSES, DOORS = (_tool(name, f"Ward {{}} has 12 {name}.") for name in ("beds", "nurses", "doors"))


def call(name: str, **arguments: Any) -> str:
    return json.dumps({"name": name, "arguments": arguments})


async def run(agent: Any, way: str, messages: Sequence[Any]) -> dict[str, Any]:
    """The last state of an agent's run."""
    state = {"messages": list(messages)}
    if way == "invoke":
        return agent.invoke(state)
    modes = ["values", "messages"]  # for messages the model streams
    return [told async for mode, told in agent.astream(state, stream_mode=modes) if mode == "values"][-1]


def kinds(messages: Sequence[AnyMessage]) -> list[str]:
    return [type(message).__name__.removesuffix("Message") for message in messages]


@pytest.mark.parametrize("way", WAYS)
async def test_a_summary_takes_the_place_of_old_messages(way: str) -> None:
    llm = ChatPackLLM(
        pack=taught_pack({"extract the highest quality": "They spoke of ward 3.", QUESTION: "It has 12 beds."}, 4096)
    )
    summary = middleware.SummarizationMiddleware(
        llm,
        trigger=("fraction", 0.25),
        keep=("messages", 1),
        token_counter=llm.get_num_tokens_from_messages,
        trim_tokens_to_summarize=None,
    )
    agent = agents.create_agent(llm, [], middleware=[summary])
    history = [
        HumanMessage("The doors of ward 3 are blue. " * 120),
        AIMessage("Yes, they are."),
        HumanMessage(QUESTION),
    ]
    messages = (await run(agent, way, history))["messages"]
    assert kinds(messages) == ["Human", "Human", "AI"]
    assert "They spoke of ward 3." in messages[0].content
    assert (messages[1].content, messages[2].content) == (QUESTION, "It has 12 beds.")
    summarised, answered = asked(llm.pack)
    assert "The doors of ward 3 are blue." in summarised
    assert "They spoke of ward 3." in answered
    assert "blue" not in answered
    endless = [HumanMessage("The doors of ward 3 are blue. " * 3000), *history[1:]]  # too long: cut
    assert "They spoke of ward 3." in (await run(agent, way, endless))["messages"][0].content
    asked(llm.pack).clear()
    short = await run(agent, way, [HumanMessage(QUESTION)])  # below a quarter of the window: no summary
    assert kinds(short["messages"]) == ["Human", "AI"]
    assert len(asked(llm.pack)) == 1


@pytest.mark.parametrize("way", WAYS)
async def test_a_limit_stops_the_calls(way: str) -> None:
    def again(conversation: str) -> str:
        return "I may not look." if "limit" in conversation else call("beds", ward=conversation.count("Ward"))

    llm = ChatPackLLM(pack=taught_pack(again))
    ended = middleware.ToolCallLimitMiddleware(run_limit=2, exit_behavior="end")
    messages = (await run(agents.create_agent(llm, [BEDS], middleware=[ended]), way, [HumanMessage(QUESTION)]))[
        "messages"
    ]
    assert ran == ["beds(0)", "beds(1)"]
    assert kinds(messages) == ["Human", *["AI", "Tool"] * 3, "AI"]
    assert "limit" in messages[-1].content
    assert messages[-2].status == "error"
    ran.clear()
    told = middleware.ToolCallLimitMiddleware(tool_name="beds", run_limit=1)  # the model is told, and goes on
    messages = (await run(agents.create_agent(llm, [BEDS], middleware=[told]), way, [HumanMessage(QUESTION)]))[
        "messages"
    ]
    assert ran == ["beds(0)"]
    assert messages[-1].content == "I may not look."
    raised = middleware.ToolCallLimitMiddleware(run_limit=1, exit_behavior="error")
    with pytest.raises(Exception, match="limit"):
        await run(agents.create_agent(llm, [BEDS], middleware=[raised]), way, [HumanMessage(QUESTION)])


@pytest.mark.parametrize("way", WAYS)
async def test_a_larger_pack_answers_for_one_whose_window_is_too_small(way: str) -> None:
    small, large = (ChatPackLLM(pack=taught_pack({QUESTION: said}, size)) for said, size in SIZES.items())
    agent = agents.create_agent(small, [BEDS], middleware=[middleware.ModelFallbackMiddleware(large)])
    long = [SystemMessage("Ward 3 is full. " * 100), HumanMessage(QUESTION)]
    assert (await run(agent, way, long))["messages"][-1].content == "I am the large one."
    assert (await run(agent, way, long[1:]))["messages"][-1].content == "I am the small one."
    assert (len(asked(small.pack)), len(asked(large.pack))) == (1, 1)


SIZES = {"I am the small one.": 512, "I am the large one.": 4096}


@pytest.mark.parametrize("way", WAYS)
async def test_what_may_pass_is_tried_again(way: str) -> None:
    llm = ChatPackLLM(pack=taught_pack({QUESTION: "It has 12 beds."}))
    engine, tries = llm.pack.members[0].engine, []
    answer = engine._answer

    def frail(conversation: str) -> str:
        tries.append(conversation)
        if len(tries) <= 2:  # a pass that fails is tried once more by itself
            raise RuntimeError("out of memory")
        return answer(conversation)

    engine._answer = frail
    retry = middleware.ModelRetryMiddleware(max_retries=2, initial_delay=0, jitter=False, on_failure="error")
    agent = agents.create_agent(llm, [], middleware=[retry])
    assert (await run(agent, way, [HumanMessage(QUESTION)]))["messages"][-1].content == "It has 12 beds."
    before = len(tries)
    with pytest.raises(ContextOverflowError):  # and what will not pass is not
        await run(agent, way, [HumanMessage("Ward 3 is full. " * 2000)])
    assert len(tries) == before


@pytest.mark.parametrize("way", WAYS)
async def test_the_model_is_offered_the_tools_that_it_selected(way: str) -> None:
    answers = {
        "select the most relevant": '{"tools": ["beds", "doors"]}',
        "12 beds": "It has 12 beds.",
        QUESTION: call("beds", ward=3),
    }
    llm = ChatPackLLM(pack=taught_pack(answers))
    select = middleware.LLMToolSelectorMiddleware(max_tools=1, always_include=["nurses"])
    agent = agents.create_agent(llm, [BEDS, NURSES, DOORS], middleware=[select])
    messages = (await run(agent, way, [HumanMessage(QUESTION)]))["messages"]
    assert ran == ["beds(3)"]
    assert messages[-1].content == "It has 12 beds."
    selecting, calling, *_ = asked(llm.pack)
    assert "doors" in selecting
    assert [f"Tells the {name}" in calling for name in ("beds", "nurses", "doors")] == [True, True, False]


@pytest.mark.parametrize("way", WAYS)
async def test_old_results_are_cleared_by_the_packs_count(way: str) -> None:
    def answer(conversation: str) -> str:
        if conversation.count("12 nurses"):
            return "It has 12 beds and 12 nurses."
        return call("nurses" if "12 beds" in conversation else "beds", ward=3)

    llm = ChatPackLLM(pack=taught_pack(answer))
    limit = llm.get_num_tokens_from_messages([HumanMessage(QUESTION)], [BEDS, NURSES]) + 60
    edit = middleware.ClearToolUsesEdit(trigger=limit, keep=1, placeholder="[cleared]")
    clear = middleware.ContextEditingMiddleware(edits=[edit], token_count_method="model")
    agent = agents.create_agent(llm, [BEDS, NURSES], middleware=[clear])
    messages = (await run(agent, way, [HumanMessage(QUESTION)]))["messages"]
    assert ran == ["beds(3)", "nurses(3)"]
    assert messages[-1].content == "It has 12 beds and 12 nurses."
    *_, before, last = asked(llm.pack)
    assert "Ward 3 has 12 beds." in before
    assert "[cleared]" not in before
    assert "Ward 3 has 12 beds." not in last
    assert "[cleared]" in last
    assert [one.content for one in messages if isinstance(one, ToolMessage)] == [
        "Ward 3 has 12 beds.",
        "Ward 3 has 12 nurses.",
    ]


@pytest.mark.parametrize("way", WAYS)
async def test_todos_are_kept_in_the_state(way: str) -> None:
    steps = ["Count the beds", "Count the nurses"]

    def todos(*states: str) -> str:
        return call("write_todos", todos=[{"content": c, "status": s} for c, s in zip(steps, states, strict=True)])

    def answer(conversation: str) -> str:
        told = conversation.rpartition(QUESTION)[2]
        if "12 beds" not in told:
            return call("beds", ward=3) if "pending" in told else todos("in_progress", "pending")
        return "It is all counted." if told.count("completed") else todos("completed", "pending")

    llm = ChatPackLLM(pack=taught_pack(answer))
    agent = agents.create_agent(llm, [BEDS], middleware=[middleware.TodoListMiddleware()])
    state = await run(agent, way, [HumanMessage(QUESTION)])
    assert state["todos"] == [
        {"content": "Count the beds", "status": "completed"},
        {"content": "Count the nurses", "status": "pending"},
    ]
    assert state["messages"][-1].content == "It is all counted."
    assert [c["name"] for one in state["messages"] if isinstance(one, AIMessage) for c in one.tool_calls] == [
        "write_todos", "beds", "write_todos"
    ]  # fmt: skip


# -- the real thing -----------------------------------------------------------------------------------------------


class Innermost(middleware.AgentMiddleware):
    """Records what reaches the model, which must call `tool`, if one is named."""

    def __init__(self, tool: str | None = None) -> None:
        self.tool, self.seen = tool, []

    def wrap_model_call(self, request: Any, handler: Any) -> Any:
        self.seen.append(request)
        return handler(request.override(tool_choice=self.tool) if self.tool else request)


@pytest.fixture
def real(starter_pack: Pack) -> ChatPackLLM:
    """It need not be right, but what is promised holds."""
    return ChatPackLLM(pack=Pack(starter_pack.members[:2]), max_tokens=12)


@pytest.mark.real
def test_the_starter_pack_under_all_of_them(real: ChatPackLLM) -> None:
    """At most one tool is selected, the history is a summary, no more calls than allowed."""
    innermost = Innermost()
    around = [
        middleware.SummarizationMiddleware(
            real, trigger=("messages", 3), keep=("messages", 1), summary_prompt="Summarise:\n{messages}"
        ),
        middleware.TodoListMiddleware(system_prompt="", tool_description="Keep a list of what is to be done."),
        middleware.LLMToolSelectorMiddleware(max_tools=1, always_include=["write_todos"]),
        middleware.ContextEditingMiddleware(token_count_method="model"),
        middleware.ToolCallLimitMiddleware(run_limit=1, exit_behavior="end"),
        middleware.ModelRetryMiddleware(max_retries=1, initial_delay=0, on_failure="error"),
        middleware.ModelFallbackMiddleware(real),
        innermost,
    ]
    agent = agents.create_agent(real, [BEDS, DOORS], middleware=around)
    history = [HumanMessage("Ward 3 is on the left."), AIMessage("I see."), HumanMessage(QUESTION)]
    messages = agent.invoke({"messages": history})["messages"]
    assert kinds(messages)[:3] == ["Human", "Human", "AI"]
    assert messages[0].additional_kwargs == {"lc_source": "summarization"}
    assert messages[1].content == QUESTION
    assert len(ran) <= 1
    assert messages[2].response_metadata["packllm"]["names"] == ["general", "medicine"]
    *selected, always = [one.name for one in innermost.seen[0].tools]
    assert always == "write_todos"
    assert selected in ([], ["beds"], ["doors"])  # so small a model may select none


@pytest.mark.real
def test_the_starter_pack_keeps_todos_and_is_stopped_by_a_limit(real: ChatPackLLM) -> None:
    around = [
        middleware.TodoListMiddleware(system_prompt="", tool_description="Keep a list of what is to be done."),
        middleware.ModelCallLimitMiddleware(run_limit=1, exit_behavior="end"),
        Innermost("write_todos"),
    ]
    llm = ChatPackLLM(pack=real.pack, max_tokens=48)
    agent = agents.create_agent(llm, [], middleware=around)
    state = agent.invoke({"messages": [HumanMessage("Count the beds.")]})
    assert state["todos"]
    assert all(set(todo) == {"content", "status"} for todo in state["todos"])
    assert {todo["status"] for todo in state["todos"]} <= {"pending", "in_progress", "completed"}
    assert kinds(state["messages"])[:3] == ["Human", "AI", "Tool"]
    limit = middleware.ToolCallLimitMiddleware(run_limit=1, exit_behavior="end")
    agent = agents.create_agent(llm, [BEDS], middleware=[limit, Innermost("beds")])
    messages = agent.invoke({"messages": [HumanMessage(QUESTION)]})["messages"]
    assert len(ran) == 1
    assert kinds(messages) == ["Human", *["AI", "Tool"] * 2, "AI"]
    assert "limit" in messages[-1].content


@pytest.mark.real
def test_the_starter_pack_falls_back_tries_again_and_forgets_old_results(
    real: ChatPackLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ChatPackLLM(pack=Pack([copy.copy(real.pack.members[0])]), max_tokens=12)
    small.pack.members[0].context_window = 32
    engine, tries = real.pack.members[0].engine, []
    compute = engine.compute

    def frail(*arguments: Any) -> Any:
        tries.append(arguments)
        if len(tries) <= 3:  # a pass of both members that fails is tried once more for each of them
            raise RuntimeError("out of memory")
        return compute(*arguments)

    monkeypatch.setattr(engine, "compute", frail)
    clear = middleware.ClearToolUsesEdit(trigger=64, keep=1, placeholder="[cleared]")
    innermost = Innermost()
    around = [
        middleware.ModelFallbackMiddleware(real),
        middleware.ModelRetryMiddleware(max_retries=1, initial_delay=0, jitter=False, on_failure="error"),
        middleware.ContextEditingMiddleware(edits=[clear], token_count_method="model"),
        innermost,
    ]
    history: list[Any] = [HumanMessage(QUESTION)]
    for number, said in enumerate(("Ward 3 has 12 beds. " * 6, "Ward 3 has blue doors.")):
        called = {"name": "beds", "args": {"ward": 3}, "id": str(number)}
        history += [AIMessage("", tool_calls=[called]), ToolMessage(said, tool_call_id=str(number))]
    answer = agents.create_agent(small, [], middleware=around).invoke({"messages": history})["messages"][-1]
    assert answer.content.strip()
    assert answer.response_metadata["packllm"]["names"] == ["general", "medicine"]
    assert len(tries) > 3
    assert [one.model.pack for one in innermost.seen] == [small.pack, real.pack, real.pack]
    told = [one.content for one in innermost.seen[-1].messages if isinstance(one, ToolMessage)]
    assert told == ["[cleared]", "Ward 3 has blue doors."]
