"""The router example, with the real ModelRouterMiddleware where langchain has it (1.5)."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import TextPack

EXAMPLES = Path(__file__).parents[1] / "examples"
middleware = pytest.importorskip("langchain.agents.middleware")
HAS_ROUTER = hasattr(middleware, "ModelRouterMiddleware")


@pytest.fixture(autouse=True)
def example_is_imported_anew(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "router_langchain", raising=False)


@pytest.mark.skipif(HAS_ROUTER, reason="this langchain has ModelRouterMiddleware")
def test_an_older_langchain_is_told_what_to_install():
    with pytest.raises(SystemExit, match=r"langchain-core>=1\.8"):
        import router_langchain  # noqa: F401


@pytest.mark.skipif(not HAS_ROUTER, reason="ModelRouterMiddleware came with langchain 1.5; `make newest` has it")
def test_the_member_that_is_decided_for_answers_alone(make_member, monkeypatch):
    import router_langchain
    from langchain_core.decisions import ChoiceAnswer

    labels, names = list(router_langchain.ROUTES), list(router_langchain.ROUTES.values())
    kinds = zip(("llama", "gpt2", "qwen"), range(3), names, strict=True)
    pack = TextPack([make_member(kind, seed, name=name) for kind, seed, name in kinds], max_tokens=4)
    agent = router_langchain.make_agent(pack, max_tokens=4)

    def routed(question: str) -> tuple[ChoiceAnswer, str]:
        """What was decided, and the member that answered alone."""
        state = agent.invoke({"messages": [("user", question)]})
        told = state["messages"][-1].response_metadata["packllm"]
        (alone,) = (name for name, weight in zip(told["names"], told["weights"], strict=True) if weight)
        return state["model_route"], alone

    question = "What is the capital of France?"
    asked = f"Human: {question}\n\nWho should answer this question?\nAnswer with one of these:\n"
    expected = pack.decide(asked + "\n".join(labels), labels, calibrated=True, weighting="uniform")
    route, alone = routed(question)
    assert route.probabilities == pytest.approx(expected.probabilities, rel=1e-3)
    assert route.choice == expected.choice
    assert alone == router_langchain.ROUTES[expected.choice]
    for label, name in router_langchain.ROUTES.items():
        shares = {one: 0.8 if one == label else 0.1 for one in labels}
        monkeypatch.setattr(pack, "decide", lambda *_, shares=shares, **__: replace(expected, probabilities=shares))
        assert routed(question)[1] == name
