"""Sessions against fresh passes without a cache."""

from __future__ import annotations

import naive
import pytest
import torch

from packllm import MemberError

ARCHITECTURES = ["llama", "gpt2", "qwen", "gemma", "gemma2"]
TEXT = "The court shall order relief. What is the capital of France?"  # longer than the sliding window


def ids_of(member, text: str = TEXT) -> list[int]:
    return member.encoder.encode(text).ids


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.exp(), b.exp(), atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefill_scores_and_warms_the_cache_in_one_pass(make_member, architecture):
    member = make_member(architecture)
    ids = ids_of(member)
    session = member.open([ids])
    before = member.engine.forwards
    (observed,) = session.prefill([list(range(1, len(ids)))])
    assert member.engine.forwards == before + 1
    assert torch.allclose(observed, naive.token_logprobs(member, ids), atol=1e-4)
    assert close(session.logprobs[0], naive.next_logprobs(member, ids))


def test_a_capped_head_takes_the_models_own_path(make_member):
    assert make_member("gemma2").engine.body is None
    assert make_member("gemma").engine.body is not None


def test_the_models_own_path_in_small_blocks(make_member, monkeypatch):
    monkeypatch.setattr("packllm.engines.transformers.session.BLOCK_BYTES", 4 * 430 * 5)  # five positions a block
    member = make_member("gemma2")
    ids = ids_of(member)
    session = member.open([ids])
    positions = list(range(3, len(ids)))
    (observed,) = session.prefill([positions], keep=True)
    expected = naive.token_logprobs(member, ids)[2:]
    assert torch.allclose(observed, expected, atol=1e-4)
    assert close(session.logprobs[0], naive.next_logprobs(member, ids))
    which = torch.tensor([0, 4, 5, 9])
    parts = list(session.logits(0, which, 3))
    assert [len(part) for part in parts] == [3, 1]
    again = torch.cat(parts).log_softmax(-1)
    targets = torch.tensor(ids)[torch.tensor(positions)[which]]
    assert torch.allclose(again.gather(-1, targets[:, None])[:, 0].double(), expected[which], atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kept_logits_are_those_behind_the_scores(make_member, architecture):
    member = make_member(architecture)
    ids = ids_of(member)
    session = member.open([ids])
    (observed,) = session.prefill([list(range(1, len(ids)))], keep=True)
    which = torch.tensor([1, 2, 7])
    logits = torch.cat(list(session.logits(0, which, 2)))
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[which + 1][:, None])[:, 0]
    assert torch.allclose(chosen.double(), observed[which], atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_and_blocks_equal_fresh_passes(make_member, architecture):
    member = make_member(architecture)
    ids = ids_of(member)
    session = member.open([ids])
    session.prefill([[]])
    for token in (5, 17, 40):
        session.step([token])
        ids = [*ids, token]
        assert close(session.logprobs[0], naive.next_logprobs(member, ids))
    block = session.extend(torch.tensor([[9, 8, 7]]))
    for n in range(3):
        assert close(block[0, n], naive.next_logprobs(member, [*ids, *[9, 8, 7][: n + 1]]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rewind_equals_a_fresh_pass(make_member, architecture):
    member = make_member(architecture)
    ids = ids_of(member)
    session = member.open([ids])
    session.record()
    session.prefill([[]])
    session.extend(torch.tensor([[9, 8, 7, 6]]))
    session.rewind(3)
    session.step([30])
    assert close(session.logprobs[0], naive.next_logprobs(member, [*ids, 9, 30]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fork_goes_its_own_way(make_member, architecture):
    member = make_member(architecture)
    ids = ids_of(member)
    session = member.open([ids])
    session.prefill([[]])
    fork = session.fork(2)
    fork.step([5, 6])
    session.step([7])
    assert close(fork.logprobs[0], naive.next_logprobs(member, [*ids, 5]))
    assert close(fork.logprobs[1], naive.next_logprobs(member, [*ids, 6]))
    assert close(session.logprobs[0], naive.next_logprobs(member, [*ids, 7]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_and_selection_change_nothing(make_member, architecture):
    member = make_member(architecture)
    rows = [ids_of(member), ids_of(member, "Once upon a time"), ids_of(member, "A query planner chooses an index")]
    session = member.open(rows)
    observed = session.prefill([list(range(1, len(row))) for row in rows])
    for r, row in enumerate(rows):
        assert torch.allclose(observed[r], naive.token_logprobs(member, row), atol=1e-4)
        assert close(session.logprobs[r], naive.next_logprobs(member, row))
    session.step([5, 6, 7])
    session.select([0, 2])
    session.step([8, 9])
    assert close(session.logprobs[0], naive.next_logprobs(member, [*rows[0], 5, 8]))
    assert close(session.logprobs[1], naive.next_logprobs(member, [*rows[2], 7, 9]))


def test_padding_rows_of_the_model_carry_no_mass(make_member):
    member = make_member("llama")
    assert member.model.config.vocab_size > len(member.vocabulary)
    session = member.open([ids_of(member)])
    session.prefill([[]])
    assert session.logprobs.shape[-1] == len(member.vocabulary)
    assert session.logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_closed_session_says_so(make_member):
    member = make_member("llama")
    session = member.open([[1, 2, 3]])
    session.prefill([[]])
    session.close()
    with pytest.raises(MemberError, match="closed"):
        session.step([1])


def test_fingerprints_tell_members_apart(make_member):
    assert make_member("llama", 0).fingerprint == make_member("llama", 0, name="other").fingerprint
    assert make_member("llama", 0).fingerprint != make_member("llama", 3).fingerprint
