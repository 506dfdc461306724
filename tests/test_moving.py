"""Weights that move while an answer is written, through whole packs, against a loop that recomputes everything."""

from __future__ import annotations

import copy
import itertools
import json
import math

import chains
import naive
import pytest
from conftest import TextPack as Pack
from lines import lines
from scripted import follows, llama3_like

from packllm import Member, OptionError
from packllm.decode.failures import Failures
from packllm.decode.lazy import lazy_ids
from packllm.decode.moving import BLOCK, SEGMENT, Moving
from packllm.decode.sampling import make_sampler
from packllm.decode.speculate import speculative_ids
from packllm.decode.tokens import Ensemble, Row, generate_ids
from packllm.weights import Adaptive, Weights

PROMPTS = ["The capital of France is", "Diabetes is a disease in which the court shall order relief", "def add(a, b):"]
VALUES = (0.6, 0.3, 0.1)


@pytest.fixture(scope="module")
def members(make_member) -> list[Member]:
    return [make_member("llama", 0), make_member("gpt2", 1), make_member("llama", 2)]


def fixed(members, values=VALUES) -> dict[str, float]:
    return {member.name: value for member, value in zip(members, values, strict=True)}


def naive_tokens(members, prompt: str, count: int, sleep: float = 0.0) -> tuple[list[int], list[list[float]]]:
    """Greedy tokens of the filter by the naive loop; the weights before each, and after the last."""
    tokens: list[int] = []
    path: list[list[float]] = []
    filters = Adaptive(VALUES)
    while len(tokens) < count:
        if len(tokens) % BLOCK == 0:
            block, exact = filters.fork(), []
            awake = [k for k, w in enumerate(filters.weights()) if w >= min(sleep, filters.weights().max())]
        values = filters.weights()
        path.append(values.tolist())
        parts = [naive.next_logprobs(m, [*m.encoder.encode(prompt).ids, *tokens]) for m in members]
        mixed = naive.fused([parts[k] for k in awake], [values[k] / sum(values[awake]) for k in awake], "linear")
        tokens.append(int(mixed.argmax()))
        given = [float(part[tokens[-1]].exp()) for part in parts]
        exact.append(given)
        heard = sum(values[k] * given[k] for k in awake) / sum(values[awake])
        filters.observe([p if k in awake else heard for k, p in enumerate(given)])
        if len(tokens) % BLOCK == 0:
            filters = block
            for p in exact:
                filters.observe(p)
    return tokens, [*path, filters.weights().tolist()]


def decoded(members, decode, count=20, sleep=0.0, failures=None, prompts=PROMPTS):
    """What rows choose, with weights that move; the rows."""
    asked = {(k, r): (m, m.encoder.encode(p).ids) for k, m in enumerate(members) for r, p in enumerate(prompts)}
    names = tuple(m.name for m in members)
    weights = Weights(VALUES, names, "linear", (None,) * 3, "token", "fixed")
    rows = [Row(weights, make_sampler(0.0, 1.0, None, None), count, moving=Moving(weights)) for _ in prompts]
    for row in rows:
        row.moving.sleep(weights, sleep)
    ensemble, told = Ensemble(lines(asked), rows, failures), [[] for _ in prompts]
    for r, token in decode(ensemble, rows):
        told[r].append(token)
        rows[r].done = len(told[r]) == count + 3 * r
    return told, rows


@pytest.mark.parametrize("sleep", [0.0, 0.25])
@pytest.mark.parametrize("places", [1, 3, 8, None])
def test_tokens_are_those_of_the_naive_loop(members, sleep, places):
    passes = [member.engine.tokens for member in members]
    told, rows = decoded(members, lambda e, r: speculative_ids(e, r, places), sleep=sleep)
    read = [member.engine.tokens - before for member, before in zip(members, passes, strict=True)]
    for r, prompt in enumerate(PROMPTS):
        tokens, path = naive_tokens(members, prompt, 20 + 3 * r, sleep)
        assert told[r] == tokens
        assert rows[r].weights.values == pytest.approx(path[-1], abs=1e-4)
        assert rows[r].weights.start == VALUES
    if sleep and places == 1:  # somebody slept to the end, and read nothing of the last block
        assert min(read) < max(read)


def test_sleep_changes_what_runs(members):
    awake, asleep = (
        naive_tokens(members, prompt, 26, sleep)[1] for prompt, sleep in [(PROMPTS[1], 0.0), (PROMPTS[1], 0.25)]
    )
    assert max(abs(a - b) for a, b in zip(awake[-2], asleep[-2], strict=True)) > 1e-3
    before = [member.engine.forwards for member in members]
    decoded(members, generate_ids, 25, sleep=0.25, prompts=PROMPTS[:1])
    passes = [member.engine.forwards - b for member, b in zip(members, before, strict=True)]
    assert max(passes) == 25  # the prompt, and all tokens but the last
    assert passes[2] < 15
    assert naive_tokens(members, PROMPTS[0], 25, 0.25)[0] != []


@pytest.mark.parametrize("options", [{}, {"sleep": 0.25}], ids=["awake", "sleeping"])
def test_texts_are_the_same_for_every_batch_and_stream(members, options):
    pack = Pack(members, weighting=fixed(members), adapt=True, max_tokens=20, **options)
    texts = [g.text for g in pack.generate_batch(PROMPTS, draft_tokens=1)]
    for places in (2, 5, None):
        assert [g.text for g in pack.generate_batch(PROMPTS, draft_tokens=places)] == texts
        assert [pack.generate(prompt, draft_tokens=places).text for prompt in PROMPTS] == texts
    assert "".join(chunk.text for chunk in pack.stream(PROMPTS[2])) == texts[2]


def test_weights_are_told_at_the_start_and_at_the_end(members):
    pack = Pack(members, adapt=True, max_tokens=40, weight_path=True)
    chunks = list(pack.stream(PROMPTS[0], stop=()))
    generation = pack.generate(PROMPTS[0])
    first, last = chunks[0].weights, chunks[-1].weights
    assert first == pack.weigh(PROMPTS[0])
    assert last.at_start == first
    assert last.values != first.values
    assert sum(last.values) == pytest.approx(1)
    assert generation.weights == last
    count = chunks[-1].usage.completion_tokens + (chunks[-1].finish_reason == "stop")
    assert len(last.path) == math.ceil(count / SEGMENT)
    assert last.path[0] == first.values
    told = json.loads(json.dumps(generation.as_dict()))["weights"]
    assert told["start"] == list(first.values)
    assert told["path"] == [list(row) for row in last.path]
    without = pack.generate(PROMPTS[0], weight_path=False).weights
    assert (without.values, without.path) == (last.values, None)
    still = pack.generate(PROMPTS[0], adapt=False).weights
    assert (still.values, still.start, still.path) == (first.values, None, None)


def test_score_and_rerank_stay_static(members):
    texts = [" Paris and London", " a + b"]
    moving, still = (Pack(members, weighting=fixed(members), adapt=adapt) for adapt in (True, False))
    assert moving.score(PROMPTS[0], texts) == still.score(PROMPTS[0], texts)
    assert moving.rerank(PROMPTS[0], texts) == still.rerank(PROMPTS[0], texts)


def test_a_form_is_kept_and_the_unmasked_members_judge(members):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    pack = Pack(members, weighting=fixed(members), max_tokens=30)
    moved = pack.generate(PROMPTS[0], json_schema=schema, adapt=True)
    assert json.loads(moved.text).keys() == {"a"}
    ids = [m.encoder.encode(PROMPTS[0]).ids for m in members]
    filters, written = Adaptive(VALUES), []
    for token in _ids_of(members[0], moved.text):
        filters.observe(
            [float(naive.next_logprobs(m, [*i, *written])[token].exp()) for m, i in zip(members, ids, strict=True)]
        )
        written.append(token)
    if moved.usage.completion_tokens == len(written):  # the text's own tokens are those that were chosen
        assert moved.weights.values == pytest.approx(filters.weights().tolist(), abs=1e-4)


def _ids_of(member, text):
    return member.encoder.continuation(text)


@pytest.mark.parametrize("sleep", [0.0, 0.45])
@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("passes", [2, 9])
@pytest.mark.parametrize("places", [1, 4])
def test_a_lost_member_leaves_the_filter(members, byte_tokenizer, sleep, failing, passes, places):
    left = [passes]

    def count(*_):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("out of memory")

    bad = Member(copy.deepcopy(members[failing].model), byte_tokenizer, "bad")
    team = [bad if k == failing else member for k, member in enumerate(members)]
    left[0] = 10**9
    bad.engine.model.get_decoder().register_forward_pre_hook(count)
    failures = Failures([m.name for m in team], range(3), True)

    def decode(ensemble, rows):
        left[0] = passes
        return speculative_ids(ensemble, rows, places)

    told, rows = decoded(team, decode, 30, sleep, failures)
    assert [len(tokens) for tokens in told] == [30, 33, 36]
    last = rows[-1].weights.values  # the other rows may have ended before
    assert (last[failing] == 0) == (failing in failures.members)
    assert sum(last) == pytest.approx(1)
    if not sleep or failing == 0:
        assert failures.members == {failing}


# Drawing


def exact(length: int) -> dict[str, float]:
    """What the filter gives every text of so many letters after "a", by the definition."""
    found = {}
    for text in itertools.product(chains.LETTERS, repeat=length):
        filters, total, before = Adaptive(VALUES), 1.0, "a"
        for letter in text:
            p = [table[before][chains.LETTERS.index(letter)] for table in chains.TABLES]
            total *= float(filters.weights() @ p)
            filters.observe(p)
            before = letter
        found["".join(text)] = total
    return found


def paths(length: int) -> dict[str, float]:
    """What lazy draws, by every rate and every path of members."""
    from packllm.weights.adaptive import RATES, TRUST

    found = dict.fromkeys(map("".join, itertools.product(chains.LETTERS, repeat=length)), 0.0)
    for rate, trust in zip(RATES, TRUST, strict=True):
        for path in itertools.product(range(3), repeat=length):
            chance = trust * VALUES[path[0]]
            for before, after in itertools.pairwise(path):
                chance *= (1 - rate) * (before == after) + rate * VALUES[after]
            for text in found:
                letters = zip("a" + text, text, path, strict=False)
                found[text] += chance * math.prod(chains.TABLES[k][a][chains.LETTERS.index(b)] for a, b, k in letters)
    return found


def test_the_hidden_path_is_the_filter():
    ours, filtered = paths(4), exact(4)
    assert sum(filtered.values()) == pytest.approx(1)
    assert all(ours[text] == pytest.approx(filtered[text]) for text in filtered)


@pytest.mark.parametrize("way", ["lazy", "plain", "drafts"])
def test_draws_have_the_distribution_of_the_filter(way):
    decode = {"lazy": lazy_ids, "plain": generate_ids, "drafts": lambda e, r: speculative_ids(e, r, 3)}[way]
    members = chains.chain_members()
    ids = {next(iter(members[0].encoder.plain(letter))): letter for letter in chains.LETTERS}
    start = next(i for i, letter in ids.items() if letter == "a")
    count, length = 1000, 4
    weights = Weights(VALUES, tuple(m.name for m in members), "linear", (None,) * 3, "token", "fixed")
    drawn = []
    for begin in range(0, count, 250):
        at_start = lines({(k, r): (member, [start]) for k, member in enumerate(members) for r in range(250)})
        samplers = [make_sampler(1.0, 1.0, None, begin + r) for r in range(250)]
        rows = [Row(weights, sampler, length, moving=Moving(weights)) for sampler in samplers]
        texts = [""] * 250
        for r, token in decode(Ensemble(at_start, rows), rows):
            texts[r] += ids[token]
            rows[r].done = len(texts[r]) == length
        drawn += texts
    expected = exact(length)
    # The statistic that tells the filter from the static mixture best: their log-likelihood ratio, whose mean under
    # either is known; its mean over the draws is normal, 5 deviations wide.
    static = {text: math.prod(_static(a, b) for a, b in zip("a" + text, text, strict=False)) for text in expected}
    ratio = {text: math.log(expected[text] / static[text]) for text in expected}
    mean = sum(expected[text] * ratio[text] for text in expected)
    deviation = math.sqrt(sum(expected[text] * (ratio[text] - mean) ** 2 for text in expected) / count)
    assert abs(sum(ratio[text] for text in drawn) / count - mean) < 4.5 * deviation
    assert sum(static[text] * ratio[text] for text in expected) < mean - 4.5 * deviation  # static draws would not pass


def _static(before: str, after: str) -> float:
    at = chains.LETTERS.index(after)
    return sum(w * table[before][at] for w, table in zip(VALUES, chains.TABLES, strict=True))


# Segments


def test_segments_move_the_weights_once_each():
    """Two members that agree on every word, one of them surer: it gains."""
    pieces = [" red", " green", " blue"]
    tokenizer = llama3_like(pieces)
    sure = {a: {b: 0.9} for a, b in itertools.pairwise([" red", " green", " blue", " red"])}
    vague = {a: {b: 0.3} for a, b in itertools.pairwise([" red", " green", " blue", " red"])}
    members = [follows(tokenizer, sure, "sure"), follows(llama3_like([*pieces, " x"]), vague, "vague")]
    pack = Pack(members, weighting={"sure": 0.5, "vague": 0.5}, decoding="cool", scoring="mixture", max_tokens=6)
    answer = pack.generate("a red", adapt=True)
    assert answer.text == " green blue red green blue red"
    filters = Adaptive((0.5, 0.5))
    for _ in range(6):
        filters.observe([0.9, 0.3])
    assert answer.weights.values == pytest.approx(filters.weights().tolist(), abs=0.01)
    assert pack.generate("a red", adapt=False).weights.values == (0.5, 0.5)
    best = pack.generate("a red", adapt=True, decoding="cool+rerank")
    assert best.text == answer.text


# Bad input


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"adapt": True, "weighting": "opt"}, "logarithmic pool"),
        ({"adapt": True, "pool": "log"}, "logarithmic pool"),
        ({"adapt": True, "weighting": "dexperts"}, "dexperts"),
        ({"adapt": True, "decoding": "cool"}, "scoring='mixture'"),
        ({"sleep": 0.05, "adapt": False}, "adapt=True"),
        ({"sleep": 0.05, "pool": "log"}, "adapt=True"),
        ({"sleep": 1.0}, "sleep"),
        ({"adapt": "often"}, "adapt"),
    ],
)
def test_what_cannot_move_is_refused(members, options, named):
    pack = Pack(members, max_tokens=2)
    with pytest.raises(OptionError, match=r"adapt|sleep") as caught:
        pack.generate(PROMPTS[0], **options)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"pool": "log"}, {"weighting": "exact"}, {"weighting": "dexperts"}, {"decoding": "cool"}]
)
def test_the_default_refuses_nothing(members, options):
    assert Pack(members, max_tokens=2).generate(PROMPTS[0], **options).weights.path is None
