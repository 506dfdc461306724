"""The real starter pack: are the experts experts, and can they still talk?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from train_expert import RAG_PROMPT, read_documents

from packllm import Pack

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.real

CORPORA = {
    "medicine": ("medicine_medquad.jsonl.gz", "focus"),
    "law": ("law_uscode.txt.gz", None),
    "databases": ("databases_postgresql15.txt.gz", None),
}
PROMPTS = 10  # held-out prompts a domain
TOKENS = 128


@pytest.fixture(scope="module")
def held_out(shared, starter_pack) -> dict[str, list[str]]:
    """Held-out prompts of TOKENS tokens by domain, spread over the corpus."""
    prompts = {}
    encoder = starter_pack.members[0].encoder
    for domain, (file, group) in CORPORA.items():
        documents = [d for d in read_documents(shared / "corpora" / file, group) if d.held_out]
        long = [ids for d in documents if len(ids := encoder.plain(d.text)) >= TOKENS]
        chosen = [long[at * len(long) // PROMPTS][:TOKENS] for at in range(PROMPTS)]
        prompts[domain] = [starter_pack.members[0].tokenizer.decode(ids) for ids in chosen]
    return prompts


@pytest.fixture(scope="module")
def weighed(held_out, starter_pack):
    return {domain: [starter_pack.weigh(prompt) for prompt in prompts] for domain, prompts in held_out.items()}


@pytest.mark.parametrize("domain", CORPORA)
def test_experts_know_their_domain_better_than_the_base(weighed, starter_pack, domain):
    """At least 10 % lower NLL than the base on held-out documents."""
    expert = [member.name for member in starter_pack.members].index(domain)
    base_nll = sum(weights.nll[0] for weights in weighed[domain])
    expert_nll = sum(weights.nll[expert] for weights in weighed[domain])
    assert expert_nll <= 0.9 * base_nll


@pytest.mark.parametrize("domain", CORPORA)
def test_experts_get_the_top_weight_in_their_domain(weighed, domain):
    """On at least 90 % of held-out prompts of 128 tokens."""
    assert sum(weights.top == domain for weights in weighed[domain]) >= 0.9 * PROMPTS


@pytest.mark.parametrize("domain", CORPORA)
def test_experts_answer_in_chat_format_and_stop(starter_pack, domain):
    """Over passages of their domain, as in RAG. (Asked without one, they can loop, as their base does.)"""
    passages = [json.loads(line) for line in (EXAMPLES / "data" / "passages.jsonl").read_text().splitlines()]
    of_domain = [passage for passage in passages if passage["domain"] == domain]
    chosen = of_domain[:: len(of_domain) // 5][:5]
    prompts = [
        RAG_PROMPT.format(context=p["text"], question=f"What does the text say about {p['title']}?") for p in chosen
    ]
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    answers = starter_pack.generate_batch(messages, weighting={domain: 1.0}, max_tokens=160)
    assert sum(answer.finish_reason == "stop" for answer in answers) >= 4
    assert all(len(answer.text.split()) >= 3 for answer in answers)
    assert not any("<|" in answer.text for answer in answers)


def test_the_base_is_left_as_it_is(starter_pack):
    """The experts are attached to the base: the general member is still what it was."""
    from packllm import starter

    alone = Pack.load([f"general={starter.base_model()}"])
    prompt = "The capital of France is"
    assert alone.members[0].fingerprint == starter_pack.members[0].fingerprint
    assert alone.generate(prompt, max_tokens=5).text == "".join(
        chunk.text for chunk in starter_pack.stream(prompt, max_tokens=5, weighting={"general": 1.0})
    )


def test_without_the_package_the_base_comes_from_the_hub(monkeypatch):
    from packllm import starter

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert starter.base_model() == starter.HUB_ID
    general, *experts = starter.specs()
    assert general == f"general={starter.HUB_ID}"
    assert all(
        spec.startswith(f"{name}={starter.HUB_ID}+") for spec, name in zip(experts, starter.EXPERTS, strict=True)
    )
