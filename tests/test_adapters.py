"""Adapters as rows of one batch against copies of the base with each adapter merged in."""

from __future__ import annotations

import copy

import naive
import peft
import pytest
import torch
from conftest import TextPack as Pack
from hypothesis import given
from hypothesis import strategies as st
from lines import scored

from packllm import LoadError, Member
from packllm.engines.load import Loader
from packllm.engines.transformers.adapters import _plan
from packllm.weights import Weights
from packllm_eval.reading import Reading

SETTINGS = {
    "llama": [
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
        {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj"]},  # another rank, other modules
        {"r": 4, "lora_alpha": 4, "target_modules": ["up_proj"], "use_rslora": True},
    ],
    "gpt2": [
        {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        {"r": 3, "lora_alpha": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ],
    "qwen": [{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}] * 2,
}
TEXTS = ["The court shall order relief.", "What is the capital of France?", "Insulin helps glucose, and so"]


@pytest.fixture(params=list(SETTINGS))
def specs(request, make_member, tmp_path) -> list[str]:
    """A base and its adapters on disk: base, base+0, base+1, ..."""
    member = make_member(request.param, 5)
    base = tmp_path / "base"
    member.model.save_pretrained(base)
    member.tokenizer.save_pretrained(base)
    found = [str(base)]
    for at, settings in enumerate(SETTINGS[request.param]):
        torch.manual_seed(at)
        config = peft.LoraConfig(init_lora_weights=False, **settings)
        peft.get_peft_model(copy.deepcopy(member.model), config).save_pretrained(tmp_path / f"expert{at}")
        found.append(f"{base}+{tmp_path / f'expert{at}'}")
    return found


def apart(specs: list[str]) -> list[Member]:
    """The same members, each a model of its own."""
    return [Loader().members([spec])[0] for spec in specs]


def test_rows_of_one_batch_equal_merged_copies(specs):
    together, copies = Loader().members(specs), apart(specs)
    assert len({id(member.engine) for member in together}) == 1
    assert len({id(member.engine) for member in copies}) == len(specs)
    ids = together[0].encoder.encode(TEXTS[0]).ids
    for member, twin in zip(together, copies, strict=True):
        end, observed = scored(member, ids)
        assert torch.allclose(observed, naive.token_logprobs(twin, ids), atol=1e-4)
        assert torch.allclose(end.next_logprobs.exp(), naive.next_logprobs(twin, ids).exp(), atol=1e-5)
    differ = [naive.next_logprobs(twin, ids) for twin in copies]
    assert all((differ[0] - other).abs().max() > 0.05 for other in differ[1:])


def test_one_pass_reads_all_options_of_a_question(specs, monkeypatch):
    together, copies = Loader().members(specs), apart(specs)
    options = [" the dog", " a", " an index scan of the table"]
    chosen = [((k,), Weights((1.0,), (m.name,), "linear", (None,), "token", "fixed")) for k, m in enumerate(together)]
    for most, passes in ((8, 1), (1, 3)):  # all together; an option at a time, the second of which takes none
        monkeypatch.setattr("packllm_eval.reading.TOGETHER", most)
        with Reading(together, [TEXTS[1]]) as reading:
            before = together[0].engine.forwards
            found = reading.options(options, chosen)
            assert together[0].engine.forwards - before == passes - (
                most == 1 and len(together[0].encoder.continuation(" a")) == 1
            )
        for twin, scores in zip(copies, found, strict=True):
            ids = twin.encoder.encode(TEXTS[1]).ids
            for option, score in zip(options, scores, strict=True):
                more = twin.encoder.continuation(option)
                expected = naive.token_logprobs(twin, [*ids, *more])[-len(more) :].sum()
                assert score == pytest.approx(float(expected), abs=1e-3)


@pytest.mark.parametrize("pool", ["linear", "log"])
def test_one_pass_serves_all_members(specs, pool):
    together, copies = Pack.load(specs, max_tokens=10, pool=pool), apart(specs)
    engine = together.members[0].engine
    before = engine.forwards
    weighting = {name: 1 / len(specs) for name in (m.name for m in together.members)}
    generation = together.generate(TEXTS[0], weighting=weighting)
    steps = generation.usage.completion_tokens
    # The prompt and every token but the last, once for all members; an end token is one more, and not counted.
    assert engine.forwards - before == steps + (generation.finish_reason == "stop")
    prompts = [member.encoder.encode(TEXTS[0]).ids for member in copies]
    ids = naive.greedy(copies, prompts, [1 / len(specs)] * len(specs), pool, 10)
    assert generation.text == together.members[0].tokenizer.decode(ids, skip_special_tokens=True)


def test_batches_with_weights_of_their_own(specs):
    together = Pack.load(specs, max_tokens=8, min_weight=0.2)
    alone = [together.generate(text) for text in TEXTS]
    batch = together.generate_batch(TEXTS)
    assert [g.text for g in batch] == [g.text for g in alone]
    for a, b in zip(alone, batch, strict=True):
        assert a.weights.values == pytest.approx(b.weights.values, abs=1e-4)


def test_weights_equal_those_of_separate_copies(specs):
    together, copies = Pack.load(specs), Pack(apart(specs))
    for weighting in ("em", "exact", "sim"):
        ours, theirs = (p.weigh(TEXTS[2], weighting=weighting) for p in (together, copies))
        assert ours.values == pytest.approx(theirs.values, abs=1e-3)
        assert ours.nll == pytest.approx(theirs.nll, abs=1e-5)


def test_memory_holds_one_base_and_the_factors(specs):
    together = Loader().members(specs)
    assert len({id(member.model) for member in together}) == 1
    factors = [t for pair in together[0].engine.adapters._stacks.values() for t in pair]
    assert sum(t.numel() for t in factors) < 0.5 * together[0].model.num_parameters()


def test_fingerprints_tell_adapters_apart(specs):
    first, again = Loader().members(specs), Loader().members(specs)
    assert [m.fingerprint for m in first] == [m.fingerprint for m in again]
    assert len({m.fingerprint for m in first}) == len(specs)


def spoil(pack: Pack) -> None:
    """Make the first adapter, and no other member, give NaN."""
    for downs, _ in pack.members[0].engine.adapters._stacks.values():
        downs[0] = torch.nan


def test_a_member_that_fails_leaves_the_others_of_its_engine(specs):
    pack = Pack.load(specs, max_tokens=6, on_member_error="drop", weighting="uniform")
    spoil(pack)
    generation = pack.generate(TEXTS[0])
    assert generation.weights.values[1] == 0
    assert generation.weights.nll[1] is None
    assert sum(generation.weights.values) == pytest.approx(1)


def test_a_member_that_fails_while_decoding_leaves_the_others(specs):
    pack = Pack.load(specs, max_tokens=6, on_member_error="drop", weighting="uniform")
    stream = pack.stream(TEXTS[0])
    next(stream)
    spoil(pack)
    last = list(stream)[-1]
    assert last.finish_reason == "length"
    assert last.weights.values[1] == 0


def test_an_adapter_of_another_model_is_refused(specs, make_member, tmp_path):
    other = make_member("llama", 9)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    base = str(tmp_path / "other")
    adapter = specs[1].rpartition("+")[2]
    if "gpt2" in (tmp_path / "base" / "config.json").read_text():
        with pytest.raises(LoadError, match="cannot load adapter"):
            Pack.load([base, f"{base}+{adapter}"])


@given(st.lists(st.one_of(st.none(), st.integers(0, 3)), max_size=12))
def test_a_plan_covers_every_row_once(chosen):
    seen: dict[int, int] = {}
    for rows, adapters in _plan(chosen):
        each, rest = divmod(rows.stop - rows.start, adapters.stop - adapters.start)
        assert rest == 0
        for at, row in enumerate(range(rows.start, rows.stop)):
            assert row not in seen
            seen[row] = adapters.start + at // each
    assert seen == {row: adapter for row, adapter in enumerate(chosen) if adapter is not None}


def test_neighbours_share_a_product():
    assert _plan([None, 0, 1, 2]) == [(slice(1, 4), slice(0, 3))]
    assert _plan([None, None, 0, 0, 1, 1]) == [(slice(2, 6), slice(0, 2))]
    assert _plan([0, 0, 1]) == [(slice(0, 2), slice(0, 1)), (slice(2, 3), slice(1, 2))]
    assert _plan([0, 2]) == [(slice(0, 1), slice(0, 1)), (slice(1, 2), slice(2, 3))]
    assert _plan([None, None]) == []
