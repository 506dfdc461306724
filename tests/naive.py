"""The slow, obviously right versions: all logits recomputed at each step, no cache, no shortcut."""

from __future__ import annotations

import torch


def next_logprobs(member, ids: list[int]) -> torch.Tensor:
    """float32 (V,): the member's next-token log-probabilities from a fresh pass over all ids."""
    with torch.inference_mode():
        logits = member.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits[: len(member.vocabulary)].float().log_softmax(-1)


def fused(parts: list[torch.Tensor], weights: list[float], pool: str) -> torch.Tensor:
    """Probabilities of the fused distribution, by the definition."""
    if pool == "linear":
        return sum(w * p.exp() for w, p in zip(weights, parts, strict=True))
    return torch.softmax(sum(w * p for w, p in zip(weights, parts, strict=True)), dim=-1)


def greedy(members, prompts: list[list[int]], weights, pool: str, max_tokens: int) -> list[int]:
    """Greedy fused decoding: every member with a weight reads its prompt and all tokens so far, anew."""
    running = [k for k, w in enumerate(weights) if w != 0]
    ends = set().union(*(members[k].end_ids for k in running))
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        parts = [next_logprobs(members[k], [*prompts[k], *tokens]) for k in running]
        token = int(fused(parts, [weights[k] for k in running], pool).argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens


def token_logprobs(member, ids: list[int]) -> torch.Tensor:
    """float64 (t - 1,): log p of each token but the first, from one full pass."""
    with torch.inference_mode():
        logits = member.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    logprobs = logits[:-1, : len(member.vocabulary)].float().log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].double()
