"""Lines of members against fresh passes without a cache."""

from __future__ import annotations

import naive
import pytest
import torch
from lines import line, lines, scored

from packllm import MemberError
from packllm.decode.line import read_forks, read_lines
from packllm.engines.base import Read
from packllm.weights.scoring import Behind

ARCHITECTURES = ["llama", "gpt2", "qwen", "gemma", "gemma2"]
TEXT = "The court shall order relief. What is the capital of France?"  # longer than the sliding window


def ids_of(member, text: str = TEXT) -> list[int]:
    return member.encoder.encode(text).ids


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.exp(), b.exp(), atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_is_scored_and_its_cache_warmed_in_one_pass(make_member, architecture):
    member = make_member(architecture)
    ids = ids_of(member)
    before = member.engine.forwards, member.engine.tokens
    end, observed = scored(member, ids)
    assert (member.engine.forwards, member.engine.tokens) == (before[0] + 1, before[1] + len(ids))
    assert torch.allclose(observed, naive.token_logprobs(member, ids), atol=1e-4)
    assert close(end.next_logprobs, naive.next_logprobs(member, ids))


def test_a_capped_head_takes_the_models_own_path(make_member):
    assert make_member("gemma2").engine.head() is None
    assert make_member("gemma").engine.head() is not None


def test_the_models_own_path_in_small_blocks(make_member, monkeypatch):
    monkeypatch.setattr("packllm.engines.transformers.engine.BLOCK_BYTES", 4 * 430 * 5)  # five positions a block
    member = make_member("gemma2")
    ids = ids_of(member)
    positions = list(range(3, len(ids)))
    end, observed = scored(member, ids, positions)
    expected = naive.token_logprobs(member, ids)[2:]
    assert torch.allclose(observed, expected, atol=1e-4)
    assert close(end.next_logprobs, naive.next_logprobs(member, ids))
    which = torch.tensor([0, 4, 5, 9])
    parts = list(Behind(member, end.sequence, torch.tensor(positions) - 1).logits(which, 3))
    assert [len(part) for part in parts] == [3, 1]
    again = torch.cat(parts).log_softmax(-1)
    targets = torch.tensor(ids)[torch.tensor(positions)[which]]
    assert torch.allclose(again.gather(-1, targets[:, None])[:, 0].double(), expected[which], atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("keep", [True, False])
def test_logits_had_again_are_those_behind_the_scores(make_member, architecture, keep, monkeypatch):
    monkeypatch.setattr("packllm.weights.scoring.READ_TOKENS", 6)
    member = make_member(architecture)
    ids = ids_of(member)
    sequence = member.open()
    if keep:
        assert member.engine.keep_hidden(sequence) == (architecture != "gemma2")
    (answer,) = member.engine.read([Read(sequence, ids, [*ids[1:], -1])])
    which = torch.tensor([1, 2, 7])
    before = member.engine.forwards
    logits = torch.cat(list(Behind(member, sequence, torch.arange(len(ids) - 1)).logits(which, 2)))
    assert (member.engine.forwards == before) == (keep and architecture != "gemma2")
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[which + 1][:, None])[:, 0]
    assert torch.allclose(chosen.double(), answer[which], atol=1e-5)
    assert torch.allclose(chosen.double(), naive.token_logprobs(member, ids)[which], atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_and_blocks_equal_fresh_passes(make_member, architecture):
    member = make_member(architecture)
    ids = ids_of(member)
    end = line(member, ids)
    for token in (5, 17, 40):
        end.read([token])
        ids = [*ids, token]
        assert close(end.next_logprobs, naive.next_logprobs(member, ids))
    block = end.read([9, 8, 7])
    for n in range(3):
        assert close(block[n], naive.next_logprobs(member, [*ids, *[9, 8, 7][: n + 1]]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cropped_line_equals_a_fresh_pass(make_member, architecture):
    member = make_member(architecture)
    ids = ids_of(member)
    end = line(member, ids)
    block = end.read([9, 8, 7, 6])
    end.crop(len(ids) + 1, block[0])
    assert close(end.next_logprobs, naive.next_logprobs(member, [*ids, 9]))
    end.read([30])
    assert close(end.next_logprobs, naive.next_logprobs(member, [*ids, 9, 30]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fork_goes_its_own_way(make_member, architecture):
    member = make_member(architecture)
    ids = ids_of(member)
    end = line(member, ids)
    forks = {token: end.fork() for token in (5, 6)}
    before = member.engine.forwards
    read_lines({**forks, 7: end}, {token: [token] for token in (5, 6, 7)})
    assert member.engine.forwards == before + 1
    for token, one in {**forks, 7: end}.items():
        assert close(one.next_logprobs, naive.next_logprobs(member, [*ids, token]))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_continuations_are_scored_in_one_pass(make_member, architecture):
    member = make_member(architecture)
    ids = ids_of(member)
    rows = [[5, 6, 7], [9], [8, 8]]
    end, before = line(member, ids), member.engine.forwards
    forks, scores = read_forks(end, rows)
    assert member.engine.forwards == before + 1
    for row, fork, given in zip(rows, forks, scores, strict=True):
        expected = naive.token_logprobs(member, [*ids, *row])[-len(row) :]
        assert torch.allclose(given, expected, atol=1e-4)
        assert close(fork.next_logprobs, naive.next_logprobs(member, [*ids, *row]))
        fork.close()
    assert end.sequence.ids == ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_company_changes_nothing(make_member, architecture):
    member = make_member(architecture)
    rows = [ids_of(member), ids_of(member, "Once upon a time"), ids_of(member, "A query planner chooses an index")]
    ends = lines({r: (member, row) for r, row in enumerate(rows)})
    for r, row in enumerate(rows):
        assert close(ends[r].next_logprobs, naive.next_logprobs(member, row))
    read_lines(ends, {0: [5], 1: [6], 2: [7]})
    ends.pop(1).close()
    read_lines(ends, {0: [8], 2: [9]})
    assert close(ends[0].next_logprobs, naive.next_logprobs(member, [*rows[0], 5, 8]))
    assert close(ends[2].next_logprobs, naive.next_logprobs(member, [*rows[2], 7, 9]))


def test_padding_rows_of_the_model_carry_no_mass(make_member):
    member = make_member("llama")
    assert member.model.config.vocab_size > len(member.vocabulary)
    here = line(member, ids_of(member)).next_logprobs
    assert here.shape[-1] == len(member.vocabulary)
    assert here.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_closed_line_says_so(make_member):
    end = line(make_member("llama"), [1, 2, 3])
    end.close()
    with pytest.raises(MemberError, match="closed"):
        end.read([1])


def test_fingerprints_tell_members_apart(make_member):
    assert make_member("llama", 0).fingerprint == make_member("llama", 0, name="other").fingerprint
    assert make_member("llama", 0).fingerprint != make_member("llama", 3).fingerprint
