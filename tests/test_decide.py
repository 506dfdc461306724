"""Decisions among labels, against full passes and by hand."""

from __future__ import annotations

import json
import math

import naive
import pytest
from conftest import TextPack

from packllm import OptionError, Weights
from packllm.decode.decide import decision

PROMPT = "Is insulin a hormone? Answer: "
LABELS = ["yes", "no", "in some of the cases"]
EVEN = {"llama-0": 0.5, "gpt2-1": 0.3, "qwen-2": 0.2}
ONE = Weights((1.0,), ("a",), "linear", (None,), "token", "fixed")


def truth(members, weights, text: str, prompt: str = PROMPT) -> float:
    """log Π Σ λ p by fresh passes."""
    encoder = members[0].encoder
    read, total = encoder.encode(prompt).ids, 0.0
    for token in encoder.continuation(text):
        parts = [naive.next_logprobs(member, read) for member in members]
        total += math.log(float(naive.fused(parts, weights, "linear")[token]))
        read = [*read, token]
    return total


def shares(logprobs):
    return [math.exp(one) / sum(map(math.exp, logprobs)) for one in logprobs]


def test_the_likeliest_label_by_fused_likelihood(members):
    pack = TextPack(members, weighting=EVEN)
    found = pack.decide(PROMPT, LABELS)
    scores = [truth(members, list(EVEN.values()), label) for label in LABELS]
    assert list(found.probabilities) == LABELS
    assert list(found.probabilities.values()) == pytest.approx(shares(scores), rel=1e-3)
    assert found.choice == max(found.probabilities, key=found.probabilities.get)
    assert found.mass == pytest.approx(sum(map(math.exp, scores)), rel=1e-3)
    for member in members:
        alone = [truth([member], [1.0], label) for label in LABELS]
        assert list(found.members[member.name].values()) == pytest.approx(shares(alone), rel=1e-3)
    assert found.disagreement > 0.01
    assert dict(zip(found.weights.names, found.weights.values, strict=True)) == EVEN
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["choice"] == found.choice
    empty = [truth(members, list(EVEN.values()), label, "N/A") for label in LABELS]
    rated = [score - other for score, other in zip(scores, empty, strict=True)]
    calibrated = pack.decide(PROMPT, LABELS, calibrated=True)
    assert list(calibrated.probabilities.values()) == pytest.approx(shares(rated), rel=1e-3)
    assert calibrated.mass == pytest.approx(found.mass)


def test_any_vocabularies_and_conversations(make_member):
    pack = TextPack([make_member("llama", 0), make_member("gpt2", 1, "word")], weighting="uniform")
    scores = pack.score(PROMPT, LABELS)
    found = pack.decide(PROMPT, LABELS)
    assert list(found.probabilities.values()) == pytest.approx(shares(scores), rel=1e-4)
    assert found.members.keys() == {"llama-0", "gpt2-1"}
    chat = TextPack([make_member("llama", 0)], chat_template=None)
    asked = [{"role": "user", "content": PROMPT}]
    assert chat.decide(PROMPT, LABELS).probabilities == pytest.approx(chat.decide(asked, LABELS).probabilities)
    scores = chat.score(asked, LABELS)
    assert list(chat.decide(asked, LABELS, calibrated=False).probabilities.values()) == pytest.approx(shares(scores))


def test_a_label_that_begins_others_counts_for_the_rest():
    labels = ["yes", "yes, but", "yes, but not", "no"]
    logs = [math.log(p) for p in (0.5, 0.2, 0.05, 0.3)]
    found = decision(labels, logs, {"a": logs}, ONE)
    # "yes" alone .5 - .2, "yes, but" alone .2 - .05; together .8, which is p(yes) + p(no).
    assert found.mass == pytest.approx(0.8)
    assert list(found.probabilities.values()) == pytest.approx([0.3 / 0.8, 0.15 / 0.8, 0.05 / 0.8, 0.3 / 0.8])
    assert found.disagreement == pytest.approx(0)
    assert found.choice == "yes"


@pytest.mark.parametrize("choices", [[], ["yes"], ["yes", ""], ["yes", "yes"], "yes", [1, 2], None])
def test_labels_that_are_no_choice(pack, choices):
    with pytest.raises(OptionError, match="choices"):
        pack.decide(PROMPT, choices)
