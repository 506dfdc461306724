"""One member a token, and all the same the mixture."""

from __future__ import annotations

import chains
import pytest
from conftest import TextPack as Pack

from packllm import MemberError, OptionError
from packllm.decode.lazy import lazy_ids
from packllm.errors import VocabularyError

VALUES = (0.5, 0.3, 0.2)
NAMES = ("llama-0", "gpt2-1", "qwen-2")
PROMPT = "The capital of France is"
VISITS, MARGIN, COUNT, LENGTH = 300, 0.18, 12, 200
"""Odds below 32 · exp(-2 · 300 · 0.18²) < 2e-7 for each state, see chains.py."""


def test_draws_have_the_distribution_of_the_mixture():
    expected = chains.fused_table(VALUES, "linear")
    # One member by itself would be off by more than what is allowed.
    assert max(chains.distance(chains.TABLES[0][a], expected[a]) for a in chains.LETTERS) > 1.5 * MARGIN
    members = chains.chain_members()
    before = [member.engine.tokens for member in members]
    drawn, _ = chains.run(members, VALUES, "linear", lazy_ids, COUNT, LENGTH)
    assert max(chains.distances(drawn, expected, VISITS).values()) < MARGIN
    assert {len(text) for text in drawn} == {LENGTH + 1}
    # Each member reads a row's tokens once, up to the last time that it is drawn.
    read = [member.engine.tokens - b - COUNT for member, b in zip(members, before, strict=True)]
    assert all(0.9 * COUNT * LENGTH < tokens < COUNT * LENGTH for tokens in read)


def test_one_pass_a_token(make_pack):
    pack = make_pack(max_tokens=40, temperature=1.0, decoding="lazy", weighting=dict(zip(NAMES, VALUES, strict=True)))
    total = [0, 0, 0]
    for seed in range(4):
        before = [member.engine.forwards for member in pack.members]
        generation = pack.generate(PROMPT, seed=seed)
        passes = [
            member.engine.forwards - b - 1 for member, b in zip(pack.members, before, strict=True)
        ]  # 1: the prompt
        # The last token is read by nobody; an end token is one more, and not counted.
        assert sum(passes) < generation.usage.completion_tokens + (generation.finish_reason == "stop")
        total = [t + p for t, p in zip(total, passes, strict=True)]
    assert all(total)


def test_a_seed_fixes_the_answer_alone_and_in_a_batch(make_pack):
    pack = make_pack(max_tokens=12, temperature=1.0, decoding="lazy", seed=4)
    prompts = [PROMPT, "Once upon a time there was", "def add(a, b):"]
    alone = [pack.generate(prompt) for prompt in prompts]
    assert [g.text for g in pack.generate_batch(prompts)] == [g.text for g in alone]
    assert alone[0].text == pack.generate(PROMPT).text != pack.generate(PROMPT, seed=5).text


def test_stop_strings_and_streams(make_pack):
    pack = make_pack(max_tokens=20, temperature=1.0, decoding="lazy", seed=1)
    whole = pack.generate(PROMPT).text
    stop = whole[5:8]
    pieces = list(pack.stream(PROMPT, stop=[stop]))
    assert "".join(piece.text for piece in pieces) == whole.split(stop)[0]


def test_a_lost_member_is_drawn_no_more(make_pack, make_member):
    pack = make_pack(max_tokens=30, temperature=1.0, decoding="lazy", seed=0, weighting="uniform", pool="linear")
    member = pack.members[1]

    def fail(*_):
        raise RuntimeError("out of memory")

    stream = pack.stream(PROMPT, on_member_error="drop")
    failing = pack.stream(PROMPT)
    next(stream), next(failing)
    hook = member.model.get_decoder().register_forward_pre_hook(fail)
    try:
        last = list(stream)[-1]
        with pytest.raises(MemberError, match="out of memory"):
            list(failing)
    finally:
        hook.remove()
    assert last.usage.completion_tokens == 30
    assert last.weights.values == pytest.approx((0.5, 0.0, 0.5))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": 0.0}, "temperature=1.0, not 0.0"),
        ({"temperature": 0.7}, "temperature"),
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 5}, "top_k"),
        ({"pool": "log"}, "pool='linear'"),
        ({"weighting": "exact"}, "weighting='exact'"),
        ({"weighting": "dexperts"}, "logarithmic pool"),
        ({"weighting": {"llama-0": 1.5, "gpt2-1": -0.5}, "pool": "log"}, "pool"),
        ({"json_schema": {"type": "object"}}, "json_schema"),
    ],
)
def test_what_is_no_mixture_is_refused(make_pack, options, named):
    pack = make_pack(max_tokens=4)
    before = [member.engine.forwards for member in pack.members]
    with pytest.raises(OptionError, match="lazy") as caught:
        pack.generate(PROMPT, **{"decoding": "lazy", "temperature": 1.0, **options})
    assert named in str(caught.value)
    assert [member.engine.forwards for member in pack.members] == before


def test_members_must_share_a_vocabulary(make_member):
    pack = Pack([make_member("llama", 0), make_member("gpt2", 1, "words")])
    with pytest.raises(VocabularyError, match="lazy"):
        pack.generate(PROMPT, decoding="lazy", temperature=1.0)
