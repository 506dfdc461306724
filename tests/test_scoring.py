"""Reading scores and logits out of sequences: late scores, and members that share one LM head."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import TextPack as Pack
from lines import scored

from packllm import Member, MemberError
from packllm.options import make_options
from packllm.weights.scoring import Behind, OneHeadSource, SequenceSource, weights_of

TEXT = "The court shall order relief. What is the capital of France? Once upon a time there was a planner."


def with_other_body(member: Member, seed: int) -> Member:
    """A member of its own weights but for the LM head, which is the same tensor."""
    head = member.model.get_output_embeddings().weight
    model = copy.deepcopy(member.model, {id(head): head})
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in model.get_decoder().parameters():
            if weight is not head and weight.dim() > 1:
                weight.add_(0.1 * torch.randn_like(weight))
    return Member(model, member.tokenizer, f"other-{seed}")


@pytest.fixture
def relatives(make_member) -> list[Member]:
    member = make_member("llama")
    return [member, with_other_body(member, 1), with_other_body(member, 2)]


def sources(members: list[Member]) -> tuple[OneHeadSource, SequenceSource, torch.Tensor]:
    encoded = [member.encoder.encode(TEXT) for member in members]
    behind = []
    for member, e in zip(members, encoded, strict=True):
        end, none = scored(member, e.ids, [], keep=True)
        assert len(none) == 0
        behind.append(Behind(member, end.sequence, torch.tensor(e.positions) - 1))
    assert OneHeadSource.fits(behind)
    targets = torch.tensor([encoded[0].ids[at] for at in encoded[0].positions])
    return OneHeadSource(behind), SequenceSource(behind), targets


def test_one_head_gives_the_logits_that_each_member_gives(relatives, monkeypatch) -> None:
    one, general, targets = sources(relatives)
    monkeypatch.setattr("packllm.weights.scoring.BLOCK_BYTES", 4 * 3 * 430 * 7)  # several blocks
    positions = torch.arange(0, len(targets), 2)
    ours = torch.cat([block.clone() for _, block in one.blocks(positions, [2, 0])], dim=1)
    theirs = torch.cat([block.clone() for _, block in general.blocks(positions, [2, 0])], dim=1)
    assert torch.equal(ours.isneginf(), theirs.isneginf())
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_one_head_gives_loss_and_gradient_in_two_products(relatives) -> None:
    one, general, targets = sources(relatives)
    positions = torch.arange(len(targets)).flip(0)
    weights = np.array([0.6, 0.4])
    parts = [
        (loss, gradient(torch.arange(len(loss)).flip(0)).flip(1))  # any rows, in any order
        for loss, gradient in one.losses(weights, positions, targets, [0, 2])
    ]
    losses, gradients = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], dim=1)
    logits = torch.cat([block.clone() for _, block in general.blocks(torch.arange(len(targets)), [0, 2])], dim=1)
    logits = logits.double()[:, positions].clamp_min(-1e4)
    x = targets[positions]
    logprobs = torch.tensordot(torch.from_numpy(weights), logits, 1).log_softmax(-1)
    assert torch.allclose(losses.double(), -logprobs.gather(-1, x[:, None])[:, 0], atol=1e-4)
    expected = (logits * logprobs.exp()).sum(-1) - logits.gather(-1, x.expand(2, -1)[..., None])[..., 0]
    assert torch.allclose(gradients.double(), expected, atol=1e-3)


@pytest.mark.parametrize("weighting", ["exact", "map", "opt", "exhaustive"])
@pytest.mark.parametrize("kind", ["relatives", "members"])
def test_late_scores_and_weights_are_those_of_scores_from_the_prefill(kind, weighting, request) -> None:
    members = request.getfixturevalue(kind)
    encoded = [member.encoder.encode(TEXT) for member in members]
    found = []
    for late in (False, True):
        sequences, logprobs = [], []
        for member, e in zip(members, encoded, strict=True):
            end, given = scored(member, e.ids, [] if late else e.positions, keep=True)
            sequences.append(end.sequence)
            logprobs.append(None if late else given)
        found.append(weights_of(members, sequences, encoded, logprobs, make_options({"weighting": weighting})))
    early, late_ = found
    assert late_.nll == pytest.approx(early.nll, abs=1e-4)
    assert late_.fused_nll == pytest.approx(early.fused_nll, abs=2e-4)
    assert late_.gap is None or late_.gap <= 1e-4


@pytest.mark.parametrize("weighting", ["exact", "opt"])
def test_a_member_that_fails_when_its_scores_are_read_is_dropped(members, weighting, monkeypatch) -> None:
    read = Behind.logits

    def broken(self, *arguments):
        for logits in read(self, *arguments):
            yield logits * float("nan") if self.member is members[1] else logits

    monkeypatch.setattr(Behind, "logits", broken)
    with pytest.raises(MemberError, match="gpt2-1"):
        Pack(members, weighting=weighting, max_tokens=3).generate(TEXT)
    found = Pack(members, weighting=weighting, max_tokens=3, on_member_error="drop").generate(TEXT).weights
    rest = Pack([members[0], members[2]], weighting=weighting).weigh(TEXT)
    assert found.nll[1] is None
    assert found.values == pytest.approx((rest.values[0], 0.0, rest.values[1]), abs=1e-3)
