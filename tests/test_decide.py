"""Decisions among labels, against full passes and by hand."""

from __future__ import annotations

import json
import math

import naive
import pytest
from conftest import TextPack
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import follows, llama3_like

from packllm import ContextOverflowError, OptionError, PromptError, Weights
from packllm.decode.decide import begun, decision

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
    marked = pack.decide(PROMPT, LABELS, calibrated=True, passages=["insulin"])  # which the empty prompt has not
    assert marked.probabilities == pytest.approx(calibrated.probabilities, rel=1e-3)


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


def test_a_label_that_is_another_token_is_another_answer():
    logs = [math.log(p) for p in (0.3, 0.4)]
    labels = ["no", "nothing"]
    apart = decision(labels, logs, {"a": logs}, ONE, longer={"a": begun(labels, [[1], [2]])})
    assert apart.mass == pytest.approx(0.7)
    assert list(apart.probabilities.values()) == pytest.approx([3 / 7, 4 / 7])
    logs = [math.log(p) for p in (0.4, 0.3)]
    inside = decision(labels, logs, {"a": logs}, ONE, longer={"a": begun(labels, [[1], [1, 3]])})
    assert inside.mass == pytest.approx(0.4)
    assert list(inside.probabilities.values()) == pytest.approx([1 / 4, 3 / 4])
    assert begun(["yes", "yes "], [[1], [1]]) == [[], []]  # a tokenizer that drops the space


def test_prefixes_in_the_tokens_of_a_pack():
    """ "no" is a token and "nothing" another; " to" goes on after "no"."""
    tokenizer = llama3_like(["no", "nothing", " to", "?"])
    table = {"?": {"no": 0.3, "nothing": 0.4, " to": 0.2}, "no": {" to": 0.5, "?": 0.4}}
    pack = TextPack([follows(tokenizer, table, "one")])
    found = pack.decide("no?", ["no", "nothing", "no to"])
    assert found.mass == pytest.approx(0.7, rel=1e-3)
    assert list(found.probabilities.values()) == pytest.approx([0.15 / 0.7, 0.4 / 0.7, 0.15 / 0.7], rel=1e-3)
    assert found.choice == "nothing"
    assert list(found.members["one"].values()) == pytest.approx(list(found.probabilities.values()), rel=1e-3)


def test_labels_of_a_thousand_nats_and_labels_that_are_ruled_out():
    logs = [-900.0, -901.0, -902.0]
    found = decision(["a", "b", "a b"], logs, {"a": logs}, ONE)
    alone = [1 - math.exp(-2), math.exp(-1), math.exp(-2)]
    assert list(found.probabilities.values()) == pytest.approx([p / sum(alone) for p in alone])
    assert found.mass == 0
    never = decision(["a", "b"], [-math.inf, -1.0], {"a": [-math.inf, -1.0]}, ONE, [-math.inf, -2.0])
    assert never.probabilities == {"a": 0.0, "b": 1.0}
    nobody = decision(["a", "b"], [-math.inf] * 2, {"a": [-math.inf] * 2}, ONE, [-1.0, -math.inf])
    assert nobody.probabilities == {"a": 0.5, "b": 0.5}


@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=2, max_size=6, unique=True), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_labels_have_probabilities(labels, data):
    """Labels over two tokens, each with a probability of its own at each place."""
    chance = data.draw(st.floats(0, 1))
    logs = [
        sum(math.log(p) if p else -math.inf for p in (chance if c == "a" else 1 - chance for c in x)) for x in labels
    ]
    found = decision(labels, logs, {"a": logs}, ONE)
    first = [x for x in labels if not any(x != y and x.startswith(y) for y in labels)]
    assert found.mass == pytest.approx(math.fsum(math.exp(logs[labels.index(x)]) for x in first), abs=1e-9)
    assert math.fsum(found.probabilities.values()) == pytest.approx(1)
    assert all(0 <= p <= 1 for p in found.probabilities.values())
    assert found.disagreement == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "choices",
    [[" ", "yes"], ["\n", "a"], ["\ufeff", "a"], [], ["yes"], ["yes", ""], ["yes", "yes"], "yes", [1, 2], None],
)
def test_labels_that_are_no_choice(pack, choices):
    with pytest.raises(OptionError, match="choices"):
        pack.decide(PROMPT, choices)


def test_labels_that_are_no_text(pack):
    with pytest.raises(PromptError, match=r"choices\[1\] holds a lone surrogate"):
        pack.decide(PROMPT, ["a", "\ud800"])


@pytest.mark.parametrize("length", [600, 9000])  # more than the window, and so long that it is not tokenized whole
def test_a_label_that_is_too_long_is_named(pack, length):
    forwards = [member.engine.forwards for member in pack.members]
    for name, rate in (("choices", pack.decide), ("continuations", pack.score), ("continuations", pack.rerank)):
        with pytest.raises(ContextOverflowError, match=rf"plus {name}\[1\] of .*; shorten the prompt, ") as caught:
            rate(PROMPT, ["yes", "7" * length])
        assert caught.value.text == f"{name}[1]"
        assert caught.value.prompt_tokens < 100 < 500 < caught.value.max_tokens
    assert [member.engine.forwards for member in pack.members] == forwards
