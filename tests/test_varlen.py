"""One call of attention for all sequences of a pass: the same numbers as a call for each."""

from __future__ import annotations

import pytest
import torch

from packllm.engines.base import Read, read_together
from packllm.engines.transformers import varlen

TEXT = "The court shall order relief. Once upon a time there was a planner, and it chose an index scan of statistics."

PARTS = [(9, 1, 1, 4), (1, 1, 3, 1), (30, 2, 1, 1), (17, 1, 1, 1)]
"""Tokens that each sequence reads in each of four passes: prompts, single tokens, and drafts, beyond windows of 8."""


def slow(query, key, value, ends_q, ends_k, most_q, most_k, *, scale, window_size):
    """What torch's documentation says of varlen_attn: each sequence alone, its last query at its last key."""
    counts, lengths = ends_q.diff().tolist(), ends_k.diff().tolist()
    assert (max(counts), max(lengths)) == (most_q, most_k)
    assert window_size[1] == 0  # causal
    outputs = []
    for q, k, v in zip(query.split(counts), key.split(lengths), value.split(lengths), strict=True):
        k, v = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        behind = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (behind >= 0) & ((behind <= window_size[0]) | (window_size[0] < 0))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def read(member, ids, parts=PARTS):
    """Log-probabilities of sequences that are read beside each other, each (n, V)."""
    sequences = [member.open() for _ in parts]
    rows = [[] for _ in parts]
    for at in range(len(parts[0])):
        reads = []
        for k, part in enumerate(parts):
            start = sum(part[:at])
            assert k + start + part[at] <= len(ids)
            reads.append(Read(sequences[k], ids[k : k + sum(part)][start : start + part[at]], "all"))
        for row, answer in zip(rows, read_together(reads), strict=True):
            row.append(answer)
    for sequence in sequences:
        sequence.close()
    return [torch.cat(row) for row in rows]


@pytest.mark.parametrize("kind", ["llama", "qwen", "gemma", "gpt2", "gemma2"])
def test_it_is_what_each_sequence_alone_would_be(kind, make_member, monkeypatch):
    """One call for each of two layers. Gemma 2 caps its scores, which the kernel cannot."""
    member = make_member(kind, seed=7)
    ids = member.encoder.encode(TEXT).ids
    expected = read(member, ids)
    called = []

    def counted(*arguments, **options):
        called.append(arguments)
        return slow(*arguments, **options)

    monkeypatch.setattr(varlen, "of", lambda query, value: counted)
    before = member.engine.forwards
    for row, right in zip(read(member, ids), expected, strict=True):
        torch.testing.assert_close(row, right, rtol=0, atol=2e-4)
    calls = 0 if kind == "gemma2" else 2 * (member.engine.forwards - before)
    assert len(called) == calls
    alone = read(member, ids, PARTS[:1])
    torch.testing.assert_close(alone[0], expected[0], rtol=0, atol=2e-4)
    assert len(called) == calls  # one sequence needs no such call


def test_on_a_cpu_there_is_no_such_kernel():
    assert varlen.of(*[torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16)] * 2) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["llama", "qwen", "gemma", "gpt2"])
def test_on_a_gpu_it_is_what_each_sequence_alone_is(kind, make_member):
    from packllm import Member

    tiny = make_member(kind, seed=7)
    model = type(tiny.model)(tiny.model.config).to("cuda", torch.bfloat16).eval()
    member = Member(model, tiny.tokenizer, kind)
    assert varlen.of(*[torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16, device="cuda")] * 2) is not None
    ids = member.encoder.encode(TEXT).ids
    together = read(member, ids)
    for k, part in enumerate(PARTS):
        with torch.inference_mode():
            fresh = model(torch.tensor([ids[k : k + sum(part)]], device="cuda"), use_cache=False).logits[0]
        right = fresh[:, : member.vocabulary_size].float().log_softmax(-1)
        assert (together[k].to("cuda") - right).abs().max() <= 0.05 * right.std()
