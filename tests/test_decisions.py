"""PackDecisions in LangChain's decision models; needs langchain-core 1.8."""

from __future__ import annotations

import pytest
from conftest import TextPack
from langchain_core import exceptions

from packllm import ContextOverflowError, OptionError

decisions = pytest.importorskip("langchain_core.decisions", reason="langchain-core has no decision models yet")

STATE = "Stripe fails whenever I connect my account."


def test_questions_are_answered_by_fused_likelihood(members):
    from langchain_packllm import PackDecisions

    pack = TextPack(members, chat_template=None)
    model = PackDecisions(pack=pack)
    team = decisions.Choice(
        instructions="Which team?",
        criteria={"billing": "Payments.", "technical": None, "sales, not billing": "Prices."},
    )
    urgent = decisions.Noul(instructions="Is it urgent?")
    anger = decisions.Score(instructions="How angry?", criteria=["calm", "concerned", "angry"])
    response = model.invoke({"state": STATE, "questions": {"team": team, "urgent": urgent, "anger": anger}})
    prompt = (
        f"{STATE}\n\nWhich team?\nAnswer with one of these:\nbilling: Payments.\ntechnical\nsales, not billing: Prices."
    )
    expected = pack.decide(prompt, ["billing", "technical", "sales, not billing"])
    assert response.choices["team"].probabilities == pytest.approx(expected.probabilities, rel=1e-3)
    assert response.choices["team"].choice == expected.choice
    assert 0 < response.nouls["urgent"].noul < 1
    levels = response.scores["anger"].probabilities
    assert response.scores["anger"].score == pytest.approx(levels[1] + 2 * levels[2])
    assert response.model == pack.name
    with pytest.raises(OptionError, match="text only") as wrong:
        model.invoke({"state": STATE, "questions": {"where": decisions.Box(instructions="Where?")}})
    assert isinstance(wrong.value, exceptions.ModelInvalidRequestError)
    with pytest.raises(ContextOverflowError) as long:
        model.invoke({"state": STATE * 100, "questions": {"urgent": urgent}})
    assert isinstance(long.value, exceptions.ContextOverflowError)


def test_a_router_takes_the_model_decided_for(members):
    middleware = pytest.importorskip("langchain.agents.middleware")
    if not hasattr(middleware, "ModelRouterMiddleware"):
        pytest.skip("this langchain has no ModelRouterMiddleware")
    from langchain.agents import create_agent

    from langchain_packllm import ChatPackLLM, PackDecisions

    pack = TextPack(members, chat_template=None, max_tokens=4)
    models = {
        name: ChatPackLLM(pack=pack, weighting={member.name: 1.0}) for name, member in zip("ab", members, strict=False)
    }
    router = middleware.ModelRouterMiddleware(
        choices={name: middleware.ModelChoice(model=model, criteria=f"Kind {name}.") for name, model in models.items()},
        instructions="Which kind?",
        classifier=PackDecisions(pack=pack),
    )
    state = create_agent(models["a"], middleware=[router]).invoke({"messages": [("user", STATE)]})
    said = state["messages"][-1]
    (name,) = models[state["model_route"].choice].weighting
    told = said.response_metadata["packllm"]
    assert dict(zip(told["names"], told["weights"], strict=True))[name] == 1.0
